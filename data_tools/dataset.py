"""A dataset on disk: a folder of parquet shards and a manifest, and how a stage makes one from others.

    folder/
      00000.parquet …      rows, zstd
      00000.json …         that shard's rows, bytes, SHA-256, counters and failures (its receipt)
      stage.json           what is being made: stage, config, inputs (written first)
      manifest.json        the same plus all receipts (written last: its presence means "whole")
      timing.log           what it took: a line for each shard made and for each run (no part of what the dataset is)

Shard i is a pure function of (config, inputs, i): it does not depend on the number of workers, and a
stage run again goes on after the shards that have receipts. With another config or input, it refuses. What things are
made of is told by content: neither a path nor a time stamp nor a folder's name is part of a dataset's identity.
"""

import collections
import contextlib
import dataclasses
import functools
import json
import pathlib
import sys
import time
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Any

from data_tools.engine import HERE, Engine, tell
from data_tools.engine import run as run_tasks
from data_tools.ledger import alive
from data_tools.timing import Clock, Timing
from phi1 import __version__
from phi1.errors import UserError
from phi1.files import atomic_write, check_identity, sha256_file, sha256_json, write_json, writer_of
from phi1.progress import Progress

if TYPE_CHECKING:
    import pyarrow

MANIFEST = "manifest.json"
STAGE = "stage.json"
_FORGOTTEN = 86_400  # seconds
_GROUP_BYTES = 16 << 20  # of text in a row group: what a stage and its reader hold in memory of a shard


@dataclasses.dataclass(frozen=True)
class Failure:
    """A row that could not be made: yielded in place of it, and kept in the shard's receipt."""

    key: str
    reason: str


@dataclasses.dataclass
class Counted:
    """Yielded by a stage to add to the shard's counters, e.g. Counted({"dropped_short": 1})."""

    counters: Mapping[str, int]


@dataclasses.dataclass(frozen=True)
class Done:
    """Yielded by a stage that makes a shard's rows long before it yields them: so many more documents are done."""

    documents: int


Produced = dict[str, Any] | Failure | Counted | Done


class Dataset:
    """A whole dataset folder, opened for reading.

    Raises UserError if the folder has no manifest (absent, or a stage did not finish there), and, when
    a shard is read, if its bytes do not hash to what the manifest says.
    """

    def __init__(self, folder: pathlib.Path | str) -> None:
        self.folder = pathlib.Path(folder)
        path = self.folder / MANIFEST
        if not path.exists():
            what = "a stage was interrupted there" if (self.folder / STAGE).exists() else "no dataset there"
            raise UserError(f"{self.folder}: {what} (no {MANIFEST}); run the stage that writes it (again)")
        try:
            self.manifest: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
            self.shards: list[dict[str, Any]] = self.manifest["shards"]
            str(self.manifest["stage"]), [entry["hash"] for entry in self.manifest["inputs"]]
            [shard["sha256"] for shard in self.shards]
        except (ValueError, KeyError, TypeError) as error:
            raise UserError(
                f"{path}: not a dataset manifest ({error}); delete the folder and run the stage again"
            ) from error
        self._verified: set[int] = set()

    @property
    def rows(self) -> int:
        """Rows in all shards."""
        return sum(shard["rows"] for shard in self.shards)

    @property
    def counters(self) -> dict[str, int]:
        """The stage's counters, summed over shards ("rows" and "failures" among them)."""
        return self.manifest["counters"]

    @property
    def hash(self) -> str:
        """SHA-256 over what the dataset is made of: stage, config, inputs, shard hashes."""
        return sha256_json(
            {key: self.manifest[key] for key in ("stage", "config")}
            | {"inputs": [entry["hash"] for entry in self.manifest["inputs"]]}
            | {"shards": [s["sha256"] for s in self.shards]}
        )

    def failures(self) -> list[dict[str, str]]:
        """The failure ledger: {"key", "reason"} per row that could not be made."""
        return [failure for shard in self.shards for failure in shard["failures"]]

    def _verify(self, shard: int) -> pathlib.Path:
        """The path of a shard, its hash checked the first time."""
        path = self.folder / f"{shard:05d}.parquet"
        if shard not in self._verified:
            if not path.is_file() or sha256_file(path) != self.shards[shard]["sha256"]:
                raise UserError(
                    f"{path}: corrupt shard (missing, or its SHA-256 is not the manifest's); "
                    f"delete {path.with_suffix('.json')} and {self.folder / MANIFEST}, and run the stage again"
                )
            self._verified.add(shard)
        return path

    @property
    def schema(self) -> "pyarrow.Schema":
        """The columns, as the first shard has them. UserError if there is none."""
        import pyarrow.parquet

        if not self.shards:
            raise UserError(f"{self.folder}: has no shard; run the stage that writes it again")
        return pyarrow.parquet.read_schema(self._verify(0))

    def require(self, *columns: str) -> None:
        """UserError if there are rows, and not all of these columns."""
        if self.shards and not set(columns) <= set(names := self.schema.names):
            needed = ", ".join(columns[:-1]) + (" and " if len(columns) > 1 else "") + columns[-1]
            raise UserError(
                f"{self.folder}: needs the column{'s' if len(columns) > 1 else ''} {needed}, has {', '.join(names)}; "
                "name a dataset that has"
            )

    def table(self, shard: int, columns: Sequence[str] | None = None) -> "pyarrow.Table":
        """Shard `shard` as an Arrow table."""
        import pyarrow.parquet

        return pyarrow.parquet.read_table(self._verify(shard), columns=None if columns is None else list(columns))

    def read(
        self, columns: Sequence[str] | None = None, shards: Iterable[int] | None = None
    ) -> Iterator[dict[str, Any]]:
        """Rows as dicts, in order; in memory is one row group at a time."""
        import pyarrow.parquet

        for shard in range(len(self.shards)) if shards is None else shards:
            with pyarrow.parquet.ParquetFile(self._verify(shard)) as file:
                for group in range(file.num_row_groups):
                    yield from file.read_row_group(
                        group, columns=None if columns is None else list(columns)
                    ).to_pylist()

    def column(self, name: str) -> list[Any]:
        """One column as a list, all shards."""
        return [
            value for shard in range(len(self.shards)) for value in self.table(shard, [name]).column(name).to_pylist()
        ]


