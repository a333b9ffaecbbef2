"""What readers plan and yield: units of a source, documents, and what is known of their content."""

import dataclasses
import json
import os
import pathlib
from typing import Any

from phi1.files import sha256_file, sha256_json, write_json


@dataclasses.dataclass(frozen=True)
class Unit:
    """A part of a source, read alone. place: a file or folder; items: files in it, a row group, a part.
    columns: field -> column, where the user said so. content: hash of what it holds."""

    kind: str
    place: str
    name: str
    source: str
    licenses: tuple[str, ...] = ()
    items: tuple[str, ...] = ()
    part: tuple[int, int] = (0, 1)
    columns: tuple[tuple[str, str], ...] = ()
    content: str = ""

    @property
    def made_of(self) -> tuple[str, str]:
        """Name and identity, for `run_stage`."""
        facts = [self.kind, self.name, self.source, self.licenses, self.part, self.columns, self.content]
        return self.source, sha256_json(facts)


@dataclasses.dataclass(frozen=True)
class Raw:
    """A document before the filters. content: text, or bytes still to be decoded, or whatever stood in its place.

    prose: explanations in paragraphs, a line each, with code between ``` lines. origin: the source's own name of this
    content (The Stack: the git blob); head, stars: its repository's; authors; url: where it can be seen, and its
    removal be asked for.
    """

    content: Any
    path: str
    name: str
    source: str
    licenses: tuple[str, ...]
    lang: str = "Python"
    prose: bool = False
    origin: str | None = None
    head: str | None = None
    stars: int | None = None
    authors: tuple[str, ...] = ()
    url: str | None = None


class ContentHashes:
    """What is known of the sources' content, in a JSON file: SHA-256 of large files, as long as a file is the same one
    on disk (device, inode, size, times of change), and under which name a content was first read, which it keeps."""

    def __init__(self, path: pathlib.Path) -> None:
        self._path = path
        try:
            known = json.loads(path.read_text(encoding="utf-8"))
            self._files, self._names = dict(known["files"]), dict(known["names"])
        except (OSError, ValueError, KeyError, TypeError):  # absent or damaged: the files are hashed again
            self._files, self._names = {}, {}

    def of(self, file: pathlib.Path) -> str:
        """The hash of a file's content."""
        stat = file.stat()
        stamp = [stat.st_dev, stat.st_ino, stat.st_size, stat.st_mtime_ns, stat.st_ctime_ns]
        name = printable(str(file.resolve()))
        if name not in self._files or self._files[name][0] != stamp:
            self._files[name] = [stamp, sha256_file(file)]
            self._save()
        return self._files[name][1]

    def name(self, content: str, name: str) -> str:
        """The name under which this content was first read: `name`, if it is now."""
        if content not in self._names:
            self._names[content] = name
            self._save()
        return self._names[content]

    def _save(self) -> None:
        write_json(self._path, {"files": self._files, "names": self._names})


def printable(name: str) -> str:
    """A file's name as text: bytes that are not UTF-8 become \\xNN."""
    return os.fsencode(name).decode("utf-8", "backslashreplace")


def suffix(path: str) -> str:
    """`pathlib.PurePosixPath(path).suffix` of a file's path, in a tenth of its 8 µs."""
    name = path.rpartition("/")[2]
    dot = name.rfind(".")
    return name[dot:] if 0 < dot < len(name) - 1 else ""
