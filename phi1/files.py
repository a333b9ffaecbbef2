"""Files that are whole or absent: written under a temporary name, synced, renamed."""

import contextlib
import errno
import fcntl
import hashlib
import json
import os
import pathlib
import socket
import sys
import zlib
from collections.abc import Iterator, Mapping
from typing import IO, Any

from phi1.errors import UserError

_PROCESSES = 10**10  # more than a machine numbers
_MACHINE = zlib.crc32(socket.gethostname().encode())


def temporary(path: pathlib.Path) -> pathlib.Path:
    """Where this process writes what is to stand at `path`: `<name>.tmp-<number>` beside it.

    The number is the machine's, by its name, and the process's: several machines may write into one folder.
    """
    return path.with_name(f"{path.name}.tmp-{_MACHINE * _PROCESSES + os.getpid()}")


def writer_of(number: int) -> int | None:
    """The process that a temporary file's number names; None for one of another machine."""
    machine, process = divmod(number, _PROCESSES)
    return process if machine in (0, _MACHINE) else None  # 0: files from before machines had a number


@contextlib.contextmanager
def atomic_write(path: pathlib.Path, mode: str = "wb") -> Iterator[IO[Any]]:
    """Opens `path` for writing so that it appears whole or not at all.

    The data goes to `temporary(path)` in the same folder, is fsynced, and takes `path`'s name
    when the block ends without an exception; otherwise the temporary file is removed and what
    stood at `path` stays. A full disk, quota or file size limit becomes a `UserError` that names the folder.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    written = temporary(path)
    encoding = None if "b" in mode else "utf-8"
    try:
        with open(written, mode, encoding=encoding) as file:
            yield file
            file.flush()
            os.fsync(file.fileno())
        os.replace(written, path)
    except OSError as error:
        if error.errno in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG):
            raise UserError(
                f"no space left while writing {path}: free space on that disk (or choose another "
                "folder) and run the same command again; what was finished is kept"
            ) from error
        raise
    finally:
        written.unlink(missing_ok=True)


def lock_folder(folder: pathlib.Path, what: str, option: str) -> IO[str]:
    """Makes a folder and keeps other processes out of it until the file that this returns is closed.

    what: what is done there, in messages ("training"). option: by which the user names the folder. UserError while
    another process is there, or where the folder cannot be written or locked.
    """
    try:
        folder.mkdir(parents=True, exist_ok=True)
        file = open(folder / ".lock", "w")  # noqa: SIM115, the caller's
    except OSError as error:  # forbidden, read-only, a file in the way, a file system that is none, …
        raise UserError(f"{folder}: cannot be written ({error.strerror}); choose another {option}") from error
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError as error:
        file.close()
        if isinstance(error, BlockingIOError):
            raise UserError(
                f"{folder}: another {what} is running there; wait for it, or choose another {option}"
            ) from error
        raise UserError(  # ENOSYS, ENOLCK: some network file systems
            f"{folder}: cannot be locked against a second {what} ({error.strerror}); choose a {option} on a file "
            "system that has locks"
        ) from error
    return file


def json_text(value: Any) -> str:
    """`value` as the indented JSON that `write_json` writes."""
    return json.dumps(value, indent=2, ensure_ascii=False) + "\n"


def write_json(path: pathlib.Path, value: Any) -> None:
    """Writes `value` as indented JSON, atomically. Half a character (a lone surrogate) is written as JSON's \\u
    escape.
    """
    with atomic_write(path) as file:
        file.write(json_text(value).encode("utf-8", "backslashreplace"))


def sha256_file(path: pathlib.Path) -> str:
    """The SHA-256 of a file's bytes, in hex."""
    digest = hashlib.sha256()
    with open(path, "rb") as file:
        while block := file.read(1 << 20):
            digest.update(block)
    return digest.hexdigest()


def sha256_json(value: Any) -> str:
    """The SHA-256 of a JSON-able value in canonical form (sorted keys, no blanks)."""
    text = json.dumps(value, sort_keys=True, separators=(",", ":"), ensure_ascii=False)
    return hashlib.sha256(text.encode("utf-8", "surrogatepass")).hexdigest()


def claim(path: pathlib.Path, identity: Mapping[str, Any], what: str) -> None:
    """Writes what a folder is made of to a JSON file in it, or checks that it is what stands there.

    identity: JSON-able facts that decide the contents. what: what the folder holds, for the message. Raises UserError,
    naming what differs, where the folder was begun with another identity.
    """
    if not path.exists():
        write_json(path, identity)
        return
    try:
        before = json.loads(path.read_text(encoding="utf-8"))
        if not isinstance(before, dict):
            raise ValueError(f"a {type(before).__name__}, no object")
    except ValueError as error:
        raise UserError(
            f"{path}: not what was written there ({error}); delete the folder, or choose another"
        ) from error
    check_identity(path.parent, before, identity, what)


def check_identity(folder: pathlib.Path, before: Mapping[str, Any], identity: Mapping[str, Any], what: str) -> None:
    """Raises UserError, naming what differs, unless a folder made of `before` is what `identity` asks for."""
    there, asked = _flat(before), _flat(identity)
    differing = sorted(name for name in there | asked if there.get(name) != asked.get(name))
    if differing:
        told = ", ".join(
            f"{name}: {_short(there.get(name))} there, {_short(asked.get(name))} asked" for name in differing
        )
        raise UserError(
            f"{folder}: holds {what} made with other settings (different: {told}); run it as it was begun, choose "
            f"another folder, or delete this one"
        )


def _flat(facts: Mapping[str, Any], before: str = "") -> dict[str, str]:
    """Names of facts, those within others with dots, and their values as JSON, in which a tuple is a list."""
    flat: dict[str, str] = {}
    for name, value in facts.items():
        inner = isinstance(value, Mapping) and value
        flat |= (
            _flat(value, f"{before}{name}.") if inner else {f"{before}{name}": json.dumps(value, ensure_ascii=False)}
        )
    return flat


def _short(text: str | None) -> str:
    text = text or "nothing"
    return text if len(text) <= 40 else f"{text[:37]}…"


def set_aside(path: pathlib.Path) -> pathlib.Path:
    """Renames a damaged file or folder to a free name that says so (`<name>.damaged`), and returns that."""
    number = 1
    while os.path.lexists(aside := path.with_name(f"{path.name}.damaged{f'-{number}' if number > 1 else ''}")):
        number += 1
    return path.rename(aside)


def read_toml(path: pathlib.Path) -> dict[str, Any]:
    """What a TOML file holds. Raises OSError if it cannot be read, ValueError if it is none."""
    if sys.version_info >= (3, 11):
        import tomllib
    else:
        import tomli as tomllib

    return tomllib.loads(path.read_text(encoding="utf-8"))
