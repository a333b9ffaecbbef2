"""Flash attention, forward and backward (FlashAttention-2, arXiv 2307.08691), with the whole contract of the op.

A program of the forward and of the dq kernel owns BLOCK_M query rows of one head, a program of the dk/dv kernel
BLOCK_N key rows of one key/value head, summing over the query heads of its group: nothing is added atomically, so
gradients are bitwise reproducible. Tiles that the causal diagonal or the last key crosses go through a loop with
masks, all others through one without. Programs with most tiles start first. The exponential is exp2, log2(e)
folded into the scale. Scores are in float32, products of 16-bit inputs on tensor cores.
"""

import itertools
import math

import torch
import triton
from torch import Tensor

from kernels.native import rows_contiguous
from kernels.reference import dropout_scale, dropout_threshold
from kernels.triton import INTERPRETED
from kernels.triton.attention_backward import dkv_kernel, dq_kernel
from kernels.triton.attention_forward import forward_kernel
from kernels.triton.numeric import on_device, seed_words

# (BLOCK_M, BLOCK_N, warps, stages) by kernel and head_dim, for 16-bit inputs. bench/triton_aot.py compiles each for
# sm_80 and sm_90; one that spills registers on either is left out.
TILES = {
    "forward": {
        32: [(128, 64, 8, 3), (128, 32, 8, 3)],
        64: [(128, 64, 8, 3), (64, 64, 4, 3)],
        128: [(64, 64, 8, 3), (64, 32, 4, 2)],
    },
    "dq": {
        32: [(128, 64, 8, 2), (64, 32, 4, 3)],
        64: [(128, 64, 8, 2), (64, 32, 4, 3)],
        128: [(64, 32, 4, 2)],
    },
    "dkv": {
        32: [(32, 128, 8, 1), (32, 64, 4, 1)],
        64: [(32, 128, 8, 1), (32, 64, 4, 1), (32, 32, 4, 2)],
        128: [(32, 32, 4, 1), (32, 64, 8, 1)],
    },
}
# These spill in some kinds of calls only (8 to 272 bytes a thread, with triton 3.7.1 or 3.9.0), "full" being not causal.
# Finding a program's document takes registers, and so does dropout; without the diagonal's loop the compiler spends them
# elsewhere.
_NOT_WITH = {
    ("forward", 32): {(128, 64, 8, 3): {"full"}},
    ("forward", 64): {(64, 64, 4, 3): {"full", "documents"}},
    ("dq", 32): {(128, 64, 8, 2): {"full"}},
    ("dq", 64): {(128, 64, 8, 2): {"dropout"}},
    ("dkv", 64): {(32, 128, 8, 1): {"documents"}, (32, 64, 4, 1): {"documents", "dropout"}},
    ("dkv", 128): {(32, 32, 4, 1): {"full"}, (32, 64, 8, 1): {"causal"}},
}
# float32 inputs: full precision without tensor cores, for checks rather than for speed.
FLOAT32_TILE = (32, 32, 4, 1)
# The interpreter runs one program after another: few tiles, but enough for the tests to cross their borders.
_INTERPRETER_TILE = (64, 64, 4, 1)


def tiles(
    kernel: str, head_dim: int, dtype: torch.dtype, causal: bool, dropout: bool, documents: bool
) -> list[tuple[int, int, int, int]]:
    """The candidates for a call."""
    if INTERPRETED:
        return [_INTERPRETER_TILE]
    if dtype == torch.float32:
        return [FLOAT32_TILE]
    kinds = (
        {"causal" if causal else "full"} | ({"dropout"} if dropout else set()) | ({"documents"} if documents else set())
    )
    spills_with = _NOT_WITH.get((kernel, head_dim), {})
    return [tile for tile in TILES[kernel][head_dim] if not kinds & spills_with.get(tile, set())]


def _tuned(function, kernel: str):
    """Times the candidates at the first call of each kind and keeps the winner on disk, beside Triton's other files."""
    every = [_INTERPRETER_TILE] if INTERPRETED else [FLOAT32_TILE, *itertools.chain(*TILES[kernel].values())]
    configs = {
        tile: triton.Config({"BLOCK_M": tile[0], "BLOCK_N": tile[1]}, num_warps=tile[2], num_stages=tile[3])
        for tile in every
    }

    def prune(_, named, **options):
        arguments = {**named, **options}
        call = (
            arguments["HEAD_DIM"],
            arguments["q_ptr"].dtype,
            *(arguments[name] for name in ("CAUSAL", "DROPOUT", "DOCUMENTS")),
        )
        return [configs[tile] for tile in tiles(kernel, *call)]

    return triton.autotune(
        list(configs.values()),
        key=["HEAD_DIM", "CAUSAL", "DROPOUT", "DOCUMENTS", "length_class"],
        prune_configs_by={"early_config_prune": prune},
        cache_results=True,
    )(function)


