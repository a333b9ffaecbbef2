"""The table of what was measured fastest: measured.json, written by bench/choose.py from the benchmarks' results.

A row is a cell (op, device, dtype, head_dim) with the backends measured in it, fastest first, their speed relative to
the fastest, and the results it comes from. A cell without a row is unmeasured.
"""

import dataclasses
import json
from pathlib import Path
from typing import Any, NamedTuple

import torch

from kernels.checks import DTYPES

BACKENDS = ("reference", "torch", "cpu", "triton", "cuda")
PATH = Path(__file__).with_name("measured.json")
DTYPE_NAMES = {str(dtype).removeprefix("torch."): dtype for dtype in DTYPES}


class Cell(NamedTuple):
    """The calls that one row decides."""

    op: str
    device: str
    """`device_kind` of the device."""
    dtype: torch.dtype
    head_dim: int | None
    """None for an op whose choice does not ask for it."""


@dataclasses.dataclass(frozen=True)
class Row:
    """What was measured in a cell."""

    speed: dict[str, float]
    """Backends, fastest first, with their speed relative to the fastest."""
    results: tuple[str, ...]
    """File and date of each result."""


def device_kind(device: torch.device) -> str:
    """What a measurement on `device` holds for: "cpu", or a GPU's compute capability, "sm_90"."""
    if device.type != "cuda":
        return device.type
    properties = torch.cuda.get_device_properties(device)  # torch.compile takes this one for a constant
    return f"sm_{properties.major}{properties.minor}"


def _row(entry: Any) -> tuple[Cell, Row]:
    """Raises ValueError, TypeError or KeyError if the entry is not a row."""
    fields = {"op", "device", "dtype", "head_dim", "speed", "results"}
    if set(entry) != fields:
        raise ValueError(f"its fields must be {', '.join(sorted(fields))}")
    head_dim, speed, results = entry["head_dim"], entry["speed"], entry["results"]
    if entry["dtype"] not in DTYPE_NAMES:
        raise ValueError(f"dtype must be one of {', '.join(DTYPE_NAMES)}")
    if head_dim is not None and not isinstance(head_dim, int):
        raise ValueError("head_dim must be a whole number or null")
    if not speed or not set(speed) <= set(BACKENDS):
        raise ValueError(f"speed must name backends, of {', '.join(BACKENDS)}")
    values = list(speed.values())
    if values[0] != 1 or values != sorted(values, reverse=True):
        raise ValueError("speed must fall, from 1")
    if not results:
        raise ValueError("results must name where it was measured")
    return Cell(entry["op"], entry["device"], DTYPE_NAMES[entry["dtype"]], head_dim), Row(speed, tuple(results))


def read(path: Path = PATH) -> dict[Cell, Row]:
    """The table in a file. Raises ValueError, with file, row and remedy, if it is not one."""
    remedy = "write it anew: python bench/choose.py bench/results/*.json"
    try:
        entries = json.loads(path.read_text())
    except json.JSONDecodeError as error:
        raise ValueError(f"{path}: not JSON ({error}); {remedy}") from error
    if not isinstance(entries, list):
        raise ValueError(f"{path}: must be a list of rows; {remedy}")
    table: dict[Cell, Row] = {}
    for entry in entries:
        try:
            cell, row = _row(entry)
            if cell in table:
                raise ValueError("a second row for its cell")
        except (ValueError, TypeError, AttributeError) as error:
            raise ValueError(f"{path}: row {json.dumps(entry)}: {error}; {remedy}") from error
        table[cell] = row
    return table
