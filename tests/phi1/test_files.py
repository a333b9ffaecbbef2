"""A file is whole or absent."""

import errno
import os
import pathlib
import re

import pytest

from phi1 import files
from phi1.errors import UserError
from phi1.files import (
    atomic_write,
    claim,
    lock_folder,
    read_toml,
    sha256_file,
    sha256_json,
    temporary,
    write_json,
    writer_of,
)


def test_a_failed_write_leaves_what_stood_there(tmp_path: pathlib.Path) -> None:
    path = tmp_path / "a.txt"
    path.write_text("before")
    with pytest.raises(RuntimeError), atomic_write(path, "w") as file:
        file.write("half")
        raise RuntimeError
    assert path.read_text() == "before"
    assert [p.name for p in tmp_path.iterdir()] == ["a.txt"]


@pytest.mark.parametrize("code", [errno.ENOSPC, errno.EDQUOT])
def test_a_full_disk_is_one_clear_line(tmp_path: pathlib.Path, monkeypatch: pytest.MonkeyPatch, code: int) -> None:
    def full(descriptor: int) -> None:
        raise OSError(code, os.strerror(code))

    monkeypatch.setattr(os, "fsync", full)
    path = tmp_path / "new" / "a.json"
    with pytest.raises(UserError, match=r"no space left while writing .*a\.json: free space") as caught:
        write_json(path, {"a": 1})
    assert "\n" not in str(caught.value)
    assert list(path.parent.iterdir()) == []


def test_a_really_full_disk(tmp_path: pathlib.Path) -> None:
    full = pathlib.Path("/dev/full")  # every write fails with ENOSPC
    if not full.exists():
        pytest.skip("no /dev/full on this system")
    temporary(tmp_path / "a.bin").symlink_to(full)
    with pytest.raises(UserError, match="no space left"), atomic_write(tmp_path / "a.bin") as file:
        file.write(b"x" * 100_000)
    assert list(tmp_path.iterdir()) == []


def test_a_temporary_file_names_its_machine_and_process(
    tmp_path: pathlib.Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    numbers = []
    for machine in (files._MACHINE, files._MACHINE + 1):
        monkeypatch.setattr(files, "_MACHINE", machine)
        path = temporary(tmp_path / "metrics.jsonl")
        assert path.parent == tmp_path and re.fullmatch(
            r"metrics\.jsonl\.tmp-[0-9]+", path.name
        )  # as phi1/run.py looks
        numbers.append(int(path.name.rpartition("-")[2]))
    assert [writer_of(number) for number in [*numbers, 17]] == [None, os.getpid(), 17]


def test_other_errors_pass_through(tmp_path: pathlib.Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(OSError), atomic_write(tmp_path / "file" / "below") as file:
        file.write(b"")


def test_hashes(tmp_path: pathlib.Path) -> None:
    (tmp_path / "a").write_bytes(b"abc")
    assert sha256_file(tmp_path / "a") == "ba7816bf8f01cfea414140de5dae2223b00361a396177a9cb410ff61f20015ad"
    assert sha256_json({"b": 1, "a": 2}) == sha256_json({"a": 2, "b": 1}) != sha256_json({"a": 2, "b": 2})


def test_a_folder_is_claimed_once(tmp_path: pathlib.Path) -> None:
    identity = {"stage": "x", "config": {"size": 1, "names": ("a", "b")}, "long": "l" * 100}
    path = tmp_path / "folder" / "stage.json"
    claim(path, identity, "rows")
    written = path.read_bytes()
    claim(path, identity, "rows")  # a tuple is read back as a list, and is the same
    assert path.read_bytes() == written
    other = {"stage": "x", "config": {"size": 2, "names": ("a", "b")}, "long": "l" * 99, "new": None}
    with pytest.raises(UserError) as refused:
        claim(path, other, "rows")
    text = str(refused.value)
    assert "folder: holds rows made with other settings (different: config.size: 1 there, 2 asked, long: " in text
    assert "new: nothing there, null asked" in text and "l" * 60 not in text
    for broken in ("{", "[]"):
        path.write_text(broken)
        with pytest.raises(UserError, match="not what was written there"):
            claim(path, identity, "rows")


def test_toml_is_read_or_is_one_of_two_errors(tmp_path: pathlib.Path) -> None:
    path = tmp_path / "a.toml"
    with pytest.raises(OSError, match="No such file"):
        read_toml(path)
    for content in (b"a = ", b"a = '\xff'"):
        path.write_bytes(content)
        with pytest.raises(ValueError, match=r"document|utf-8"):
            read_toml(path)
    path.write_text("[a]\nb = 1\n")
    assert read_toml(path) == {"a": {"b": 1}}


@pytest.mark.parametrize("code", [errno.ENOSYS, errno.ENOLCK])
def test_a_folder_that_cannot_be_locked_is_named(
    code: int, tmp_path: pathlib.Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def flock(file: object, operation: int) -> None:
        raise OSError(code, os.strerror(code))

    monkeypatch.setattr(files.fcntl, "flock", flock)
    with pytest.raises(UserError, match=r"out: cannot be locked against a second evaluation \(.*\); choose a --output"):
        lock_folder(tmp_path / "out", "evaluation", "--output")


def test_a_locked_folder_is_one_users_until_the_file_is_closed(tmp_path: pathlib.Path) -> None:
    busy = r"out: another evaluation is running there; wait for it, or choose another --output"
    with lock_folder(tmp_path / "out", "evaluation", "--output"), pytest.raises(UserError, match=busy):
        lock_folder(tmp_path / "out", "evaluation", "--output")
    lock_folder(tmp_path / "out", "evaluation", "--output").close()
