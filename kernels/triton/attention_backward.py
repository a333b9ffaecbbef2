"""The backward kernels of `kernels.triton.attention`: dq (and delta), then dk and dv."""

import triton
import triton.language as tl

from kernels.triton.attention_tiles import find_problem, key_range, load_rows, matrix_of, store_rows, visible
from kernels.triton.numeric import LOG2E, attention_keep, dot, round_to


@triton.jit
def _load_lse(ptr, row, seqlen_q):
    """What P = exp2(scores scale log2(e) - lse) takes for the rows' lse, in units of log2.

    Infinite, which makes P = 0, for rows past the end and rows without a score above -inf. P is known to a factor of
    e^(the rounding of lse): from 2^24 on that says nothing any more. There lse is lowered by more than it and the
    products have been rounded by, and with P <= 1, as it is in truth, a lone greatest score has P = 1 and its gradient.
    """
    lse = tl.load(ptr + row, mask=row < seqlen_q, other=float("inf")) * LOG2E
    lowered = lse * tl.where(lse > 0.0, 1.0 - 2**-21, 1.0 + 2**-21)
    return tl.where(lse == float("-inf"), float("inf"), tl.where(tl.abs(lse) < 2.0**24, lse, lowered))


@triton.jit
def _probabilities(scores, lse, scale):
    """P of scores that are not yet scaled: at most 1, where rounding would make it more; NaN stays."""
    return tl.exp2(tl.minimum(scores * (scale * LOG2E) - lse, 0.0, propagate_nan=tl.PropagateNan.ALL))


@triton.jit
def _dq_loop(
    dq,  # float32 (BLOCK_M, HEAD_DIM), not yet scaled
    q, grad, lse, delta,  # (BLOCK_M, HEAD_DIM); float32 (BLOCK_M,), lse as `_load_lse` gives it
    keys, values, first_row, begin, end,  # matrices as `matrix_of` gives them, gone over from begin to end
    seqlen_q, seqlen_k, scale, keep_scale, plane, threshold, seed_low, seed_high,
    HEAD_DIM: tl.constexpr, CAUSAL: tl.constexpr, DROPOUT: tl.constexpr, MASKED: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
):  # fmt: skip
    for first_column in range(begin, end, BLOCK_N):
        k = load_rows(keys, first_column, seqlen_k, BLOCK_N, HEAD_DIM, MASKED)
        v = load_rows(values, first_column, seqlen_k, BLOCK_N, HEAD_DIM, MASKED)
        p = _probabilities(dot(q, tl.trans(k)), lse[:, None], scale)
        if MASKED:
            row, column = first_row + tl.arange(0, BLOCK_M)[:, None], first_column + tl.arange(0, BLOCK_N)[None, :]
            p = tl.where(visible(row, column, seqlen_q, seqlen_k, CAUSAL), p, 0.0)
        dp = dot(grad, tl.trans(v))
        if DROPOUT:
            kept = attention_keep(
                seed_low, seed_high, plane, first_row, first_column, threshold, BLOCK_M, BLOCK_N, False
            )
            dp = tl.where(kept, dp * keep_scale, 0.0)
        ds = p * (dp - delta[:, None])
        dq = dot(round_to(ds, k.dtype), k, dq)
    return dq


