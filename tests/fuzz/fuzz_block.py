"""The fuzzer of the parallel block."""

import dataclasses
from typing import Any

import error_rule
import torch
from drawn import dtypes, is_cpu, normal, runs, seeds, thread_pairs, unchanged
from hypothesis import strategies as st
from memory import laid_out, layouts
from torch import Tensor

from kernels import BlockShape, parallel_block, reference


@dataclasses.dataclass(frozen=True)
class BlockCall:
    dtype: torch.dtype
    batch: int
    seq: int
    heads: tuple[int, int]
    head_dim: int
    hidden: int
    inner: int
    half: int
    documents: bool
    positions: str
    dropout: tuple[float, float]
    dropout_seed: int
    cached: int
    """Tokens that an earlier call has left in a cache; -1: no cache."""
    exponent: int
    layouts: tuple[str, ...]
    seed: int
    threads: tuple[int, int]


@st.composite
def block_calls(draw: st.DrawFn, backend: str) -> BlockCall:
    slow = not is_cpu(backend)
    dtype = draw(dtypes("bfloat16", "float16") if backend == "cuda" else dtypes())
    kv_heads = draw(st.integers(1, 2))
    cached = draw(st.sampled_from((-1, -1, -1, 0, 1, 9)))
    documents = cached < 0 and draw(st.booleans())
    return BlockCall(
        dtype=dtype,
        batch=draw(st.integers(1, 2)),
        seq=draw(st.sampled_from((1, 2, 7, 17, 33) if slow else (1, 2, 7, 16, 17, 33, 50, 65))),
        heads=(kv_heads * draw(st.integers(1, 2)), kv_heads),
        head_dim=draw(st.sampled_from((32, 64))),
        hidden=draw(st.sampled_from((48, 16, 64))),
        inner=draw(st.sampled_from((32, 80))),
        half=draw(st.sampled_from((8, 16))),
        documents=documents,
        positions=draw(st.sampled_from(("none", "seq", "batch"))),
        dropout=(0.0, 0.0) if cached >= 0 else (draw(st.sampled_from((0.0, 0.1))), draw(st.sampled_from((0.0, 0.2)))),
        dropout_seed=draw(seeds),
        cached=cached,
        exponent=draw(st.sampled_from((0, 3, -5))),
        # W_in or W_out with equal rows makes what comes back through it a sum of terms that cancel: what is left is the
        # terms' rounding, which no other order of steps bounds. tests/kernels/test_strides.py compares such ones with
        # dense ones.
        layouts=tuple(draw(layouts.filter(lambda x: x != "expanded") if i in (3, 5) else layouts) for i in range(8)),
        seed=draw(st.integers(0, 2**31)),
        threads=draw(thread_pairs),
    )


def check_block(backend: str, c: BlockCall) -> None:
    heads, kv_heads = c.heads
    width = (heads + 2 * kv_heads) * c.head_dim + c.inner
    shapes = (
        (c.batch, c.seq, c.hidden),
        (c.hidden,),
        (c.hidden,),
        (width, c.hidden),
        (width,),
        (c.hidden, heads * c.head_dim + c.inner),
        (c.hidden,),
        (c.batch, c.seq, c.hidden),
    )
    exponents = (c.exponent, 0, -3, -3, -3, -3, -3, 0)
    *inputs, grad = (
        laid_out(normal(c.seed + i, c.dtype, *shape, exponent=e), layout if len(shape) > 1 else "contiguous")
        for i, (shape, e, layout) in enumerate(zip(shapes, exponents, c.layouts, strict=True))
    )
    generator = torch.Generator().manual_seed(c.seed)
    rows = 80
    cos, sin = reference.rotary_table(rows, 2 * c.half)
    block_shape = BlockShape(heads, kv_heads, c.head_dim, attention_dropout=c.dropout[0], residual_dropout=c.dropout[1])
    options: dict[str, Any] = {"shape": block_shape, "dropout_seed": c.dropout_seed}
    if c.positions != "none" or c.cached > 0:
        shape = (c.batch, c.seq) if c.positions == "batch" else (c.seq,)
        options["positions"] = torch.randint(0, rows, shape, generator=generator)
    if c.documents:
        tokens = c.batch * c.seq
        cuts = torch.randint(0, tokens + 1, (2,), generator=generator).sort().values
        options["cu_seqlens"] = torch.tensor([0, *cuts.tolist(), tokens], dtype=torch.int32)
    if c.cached >= 0:
        room = (c.batch, c.cached + c.seq + 3, kv_heads, c.head_dim)
        cache = [normal(c.seed + 20 + i, c.dtype, *room) for i in range(2)]

    def run(backend: str, dtype: torch.dtype) -> dict[str, Tensor]:
        leaves = [x.detach().to(dtype).requires_grad_() for x in inputs]
        if c.cached >= 0:
            keys, values = (x.clone().to(dtype) for x in cache)
            with torch.no_grad():
                y = parallel_block(*leaves, cos, sin, kv_cache=(keys, values, c.cached), backend=backend, **options)
            return {"y": y, "keys": keys, "values": values}
        y = parallel_block(*leaves, cos, sin, backend=backend, **options)
        grads = torch.autograd.grad(y, leaves, grad.to(dtype))
        names = ("y", "dx", "dnorm_weight", "dnorm_bias", "dw_in", "db_in", "dw_out", "db_out")
        return dict(zip(names, (y.detach(), *grads), strict=True))

    # "The same maths in the inputs' type" is PyTorch's own ops one after the other, which round each step as the
    # backends do, or the reference, which rounds less: where terms cancel the first was 4 to 90 times as far off as the
    # second, and ours with it. Three times, not two: a product is rounded before its bias is added. (PyTorch's
    # attention cannot draw our dropout's mask.)
    baselines = ("reference",) if c.dropout[0] else ("reference", "torch")
    truth, lows = run("reference", torch.float64), [run(name, c.dtype) for name in baselines]
    with unchanged(*inputs, grad):
        found = runs(backend, c.threads, lambda name: run(name, c.dtype), products=True)
    for name, expected in truth.items():
        assert found[name].shape == expected.shape and found[name].dtype == c.dtype, name
        error = error_rule.error(found[name], expected)
        allowed = max(error_rule.bound(low[name], expected, c.dtype, times=3.0) for low in lows)
        assert error <= allowed, f"{name}, {c.dtype}: error {error:.3g}, allowed {allowed:.3g}"
