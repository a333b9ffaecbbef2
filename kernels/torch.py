"""The `torch` backend: PyTorch's own fast ops, and of the chunked loss the piece that it lacks."""

import torch
import torch.nn.functional as F
from torch import Tensor

from kernels.native import positive_scale
from kernels.reference import document_starts
from kernels.seeds import Seed


def attention_refuses(
    *, dropout_p: float = 0.0, return_lse: bool = False, packed: bool = False, **_: object
) -> str | None:
    """Why scaled_dot_product_attention cannot serve a call, or None."""
    if dropout_p > 0:
        return f"dropout_p = {dropout_p}: scaled_dot_product_attention cannot draw the mask from dropout_seed"
    if return_lse:
        return "return_lse = True: scaled_dot_product_attention does not return the log-sum-exp"
    if packed and torch.compiler.is_compiling():
        return "cu_seqlens under torch.compile: documents are cut at places that only the run knows"
    return None


def attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    cu_q: Tensor | None,
    cu_k: Tensor | None,
    causal: bool,
    scale: float,
    dropout_p: float,
    dropout_seed: Seed,
    *,
    out: Tensor | None = None,
) -> tuple[Tensor, None]:
    """`kernels.flash_attention` by scaled_dot_product_attention, without dropout; there is no log-sum-exp."""
    result = _documents(q, k, v, cu_q, cu_k, causal, scale)
    return result if out is None else out.copy_(result), None


def _documents(
    q: Tensor, k: Tensor, v: Tensor, cu_q: Tensor | None, cu_k: Tensor | None, causal: bool, scale: float
) -> Tensor:
    """Documents one after another."""
    if cu_q is None or cu_k is None:
        return _sdpa(q, k, v, causal, scale)
    starts_q = document_starts("cu_seqlens_q", cu_q, q.shape[1])
    starts_k = document_starts("cu_seqlens_k", cu_k, k.shape[1])
    parts = [_zeros(q[:, : starts_q[0]], k, v)]
    for i in range(len(starts_q) - 1):
        if starts_q[i] == starts_q[i + 1]:
            continue  # nothing to compute, and no gradient for keys that nothing sees
        documents = slice(starts_q[i], starts_q[i + 1]), slice(starts_k[i], starts_k[i + 1])
        parts.append(_sdpa(q[:, documents[0]], k[:, documents[1]], v[:, documents[1]], causal, scale))
    return torch.cat([*parts, _zeros(q[:, starts_q[-1] :], k, v)], dim=1)


def _zeros(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """Zeros like q, whatever its numbers, and in the graph of all three: their gradients are zeros."""
    zeros = q.masked_fill(torch.ones((), dtype=torch.bool, device=q.device), 0.0)
    return zeros + k[:, :0].sum() + v[:, :0].sum()


def _sdpa(q: Tensor, k: Tensor, v: Tensor, causal: bool, scale: float) -> Tensor:
    m, n = q.shape[1], k.shape[1]
    if n == 0:
        return _zeros(q, k, v)
    if causal and m > n:  # queries that see no key: SDPA would make them NaN
        return torch.cat([_zeros(q[:, : m - n], k, v), _sdpa(q[:, m - n :], k, v, causal, scale)], dim=1)
    # Causal with a scale that is not positive, PyTorch's CPU kernel gives NaN.
    q, scale, _ = positive_scale(q, scale)
    mask, is_causal = None, False
    # A branch: of lengths that vary torch.compile would make an expression, which the op does not take.
    if causal and m == n:
        is_causal = True
    elif causal and m > 1:  # is_causal aligns top-left; ours is bottom-right. One query sees every key.
        mask = torch.ones(m, n, dtype=torch.bool, device=q.device).tril(n - m)
    return F.scaled_dot_product_attention(
        q.transpose(1, 2),
        k.transpose(1, 2),
        v.transpose(1, 2),
        attn_mask=mask,
        is_causal=is_causal,
        scale=scale,
        enable_gqa=q.shape[2] != k.shape[2],
    ).transpose(1, 2)


def cross_entropy(
    logits: Tensor,
    bias: Tensor,
    targets: Tensor,
    loss: Tensor,
    bias_sums: Tensor | None,
    ignore_index: int,
    z_loss: float,
) -> None:
    """See `kernels.chunked_loss.Pieces.cross_entropy`; 16-bit logits get a copy in float32."""
    x = logits.to(loss.dtype).add_(bias)
    kept = targets != ignore_index
    index = torch.where(kept, targets, 0)[:, None]
    top = x.amax(-1, keepdim=True)
    x.sub_(top)
    picked = x.gather(1, index)
    d = x.exp_()  # with the maximum taken off first, large logits lose nothing
    total = d.sum(-1, keepdim=True)
    lse = top + total.log()
    loss.copy_(torch.where(kept, (total.log() - picked + z_loss * lse.square())[:, 0], 0.0))
    if bias_sums is not None:
        d.mul_((1 + 2 * z_loss * lse) / total)  # softmax and z-loss's share of it, in the logits' memory
        d.scatter_add_(1, index, torch.full_like(total, -1.0))
        d.masked_fill_(~kept[:, None], 0.0)
        bias_sums += d.sum(0)
        logits.copy_(d)
