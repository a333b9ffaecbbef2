"""A fuzzer for each op: what it draws, and what must hold of a call. Run by test_fuzz.py and, without an end, `make
fuzz`.

Every call is made with inputs in drawn layouts inside NaN, with fresh memory poisoned and guarded (memory.py), and each
element of each result is held to a bound that follows from the arithmetic (bounds.py). On the CPU the same call with
another number of threads must give the same bits.
"""

import dataclasses
import math
from collections.abc import Callable
from typing import Any

import bounds
import torch
from drawn import dtypes, is_cpu, normal, runs, seeds, thread_pairs, unchanged
from fuzz_block import block_calls, check_block
from hypothesis import strategies as st
from memory import laid_out, layouts
from torch import Tensor

from kernels import apply_rotary, flash_attention, layer_norm, linear_cross_entropy, reference

CPU_LENGTHS = (
    1,
    2,
    3,
    5,
    7,
    8,
    9,
    15,
    16,
    17,
    23,
    24,
    25,
    31,
    32,
    33,
    47,
    48,
    49,
    63,
    64,
    65,
    95,
    96,
    97,
    127,
    128,
    129,
    191,
    193,
    255,
    257,
)
SLOW_LENGTHS = (1, 2, 5, 16, 17, 31, 33, 63, 65)
"""Of backends that are emulated or interpreted."""


# ---------------------------------------------------------------------------------------------------- attention


@dataclasses.dataclass(frozen=True)
class AttentionCall:
    dtype: torch.dtype
    head_dim: int
    batch: int
    lengths: tuple[tuple[int, int], ...]
    """(queries, keys), of each document where there are several or `packed`."""
    packed: bool
    kv_heads: int
    group: int
    causal: bool
    scale: float
    exponents: tuple[int, int, int, int]
    """Of q, k, v and the gradient of out."""
    dropout_p: float
    dropout_seed: int
    layouts: tuple[str, str, str, str]
    out_layout: str
    special: str
    seed: int
    threads: tuple[int, int]
    cache: int
    """Room behind keys and values, as a cache has."""


@st.composite
def attention_calls(draw: st.DrawFn, backend: str, few: bool) -> AttentionCall:
    dtype = draw(dtypes("bfloat16", "float16") if backend == "cuda" else dtypes())
    lengths = st.sampled_from(CPU_LENGTHS if is_cpu(backend) else SLOW_LENGTHS)
    queries = st.integers(1, 16) if few else lengths
    packed = not few and draw(st.booleans())
    if packed:
        pairs = tuple(draw(st.lists(st.tuples(st.just(0) | lengths, st.just(0) | lengths), min_size=1, max_size=4)))
        if not all(sum(column) for column in zip(*pairs, strict=True)):
            pairs += ((1, 1),)
    else:
        keys = st.integers(1, 700 if is_cpu(backend) else 80) if few else lengths
        length = draw(queries)
        pairs = ((length, draw(st.just(length) | keys)),)
    half = dtype == torch.float16
    sizes = st.sampled_from((0, 0, -3, 3, 12) if half else (0, 0, -3, 3, 12, 14, 25, 40, -30))
    # Where dS is rounded to fp16 it must be in its range.
    values = st.sampled_from((0, -3) if half and not is_cpu(backend) else (0, -3, 5) if half else (0, -3, 5, 40))
    special = draw(st.sampled_from(("", "", "nan", "" if half else "minus_inf")))
    return AttentionCall(
        dtype=dtype,
        head_dim=draw(st.sampled_from((64, 32, 128))),
        batch=1 if packed else draw(st.integers(1, 3 if is_cpu(backend) else 1)),
        lengths=pairs,
        packed=packed,
        kv_heads=draw(st.integers(1, 3 if is_cpu(backend) else 2)),
        group=draw(st.integers(1, 3)),
        causal=draw(st.booleans()),
        scale=draw(st.sampled_from((0.125, 0.3, 1.0, 1e-3, -0.2, 0.0))),
        exponents=(draw(sizes), draw(sizes), draw(values), draw(st.sampled_from((0, -4, 3)))),
        dropout_p=0.0 if special or few else draw(st.sampled_from((0.0, 0.1, 0.5, 0.999))),
        dropout_seed=draw(seeds),
        layouts=tuple(draw(layouts) for _ in range(4)),
        out_layout=draw(st.sampled_from(("none", "contiguous", "sliced", "odd", "transposed", "every_other"))),
        special=special,
        seed=draw(st.integers(0, 2**31)),
        threads=draw(thread_pairs),
        cache=draw(st.sampled_from((0, 1, 33))) if few else 0,
    )


