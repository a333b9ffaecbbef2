"""What is measured of each op for a model's shape: the cells of kernels/measured.py, and calls that fall in them."""

import dataclasses
import itertools
import time
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor

from kernels import reference, registry
from kernels.attention import flash_attention
from kernels.block import parallel_block
from kernels.loss import linear_cross_entropy
from kernels.machine import Machine
from kernels.measured import Cell, calls, product_class, size_class
from kernels.norm import layer_norm
from kernels.rotary import apply_rotary

_LONGEST = {"cpu": 544, "cuda": 4096}
_SHORT, _FEW = 256, 1
_LOSS_ROWS = {"cpu": 544, "cuda": 4096}
_PRODUCT_ROWS = 1, 2, 4, 16
_WEIGHTS, _MOST_WEIGHTS = 64 << 20, 12
"""Bytes of the weights that a product is measured with, one after another as in a model, and how many at most."""


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
            raise ValueError(
                f"shape = {text!r}: must be batch x tokens x hidden x heads x head_dim x inner x columns, seven "
                f"positive whole numbers joined by 'x'"
            )
        if int(parts[4]) < 2:
            raise ValueError(f"shape = {text!r}: head_dim must be at least 2, of which rotary turns half")
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
        op: str,
        dtype: torch.dtype,
        head_dim: int | None,
        size: str,
        make: Callable[[], Any],
        flops: float,
        **options: Any,
    ) -> None:
        for work in ("training", "forward"):
            cell = Cell(op, of.kind, dtype, head_dim, size, work)
            seldom = work == "training" and size == "few"
            if (size, work) in calls(op) and not seldom and all(other.cell != cell for other in found):
                found.append(Work(cell, {"dtype": dtype, **options}, flops * (3 if work == "training" else 1), make))

    def attention(dtype: torch.dtype, queries: int, keys: int) -> tuple[Callable[..., Any], list[Tensor]]:
        sizes = [(batch, queries, query_heads), (batch, keys, groups), (batch, keys, groups)]
        return flash_attention, [random(*size, shape.head_dim).to(dtype) for size in sizes]

    def block(dtype: torch.dtype, queries: int, keys: int) -> tuple[Callable[..., Any], list[Tensor]]:
        width, hidden = shape.heads * shape.head_dim, shape.hidden
        rows = width + 2 * kv_heads * shape.head_dim + shape.inner
        sizes = [
            (batch, queries, hidden),
            (hidden,),
            (hidden,),
            (rows, hidden),
            (rows,),
            (hidden, width + shape.inner),
            (hidden,),
        ]
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

    def loss(dtype: torch.dtype, rows: int) -> tuple[Callable[..., Any], list[Tensor]]:
        targets = torch.randint(shape.columns, (rows,), device=device)
        sizes = [(rows, shape.hidden), (shape.columns, shape.hidden), (shape.columns,)]
        tensors = [random(*size).to(dtype) for size in sizes]

        def run(hidden: Tensor, weight: Tensor, bias: Tensor, *, backend: str) -> Tensor:
            return linear_cross_entropy(hidden, weight, bias, targets, backend=backend)

        return run, tensors

    def norm(dtype: torch.dtype, rows: int) -> tuple[Callable[..., Any], list[Tensor]]:
        return layer_norm, [
            random(*size).to(dtype) for size in ((rows, shape.hidden), (shape.hidden,), (shape.hidden,))
        ]

    def rotary(dtype: torch.dtype, tokens: int) -> tuple[Callable[..., Any], list[Tensor]]:
        cos, sin = reference.rotary_table(tokens, rotary_dim, device=device)
        q, k = (random(1, tokens, heads, shape.head_dim).to(dtype) for heads in (shape.heads, kv_heads))

        def run(q: Tensor, k: Tensor, *, backend: str) -> tuple[Tensor, Tensor]:
            return apply_rotary(q, k, cos, sin, backend=backend)

        return run, [q, k]

    def product(dtype: torch.dtype, rows: int, columns: int) -> tuple[Callable[..., Any], list[Tensor]]:
        weight = columns * shape.hidden * dtype.itemsize
        number = max(1, min(_MOST_WEIGHTS, _WEIGHTS // weight))

        def run(x: Tensor, *weights: Tensor, backend: str) -> tuple[Tensor, ...]:
            multiply = registry.implementation("product", backend).forward
            return tuple(multiply(x, weight) for weight in weights)

        return run, [random(rows, shape.hidden).to(dtype)] + [
            random(columns, shape.hidden).to(dtype) for _ in range(number)
        ]

    sizes = [(long, long), (_FEW, long), (min(_SHORT, long), min(_SHORT, long))]
    block_options = {"hidden": shape.hidden, "inner": shape.inner, "rotary_dim": rotary_dim}
    for dtype in dtypes:
        for queries, keys in sizes:
            size = size_class(queries, keys)
            scores = 4.0 * batch * queries * keys * shape.head_dim
            products = 2.0 * batch * queries * shape.hidden * (5 * shape.heads * shape.head_dim + 2 * shape.inner)
            make = partial(attention, dtype, queries, keys)
            add("flash_attention", dtype, shape.head_dim, size, make, scores * query_heads)
            whole, make = products + scores * shape.heads, partial(block, dtype, queries, keys)
            add("parallel_block", dtype, shape.head_dim, size, make, whole, **block_options)
        rows = _LOSS_ROWS[of.device]
        logits = 2.0 * rows * shape.hidden * shape.columns
        make = partial(loss, dtype, rows)
        add("linear_cross_entropy", dtype, None, size_class(rows), make, logits, columns=shape.columns)
        for rows in (batch * long, _FEW, min(_SHORT, long)):
            size = size_class(rows)
            add("layer_norm", dtype, None, size, partial(norm, dtype, rows), 10.0 * rows * shape.hidden)
            add("apply_rotary", dtype, None, size, partial(rotary, dtype, rows), 6.0 * rows * shape.hidden)
        into = (shape.heads + 2 * kv_heads) * shape.head_dim + shape.inner
        for rows, columns in itertools.product(_PRODUCT_ROWS if of.device == "cpu" else (), (into, shape.columns)):
            each = rows * shape.hidden * columns
            make = partial(product, dtype, rows, columns)
            add("product", dtype, None, product_class(rows, each), make, 2.0 * each * _MOST_WEIGHTS)
    return sorted(found, key=lambda work: work.flops)


def candidates(of: Machine, work: Work) -> list[str]:
    """The versions of the work's op that can serve it on the machine, all but `reference`."""
    options = {**work.options, **({} if work.cell.head_dim is None else {"head_dim": work.cell.head_dim})}
    found = [v for v in registry.versions() if v != "reference" and registry.serves(work.cell.op, v, of, options)]
    if work.cell.dtype != torch.bfloat16:  # where these run the code of avx512, once is enough
        found = [v for v in found if v not in ("cpu/avx512_bf16", "cpu/amx_bf16") or "cpu/avx512" not in found]
    # Without vector instructions everything is slower by far than PyTorch's ops: it would use up the time.
    return [v for v in found if v != "cpu/portable"] if len(found) > 2 else found


def timer(
    work: Work, version: str, device: torch.device, op: Callable[..., Any], inputs: list[Tensor]
) -> Callable[[], float]:
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


def failure(error: Exception) -> str:
    """An error in one line."""
    return f"{type(error).__name__}: {(str(error).strip() or 'no message').splitlines()[0][:200]}"
