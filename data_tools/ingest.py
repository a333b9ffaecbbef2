"""Read code and text into a dataset with The Stack's column names.

Sources: installed packages, The Stack's and other parquet files, StackOverflow's Posts.xml, folders (see --sources).
A file is a document, a question with its best answer is one too. Every document is brought to one form first (UTF-8,
no byte order mark, \\n at the ends of lines), so that twins are found whatever source they come from. Two passes over
the sources, in parallel: the first hashes the documents that pass the filters, the second writes each once.

What cannot be read as text is in the dataset's failure ledger, with the reason.
"""

import codecs
import collections
import contextlib
import dataclasses
import functools
import hashlib
import itertools
import pathlib
import re
import time
from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING, Any

from data_tools import readers, stackoverflow
from data_tools.dataset import MANIFEST, Counted, Dataset, Failure, Produced, run_stage
from data_tools.engine import Engine
from data_tools.ranges import at_least
from data_tools.units import ContentHashes, Raw, Unit, suffix
from phi1.files import atomic_write

if TYPE_CHECKING:
    import numpy as np
    import pyarrow

_GENERATED = re.compile(
    r"auto-?generated|@generated|generated (by|from|automatically)|automatically generated|do not edit", re.I
)
_PREFIX = 32  # hexadecimal digits of a hash by which documents are told apart
_ASCII = re.compile(r"[\0-\x7f]+")
_OTHER_ENDS = "\x0b\x0c\r\x1c\x1d\x1e"
"""What ends a line for `str.splitlines` besides \\n, in ASCII."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Config(Engine):
    """Options of `phi1 data ingest`."""

    output: pathlib.Path = dataclasses.field(metadata={"no_effect": True})
    """Folder of the new dataset."""

    sources: tuple[str, ...] = dataclasses.field(default=("stdlib",), metadata={"no_effect": True})  # by content
    """What to read: stdlib | pypi:NAME (an installed package) | gold (the gold set) | folder:PATH (.py .txt .md .jsonl
    .jsonl.zst) | stack:PATH (parquet file, folder or glob) | parquet:PATH?content=COLUMN (others' parquet) |
    stackoverflow:PATH/Posts.xml | hf://datasets/… | s3://… | a published data set: stack-edu, python-edu, the-stack-v2,
    the-stack-dedup, cosmopedia-v2, code-exercises, open-code-instruct.
    """

    limit: int | None = None
    """Keep at most this many documents: those whose content hashes lowest, so that the choice is stable."""

    max_bytes: int = 1 << 20
    """Drop documents longer than this, bytes."""

    max_average_line: int = 100
    """Drop documents whose lines of code are longer than this on average, characters (minified code, data)."""

    max_line: int = 1000
    """Drop documents with a line of code, or a word of prose, longer than this, characters."""

    min_alphanumeric: float = 0.25
    """Drop documents with a smaller fraction of letters and digits (tables, art)."""

    tag: str = "python"
    """Tag that a StackOverflow question must have."""

    any_license: bool = False
    """Also read packages whose licence is not known as permissive."""

    max_failed: float = dataclasses.field(default=0.5, metadata={"no_effect": True})
    """Stop, unfinished, if more than this share of what was read cannot be read as text."""


def schema() -> "pyarrow.Schema":
    """Columns of a dataset of documents: The Stack's, where each came from, whose it is and where it can be seen.

    hexsha: SHA-1 of the content as it stands here; origin_hexsha: the source's own (The Stack: the git blob's).
    """
    import pyarrow as pa

    return pa.schema(
        [
            ("hexsha", pa.string()),
            ("size", pa.int64()),
            ("ext", pa.string()),
            ("lang", pa.string()),
            ("max_stars_repo_path", pa.string()),
            ("max_stars_repo_name", pa.string()),
            ("max_stars_repo_licenses", pa.list_(pa.string())),
            ("content", pa.string()),
            ("avg_line_length", pa.float64()),
            ("max_line_length", pa.int64()),
            ("alphanum_fraction", pa.float64()),
            ("source", pa.string()),
            ("origin_hexsha", pa.string()),
            ("max_stars_repo_head_hexsha", pa.string()),
            ("max_stars_count", pa.int64()),
            ("authors", pa.list_(pa.string())),
            ("url", pa.string()),
        ]
    )


def run(config: Config) -> Dataset:
    """Makes the dataset. Raises UserError for a source that is absent or corrupt."""
    import pyarrow as pa

    started = time.monotonic()
    at_least(1, config, "limit", "max_bytes", "max_average_line", "max_line")
    at_least(0, config, "min_alphanumeric", "max_failed")
    units = readers.plan(config.sources, ContentHashes(config.output / "hashes.json"), any_license=config.any_license)
    spool = config.output / "spool"
    whole = (config.output / MANIFEST).exists()
    facts: dict[str, Any] = {
        "extra": {"sources": dict(collections.Counter(unit.source for unit in units))},
        "parts": [unit.made_of for unit in units],
        "engine": config,
        "max_failed": config.max_failed,
    }
    with contextlib.nullcontext() if whole else stackoverflow.spooled(units, spool, config.tag):
        keys = run_stage(
            "ingest-keys",
            config,
            config.output / "keys",
            [],
            len(units),
            functools.partial(_keys, units, spool),
            pa.schema([("hexsha", pa.string())]),
            started=started,
            **facts,
        )
        started = time.monotonic()
        selection = config.output / "keys" / "selection.npz"
        highest = "" if whole else _select(keys, config.limit, selection)
        documents = run_stage(
            "ingest",
            config,
            config.output,
            [keys],
            len(units),
            functools.partial(_documents, units, spool, selection, highest),
            schema(),
            started=started,
            **facts,
        )
        selection.unlink(missing_ok=True)
        return documents


class NotText(Exception):
    """What is no text. The message says why."""


def normalised(content: Any) -> str:
    """A text in the one form that all documents have: no byte order mark, \\n at the ends of lines, no NUL.

    content: str, or bytes in UTF-8, or in UTF-16 or UTF-32 (told by the mark, or UTF-16 by its zeros). Raises NotText.
    """
    if isinstance(content, Exception) or not isinstance(content, str | bytes):
        raise NotText(
            f"cannot be read: {content}" if isinstance(content, Exception) else f"is {type(content).__name__}, not text"
        )
    if isinstance(content, bytes):
        encoding = _encoding(content)
        try:
            content = content.decode(encoding)
        except UnicodeDecodeError as error:
            raise NotText(
                f"not {encoding.upper()} (byte 0x{content[error.start]:02x} at offset {error.start})"
            ) from error
    elif not content.isascii():
        try:
            content.encode()
        except UnicodeEncodeError as error:
            raise NotText(f"not Unicode (half a surrogate pair at character {error.start})") from error
    if "\0" in content:
        raise NotText(f"binary (NUL at character {content.index(chr(0))})")
    if content.startswith("\ufeff"):
        content = content.lstrip("\ufeff")
    return content.replace("\r\n", "\n").replace("\r", "\n") if "\r" in content else content


def _encoding(content: bytes) -> str:
    if content.startswith((codecs.BOM_UTF32_LE, codecs.BOM_UTF32_BE)):
        return "utf-32"
    if content.startswith((codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE)):
        return "utf-16"
    head = content[:4096]
    if b"\0" not in head:
        return "utf-8"
    zeros = [half.count(0) / max(1, len(half)) for half in (head[::2], head[1::2])]
    if min(zeros) == 0 and max(zeros) > 0.5:  # every other byte of Latin text
        return "utf-16-be" if zeros[0] else "utf-16-le"
    return "utf-8"


def document(raw: Raw, config: Config) -> dict[str, Any] | Failure | str:
    """A row of the dataset, or a Failure (not text), or the reason why a filter drops it."""
    if raw.content is None:
        return "empty"
    if isinstance(raw.content, bytes) and len(raw.content) > 4 * config.max_bytes + 4:  # UTF-32 has four bytes for one
        return "large"
    try:
        content = normalised(raw.content)
    except NotText as error:
        return Failure(f"{raw.source}/{raw.path}", str(error))
    if not content or content.isspace():
        return "empty"
    encoded = content.encode()
    if len(encoded) > config.max_bytes:
        return "large"
    count, longest = lines_of(content, encoded)
    longest_line = longest
    average = average_line = len(content) / count
    if raw.prose:
        judged = _judged_lines(content)
        average, longest = sum(map(len, judged)) / max(1, len(judged)), max(map(len, judged), default=0)
    share = alphanumeric(content, encoded) / len(content)
    if average > config.max_average_line or longest > config.max_line or share < config.min_alphanumeric:
        return "minified"
    first = "\n".join(content.split("\n", 10)[:10]).splitlines()[:10]
    comments = [line for line in first if line.lstrip().startswith("#")]
    if comments and _GENERATED.search("\n".join(comments)):
        return "generated"
    return {
        "hexsha": hashlib.sha1(encoded).hexdigest(),
        "size": len(encoded),
        "ext": suffix(raw.path).lstrip("."),
        "lang": raw.lang,
        "max_stars_repo_path": raw.path,
        "max_stars_repo_name": raw.name,
        "max_stars_repo_licenses": list(raw.licenses),
        "content": content,
        "avg_line_length": average_line,
        "max_line_length": longest_line,
        "alphanum_fraction": share,
        "source": raw.source,
        "origin_hexsha": raw.origin,
        "max_stars_repo_head_hexsha": raw.head,
        "max_stars_count": raw.stars,
        "authors": list(raw.authors),
        "url": raw.url,
    }


def lines_of(content: str, encoded: bytes) -> tuple[int, int]:
    """How many lines `str.splitlines` finds, and how long the longest is.

    encoded: the text in UTF-8. 19 KB of code take 23 µs, by splitlines 145.
    """
    import numpy as np

    if not content.isascii() or any(end in content for end in _OTHER_ENDS):
        lines = content.splitlines()
        return len(lines), max(map(len, lines), default=0)
    ends = (np.frombuffer(encoded, np.uint8) == ord("\n")).nonzero()[0]
    if not len(ends):
        return min(1, len(content)), len(content)
    last = len(content) - 1 - int(ends[-1])
    longest = max(int(ends[0]), last, int((ends[1:] - ends[:-1]).max(initial=1)) - 1)
    return len(ends) + (last > 0), longest


def alphanumeric(content: str, encoded: bytes) -> int:
    """How many characters `str.isalnum` takes for letters or digits. encoded: the text in UTF-8."""
    import numpy as np

    ascii = int(np.count_nonzero(_is_alphanumeric().take(np.frombuffer(encoded, np.uint8))))
    return ascii if content.isascii() else ascii + sum(map(str.isalnum, _ASCII.sub("", content)))


@functools.cache
def _is_alphanumeric() -> "np.ndarray[Any, Any]":
    """(256,) bool: whether a byte is an ASCII letter or digit."""
    import numpy as np

    return np.array([chr(byte).isalnum() and byte < 128 for byte in range(256)])


def _judged_lines(content: str) -> list[str]:
    """What is as long as a line of code should be: the lines between ``` lines, and outside of them words, since a
    paragraph is one line."""
    judged: list[str] = []
    code = False
    for line in content.splitlines():
        if line.startswith("```"):
            code = not code
        else:
            judged += [line] if code else line.split()
    return judged


