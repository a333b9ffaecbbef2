"""What every benchmark shares: fair timing, the table, and files that say where a figure came from.

A benchmark is a list of groups. A group is one piece of work (a case and a pass) and its candidates: ours and
peers, same inputs. The candidates of a group take turns, one call each a round, so that a slow spell of the
machine falls on all of them. A peer that cannot run here is listed with the reason.
"""

import argparse
import ctypes
import dataclasses
import datetime
import gc
import json
import os
import platform
import re
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch

from kernels.registry import machine_of

ROOT = Path(__file__).resolve().parents[1]
RESULTS = ROOT / "bench" / "results"


class Unavailable(Exception):
    """Why a candidate cannot run here: no such package, device, or option."""


@dataclasses.dataclass(frozen=True)
class Candidate:
    """One implementation of a case's work."""

    name: str
    ours: bool
    make: Callable[[str], Callable[[], Any]]
    """Given the work, prepares (graph, compilation) and returns the call to time; raises Unavailable."""
    unavailable: str | None = None
    """Why it is not even made, if that is known."""
    version: str | None = None
    """Of `kernels` the version that it is, so that bench/choose.py counts it."""
    chosen: Callable[[str], str] | None = None
    """Of automatic choice: given the work, the version that it takes."""


@dataclasses.dataclass
class Row:
    """One measurement, or the reason why there is none."""

    case: str
    work: str
    """What of the case is timed: "forward", "backward", ..."""
    implementation: str
    ours: bool
    shape: tuple[int, ...] = ()
    dtype: str = ""
    size: str | None = None
    """Of the call, as automatic choice sees it (`kernels.measured.size_class`)."""
    backend: str | None = None
    """The version of `kernels` that it is; None for a peer, and for automatic choice."""
    chosen: str | None = None
    """The version that automatic choice took."""
    seconds: float | None = None
    """Median over the rounds."""
    seconds_quartiles: tuple[float, float] | None = None
    rounds: int = 0
    rate: float | None = None
    """In the benchmark's unit, by its formula."""
    ratio: float | None = None
    """Speed relative to the fastest peer of the group: above 1 is faster."""
    peak_share: float | None = None
    """Rate relative to that of a large matrix product of the same dtype in the same run, where that says something."""
    peak_bytes: int | None = None
    """Most memory that the call held above what was there before: of the device, or of the process on a CPU."""
    unavailable: str | None = None


def environment(device: str) -> dict[str, Any]:
    """Everything one needs to know to read a figure: machine, driver, versions, commit."""

    def output(*command: str) -> str | None:
        try:
            return subprocess.run(command, capture_output=True, text=True, check=True, cwd=ROOT).stdout.strip()
        except (OSError, subprocess.CalledProcessError):
            return None

    status = output("git", "status", "--porcelain", "--untracked-files=no")
    facts: dict[str, Any] = {
        "time": datetime.datetime.now(datetime.timezone.utc).isoformat(timespec="seconds"),
        "command": f"python bench/{' '.join([Path(sys.argv[0]).name, *sys.argv[1:]])}",
        "device": device_name(device),
        "kind": machine_of(torch.device(device)).kind,  # bench/choose.py: whose choice the figures decide
        "threads": torch.get_num_threads(),
        "cpus": os.cpu_count(),
        "load": os.getloadavg()[0],
        "torch": torch.__version__,
        "python": platform.python_version(),
        "commit": output("git", "rev-parse", "HEAD"),
        "uncommitted changes": status is None or bool(status),
    }
    if device == "cuda":
        facts["cuda"] = torch.version.cuda
        facts["driver"] = output("nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader")
    for package in ("triton", "flash_attn"):
        try:
            facts[package] = __import__(package).__version__
        except ImportError:
            facts[package] = None
    return facts


def device_name(device: str) -> str:
    """The GPU's or the CPU's name."""
    if device == "cuda":
        return torch.cuda.get_device_name()
    try:
        names = re.findall(r"^model name\s*: (.*)$", Path("/proc/cpuinfo").read_text(), re.MULTILINE)
    except OSError:
        names = []
    return names[0] if names else platform.processor() or platform.machine()