def _wide(x: Tensor, room: int) -> Tensor:
    """x as the first rows of a cache with `room` more, which hold NaN."""
    if room == 0:
        return x
    cache = torch.full((x.shape[0], x.shape[1] + room, *x.shape[2:]), math.nan, dtype=x.dtype)
    cache[:, : x.shape[1]] = x
    return cache[:, : x.shape[1]]


def check_attention(backend: str, c: AttentionCall) -> None:
    m, n = (sum(column) for column in zip(*c.lengths, strict=True))
    heads = c.kv_heads * c.group
    shapes = ((c.batch, m, heads), (c.batch, n, c.kv_heads), (c.batch, n, c.kv_heads), (c.batch, m, heads))
    tensors = [
        laid_out(normal(c.seed + i, c.dtype, *shape, c.head_dim, exponent=exponent), layout)
        for i, (shape, exponent, layout) in enumerate(zip(shapes, c.exponents, c.layouts, strict=True))
    ]
    q, k, v, grad = tensors
    cu: list[Tensor | None] = [None, None]
    if c.packed:
        cu = [
            torch.tensor([0, *column], dtype=torch.int32).cumsum(0, dtype=torch.int32)
            for column in zip(*c.lengths, strict=True)
        ]
    special_rows = torch.zeros(m, dtype=torch.bool)
    plain_q, plain_grad = q, grad
    if c.special:
        special_rows[c.seed % m :: 7] = True
        q, k = q.clone(), k.clone()
        if c.special == "minus_inf":  # 2^64 times -2^64 is infinite in float32
            q[..., 0], k[..., 0] = 0.0, -(2.0**64)
        # The truth: those rows without a gradient, so that they give none to keys and values.
        plain_q, plain_grad = q.clone(), grad.clone()
        plain_grad[:, special_rows] = 0
        q[:, special_rows, :, 0] = math.nan if c.special == "nan" else 2.0**64
    k, v = _wide(k, c.cache), _wide(v, c.cache)
    arguments = (*cu, c.causal, c.scale, c.dropout_p, c.dropout_seed)
    truth, limits = bounds.attention(plain_q, k, v, plain_grad, *arguments)
    blind = truth["lse"] == -math.inf
    if c.special:  # what rows that see a key give
        signed = -math.inf if c.scale > 0 else math.inf
        special = (
            {"out": 0.0 if c.scale > 0 else math.nan, "lse": signed}
            if c.special == "minus_inf"
            else {"out": math.nan, "lse": math.nan}
        )
        special["dq"] = special["out"]
        sees = (special_rows & ~blind).transpose(1, 2)  # (batch, queries, heads)
        for name, value in special.items():
            truth[name][(sees if name != "lse" else sees.transpose(1, 2))] = value
    if (c.special == "nan" or (c.special == "minus_inf" and c.scale <= 0)) and bool(special_rows.any()):
        del truth["dk"], truth["dv"]  # every key that such a row sees
    if c.special == "minus_inf" and c.scale == 0:
        return  # 0 times infinity: no contract

    def run(name: str) -> dict[str, Tensor]:
        leaves = [x.detach().requires_grad_() for x in (q, k, v)]
        options: dict[str, Any] = {
            "causal": c.causal,
            "scale": c.scale,
            "dropout_p": c.dropout_p,
            "dropout_seed": c.dropout_seed,
            "cu_seqlens_q": cu[0],
            "cu_seqlens_k": cu[1],
            "backend": name,
        }
        out, lse = flash_attention(*leaves, **options, return_lse=True)
        grads = torch.autograd.grad(out, leaves, grad)
        if c.out_layout != "none":
            buffer = laid_out(torch.full(q.shape, math.nan, dtype=q.dtype), c.out_layout)
            around = buffer._base.clone() if buffer._base is not None else None
            with torch.no_grad():
                flash_attention(q, k, v, **options, out=buffer)
            assert torch.equal(buffer.nan_to_num(nan=0.5), out.nan_to_num(nan=0.5)), "out= is not what is returned"
            if around is not None and buffer._base is not None:
                buffer.fill_(math.nan)
                assert buffer._base.isnan().equal(around.isnan()), "written beside out"
        return {"out": out.detach(), "lse": lse, "dq": grads[0], "dk": grads[1], "dv": grads[2]}

    with unchanged(q, k, v, grad):
        found = runs(backend, c.threads, run)
    bounds.check(found, truth, limits)


# ------------------------------------------------------------------------------------------------------ rotary


@dataclasses.dataclass(frozen=True)
class RotaryCall:
    dtype: torch.dtype
    batch: int
    seq: int
    heads: tuple[int, int]
    head_dim: int
    half: int
    positions: str
    exponent: int
    layouts: tuple[str, str, str, str]
    seed: int
    threads: tuple[int, int]


