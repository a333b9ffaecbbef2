"""What a folder holds and is not read: said, and never lost without a word."""

import os
import pathlib
from typing import Any

import pytest

from data_tools import ingest
from phi1.errors import UserError


def run(tmp_path: pathlib.Path, source: str, name: str = "documents") -> Any:
    return ingest.run(ingest.Config(output=tmp_path / name, sources=(source,), workers=1))


def test_folders_that_are_not_looked_into_are_said(
    tmp_path: pathlib.Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    for name in ("code/a.py", "code/closed/b.py", "elsewhere/c.py"):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text(f"def f():\n    return {name!r}\n")
    (tmp_path / "code" / "linked").symlink_to(tmp_path / "elsewhere")
    scandir, closed = os.scandir, str(tmp_path / "code" / "closed")

    def refuse(path: Any) -> Any:  # to root, nothing is closed
        if str(path) == closed:
            raise PermissionError(13, "Permission denied", closed)
        return scandir(path)

    monkeypatch.setattr(os, "scandir", refuse)
    made = run(tmp_path, f"folder:{tmp_path / 'code'}")
    assert made.column("max_stars_repo_path") == ["a.py"]
    said = capsys.readouterr().err
    assert f"warning: ingest: a folder is left out: {tmp_path / 'code' / 'linked'} is a link, which is not" in said
    assert "own (and 1 more)" in said
    (tmp_path / "code" / "linked").unlink()
    run(tmp_path, f"folder:{tmp_path / 'code'}")
    assert f"a folder is left out: {closed} cannot be read (Permission denied)\n" in capsys.readouterr().err


def test_lines_without_a_column_for_the_text_are_failures(tmp_path: pathlib.Path) -> None:
    (tmp_path / "code").mkdir()
    lines = tmp_path / "code" / "a.jsonl"
    lines.write_text("".join(f'{{"body": "x = {i}", "id": {i}}}\n' for i in range(30)))
    with pytest.raises(UserError, match=r"30 of 30 rows failed \(30 × no column content or text or code\)"):
        run(tmp_path, f"folder:{lines.parent}")
    lines.write_text('{"text": "Lists and loops."}\n{"text": ""}\n{"text": "Sets."}\n{}\n')
    made = run(tmp_path, f"folder:{lines.parent}", "mended")
    assert made.rows == 2 and made.counters["dropped_empty"] == 1
    (failure,) = made.failures()
    assert failure["key"].endswith("line 4") and failure["reason"].endswith("code (none at all)")
