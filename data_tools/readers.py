"""Readers: where documents come from.

A source is written "kind:place":

    stdlib                            the running interpreter's standard library, without its tests
    pypi:networkx                     an installed distribution's Python files, without its tests
    folder:PATH                       all files under PATH that are .py, .txt, .md, .jsonl or .jsonl.zst
    stack:PATH                        The Stack's parquet files: a file, a folder or a glob
    parquet:PATH?FIELD=COLUMN&…       other parquet files; a field (`FIELDS`) that is not named is looked for by its usual
                                      columns, e.g. parquet:/data/edu/*.parquet?content=text
    stackoverflow:PATH/Posts.xml      the public dump: question and best answer as one document

`plan(sources)` splits them into units (a list of files, a parquet row group, a part of the questions), each
read alone, in any process: `read(unit, spool, tag)` yields raw documents, failures and counters. A unit knows its content
by hash; where it lies and when it was written is no part of what it is. A bad value is the failure of its document.
"""

import contextlib
import dataclasses
import fcntl
import glob
import hashlib
import html.parser
import importlib.metadata
import io
import json
import math
import os
import pathlib
import re
import shutil
import sqlite3
import sys
import sysconfig
import urllib.parse
from collections.abc import Collection, Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Any
from xml.etree import ElementTree

from data_tools.dataset import Counted, Failure, sweep
from phi1.errors import UserError
from phi1.files import sha256_file, sha256_json, write_json

if TYPE_CHECKING:
    import pyarrow

UNIT_BYTES = 32 << 20  # of source files in one unit: a shard of about that size
_QUESTIONS_BYTES = 1 << 30  # of Posts.xml per unit
FIELDS: dict[str, tuple[str, ...]] = {
    "content": ("content", "text", "code"),
    "path": ("max_stars_repo_path", "path", "file_path"),
    "name": ("max_stars_repo_name", "repo_name", "repo"),
    "licenses": ("max_stars_repo_licenses", "detected_licenses", "licenses", "license"),
    "lang": ("lang", "language"),
    "origin": ("hexsha", "blob_id", "id"),
    "head": ("max_stars_repo_head_hexsha", "revision_id"),
    "stars": ("max_stars_count", "star_events_count", "stars"),
    "authors": ("authors", "author"),
    "url": ("url",),
}
"""What a row of parquet or JSON may say of its document, and the columns in which data sets say it; the first wins."""

_TEXTS = {".py": ("Python", False), ".txt": ("Text", True), ".md": ("Markdown", True)}
"""Suffix -> (language, whether it is prose) of files that are one document."""
_LINES = (".jsonl", ".jsonl.zst")  # a document a line
_BATCH_BYTES = 16 << 20  # of a row group in memory at a time
_BATCH_ROWS = 64  # at most: a dictionary-encoded cell inflates to any size whatever the file says of its own

_PERMISSIVE = re.compile(
    r"\b(mit|bsd|apache|isc|psf|python-2\.0|python software foundation|unlicense|zlib|0bsd|cc0|public domain|hpnd)\b",
    re.I,
)
_COPYLEFT = re.compile(r"\b(gpl|agpl|lgpl|gnu|gplv\d|lgplv\d)", re.I)


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


def plan(sources: Sequence[str], hashes: ContentHashes, *, any_license: bool = False) -> list[Unit]:
    """The units of all sources.

    Raises UserError for a source that is not there, or (unless any_license) under no known permissive licence.
    """
    units: list[Unit] = []
    for source in sources:
        kind, _, place = source.partition(":")
        if kind not in _PLANNERS or (place == "") != (kind == "stdlib"):
            raise UserError(
                f"--sources {source}: not a source; write stdlib, pypi:NAME, folder:PATH, stack:PATH, parquet:PATH or "
                "stackoverflow:PATH/Posts.xml"
            )
        units += _PLANNERS[kind](place, any_license, hashes)
    return units


