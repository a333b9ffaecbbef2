"""Writes the table that automatic choice follows, kernels/measured.json, from what the benchmarks measured.

    python bench/choose.py bench/results/*.json

Give it the results of all machines: the table is written anew. Where several cases fall into one cell (op, device,
dtype, head_dim), a backend's speed is the geometric mean over the cases that all of its backends were measured in. Training
decides: forward alone counts only in a cell without forward and backward. Peers that are not backends do not count.
"""

import argparse
import json
import statistics
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import kernels.triton
from bench.suite import DTYPES
from kernels import measured
from kernels.measured import BACKENDS, Cell

# Of each benchmark of an op, by the name in its results: the op, and which number of a case's shape is the head_dim, if the
# choice asks for it. (A training step, bench/train.py, is not an op.)
BENCHMARKS: dict[str, tuple[str, int | None]] = {
    "attn": ("flash_attention", 3),
    "block": ("parallel_block", 4),
    "loss": ("linear_cross_entropy", None),
    "rotary": ("apply_rotary", None),
}
TRAINING = ("both", "forward + backward")

Times = dict[tuple[str, str, str], dict[str, float]]
"""(file, case, work) -> seconds of each backend."""


def backend_of(implementation: str) -> str | None:
    """The backend that automatic choice would run so, or None for a peer and for a form that it would not take."""
    # bench/block.py lists the torch backend as the peer that it is there.
    names = {"plain PyTorch": "torch", f"phi1 triton, {kernels.triton.CHOICES['block_product']} product": "triton"}
    return (names | {f"phi1 {backend}": backend for backend in BACKENDS}).get(implementation)


def collect(paths: Sequence[Path]) -> tuple[dict[Cell, Times], dict[str, str]]:
    """The seconds of each cell, and the date of each file."""
    cells: dict[Cell, Times] = {}
    dates: dict[str, str] = {}
    for path in paths:
        document = json.loads(path.read_text())
        if document["benchmark"] not in BENCHMARKS:
            print(f"{path}: left out, {document['benchmark']} is not the benchmark of one op")
            continue
        op, place = BENCHMARKS[document["benchmark"]]
        environment = document["environment"]
        dates[path.name] = environment["time"][:10]
        for row in document["rows"]:
            backend = backend_of(row["implementation"])
            if backend is None or row["seconds"] is None:
                continue
            shape, dtype = row["case"].split()[:2]
            head_dim = None if place is None else int(shape.split("x")[place])
            kind = environment.get("kind", "cpu")  # the first results, all of a CPU, do not say
            cell = Cell(op, kind, DTYPES[dtype], head_dim)
            cells.setdefault(cell, {}).setdefault((path.name, row["case"], row["work"]), {})[backend] = row["seconds"]
    return cells, dates


def entry(cell: Cell, times: Times, dates: dict[str, str]) -> dict[str, Any]:
    """The cell's row of the table. Raises SystemExit if no case measures all of its backends."""
    training = {key: seconds for key, seconds in times.items() if key[2] in TRAINING}
    backends = {backend for seconds in (training or times).values() for backend in seconds}
    shared = {key: seconds for key, seconds in (training or times).items() if set(seconds) == backends}
    if not shared:
        raise SystemExit(f"{cell}: no case measures all of {', '.join(sorted(backends))}: measure one")
    mean = {b: statistics.geometric_mean(seconds[b] for seconds in shared.values()) for b in sorted(backends)}
    order = sorted(mean, key=lambda backend: mean[backend])
    return {
        "op": cell.op,
        "device": cell.device,
        "dtype": str(cell.dtype).removeprefix("torch."),
        "head_dim": cell.head_dim,
        "speed": {backend: round(mean[order[0]] / mean[backend], 3) for backend in order},
        "results": [f"{name} {dates[name]}" for name in sorted({name for name, _, _ in shared})],
    }


def main(argv: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("results", type=Path, nargs="+", help="files that the benchmarks wrote (--save, --json)")
    parser.add_argument("--out", type=Path, default=measured.PATH, help="default: %(default)s")
    options = parser.parse_args(argv)
    cells, dates = collect(options.results)
    rows = [entry(cell, times, dates) for cell, times in cells.items()]
    rows.sort(key=lambda row: (row["op"], row["device"], row["dtype"], row["head_dim"] or 0))
    options.out.write_text("[\n" + ",\n".join(json.dumps(row) for row in rows) + "\n]\n")
    measured.read(options.out)
    print(f"wrote {options.out}: {len(rows)} rows")


if __name__ == "__main__":
    main()