# About a millisecond; a call of an op with its backward pass takes up to half of one to be queued.
_AHEAD_CYCLES = 2_000_000


class _Clock:
    """Times one call. On CUDA by events, after the L2 cache has been overwritten, the GPU kept busy until the call has
    been queued: what the GPU takes, as in the middle of a model, not what Python takes to ask for it.
    """

    def __init__(self, device: str):
        self.cuda = device == "cuda"
        if self.cuda:
            # At least twice any GPU's L2 (H100: 50 MB).
            self.flush = torch.empty(256 << 20, dtype=torch.int8, device="cuda")
            self.events = [torch.cuda.Event(enable_timing=True) for _ in range(2)]

    def __call__(self, call: Callable[[], Any]) -> float:
        """Seconds."""
        if not self.cuda:
            start = time.perf_counter()
            call()
            return time.perf_counter() - start
        self.flush.zero_()
        torch.cuda._sleep(_AHEAD_CYCLES)
        self.events[0].record()
        call()
        self.events[1].record()
        self.events[1].synchronize()
        return self.events[0].elapsed_time(self.events[1]) / 1000


def _process_peak(call: Callable[[], Any]) -> int | None:
    """Most bytes of memory that the process gained during the call; None where the kernel does not count it (Linux
    does).

    Free memory that malloc kept is given back first, so that the call's own memory is counted.
    """
    status, reset = Path("/proc/self/status"), Path("/proc/self/clear_refs")
    if not (status.exists() and reset.exists()):
        return None

    def kib(name: str) -> int:
        return int(re.findall(rf"^{name}:\s+(\d+) kB", status.read_text(), re.MULTILINE)[0])

    gc.collect()
    ctypes.CDLL(None).malloc_trim(0)
    reset.write_text("5")  # VmHWM starts again at VmRSS
    before = kib("VmRSS")
    call()
    return 1024 * (kib("VmHWM") - before)