def read(unit: Unit, spool: pathlib.Path, tag: str) -> Iterator[Raw | Failure | Counted]:
    """The documents of one unit, in a fixed order. spool: the folder that `spooled` filled for `tag`."""
    if unit.kind == "parquet":
        yield from _read_row_group(unit)
    elif unit.kind == "lines":
        yield from _read_lines(unit)
    elif unit.kind == "stackoverflow":
        yield from _read_questions(unit, spool, tag)
    else:
        yield from _read_files(unit)


@contextlib.contextmanager
def spooled(units: Sequence[Unit], spool: pathlib.Path, tag: str) -> Iterator[None]:
    """What must be done before units can be read alone: questions and answers of a dump are joined on disk.

    Two processes may do this in the same folder: one joins while the other waits, and the last one cleans up.
    """
    dumps = {unit.content: unit for unit in units if unit.kind == "stackoverflow"}
    if not dumps:
        yield
        return
    spool.mkdir(parents=True, exist_ok=True)
    with open(spool / "users.lock", "w") as users:
        fcntl.flock(users, fcntl.LOCK_SH)
        for unit in dumps.values():
            with open(spool / "join.lock", "w") as join:
                fcntl.flock(join, fcntl.LOCK_EX)
                sweep(spool)
                _spool_posts(pathlib.Path(unit.place), _spool_path(spool, unit, tag), tag)
        yield
        with contextlib.suppress(BlockingIOError):  # another process still reads here
            fcntl.flock(users, fcntl.LOCK_EX | fcntl.LOCK_NB)
            shutil.rmtree(spool, ignore_errors=True)


# Files: the standard library, installed distributions, folders.


def _plan_stdlib(_: str, any_license: bool, hashes: ContentHashes) -> list[Unit]:
    root = pathlib.Path(sysconfig.get_path("stdlib"))
    version = ".".join(map(str, sys.version_info[:3]))
    skipped = {"site-packages", "dist-packages", "__pycache__"}
    files = [
        path
        for path in sorted(root.rglob("*.py"))
        if not skipped & set(path.relative_to(root).parts) and not _is_test(path.relative_to(root))
    ]
    sized = [(str(path.relative_to(root)), path.stat().st_size) for path in files]
    unit = Unit("stdlib", str(root), "cpython", f"stdlib:cpython=={version}", ("PSF-2.0",))
    return _split(unit, sized)


def _plan_distribution(name: str, any_license: bool, hashes: ContentHashes) -> list[Unit]:
    try:
        distribution = importlib.metadata.distribution(name)
    except importlib.metadata.PackageNotFoundError as error:
        raise UserError(f"--sources pypi:{name}: that package is not installed; pip install {name}") from error
    licenses = _licenses(distribution.metadata)
    known = [text for text in licenses if _PERMISSIVE.search(text) and not _COPYLEFT.search(text)]
    if not any_license and (not licenses or len(known) < len(licenses)):
        raise UserError(
            f"--sources pypi:{name}: its licence ({', '.join(licenses) or 'none stated'}) is not known as permissive; "
            "leave it out, or pass --any-license"
        )
    root = pathlib.Path(str(distribution.locate_file("")))
    sized = sorted(
        (str(file), pathlib.Path(str(file.locate())).stat().st_size)
        for file in distribution.files or []
        if file.suffix == ".py"
        and ".." not in file.parts
        and not _is_test(file)
        and pathlib.Path(str(file.locate())).exists()
    )
    if not sized:
        raise UserError(f"--sources pypi:{name}: has no Python files; leave it out")
    unit = Unit("pypi", str(root), name, f"pypi:{name}=={distribution.version}", tuple(licenses))
    return _split(unit, sized)


