"""Help is wrapped to the terminal, whatever line breaks the docstrings have."""

import dataclasses

import pytest

from phi1 import options


@dataclasses.dataclass(frozen=True, kw_only=True)
class Inner:
    size: int = 1
    """Of the inner part, which is a sentence that goes on for longer than a line of this file may be, so that it
    is broken here.
    """


@dataclasses.dataclass(frozen=True, kw_only=True)
class Base:
    folder: str = "x"
    """Where it is written to, a
    folder."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Config(Base):
    inner: Inner = dataclasses.field(default_factory=Inner)


DOCUMENTATION = """What it does, in a sentence that has
a line break.

term       is explained in words that
           go on
another    too

    a command    as it is
"""


def test_help(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setenv("COLUMNS", "100")
    with pytest.raises(SystemExit):
        options.parse(Config, "phi1 it", ["--help"], DOCUMENTATION)
    text = capsys.readouterr().out
    assert "\n What it does, in a sentence that has a line break.\n" in text
    assert "\n term       is explained in words that\n            go on\n another    too\n" in text
    assert "\n     a command    as it is\n" in text
    assert "Where it is written to, a folder. (default: x)" in text
    joined = " ".join(line.strip("│ ") for line in text.splitlines())
    assert "goes on for longer than a line of this file may be, so that it is broken here. (default: 1)" in joined


def test_values_are_of_the_class_itself() -> None:
    with pytest.raises(SystemExit):
        options.parse(Config, "phi1 it", ["--help"], None)
    config = options.parse(Config, "phi1 it", ["--folder", "y", "--inner.size", "3"], None)
    assert config == Config(folder="y", inner=Inner(size=3))