_forward, _dq, _dkv = _tuned(forward_kernel, "forward"), _tuned(dq_kernel, "dq"), _tuned(dkv_kernel, "dkv")


def _common(
    q: Tensor, k: Tensor, cu_q: Tensor | None, causal: bool, scale: float, dropout_p: float, seed: int
) -> tuple:
    """The arguments from `documents` on, but for the tile sizes."""
    _, seqlen_q, heads, head_dim = q.shape
    threshold = dropout_threshold(dropout_p)
    return (
        0 if cu_q is None else cu_q.shape[0] - 1, seqlen_q, k.shape[1], heads, heads // k.shape[2], scale,
        dropout_scale(dropout_p), threshold, *seed_words(seed),
        # Calls of one power of two share a winner; from 8,192 queries on the choice has settled.
        min(max(seqlen_q.bit_length(), 7), 14), head_dim, causal, threshold > 0, cu_q is not None,
    )  # fmt: skip


def _grid(x: Tensor, cu: Tensor | None, block: str):
    """(problem and head, tile). Packed documents: at most one partial tile more for each of them."""
    batch, seq, heads, _ = x.shape
    more = 0 if cu is None else cu.shape[0] - 1
    return lambda meta: (batch * heads, triton.cdiv(seq, meta[block]) + more)


def _offsets(cu_q: Tensor | None, cu_k: Tensor | None, q: Tensor) -> tuple[Tensor, Tensor]:
    """The document offsets to load from; any tensor where there are none."""
    return (q, q) if cu_q is None or cu_k is None else (cu_q.contiguous(), cu_k.contiguous())


def _positive(q: Tensor, scale: float) -> tuple[Tensor, float]:
    """(q, scale) with the same products and scale >= 0, by which the kernel may scale a row's maximum."""
    return (-q, -scale) if scale < 0 else (q, scale)


def attention_forward(
    q: Tensor, k: Tensor, v: Tensor, cu_seqlens_q: Tensor | None, cu_seqlens_k: Tensor | None,
    causal: bool, scale: float, dropout_p: float, dropout_seed: int, *, out: Tensor | None = None,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """out (a new tensor, or the one given) and the log-sum-exp (batch, heads, seqlen_q) of `kernels.flash_attention`."""
    q, scale = _positive(q, scale)
    q, k, v = (rows_contiguous(x) for x in (q, k, v))
    result = q.new_empty(q.shape) if out is None or out.stride(-1) != 1 else out
    lse = torch.empty((q.shape[0], q.shape[2], q.shape[1]), dtype=torch.float32, device=q.device)
    if cu_seqlens_q is not None:
        result.zero_(), lse.fill_(-math.inf)  # rows that no document holds
    with on_device(q.device):
        _forward[_grid(q, cu_seqlens_q, "BLOCK_M")](
            q, k, v, result, lse, *_offsets(cu_seqlens_q, cu_seqlens_k, q),
            *q.stride()[:3], *k.stride()[:3], *v.stride()[:3], *result.stride()[:3],
            *_common(q, k, cu_seqlens_q, causal, scale, dropout_p, dropout_seed),
        )  # fmt: skip
    return result if out is None or out is result else out.copy_(result), lse


def attention_backward(
    grad_out: Tensor, q: Tensor, k: Tensor, v: Tensor, out: Tensor, lse: Tensor,
    cu_seqlens_q: Tensor | None, cu_seqlens_k: Tensor | None,
    causal: bool, scale: float, dropout_p: float, dropout_seed: int,
    *, grads: tuple[Tensor, Tensor, Tensor] | None = None,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    """Gradients of q, k, v, in new tensors or in `grads` (contiguous last dims), bitwise reproducible."""
    negative = scale < 0
    q, scale = _positive(q, scale)
    grad_out, q, k, v, out = (rows_contiguous(x) for x in (grad_out, q, k, v, out))
    lse = lse.contiguous()
    dq, dk, dv = grads = grads or (q.new_empty(q.shape), k.new_empty(k.shape), v.new_empty(v.shape))
    delta = torch.empty_like(lse)
    if cu_seqlens_q is not None:
        dq.zero_(), dk.zero_(), dv.zero_()
    cu = _offsets(cu_seqlens_q, cu_seqlens_k, q)
    common = _common(q, k, cu_seqlens_q, causal, scale, dropout_p, dropout_seed)
    strides = [stride for x in (grad_out, q, k, v) for stride in x.stride()[:3]]
    with on_device(q.device):
        _dq[_grid(q, cu_seqlens_q, "BLOCK_M")](
            grad_out, q, k, v, out, lse, dq, delta, *cu, *strides, *out.stride()[:3], *dq.stride()[:3], *common
        )
        _dkv[_grid(k, cu_seqlens_q, "BLOCK_N")](
            grad_out, q, k, v, lse, delta, dk, dv, *cu, *strides, *dk.stride()[:3], *dv.stride()[:3], *common
        )
    if negative:
        dq.neg_()
    return grads
