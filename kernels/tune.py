"""Measures which version of each op is fastest on this machine, and keeps the table for the user (kernels/measured.py).

    python -m kernels.tune 2x1024x512x8x64x2048x51200

The shape is batch x tokens x hidden x heads x head_dim x inner x columns of a model; `phi1 tune` reads it from a
model's name or a recipe. Of each op, size, dtype and work all versions that run here and PyTorch's own take turns, one
call each a round, so that a slow spell of the machine falls on all of them. Memory and time are bounded: sequences are
at most 544 tokens on a CPU, and what the time does not suffice for stays unmeasured, so that the fixed order decides
it. On a GPU the first half of the time is for compiling (kernels/first_calls.py).
"""

import argparse
import contextlib
import datetime
import fcntl
import math
import os
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from types import MappingProxyType

import torch

from kernels import first_calls, measured, registry
from kernels.machine import Machine
from kernels.measured import Cell, Row
from kernels.tune_works import Shape, Work, candidates, failure, timer, works

SECONDS = {"cpu": 60.0, "cuda": 90.0}
"""At most so long a measurement takes, by type of device."""
_FIRST_CALLS = 0.5
"""Share of it for compiling on a GPU."""


class TuneError(ValueError):
    """What was measured cannot be kept."""


def measure(
    of: Machine, work: Work, device: torch.device, seconds: float, known: Mapping[str, str] = MappingProxyType({})
) -> Row | None:
    """The cell's row, from rounds of at least a call each; None if no two versions could be measured. Raises what
    PyTorch does where the tensors do not fit into memory.

    A version that raises counts as slow and is named in the row. known: versions that are not called, and why.
    """
    op, inputs = work.make()
    timers: dict[str, Callable[[], float]] = {}
    times: dict[str, list[float]] = {}
    failed = dict(known)
    started = time.perf_counter()
    for version in candidates(of, work):
        if version in known:
            continue
        call = timer(work, version, device, op, inputs)
        try:
            first = call()  # compiles, fills caches
            # A call that takes this much of the time is, on a CPU, what it seems.
            times[version] = [first if device.type == "cpu" and first > 0.2 * seconds else call()]
        except Exception as error:  # a compiler's, a driver's: anything may come, and none may stop the rest
            failed[version] = failure(error)
        else:
            timers[version] = call
    called = bool(timers)
    while called and time.perf_counter() - started < seconds:
        called, best = False, min(map(min, times.values()))
        for version, call in timers.items():
            found = times[version]
            # From the third call on those that are far behind take no more of the time.
            if (len(found) < 3 or min(found) < 4 * best) and time.perf_counter() - started + min(found) < seconds:
                found.append(call())
                called = True
    if len(times) + len(failed) < 2 or not times:
        return None
    # Of the rounds the shortest: what else runs on the machine only adds.
    return Row(
        measured.speeds([{version: min(found) for version, found in times.items()}]),
        (f"measured here {datetime.date.today().isoformat()}",),
        failed,
    )


def tune(
    shape: Shape,
    device: torch.device,
    dtypes: Sequence[torch.dtype] | None = None,
    seconds: float | None = None,
    say: Callable[[str], None] = lambda line: print(line, file=sys.stderr, flush=True),
) -> Path:
    """Measures, writes the user's table of this kind of machine, and makes automatic choice follow it. Returns its
    path.

    dtypes: default bfloat16 and, on a CPU, float32. seconds: default SECONDS. Ctrl-C (KeyboardInterrupt) keeps what was
    measured until then. While another process measures this machine, it is waited for, and its table taken if that is
    of the same shape. Raises TuneError, in one line, if the table cannot be kept; nothing is measured then.
    """
    of = registry.machine_of(device)
    dtypes = dtypes or ((torch.bfloat16, torch.float32) if of.device == "cpu" else (torch.bfloat16,))
    seconds = SECONDS[of.device] if seconds is None else seconds
    path = measured.own_path(of.kind)
    with _alone(path, say) as waited:
        if waited and f'"shape": "{shape}"' in _text(path):
            say(f"taken: {path}")
            registry.read_tables()
            return path
        say(f"measuring {of.kind} for at most {seconds:.0f} s, {torch.get_num_threads()} threads, {shape}")
        load = os.getloadavg()[0]
        if of.device == "cpu" and load > 0.5 * (os.cpu_count() or 1):
            say(f"load {load:.1f} on {os.cpu_count()} CPUs: other work runs; measure again when it is done")
        todo = works(of, device, shape, dtypes)
        rows: dict[Cell, Row] = {}
        ends = time.monotonic() + seconds
        failed: dict[first_calls.Call, str] = {}
        if of.device == "cuda":
            groups = first_calls.calls(of, todo)
            say(f"compiling: first calls of {len(groups)} versions of ops, in processes of their own")
            failed = first_calls.run(shape, device, dtypes, groups.values(), seconds * _FIRST_CALLS)
        try:
            for i, work in enumerate(todo):
                left = ends - time.monotonic()
                if left <= 0:
                    say(f"time is over: {len(todo) - i} of {len(todo)} kinds of calls stay unmeasured")
                    break
                known = {version: why for (index, version), why in failed.items() if index == i}
                try:
                    row = measure(of, work, device, left / (len(todo) - i) * 0.7, known)
                except RuntimeError as error:  # no memory for its tensors: the next may take less
                    say(f"[{i + 1}/{len(todo)}] {work.cell.name}: not measured ({failure(error)})")
                    continue
                if row is not None:
                    rows[work.cell] = row
                    say(f"[{i + 1}/{len(todo)}] {work.cell.name}: {_in_words(row)}")
        finally:
            if rows:
                _write(
                    path,
                    measured.document(
                        of, _now(), {"shape": str(shape), "threads": torch.get_num_threads(), "load": load}, rows
                    ),
                )
                registry.read_tables()
                say(f"wrote {path}: {len(rows)} of {len(todo)} kinds of calls")
    return path