@st.composite
def rotary_calls(draw: st.DrawFn, backend: str) -> RotaryCall:
    half = draw(st.sampled_from((16, 8, 1, 5, 32, 20, 3)))
    dtype = draw(dtypes())
    return RotaryCall(
        dtype=dtype,
        batch=draw(st.integers(1, 3)),
        seq=draw(st.integers(1, 40 if is_cpu(backend) else 5)),
        heads=(draw(st.integers(1, 6)), draw(st.integers(1, 6))),
        head_dim=2 * half + draw(st.sampled_from((0, 1, 16, 33))),
        half=half,
        positions=draw(st.sampled_from(("none", "seq", "batch"))),
        exponent=draw(st.sampled_from((0, 10, -12) if dtype == torch.float16 else (0, 100, -100))),
        layouts=tuple(draw(layouts) for _ in range(4)),
        seed=draw(st.integers(0, 2**31)),
        threads=draw(thread_pairs),
    )


def check_rotary(backend: str, c: RotaryCall) -> None:
    q, k, grad_q, grad_k = (
        laid_out(normal(c.seed + i, c.dtype, c.batch, c.seq, c.heads[i % 2], c.head_dim, exponent=c.exponent), layout)
        for i, layout in enumerate(c.layouts)
    )
    cos, sin = reference.rotary_table(c.seq + 7, 2 * c.half)
    generator = torch.Generator().manual_seed(c.seed)
    positions = None
    if c.positions != "none":
        shape = (c.batch, c.seq) if c.positions == "batch" else (c.seq,)
        positions = torch.randint(0, c.seq + 7, shape, generator=generator)
    truth, limits = {}, {}
    for name, x, inverse in (("q", q, False), ("k", k, False), ("dq", grad_q, True), ("dk", grad_k, True)):
        truth[name], limits[name] = bounds.rotary(x, cos, sin, positions, inverse)

    def run(name: str) -> dict[str, Tensor]:
        leaves = [x.detach().requires_grad_() for x in (q, k)]
        turned = apply_rotary(*leaves, cos, sin, positions=positions, backend=name)
        grads = torch.autograd.grad(turned, leaves, (grad_q, grad_k))
        return dict(zip(("q", "k", "dq", "dk"), (*(x.detach() for x in turned), *grads), strict=True))

    with unchanged(q, k, grad_q, grad_k):
        found = runs(backend, c.threads, run)
    bounds.check(found, truth, limits)


# --------------------------------------------------------------------------------------------------- LayerNorm


@dataclasses.dataclass(frozen=True)
class LayerNormCall:
    dtype: torch.dtype
    rows: int
    hidden: int
    offset: float
    """Mean of the rows, in their standard deviations."""
    exponents: tuple[int, int, int, int]
    constant_row: bool
    layouts: tuple[str, str, str, str]
    seed: int
    threads: tuple[int, int]


@st.composite
def layer_norm_calls(draw: st.DrawFn, backend: str) -> LayerNormCall:
    dtype = draw(dtypes())
    half = dtype == torch.float16
    hidden = st.integers(1, 300) | st.sampled_from((512, 1000, 2048))
    if backend == "cuda":
        hidden = st.integers(1, 40).map(lambda n: 8 * n)
    size = st.sampled_from((0, 3, -4, 10) if half else (0, 3, -4, 20, -20))
    return LayerNormCall(
        dtype=dtype,
        rows=draw(st.integers(1, 200 if is_cpu(backend) else 40)),
        hidden=draw(hidden),
        offset=draw(st.sampled_from((0.0, 1.0, -30.0))),
        exponents=(
            draw(st.sampled_from((0, 6, -6) if half else (0, 30, -30, 55))),
            draw(size),
            draw(size),
            draw(st.sampled_from((0, -4, 4))),
        ),
        constant_row=draw(st.booleans()),
        layouts=tuple(draw(layouts) for _ in range(4)),
        seed=draw(st.integers(0, 2**31)),
        threads=draw(thread_pairs),
    )


def check_layer_norm(backend: str, c: LayerNormCall) -> None:
    shapes = ((c.rows, c.hidden), (c.hidden,), (c.hidden,), (c.rows, c.hidden))
    values = [
        normal(c.seed + i, c.dtype, *shape, exponent=e)
        for i, (shape, e) in enumerate(zip(shapes, c.exponents, strict=True))
    ]
    values[0] += c.offset * 2.0 ** c.exponents[0]
    if c.constant_row:
        values[0][0] = values[0][0, 0]
    x, weight, bias, grad = (laid_out(value, layout) for value, layout in zip(values, c.layouts, strict=True))
    truth, limits = bounds.layer_norm(x, weight, bias, grad, 1e-5)

    def run(name: str) -> dict[str, Tensor]:
        leaves = [t.detach().requires_grad_() for t in (x, weight, bias)]
        y = layer_norm(*leaves, backend=name)
        grads = torch.autograd.grad(y, leaves, grad)
        return dict(zip(("y", "dx", "dweight", "dbias"), (y.detach(), *grads), strict=True))

    with unchanged(x, weight, bias, grad):
        found = runs(backend, c.threads, run)
    bounds.check(found, truth, limits)


