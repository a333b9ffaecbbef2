"""Readers: where documents come from.

A source is written "kind:place":

    stdlib                            the running interpreter's standard library, without its tests
    pypi:networkx                     an installed distribution's Python files, without its tests
    folder:PATH                       all *.py files under PATH
    stack:PATH                        The Stack's parquet files: a file, a folder or a glob
    stackoverflow:PATH/Posts.xml      the public dump: question and best answer as one document

`plan(sources)` splits them into units (a list of files, a parquet row group, a part of the questions), each
read alone, in any process: `read(unit, spool)` yields raw documents, failures and counters.
"""

import dataclasses
import glob
import html.parser
import importlib.metadata
import pathlib
import re
import sqlite3
import sys
import sysconfig
from collections.abc import Iterator, Sequence
from typing import Any

from data_tools.dataset import Counted, Failure
from phi1.errors import UserError
from phi1.files import sha256_json

UNIT_BYTES = 32 << 20  # of source files in one unit: a shard of about that size
_QUESTIONS_BYTES = 1 << 30  # of Posts.xml per unit

_PERMISSIVE = re.compile(
    r"\b(mit|bsd|apache|isc|psf|python-2\.0|python software foundation|unlicense|zlib|0bsd|cc0|public domain|hpnd)\b",
    re.I,
)
_COPYLEFT = re.compile(r"\b(gpl|agpl|lgpl|gnu|gplv\d|lgplv\d)", re.I)


@dataclasses.dataclass(frozen=True)
class Unit:
    """A part of a source, read alone. place: a file or folder; items: files in it, a row group, a part."""

    kind: str
    place: str
    name: str
    source: str
    licenses: tuple[str, ...] = ()
    items: tuple[str, ...] = ()
    part: tuple[int, int] = (0, 1)


@dataclasses.dataclass(frozen=True)
class Raw:
    """A document before the filters. content: text, or bytes still to be decoded."""

    content: str | bytes
    path: str
    name: str
    source: str
    licenses: tuple[str, ...]
    lang: str = "Python"


def plan(sources: Sequence[str], *, any_license: bool = False) -> tuple[list[Unit], str]:
    """The units of all sources, and a fingerprint that changes when the files behind them do.

    Raises UserError for a source that is not there, or (unless any_license) under no known permissive licence.
    """
    units: list[Unit] = []
    stamps: list[Any] = []
    for source in sources:
        kind, _, place = source.partition(":")
        if kind not in _PLANNERS or (place == "") != (kind == "stdlib"):
            raise UserError(
                f"--sources {source}: not a source; write stdlib, pypi:NAME, folder:PATH, stack:PATH or "
                "stackoverflow:PATH/Posts.xml"
            )
        found, stamp = _PLANNERS[kind](place, any_license)
        units += found
        stamps.append([source, stamp])
    return units, sha256_json(stamps)


def read(unit: Unit, spool: pathlib.Path) -> Iterator[Raw | Failure | Counted]:
    """The documents of one unit, in a fixed order. spool: the folder that `prepare` filled."""
    if unit.kind == "stack":
        yield from _read_row_group(unit)
    elif unit.kind == "stackoverflow":
        yield from _read_questions(unit, spool)
    else:
        yield from _read_files(unit)


def prepare(units: Sequence[Unit], spool: pathlib.Path, tag: str) -> None:
    """What must be done before units can be read alone: questions and answers of a dump are joined on disk."""
    for place in sorted({unit.place for unit in units if unit.kind == "stackoverflow"}):
        _spool_posts(pathlib.Path(place), _spool_path(spool, place), tag)


# Files: the standard library, installed distributions, folders.


def _plan_stdlib(_: str, any_license: bool) -> tuple[list[Unit], Any]:
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
    return _split(unit, sized), sized


def _plan_distribution(name: str, any_license: bool) -> tuple[list[Unit], Any]:
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
    return _split(unit, sized), [distribution.version, sized]