@contextlib.contextmanager
def reading(path: pathlib.Path, advice: str) -> Iterator[None]:
    """Around what reads a file that may be damaged, or another program's: UserError, with the advice, if it holds
    something else than is looked for.
    """
    try:
        yield
    except (ValueError, KeyError, IndexError, TypeError, AttributeError) as error:
        raise UserError(f"{path}: not what was written there ({type(error).__name__}: {error}); {advice}") from error


def config_dict(config: Any) -> dict[str, Any]:
    """A config dataclass as JSON-able values, without the fields that cannot change the result.

    A field opts out with `dataclasses.field(metadata={"no_effect": True})`: worker counts, folders, budgets.
    """
    fields = {
        field.name: getattr(config, field.name)
        for field in dataclasses.fields(config)
        if not field.metadata.get("no_effect")
    }
    return json.loads(json.dumps(fields, default=str))


def run_stage(
    stage: str,
    config: Any,
    output: pathlib.Path,
    inputs: Sequence[Dataset],
    shards: int,
    produce: Callable[[Any, Sequence[Dataset], int], Iterable[Produced]],
    schema: "pyarrow.Schema",
    *,
    engine: Engine = HERE,
    started: float | None = None,
    extra: Mapping[str, Any] | None = None,
    spelled: Collection[str] = (),
    parts: Sequence[tuple[str, str]] = (),
    redo: Collection[int] = (),
    max_failed: float | None = None,
    quiet: bool = False,
) -> Dataset:
    """Makes (or finishes) the dataset `output`: shard i holds what `produce(config, inputs, i)` yields.

    stage: the stage's name. config: its dataclass (hashed by `config_dict`). inputs: datasets whose
    hashes are recorded. schema: Arrow schema of the rows. engine: where and how many at a time (where not one
    after the other here, `produce` must be picklable). started: `time.monotonic()` when the stage began, now if None.
    extra: JSON-able facts that go into the manifest (and count as config). spelled: which of all these only say where
    something lies whose content is another of them: they go into the manifest, and do not count. parts: for each shard
    what it is made of, if that is no input: (name, hash of its content). redo: shards to make again though they are
    whole. max_failed: the share of what was read (counter "read", else rows and failures) that may fail.

    Raises UserError if `output` holds a dataset made with another stage, config or input, if more than `max_failed`
    failed, or if a worker dies; what was made stays.
    """
    identity = {
        "stage": stage,
        "config": config_dict(config) | dict(extra or {}),
        "inputs": [{"folder": dataset.folder.name, "hash": dataset.hash} for dataset in inputs],
        "shard_count": shards,
    }
    identity = json.loads(json.dumps(identity))  # as it will be read back: tuples are lists
    _claim(output, identity, spelled)
    sweep(output)
    for shard in redo:
        (output / MANIFEST).unlink(missing_ok=True)
        (output / f"{shard:05d}.json").unlink(missing_ok=True)
    _check_parts(output, parts)
    if (output / MANIFEST).exists():
        dataset = Dataset(output)
        _say(quiet, f"{stage}: {dataset.rows:,} rows already in {output}")
        return dataset
    todo = [shard for shard in range(shards) if not (output / f"{shard:05d}.json").exists()]
    aligned = bool(inputs) and len(inputs[0].shards) == shards
    sizes = [shard["rows"] for shard in inputs[0].shards] if aligned else [1] * shards
    unit = "documents" if aligned else "shards"
    progress, rows = Progress(stage, sum(sizes[shard] for shard in todo), unit, quiet=quiet), 0
    if len(todo) < shards:
        _say(quiet, f"{stage}: going on after {shards - len(todo)} of {shards} shards")
    if engine.workers > 1 and aligned:  # the largest first, so that none is left alone at the end
        todo.sort(key=lambda shard: -inputs[0].shards[shard]["bytes"])
    make = functools.partial(_make_shard, config, inputs, produce, schema, output, tuple(parts))
    with Timing(output, engine, started) as timing:
        try:
            for made in run_tasks(engine, make, todo, output, progress.advance):
                rows += made["rows"]
                told = made.pop("told")
                told = told if engine.engine == "local" else 0  # of a cluster's tasks nobody heard it
                timing.shard(**made)
                progress.advance(sizes[made["shard"]] - told, note=f"{rows:,} rows")
        finally:
            sweep(output)  # what workers that were stopped left
    progress.close()
    receipts = [_receipt(output / f"{shard:05d}.json") for shard in range(shards)]
    counters: dict[str, int] = {"rows": 0, "failures": 0}
    for receipt in receipts:
        counters["rows"] += receipt["rows"]
        counters["failures"] += len(receipt["failures"])
        for key, value in receipt["counters"].items():
            counters[key] = counters.get(key, 0) + value
    _check_share(stage, output, receipts, counters, max_failed)
    write_json(output / MANIFEST, identity | {"counters": counters, "code_version": __version__, "shards": receipts})
    if counters["rows"] == 0:
        print(f"warning: {stage}: no row was made in {output} ({counters['failures']} failures)", file=sys.stderr)
    return Dataset(output)