@triton.jit(do_not_specialize=["seed_low", "seed_high", "threshold", "length_class"])
def dq_kernel(
    # (batch, seqlen, heads, head_dim), k and v with heads / group; of documents (1, tokens, …). grad: of out.
    grad_ptr, q_ptr, k_ptr, v_ptr, out_ptr,
    lse_ptr, dq_ptr, delta_ptr,  # lse and delta float32 (batch, heads, seqlen_q); delta is written, for `dkv_kernel`
    cu_q_ptr, cu_k_ptr,  # int32 (documents + 1,), read with DOCUMENTS only
    # Elements from one batch, token or head to the next; along head_dim they are 1 apart.
    grad_batch, grad_seq, grad_head, q_batch, q_seq, q_head, k_batch, k_seq, k_head, v_batch, v_seq, v_head,
    out_batch, out_seq, out_head, dq_batch, dq_seq, dq_head,
    documents, seqlen_q, seqlen_k, heads, group, scale, keep_scale, threshold, seed_low, seed_high, length_class,
    HEAD_DIM: tl.constexpr, CAUSAL: tl.constexpr, DROPOUT: tl.constexpr, DOCUMENTS: tl.constexpr,
    DESCRIPTORS: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, TMA: tl.constexpr,
    grad_rows, q_rows, k_rows, v_rows,
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
    queries = matrix_of(q_ptr, q_rows, batch, head, start_q, q_batch, q_seq, q_head)
    grads = matrix_of(grad_ptr, grad_rows, batch, head, start_q, grad_batch, grad_seq, grad_head)
    outs = matrix_of(out_ptr, None, batch, head, start_q, out_batch, out_seq, out_head)
    keys = matrix_of(k_ptr, k_rows, batch, head // group, start_k, k_batch, k_seq, k_head)
    values = matrix_of(v_ptr, v_rows, batch, head // group, start_k, v_batch, v_seq, v_head)
    result = matrix_of(dq_ptr, None, batch, head, start_q, dq_batch, dq_seq, dq_head)
    statistics = (tl.cast(batch, tl.int64) * heads + head) * rows + start_q

    row = first_row + tl.arange(0, BLOCK_M)
    q = load_rows(queries, first_row, seqlen_q, BLOCK_M, HEAD_DIM, True)
    grad = load_rows(grads, first_row, seqlen_q, BLOCK_M, HEAD_DIM, True)
    out = load_rows(outs, first_row, seqlen_q, BLOCK_M, HEAD_DIM, True)
    delta = tl.sum(grad.to(tl.float32) * out.to(tl.float32), 1)
    tl.store(delta_ptr + statistics + row, delta, mask=row < seqlen_q)
    lse = _load_lse(lse_ptr + statistics, row, seqlen_q)
    dq = tl.zeros((BLOCK_M, HEAD_DIM), tl.float32)
    plane = problem * heads + head
    whole, end = key_range(first_row, seqlen_q, seqlen_k, CAUSAL, BLOCK_M, BLOCK_N)
    dq = _dq_loop(
        dq, q, grad, lse, delta, keys, values, first_row, 0, whole, seqlen_q, seqlen_k, scale, keep_scale,
        plane, threshold, seed_low, seed_high, HEAD_DIM, CAUSAL, DROPOUT, False, BLOCK_M, BLOCK_N,
    )  # fmt: skip
    dq = _dq_loop(
        dq, q, grad, lse, delta, keys, values, first_row, whole, end, seqlen_q, seqlen_k, scale, keep_scale,
        plane, threshold, seed_low, seed_high, HEAD_DIM, CAUSAL, DROPOUT, True, BLOCK_M, BLOCK_N,
    )  # fmt: skip
    store_rows(result, dq * scale, first_row, seqlen_q, BLOCK_M, HEAD_DIM)


@triton.jit
def _dkv_loop(
    dk, dv,  # float32 (BLOCK_N, HEAD_DIM), dk not yet scaled
    k, v,  # (BLOCK_N, HEAD_DIM)
    grads, queries, lse_ptr, delta_ptr,  # matrices as `matrix_of` gives them; of the head's first query
    first_column, begin, end, seqlen_q, seqlen_k, scale, keep_scale, plane, threshold, seed_low, seed_high,
    HEAD_DIM: tl.constexpr, CAUSAL: tl.constexpr, DROPOUT: tl.constexpr, MASKED: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
):  # fmt: skip
    for first_row in range(begin, end, BLOCK_M):
        row = first_row + tl.arange(0, BLOCK_M)
        q = load_rows(queries, first_row, seqlen_q, BLOCK_M, HEAD_DIM, True)
        grad = load_rows(grads, first_row, seqlen_q, BLOCK_M, HEAD_DIM, True)
        lse = _load_lse(lse_ptr, row, seqlen_q)
        delta = tl.load(delta_ptr + row, mask=row < seqlen_q, other=0.0)
        # Tiles transposed, (keys, rows), so that p and ds are left operands as they lie in registers.
        p = _probabilities(dot(k, tl.trans(q)), lse[None, :], scale)
        p = tl.where(row[None, :] < seqlen_q, p, 0.0)  # q is zeros there, which times an infinite key is no number
        if MASKED:
            column = first_column + tl.arange(0, BLOCK_N)[:, None]
            p = tl.where(visible(row[None, :], column, seqlen_q, seqlen_k, CAUSAL), p, 0.0)
        dp = dot(v, tl.trans(grad))
        dropped = p
        if DROPOUT:
            kept = attention_keep(
                seed_low, seed_high, plane, first_row, first_column, threshold, BLOCK_M, BLOCK_N, True
            )
            dropped = tl.where(kept, p * keep_scale, 0.0)
            dp = tl.where(kept, dp * keep_scale, 0.0)
        dv = dot(round_to(dropped, grad.dtype), grad, dv)
        dk = dot(round_to(p * (dp - delta[None, :]), q.dtype), q, dk)
    return dk, dv


@triton.jit(do_not_specialize=["seed_low", "seed_high", "threshold", "length_class"])
def dkv_kernel(
    # (batch, seqlen, heads, head_dim), k, v, dk and dv with heads / group; of documents (1, tokens, …). grad: of out.
    grad_ptr, q_ptr, k_ptr, v_ptr, lse_ptr, delta_ptr, dk_ptr, dv_ptr, cu_q_ptr, cu_k_ptr,
    grad_batch, grad_seq, grad_head, q_batch, q_seq, q_head, k_batch, k_seq, k_head, v_batch, v_seq, v_head,
    dk_batch, dk_seq, dk_head, dv_batch, dv_seq, dv_head,
    documents, seqlen_q, seqlen_k, heads, group, scale, keep_scale, threshold, seed_low, seed_high, length_class,
    HEAD_DIM: tl.constexpr, CAUSAL: tl.constexpr, DROPOUT: tl.constexpr, DOCUMENTS: tl.constexpr,
    DESCRIPTORS: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, TMA: tl.constexpr,
    grad_rows, q_rows, k_rows, v_rows,
):  # fmt: skip
    rows = seqlen_q
    # The first keys are seen by most rows: tiles are in the right order as they are.
    batch, problem, kv_head, first_column, start_q, seqlen_q, start_k, seqlen_k = find_problem(
        cu_q_ptr,
        cu_k_ptr,
        documents,
        tl.program_id(1),
        tl.program_id(0),
        heads // group,
        seqlen_q,
        seqlen_k,
        DOCUMENTS,
        True,
        BLOCK_N,
    )
    if first_column >= seqlen_k:
        return
    keys = matrix_of(k_ptr, k_rows, batch, kv_head, start_k, k_batch, k_seq, k_head)
    values = matrix_of(v_ptr, v_rows, batch, kv_head, start_k, v_batch, v_seq, v_head)
    dk_of_head = matrix_of(dk_ptr, None, batch, kv_head, start_k, dk_batch, dk_seq, dk_head)
    dv_of_head = matrix_of(dv_ptr, None, batch, kv_head, start_k, dv_batch, dv_seq, dv_head)

    k = load_rows(keys, first_column, seqlen_k, BLOCK_N, HEAD_DIM, True)
    v = load_rows(values, first_column, seqlen_k, BLOCK_N, HEAD_DIM, True)
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
        grads = matrix_of(grad_ptr, grad_rows, batch, head, start_q, grad_batch, grad_seq, grad_head)
        queries = matrix_of(q_ptr, q_rows, batch, head, start_q, q_batch, q_seq, q_head)
        statistics = (tl.cast(batch, tl.int64) * heads + head) * rows + start_q
        plane = problem * heads + head
        if CAUSAL:
            dk, dv = _dkv_loop(
                dk, dv, k, v, grads, queries, lse_ptr + statistics, delta_ptr + statistics, first_column, begin, whole,
                seqlen_q, seqlen_k, scale, keep_scale, plane, threshold, seed_low, seed_high, HEAD_DIM, CAUSAL, DROPOUT,
                True, BLOCK_M, BLOCK_N,
            )  # fmt: skip
        dk, dv = _dkv_loop(
            dk, dv, k, v, grads, queries, lse_ptr + statistics, delta_ptr + statistics, first_column, whole, seqlen_q,
            seqlen_q, seqlen_k, scale, keep_scale, plane, threshold, seed_low, seed_high, HEAD_DIM, CAUSAL, DROPOUT,
            False, BLOCK_M, BLOCK_N,
        )  # fmt: skip
    store_rows(dk_of_head, dk * scale, first_column, seqlen_k, BLOCK_N, HEAD_DIM)
    store_rows(dv_of_head, dv, first_column, seqlen_k, BLOCK_N, HEAD_DIM)
