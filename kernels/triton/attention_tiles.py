"""Tiles of attention: which part of which sequence a program owns, how its rows are read, which scores count."""

import triton
import triton.language as tl

from kernels.triton.numeric import round_to


@triton.jit
def find_problem(
    cu_q_ptr,  # int32 (documents + 1,), read with DOCUMENTS only
    cu_k_ptr,
    documents,
    tile,  # number of the tile
    index,
    heads,
    seqlen_q,
    seqlen_k,
    DOCUMENTS: tl.constexpr,
    BY_KEYS: tl.constexpr,  # tiles are of keys, else of queries
    BLOCK: tl.constexpr,  # rows of a tile
):
    """(batch, document or batch, head, first row, and where queries and keys start and how many there are).

    index: which (batch, head), or which head of packed documents, whose tiles are counted through.
    """
    batch, head = index // heads, index % heads
    problem, start_q, start_k = batch, 0, 0
    first = tile * BLOCK
    if DOCUMENTS:
        batch, head = 0, index
        # Offsets that nobody has looked at count as their running maximum, inside the sequence.
        total_q, total_k = seqlen_q, seqlen_k
        q1 = tl.minimum(tl.maximum(tl.load(cu_q_ptr), 0), total_q)
        k1 = tl.minimum(tl.maximum(tl.load(cu_k_ptr), 0), total_k)
        before, problem, start_q, seqlen_q, start_k, seqlen_k = 0, 0, 0, 0, 0, 0
        for document in range(documents):
            q0, k0 = q1, k1
            q1 = tl.minimum(tl.maximum(tl.load(cu_q_ptr + document + 1), q0), total_q)
            k1 = tl.minimum(tl.maximum(tl.load(cu_k_ptr + document + 1), k0), total_k)
            tiles = (((k1 - k0) if BY_KEYS else (q1 - q0)) + BLOCK - 1) // BLOCK
            here = (tile >= before) & (tile < before + tiles)
            first = tl.where(here, (tile - before) * BLOCK, first)
            problem = tl.where(here, document, problem)
            start_q, seqlen_q = tl.where(here, q0, start_q), tl.where(here, q1 - q0, seqlen_q)
            start_k, seqlen_k = tl.where(here, k0, start_k), tl.where(here, k1 - k0, seqlen_k)
            before = before + tiles
    return batch, problem, head, first, start_q, seqlen_q, start_k, seqlen_k


@triton.jit
def matrix_of(ptr, descriptor, batch, head, start, batch_stride, seq_stride, head_stride):
    """One head's (seq, head_dim) matrix, from row `start` on, as `load_rows` takes it.

    (pointer, stride of a row), or, of a descriptor (`descriptors.head_rows`; start is 0 then), (descriptor, batch,
    head).
    """
    if descriptor is None:
        at = tl.cast(batch, tl.int64) * batch_stride + tl.cast(start, tl.int64) * seq_stride
        return ptr + at + tl.cast(head, tl.int64) * head_stride, seq_stride
    else:
        return descriptor, batch, head


@triton.jit
def load_rows(matrix, first, limit, BLOCK: tl.constexpr, HEAD_DIM: tl.constexpr, MASKED: tl.constexpr):
    """Rows [first, first + BLOCK) of a (limit, HEAD_DIM) matrix; MASKED: rows from `limit` on are zeros.

    A descriptor, which knows the limit, gives zeros in any case.
    """
    if len(matrix) == 3:
        return tl.reshape(matrix[0].load([matrix[1], matrix[2], first, 0]), (BLOCK, HEAD_DIM))
    else:
        row = first + tl.arange(0, BLOCK)
        address = matrix[0] + row.to(tl.int64)[:, None] * matrix[1] + tl.arange(0, HEAD_DIM)[None, :]
        if MASKED:
            return tl.load(address, mask=row[:, None] < limit, other=0.0)
        else:
            return tl.load(address)


@triton.jit
def store_rows(matrix, value, first, limit, BLOCK: tl.constexpr, HEAD_DIM: tl.constexpr):
    row = first + tl.arange(0, BLOCK)
    address = matrix[0] + row.to(tl.int64)[:, None] * matrix[1] + tl.arange(0, HEAD_DIM)[None, :]
    tl.store(address, round_to(value, matrix[0].dtype.element_ty), mask=row[:, None] < limit)


@triton.jit
def visible(row, column, seqlen_q, seqlen_k, CAUSAL: tl.constexpr):
    """Which scores count; row and column are indices that broadcast to the tile."""
    seen = column < seqlen_k
    if CAUSAL:
        seen = seen & (column <= row + (seqlen_k - seqlen_q))
    return seen


@triton.jit
def key_range(first_row, seqlen_q, seqlen_k, CAUSAL: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr):
    """Query rows [first_row, +BLOCK_M) see every key before the first of these, and no key from the second on."""
    whole, end = seqlen_k, seqlen_k
    if CAUSAL:
        offset = seqlen_k - seqlen_q + 1
        whole = tl.minimum(whole, tl.maximum(first_row + offset, 0))
        end = tl.minimum(end, tl.maximum(tl.minimum(first_row + BLOCK_M, seqlen_q) - 1 + offset, 0))
    return whole // BLOCK_N * BLOCK_N, end
