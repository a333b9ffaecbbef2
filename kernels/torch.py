"""The `torch` backend: PyTorch's own fast ops, and the chunked cross-entropy that it lacks."""

import torch
import torch.nn.functional as F
from torch import Tensor


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
    q: Tensor, k: Tensor, v: Tensor, cu_q: Tensor | None, cu_k: Tensor | None, causal: bool, scale: float
) -> Tensor:
    """`kernels.flash_attention` by scaled_dot_product_attention; documents one after another."""
    if cu_q is None or cu_k is None:
        return _sdpa(q, k, v, causal, scale)
    starts_q, starts_k = cu_q.tolist(), cu_k.tolist()
    parts = []
    for i in range(len(starts_q) - 1):
        documents = slice(starts_q[i], starts_q[i + 1]), slice(starts_k[i], starts_k[i + 1])
        parts.append(_sdpa(q[:, documents[0]], k[:, documents[1]], v[:, documents[1]], causal, scale))
    return torch.cat(parts, dim=1)


def _sdpa(q: Tensor, k: Tensor, v: Tensor, causal: bool, scale: float) -> Tensor:
    m, n = q.shape[1], k.shape[1]
    if m == 0 or n == 0:
        return q * 0
    mask = None
    hidden_rows = max(m - n, 0) if causal else 0
    if causal and m != n and m > 1:  # is_causal aligns top-left; ours is bottom-right. One query sees every key.
        mask = torch.ones(m, n, dtype=torch.bool, device=q.device).tril(n - m)
        mask[:hidden_rows] = True  # a row without a visible key would be NaN: zeroed below
    out = F.scaled_dot_product_attention(
        q.transpose(1, 2), k.transpose(1, 2), v.transpose(1, 2),
        attn_mask=mask, is_causal=causal and m == n, scale=scale, enable_gqa=q.shape[2] != k.shape[2],
    ).transpose(1, 2)  # fmt: skip
    if hidden_rows:
        out = torch.cat([torch.zeros_like(out[:, :hidden_rows]), out[:, hidden_rows:]], dim=1)
    return out


# 16 Mi logits at a time, 64 MiB in float32: at 51,200 columns 327 rows, enough for the products to run at full rate.
_CHUNK_LOGITS = 1 << 24


def linear_cross_entropy(
    hidden: Tensor, weight: Tensor, bias: Tensor, targets: Tensor, ignore_index: int, z_loss: float, with_grads: bool
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Summed cross-entropy (with z_loss, see `kernels.linear_cross_entropy`) and, in the same pass, its gradients, a chunk of rows at a time.

    hidden (rows, width), weight (columns, width), bias (columns,), targets (rows,) int64.
    Returns (loss, grad_hidden, grad_weight, grad_bias); the gradients are empty unless with_grads. The logits
    of one chunk only exist at a time; grad_weight adds up in float32.
    """
    rows, columns = hidden.shape[0], weight.shape[0]
    accumulate = torch.float64 if hidden.dtype == torch.float64 else torch.float32
    loss = torch.zeros((), dtype=accumulate, device=hidden.device)
    grad_hidden = torch.empty_like(hidden) if with_grads else hidden.new_empty(0)
    grad_weight = torch.zeros(weight.shape if with_grads else (0,), dtype=accumulate, device=hidden.device)
    grad_bias = torch.zeros(bias.shape if with_grads else (0,), dtype=accumulate, device=hidden.device)
    chunk = max(1, _CHUNK_LOGITS // columns)
    for start in range(0, rows, chunk):
        h, t = hidden[start : start + chunk], targets[start : start + chunk]
        logits = F.linear(h, weight, bias).to(accumulate)
        kept = t != ignore_index
        index = torch.where(kept, t, 0)[:, None]
        top = logits.amax(-1, keepdim=True)
        logits.sub_(top)
        picked = logits.gather(1, index)
        d = logits.exp_()  # with the maximum taken off first, large logits lose nothing
        total = d.sum(-1, keepdim=True)
        lse = top + total.log()
        loss += torch.where(kept, (total.log() - picked + z_loss * lse.square())[:, 0], 0.0).sum()
        if with_grads:
            d.mul_((1 + 2 * z_loss * lse) / total)  # softmax and z-loss's share of it, in the logits' memory
            d.scatter_add_(1, index, torch.full_like(total, -1.0))
            d.masked_fill_(~kept[:, None], 0.0)
            grad_bias += d.sum(0)
            low = d.to(hidden.dtype)
            torch.mm(low, weight, out=grad_hidden[start : start + chunk])
            grad_weight += low.T @ h
    return loss, grad_hidden, grad_weight.to(weight.dtype), grad_bias.to(bias.dtype)