def _plan_folder(place: str, any_license: bool, hashes: ContentHashes) -> list[Unit]:
    root = pathlib.Path(place).expanduser()
    if not root.is_dir():
        raise UserError(f"--sources folder:{place}: no folder there")
    files = [path for path in sorted(root.rglob("*")) if path.name.endswith((*_TEXTS, *_LINES)) and path.is_file()]
    if not files:
        raise UserError(f"--sources folder:{place}: no {', '.join((*_TEXTS, *_LINES))} file in it")
    whole = Unit("folder", str(root), "", "folder")
    sized = [(str(path.relative_to(root)), path.stat().st_size) for path in files if not path.name.endswith(_LINES)]
    units = _split(whole, sized) if sized else []
    for path in files:
        if path.name.endswith(_LINES):
            items = (str(path.relative_to(root)),)
            units.append(dataclasses.replace(whole, kind="lines", items=items, content=hashes.of(path)))
    name = hashes.name(sha256_json([unit.content for unit in units]), printable(root.resolve().name))
    return [dataclasses.replace(unit, name=name, source=f"folder:{name}") for unit in units]


def _licenses(metadata: Any) -> list[str]:
    """Licences from a distribution's metadata: the SPDX expression, else the classifiers, else the free text."""
    if expression := metadata.get("License-Expression"):
        return [expression]
    prefix = "License :: "
    classifiers = [text for text in metadata.get_all("Classifier") or [] if text.startswith(prefix)]
    if classifiers:
        return [text.split(" :: ")[-1] for text in classifiers]
    first_line = (metadata.get("License") or "").strip().split("\n")[0]
    return [first_line] if 0 < len(first_line) <= 100 else []


def _is_test(path: Any) -> bool:
    """Tests are left out: long, repetitive, and written for the machine."""
    folders, name = path.parts[:-1], path.name
    return bool({"test", "tests", "idle_test"} & set(folders)) or name.startswith("test_")


def _split(unit: Unit, sized: Sequence[tuple[str, int]]) -> list[Unit]:
    parts: list[list[str]] = [[]]
    size = 0
    for name, length in sized:
        if parts[-1] and size + length > UNIT_BYTES:
            parts.append([])
            size = 0
        parts[-1].append(name)
        size += length
    return [
        dataclasses.replace(unit, items=tuple(part), part=(i, len(parts)), content=_content_of(unit.place, part))
        for i, part in enumerate(parts)
    ]


def _content_of(place: str, items: Sequence[str]) -> str:
    digest = hashlib.sha256()
    for item in items:
        try:
            content = sha256_file(pathlib.Path(place) / item)
        except OSError:
            content = "cannot be read"
        digest.update(f"{printable(item)}\0{content}\0".encode())
    return digest.hexdigest()


def printable(name: str) -> str:
    """A file's name as text: bytes that are not UTF-8 become \\xNN."""
    return os.fsencode(name).decode("utf-8", "backslashreplace")


def _read_files(unit: Unit) -> Iterator[Raw | Failure | Counted]:
    for item in unit.items:
        name = printable(item)
        try:
            content = (pathlib.Path(unit.place) / item).read_bytes()
        except OSError as error:
            yield Failure(f"{unit.source}/{name}", f"cannot be read: {error.strerror}")
            continue
        lang, prose = _TEXTS[pathlib.PurePath(item).suffix]
        yield Raw(content, name, unit.name, unit.source, unit.licenses, lang, prose)


def _read_lines(unit: Unit) -> Iterator[Raw | Failure | Counted]:
    """Documents of a .jsonl or .jsonl.zst file."""
    import pyarrow

    path = pathlib.Path(unit.place) / unit.items[0]
    name = printable(unit.items[0])
    try:
        with pyarrow.input_stream(str(path), compression="zstd" if path.suffix == ".zst" else None) as stream:
            for number, line in enumerate(io.BufferedReader(stream, 1 << 20), 1):
                if not line.strip():
                    continue
                try:
                    row = json.loads(line)
                    if not isinstance(row, dict):
                        raise ValueError("not an object")
                except (ValueError, RecursionError) as error:
                    yield Failure(f"{unit.source}/{name} line {number}", f"not JSON: {_one_line(error)[:100]}")
                    continue
                yield _raw(row, unit, f"{name} line {number}")
    except (OSError, pyarrow.ArrowException) as error:
        raise UserError(f"{path}: cannot be read to its end ({_one_line(error)}); fetch it again") from error


