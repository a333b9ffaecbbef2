"""The console command: help is complete and quick, errors are one line, exit codes are what scripts expect."""

import dataclasses
import importlib
import signal
import subprocess
import sys
import time
import types

import pytest

from phi1 import cli
from phi1.commands import COMMANDS
from phi1.errors import Interrupted, UserError


def test_help_lists_every_command_within_half_a_second() -> None:
    seconds = []
    for _ in range(3):
        start = time.monotonic()
        done = subprocess.run([sys.executable, "-m", "phi1.cli", "--help"], capture_output=True, text=True, check=True)
        seconds.append(time.monotonic() - start)
    for name in COMMANDS:
        assert f"phi1 {name} " in done.stdout
    assert min(seconds) < 0.5


@pytest.mark.parametrize("name", COMMANDS)
def test_every_command_has_help_with_its_options_and_imports_light(name: str) -> None:
    module = importlib.import_module(COMMANDS[name][0])
    assert callable(module.run)
    assert hasattr(module, "Config") or callable(module.parse)
    if hasattr(module, "Config"):
        words = name.split()
        done = subprocess.run(
            [sys.executable, "-X", "importtime", "-m", "phi1.cli", *words, "--help"], capture_output=True, text=True
        )
        assert done.returncode == 0, done.stderr[-2000:]
        for field in dataclasses.fields(module.Config):
            if field.init:
                assert field.name.replace("_", "-") in done.stdout or field.name.upper() in done.stdout, field.name
        imported = {line.split("|")[-1].strip() for line in done.stderr.splitlines() if line.startswith("import time:")}
        assert not imported & {"torch", "transformers", "sklearn", "pyarrow", "openai"}


def test_no_command_or_a_wrong_one(capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main([]) == 0
    assert "phi1 train" in capsys.readouterr().out
    assert cli.main(["data"]) == 0
    assert "phi1 data ingest" in capsys.readouterr().out
    assert cli.main(["trian"]) == 2
    assert "no command 'trian'" in capsys.readouterr().err
    assert cli.main(["data", "anotate"]) == 2
    assert "no command 'data anotate'" in capsys.readouterr().err


def _with_command(monkeypatch: pytest.MonkeyPatch, error: BaseException) -> None:
    @dataclasses.dataclass(frozen=True)
    class Config:
        pass

    def run(config: Config) -> None:
        raise error

    module = types.ModuleType("fake_command")
    module.Config, module.run = Config, run  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "fake_command", module)
    monkeypatch.setitem(COMMANDS, "generate", ("fake_command", "for the test"))


def test_a_user_error_is_one_line_and_status_2(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    _with_command(monkeypatch, UserError("file.bin: corrupt; make it again"))
    assert cli.main(["generate"]) == 2
    assert capsys.readouterr().err == "phi1: error: file.bin: corrupt; make it again\n"


def test_an_interrupt_says_that_work_is_kept(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    _with_command(monkeypatch, KeyboardInterrupt())
    assert cli.main(["generate"]) == 130
    assert "run the same command again" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("package", "command"),
    [
        ("pyarrow.parquet", "the package pyarrow is not installed: pip install -e '.[data]' in phi1's folder"),
        ("sklearn", "the package sklearn is not installed: pip install -e '.[data]' in phi1's folder"),
        ("tensorboard", "the package tensorboard is not installed: pip install -e '.[train]' in phi1's folder"),
        ("some_thing", "the package some_thing is not installed: pip install some-thing"),
    ],
)
def test_a_package_that_is_missing_is_named_with_the_command_that_brings_it(
    package: str, command: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    _with_command(monkeypatch, ModuleNotFoundError(f"No module named {package!r}", name=package))
    assert cli.main(["generate"]) == 2
    assert capsys.readouterr().err == f"phi1: error: {command}\n"


def test_our_own_module_that_is_missing_keeps_its_traceback(monkeypatch: pytest.MonkeyPatch) -> None:
    _with_command(monkeypatch, ModuleNotFoundError("No module named 'kernels.nothing'", name="kernels.nothing"))
    with pytest.raises(ModuleNotFoundError, match=r"kernels\.nothing"):
        cli.main(["generate"])


def test_a_programming_error_keeps_its_traceback(monkeypatch: pytest.MonkeyPatch) -> None:
    _with_command(monkeypatch, ZeroDivisionError())
    with pytest.raises(ZeroDivisionError):
        cli.main(["generate"])


@pytest.mark.parametrize("words", [["--help"], ["train", "--help"]])
def test_a_closed_pipe_ends_it_quietly(words: list[str]) -> None:
    """As `phi1 train --help | head -1`."""
    process = subprocess.Popen([sys.executable, "-m", "phi1", *words], stdout=subprocess.PIPE, stderr=subprocess.PIPE)
    assert process.stdout is not None
    process.stdout.close()
    _, said = process.communicate(timeout=300)
    assert (process.returncode, said) == (141, b"")


@pytest.mark.parametrize("flags", [[], ["-u"]])
def test_a_full_disk_under_the_output_is_one_line(flags: list[str]) -> None:
    with open("/dev/full", "w") as full:
        done = subprocess.run(
            [sys.executable, *flags, "-m", "phi1", "--help"], stdout=full, stderr=subprocess.PIPE, text=True
        )
    line = "phi1: error: No space left on device, of standard output or of a file that was being written: free space"
    assert done.returncode == 2 and done.stderr.startswith(line) and done.stderr.count("\n") == 1


def test_a_run_that_a_scheduler_stopped_ends_with_75(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    for number, status in ((signal.SIGTERM, 75), (signal.SIGUSR1, 75), (signal.SIGINT, 130)):
        _with_command(monkeypatch, Interrupted(number))
        assert cli.main(["generate"]) == status
    assert capsys.readouterr().err.count("run the same command again") == 3
