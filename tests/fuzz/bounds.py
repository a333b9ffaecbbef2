"""How large an error may be, before anything is run: roundings of float32 arithmetic and of the results' type, carried
through the formulas in float64. One number for each element of each result.

u is float32's unit roundoff, e that of the inputs' type. A sum of n terms in float32, in any order, is off by at most
n u times the sum of the terms' absolute values; products of 16-bit numbers are exact. Every place where a kernel rounds
to 16 bits (probabilities and dS before their products, results) gives e times what is rounded.
"""

import math
from typing import Any

import torch
from torch import Tensor

from kernels import reference

U = 2.0**-24
EXP2 = 2.0**-18
"""Relative error of the least exact exp2, csrc/cpu/vector.h's short form."""

FLUSHED = 2.0**-126
"""A probability below it may be 0."""


def unit_roundoff(dtype: torch.dtype) -> float:
    return torch.finfo(dtype).eps / 2


def least(dtype: torch.dtype) -> float:
    """What may be flushed to zero or lost in a subnormal number, of a result."""
    return torch.finfo(dtype).smallest_normal * (1 if dtype != torch.float16 else torch.finfo(dtype).eps)


def _spread(log_p: Tensor, x: Tensor) -> Tensor:
    """Greatest |P' - P| for P = exp(log_p) <= 1, if log P' is off by at most x and P' <= 1."""
    p = torch.exp(log_p)
    above = torch.exp(torch.clamp(log_p + x, max=0.0)) - p
    return torch.maximum(above, p * -torch.expm1(-x))


def attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    grad: Tensor,
    cu_q: Tensor | None,
    cu_k: Tensor | None,
    causal: bool,
    scale: float,
    dropout_p: float,
    seed: int,
) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """(truth, bounds) of out, lse, dq, dk, dv: `kernels.reference` in float64, and each element's greatest error."""
    dtype, heads, kv_heads = q.dtype, q.shape[2], k.shape[2]
    e = 0.0 if dtype == torch.float32 else unit_roundoff(dtype)  # of operands that are rounded
    # The CPU holds fp16 as float32, the GPU rounds probabilities to it: from 2^-14 on downwards by 2^-25.
    small = 2.0**-25 if dtype == torch.float16 else 0.0
    store = unit_roundoff(dtype)
    arguments = (cu_q, cu_k, causal, scale, dropout_p, seed)
    wide = [x.double() for x in (q, k, v)]
    out, lse = reference.attention_forward(*wide, *arguments)
    grads = reference.attention_backward(grad.double(), *wide, out, lse, *arguments)
    truth = dict(zip(("out", "lse", "dq", "dk", "dv"), (out, lse, *grads), strict=True))
    bounds = {name: torch.zeros_like(x) for name, x in truth.items()}
    for b, i, j, first in reference._documents(cu_q, cu_k, q, k):
        qs, ks, vs, do = (reference._heads_first(x.double(), heads) for x in (q[b, i], k[b, j], v[b, j], grad[b, i]))
        m, n, dim = qs.shape[2], ks.shape[2], qs.shape[3]
        if m == 0:
            continue
        score = scale * (qs @ ks.transpose(-1, -2))
        size = abs(scale) * (qs.abs() @ ks.abs().transpose(-1, -2))
        seen = torch.ones(m, n, dtype=torch.bool)
        if causal:
            seen = seen.tril(n - m)
        score, size = score.masked_fill(~seen, -math.inf), size.masked_fill(~seen, 0.0)
        row = lse[b, :, i][..., None]
        finite = row.masked_fill(row.isinf(), 0.0)
        log_p = score - finite
        # Scores are sums of dim terms, scaled, and what is taken off is rounded once more; the constants too.
        of_score = (2 * dim + 8) * U * size
        of_row = of_score.amax(-1, keepdim=True) if n else torch.zeros_like(row)
        difference = log_p.abs().nan_to_num(posinf=0.0)
        x = of_score + of_row + (4 * difference + n) * U + 2 * EXP2
        forward = _spread(log_p, x) + FLUSHED * seen
        p = torch.exp(log_p)
        # A row's probabilities sum to 1: the greatest is off by no more than what the others can be together.
        top = p.amax(-1, keepdim=True) if n else p
        others = (p + forward).sum(-1, keepdim=True) - top if n else p
        forward = torch.where(p == top, torch.minimum(forward, others + (n + 4) * U + 2 * EXP2), forward)
        keep = torch.ones_like(p)
        if dropout_p > 0:
            keep = reference._attention_keep(p, dropout_p, seed, first).double() * reference.dropout_scale(dropout_p)
        rounded = ((e + (n + 8) * U) * p + small * seen) * keep
        o, of_o = (p * keep) @ vs, (forward * keep + rounded) @ vs.abs()
        of_o = of_o + store * (o.abs() + of_o)
        bounds["out"][b, i] = of_o.transpose(1, 2) + least(dtype)
        of_lse = (of_row + 4 * U * finite.abs() + (n + 4) * U + 2 * EXP2)[..., 0]
        bounds["lse"][b, :, i] = of_lse

        # Backward: P again, from an lse in float32.
        backward = _spread(log_p, of_score + of_lse[..., None] + 8 * U * finite.abs() + 4 * U * difference + 2 * EXP2)
        backward = backward + FLUSHED * seen
        dp, of_dp = do @ vs.transpose(-1, -2), dim * U * (do.abs() @ vs.abs().transpose(-1, -2))
        delta = (do * o).sum(-1, keepdim=True)
        of_delta = (do.abs() * (of_o + dim * U * o.abs())).sum(-1, keepdim=True)
        dp, of_dp = dp * keep, (of_dp + 2 * U * dp.abs()) * keep
        gap = (dp - delta).abs()
        of_ds = backward * (gap + of_dp + of_delta) + p * (of_dp + of_delta + 2 * U * gap)
        ds = (p + backward) * gap
        of_ds = of_ds + (e + (max(m, n) + 8) * U) * (ds + of_ds) + small * seen
        of_dv = (backward * keep + ((e + (m + 8) * U) * (p + backward) + small * seen) * keep).transpose(
            -1, -2
        ) @ do.abs()
        parts = {
            "dq": abs(scale) * (of_ds @ ks.abs()),
            "dk": abs(scale) * (of_ds.transpose(-1, -2) @ qs.abs()),
            "dv": of_dv,
        }
        for name, part in parts.items():
            if name != "dq":  # query heads of a group add up
                part = part.unflatten(1, (kv_heads, -1)).sum(2)
            where = (b, i) if name == "dq" else (b, j)
            part = part.transpose(1, 2)
            bounds[name][where] = part + store * (truth[name][where].abs() + part) + least(dtype)
    return truth, bounds


