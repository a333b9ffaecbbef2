"""Measures which version of each op is fastest on this machine, and keeps the table for the user (kernels/measured.py).

    python -m kernels.tune 2x1024x512x8x64x2048x51200

The shape is batch x tokens x hidden x heads x head_dim x inner x columns of a model; `phi1 tune` reads it from a model's
name or a recipe. Of each op, size, dtype and work all versions that run here and PyTorch's own take turns, one call each a
round, so that a slow spell of the machine falls on all of them. Memory and time are bounded: sequences are at most 544
tokens on a CPU, and what the time does not suffice for stays unmeasured, so that the fixed order decides it.
"""

import argparse
import contextlib
import dataclasses
import datetime
import fcntl
import functools
import os
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from kernels import measured, reference, registry
from kernels.attention import flash_attention
from kernels.block import parallel_block
from kernels.loss import linear_cross_entropy
from kernels.machine import Machine
from kernels.measured import Cell, Row, size_class
from kernels.norm import layer_norm
from kernels.rotary import apply_rotary

SECONDS = {"cpu": 60.0, "cuda": 90.0}
"""At most so long a measurement takes, by type of device."""
_LONGEST = {"cpu": 544, "cuda": 4096}
_SHORT, _FEW = 256, 1
_LOSS_ROWS = {"cpu": 544, "cuda": 4096}


class TuneError(ValueError):
    """What was measured cannot be kept."""


@dataclasses.dataclass(frozen=True)
class Shape:
    """Of a model, and of what it is given."""

    batch: int
    tokens: int
    hidden: int
    heads: int
    head_dim: int
    inner: int
    columns: int
    kv_heads: int = 0
    """0: as many as heads."""
    rotary_dim: int = 0
    """0: half of head_dim, as in phi-1."""

    def __str__(self) -> str:
        return "x".join(str(getattr(self, field.name)) for field in dataclasses.fields(self)[:7])

    @classmethod
    def parse(cls, text: str) -> "Shape":
        """ "2x1024x512x8x64x2048x51200". Raises ValueError if it is none."""
        parts = text.split("x")
        if len(parts) != 7 or not all(part.isdigit() and int(part) > 0 for part in parts):
            raise ValueError(f"shape = {text!r}: must be batch x tokens x hidden x heads x head_dim x inner x columns, seven positive whole numbers joined by 'x'")  # fmt: skip
        return cls(*map(int, parts))


@dataclasses.dataclass(frozen=True)
class Work:
    """One cell's measurement."""

    cell: Cell
    options: dict[str, Any]
    """What else a version's `refuses` looks at."""
    flops: float
    """Of a call, about: those that take least come first, so that most are measured whatever the time suffices for."""
    make: Callable[[], tuple[Callable[..., Any], list[Tensor]]]
    """Makes (the op, which takes `backend=`; the tensors that it differentiates, first of its arguments)."""


