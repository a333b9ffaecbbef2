"""Writes the table that automatic choice follows, kernels/measured.json, from what the benchmarks measured.

    python bench/choose.py bench/results/*.json

Give it the results of all machines: the table is written anew. Where several cases fall into one cell (op, kind of
machine, dtype, head_dim, size, work), a version's speed is that of the case in which it does worst against PyTorch's
op, of the cases that all of the cell's versions were measured in: what comes before PyTorch's op was slower in none of
them. Peers that are no version of ours do not count.
"""

import argparse
import json
import sys
from collections.abc import Sequence
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from bench.suite import DTYPES
from kernels import measured
from kernels.measured import Cell, Row

# Of each benchmark of an op, by the name in its results: the op, and which number of a shape is the head_dim, if the
# choice asks for it. (A training step, bench/train.py, is not an op.)
BENCHMARKS: dict[str, tuple[str, int | None]] = {
    "attn": ("flash_attention", 3),
    "block": ("parallel_block", 4),
    "loss": ("linear_cross_entropy", None),
    "rotary": ("apply_rotary", None),
    "linear": ("product", None),
    "norm": ("layer_norm", None),
}
WORKS = {"forward": "forward", "both": "training", "forward + backward": "training"}

Times = dict[tuple[str, str], dict[str, float]]
"""(file, case) -> seconds of each version."""


def collect(paths: Sequence[Path]) -> tuple[dict[Cell, Times], dict[str, str]]:
    """The seconds of each cell, and the date of each file."""
    cells: dict[Cell, Times] = {}
    dates: dict[str, str] = {}
    for path in paths:
        try:
            document = json.loads(path.read_text())
            known = document["benchmark"] in BENCHMARKS
        except (OSError, ValueError, KeyError, TypeError) as error:
            raise SystemExit(f"{path}: not a benchmark's result ({type(error).__name__}: {error})") from error
        if not known:
            print(f"{path}: left out, {document['benchmark']} is not the benchmark of one op")
            continue
        op, place = BENCHMARKS[document["benchmark"]]
        environment = document["environment"]
        dates[path.name] = environment["time"][:10]
        rows = [row for row in document["rows"] if row["backend"] and row["seconds"] and row["work"] in WORKS]
        if not rows:
            print(f"{path}: left out, no row of it names a version; measure again")
        for row in rows:
            head_dim = None if place is None else row["shape"][place]
            cell = Cell(op, environment["kind"], DTYPES[row["dtype"]], head_dim, row["size"], WORKS[row["work"]])
            cells.setdefault(cell, {}).setdefault((path.name, row["case"]), {})[row["backend"]] = row["seconds"]
    return cells, dates


def row_of(cell: Cell, times: Times, dates: dict[str, str]) -> Row:
    """The cell's row of the table. Raises SystemExit if no case measures all of its versions."""
    versions = {version for seconds in times.values() for version in seconds}
    shared = {key: seconds for key, seconds in times.items() if set(seconds) == versions}
    if not shared:
        raise SystemExit(f"{cell.name}: no case measures all of {', '.join(sorted(versions))}: measure one")
    results = tuple(f"{name} {dates[name]}" for name in sorted({name for name, _ in shared}))
    return Row(measured.speeds(list(shared.values())), results)


def main(argv: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("results", type=Path, nargs="+", help="files that the benchmarks wrote (--save, --json)")
    parser.add_argument("--out", type=Path, default=measured.PATH, help="default: %(default)s")
    options = parser.parse_args(argv)
    cells, dates = collect(options.results)
    rows = [measured.entry(cell, row_of(cell, times, dates)) for cell, times in cells.items()]
    rows.sort(key=lambda row: [str(row[name]).zfill(4) for name in Cell._fields])
    options.out.write_text("[\n" + ",\n".join(json.dumps(row) for row in rows) + "\n]\n")
    measured.read(options.out)
    print(f"wrote {options.out}: {len(rows)} rows")


if __name__ == "__main__":
    main()