# ----------------------------------------------------------------------------------------------------- the loss


@dataclasses.dataclass(frozen=True)
class LossCall:
    dtype: torch.dtype
    rows: int
    width: int
    columns: int
    exponents: tuple[int, int, int]
    ignored: str
    hidden_columns: str
    """Which columns have a bias of -inf."""
    z_loss: float
    reduction: str
    layouts: tuple[str, str, str]
    seed: int
    threads: tuple[int, int]


@st.composite
def loss_calls(draw: st.DrawFn, backend: str) -> LossCall:
    columns = st.integers(2, 300) | st.sampled_from((1023, 1024, 1025, 2050, 4096, 4100, 5000))
    if backend == "cuda":
        columns = st.integers(1, 130).map(lambda n: 8 * n)
    return LossCall(
        dtype=draw(dtypes()),
        rows=draw(st.integers(1, 70 if is_cpu(backend) else 9)),
        width=draw(st.sampled_from((32, 64, 8, 1, 17, 100))),
        columns=draw(columns),
        exponents=(
            draw(st.sampled_from((0, -3, 2))),
            draw(st.sampled_from((-3, 0, -6))),
            draw(st.sampled_from((0, -3, 3))),
        ),
        ignored=draw(st.sampled_from(("none", "some", "all"))),
        hidden_columns=draw(st.sampled_from(("none", "first_half", "last_half", "most", "some"))),
        z_loss=draw(st.sampled_from((0.0, 1e-4, 0.1))),
        reduction=draw(st.sampled_from(("mean", "sum"))),
        layouts=tuple(draw(layouts) for _ in range(3)),
        seed=draw(st.integers(0, 2**31)),
        threads=draw(thread_pairs),
    )


def check_loss(backend: str, c: LossCall) -> None:
    generator = torch.Generator().manual_seed(c.seed)
    shapes = ((c.rows, c.width), (c.columns, c.width), (c.columns,))
    values = [
        normal(c.seed + i, c.dtype, *shape, exponent=e)
        for i, (shape, e) in enumerate(zip(shapes, c.exponents, strict=True))
    ]
    column = torch.arange(c.columns)
    masks = {
        "none": column < 0,
        "first_half": column < c.columns // 2,
        "last_half": column >= (c.columns + 1) // 2,
        "most": column != c.columns - 1,
        "some": column % 3 == 1,
    }
    hidden_columns = masks[c.hidden_columns]
    layout = c.layouts[2] if c.hidden_columns == "none" or c.layouts[2] != "expanded" else "contiguous"
    values[2][hidden_columns] = -math.inf
    h, w, b = (laid_out(x, where) for x, where in zip(values, (*c.layouts[:2], layout), strict=True))
    seen = column[~hidden_columns]
    targets = seen[torch.randint(0, len(seen), (c.rows,), generator=generator)]
    if c.ignored != "none":
        targets[slice(None) if c.ignored == "all" else slice(0, None, 2)] = -100
    count = max(1, int((targets != -100).sum()))
    share = 1.0 if c.reduction == "sum" else 1.0 / count
    truth, limits = bounds.loss(h, w, b, targets, -100, c.z_loss, share, sums_stored=backend == "triton")

    def run(name: str) -> dict[str, Tensor]:
        leaves = [t.detach().requires_grad_() for t in (h, w, b)]
        value = linear_cross_entropy(*leaves, targets, z_loss=c.z_loss, reduction=c.reduction, backend=name)
        grads = torch.autograd.grad(value, leaves)
        return dict(zip(("loss", "dhidden", "dweight", "dbias"), (value.detach(), *grads), strict=True))

    with unchanged(h, w, b, targets):
        found = runs(backend, c.threads, run, products=True)
    bounds.check(found, truth, limits)


def decode_calls(backend: str) -> st.SearchStrategy[AttentionCall]:
    return attention_calls(backend, True)


FUZZERS: dict[str, tuple[Callable[[str], st.SearchStrategy[Any]], Callable[[str, Any], None]]] = {
    "flash_attention": (lambda backend: attention_calls(backend, False), check_attention),
    "decode": (decode_calls, check_attention),
    "apply_rotary": (rotary_calls, check_rotary),
    "layer_norm": (layer_norm_calls, check_layer_norm),
    "linear_cross_entropy": (loss_calls, check_loss),
    "parallel_block": (block_calls, check_block),
}
"""op -> (what is drawn for a backend, what must hold). A backend is named as for cpu_isa.chosen."""