def _plan_folder(place: str, any_license: bool) -> tuple[list[Unit], Any]:
    root = pathlib.Path(place).expanduser()
    if not root.is_dir():
        raise UserError(f"--sources folder:{place}: no folder there")
    files = [path for path in sorted(root.rglob("*.py")) if path.is_file()]
    if not files:
        raise UserError(f"--sources folder:{place}: no *.py file in it")
    sized = [(str(path.relative_to(root)), path.stat().st_size) for path in files]
    stamp = [[name, size, path.stat().st_mtime_ns] for (name, size), path in zip(sized, files, strict=True)]
    return _split(Unit("folder", str(root), root.resolve().name, f"folder:{place}"), sized), stamp


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
    return [dataclasses.replace(unit, items=tuple(part), part=(i, len(parts))) for i, part in enumerate(parts)]


def _read_files(unit: Unit) -> Iterator[Raw | Failure | Counted]:
    for item in unit.items:
        path = pathlib.Path(unit.place) / item
        try:
            content = path.read_bytes()
        except OSError as error:
            yield Failure(f"{unit.source}/{item}", f"cannot be read: {error.strerror}")
            continue
        yield Raw(content, item, unit.name, unit.source, unit.licenses)


# The Stack.


def _plan_stack(place: str, any_license: bool) -> tuple[list[Unit], Any]:
    import pyarrow
    import pyarrow.parquet

    path = pathlib.Path(place).expanduser()
    files = (
        sorted(path.rglob("*.parquet")) if path.is_dir() else [pathlib.Path(f) for f in sorted(glob.glob(str(path)))]
    )
    if not files:
        raise UserError(f"--sources stack:{place}: no parquet file there")
    units, stamp = [], []
    for file in files:
        try:
            metadata = pyarrow.parquet.read_metadata(file)
        except (OSError, pyarrow.ArrowException) as error:
            raise UserError(f"{file}: not a whole parquet file ({error}); fetch it again") from error
        if "content" not in metadata.schema.to_arrow_schema().names:
            raise UserError(f"{file}: has no column `content`; The Stack's files have one")
        stamp.append([str(file), file.stat().st_size, file.stat().st_mtime_ns])
        groups = metadata.num_row_groups
        units += [Unit("stack", str(file), file.name, f"stack:{file.name}", part=(i, groups)) for i in range(groups)]
    return units, stamp


def _read_row_group(unit: Unit) -> Iterator[Raw | Failure | Counted]:
    import pyarrow
    import pyarrow.parquet

    try:
        with pyarrow.parquet.ParquetFile(unit.place) as file:
            known = set(file.schema_arrow.names)
            names = ["content", "lang", "max_stars_repo_path", "max_stars_repo_name", "max_stars_repo_licenses"]
            rows = file.read_row_group(unit.part[0], columns=[n for n in names if n in known]).to_pylist()
    except (OSError, pyarrow.ArrowException) as error:
        raise UserError(f"{unit.place}: row group {unit.part[0]} is corrupt ({error}); fetch the file again") from error
    for row in rows:
        yield Raw(
            row["content"] or "",
            row.get("max_stars_repo_path") or "",
            row.get("max_stars_repo_name") or "",
            unit.source,
            tuple(row.get("max_stars_repo_licenses") or ()),
            row.get("lang") or "Python",
        )


# StackOverflow's public dump.