def _made(units: Sequence[Unit], spool: pathlib.Path, config: Config, shard: int) -> Iterator[Any]:
    for raw in readers.read(units[shard], spool, config.tag):
        yield document(raw, config) if isinstance(raw, Raw) else raw


def _keys(
    units: Sequence[Unit], spool: pathlib.Path, config: Config, inputs: Sequence[Dataset], shard: int
) -> Iterator[Produced]:
    read = 0
    for row in _made(units, spool, config, shard):
        read += not isinstance(row, Counted)
        if isinstance(row, dict):
            yield {"hexsha": row["hexsha"]}
        elif isinstance(row, Failure):
            yield row
    yield Counted({"read": read})


def _select(keys: Dataset, limit: int | None, file: pathlib.Path) -> str:
    """Writes per shard the positions of documents that stood before; returns the highest hash that the limit lets in.

    A hash counts by its first 128 bits: 35 million documents are 0.6 GB.
    """
    import numpy as np

    halves = np.dtype([("high", np.uint64), ("low", np.uint64)])
    parts = [np.zeros(0, halves)]
    for shard in range(len(keys.shards)):
        column = keys.table(shard).column("hexsha").to_pylist()
        whole = np.frombuffer(bytes.fromhex("".join(column)), dtype=[("high", ">u8"), ("low", ">u8"), ("rest", "V4")])
        parts.append(whole[["high", "low"]].astype(halves))
    hashes = np.concatenate(parts)
    starts = np.cumsum([0, *map(len, parts[1:])])
    order = np.lexsort((hashes["low"], hashes["high"]))  # stable: of equal ones the first stays first
    ranked = hashes[order]
    same = np.zeros(len(hashes), dtype=bool)
    same[1:] = ranked[1:] == ranked[:-1]
    again = np.zeros(len(hashes), dtype=bool)
    again[order] = same
    with atomic_write(file) as out:
        positions: dict[str, Any] = {
            str(shard): np.flatnonzero(again[first:last])
            for shard, (first, last) in enumerate(itertools.pairwise(starts))
        }
        np.savez(out, **positions)
    unique = ranked[~same]
    if limit is None or limit >= len(unique):
        return "g"
    return f"{unique[limit - 1]['high']:016x}{unique[limit - 1]['low']:016x}" if limit > 0 else ""


def _documents(
    units: Sequence[Unit],
    spool: pathlib.Path,
    selection: pathlib.Path,
    highest: str,
    config: Config,
    inputs: Sequence[Dataset],
    shard: int,
) -> Iterator[Produced]:
    import numpy as np

    with np.load(selection) as positions:
        duplicates = frozenset(positions[str(shard)].tolist())
    counters: collections.Counter[str] = collections.Counter()
    position = -1
    for row in _made(units, spool, config, shard):
        counters["read"] += not isinstance(row, Counted)
        if isinstance(row, str):
            counters[f"dropped_{row}"] += 1
        elif isinstance(row, Failure | Counted):
            yield row
        else:
            position += 1
            if position in duplicates:
                counters["dropped_duplicate"] += 1
            elif row["hexsha"][:_PREFIX] > highest:
                counters["dropped_by_limit"] += 1
            else:
                yield row
    yield Counted(counters)
