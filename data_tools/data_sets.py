"""Published data sets by name: where each lies, what of a row is the document, and what its licence asks.

`--sources NAME` reads it from the hub, `--sources NAME:PLACE` from elsewhere: a file, a folder or a pattern, on disk,
at hf:// or s3://. Adding one is one entry in `DATA_SETS`.
"""

import collections
import concurrent.futures
import dataclasses
import itertools
import json
import sys
import zlib
from collections.abc import Callable, Iterator, Mapping
from typing import Any

from data_tools import remote
from data_tools.dataset import Counted, Failure
from data_tools.tables import document_of, plan_files, rows_of_group, text_of
from data_tools.units import ContentHashes, Raw, Unit
from phi1.errors import UserError

_IN_FLIGHT = 64  # objects fetched at a time: an object store answers in tens of milliseconds
_LARGEST = 64 << 20  # bytes of a text: what inflates to more is none

Row = Mapping[str, Any]


class Dropped(Exception):
    """A row that makes no document. The message becomes the counter dropped_MESSAGE."""


@dataclasses.dataclass(frozen=True)
class DataSet:
    """place: where it lies on the hub. columns: that are read. document: the fields (`tables.FIELDS`) of a row's
    document, raises Dropped. needs: those without which a file is not this data set's. blobs: the text is the object
    of that name in Software Heritage's bucket. notice: what a user must know of its licence."""

    place: str
    columns: tuple[str, ...]
    needs: tuple[str, ...]
    document: Callable[[Row], dict[str, Any]]
    blobs: bool = False
    notice: str = ""


def _source_file(row: Row) -> dict[str, Any]:
    """A file of a repository, as The Stack's tables have it."""
    return {
        "content": row.get("content"),
        "path": row.get("max_stars_repo_path") or row.get("path"),
        "name": row.get("max_stars_repo_name") or row.get("repo_name"),
        "licenses": row.get("max_stars_repo_licenses") or row.get("detected_licenses"),
        "lang": row.get("lang") or row.get("language") or "Python",
        "origin": row.get("hexsha") or row.get("blob_id"),
        "head": row.get("max_stars_repo_head_hexsha") or row.get("revision_id"),
        "stars": row.get("max_stars_count") or row.get("star_events_count"),
    }


def _textbook(row: Row) -> dict[str, Any]:
    """Cosmopedia: a text, and for whom and as what it was written."""
    kind = ", ".join(filter(None, (text_of(row.get("format")), text_of(row.get("audience")))))
    return {"content": row.get("text"), "name": kind, "lang": "Text", "licenses": "ODC-By-1.0"}


def _exercise(row: Row) -> dict[str, Any]:
    """A function's head with its docstring, and its body."""
    problem, solution = _texts(row, "problem", "solution")
    return {"content": f"{problem}\n{solution}\n", "lang": "Python", "licenses": "CC-BY-NC-SA-4.0"}


def _instruction(row: Row) -> dict[str, Any]:
    """A task and its answer, if it passed all of its tests."""
    task, answer = _texts(row, "input", "output")
    try:
        status = json.loads(text_of(row.get("tests_execution_status")) or "[]")
    except ValueError as error:
        raise ValueError(f"tests_execution_status is not JSON ({error})") from error
    if not isinstance(status, list) or not status or any(result != "pass" for result in status):
        raise Dropped("tests_failed")
    return {"content": f"{task}\n\n{answer}\n", "lang": "Markdown", "origin": row.get("id"), "licenses": "CC-BY-4.0"}


def _texts(row: Row, *names: str) -> list[str]:
    values = [row.get(name) for name in names]
    for name, value in zip(names, values, strict=True):
        if not isinstance(value, str | bytes):
            raise ValueError(f"{name} is {type(value).__name__}, not text")
    decoded = [
        value if isinstance(value, str) else value.decode() for value in values if isinstance(value, str | bytes)
    ]
    return [text.strip("\n") for text in decoded]


_STACK = (
    "content",
    "max_stars_repo_path",
    "max_stars_repo_name",
    "max_stars_repo_licenses",
    "lang",
    "hexsha",
    "max_stars_repo_head_hexsha",
    "max_stars_count",
)
_BLOBS = (
    "blob_id",
    "path",
    "repo_name",
    "detected_licenses",
    "language",
    "revision_id",
    "star_events_count",
    "src_encoding",
)

_BLOB = ("blob_id",)
_TESTED = ("input", "output", "tests_execution_status")

