"""The attention calls that every backend must serve, and the rule by which a result is judged.

The rule (FlashAttention's own tests): for out, lse, dq, dk and dv, the greatest error against the reference in
float64 is at most twice that of the same formula in PyTorch eager in the inputs' dtype, plus twice the greatest
|(ref + 0.3 - 0.3) - ref| in that dtype, the rounding of a sum of numbers of order one. What
float32 sums cannot know is allowed in addition. A backward that starts from a float32 lse knows P = exp(s - lse) to no
better than epsilon * |lse|, and the terms P (dO V^T - delta) of dq and dk cancel (to zero where a query sees one key,
which leaves the rule no room at all): the gradients get epsilon * max(1, |lse|) times the greatest sum of their terms'
absolute values, lse gets epsilon times the greatest scale |q| |k|.
"""

import dataclasses
import functools
from typing import Any

import torch
from error_rule import record
from torch import Tensor

from kernels import flash_attention, reference


@dataclasses.dataclass(frozen=True)
class Case:
    """One call. Lengths and heads are kept small: the reference makes the whole matrix."""

    name: str
    batch: int = 2
    seqlen_q: int = 64
    seqlen_k: int = 64
    heads: int = 2
    kv_heads: int = 2
    head_dim: int = 64
    causal: bool = True
    dropout_p: float = 0.0
    documents: tuple[tuple[int, int], ...] = ()
    """(queries, keys) of each packed document; seqlen_q and seqlen_k are their sums."""
    strided: str = ""
    """"packed": slices of wider tensors, 16-byte aligned; "misaligned": the same, one element further on;
    "transposed": the last dim is not contiguous."""
    scale: float | None = None
    magnitude: float = 1.0
    """Standard deviation of q: at 10, most probabilities are 0 or 1 and sums without a running maximum overflow."""
    seed_in_memory: bool = False
    """The seed of dropout is in a tensor."""


