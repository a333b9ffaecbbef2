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
import triton.language as tl
from torch import Tensor
from triton.language.random import philox_impl

from kernels.native import rows_contiguous
from kernels.reference import dropout_scale, dropout_threshold
from kernels.triton import INTERPRETED

LOG2E = tl.constexpr(1.4426950408889634)
LN2 = tl.constexpr(0.6931471805599453)


# Triton's interpreter multiplies the bit patterns of bfloat16, and truncates to it. Under it, operands of products
# are widened first, which is exact, and numbers are rounded to nearest as on a GPU.
_EMULATED = tl.constexpr(INTERPRETED)


@triton.jit
def _dot(a, b, accumulated=None):
    """a b (+ accumulated) in float32: tensor cores for 16-bit operands, full precision for float32."""
    if _EMULATED:
        a, b = a.to(tl.float32), b.to(tl.float32)
    return tl.dot(a, b, accumulated, input_precision="ieee")


@triton.jit
def _round(x, dtype: tl.constexpr):
    """x, float32, to dtype."""
    if _EMULATED and dtype == tl.bfloat16:
        bits = x.to(tl.uint32, bitcast=True)
        bits = (bits + 0x7FFF + ((bits >> 16) & 1)) & 0xFFFF0000
        x = bits.to(tl.float32, bitcast=True)
    return x.to(dtype)


