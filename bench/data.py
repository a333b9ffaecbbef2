"""The data stages beside their named peers: work a CPU second, and the peak memory of all processes together.

    python bench/data.py --quick
    python bench/data.py --gb 5 --stages ingest-stack tokenize     # the memory of stages on 5 GB of text

Each measurement is a process of its own; those of a stage take turns, round after round, so that a slow spell of the
machine falls on all of them. CPU seconds are those of that process and its workers, from when the inputs are ready
(their start included). Memory is the resident set of the whole process tree, looked at every 20 ms: pages that
processes share count in each of them.

What decontamination finds and what it costs is bench/decontaminate.py's; its comparison of trees has a line here.
"""

import argparse
import contextlib
import dataclasses
import json
import os
import re
import resource
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from bench.data_stages import STAGES, Candidate, Size, Stage, Unavailable, make_inputs

_LOOK_SECONDS = 0.02


@dataclasses.dataclass
class Row:
    """A candidate's measurements, the medians of its rounds."""

    stage: str
    implementation: str
    ours: bool
    unit: str
    amount: float | None = None
    cpu_seconds: list[float] = dataclasses.field(default_factory=list)
    """Of each round."""
    wall_seconds: list[float] = dataclasses.field(default_factory=list)
    peak_bytes: int = 0
    rate: float | None = None
    """Amount a CPU second."""
    ratio: float | None = None
    """Of the rates, to that of the best peer."""
    figures: dict[str, float] = dataclasses.field(default_factory=dict)
    unavailable: str | None = None


def resident(root: int) -> int:
    """Bytes in memory of a process and all below it, by /proc."""
    children: dict[int, list[int]] = {}
    pages: dict[int, int] = {}
    for entry in Path("/proc").iterdir():
        if entry.name.isdigit():
            with contextlib.suppress(OSError):  # it has ended
                parent = int((entry / "stat").read_text().rpartition(")")[2].split()[1])
                pages[int(entry.name)] = int((entry / "statm").read_text().split()[1])
                children.setdefault(parent, []).append(int(entry.name))
    total, waiting = 0, [root]
    while waiting:
        pid = waiting.pop()
        total += pages.get(pid, 0)
        waiting += children.get(pid, [])
    return total * os.sysconf("SC_PAGE_SIZE")


def measure(stage: str, candidate: Candidate, inputs: Path, size: Size) -> dict[str, Any]:
    """Runs a candidate in a process of its own: its figures, or {"unavailable": why}. RuntimeError if it fails."""
    with tempfile.TemporaryDirectory(dir=inputs) as work, tempfile.TemporaryFile("w+") as log:
        task = [stage, candidate.name, str(inputs), work, json.dumps(dataclasses.asdict(size))]
        command = [sys.executable, __file__, "--child", *task]
        environment = os.environ | dict(candidate.environment)
        with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=log, text=True, env=environment) as process:
            peak = 0
            while process.poll() is None:
                peak = max(peak, resident(process.pid))
                time.sleep(_LOOK_SECONDS)
            assert process.stdout is not None
            said = process.stdout.read()
        if process.returncode:
            log.seek(0)
            raise RuntimeError(f"{stage}, {candidate.name}: {log.read().strip()[-2000:]}")
    return json.loads(said.splitlines()[-1]) | {"peak": peak}


def child(stage: str, name: str, inputs: str, work: str, size: str) -> None:
    """Does one measurement, in the process that was started for it, and prints it."""
    (candidate,) = [each for s in STAGES if s.name == stage for each in s.candidates if each.name == name]
    try:
        call = candidate.prepare(Path(inputs), Path(work), Size(**json.loads(size)))
    except Unavailable as reason:
        print(json.dumps({"unavailable": str(reason)}))
        return
    cpu, wall = cpu_seconds(), time.monotonic()
    result = call()
    print(json.dumps(result | {"cpu": cpu_seconds() - cpu, "wall": time.monotonic() - wall}))


def cpu_seconds() -> float:
    """Of this process and of those below it that have ended."""
    usages = map(resource.getrusage, (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN))
    return sum(usage.ru_utime + usage.ru_stime for usage in usages)


def compare(stage: Stage, inputs: Path, size: Size, rounds: int) -> list[Row]:
    """The candidates of a stage, in turns."""
    rows = [Row(stage.name, candidate.name, candidate.ours, stage.unit) for candidate in stage.candidates]
    for _ in range(rounds):
        for row, candidate in zip(rows, stage.candidates, strict=True):
            if row.unavailable:
                continue
            result = measure(stage.name, candidate, inputs, size)
            row.unavailable = result.pop("unavailable", None)
            row.peak_bytes = max(row.peak_bytes, result.pop("peak"))
            if row.unavailable is None:
                row.cpu_seconds.append(result.pop("cpu"))
                row.wall_seconds.append(result.pop("wall"))
                row.amount = result.pop("amount")
                row.figures = result
    for row in rows:
        if row.amount is not None:
            row.rate = row.amount / statistics.median(row.cpu_seconds)
    peers = [row.rate for row in rows if row.rate and not row.ours]
    for row in rows:
        row.ratio = row.rate / max(peers) if row.rate and peers else None
    return rows