DATA_SETS: dict[str, DataSet] = {
    "the-stack-dedup": DataSet("hf://datasets/bigcode/the-stack-dedup/data/python", _STACK, ("content",), _source_file),
    "the-stack-v2": DataSet(
        "hf://datasets/bigcode/the-stack-v2-dedup/data/Python", _BLOBS, _BLOB, _source_file, blobs=True
    ),
    "stack-edu": DataSet("hf://datasets/HuggingFaceTB/stack-edu/Python", _BLOBS, _BLOB, _source_file, blobs=True),
    "python-edu": DataSet(
        "hf://datasets/HuggingFaceTB/smollm-corpus/python-edu", _BLOBS, _BLOB, _source_file, blobs=True
    ),
    "cosmopedia-v2": DataSet(
        "hf://datasets/HuggingFaceTB/smollm-corpus/cosmopedia-v2", ("text", "format", "audience"), ("text",), _textbook
    ),
    "code-exercises": DataSet(
        "hf://datasets/jinaai/code_exercises/data",
        ("problem", "solution"),
        ("problem", "solution"),
        _exercise,
        notice="its licence, CC BY-NC-SA 4.0, forbids commercial use, also of what is made from it",
    ),
    "open-code-instruct": DataSet(
        "hf://datasets/nvidia/OpenCodeInstruct/data", ("id", *_TESTED), _TESTED, _instruction
    ),
}
"""Name -> data set, as `--sources` takes it."""


def plan_data_set(name: str, place: str, hashes: ContentHashes) -> list[Unit]:
    """The row groups of a data set. place: where it lies, on the hub if empty."""
    about = DATA_SETS[name]
    if about.notice:
        print(f"warning: --sources {name}: {about.notice}", file=sys.stderr)
    needs = [[column] for column in about.needs]
    return plan_files(name, place or about.place, (), hashes, needs=needs, read_as=name)


def read_data_set(unit: Unit) -> Iterator[Raw | Failure | Counted]:
    """The documents of a row group, in its order."""
    about = DATA_SETS[unit.kind]
    dropped: collections.Counter[str] = collections.Counter()
    documents = _documents(about, unit, dropped)
    yield from _fetched(documents) if about.blobs else documents
    yield Counted(dropped)


def _documents(about: DataSet, unit: Unit, dropped: collections.Counter[str]) -> Iterator[Raw | Failure]:
    """Without blobs' texts: there the content is (blob, encoding)."""
    for number, row in enumerate(rows_of_group(unit, about.columns)):
        place = f"row {number} of group {unit.part[0]}"
        try:
            fields = about.document(row)
        except Dropped as reason:
            dropped[f"dropped_{reason}"] += 1
            continue
        except (ValueError, TypeError) as error:
            yield Failure(f"{unit.source}/{place}", str(error)[:200])
            continue
        if about.blobs:
            fields["content"] = text_of(row.get("blob_id")), text_of(row.get("src_encoding")) or "utf-8"
        yield document_of(fields, unit.source, place)


def _fetched(documents: Iterator[Raw | Failure]) -> Iterator[Raw | Failure]:
    """With the texts of their blobs, many fetched at a time, in order."""
    with concurrent.futures.ThreadPoolExecutor(_IN_FLIGHT) as pool:
        waiting: collections.deque[concurrent.futures.Future[Raw | Failure]] = collections.deque()
        try:
            for document in itertools.chain(documents, itertools.repeat(None)):
                if document is not None:
                    waiting.append(pool.submit(_with_text, document))
                if document is None and not waiting:
                    return
                if document is None or len(waiting) >= 2 * _IN_FLIGHT:
                    yield waiting.popleft().result()
        finally:
            pool.shutdown(wait=False, cancel_futures=True)


def _with_text(document: Raw | Failure) -> Raw | Failure:
    if isinstance(document, Failure):
        return document
    blob, encoding = document.content
    key = f"{document.source}/{document.path}"
    if not blob.isalnum():
        return Failure(key, f"blob_id is {blob[:60]!r}")
    try:
        packed = remote.public_object(f"softwareheritage/content/{blob}")
        inflate = zlib.decompressobj(31)
        text = inflate.decompress(packed, _LARGEST)
        if inflate.unconsumed_tail:
            return Failure(key, f"inflates to more than {_LARGEST:,} bytes")
        if not inflate.eof:
            return Failure(key, f"blob {blob} is cut")
        return dataclasses.replace(document, content=text if _is_utf8(encoding) else text.decode(encoding))
    except remote.Missing:
        return Failure(key, f"blob {blob} is not in Software Heritage's bucket")
    except (LookupError, UnicodeDecodeError) as error:
        return Failure(key, f"not {encoding[:40]} ({str(error)[:80]})")
    except zlib.error as error:
        return Failure(key, f"blob {blob} is not gzip ({error})")


def _is_utf8(encoding: str) -> bool:
    return encoding.lower().replace("_", "-") in ("utf-8", "utf8", "ascii", "us-ascii")


def unknown(source: str) -> UserError:
    """What a user is told who names no source."""
    return UserError(
        f"--sources {source}: not a source; write stdlib, gold, pypi:NAME, folder:PATH, stack:PATH, parquet:PATH, "
        f"stackoverflow:PATH/Posts.xml, hf://datasets/…, s3://…, or a data set by name: {', '.join(DATA_SETS)}"
    )