@triton.jit
def _problem(
    cu_q_ptr, cu_k_ptr, documents, tile, index, heads, seqlen_q, seqlen_k,
    DOCUMENTS: tl.constexpr, BY_KEYS: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """(batch, document or batch, head, first row, and where queries and keys start and how many there are).

    index: which (batch, head), or which head of packed documents, whose tiles are counted through.
    """
    batch, head = index // heads, index % heads
    problem, start_q, start_k = batch, 0, 0
    first = tile * BLOCK
    if DOCUMENTS:
        batch, head = 0, index
        before, problem, start_q, seqlen_q, start_k, seqlen_k = 0, 0, 0, 0, 0, 0
        for document in range(documents):
            q0, q1 = tl.load(cu_q_ptr + document), tl.load(cu_q_ptr + document + 1)
            k0, k1 = tl.load(cu_k_ptr + document), tl.load(cu_k_ptr + document + 1)
            tiles = (((k1 - k0) if BY_KEYS else (q1 - q0)) + BLOCK - 1) // BLOCK
            here = (tile >= before) & (tile < before + tiles)
            first = tl.where(here, (tile - before) * BLOCK, first)
            problem = tl.where(here, document, problem)
            start_q, seqlen_q = tl.where(here, q0, start_q), tl.where(here, q1 - q0, seqlen_q)
            start_k, seqlen_k = tl.where(here, k0, start_k), tl.where(here, k1 - k0, seqlen_k)
            before = before + tiles
    return batch, problem, head, first, start_q, seqlen_q, start_k, seqlen_k


@triton.jit
def _load(ptr, first, stride, limit, BLOCK: tl.constexpr, HEAD_DIM: tl.constexpr, MASKED: tl.constexpr):
    """Rows [first, first + BLOCK) of a (limit, HEAD_DIM) matrix; MASKED: rows from `limit` on are zeros."""
    row = first + tl.arange(0, BLOCK)
    address = ptr + row.to(tl.int64)[:, None] * stride + tl.arange(0, HEAD_DIM)[None, :]
    if MASKED:
        return tl.load(address, mask=row[:, None] < limit, other=0.0)
    return tl.load(address)


@triton.jit
def _store(ptr, value, first, stride, limit, BLOCK: tl.constexpr, HEAD_DIM: tl.constexpr):
    row = first + tl.arange(0, BLOCK)
    address = ptr + row.to(tl.int64)[:, None] * stride + tl.arange(0, HEAD_DIM)[None, :]
    tl.store(address, _round(value, ptr.dtype.element_ty), mask=row[:, None] < limit)


@triton.jit
def _keep(
    seed_low, seed_high, plane, first_row, first_column, threshold,
    ROWS: tl.constexpr, COLUMNS: tl.constexpr, TRANSPOSED: tl.constexpr,
):  # fmt: skip
    """reference.dropout_keep of a tile, (ROWS, COLUMNS) or transposed; one Philox call for eight columns.

    first_column is a multiple of 32. Column 32 g + 8 w + 2 t + h is half h of word w of counter 4 g + t.
    """
    counter = (first_column // 8 + tl.arange(0, COLUMNS // 8)).to(tl.uint32)
    row = (first_row + tl.arange(0, ROWS)).to(tl.uint32)
    if TRANSPOSED:
        zero = tl.zeros((COLUMNS // 8, ROWS), tl.uint32)
        counter, row = zero + counter[:, None], zero + row[None, :]
    else:
        zero = tl.zeros((ROWS, COLUMNS // 8), tl.uint32)
        counter, row = zero + counter[None, :], zero + row[:, None]
    low, high = tl.cast(seed_low, tl.uint32, bitcast=True), tl.cast(seed_high, tl.uint32, bitcast=True)
    w0, w1, w2, w3 = philox_impl(counter, row, zero + tl.cast(plane, tl.uint32), zero, low, high)
    even, odd = tl.join(_halves(w0, threshold), _halves(w2, threshold)), tl.join(_halves(w1, threshold), _halves(w3, threshold))  # fmt: skip
    kept = tl.join(even, odd)  # (..., h, w // 2, w % 2)
    if TRANSPOSED:
        kept = tl.permute(tl.reshape(kept, (COLUMNS // 32, 4, ROWS, 2, 2, 2)), (0, 4, 5, 1, 3, 2))
        kept = tl.reshape(kept, (COLUMNS, ROWS))
    else:
        kept = tl.permute(tl.reshape(kept, (ROWS, COLUMNS // 32, 4, 2, 2, 2)), (0, 1, 4, 5, 2, 3))
        kept = tl.reshape(kept, (ROWS, COLUMNS))
    return kept != 0


@triton.jit
def _halves(word, threshold):
    """Is each 16-bit half of the word kept: low half first, along a new last dim."""
    return tl.join(((word & 0xFFFF) >= threshold).to(tl.int8), ((word >> 16) >= threshold).to(tl.int8))


@triton.jit
def _visible(row, column, seqlen_q, seqlen_k, CAUSAL: tl.constexpr):
    """Which scores count; row and column are indices that broadcast to the tile."""
    visible = column < seqlen_k
    if CAUSAL:
        visible = visible & (column <= row + (seqlen_k - seqlen_q))
    return visible


@triton.jit
def _key_range(first_row, seqlen_q, seqlen_k, CAUSAL: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr):
    """Query rows [first_row, +BLOCK_M) see every key before the first of these, and no key from the second on."""
    whole, end = seqlen_k, seqlen_k
    if CAUSAL:
        offset = seqlen_k - seqlen_q + 1
        whole = tl.minimum(whole, tl.maximum(first_row + offset, 0))
        end = tl.minimum(end, tl.maximum(tl.minimum(first_row + BLOCK_M, seqlen_q) - 1 + offset, 0))
    return whole // BLOCK_N * BLOCK_N, end


# ------------------------------------------------------------------------------------------------ forward


@triton.jit
def _forward_loop(
    accumulated, total, maximum, q, k_ptr, v_ptr, k_seq, v_seq, first_row, begin, end, seqlen_q, seqlen_k, scale,
    plane, threshold, seed_low, seed_high,
    HEAD_DIM: tl.constexpr, CAUSAL: tl.constexpr, DROPOUT: tl.constexpr, MASKED: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
):  # fmt: skip
    for first_column in range(begin, end, BLOCK_N):
        k = _load(k_ptr, first_column, k_seq, seqlen_k, BLOCK_N, HEAD_DIM, MASKED)
        scores = _dot(q, tl.trans(k))
        if MASKED:
            row, column = first_row + tl.arange(0, BLOCK_M)[:, None], first_column + tl.arange(0, BLOCK_N)[None, :]
            visible = _visible(row, column, seqlen_q, seqlen_k, CAUSAL)
            scores = tl.where(visible, scores * scale, float("-inf"))
            new = tl.maximum(maximum, tl.max(scores, 1))
            shift = tl.where(new == float("-inf"), 0.0, new)  # a row that has seen no key yet
            p = tl.exp2(scores - shift[:, None])
            decay = tl.exp2(maximum - shift)
        else:
            new = tl.maximum(maximum, tl.max(scores, 1) * scale)
            p = tl.exp2(scores * scale - new[:, None])
            decay = tl.exp2(maximum - new)
        total = total * decay + tl.sum(p, 1)
        accumulated = accumulated * decay[:, None]
        if DROPOUT:
            kept = _keep(seed_low, seed_high, plane, first_row, first_column, threshold, BLOCK_M, BLOCK_N, False)
            p = tl.where(kept, p, 0.0)
        v = _load(v_ptr, first_column, v_seq, seqlen_k, BLOCK_N, HEAD_DIM, MASKED)
        accumulated = _dot(_round(p, v.dtype), v, accumulated)
        maximum = new
    return accumulated, total, maximum


@triton.jit(do_not_specialize=["seed_low", "seed_high", "threshold", "length_class"])
def _forward_kernel(
    q_ptr, k_ptr, v_ptr, out_ptr, lse_ptr, cu_q_ptr, cu_k_ptr,
    q_batch, q_seq, q_head, k_batch, k_seq, k_head, v_batch, v_seq, v_head, out_batch, out_seq, out_head,
    documents, seqlen_q, seqlen_k, heads, group, scale, keep_scale, threshold, seed_low, seed_high, length_class,
    HEAD_DIM: tl.constexpr, CAUSAL: tl.constexpr, DROPOUT: tl.constexpr, DOCUMENTS: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
):  # fmt: skip
    tile = tl.program_id(1)
    if CAUSAL:
        tile = tl.num_programs(1) - 1 - tile  # the last rows see most keys
    rows = seqlen_q
    batch, problem, head, first_row, start_q, seqlen_q, start_k, seqlen_k = _problem(
        cu_q_ptr, cu_k_ptr, documents, tile, tl.program_id(0), heads, seqlen_q, seqlen_k, DOCUMENTS, False, BLOCK_M
    )
    if first_row >= seqlen_q:
        return
    batch, head, start_q, start_k = tl.cast(batch, tl.int64), tl.cast(head, tl.int64), tl.cast(start_q, tl.int64), tl.cast(start_k, tl.int64)  # fmt: skip
    q_ptr += batch * q_batch + start_q * q_seq + head * q_head
    k_ptr += batch * k_batch + start_k * k_seq + head // group * k_head
    v_ptr += batch * v_batch + start_k * v_seq + head // group * v_head
    out_ptr += batch * out_batch + start_q * out_seq + head * out_head
    lse_ptr += (batch * heads + head) * rows + start_q

    q = _load(q_ptr, first_row, q_seq, seqlen_q, BLOCK_M, HEAD_DIM, True)
    accumulated = tl.zeros((BLOCK_M, HEAD_DIM), tl.float32)
    total = tl.zeros((BLOCK_M,), tl.float32)
    maximum = tl.full((BLOCK_M,), float("-inf"), tl.float32)
    plane = problem * heads + tl.cast(head, tl.int32)
    whole, end = _key_range(first_row, seqlen_q, seqlen_k, CAUSAL, BLOCK_M, BLOCK_N)
    accumulated, total, maximum = _forward_loop(
        accumulated, total, maximum, q, k_ptr, v_ptr, k_seq, v_seq, first_row, 0, whole, seqlen_q, seqlen_k,
        scale * LOG2E, plane, threshold, seed_low, seed_high, HEAD_DIM, CAUSAL, DROPOUT, False, BLOCK_M, BLOCK_N,
    )  # fmt: skip
    accumulated, total, maximum = _forward_loop(
        accumulated, total, maximum, q, k_ptr, v_ptr, k_seq, v_seq, first_row, whole, end, seqlen_q, seqlen_k,
        scale * LOG2E, plane, threshold, seed_low, seed_high, HEAD_DIM, CAUSAL, DROPOUT, True, BLOCK_M, BLOCK_N,
    )  # fmt: skip
    # A row without a visible key has total 0: zeros, and lse = -inf.
    accumulated = accumulated * (keep_scale / tl.where(total == 0.0, 1.0, total))[:, None]
    _store(out_ptr, accumulated, first_row, out_seq, seqlen_q, BLOCK_M, HEAD_DIM)
    row = first_row + tl.arange(0, BLOCK_M)
    lse = tl.where(total == 0.0, float("-inf"), maximum * LN2 + tl.log(tl.where(total == 0.0, 1.0, total)))
    tl.store(lse_ptr + row, lse, mask=row < seqlen_q)


# ----------------------------------------------------------------------------------------------- backward


@triton.jit
def _dq_loop(
    dq, q, grad, lse, delta, k_ptr, v_ptr, k_seq, v_seq, first_row, begin, end, seqlen_q, seqlen_k, scale, keep_scale,
    plane, threshold, seed_low, seed_high,
    HEAD_DIM: tl.constexpr, CAUSAL: tl.constexpr, DROPOUT: tl.constexpr, MASKED: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
):  # fmt: skip
    for first_column in range(begin, end, BLOCK_N):
        k = _load(k_ptr, first_column, k_seq, seqlen_k, BLOCK_N, HEAD_DIM, MASKED)
        v = _load(v_ptr, first_column, v_seq, seqlen_k, BLOCK_N, HEAD_DIM, MASKED)
        p = tl.exp2(_dot(q, tl.trans(k)) * (scale * LOG2E) - lse[:, None])
        if MASKED:  # also where lse is -inf, and p infinite
            row, column = first_row + tl.arange(0, BLOCK_M)[:, None], first_column + tl.arange(0, BLOCK_N)[None, :]
            p = tl.where(_visible(row, column, seqlen_q, seqlen_k, CAUSAL), p, 0.0)
        dp = _dot(grad, tl.trans(v))
        if DROPOUT:
            kept = _keep(seed_low, seed_high, plane, first_row, first_column, threshold, BLOCK_M, BLOCK_N, False)
            dp = tl.where(kept, dp * keep_scale, 0.0)
        ds = p * (dp - delta[:, None])
        dq = _dot(_round(ds, k.dtype), k, dq)
    return dq


@triton.jit(do_not_specialize=["seed_low", "seed_high", "threshold", "length_class"])
def _dq_kernel(
    grad_ptr, q_ptr, k_ptr, v_ptr, out_ptr, lse_ptr, dq_ptr, delta_ptr, cu_q_ptr, cu_k_ptr,
    grad_batch, grad_seq, grad_head, q_batch, q_seq, q_head, k_batch, k_seq, k_head, v_batch, v_seq, v_head,
    out_batch, out_seq, out_head, dq_batch, dq_seq, dq_head,
    documents, seqlen_q, seqlen_k, heads, group, scale, keep_scale, threshold, seed_low, seed_high, length_class,
    HEAD_DIM: tl.constexpr, CAUSAL: tl.constexpr, DROPOUT: tl.constexpr, DOCUMENTS: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
):  # fmt: skip
    """dq, and delta = sum of grad_out * out over a row, which the dk/dv kernel needs too."""
    tile = tl.program_id(1)
    if CAUSAL:
        tile = tl.num_programs(1) - 1 - tile
    rows = seqlen_q
    batch, problem, head, first_row, start_q, seqlen_q, start_k, seqlen_k = _problem(
        cu_q_ptr, cu_k_ptr, documents, tile, tl.program_id(0), heads, seqlen_q, seqlen_k, DOCUMENTS, False, BLOCK_M
    )
    if first_row >= seqlen_q:
        return
    batch, head, start_q, start_k = tl.cast(batch, tl.int64), tl.cast(head, tl.int64), tl.cast(start_q, tl.int64), tl.cast(start_k, tl.int64)  # fmt: skip
    grad_ptr += batch * grad_batch + start_q * grad_seq + head * grad_head
    q_ptr += batch * q_batch + start_q * q_seq + head * q_head
    k_ptr += batch * k_batch + start_k * k_seq + head // group * k_head
    v_ptr += batch * v_batch + start_k * v_seq + head // group * v_head
    out_ptr += batch * out_batch + start_q * out_seq + head * out_head
    dq_ptr += batch * dq_batch + start_q * dq_seq + head * dq_head
    statistics = (batch * heads + head) * rows + start_q

    row = first_row + tl.arange(0, BLOCK_M)
    q = _load(q_ptr, first_row, q_seq, seqlen_q, BLOCK_M, HEAD_DIM, True)
    grad = _load(grad_ptr, first_row, grad_seq, seqlen_q, BLOCK_M, HEAD_DIM, True)
    out = _load(out_ptr, first_row, out_seq, seqlen_q, BLOCK_M, HEAD_DIM, True)
    delta = tl.sum(grad.to(tl.float32) * out.to(tl.float32), 1)
    tl.store(delta_ptr + statistics + row, delta, mask=row < seqlen_q)
    lse = tl.load(lse_ptr + statistics + row, mask=row < seqlen_q, other=float("inf")) * LOG2E
    dq = tl.zeros((BLOCK_M, HEAD_DIM), tl.float32)
    plane = problem * heads + tl.cast(head, tl.int32)
    whole, end = _key_range(first_row, seqlen_q, seqlen_k, CAUSAL, BLOCK_M, BLOCK_N)
    dq = _dq_loop(
        dq, q, grad, lse, delta, k_ptr, v_ptr, k_seq, v_seq, first_row, 0, whole, seqlen_q, seqlen_k, scale,
        keep_scale, plane, threshold, seed_low, seed_high, HEAD_DIM, CAUSAL, DROPOUT, False, BLOCK_M, BLOCK_N,
    )  # fmt: skip
    dq = _dq_loop(
        dq, q, grad, lse, delta, k_ptr, v_ptr, k_seq, v_seq, first_row, whole, end, seqlen_q, seqlen_k, scale,
        keep_scale, plane, threshold, seed_low, seed_high, HEAD_DIM, CAUSAL, DROPOUT, True, BLOCK_M, BLOCK_N,
    )  # fmt: skip
    _store(dq_ptr, dq * scale, first_row, dq_seq, seqlen_q, BLOCK_M, HEAD_DIM)


@triton.jit
def _dkv_loop(
    dk, dv, k, v, grad_ptr, q_ptr, lse_ptr, delta_ptr, grad_seq, q_seq, first_column, begin, end, seqlen_q, seqlen_k,
    scale, keep_scale, plane, threshold, seed_low, seed_high,
    HEAD_DIM: tl.constexpr, CAUSAL: tl.constexpr, DROPOUT: tl.constexpr, MASKED: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
):  # fmt: skip
    for first_row in range(begin, end, BLOCK_M):
        # Rows past the end: q and grad are zeros, lse is infinite, so p and ds are zeros without a mask.
        row = first_row + tl.arange(0, BLOCK_M)
        q = _load(q_ptr, first_row, q_seq, seqlen_q, BLOCK_M, HEAD_DIM, True)
        grad = _load(grad_ptr, first_row, grad_seq, seqlen_q, BLOCK_M, HEAD_DIM, True)
        lse = tl.load(lse_ptr + row, mask=row < seqlen_q, other=float("inf")) * LOG2E
        delta = tl.load(delta_ptr + row, mask=row < seqlen_q, other=0.0)
        # Tiles transposed, (keys, rows), so that p and ds are left operands as they lie in registers.
        p = tl.exp2(_dot(k, tl.trans(q)) * (scale * LOG2E) - lse[None, :])
        if MASKED:
            column = first_column + tl.arange(0, BLOCK_N)[:, None]
            p = tl.where(_visible(row[None, :], column, seqlen_q, seqlen_k, CAUSAL), p, 0.0)
        dp = _dot(v, tl.trans(grad))
        dropped = p
        if DROPOUT:
            kept = _keep(seed_low, seed_high, plane, first_row, first_column, threshold, BLOCK_M, BLOCK_N, True)
            dropped = tl.where(kept, p * keep_scale, 0.0)
            dp = tl.where(kept, dp * keep_scale, 0.0)
        dv = _dot(_round(dropped, grad.dtype), grad, dv)
        dk = _dot(_round(p * (dp - delta[None, :]), q.dtype), q, dk)
    return dk, dv


@triton.jit(do_not_specialize=["seed_low", "seed_high", "threshold", "length_class"])
def _dkv_kernel(
    grad_ptr, q_ptr, k_ptr, v_ptr, lse_ptr, delta_ptr, dk_ptr, dv_ptr, cu_q_ptr, cu_k_ptr,
    grad_batch, grad_seq, grad_head, q_batch, q_seq, q_head, k_batch, k_seq, k_head, v_batch, v_seq, v_head,
    dk_batch, dk_seq, dk_head, dv_batch, dv_seq, dv_head,
    documents, seqlen_q, seqlen_k, heads, group, scale, keep_scale, threshold, seed_low, seed_high, length_class,
    HEAD_DIM: tl.constexpr, CAUSAL: tl.constexpr, DROPOUT: tl.constexpr, DOCUMENTS: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
):  # fmt: skip
    rows = seqlen_q
    # The first keys are seen by most rows: tiles are in the right order as they are.
    batch, problem, kv_head, first_column, start_q, seqlen_q, start_k, seqlen_k = _problem(
        cu_q_ptr, cu_k_ptr, documents, tl.program_id(1), tl.program_id(0), heads // group, seqlen_q, seqlen_k,
        DOCUMENTS, True, BLOCK_N,
    )  # fmt: skip
    if first_column >= seqlen_k:
        return
    batch, kv_head, start_q, start_k = tl.cast(batch, tl.int64), tl.cast(kv_head, tl.int64), tl.cast(start_q, tl.int64), tl.cast(start_k, tl.int64)  # fmt: skip
    k_ptr += batch * k_batch + start_k * k_seq + kv_head * k_head
    v_ptr += batch * v_batch + start_k * v_seq + kv_head * v_head
    dk_ptr += batch * dk_batch + start_k * dk_seq + kv_head * dk_head
    dv_ptr += batch * dv_batch + start_k * dv_seq + kv_head * dv_head

    k = _load(k_ptr, first_column, k_seq, seqlen_k, BLOCK_N, HEAD_DIM, True)
    v = _load(v_ptr, first_column, v_seq, seqlen_k, BLOCK_N, HEAD_DIM, True)
    dk = tl.zeros((BLOCK_N, HEAD_DIM), tl.float32)
    dv = tl.zeros((BLOCK_N, HEAD_DIM), tl.float32)
    # Rows before `begin` see none of these keys, rows from `whole` on see all. Keys past the end are not stored.
    begin, whole = 0, 0
    if CAUSAL:
        begin = tl.maximum(first_column + seqlen_q - seqlen_k, 0) // BLOCK_M * BLOCK_M
        whole = tl.maximum(first_column + BLOCK_N - 1 + seqlen_q - seqlen_k, 0)
        whole = tl.minimum((whole + BLOCK_M - 1) // BLOCK_M * BLOCK_M, (seqlen_q + BLOCK_M - 1) // BLOCK_M * BLOCK_M)
    for member in range(group):
        head = kv_head * group + member
        grad_of_head = grad_ptr + batch * grad_batch + start_q * grad_seq + head * grad_head
        q_of_head = q_ptr + batch * q_batch + start_q * q_seq + head * q_head
        statistics = (batch * heads + head) * rows + start_q
        plane = problem * heads + tl.cast(head, tl.int32)
        if CAUSAL:
            dk, dv = _dkv_loop(
                dk, dv, k, v, grad_of_head, q_of_head, lse_ptr + statistics, delta_ptr + statistics, grad_seq, q_seq,
                first_column, begin, whole, seqlen_q, seqlen_k, scale, keep_scale, plane, threshold, seed_low,
                seed_high, HEAD_DIM, CAUSAL, DROPOUT, True, BLOCK_M, BLOCK_N,
            )  # fmt: skip
        dk, dv = _dkv_loop(
            dk, dv, k, v, grad_of_head, q_of_head, lse_ptr + statistics, delta_ptr + statistics, grad_seq, q_seq,
            first_column, whole, seqlen_q, seqlen_q, seqlen_k, scale, keep_scale, plane, threshold, seed_low,
            seed_high, HEAD_DIM, CAUSAL, DROPOUT, False, BLOCK_M, BLOCK_N,
        )  # fmt: skip
    _store(dk_ptr, dk * scale, first_column, dk_seq, seqlen_k, BLOCK_N, HEAD_DIM)
    _store(dv_ptr, dv, first_column, dv_seq, seqlen_k, BLOCK_N, HEAD_DIM)


# ------------------------------------------------------------------------------------------------ launch

# (BLOCK_M, BLOCK_N, warps, stages) by kernel and head_dim, for 16-bit inputs. bench/triton_aot.py compiles each for
# sm_80 and sm_90; one that spills registers on either is left out.
TILES = {
    "forward": {
        32: [(128, 64, 8, 3)],
        64: [(128, 64, 8, 3), (64, 64, 4, 3)],
        128: [(64, 32, 4, 3)],
    },
    "dq": {
        32: [(128, 64, 8, 2), (64, 32, 4, 3)],
        64: [(128, 64, 8, 2), (64, 32, 4, 3)],
        128: [(64, 32, 4, 2)],
    },
    "dkv": {
        32: [(32, 128, 8, 1), (32, 64, 4, 1)],
        64: [(32, 128, 8, 1), (32, 64, 4, 1), (32, 32, 4, 2)],
        128: [(32, 32, 4, 1)],
    },
}
# Finding a program's document takes registers too: these spill (32 and 72 bytes a thread on sm_80) with it.
_NOT_WITH_DOCUMENTS = {("dkv", 64): [(32, 128, 8, 1), (32, 64, 4, 1)]}
# float32 inputs: full precision without tensor cores, for checks rather than for speed.
FLOAT32_TILE = (32, 32, 4, 1)
# The interpreter runs one program after another: few tiles, but enough for the tests to cross their borders.
_INTERPRETER_TILE = (64, 64, 4, 1)


def tiles(kernel: str, head_dim: int, dtype: torch.dtype, documents: bool) -> list[tuple[int, int, int, int]]:
    """The candidates for a call."""
    if INTERPRETED:
        return [_INTERPRETER_TILE]
    if dtype == torch.float32:
        return [FLOAT32_TILE]
    left_out = _NOT_WITH_DOCUMENTS.get((kernel, head_dim), []) if documents else []
    return [tile for tile in TILES[kernel][head_dim] if tile not in left_out]


def _tuned(function, kernel: str):
    """Times the candidates at the first call of each kind and keeps the winner on disk, beside Triton's other files."""
    every = [_INTERPRETER_TILE] if INTERPRETED else [FLOAT32_TILE, *itertools.chain(*TILES[kernel].values())]
    configs = {
        tile: triton.Config({"BLOCK_M": tile[0], "BLOCK_N": tile[1]}, num_warps=tile[2], num_stages=tile[3])
        for tile in every
    }

    def prune(_, named, **options):
        arguments = {**named, **options}
        call = arguments["HEAD_DIM"], arguments["q_ptr"].dtype, arguments["DOCUMENTS"]
        return [configs[tile] for tile in tiles(kernel, *call)]

    return triton.autotune(
        list(configs.values()),
        key=["HEAD_DIM", "CAUSAL", "DROPOUT", "DOCUMENTS", "length_class"],
        prune_configs_by={"early_config_prune": prune},
        cache_results=True,
    )(function)


_forward, _dq, _dkv = _tuned(_forward_kernel, "forward"), _tuned(_dq_kernel, "dq"), _tuned(_dkv_kernel, "dkv")


def _int32(word: int) -> int:
    """The int32 with the same bits as the low 32 bits of word."""
    word &= 0xFFFFFFFF
    return word - (1 << 32) if word >= 1 << 31 else word


def _common(
    q: Tensor, k: Tensor, cu_q: Tensor | None, causal: bool, scale: float, dropout_p: float, seed: int
) -> tuple:
    """The arguments from `documents` on, but for the tile sizes."""
    _, seqlen_q, heads, head_dim = q.shape
    threshold = dropout_threshold(dropout_p)
    return (
        0 if cu_q is None else cu_q.shape[0] - 1, seqlen_q, k.shape[1], heads, heads // k.shape[2], scale,
        dropout_scale(dropout_p), threshold, _int32(seed), _int32(seed >> 32),
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


def _on(device: torch.device):
    return torch.cuda.device(device) if device.type == "cuda" else torch.no_grad()


def attention_forward(
    q: Tensor, k: Tensor, v: Tensor, cu_seqlens_q: Tensor | None, cu_seqlens_k: Tensor | None,
    causal: bool, scale: float, dropout_p: float, dropout_seed: int,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """out (contiguous) and the log-sum-exp (batch, heads, seqlen_q) of `kernels.flash_attention`."""
    q, scale = _positive(q, scale)
    q, k, v = (rows_contiguous(x) for x in (q, k, v))
    out = q.new_empty(q.shape)
    lse = torch.empty((q.shape[0], q.shape[2], q.shape[1]), dtype=torch.float32, device=q.device)
    if cu_seqlens_q is not None:
        out.zero_(), lse.fill_(-math.inf)  # rows that no document holds
    with _on(q.device):
        _forward[_grid(q, cu_seqlens_q, "BLOCK_M")](
            q, k, v, out, lse, *_offsets(cu_seqlens_q, cu_seqlens_k, q),
            *q.stride()[:3], *k.stride()[:3], *v.stride()[:3], *out.stride()[:3],
            *_common(q, k, cu_seqlens_q, causal, scale, dropout_p, dropout_seed),
        )  # fmt: skip
    return out, lse


def attention_backward(
    grad_out: Tensor, q: Tensor, k: Tensor, v: Tensor, out: Tensor, lse: Tensor,
    cu_seqlens_q: Tensor | None, cu_seqlens_k: Tensor | None,
    causal: bool, scale: float, dropout_p: float, dropout_seed: int,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    """Gradients of q, k, v (contiguous), bitwise reproducible."""
    negative = scale < 0
    q, scale = _positive(q, scale)
    grad_out, q, k, v, out = (rows_contiguous(x) for x in (grad_out, q, k, v, out))
    lse = lse.contiguous()
    dq, dk, dv = (x.new_empty(x.shape) for x in (q, k, v))
    delta = torch.empty_like(lse)
    if cu_seqlens_q is not None:
        dq.zero_(), dk.zero_(), dv.zero_()
    cu = _offsets(cu_seqlens_q, cu_seqlens_k, q)
    common = _common(q, k, cu_seqlens_q, causal, scale, dropout_p, dropout_seed)
    strides = [stride for x in (grad_out, q, k, v) for stride in x.stride()[:3]]
    with _on(q.device):
        _dq[_grid(q, cu_seqlens_q, "BLOCK_M")](
            grad_out, q, k, v, out, lse, dq, delta, *cu, *strides, *out.stride()[:3], *dq.stride()[:3], *common
        )
        _dkv[_grid(k, cu_seqlens_q, "BLOCK_N")](
            grad_out, q, k, v, lse, delta, dk, dv, *cu, *strides, *dk.stride()[:3], *dv.stride()[:3], *common
        )
    return -dq if negative else dq, dk, dv
