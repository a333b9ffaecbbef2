"""Flash attention, forward and backward (FlashAttention-2, arXiv 2307.08691), with the whole contract of the op.

A program of the forward and of the dq kernel owns BLOCK_M query rows of one head, a program of the dk/dv kernel
BLOCK_N key rows of one key/value head, summing over the query heads of its group: nothing is added atomically, so
gradients are bitwise reproducible. Tiles that the causal diagonal or the last key crosses go through a loop with
masks, all others through one without. Programs with most tiles start first. The exponential is exp2, log2(e)
folded into the scale. Scores are in float32, products of 16-bit inputs on tensor cores.
"""

import math

import torch
import triton
from torch import Tensor

from kernels.checks import check_offsets
from kernels.native import on_device, positive_scale, rows_contiguous
from kernels.reference import dropout_scale, dropout_threshold
from kernels.seeds import Seed
from kernels.triton import descriptors
from kernels.triton.attention_backward import dkv_kernel, dq_kernel
from kernels.triton.attention_forward import forward_kernel
from kernels.triton.attention_tuning import tuned
from kernels.triton.numeric import seed_words

_forward, _dq, _dkv = tuned(forward_kernel, "forward"), tuned(dq_kernel, "dq"), tuned(dkv_kernel, "dkv")


def _common(
    loaded: tuple[Tensor, ...],
    cu_q: Tensor | None,
    causal: bool,
    scale: float,
    dropout_p: float,
    seed: Seed,
    by_descriptors: bool,
) -> tuple:
    """The arguments from `documents` on, but for the candidate's; loaded: q, k, and what else is loaded by tiles.

    Packed documents are loaded by pointers: a descriptor would give a neighbour's rows for those past a document's end,
    where zeros are wanted.
    """
    q, k, *_ = loaded
    _, seqlen_q, heads, head_dim = q.shape
    threshold = dropout_threshold(dropout_p)
    return (
        0 if cu_q is None else cu_q.shape[0] - 1,
        seqlen_q,
        k.shape[1],
        heads,
        heads // k.shape[2],
        scale,
        dropout_scale(dropout_p),
        threshold,
        *seed_words(seed if threshold else 0),
        # Calls of one power of two share a winner; from 8,192 queries on the choice has settled.
        min(max(seqlen_q.bit_length(), 7), 14),
        head_dim,
        causal,
        threshold > 0,
        cu_q is not None,
        by_descriptors and cu_q is None and descriptors.allowed(*loaded),
    )


def _grid(x: Tensor, cu: Tensor | None, block: str):
    """(problem and head, tile). Packed documents: at most one partial tile more for each of them."""
    batch, seq, heads, _ = x.shape
    more = 0 if cu is None else cu.shape[0] - 1
    return lambda meta: (batch * heads, triton.cdiv(seq, meta[block]) + more)


def _offsets(cu_q: Tensor | None, cu_k: Tensor | None, q: Tensor, k: Tensor) -> tuple[Tensor, Tensor]:
    """The document offsets to load from; any tensor where there are none."""
    if cu_q is None or cu_k is None:
        return q, q
    check_offsets("cu_seqlens_q", cu_q, q.shape[1])
    check_offsets("cu_seqlens_k", cu_k, k.shape[1])
    return cu_q.contiguous(), cu_k.contiguous()


def attention_forward(
    q: Tensor, k: Tensor, v: Tensor, cu_seqlens_q: Tensor | None, cu_seqlens_k: Tensor | None, causal: bool,
    scale: float, dropout_p: float, dropout_seed: Seed, *, out: Tensor | None = None, by_descriptors: bool,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """out (a new tensor, or the one given) and the log-sum-exp (batch, heads, seqlen_q) of
    `kernels.flash_attention`.
    """
    q, scale, _ = positive_scale(q, scale)
    q, k, v = (rows_contiguous(x) for x in (q, k, v))
    result = q.new_empty(q.shape) if out is None or out.stride(-1) != 1 else out
    lse = torch.empty((q.shape[0], q.shape[2], q.shape[1]), dtype=torch.float32, device=q.device)
    if cu_seqlens_q is not None:
        result.zero_(), lse.fill_(-math.inf)  # rows that no document holds
    with on_device(q):
        _forward[_grid(q, cu_seqlens_q, "BLOCK_M")](
            q,
            k,
            v,
            result,
            lse,
            *_offsets(cu_seqlens_q, cu_seqlens_k, q, k),
            *q.stride()[:3],
            *k.stride()[:3],
            *v.stride()[:3],
            *result.stride()[:3],
            *_common((q, k, v), cu_seqlens_q, causal, scale, dropout_p, dropout_seed, by_descriptors),
        )
    return result if out is None or out is result else out.copy_(result), lse


def attention_backward(
    grad_out: Tensor, q: Tensor, k: Tensor, v: Tensor, out: Tensor, lse: Tensor, cu_seqlens_q: Tensor | None,
    cu_seqlens_k: Tensor | None, causal: bool, scale: float, dropout_p: float, dropout_seed: Seed, *,
    grads: tuple[Tensor, Tensor, Tensor] | None = None, by_descriptors: bool,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    """Gradients of q, k, v, in new tensors or in `grads` (contiguous last dims), bitwise reproducible."""
    q, scale, sign = positive_scale(q, scale)
    grad_out, q, k, v, out = (rows_contiguous(x) for x in (grad_out, q, k, v, out))
    lse = lse.contiguous()
    dq, dk, dv = grads = grads or (q.new_empty(q.shape), k.new_empty(k.shape), v.new_empty(v.shape))
    delta = torch.empty_like(lse)
    if cu_seqlens_q is not None:
        dq.zero_(), dk.zero_(), dv.zero_()
    cu = _offsets(cu_seqlens_q, cu_seqlens_k, q, k)
    common = _common((q, k, v, grad_out), cu_seqlens_q, causal, scale, dropout_p, dropout_seed, by_descriptors)
    strides = [stride for x in (grad_out, q, k, v) for stride in x.stride()[:3]]
    with on_device(q):
        _dq[_grid(q, cu_seqlens_q, "BLOCK_M")](
            grad_out, q, k, v, out, lse, dq, delta, *cu, *strides, *out.stride()[:3], *dq.stride()[:3], *common
        )
        _dkv[_grid(k, cu_seqlens_q, "BLOCK_N")](
            grad_out, q, k, v, lse, delta, dk, dv, *cu, *strides, *dk.stride()[:3], *dv.stride()[:3], *common
        )
    if sign != 1:
        dq.mul_(sign)
    return grads