# Parquet files, The Stack's among them.


def _plan_stack(place: str, any_license: bool, hashes: ContentHashes) -> list[Unit]:
    return _plan_files("stack", place, (), hashes)


def _plan_parquet(place: str, any_license: bool, hashes: ContentHashes) -> list[Unit]:
    path, _, query = place.partition("?")
    try:
        pairs = urllib.parse.parse_qsl(query, strict_parsing=True) if query else []
    except ValueError:
        pairs = [("", query)]
    for field, _ in pairs:
        if field not in FIELDS:
            raise UserError(
                f"--sources parquet:{place}: after ? stand FIELD=COLUMN pairs with & between; fields: {', '.join(FIELDS)}"
            )
    return _plan_files("parquet", path, tuple(sorted(pairs)), hashes)


def _plan_files(kind: str, place: str, columns: tuple[tuple[str, str], ...], hashes: ContentHashes) -> list[Unit]:
    import pyarrow
    import pyarrow.parquet

    path = pathlib.Path(place).expanduser()
    files = (
        sorted(path.rglob("*.parquet")) if path.is_dir() else [pathlib.Path(f) for f in sorted(glob.glob(str(path)))]
    )
    if not files:
        raise UserError(f"--sources {kind}:{place}: no parquet file there")
    units = []
    for file in files:
        try:
            metadata = pyarrow.parquet.read_metadata(file)
        except (OSError, pyarrow.ArrowException) as error:
            raise UserError(f"{file}: not a whole parquet file ({_one_line(error)}); fetch it again") from error
        names = metadata.schema.to_arrow_schema().names
        for field, column in columns:
            if column not in names:
                raise UserError(f"{file}: has no column `{column}` ({field}); it has {', '.join(names)}")
        if "content" not in _chosen(names, columns):
            raise UserError(
                f"{file}: has no column {' or '.join(f'`{name}`' for name in FIELDS['content'])}, but {', '.join(names)}; "
                "say which holds the text: parquet:PATH?content=COLUMN"
            )
        groups = metadata.num_row_groups
        content = hashes.of(file)
        name = hashes.name(content, printable(str(file.relative_to(path)) if path.is_dir() else file.name))
        whole = Unit("parquet", str(file), name, f"{kind}:{name}", columns=columns, content=content)
        units += [dataclasses.replace(whole, part=(i, groups)) for i in range(groups)]
    return units


def _chosen(names: Collection[str], columns: tuple[tuple[str, str], ...]) -> dict[str, str]:
    """Field -> column: as the user said, else the first usual one that is there."""
    usual = {field: column for field, known in FIELDS.items() for column in reversed(known) if column in names}
    return usual | dict(columns)


def _read_row_group(unit: Unit) -> Iterator[Raw | Failure | Counted]:
    for number, row in enumerate(_rows_of_group(unit)):
        yield _raw(row, unit, f"row {number} of group {unit.part[0]}")