def _claim(output: pathlib.Path, identity: dict[str, Any], spelled: Collection[str]) -> None:
    """Writes what is to be made, or checks that it is what was begun. Refuses only if something was made."""
    path = output / STAGE
    before: dict[str, Any] | None = None
    if path.exists():
        try:
            before = json.loads(path.read_text(encoding="utf-8"))
            _facts(before)  # a manifest that lacks its facts is none
        except (ValueError, KeyError, TypeError) as error:
            raise UserError(
                f"{path}: does not say what is made there, in a way that this version reads ({type(error).__name__}: "
                f"{error}); choose another folder, or delete this one"
            ) from error
    if before == identity:
        return
    begun = before if any(output.glob("[0-9]*.parquet")) else None
    if begun is not None and _facts(begun, spelled) != _facts(identity, spelled):
        check_identity(output, _facts(begun), _facts(identity), "a dataset")
    write_json(path, identity)


def _receipt(path: pathlib.Path) -> dict[str, Any]:
    try:
        receipt = json.loads(path.read_text(encoding="utf-8"))
        receipt["rows"], receipt["failures"], receipt["counters"]
    except (ValueError, KeyError, TypeError) as error:
        raise UserError(
            f"{path}: not a shard's receipt ({type(error).__name__}: {error}); delete it, and run the stage again"
        ) from error
    return receipt


def _check_parts(output: pathlib.Path, parts: Sequence[tuple[str, str]]) -> None:
    """Refuses to go on if a whole shard was made of something else than what is there now."""
    for shard, (name, content) in enumerate(parts):
        path = output / f"{shard:05d}.json"
        if path.exists() and _receipt(path).get("made_of") != content:
            raise UserError(
                f"{output}: shard {shard} was made when {name} held something else; bring that back, choose another "
                "folder, or delete this one"
            )


