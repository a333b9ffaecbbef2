"""What was measured fastest: the table that comes with the package, and the user's own.

A row is a cell (op, kind of machine, dtype, head_dim, size, work) with the versions measured in it, fastest first,
their speed relative to the fastest, and the results it comes from. It counts for its own kind of machine only.
measured.json is written by bench/choose.py from the benchmarks' results; the user's own tables by `phi1 tune`
(kernels/tune.py), a file for each kind, in the user's cache folder. One of those counts as long as driver, torch,
triton and phi1 are what they were.
"""

import dataclasses
import importlib.metadata
import json
import logging
import os
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch

from kernels import machine
from kernels.checks import DTYPES

BACKENDS = ("reference", "torch", "cpu", "triton", "cuda")
PATH = Path(__file__).with_name("measured.json")
DTYPE_NAMES = {str(dtype).removeprefix("torch."): dtype for dtype in DTYPES}
SIZES = {"few": "up to 16 queries", "short": "up to 512 keys", "long": "more"}
WORKS = ("forward", "training")
MOST_ROWS = 16
_SMALL = 1 << 22
_BY_ROWS = ["1-row"] * 2 + ["2-3-rows"] * 2 + ["4-8-rows"] * 5 + ["9-16-rows"] * 8
_BY_ROWS_SMALL = [f"{name}-small" for name in _BY_ROWS]
PRODUCT_SIZES = tuple(dict.fromkeys((*_BY_ROWS, *_BY_ROWS_SMALL)))

_log = logging.getLogger("kernels")


def size_class(queries: int, keys: int | None = None) -> str:
    """Of SIZES the one of a call: as many queries (tokens, rows) as see as many keys (default: as many as queries).

    The borders are where the winner was seen to change: up to 16 queries csrc/cpu goes over K and V unpacked; between
    257 keys and 1,024 AVX-512 BF16 falls behind PyTorch on an Intel CPU.
    """
    if queries <= 16:
        return "few"
    return "short" if (queries if keys is None else keys) <= 512 else "long"


def product_class(rows: int, multiplications: int) -> str:
    """Of PRODUCT_SIZES the one of a product of up to 16 rows: by its rows, and whether it is small, of fewer than 4M
    multiplications.

    The borders are where the winner was seen to change: in float32 AVX2's loops are behind MKL with one row (Zen 3) or
    up to three (Emerald Rapids) and ahead from there on, and from 9 to 16 AVX-512's are ahead of them; in small
    products, whose weights stay in the cache, MKL wins up to 8 rows.
    """
    return (_BY_ROWS_SMALL if multiplications < _SMALL else _BY_ROWS)[rows]


def calls(op: str) -> list[tuple[str, str]]:
    """The (size, work) of an op's cells."""
    if op == "product":
        return [(size, "forward") for size in PRODUCT_SIZES]
    return [(size, work) for size in SIZES for work in WORKS]


class Cell(NamedTuple):
    """The calls that one row decides."""

    op: str
    kind: str
    """`kernels.machine.Machine.kind`."""
    dtype: torch.dtype
    head_dim: int | None
    """None for an op whose choice does not ask for it."""
    size: str
    """Of SIZES, or of PRODUCT_SIZES for the op `product`."""
    work: str
    """Of WORKS: whether a backward pass may follow."""

    @property
    def name(self) -> str:
        """The cell in words, without the machine: "flash_attention bfloat16 64 long training"."""
        dtype, head_dim = str(self.dtype).removeprefix("torch."), "-" if self.head_dim is None else str(self.head_dim)
        return f"{self.op} {dtype} {head_dim} {self.size} {self.work}"


@dataclasses.dataclass(frozen=True)
class Row:
    """What was measured in a cell."""

    speed: Mapping[str, float]
    """Versions, fastest first, with their speed relative to the fastest."""
    results: tuple[str, ...]
    """Where and when: file and date of each result."""
    failed: Mapping[str, str] = dataclasses.field(default_factory=dict)
    """Versions that could not be measured, and the error: they count as slow."""


def speeds(cases: Sequence[Mapping[str, float]]) -> dict[str, float]:
    """`Row.speed` from the seconds of each version in the cases of a cell: each version's worst case against `torch`.

    Without `torch` among them, against the version that is fastest in the first case.
    """
    base = "torch" if all("torch" in seconds for seconds in cases) else min(cases[0], key=lambda v: cases[0][v])
    worst = {version: min(seconds[base] / seconds[version] for seconds in cases) for version in cases[0]}
    order = sorted(worst, key=lambda version: -worst[version])
    return {version: round(worst[version] / worst[order[0]], 3) for version in order}


def entry(cell: Cell, row: Row) -> dict[str, Any]:
    """The row as it stands in a file."""
    fields = {**cell._asdict(), "dtype": str(cell.dtype).removeprefix("torch."), "speed": dict(row.speed)}
    return {**fields, **({"failed": dict(row.failed)} if row.failed else {}), "results": list(row.results)}