def check(found: dict[str, Tensor], truth: dict[str, Tensor], bounds: dict[str, Tensor], context: Any = "") -> None:
    """Asserts each element's error; what is not finite in the truth must be the same here."""
    for name, expected in truth.items():
        value, bound = found[name].detach().double(), bounds[name]
        assert value.shape == expected.shape, (name, value.shape, expected.shape)
        same = (value == expected) | (value.isnan() & expected.isnan())
        # Beyond the type's greatest number: infinite, or just below.
        most = torch.finfo(found[name].dtype).max
        same |= (expected.abs() + bound >= most) & (value.abs() >= most * 0.99) & (value.sign() == expected.sign())
        error = torch.where(same, 0.0, (value - expected).abs()).nan_to_num(nan=math.inf)
        excess = error - bound
        if bool((excess > 0).any()):
            at = tuple(int(n) for n in torch.unravel_index(excess.argmax(), excess.shape)) if excess.dim() else ()
            raise AssertionError(
                f"{name}[{at}] = {float(value[at])!r}, should be {float(expected[at])!r} +- {float(bound[at])!r} "
                f"{context}"
            )


# ------------------------------------------------------------------------------------- rotary, LayerNorm, the loss


def rotary(x: Tensor, cos: Tensor, sin: Tensor, positions: Tensor | None, inverse: bool) -> tuple[Tensor, Tensor]:
    """(truth, bound) of a rotated tensor: two products and a sum, rounded."""
    truth = reference.rotate(x.double(), cos, sin, positions, inverse)
    size = reference.rotate(x.double().abs(), cos.abs(), -sin.abs(), positions, False)
    size = torch.maximum(size, reference.rotate(x.double().abs(), cos.abs(), sin.abs(), positions, False)).abs()
    return truth, 4 * U * size + unit_roundoff(x.dtype) * (truth.abs() + 4 * U * size) + least(x.dtype)