CASES = [
    Case("one", batch=1, seqlen_q=1, seqlen_k=1, heads=1, kv_heads=1),
    Case("one_full_32", seqlen_q=1, seqlen_k=1, head_dim=32, causal=False),
    Case("decode", seqlen_q=1, seqlen_k=301, heads=4, kv_heads=2),
    Case("decode_three", batch=3, seqlen_q=3, seqlen_k=77, heads=3, kv_heads=1, head_dim=128),
    Case("decode_four_32", batch=5, seqlen_q=4, seqlen_k=19, heads=6, kv_heads=2, head_dim=32, strided="packed"),
    Case("few", batch=2, seqlen_q=8, seqlen_k=301, heads=6, kv_heads=2),
    Case("few_full", seqlen_q=2, seqlen_k=45, causal=False, strided="misaligned"),
    Case("few_blind", batch=9, seqlen_q=4, seqlen_k=3, heads=4, kv_heads=4),
    Case("239x1", seqlen_q=239, seqlen_k=1),
    Case("239x1_full", batch=1, seqlen_q=239, seqlen_k=1, causal=False),
    Case("799x3", batch=1, seqlen_q=799, seqlen_k=3),
    Case("113x203", seqlen_q=113, seqlen_k=203),
    Case("113x203_full_128", batch=1, seqlen_q=113, seqlen_k=203, head_dim=128, causal=False),
    Case("203x113_32", batch=1, seqlen_q=203, seqlen_k=113, head_dim=32),
    Case("128x128_128", batch=1, seqlen_q=128, seqlen_k=128, head_dim=128),
    Case("64x256", batch=1, seqlen_q=64, seqlen_k=256, heads=1, kv_heads=1),
    Case("1023x1024", batch=1, seqlen_q=1023, seqlen_k=1024, heads=1, kv_heads=1),
    Case("gqa", seqlen_q=257, seqlen_k=257, heads=4, kv_heads=1),
    Case("gqa_full_32", seqlen_q=129, seqlen_k=131, heads=6, kv_heads=2, head_dim=32, causal=False),
    Case("batch_9_heads_6", batch=9, seqlen_q=37, seqlen_k=37, heads=6, kv_heads=6, head_dim=32),
    Case("dropout", batch=2, seqlen_q=137, seqlen_k=137, heads=3, kv_heads=3, dropout_p=0.1),
    Case("dropout_full_128", seqlen_q=65, seqlen_k=99, head_dim=128, causal=False, dropout_p=0.5),
    Case("dropout_gqa_32", seqlen_q=70, seqlen_k=150, heads=4, kv_heads=2, head_dim=32, dropout_p=0.25),
    Case("dropout_tall", batch=1, seqlen_q=150, seqlen_k=70, dropout_p=0.1, seed_in_memory=True),
    Case("documents", batch=1, heads=2, documents=((1, 1), (64, 64), (0, 0), (97, 97), (3, 3))),
    Case("documents_unequal", batch=1, heads=4, kv_heads=2, documents=((5, 130), (70, 64), (4, 0), (0, 9), (1, 33))),
    Case(
        "documents_full_dropout",
        batch=1,
        heads=2,
        kv_heads=1,
        documents=((33, 33), (140, 20), (2, 66)),
        causal=False,
        dropout_p=0.2,
    ),
    Case(
        "documents_dropout_packed",
        batch=1,
        heads=3,
        kv_heads=3,
        documents=((90, 90), (31, 31), (67, 67)),
        head_dim=32,
        dropout_p=0.1,
        strided="packed",
    ),
    Case(
        "documents_cache",
        batch=1,
        heads=4,
        kv_heads=2,
        documents=((1, 40), (0, 24), (3, 17), (0, 47), (20, 30), (0, 34)),
    ),
    Case("packed", seqlen_q=100, seqlen_k=100, heads=4, kv_heads=2, strided="packed"),
    Case("packed_128", batch=1, seqlen_q=66, seqlen_k=66, head_dim=128, causal=False, strided="packed"),
    Case("misaligned", seqlen_q=50, seqlen_k=83, strided="misaligned"),
    Case("transposed", seqlen_q=83, seqlen_k=50, strided="transposed"),
    Case("scale", batch=1, seqlen_q=90, seqlen_k=90, scale=0.3),
    Case("peaked", batch=1, seqlen_q=150, seqlen_k=150, magnitude=10.0),
    Case("peaked_full_dropout", batch=1, seqlen_q=64, seqlen_k=200, causal=False, dropout_p=0.1, magnitude=10.0),
]

SEED = 0x5EED_0123_4567
"""Wider than 32 bits: both words of the Philox key count."""

OUTPUTS = ("out", "lse", "dq", "dk", "dv")


def _tensor(case: Case, seq: int, heads: int, dtype: torch.dtype, device: str, generator: torch.Generator) -> Tensor:
    """(batch, seq, heads, head_dim) standard normal numbers in the case's layout."""
    value = torch.randn(case.batch, seq, heads, case.head_dim, generator=generator).to(dtype).to(device)
    if case.strided == "transposed":
        return value.transpose(1, 3).contiguous().transpose(1, 3)
    if case.strided:
        at = 8 if case.strided == "packed" else 9
        wide = torch.full((case.batch, seq, heads + 1, case.head_dim + 24), float("nan"), dtype=dtype, device=device)
        view = wide[:, :, 1:, at : at + case.head_dim]
        return view.copy_(value)
    return value


def make_inputs(
    case: Case, dtype: torch.dtype, device: str = "cpu"
) -> tuple[Tensor, Tensor, Tensor, Tensor, dict[str, Any]]:
    """q, k, v, grad_out and the keyword arguments of `flash_attention`; the same numbers on every device."""
    generator = torch.Generator().manual_seed(1234)
    m, n = case.seqlen_q, case.seqlen_k
    options: dict[str, Any] = {"causal": case.causal, "scale": case.scale}
    options |= {"dropout_p": case.dropout_p}
    options["dropout_seed"] = torch.tensor(SEED, device=device) if case.seed_in_memory else SEED
    if case.documents:
        ends = torch.tensor([(0, 0), *case.documents], dtype=torch.int32).cumsum(0, dtype=torch.int32)
        m, n = int(ends[-1, 0]), int(ends[-1, 1])
        options |= {"cu_seqlens_q": ends[:, 0].to(device), "cu_seqlens_k": ends[:, 1].to(device)}
    q = _tensor(case, m, case.heads, dtype, device, generator).mul_(case.magnitude)
    k = _tensor(case, n, case.kv_heads, dtype, device, generator)
    v = _tensor(case, n, case.kv_heads, dtype, device, generator)
    grad_out = _tensor(case, m, case.heads, dtype, device, generator)
    return q, k, v, grad_out, options