def _raw(row: Mapping[str, Any], unit: Unit, place: str) -> Raw:
    """A row of a table as a document. place: its path, if it names none."""
    columns = _chosen(row.keys(), unit.columns)
    values = {field: row.get(column) for field, column in columns.items()}
    texts = {field: _text(values.get(field)) for field in ("path", "name", "lang", "origin", "head", "url")}
    stars, path = values.get("stars"), texts["path"]
    finite = isinstance(stars, int | float) and math.isfinite(stars) and abs(stars) < 2**63
    suffix = pathlib.PurePosixPath(path).suffix
    lang, prose = _TEXTS.get(suffix, ("Python", False))
    if not suffix and not texts["lang"]:  # nothing says what it is; data sets call the column of written text so
        prose = columns.get("content") == "text"
        lang = "Text" if prose else lang
    permalink = "https://github.com/{name}/blob/{head}/{path}".format(**texts)
    return Raw(
        values.get("content"),
        path or place,
        texts["name"],
        unit.source,
        licenses_in(values.get("licenses")),
        texts["lang"] or lang,
        prose or texts["lang"].lower() in ("markdown", "text", "restructuredtext"),
        origin=texts["origin"] or None,
        head=texts["head"] or None,
        stars=int(stars) if finite else None,  # type: ignore[arg-type]
        authors=licenses_in(values.get("authors")),
        url=texts["url"] or (permalink if path and texts["name"] and texts["head"] else None),
    )