def layer_norm(
    x: Tensor, weight: Tensor, bias: Tensor, grad: Tensor, eps: float
) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """(truth, bounds) of y, dx, dweight, dbias for x (rows, hidden)."""
    dtype, (rows, hidden) = x.dtype, x.shape
    store, n = unit_roundoff(dtype), hidden + 8
    x, w, b, g = (t.double() for t in (x, weight, bias, grad))
    mean = x.mean(-1, keepdim=True)
    centred = x - mean
    variance = centred.square().mean(-1, keepdim=True)
    factor = torch.rsqrt(variance + eps)
    normed = centred * factor
    of_mean = n * U * x.abs().mean(-1, keepdim=True)
    of_centred = of_mean + 2 * U * (x.abs() + mean.abs())
    # Of variance + eps, relative: its sum, and the square of a mean that is off.
    of_variance = (
        n * U * variance + (2 * centred.abs() * of_centred + of_centred.square()).mean(-1, keepdim=True)
    ) * factor**2
    of_factor = torch.clamp(of_variance, max=0.5) + 4 * U  # relative, twice what a square root leaves
    of_normed = of_centred * factor * (1 + of_factor) + normed.abs() * of_factor
    y = normed * w + b
    of_y = of_normed * w.abs() + 4 * U * (normed.abs() * w.abs() + b.abs())
    d = g * w
    mean_d, mean_dn = d.mean(-1, keepdim=True), (d * normed).mean(-1, keepdim=True)
    of_mean_d = n * U * d.abs().mean(-1, keepdim=True)
    of_mean_dn = (d.abs() * of_normed).mean(-1, keepdim=True) + n * U * (d * normed).abs().mean(-1, keepdim=True)
    inner = d - mean_d - normed * mean_dn
    size = d.abs() + mean_d.abs() + (normed * mean_dn).abs()
    of_inner = 4 * U * size + of_mean_d + of_normed * mean_dn.abs() + (normed.abs() + of_normed) * of_mean_dn
    of_dx = factor * (of_inner * (1 + of_factor) + inner.abs() * of_factor)
    truth = {"y": y, "dx": factor * inner, "dweight": (g * normed).sum(0), "dbias": g.sum(0)}
    many = (rows + 8) * U
    bounds = {
        "y": of_y,
        "dx": of_dx,
        "dweight": (g.abs() * (of_normed + many * (normed.abs() + of_normed))).sum(0),
        "dbias": many * g.abs().sum(0),
    }
    return truth, {name: bound + store * (truth[name].abs() + bound) + least(dtype) for name, bound in bounds.items()}


def loss(
    hidden: Tensor,
    weight: Tensor,
    bias: Tensor,
    targets: Tensor,
    ignore_index: int,
    z_loss: float,
    share: float,
    sums_stored: bool,
) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """(truth, bounds) of the loss times `share` (1, or one over the rows that count) and its gradients.

    sums_stored: the bias's gradient is the sum of the logits' gradients as rounded to their type, as Triton makes it.
    """
    dtype, (rows, width), columns = hidden.dtype, hidden.shape, weight.shape[0]
    e = unit_roundoff(dtype)
    kept = targets != ignore_index
    h, w, b = (t.detach().double().requires_grad_() for t in (hidden, weight, bias))
    value = reference.linear_cross_entropy(h, w, b, targets, ignore_index, z_loss) * share
    dh, dw, db = torch.autograd.grad(value, (h, w, b))
    with torch.no_grad():
        products = h @ w.T
        logits = products + b
        # A product is rounded to the logits' type before the bias is added.
        of_logits = (
            (width + 4) * U * (h.abs() @ w.abs().T) + e * products.abs() + 2 * U * logits.abs().nan_to_num(posinf=0)
        )
        hidden_column = logits == -math.inf
        of_logits = of_logits.masked_fill(hidden_column, 0.0) + least(dtype)
        lse = torch.logsumexp(logits, -1, keepdim=True)
        of_row = of_logits.amax(-1, keepdim=True)
        index = torch.where(kept, targets, 0)[:, None]
        of_lse = of_row + (columns + 4) * U + 4 * U * lse.abs() + 2 * EXP2
        of_picked = of_logits.gather(1, index) + 2 * U * logits.gather(1, index).abs().nan_to_num(posinf=0)
        term = (lse - logits.gather(1, index)).abs().nan_to_num(posinf=0) + z_loss * lse.square()
        of_term = of_lse + of_picked + z_loss * of_lse * (2 * lse.abs() + of_lse) + 8 * U * term
        of_loss = (of_term * kept[:, None]).sum() + 2 * U * float((term * kept[:, None]).sum())
        log_p = logits - lse
        gap = log_p.abs().nan_to_num(posinf=0)
        p, of_p = log_p.exp(), _spread(log_p, of_logits + of_lse + 4 * U * gap) + FLUSHED
        one_hot = torch.zeros_like(p).scatter_(1, index, 1.0)
        more = 1 + 2 * z_loss * lse
        d = (p * more - one_hot) * kept[:, None]
        of_d = (of_p * more.abs() + (p + of_p) * (2 * z_loss * of_lse + 8 * U * more.abs())) * kept[:, None]
        stored = of_d + e * (d.abs() + of_d) + least(dtype) * kept[:, None]
        whole = d.abs() + stored
        # The scale, one over the rows, is applied to a rounded gradient: once more e.
        bounds = {
            "dhidden": stored @ w.abs() + (columns + 4) * U * (whole @ w.abs()),
            "dweight": stored.T @ h.abs()
            + ((rows + 4) * U + (e if dtype != torch.float32 else 0)) * (whole.T @ h.abs()),
            "dbias": (stored if sums_stored else of_d).sum(0) + (rows + 4) * U * whole.sum(0),
        }
        truth = {"loss": value.detach(), "dhidden": dh, "dweight": dw, "dbias": db}
        for name, bound in bounds.items():
            bound = share * bound
            bounds[name] = bound + (2 * e + 2 * U) * (truth[name].abs() + bound) + 2 * least(dtype)
        bounds["loss"] = share * of_loss + 4 * U * value.detach().abs()
    return truth, bounds