def run_forward(case: Case, dtype: torch.dtype, backend: str, device: str = "cpu") -> dict[str, Tensor]:
    """out and lse of `backend`."""
    q, k, v, _, options = make_inputs(case, dtype, device)
    out, lse = flash_attention(q, k, v, **options, return_lse=True, backend=backend)
    return {"out": out, "lse": lse}


def run_case(case: Case, dtype: torch.dtype, backend: str, device: str = "cpu", lse: bool = True) -> dict[str, Tensor]:
    """out, lse, dq, dk, dv of `backend`. lse=False: for a backend that does not return it."""
    q, k, v, grad_out, options = make_inputs(case, dtype, device)
    q, k, v = (x.requires_grad_() for x in (q, k, v))
    result = flash_attention(q, k, v, **options, return_lse=lse, backend=backend)
    out, *rest = result if lse else (result,)  # type: ignore[misc]
    grads = torch.autograd.grad(out, (q, k, v), grad_out)
    return dict(zip(OUTPUTS if lse else ("out", "dq", "dk", "dv"), (out.detach(), *rest, *grads), strict=True))


def _eager(case: Case, dtype: torch.dtype) -> dict[str, Tensor]:
    """The same formula in plain PyTorch, every intermediate in `dtype`, gradients by autograd."""
    q, k, v, grad_out, options = make_inputs(case, dtype)
    q, k, v = (x.requires_grad_() for x in (q, k, v))
    scale = case.head_dim**-0.5 if case.scale is None else case.scale
    group = case.heads // case.kv_heads
    parts, lses = [], []
    cu_q, cu_k = options.get("cu_seqlens_q"), options.get("cu_seqlens_k")
    for b, i, j, first in reference._documents(cu_q, cu_k, q, k):
        qs, ks, vs = (x.transpose(1, 2) for x in (q[b, i], k[b, j], v[b, j]))
        ks, vs = (x.repeat_interleave(group, dim=1) for x in (ks, vs))
        scores = (qs * scale) @ ks.transpose(-1, -2)
        m, n = scores.shape[-2:]
        hidden = torch.zeros(m, n, dtype=torch.bool)
        if case.causal:
            hidden = ~torch.ones(m, n, dtype=torch.bool).tril(n - m)
        blind = hidden.all(-1, keepdim=True)
        scores = scores.masked_fill(hidden, float("-inf"))
        p = torch.softmax(scores.masked_fill(blind, 0.0), dim=-1).masked_fill(blind, 0.0)
        if case.dropout_p > 0:
            p = p * reference._attention_keep(p, case.dropout_p, SEED, first)
            p = p * reference.dropout_scale(case.dropout_p)
        parts.append((p @ vs).transpose(1, 2))
        lses.append(torch.logsumexp(scores.detach(), dim=-1))
    out = torch.cat(parts, dim=1)
    grads = torch.autograd.grad(out, (q, k, v), grad_out)
    return dict(zip(OUTPUTS, (out.detach(), torch.cat(lses, dim=-1), *grads), strict=True))


def _error(x: Tensor, truth: Tensor) -> float:
    """Greatest |x - truth|; infinite where only one of them is, or where x is NaN."""
    difference = torch.where(x.double() == truth, 0.0, (x.double() - truth).abs())
    return float(difference.nan_to_num(nan=float("inf"), posinf=float("inf")).max()) if x.numel() else 0.0


