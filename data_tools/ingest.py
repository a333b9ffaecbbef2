"""Read code and text into a dataset with The Stack's column names.

Sources: installed packages, The Stack's parquet files, StackOverflow's Posts.xml, folders (see --sources).
A file is a document, a question with its best answer is one too. Two passes over the sources, in parallel:
the first hashes the documents that pass the filters, the second writes each once.
"""

import collections
import dataclasses
import functools
import hashlib
import pathlib
import re
import shutil
from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING, Any

from data_tools import readers
from data_tools.dataset import Counted, Dataset, Failure, Produced, run_stage

if TYPE_CHECKING:
    import pyarrow

_GENERATED = re.compile(
    r"auto-?generated|@generated|generated (by|from|automatically)|automatically generated|do not edit", re.I
)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Config:
    """Options of `phi1 data ingest`."""

    output: pathlib.Path = dataclasses.field(metadata={"no_effect": True})
    """Folder of the new dataset."""

    sources: tuple[str, ...] = ("stdlib",)
    """What to read: stdlib | pypi:NAME (an installed package) | folder:PATH | stack:PATH (parquet file, folder or
    glob) | stackoverflow:PATH/Posts.xml."""

    limit: int | None = None
    """Keep at most this many documents: those whose content hashes lowest, so that the choice is stable."""

    max_bytes: int = 1 << 20
    """Drop documents longer than this, bytes."""

    max_average_line: int = 100
    """Drop documents whose lines are longer than this on average, characters (minified code, data)."""

    max_line: int = 1000
    """Drop documents with a line longer than this, characters."""

    min_alphanumeric: float = 0.25
    """Drop documents with a smaller fraction of letters and digits (tables, art)."""

    tag: str = "python"
    """Tag that a StackOverflow question must have."""

    any_license: bool = False
    """Also read packages whose licence is not known as permissive."""

    workers: int = dataclasses.field(default=1, metadata={"no_effect": True})
    """Processes."""


def schema() -> "pyarrow.Schema":
    """Columns of a dataset of documents: The Stack's, and `source`."""
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
        ]
    )


def run(config: Config) -> Dataset:
    """Makes the dataset. Raises UserError for a source that is absent or corrupt."""
    import pyarrow as pa

    units, fingerprint = readers.plan(config.sources, any_license=config.any_license)
    spool = config.output / "spool"
    if not (config.output / "manifest.json").exists():
        readers.prepare(units, spool, config.tag)
    extra = {"fingerprint": fingerprint}
    keys = run_stage(
        "ingest-keys",
        config,
        config.output / "keys",
        [],
        len(units),
        functools.partial(_keys, units, spool),
        pa.schema([("hexsha", pa.string())]),
        workers=config.workers,
        extra=extra,
    )
    dataset = run_stage(
        "ingest",
        config,
        config.output,
        [keys],
        len(units),
        functools.partial(_documents, units, spool, _select(keys, config.limit)),
        schema(),
        workers=config.workers,
        extra=extra,
    )
    shutil.rmtree(spool, ignore_errors=True)
    return dataset


def document(raw: readers.Raw, config: Config) -> dict[str, Any] | Failure | str:
    """A row of the dataset, or a Failure (not text, empty), or the reason why a filter drops it."""
    key = f"{raw.source}/{raw.path}"
    content = raw.content
    if isinstance(content, bytes):
        if len(content) > config.max_bytes:
            return "large"
        try:
            content = content.decode("utf-8-sig").replace("\r\n", "\n")
        except UnicodeDecodeError as error:
            return Failure(key, f"not UTF-8 (byte 0x{content[error.start]:02x} at offset {error.start})")
    if not content.strip():
        return Failure(key, "empty")
    encoded = content.encode("utf-8", errors="surrogatepass")
    if len(encoded) > config.max_bytes:
        return "large"
    lines = content.splitlines()
    longest = max(map(len, lines))
    average = len(content) / len(lines)
    alphanumeric = sum(map(str.isalnum, content)) / len(content)
    if average > config.max_average_line or longest > config.max_line or alphanumeric < config.min_alphanumeric:
        return "minified"
    if _GENERATED.search("\n".join(line for line in lines[:10] if line.lstrip().startswith("#"))):
        return "generated"
    return {
        "hexsha": hashlib.sha1(encoded).hexdigest(),
        "size": len(encoded),
        "ext": pathlib.PurePosixPath(raw.path).suffix.lstrip("."),
        "lang": raw.lang,
        "max_stars_repo_path": raw.path,
        "max_stars_repo_name": raw.name,
        "max_stars_repo_licenses": list(raw.licenses),
        "content": content,
        "avg_line_length": average,
        "max_line_length": longest,
        "alphanum_fraction": alphanumeric,
        "source": raw.source,
    }


def _made(units: Sequence[readers.Unit], spool: pathlib.Path, config: Config, shard: int) -> Iterator[Any]:
    for raw in readers.read(units[shard], spool):
        yield document(raw, config) if isinstance(raw, readers.Raw) else raw


def _keys(
    units: Sequence[readers.Unit], spool: pathlib.Path, config: Config, inputs: Sequence[Dataset], shard: int
) -> Iterator[Produced]:
    yield from ({"hexsha": row["hexsha"]} for row in _made(units, spool, config, shard) if isinstance(row, dict))


def _select(keys: Dataset, limit: int | None) -> tuple[dict[int, frozenset[int]], str]:
    """Per shard the positions of documents that stood before, and the highest hash that the limit lets in."""
    import numpy as np

    hashes = [np.array(keys.table(i).column("hexsha").to_pylist(), dtype="S40") for i in range(len(keys.shards))]
    unique, first = np.unique(np.concatenate([*hashes, np.array([], dtype="S40")]), return_index=True)
    again = np.ones(sum(map(len, hashes)), dtype=bool)
    again[first] = False
    starts = np.cumsum([0, *map(len, hashes)])
    duplicates = {
        shard: frozenset(np.flatnonzero(again[starts[shard] : starts[shard + 1]]).tolist())
        for shard in range(len(hashes))
    }
    highest = "g" if limit is None or limit >= len(unique) else unique[limit - 1].decode() if limit > 0 else ""
    return duplicates, highest


def _documents(
    units: Sequence[readers.Unit],
    spool: pathlib.Path,
    selection: tuple[dict[int, frozenset[int]], str],
    config: Config,
    inputs: Sequence[Dataset],
    shard: int,
) -> Iterator[Produced]:
    duplicates, highest = selection[0][shard], selection[1]
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
            elif row["hexsha"] > highest:
                counters["dropped_by_limit"] += 1
            else:
                yield row
    yield Counted(counters)