def _in_words(row: Row) -> str:
    parts = [f"{version} {speed:.2f}" for version, speed in row.speed.items()]
    return ", ".join(parts + [f"{version} failed ({why})" for version, why in row.failed.items()])


def _now() -> str:
    return datetime.datetime.now(datetime.timezone.utc).isoformat(timespec="seconds")


def _text(path: Path) -> str:
    try:
        return path.read_text(encoding="utf-8")
    except OSError:
        return ""


@contextlib.contextmanager
def _alone(path: Path, say: Callable[[str], None]) -> Iterator[bool]:
    """Keeps other processes from measuring meanwhile; gives whether one had to be waited for."""
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        lock = path.with_suffix(".lock").open("w")
        # Whether a table can be written, before an hour's... a minute's work.
        tempfile.TemporaryFile(dir=path.parent).close()
    except OSError as error:
        raise TuneError(
            f"{path.parent}: cannot be written ({error.strerror}), so nothing is measured and the fixed order decides; "
            "set XDG_CACHE_HOME to a folder that can"
        ) from error
    with lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
            yield False
            return
        except BlockingIOError:
            say("another process measures this machine: waiting for it")
        fcntl.flock(lock, fcntl.LOCK_EX)
        yield True


def _write(path: Path, text: str) -> None:
    """The file appears whole or not at all."""
    temporary = path.with_name(f"{path.name}.tmp-{os.getpid()}")
    try:
        with temporary.open("w", encoding="utf-8") as file:
            file.write(text)
            file.flush()
            os.fsync(file.fileno())
        temporary.replace(path)
    except OSError as error:
        raise TuneError(
            f"{path}: cannot be written ({error.strerror}); set XDG_CACHE_HOME to a folder that can"
        ) from error
    finally:
        temporary.unlink(missing_ok=True)


def _shape(text: str) -> Shape:
    """`Shape.parse`, whose message argparse would leave out."""
    try:
        return Shape.parse(text)
    except ValueError as error:
        raise argparse.ArgumentTypeError(str(error)) from error


def main(argv: Sequence[str] | None = None) -> int:
    """The command line; returns the exit status."""
    parser = argparse.ArgumentParser(
        prog="python -m kernels.tune", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("shape", type=_shape, help="batch x tokens x hidden x heads x head_dim x inner x columns")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu", help="default: %(default)s")
    parser.add_argument("--seconds", type=float, help="at most (default: 60 on a CPU, 90 on a GPU)")
    options = parser.parse_args(argv)
    if options.device.partition(":")[0] not in SECONDS:
        parser.error(f"--device {options.device}: must be of {', '.join(SECONDS)}")
    if options.seconds is not None and not 0 <= options.seconds < math.inf:
        parser.error(f"--seconds {options.seconds}: must be a number, at least 0")
    try:
        tune(options.shape, torch.device(options.device), seconds=options.seconds)
    except TuneError as error:
        print(f"python -m kernels.tune: error: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        return 130
    return 0


if __name__ == "__main__":
    sys.exit(main())
