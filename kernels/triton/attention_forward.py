"""The forward kernel of `kernels.triton.attention`."""

import triton
import triton.language as tl

from kernels.triton.attention_tiles import find_problem, key_range, load_rows, matrix_of, store_rows, visible
from kernels.triton.numeric import LOG2E, attention_keep, dot, round_to


@triton.jit
def _forward_loop(
    # The sum of P V so far, float32 (BLOCK_M, HEAD_DIM), not yet divided by the sum of P; that and the largest score,
    # not scaled, float32 (BLOCK_M,).
    accumulated, total, maximum,
    # q (BLOCK_M, HEAD_DIM); keys and values as `matrix_of` gives them, gone over from begin to end.
    q, keys, values, first_row, begin, end, seqlen_q, seqlen_k,
    scale,  # of the scores, times log2(e)
    plane, threshold, seed_low, seed_high,  # plane: the head's number among all, of all documents
    HEAD_DIM: tl.constexpr, CAUSAL: tl.constexpr, DROPOUT: tl.constexpr, MASKED: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
):  # fmt: skip
    for first_column in range(begin, end, BLOCK_N):
        k = load_rows(keys, first_column, seqlen_k, BLOCK_N, HEAD_DIM, MASKED)
        scores = dot(q, tl.trans(k))  # not yet scaled, as maximum
        if MASKED:
            row, column = first_row + tl.arange(0, BLOCK_M)[:, None], first_column + tl.arange(0, BLOCK_N)[None, :]
            seen = visible(row, column, seqlen_q, seqlen_k, CAUSAL)
            scores = tl.where(seen, scores, float("-inf"))
        new = tl.maximum(maximum, tl.max(scores, 1))
        # The maximum is taken off first, so that its P is 1 however large it is: after a product that rounds it would
        # be 2^(the rounding). Each exp2 here is of at most 0. A row with no score above -inf: of -inf, not of -inf +
        # inf.
        shift = tl.where(new == float("-inf"), 0.0, new)
        p = tl.exp2((scores - shift[:, None]) * scale)
        decay = tl.exp2((maximum - shift) * scale)
        total = total * decay + tl.sum(p, 1)
        accumulated = accumulated * decay[:, None]
        if DROPOUT:
            kept = attention_keep(
                seed_low, seed_high, plane, first_row, first_column, threshold, BLOCK_M, BLOCK_N, False
            )
            p = tl.where(kept, p, 0.0)
        v = load_rows(values, first_column, seqlen_k, BLOCK_N, HEAD_DIM, MASKED)
        accumulated = dot(round_to(p, v.dtype), v, accumulated)
        maximum = new
    return accumulated, total, maximum


@triton.jit(do_not_specialize=["seed_low", "seed_high", "threshold", "length_class"])
def forward_kernel(
    # (batch, seqlen, heads, head_dim), k and v with heads / group; of documents (1, tokens, …).
    q_ptr, k_ptr, v_ptr, out_ptr,
    lse_ptr,  # float32 (batch, heads, seqlen_q), by natural logarithm
    cu_q_ptr, cu_k_ptr,  # int32 (documents + 1,), read with DOCUMENTS only
    # Elements from one batch, token or head to the next; along head_dim they are 1 apart.
    q_batch, q_seq, q_head, k_batch, k_seq, k_head, v_batch, v_seq, v_head, out_batch, out_seq, out_head,
    documents, seqlen_q, seqlen_k, heads, group,
    scale, keep_scale,  # of the scores; 1 / (1 - dropout_p)
    threshold, seed_low, seed_high,  # a random byte below it is dropped; the seed's two words, or pointers to them
    length_class,  # which tuning counts; not used
    HEAD_DIM: tl.constexpr, CAUSAL: tl.constexpr, DROPOUT: tl.constexpr, DOCUMENTS: tl.constexpr,
    DESCRIPTORS: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, TMA: tl.constexpr,
    q_rows, k_rows, v_rows,  # descriptors, or None
):  # fmt: skip
    tile = tl.program_id(1)
    if CAUSAL:
        tile = tl.num_programs(1) - 1 - tile  # the last rows see most keys
    rows = seqlen_q
    batch, problem, head, first_row, start_q, seqlen_q, start_k, seqlen_k = find_problem(
        cu_q_ptr, cu_k_ptr, documents, tile, tl.program_id(0), heads, seqlen_q, seqlen_k, DOCUMENTS, False, BLOCK_M
    )
    if first_row >= seqlen_q:
        return
    queries = matrix_of(q_ptr, q_rows, batch, head, start_q, q_batch, q_seq, q_head)
    keys = matrix_of(k_ptr, k_rows, batch, head // group, start_k, k_batch, k_seq, k_head)
    values = matrix_of(v_ptr, v_rows, batch, head // group, start_k, v_batch, v_seq, v_head)
    result = matrix_of(out_ptr, None, batch, head, start_q, out_batch, out_seq, out_head)
    lse_ptr += (tl.cast(batch, tl.int64) * heads + head) * rows + start_q

    q = load_rows(queries, first_row, seqlen_q, BLOCK_M, HEAD_DIM, True)
    accumulated = tl.zeros((BLOCK_M, HEAD_DIM), tl.float32)
    total = tl.zeros((BLOCK_M,), tl.float32)
    maximum = tl.full((BLOCK_M,), float("-inf"), tl.float32)
    plane = problem * heads + head
    whole, end = key_range(first_row, seqlen_q, seqlen_k, CAUSAL, BLOCK_M, BLOCK_N)
    accumulated, total, maximum = _forward_loop(
        accumulated, total, maximum, q, keys, values, first_row, 0, whole, seqlen_q, seqlen_k,
        scale * LOG2E, plane, threshold, seed_low, seed_high, HEAD_DIM, CAUSAL, DROPOUT, False, BLOCK_M, BLOCK_N,
    )  # fmt: skip
    accumulated, total, maximum = _forward_loop(
        accumulated, total, maximum, q, keys, values, first_row, whole, end, seqlen_q, seqlen_k,
        scale * LOG2E, plane, threshold, seed_low, seed_high, HEAD_DIM, CAUSAL, DROPOUT, True, BLOCK_M, BLOCK_N,
    )  # fmt: skip
    # A row without a visible key has total 0: zeros, and lse = -inf.
    accumulated = accumulated * (keep_scale / tl.where(total == 0.0, 1.0, total))[:, None]
    store_rows(result, accumulated, first_row, seqlen_q, BLOCK_M, HEAD_DIM)
    row = first_row + tl.arange(0, BLOCK_M)
    lse = tl.where(total == 0.0, float("-inf"), maximum * scale + tl.log(tl.where(total == 0.0, 1.0, total)))
    lse = tl.where(maximum == float("inf"), maximum, lse)  # whose total is NaN
    tl.store(lse_ptr + row, lse, mask=row < seqlen_q)