def works(of: Machine, device: torch.device, shape: Shape, dtypes: Sequence[torch.dtype]) -> list[Work]:
    """All cells that a model of this shape meets, the cheapest first."""
    long = min(shape.tokens, _LONGEST[of.device])
    kv_heads, rotary_dim = shape.kv_heads or shape.heads, shape.rotary_dim or shape.head_dim // 2
    batch = shape.batch if of.device == "cuda" else 1  # a CPU's threads are busy with one
    groups = kv_heads if of.device == "cuda" else min(kv_heads, 2 * torch.get_num_threads())  # and with so many heads
    query_heads = groups * (shape.heads // kv_heads)
    found: list[Work] = []

    def random(*size: int) -> Tensor:
        return torch.randn(size, dtype=torch.float32, device=device) * 0.1

    def add(
        op: str, dtype: torch.dtype, head_dim: int | None, queries: int, keys: int, make: Any, flops: float, **options: Any
    ) -> None:  # fmt: skip
        size = size_class(queries, keys)
        for work in ("training", "forward") if size != "few" else ("forward",):
            cell = Cell(op, of.kind, dtype, head_dim, size, work)
            if all(other.cell != cell for other in found):
                cost = flops * (3 if work == "training" else 1)
                found.append(
                    Work(cell, {"dtype": dtype, **options}, cost, functools.partial(make, dtype, queries, keys))
                )

    def attention(dtype: torch.dtype, queries: int, keys: int) -> tuple[Callable[..., Any], list[Tensor]]:
        sizes = [(batch, queries, query_heads), (batch, keys, groups), (batch, keys, groups)]
        return flash_attention, [random(*size, shape.head_dim).to(dtype) for size in sizes]

    def block(dtype: torch.dtype, queries: int, keys: int) -> tuple[Callable[..., Any], list[Tensor]]:
        width, hidden = shape.heads * shape.head_dim, shape.hidden
        rows = width + 2 * kv_heads * shape.head_dim + shape.inner
        sizes = [(batch, queries, hidden), (hidden,), (hidden,), (rows, hidden), (rows,), (hidden, width + shape.inner), (hidden,)]  # fmt: skip
        tables = reference.rotary_table(keys, rotary_dim, device=device)
        block_shape = reference.BlockShape(shape.heads, kv_heads, shape.head_dim)
        more: dict[str, Any] = {}
        if queries < keys:
            cache = [random(batch, keys, kv_heads, shape.head_dim).to(dtype) for _ in range(2)]
            more = {
                "kv_cache": (*cache, keys - queries),
                "positions": torch.arange(keys - queries, keys, device=device),
            }

        def run(*tensors: Any, backend: str) -> Tensor:
            op: Any = parallel_block  # a checker does not count the tensors
            return op(*tensors, *tables, block_shape, **more, backend=backend)

        return run, [random(*size).to(dtype) for size in sizes]

    def loss(dtype: torch.dtype, rows: int, _: int) -> tuple[Callable[..., Any], list[Tensor]]:
        targets = torch.randint(shape.columns, (rows,), device=device)
        sizes = [(rows, shape.hidden), (shape.columns, shape.hidden), (shape.columns,)]
        tensors = [random(*size).to(dtype) for size in sizes]

        def run(hidden: Tensor, weight: Tensor, bias: Tensor, *, backend: str) -> Tensor:
            return linear_cross_entropy(hidden, weight, bias, targets, backend=backend)

        return run, tensors

    def norm(dtype: torch.dtype, rows: int, _: int) -> tuple[Callable[..., Any], list[Tensor]]:
        return layer_norm, [
            random(*size).to(dtype) for size in ((rows, shape.hidden), (shape.hidden,), (shape.hidden,))
        ]

    def rotary(dtype: torch.dtype, tokens: int, _: int) -> tuple[Callable[..., Any], list[Tensor]]:
        cos, sin = reference.rotary_table(tokens, rotary_dim, device=device)
        q, k = (random(1, tokens, heads, shape.head_dim).to(dtype) for heads in (shape.heads, kv_heads))

        def run(q: Tensor, k: Tensor, *, backend: str) -> tuple[Tensor, Tensor]:
            return apply_rotary(q, k, cos, sin, backend=backend)

        return run, [q, k]

    sizes = [(long, long), (_FEW, long), (min(_SHORT, long), min(_SHORT, long))]
    block_options = {"hidden": shape.hidden, "inner": shape.inner, "rotary_dim": rotary_dim}
    for dtype in dtypes:
        for queries, keys in sizes:
            scores = 4.0 * batch * queries * keys * shape.head_dim
            products = 2.0 * batch * queries * shape.hidden * (5 * shape.heads * shape.head_dim + 2 * shape.inner)
            add("flash_attention", dtype, shape.head_dim, queries, keys, attention, scores * query_heads)
            whole = products + scores * shape.heads
            add("parallel_block", dtype, shape.head_dim, queries, keys, block, whole, **block_options)
        rows = _LOSS_ROWS[of.device]
        logits = 2.0 * rows * shape.hidden * shape.columns
        add("linear_cross_entropy", dtype, None, rows, rows, loss, logits, columns=shape.columns)
        for rows in (batch * long, _FEW, min(_SHORT, long)):
            add("layer_norm", dtype, None, rows, rows, norm, 10.0 * rows * shape.hidden)
            add("apply_rotary", dtype, None, rows, rows, rotary, 6.0 * rows * shape.hidden)
    return sorted(found, key=lambda work: work.flops)


def candidates(of: Machine, work: Work) -> list[str]:
    """The versions of the work's op that can serve it on the machine, all but `reference`."""
    options = {**work.options, **({} if work.cell.head_dim is None else {"head_dim": work.cell.head_dim})}
    found = [v for v in registry.versions() if v != "reference" and registry.serves(work.cell.op, v, of, options)]
    if work.cell.dtype != torch.bfloat16:  # where these run the code of avx512, once is enough
        found = [v for v in found if v not in ("cpu/avx512_bf16", "cpu/amx_bf16") or "cpu/avx512" not in found]
    # Without vector instructions everything is slower by far than PyTorch's ops: it would use up the time.
    return [v for v in found if v != "cpu/portable"] if len(found) > 2 else found


def _timer(work: Work, version: str, device: torch.device, op: Callable[..., Any], inputs: list[Tensor]) -> Callable[[], float]:  # fmt: skip
    """Gives the seconds of one call of a version."""
    training = work.cell.work == "training"
    tensors = [x.detach().requires_grad_(training) for x in inputs]

    def call() -> None:
        with torch.set_grad_enabled(training):
            out = op(*tensors, backend=version)
            if training:
                outs = [x for x in (out if isinstance(out, tuple) else (out,))]
                torch.autograd.grad(outs, tensors, [torch.ones_like(x) for x in outs])

    def seconds() -> float:
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        start = time.perf_counter()
        call()
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        return time.perf_counter() - start

    return seconds


def measure(of: Machine, work: Work, device: torch.device, seconds: float) -> Row | None:
    """The cell's row, from rounds of at least a call each; None if no two versions could be measured.

    A version that raises counts as slow and is named in the row.
    """
    op, inputs = work.make()
    timers: dict[str, Callable[[], float]] = {}
    times: dict[str, list[float]] = {}
    failed: dict[str, str] = {}
    started = time.perf_counter()
    for version in candidates(of, work):
        timer = _timer(work, version, device, op, inputs)
        try:
            first = timer()  # compiles, fills caches
            # A call that takes this much of the time is, on a CPU, what it seems.
            times[version] = [first if device.type == "cpu" and first > 0.2 * seconds else timer()]
        except Exception as error:  # a compiler's, a driver's: anything may come, and none may stop the rest
            failed[version] = f"{type(error).__name__}: {(str(error).strip() or 'no message').splitlines()[0][:200]}"
        else:
            timers[version] = timer
    called = True
    while called and time.perf_counter() - started < seconds:
        called, best = False, min(map(min, times.values()))
        for version, timer in timers.items():
            found = times[version]
            # From the third call on those that are far behind take no more of the time.
            if (len(found) < 3 or min(found) < 4 * best) and time.perf_counter() - started + min(found) < seconds:
                found.append(timer())
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
    shape: Shape, device: torch.device, dtypes: Sequence[torch.dtype] | None = None, seconds: float | None = None,
    say: Callable[[str], None] = lambda line: print(line, file=sys.stderr, flush=True),
) -> Path:  # fmt: skip
    """Measures, writes the user's table of this kind of machine, and makes automatic choice follow it. Returns its path.

    dtypes: default bfloat16 and, on a CPU, float32. seconds: default SECONDS. Ctrl-C (KeyboardInterrupt) keeps what was
    measured until then. While another process measures this machine, it is waited for, and its table taken if that is of
    the same shape. Raises TuneError, in one line, if the table cannot be kept; nothing is measured then.
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
        todo = works(of, device, shape, dtypes)
        rows: dict[Cell, Row] = {}
        ends = time.monotonic() + seconds
        try:
            for i, work in enumerate(todo):
                left = ends - time.monotonic()
                if left <= 0:
                    say(f"time is over: {len(todo) - i} of {len(todo)} kinds of calls stay unmeasured")
                    break
                row = measure(of, work, device, left / (len(todo) - i) * 0.7)
                if row is not None:
                    rows[work.cell] = row
                    say(f"[{i + 1}/{len(todo)}] {work.cell.name}: {_in_words(row)}")
        finally:
            if rows:
                _write(
                    path, measured.document(of, _now(), {"shape": str(shape), "threads": torch.get_num_threads()}, rows)
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
        tempfile.TemporaryFile(
            dir=path.parent
        ).close()  # whether a table can be written, before an hour's... a minute's work
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


def main(argv: Sequence[str] | None = None) -> int:
    """The command line; returns the exit status."""
    parser = argparse.ArgumentParser(prog="python -m kernels.tune", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)  # fmt: skip
    parser.add_argument("shape", type=Shape.parse, help="batch x tokens x hidden x heads x head_dim x inner x columns")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu", help="default: %(default)s")
    parser.add_argument("--seconds", type=float, help="at most (default: 60 on a CPU, 90 on a GPU)")
    options = parser.parse_args(argv)
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