def _sums_of_absolute_terms(
    q: Tensor, k: Tensor, v: Tensor, grad_out: Tensor, lse: Tensor, arguments: tuple[Any, ...]
) -> dict[str, float]:
    """Greatest scale P (|dO| |V|^T) |K| for dq, its like for dk, dv and lse, before any cancellation or dropout."""
    heads = q.shape[2]
    cu_q, cu_k, causal, scale, *_ = arguments
    dq = dk = dv = score = 0.0
    for b, i, j, _first in reference._documents(cu_q, cu_k, q, k):
        qs, ks, vs, do = (reference._heads_first(x, heads) for x in (q[b, i], k[b, j], v[b, j], grad_out[b, i]))
        if not qs.numel() or not ks.numel():
            continue
        p, _ = reference._probabilities(qs, ks, lse[b, :, i], causal, scale)
        ds = scale * p * (do.abs() @ vs.abs().transpose(-1, -2))
        dq = max(dq, float((ds @ ks.abs()).max()))
        dk = max(dk, float((ds.transpose(-1, -2) @ qs.abs()).max()))
        dv = max(dv, float((p.transpose(-1, -2) @ do.abs()).max()))
        score = max(score, abs(scale) * float((qs.abs() @ ks.abs().transpose(-1, -2)).max()))
    known = max(1.0, float(lse[lse.isfinite()].abs().max()))
    return {"lse": score, "dq": known * dq, "dk": known * dk, "dv": known * dv}


@functools.cache
def truth_and_bounds(case: Case, dtype: torch.dtype) -> tuple[dict[str, Tensor], dict[str, float]]:
    """The reference's results in float64, on the CPU, and the greatest error that the rule lets each of them have."""
    q, k, v, grad_out, options = make_inputs(case, dtype)
    scale = case.head_dim**-0.5 if case.scale is None else case.scale
    cu = (options.get("cu_seqlens_q"), options.get("cu_seqlens_k"))
    arguments = (*cu, case.causal, scale, case.dropout_p, SEED)
    q, k, v, grad_out = (x.double() for x in (q, k, v, grad_out))
    out, lse = reference.attention_forward(q, k, v, *arguments)
    grads = reference.attention_backward(grad_out, q, k, v, out, lse, *arguments)
    truth = dict(zip(OUTPUTS, (out, lse, *grads), strict=True))
    terms = _sums_of_absolute_terms(q, k, v, grad_out, lse, arguments)
    bounds = {}
    for name, low in _eager(case, dtype).items():
        finite = truth[name].masked_fill(truth[name].isinf(), 0.0).to(dtype)
        rounding = float((finite + 0.3 - 0.3 - finite).abs().max()) if finite.numel() else 0.0
        bounds[name] = 2 * _error(low, truth[name]) + 2 * rounding
        bounds[name] += torch.finfo(torch.float32).eps * terms.get(name, 0.0)
    return truth, bounds


def check_results(results: dict[str, Tensor], case: Case, dtype: torch.dtype) -> None:
    """Applies the rule to what `run_case` returned."""
    truth, bounds = truth_and_bounds(case, dtype)
    for name, value in results.items():
        assert value.shape == truth[name].shape, f"{name}: {tuple(value.shape)}, not {tuple(truth[name].shape)}"
        expected = torch.float32 if name == "lse" and dtype != torch.float64 else dtype
        assert value.dtype == expected, f"{name}: {value.dtype}, not {expected}"
        error = _error(value.cpu(), truth[name])
        record(f"{case.name}: {name}", dtype, error, bounds[name])
        assert error <= bounds[name], (
            f"{case.name}, {dtype}: error of {name} is {error:.3g}, allowed {bounds[name]:.3g}"
        )


def check_case(case: Case, dtype: torch.dtype, backend: str, device: str = "cpu", lse: bool = True) -> None:
    """Runs `case` on `backend` and applies the rule to out, lse, dq, dk and dv."""
    check_results(run_case(case, dtype, backend, device, lse), case, dtype)