class Benchmark:
    """Collects the rows of one run.

    name: of the result files. unit: of the rate, formula: how it comes from the time, printed above the table.
    seconds: measuring time for one group; every candidate gets at least `rounds` rounds.
    """

    def __init__(self, name: str, device: str, *, unit: str, formula: str, seconds: float, rounds: int = 3):
        self.name, self.device, self.unit, self.formula = name, device, unit, formula
        self.seconds, self.rounds = seconds, rounds
        self.rows: list[Row] = []
        self.notes: list[str] = []
        self.failed = False
        self.json: Path | None = None
        self.environment = environment(device)
        self._clock = _Clock(device)
        print(f"{name} on {self.environment['device']}, {self.environment['threads']} threads; {formula}")
        if self.environment["load"] > 0.5:
            self.notes.append(f"load {self.environment['load']:.1f} at the start: other work ran, times are too long")
            print(self.notes[-1])

    def group(
        self,
        case: str,
        work: str,
        amount: float,
        candidates: Sequence[Candidate],
        peak: float | None = None,
        shape: tuple[int, ...] = (),
        dtype: str = "",
        size: str | None = None,
    ) -> None:
        """Times the candidates in turns.

        amount: work of one call, so that amount / seconds is the rate. peak: the rate of a matrix product. shape,
            dtype,
        size: `Row`'s.
        """
        calls: list[tuple[Row, Callable[[], Any], list[float]]] = []
        for candidate in candidates:
            row = Row(case, work, candidate.name, candidate.ours, shape, dtype, size, candidate.version)
            row.chosen = None if candidate.chosen is None else candidate.chosen(work)
            self.rows.append(row)
            try:
                if candidate.unavailable is not None:
                    raise Unavailable(candidate.unavailable)
                call = candidate.make(work)
                call()  # compiles, autotunes, fills caches
                row.peak_bytes = self._peak(call)
            except Unavailable as reason:
                row.unavailable = str(reason)
            except torch.OutOfMemoryError:
                row.unavailable = "out of device memory"
            except Exception as error:  # a bug (a compiler that fails, say) is a result; ours ends in a failure
                self.failed |= candidate.ours
                row.unavailable = f"{type(error).__name__}: {str(error).strip().splitlines()[0][:200]}"
            else:
                calls.append((row, call, []))
        start = time.perf_counter()
        while calls and (len(calls[0][2]) < self.rounds or time.perf_counter() - start < self.seconds):
            for _, call, times in calls:
                times.append(self._clock(call))
        for row, _, times in calls:
            row.rounds, row.seconds = len(times), statistics.median(times)
            quartiles = statistics.quantiles(times, n=4)
            row.seconds_quartiles = (quartiles[0], quartiles[2])
            row.rate = amount / row.seconds
            row.peak_share = None if peak is None else row.rate / peak
        measured = [row for row, _, _ in calls]
        peers = [row.seconds for row in measured if not row.ours and row.seconds]
        for row in measured:
            if peers and row.seconds:
                row.ratio = min(peers) / row.seconds
        shown = [f"{row.implementation} {row.rate:.4g}" for row in measured]
        print(f"  {case}, {work}: {', '.join(shown) if shown else 'no candidate can run'}", flush=True)
        if self.json is not None:  # after each group: a run that is cut off keeps what it measured
            self.json.write_text(self.document())
        del calls
        gc.collect()  # graphs and their tensors, before the next group allocates

    def _peak(self, call: Callable[[], Any]) -> int | None:
        if self.device != "cuda":
            return _process_peak(call)
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        call()
        torch.cuda.synchronize()
        return torch.cuda.max_memory_allocated() - before

    def table(self) -> str:
        """The measurements as a Markdown table, and the reasons for those that are missing."""
        columns = ["case", "work", "implementation", "ms (quartiles)", self.unit, "× best peer"]
        columns += ["% of product"] if any(row.peak_share for row in self.rows) else []
        columns += ["peak MiB"] if any(row.peak_bytes is not None for row in self.rows) else []
        lines = [f"| {' | '.join(columns)} |", "|---" * len(columns) + "|"]
        missing: dict[tuple[str, str], list[str]] = {}
        for row in self.rows:
            if row.seconds is None or row.seconds_quartiles is None:
                missing.setdefault((row.implementation, row.unavailable or ""), []).append(f"{row.case} {row.work}")
                continue
            low, high = (1000 * x for x in row.seconds_quartiles)
            cells = {
                "case": row.case,
                "work": row.work,
                "implementation": f"**{row.implementation}**" if row.ours else row.implementation,
                "ms (quartiles)": f"{1000 * row.seconds:.4g} ({low:.4g}–{high:.4g})",
                self.unit: f"{row.rate:.4g}",
                "× best peer": "" if row.ratio is None else f"{row.ratio:.2f}",
                "% of product": "" if row.peak_share is None else f"{100 * row.peak_share:.0f}",
                "peak MiB": "" if row.peak_bytes is None else f"{row.peak_bytes / 2**20:.0f}",
            }
            lines.append(f"| {' | '.join(cells[column] for column in columns)} |")
        for (implementation, reason), where in missing.items():
            places = "everywhere" if len(where) == len({(r.case, r.work) for r in self.rows}) else "; ".join(where)
            lines.append(f"\nNot measured: {implementation} ({places}): {reason}")
        return "\n".join(lines)

    def document(self) -> str:
        """Everything so far, as JSON."""
        facts = {
            "benchmark": self.name,
            "unit": self.unit,
            "formula": self.formula,
            "environment": self.environment,
            "notes": self.notes,
            "rows": [dataclasses.asdict(row) for row in self.rows],
        }
        return json.dumps(facts, indent=1) + "\n"

    @property
    def header(self) -> str:
        """What stands above the table."""
        return f"{self.formula}. Ours in bold. Median of interleaved rounds."

    def finish(self, options: argparse.Namespace) -> None:
        """Prints the table and writes what the options ask for."""
        print(f"\n{self.header}\n\n{self.table()}")
        for note in self.notes:
            print(note)
        if options.json is not None:
            options.json.write_text(self.document())
        if options.save:
            slug = re.sub(r"[^a-z0-9]+", "-", self.environment["kind"].lower()).strip("-")
            self.save(RESULTS / f"{self.name}-{slug}")

    def save(self, stem: Path) -> None:
        """Writes stem.json, .md and .png."""
        stem.parent.mkdir(parents=True, exist_ok=True)
        stem.with_suffix(".json").write_text(self.document())
        facts = "\n".join(f"- {key}: {value}" for key, value in self.environment.items())
        notes = "".join(f"\n{note}\n" for note in self.notes)
        stem.with_suffix(".md").write_text(
            f"# {self.name}, {self.environment['device']}\n\n{self.header}\n\n{self.table()}\n{notes}\n{facts}\n"
        )
        self.plot(stem.with_suffix(".png"))
        print(f"wrote {stem}.json, .md, .png")

    @classmethod
    def read(cls, path: Path) -> "Benchmark":
        """A run that another machine wrote as JSON, to be drawn here."""
        document = json.loads(path.read_text())
        bench = cls.__new__(cls)  # without a clock: nothing is timed
        bench.name, bench.unit, bench.formula = document["benchmark"], document["unit"], document["formula"]
        bench.environment, bench.notes, bench.device = document["environment"], document["notes"], "none"
        bench.rows = [Row(**row) for row in document["rows"]]
        return bench

    def plot(self, path: Path) -> None:
        """Bars of the rate: one panel per work, one cluster per case, one colour per implementation."""
        import matplotlib

        matplotlib.use("Agg")
        import matplotlib.pyplot as plt

        measured = [row for row in self.rows if row.rate is not None]
        works = list(dict.fromkeys(row.work for row in measured))
        names = list(dict.fromkeys(row.implementation for row in measured))
        colours = {name: plt.get_cmap("tab10")(i % 10) for i, name in enumerate(names)}
        cases = list(dict.fromkeys(row.case for row in measured))
        figure, axes = plt.subplots(
            len(works), 1, figsize=(max(8.0, 1.2 * len(cases)), 2.8 * len(works) + 1), squeeze=False, sharex=True
        )
        for axis, work in zip(axes[:, 0], works, strict=True):
            for i, name in enumerate(names):
                found = {row.case: row.rate for row in measured if row.work == work and row.implementation == name}
                places = [c + 0.8 * (i / len(names) - 0.4) for c, case in enumerate(cases) if case in found]
                heights = [found[case] for case in cases if case in found]
                axis.bar(places, heights, 0.75 / len(names), color=colours[name], label=name)
            axis.set_title(work)
            axis.set_ylabel(self.unit)
            axis.grid(axis="y", alpha=0.3)
        axes[-1, 0].set_xticks(range(len(cases)), cases, rotation=30, ha="right", fontsize=8)
        handles = {
            label: handle for a in axes[:, 0] for handle, label in zip(*a.get_legend_handles_labels(), strict=True)
        }
        figure.suptitle(f"{self.name}, {self.environment['device']}, {self.environment['threads']} threads")
        figure.legend(handles.values(), handles.keys(), loc="outside lower center", ncols=4, fontsize=8)
        figure.set_layout_engine("constrained")
        figure.savefig(path, dpi=110)
        plt.close(figure)


def matrix_peak(device: str, dtype: torch.dtype) -> float:
    """FLOP/s of this machine's fastest large matrix product, measured: what a kernel's share is taken of."""
    size = 8192 if device == "cuda" else 1024
    a, b = (torch.randn(size, size, device=device).to(dtype) for _ in range(2))
    clock = _Clock(device)
    a @ b
    return 2 * size**3 / min(clock(lambda: a @ b) for _ in range(10))


if __name__ == "__main__":
    # python bench/harness.py STEM=FILE.json ...: tables and plots of what another machine measured.
    for argument in sys.argv[1:]:
        stem, file = argument.split("=", 1)
        Benchmark.read(Path(file)).save(Path(stem))