def _row(fields: Any) -> tuple[Cell, Row]:
    """Raises ValueError, TypeError or AttributeError if the fields are not a row's."""
    names = {*Cell._fields, "speed", "results"}
    if {*fields} - {"failed"} != names:
        raise ValueError(f"its fields must be {', '.join(sorted(names))}")
    head_dim, speed, failed = fields["head_dim"], fields["speed"], fields.get("failed", {})
    sizes = dict.fromkeys(size for size, _ in calls(fields["op"]))
    for name, valid in (("dtype", DTYPE_NAMES), ("size", sizes), ("work", WORKS)):
        if fields[name] not in valid:
            raise ValueError(f"{name} must be one of {', '.join(valid)}")
    if head_dim is not None and not isinstance(head_dim, int):
        raise ValueError("head_dim must be a whole number or null")
    if not (speed or failed) or not {v.partition("/")[0] for v in (*speed, *failed)} <= {*BACKENDS}:
        raise ValueError(f"speed must name versions, of {', '.join(BACKENDS)}")
    values = list(speed.values())
    if values and (values[0] != 1 or values != sorted(values, reverse=True)):
        raise ValueError("speed must fall, from 1")
    if not fields["results"]:
        raise ValueError("results must name where it was measured")
    cell = Cell(**{name: fields[name] for name in Cell._fields} | {"dtype": DTYPE_NAMES[fields["dtype"]]})
    return cell, Row(speed, tuple(fields["results"]), failed)


def _table(entries: Any) -> dict[Cell, Row]:
    """Raises ValueError, with the row, if the entries are no table."""
    if not isinstance(entries, list):
        raise ValueError("must be a list of rows")
    table: dict[Cell, Row] = {}
    for fields in entries:
        try:
            cell, row = _row(fields)
            if cell in table:
                raise ValueError("a second row for its cell")
        except (ValueError, TypeError, AttributeError) as error:
            raise ValueError(f"row {json.dumps(fields)}: {error}") from error
        table[cell] = row
    return table


def read(path: Path = PATH) -> dict[Cell, Row]:
    """The package's table. Raises ValueError, with file, row and remedy, if the file is none."""
    try:
        return _table(json.loads(path.read_text(encoding="utf-8")))
    except ValueError as error:  # JSONDecodeError too
        what = f"not JSON ({error})" if isinstance(error, json.JSONDecodeError) else str(error)
        raise ValueError(f"{path}: {what}; write it anew: python bench/choose.py bench/results/*.json") from error


# ------------------------------------------------------------------------------------------- the user's own tables


def own_folder() -> Path:
    """Where the user's tables are: phi1/tuned in the cache folder of the XDG base directory specification."""
    cache = os.environ.get("XDG_CACHE_HOME", "")
    root = Path(cache) if os.path.isabs(cache) else Path(os.path.expanduser("~")) / ".cache"
    return root / "phi1" / "tuned"


def own_path(kind: str) -> Path:
    """The file of a kind of machine."""
    return own_folder() / f"{re.sub(r'[^a-z0-9]+', '-', kind.lower()).strip('-')}.json"


def conditions(of: machine.Machine) -> dict[str, str | None]:
    """What a measurement holds under, beside the kind: a change of any makes a table stale."""

    def version(package: str) -> str | None:
        try:
            return importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError:
            return None

    found = {"name": of.name, "torch": torch.__version__, "phi1": version("phi1")}
    return found | ({"driver": machine.driver(), "triton": version("triton")} if of.device == "cuda" else {})


def document(of: machine.Machine, when: str, notes: Mapping[str, Any], table: Mapping[Cell, Row]) -> str:
    """A table of the user's own, as it stands in its file."""
    head = {"kind": of.kind, "conditions": conditions(of), "measured": when, **notes}
    lines = ",\n".join(json.dumps(entry(cell, row)) for cell, row in table.items())
    return json.dumps(head, indent=1)[:-2] + f',\n "rows": [\n{lines}\n]\n}}\n'


def stale(of: machine.Machine, found: Mapping[str, Any]) -> str | None:
    """Why a table that was measured under the conditions `found` does not count on `of` now, or None."""
    now = conditions(of)
    changed = [f"{name} was {found.get(name)}, is {now.get(name)}" for name in now if found.get(name) != now[name]]
    return "; ".join(changed) or None


def read_own(of: machine.Machine) -> dict[Cell, Row]:
    """The user's table of a machine, empty if there is none. One that does not count is said in one line, and is
    none.
    """
    path = own_path(of.kind)
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
        table = _table(content["rows"])
        reason = stale(of, content["conditions"]) if content["kind"] == of.kind else f"it is of {content['kind']}"
    except OSError:  # no such file, or not to be read
        return {}
    except (ValueError, TypeError, KeyError, AttributeError) as error:
        reason = f"it is not a table of `phi1 tune` ({type(error).__name__}: {error})"
    if reason is None:
        return {cell: row for cell, row in table.items() if cell.kind == of.kind}
    _log.warning("%s is not used: %s; measure again with `phi1 tune`", path, reason)
    return {}
