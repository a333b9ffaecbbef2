"""StackOverflow's public dump: a question and its best answer are one document."""

import contextlib
import dataclasses
import fcntl
import html.parser
import math
import pathlib
import re
import shutil
import sqlite3
from collections.abc import Iterator, Mapping, Sequence
from typing import Any
from xml.etree import ElementTree

from data_tools.dataset import Counted, Failure, sweep
from data_tools.units import ContentHashes, Raw, Unit
from phi1.errors import UserError
from phi1.files import sha256_json, temporary

_QUESTIONS_BYTES = 1 << 30  # of Posts.xml per unit


def plan_posts(place: str, any_license: bool, hashes: ContentHashes) -> list[Unit]:
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
    written = temporary(path)
    database = sqlite3.connect(written, isolation_level=None)
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
        written.replace(path)
    except sqlite3.OperationalError as error:
        raise UserError(f"{path.parent}: {error} while joining questions and answers; free space there") from error
    finally:
        database.close()
        written.unlink(missing_ok=True)


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
    facts = (post.get("Body", ""), post_license(post), _author(post))
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


def read_questions(unit: Unit, spool: pathlib.Path, tag: str) -> Iterator[Raw | Failure | Counted]:
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


def post_license(values: Any) -> str:
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