def _check_share(
    stage: str,
    output: pathlib.Path,
    receipts: Sequence[Mapping[str, Any]],
    counters: Mapping[str, int],
    max_failed: float | None,
) -> None:
    read = counters.get("read", counters["rows"] + counters["failures"])
    if max_failed is None or counters["failures"] <= max_failed * read:
        return
    reasons = collections.Counter(
        failure["reason"].split(" (")[0] for receipt in receipts for failure in receipt["failures"]
    )
    told = ", ".join(f"{count:,} × {reason[:80]}" for reason, count in reasons.most_common(3))
    raise UserError(
        f"{stage}: {counters['failures']:,} of {read:,} rows failed ({told}), more than --max-failed {max_failed:g}; "
        f"{output} stays unfinished: mend the input, or accept that with a higher --max-failed"
    )


def failed_shards(output: pathlib.Path, reason: str = "") -> list[int]:
    """The whole shards of `output` with a failure whose reason starts with `reason`."""
    receipts = {int(path.stem): _receipt(path) for path in output.glob("[0-9]*.json")}
    return sorted(
        shard
        for shard, receipt in receipts.items()
        if any(failure["reason"].startswith(reason) for failure in receipt["failures"])
    )


def sweep(folder: pathlib.Path) -> None:
    """Removes what writers that were killed left in a folder: NAME.tmp-NUMBER of this machine's processes that are no
    more; and of other machines, whose processes cannot be seen, what was not written to for a day.
    """
    for path in folder.glob("*.tmp-*"):
        number = path.name.rpartition("-")[2]
        if not number.isdigit():
            continue
        with contextlib.suppress(FileNotFoundError):  # it is whole by now, under its own name
            process = writer_of(int(number))
            old = time.time() - path.lstat().st_mtime > _FORGOTTEN if process is None else not alive(process)
            if old:
                path.unlink(missing_ok=True)


def _facts(identity: dict[str, Any], spelled: Collection[str] = ()) -> dict[str, Any]:
    """What counts of an identity: an input may have been renamed, and what is spelled otherwise be the same."""
    config = {name: value for name, value in dict(identity["config"]).items() if name not in spelled}
    return identity | {"config": config, "inputs": [entry["hash"] for entry in identity["inputs"]]}


def _make_shard(
    config: Any,
    inputs: Sequence[Dataset],
    produce: Callable[[Any, Sequence[Dataset], int], Iterable[Produced]],
    schema: "pyarrow.Schema",
    output: pathlib.Path,
    parts: Sequence[tuple[str, str]],
    shard: int,
) -> dict[str, Any]:
    """Makes a shard and its receipt; returns what `Timing.shard` keeps, and how many documents were told as done."""
    import numpy  # noqa: F401
    import pyarrow
    import pyarrow.compute
    import pyarrow.parquet  # all of them 0.2 s, which is no part of the first shard's work

    clock = Clock()
    rows: list[dict[str, Any]] = []
    failures: list[dict[str, str]] = []
    counters: dict[str, int] = {}
    count = held = told = 0
    path = output / f"{shard:05d}.parquet"
    with atomic_write(path) as file, pyarrow.parquet.ParquetWriter(file, schema, compression="zstd") as writer:
        for item in produce(config, inputs, shard):
            if isinstance(item, Failure):
                failures.append({"key": _printable(item.key), "reason": _printable(item.reason)})
            elif isinstance(item, Counted):
                for key, value in item.counters.items():
                    counters[key] = counters.get(key, 0) + value
            elif isinstance(item, Done):
                tell(item.documents)
                told += item.documents
            else:
                rows.append(item)
                held += 100 + sum(len(value) for value in item.values() if hasattr(value, "__len__"))
            if held >= _GROUP_BYTES:
                writer.write_table(pyarrow.Table.from_pylist(rows, schema=schema))
                count, held = count + len(rows), 0
                rows.clear()
        if rows or count == 0:
            writer.write_table(pyarrow.Table.from_pylist(rows, schema=schema))
            count += len(rows)
    receipt = {
        "rows": count,
        "bytes": path.stat().st_size,
        "sha256": sha256_file(path),
        "counters": counters,
        "failures": failures,
    }
    if parts:
        receipt["made_of"] = parts[shard][1]
    write_json(path.with_suffix(".json"), receipt)
    return {"shard": shard, "rows": count, "told": told} | clock.read()


def _printable(text: str) -> str:
    """A text that UTF-8 can hold, as what stands for undecodable bytes in a file's name is not."""
    return text.encode("utf-8", "backslashreplace").decode()


def _say(quiet: bool, line: str) -> None:
    if not quiet:
        print(line, file=sys.stderr, flush=True)