def _rows_of_group(unit: Unit) -> Iterator[dict[str, Any]]:
    """The rows of a parquet row group, a few in memory at a time. Texts are bytes; a cell that cannot be read is an
    exception in its place."""
    import pyarrow
    import pyarrow.parquet

    try:
        with pyarrow.parquet.ParquetFile(unit.place, pre_buffer=False, buffer_size=1 << 20) as file:
            group = file.metadata.row_group(unit.part[0])
            each = max(1, group.total_byte_size // max(1, group.num_rows))
            batches = file.iter_batches(
                batch_size=max(1, min(_BATCH_ROWS, _BATCH_BYTES // each)),
                row_groups=[unit.part[0]],
                columns=sorted(set(_chosen(file.schema_arrow.names, unit.columns).values())),
                use_threads=False,
            )
            for batch in batches:
                columns = {name: _cells(batch.column(name)) for name in batch.schema.names}
                for i in range(batch.num_rows):
                    yield {name: cells[i] for name, cells in columns.items()}
    except (OSError, pyarrow.ArrowException) as error:
        raise UserError(
            f"{unit.place}: row group {unit.part[0]} is corrupt ({_one_line(error)}); fetch it again"
        ) from error


def _one_line(error: Exception) -> str:
    return " ".join(str(error).split())


def _cells(array: "pyarrow.Array") -> list[Any]:
    import pyarrow
    import pyarrow.types as types

    if types.is_dictionary(array.type):
        array = array.dictionary_decode()
    if types.is_string(array.type) or types.is_large_string(array.type) or types.is_string_view(array.type):
        array = array.cast(pyarrow.large_binary())  # whether it is UTF-8 is looked at cell by cell
    cells: list[Any] = []
    for cell in array:
        try:
            cells.append(cell.as_py())
        except (
            ValueError,
            OverflowError,
            pyarrow.ArrowException,
        ) as error:  # a text inside of a list, a date out of range
            cells.append(error)
    return cells


def _text(value: Any) -> str:
    """A cell that should hold a text."""
    if value is None or isinstance(value, Exception):
        return ""
    if isinstance(value, bytes):
        return value.decode("utf-8", "backslashreplace")
    return str(value).encode("utf-8", "backslashreplace").decode()


def licenses_in(value: Any) -> tuple[str, ...]:
    """Licences (or authors) as data sets write them: a text, a list of them, records with the name in a field, or nothing."""
    if value is None or isinstance(value, Exception):
        return ()
    if isinstance(value, Mapping):
        named = next((value[key] for key in ("spdx_id", "key", "license", "name") if value.get(key)), None)
        return licenses_in(list(value.values()) if named is None else named)
    if isinstance(value, list | tuple):
        return tuple(dict.fromkeys(name for item in value for name in licenses_in(item)))
    text = _text(value).strip()
    return (text,) if text else ()


# StackOverflow's public dump.


def _plan_posts(place: str, any_license: bool, hashes: ContentHashes) -> list[Unit]:
    path = pathlib.Path(place).expanduser()
    if not path.is_file():
        raise UserError(f"--sources stackoverflow:{place}: no file there; give the path of the dump's Posts.xml")
    parts = max(1, -(-path.stat().st_size // _QUESTIONS_BYTES))
    whole = Unit("stackoverflow", str(path), "stackoverflow.com", "stackoverflow", content=hashes.of(path))
    return [dataclasses.replace(whole, part=(i, parts)) for i in range(parts)]


def _spool_path(spool: pathlib.Path, unit: Unit, tag: str) -> pathlib.Path:
    """Named by all that decides what is in it."""
    return spool / f"posts-{sha256_json([unit.content, tag])[:16]}.sqlite"


_SPOOL = """
PRAGMA journal_mode=OFF; PRAGMA synchronous=OFF; BEGIN;
CREATE TABLE questions (id INTEGER PRIMARY KEY, title TEXT, body TEXT, license TEXT, author TEXT);
CREATE TABLE answers (question INTEGER PRIMARY KEY, id INTEGER, accepted INTEGER, score REAL, body TEXT, license TEXT,
                      author TEXT);
CREATE TABLE failures (line INTEGER, reason TEXT);
"""
_POST_TYPE = re.compile(rb"""\sPostTypeId=["'](\d+)["']""")
_PARENT = re.compile(rb"""\sParentId=["'](\d+)["']""")


def _spool_posts(posts: pathlib.Path, path: pathlib.Path, tag: str) -> None:
    """One pass over Posts.xml (100 GB): questions with the tag, and the best answer of each, into SQLite.

    Answers come after their question (rows are in order of Id), so one pass is enough. Best: the accepted
    answer, else the highest score, else the first. A row that cannot be read is a failure.
    """
    if path.exists():
        return
    temporary = path.with_name(f"{path.name}.tmp-{os.getpid()}")
    database = sqlite3.connect(temporary, isolation_level=None)
    wanted: dict[int, int] = {}  # question -> its accepted answer, or 0
    tag_text = tag.encode()
    try:
        database.executescript(_SPOOL)
        for line, row in _posts_in(posts):
            kind, parent = _POST_TYPE.search(row), _PARENT.search(row)
            if kind is not None and (
                kind[1] not in (b"1", b"2")
                or (kind[1] == b"1" and tag_text not in row)
                or (kind[1] == b"2" and parent is not None and int(parent[1]) not in wanted)
            ):
                continue
            try:
                _spool_post(database, _attributes(row), tag, wanted)
            except (ElementTree.ParseError, ValueError) as error:
                database.execute("INSERT INTO failures VALUES (?, ?)", (line, str(error)[:200]))
        database.execute("COMMIT")
        database.close()
        temporary.replace(path)
    except sqlite3.OperationalError as error:
        raise UserError(f"{path.parent}: {error} while joining questions and answers; free space there") from error
    finally:
        database.close()
        temporary.unlink(missing_ok=True)


def _posts_in(posts: pathlib.Path) -> Iterator[tuple[int, bytes]]:
    """(line, text) of each <row …/>. The dump writes one a line. UserError if the file is no Posts.xml, or is cut."""
    row, begun, root, ended = b"", 0, False, False
    with open(posts, "rb") as file:
        for number, line in enumerate(file, 1):
            first, *others = line.split(b"<row ")
            root = root or b"<posts" in first
            row += first if row else b""
            for other in others:
                if row:
                    yield begun, row
                row, begun = b"<row " + other, number
            if b"</posts>" in (others[-1] if others else first):
                ended = True
                row = row.partition(b"</posts>")[0]
    if row.strip():
        yield begun, row
    if not root or not ended:
        missing = "</posts> at its end" if root else "<posts> in it"
        raise UserError(f"{posts}: not a whole StackOverflow Posts.xml (no {missing}); fetch or unpack it again")


def _attributes(row: bytes) -> dict[str, str]:
    """The attributes of a <row …/>. What XML does not allow (control characters as such or as references, a bare &, <)
    is left out or escaped. Raises ParseError if that is not enough."""
    end = row.rfind(b"/>")
    whole = row[: end + 2] if end >= 0 else row
    try:
        return dict(ElementTree.fromstring(whole).attrib)
    except ElementTree.ParseError:
        text = whole.decode("utf-8", "replace")
        text = re.sub(r"&#(?:x([0-9a-fA-F]+)|(\d+));", _allowed_reference, text)
        text = re.sub(r"[\x00-\x08\x0b\x0c\x0e-\x1f\ufffe\uffff]", "", text)
        text = re.sub(r"&(?!(?:amp|lt|gt|quot|apos|#x?[0-9a-fA-F]+);)", "&amp;", text)
        return dict(ElementTree.fromstring(text[:1] + text[1:].replace("<", "&lt;")).attrib)


def _allowed_reference(match: re.Match[str]) -> str:
    digits = match[1] or match[2]
    code = int(digits, 16 if match[1] else 10) if len(digits) < 9 else 0
    allowed = code in (9, 10, 13) or 32 <= code < 0xD800 or 0xE000 <= code < 0xFFFE or 0x10000 <= code < 0x110000
    return match[0] if allowed else ""


def _spool_post(database: sqlite3.Connection, post: Mapping[str, str], tag: str, wanted: dict[int, int]) -> None:
    """A question or an answer into the spool. Raises ValueError for a value that is not what it should be."""
    number, kind = _integer(post, "Id"), _integer(post, "PostTypeId")
    facts = (post.get("Body", ""), _post_license(post), _author(post))
    if kind == 1 and tag in re.split(r"[<>|]+", post.get("Tags", "")):
        accepted = _integer(post, "AcceptedAnswerId", 0)
        wanted[number] = accepted
        title = post.get("Title", "")
        database.execute("INSERT OR IGNORE INTO questions VALUES (?, ?, ?, ?, ?)", (number, title, *facts))
    elif kind == 2 and (question := _integer(post, "ParentId")) in wanted:
        score = float(post.get("Score") or 0)
        if not math.isfinite(score):
            raise ValueError(f"Score is {post['Score']!r}")
        database.execute(
            "INSERT INTO answers VALUES (?, ?, ?, ?, ?, ?, ?) ON CONFLICT (question) DO UPDATE SET id = excluded.id, "
            "accepted = excluded.accepted, score = excluded.score, body = excluded.body, license = excluded.license, "
            "author = excluded.author WHERE (excluded.accepted, excluded.score) > (answers.accepted, answers.score)",
            (question, number, int(number == wanted[question]), score, *facts),
        )


def _integer(post: Mapping[str, str], name: str, default: int | None = None) -> int:
    text = post.get(name) or ("" if default is None else str(default))
    try:
        value = int(text)
    except ValueError as error:
        raise ValueError(f"{name} is {text[:40]!r}" if text else f"{name} is missing") from error
    if not 0 <= value < 2**63:
        raise ValueError(f"{name} is {text[:40]!r}")
    return value


def _author(post: Mapping[str, str]) -> str:
    """Whom the licence asks to be named: the user's page, or the name that a deleted user left."""
    user = post.get("OwnerUserId")
    return f"https://stackoverflow.com/users/{user}" if user else post.get("OwnerDisplayName", "")


def _read_questions(unit: Unit, spool: pathlib.Path, tag: str) -> Iterator[Raw | Failure | Counted]:
    database = sqlite3.connect(_spool_path(spool, unit, tag))
    try:
        if unit.part[0] == 0:
            for line, reason in database.execute("SELECT line, reason FROM failures ORDER BY line, reason"):
                yield Failure(f"{unit.source}/Posts.xml line {line}", reason)
        rows = database.execute(
            "SELECT q.id, q.title, q.body, q.license, q.author, a.id, a.body, a.license, a.author FROM questions q "
            "LEFT JOIN answers a ON a.question = q.id WHERE q.id % ? = ? ORDER BY q.id",
            (unit.part[1], unit.part[0]),
        )
        unanswered = 0
        for number, title, question, question_license, asker, best, answer, answer_license, author in rows:
            if answer is None:
                unanswered += 1
                continue
            text = f"{title}\n\n{html_to_text(question)}\n\n{html_to_text(answer)}\n"
            yield Raw(
                text,
                f"questions/{number}",
                unit.name,
                f"stackoverflow:{number}",
                tuple(sorted({question_license, answer_license})),
                prose=True,
                authors=tuple(dict.fromkeys(filter(None, (asker, author)))),
                url=f"https://stackoverflow.com/a/{best}",
            )
        yield Counted({"dropped_unanswered": unanswered})
    finally:
        database.close()


def _post_license(values: Any) -> str:
    """The dump's ContentLicense, else by date as stackoverflow.com/help/licensing says."""
    if stated := values.get("ContentLicense"):
        return stated
    date = values.get("CreationDate", "")
    return "CC BY-SA 2.5" if date < "2011-04-08" else "CC BY-SA 3.0" if date < "2018-05-02" else "CC BY-SA 4.0"


def html_to_text(source: str) -> str:
    """A post's HTML as plain text: paragraphs apart, list items as "- ", code blocks between ``` lines as they are."""
    parser = _PostText()
    parser.feed(source)
    parser.close()
    return parser.text.strip()


class _PostText(html.parser.HTMLParser):
    _BLOCKS = frozenset({"p", "h1", "h2", "h3", "h4", "ul", "ol", "blockquote", "table", "tr", "hr", "div"})

    def __init__(self) -> None:
        super().__init__(convert_charrefs=True)
        self.text = ""
        self._code: list[str] | None = None  # the lines of a code block while inside one
        self._code_closed = False  # whether </code> came inside of it

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        if self._code is not None and (tag == "pre" or (self._code_closed and tag in self._BLOCKS)):
            self._end_code()  # a <pre> that nobody closed
        if tag == "pre":
            self._code, self._code_closed = [], False
        elif self._code is not None:
            if tag == "br":
                self._code.append("\n")
        elif tag == "code":
            self.text += "`"
        elif tag == "li":
            self._end_line(1)
            self.text += "- "
        elif tag == "br":
            self.text += "\n"
        elif tag in self._BLOCKS:
            self._end_line(2)

    def handle_endtag(self, tag: str) -> None:
        if self._code is not None:
            self._code_closed = self._code_closed or tag == "code"
            if tag == "pre":
                self._end_code()
        elif tag == "code":
            self.text += "`"
        elif tag in self._BLOCKS:
            self._end_line(2)

    def close(self) -> None:
        super().close()
        self._end_code()

    def _end_code(self) -> None:
        if self._code is None:
            return
        code = "".join(self._code).strip("\n").rstrip()
        self._code = None
        if code:
            self._end_line(2)
            self.text += f"```\n{code}\n```\n\n"

    def handle_data(self, data: str) -> None:
        if self._code is not None:
            self._code.append(data)
        else:
            text = re.sub(r"\s+", " ", data)
            self.text += text.lstrip() if self.text.endswith("\n") else text

    def _end_line(self, newlines: int) -> None:
        self.text = self.text.rstrip(" ")
        have = len(self.text) - len(self.text.rstrip("\n"))
        if self.text:
            self.text += "\n" * max(0, newlines - have)


_PLANNERS = {
    "stdlib": _plan_stdlib,
    "pypi": _plan_distribution,
    "folder": _plan_folder,
    "stack": _plan_stack,
    "parquet": _plan_parquet,
    "stackoverflow": _plan_posts,
}
