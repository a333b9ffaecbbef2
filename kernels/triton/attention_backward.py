"""The backward kernels of `kernels.triton.attention`: dq (and delta), then dk and dv."""

import triton
import triton.language as tl

from kernels.triton.attention_tiles import find_problem, key_range, load_rows, store_rows, visible
from kernels.triton.numeric import ATTENTION_OFFSET, LOG2E, dot, keep, round_to


@triton.jit
def _dq_loop(
    dq, q, grad, lse, delta, k_ptr, v_ptr, k_seq, v_seq, first_row, begin, end, seqlen_q, seqlen_k, scale, keep_scale,
    plane, threshold, seed_low, seed_high,
    HEAD_DIM: tl.constexpr, CAUSAL: tl.constexpr, DROPOUT: tl.constexpr, MASKED: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
):  # fmt: skip
    for first_column in range(begin, end, BLOCK_N):
        k = load_rows(k_ptr, first_column, k_seq, seqlen_k, BLOCK_N, HEAD_DIM, MASKED)
        v = load_rows(v_ptr, first_column, v_seq, seqlen_k, BLOCK_N, HEAD_DIM, MASKED)
        p = tl.exp2(dot(q, tl.trans(k)) * (scale * LOG2E) - lse[:, None])
        if MASKED:  # also where lse is -inf, and p infinite
            row, column = first_row + tl.arange(0, BLOCK_M)[:, None], first_column + tl.arange(0, BLOCK_N)[None, :]
            p = tl.where(visible(row, column, seqlen_q, seqlen_k, CAUSAL), p, 0.0)
        dp = dot(grad, tl.trans(v))
        if DROPOUT:
            kept = keep(
                seed_low, seed_high, ATTENTION_OFFSET, plane, first_row, first_column, threshold, BLOCK_M, BLOCK_N, False
            )  # fmt: skip
            dp = tl.where(kept, dp * keep_scale, 0.0)
        ds = p * (dp - delta[:, None])
        dq = dot(round_to(ds, k.dtype), k, dq)
    return dq


@triton.jit(do_not_specialize=["seed_low", "seed_high", "threshold", "length_class"])
def dq_kernel(
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
    batch, problem, head, first_row, start_q, seqlen_q, start_k, seqlen_k = find_problem(
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
    q = load_rows(q_ptr, first_row, q_seq, seqlen_q, BLOCK_M, HEAD_DIM, True)
    grad = load_rows(grad_ptr, first_row, grad_seq, seqlen_q, BLOCK_M, HEAD_DIM, True)
    out = load_rows(out_ptr, first_row, out_seq, seqlen_q, BLOCK_M, HEAD_DIM, True)
    delta = tl.sum(grad.to(tl.float32) * out.to(tl.float32), 1)
    tl.store(delta_ptr + statistics + row, delta, mask=row < seqlen_q)
    lse = tl.load(lse_ptr + statistics + row, mask=row < seqlen_q, other=float("inf")) * LOG2E
    dq = tl.zeros((BLOCK_M, HEAD_DIM), tl.float32)
    plane = problem * heads + tl.cast(head, tl.int32)
    whole, end = key_range(first_row, seqlen_q, seqlen_k, CAUSAL, BLOCK_M, BLOCK_N)
    dq = _dq_loop(
        dq, q, grad, lse, delta, k_ptr, v_ptr, k_seq, v_seq, first_row, 0, whole, seqlen_q, seqlen_k, scale,
        keep_scale, plane, threshold, seed_low, seed_high, HEAD_DIM, CAUSAL, DROPOUT, False, BLOCK_M, BLOCK_N,
    )  # fmt: skip
    dq = _dq_loop(
        dq, q, grad, lse, delta, k_ptr, v_ptr, k_seq, v_seq, first_row, whole, end, seqlen_q, seqlen_k, scale,
        keep_scale, plane, threshold, seed_low, seed_high, HEAD_DIM, CAUSAL, DROPOUT, True, BLOCK_M, BLOCK_N,
    )  # fmt: skip
    store_rows(dq_ptr, dq * scale, first_row, dq_seq, seqlen_q, BLOCK_M, HEAD_DIM)


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
        q = load_rows(q_ptr, first_row, q_seq, seqlen_q, BLOCK_M, HEAD_DIM, True)
        grad = load_rows(grad_ptr, first_row, grad_seq, seqlen_q, BLOCK_M, HEAD_DIM, True)
        lse = tl.load(lse_ptr + row, mask=row < seqlen_q, other=float("inf")) * LOG2E
        delta = tl.load(delta_ptr + row, mask=row < seqlen_q, other=0.0)
        # Tiles transposed, (keys, rows), so that p and ds are left operands as they lie in registers.
        p = tl.exp2(dot(k, tl.trans(q)) * (scale * LOG2E) - lse[None, :])
        if MASKED:
            column = first_column + tl.arange(0, BLOCK_N)[:, None]
            p = tl.where(visible(row[None, :], column, seqlen_q, seqlen_k, CAUSAL), p, 0.0)
        dp = dot(v, tl.trans(grad))
        dropped = p
        if DROPOUT:
            kept = keep(
                seed_low, seed_high, ATTENTION_OFFSET, plane, first_row, first_column, threshold, BLOCK_M, BLOCK_N, True
            )  # fmt: skip
            dropped = tl.where(kept, p * keep_scale, 0.0)
            dp = tl.where(kept, dp * keep_scale, 0.0)
        dv = dot(round_to(dropped, grad.dtype), grad, dv)
        dk = dot(round_to(p * (dp - delta[None, :]), q.dtype), q, dk)
    return dk, dv


@triton.jit(do_not_specialize=["seed_low", "seed_high", "threshold", "length_class"])
def dkv_kernel(
    grad_ptr, q_ptr, k_ptr, v_ptr, lse_ptr, delta_ptr, dk_ptr, dv_ptr, cu_q_ptr, cu_k_ptr,
    grad_batch, grad_seq, grad_head, q_batch, q_seq, q_head, k_batch, k_seq, k_head, v_batch, v_seq, v_head,
    dk_batch, dk_seq, dk_head, dv_batch, dv_seq, dv_head,
    documents, seqlen_q, seqlen_k, heads, group, scale, keep_scale, threshold, seed_low, seed_high, length_class,
    HEAD_DIM: tl.constexpr, CAUSAL: tl.constexpr, DROPOUT: tl.constexpr, DOCUMENTS: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
):  # fmt: skip
    rows = seqlen_q
    # The first keys are seen by most rows: tiles are in the right order as they are.
    batch, problem, kv_head, first_column, start_q, seqlen_q, start_k, seqlen_k = find_problem(
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

    k = load_rows(k_ptr, first_column, k_seq, seqlen_k, BLOCK_N, HEAD_DIM, True)
    v = load_rows(v_ptr, first_column, v_seq, seqlen_k, BLOCK_N, HEAD_DIM, True)
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
    store_rows(dk_ptr, dk * scale, first_column, dk_seq, seqlen_k, BLOCK_N, HEAD_DIM)
    store_rows(dv_ptr, dv, first_column, dv_seq, seqlen_k, BLOCK_N, HEAD_DIM)