def _plan_posts(place: str, any_license: bool) -> tuple[list[Unit], Any]:
    path = pathlib.Path(place).expanduser()
    if not path.is_file():
        raise UserError(f"--sources stackoverflow:{place}: no file there; give the path of the dump's Posts.xml")
    parts = -(-path.stat().st_size // _QUESTIONS_BYTES)
    units = [
        Unit("stackoverflow", str(path), "stackoverflow.com", "stackoverflow", part=(i, parts)) for i in range(parts)
    ]
    return units, [path.stat().st_size, path.stat().st_mtime_ns]


def _spool_path(spool: pathlib.Path, place: str) -> pathlib.Path:
    return spool / f"posts-{sha256_json(place)[:16]}.sqlite"


def _spool_posts(posts: pathlib.Path, path: pathlib.Path, tag: str) -> None:
    """One pass over Posts.xml (100 GB): questions with the tag, and the best answer of each, into SQLite.

    Answers come after their question (rows are in order of Id), so one pass is enough. Best: the accepted
    answer, else the highest score, else the first.
    """
    import xml.etree.ElementTree as ElementTree

    if path.exists():
        return
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_suffix(".tmp")
    temporary.unlink(missing_ok=True)
    database = sqlite3.connect(temporary, isolation_level=None)
    try:
        database.executescript(
            "PRAGMA journal_mode=OFF; PRAGMA synchronous=OFF; BEGIN;"
            "CREATE TABLE questions (id INTEGER PRIMARY KEY, accepted INTEGER, title TEXT, body TEXT, license TEXT);"
            "CREATE TABLE answers (question INTEGER PRIMARY KEY, accepted INTEGER, score INTEGER, body TEXT, license TEXT);"
        )
        wanted: dict[int, int] = {}  # question -> its accepted answer, or 0
        context = ElementTree.iterparse(posts, events=("start", "end"))
        _, root = next(context)
        for event, row in context:
            if event != "end" or row.tag != "row":
                continue
            kind, values = row.get("PostTypeId"), row.attrib
            if kind == "1" and tag in re.split(r"[<>|]+", values.get("Tags", "")):
                number, accepted = int(values["Id"]), int(values.get("AcceptedAnswerId") or 0)
                wanted[number] = accepted
                database.execute(
                    "INSERT OR IGNORE INTO questions VALUES (?, ?, ?, ?, ?)",
                    (number, accepted, values.get("Title", ""), values.get("Body", ""), _post_license(values)),
                )
            elif kind == "2" and (question := int(values.get("ParentId") or 0)) in wanted:
                database.execute(
                    "INSERT INTO answers VALUES (?, ?, ?, ?, ?) ON CONFLICT (question) DO UPDATE SET "
                    "accepted = excluded.accepted, score = excluded.score, body = excluded.body, license = excluded.license "
                    "WHERE (excluded.accepted, excluded.score) > (answers.accepted, answers.score)",
                    (
                        question,
                        int(int(values["Id"]) == wanted[question]),
                        int(values.get("Score") or 0),
                        values.get("Body", ""),
                        _post_license(values),
                    ),
                )
            root.clear()  # else the tree of all rows stays in memory
        database.execute("COMMIT")
        database.close()
        temporary.replace(path)
    except (ElementTree.ParseError, StopIteration, KeyError, ValueError) as error:
        raise UserError(f"{posts}: not a whole StackOverflow Posts.xml ({error}); fetch or unpack it again") from error
    except sqlite3.OperationalError as error:
        raise UserError(f"{path.parent}: {error} while joining questions and answers; free space there") from error
    finally:
        database.close()
        temporary.unlink(missing_ok=True)


def _read_questions(unit: Unit, spool: pathlib.Path) -> Iterator[Raw | Failure | Counted]:
    database = sqlite3.connect(_spool_path(spool, unit.place))
    try:
        rows = database.execute(
            "SELECT q.id, q.title, q.body, q.license, a.body, a.license FROM questions q "
            "LEFT JOIN answers a ON a.question = q.id WHERE q.id % ? = ? ORDER BY q.id",
            (unit.part[1], unit.part[0]),
        )
        unanswered = 0
        for number, title, question, question_license, answer, answer_license in rows:
            if answer is None:
                unanswered += 1
                continue
            text = f"{title}\n\n{html_to_text(question)}\n\n{html_to_text(answer)}\n"
            licenses = tuple(sorted({question_license, answer_license}))
            yield Raw(text, f"questions/{number}", unit.name, f"stackoverflow:{number}", licenses)
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

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        if tag == "pre":
            self._code = []
        elif tag == "code" and self._code is None:
            self.text += "`"
        elif tag == "li":
            self._end_line(1)
            self.text += "- "
        elif tag == "br":
            self.text += "\n"
        elif tag in self._BLOCKS:
            self._end_line(2)

    def handle_endtag(self, tag: str) -> None:
        if tag == "pre" and self._code is not None:
            code = "".join(self._code).strip("\n").rstrip()
            self._end_line(2)
            self.text += f"```\n{code}\n```\n\n"
            self._code = None
        elif tag == "code" and self._code is None:
            self.text += "`"
        elif tag in self._BLOCKS:
            self._end_line(2)

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
    "stackoverflow": _plan_posts,
}