def table(rows: Sequence[Row]) -> str:
    """Markdown."""
    lines = [
        "| stage | implementation | amount | CPU s (least–most) | wall s | a CPU second | × best peer | peak MiB | |"
    ]
    lines.append("|---" * 9 + "|")
    wanted = {stage.name: stage.wanted for stage in STAGES}
    for row in rows:
        name = f"**{row.implementation}**" if row.ours else row.implementation
        if row.amount is None or row.rate is None:
            lines.append(f"| {row.stage} | {name} | | | | | | | {row.unavailable} |")
            continue
        cpu = f"{statistics.median(row.cpu_seconds):.2f} ({min(row.cpu_seconds):.2f}–{max(row.cpu_seconds):.2f})"
        wall = f"{statistics.median(row.wall_seconds):.2f}"
        ratio = "" if row.ratio is None else f"{row.ratio:.2f}"
        notes = [f"{value:.4g} {key}" for key, value in row.figures.items()]
        notes += [f"{wanted[row.stage]} × wanted"] if row.ours and wanted[row.stage] else []
        lines.append(
            f"| {row.stage} | {name} | {row.amount:,.0f} {row.unit} | {cpu} | {wall} "
            f"| {row.rate:,.4g} | {ratio} | {row.peak_bytes / 2**20:,.0f} | {', '.join(notes)} |"
        )
    return "\n".join(lines)


HEADER = "Ours in bold, with its workers. Medians of interleaved rounds; CPU seconds of all processes of a stage."


def save(stem: Path, document: dict[str, Any], rows: Sequence[Row]) -> None:
    """Writes stem.json and stem.md."""
    stem.parent.mkdir(parents=True, exist_ok=True)
    stem.with_suffix(".json").write_text(json.dumps(document, indent=1) + "\n")
    facts = "\n".join(f"- {key}: {value}" for key, value in document["environment"].items())
    size = ", ".join(f"{key} {value:g}" for key, value in document["size"].items())
    stem.with_suffix(".md").write_text(
        f"# data, {document['environment']['device']}\n\n{HEADER}\n\n{table(rows)}\n\nSize: {size}.\n\n{facts}\n"
    )
    print(f"wrote {stem}.json, .md")


def main(argv: Sequence[str] | None = None) -> list[Row]:
    names = [stage.name for stage in STAGES]
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--gb", type=float, default=0.05, help="of text to ingest and tokenize, 1e9 bytes")
    parser.add_argument("--stages", nargs="+", default=names, choices=names, metavar="STAGE", help=", ".join(names))
    parser.add_argument("--rounds", type=int, default=3, help="of each measurement")
    parser.add_argument("--quick", action="store_true", help="a fifth of the work, one round")
    parser.add_argument("--folder", type=Path, help="for the inputs (default: a temporary one)")
    parser.add_argument("--json", type=Path, help="write the measurements to this file")
    parser.add_argument("--save", action="store_true", help="write bench/results/data-<kind of machine>.json and .md")
    options = parser.parse_args(argv)
    if options.gb <= 0 or options.rounds < 1:
        parser.error(f"--gb {options.gb:g} --rounds {options.rounds}: must be more than 0, and at least 1")
    part = 5 if options.quick else 1
    size = Size(options.gb / part, 5000 // part, 20_000 // part, 1500 // part)
    rows: list[Row] = []
    if options.folder is not None:
        options.folder.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=options.folder) as place:
        inputs = Path(place)
        if {"ingest-stack", "tokenize"} & set(options.stages):
            make_inputs(inputs, size)
        for stage in STAGES:
            if stage.name in options.stages:
                rows += compare(stage, inputs, size, 1 if options.quick else options.rounds)
                print(
                    f"{stage.name}: "
                    + ", ".join(f"{r.implementation} {r.rate or 0:.4g}" for r in rows if r.stage == stage.name)
                )
    print(f"\n{HEADER}\n\n{table(rows)}")
    if options.json or options.save:
        from bench.harness import RESULTS, environment  # not before: it imports torch

        facts = environment("cpu")
        document: dict[str, Any] = {"benchmark": "data", "size": dataclasses.asdict(size), "environment": facts}
        document["rows"] = [dataclasses.asdict(row) for row in rows]
        if options.json:
            options.json.write_text(json.dumps(document, indent=1) + "\n")
        if options.save:
            save(RESULTS / f"data-{re.sub(r'[^a-z0-9]+', '-', facts['kind'].lower()).strip('-')}", document, rows)
    return rows


if __name__ == "__main__":
    if sys.argv[1:2] == ["--child"]:
        child(*sys.argv[2:])
    else:
        main()
