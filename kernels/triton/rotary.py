"""Partial rotary on q and k in one launch.

A program turns all heads of one token of q or k: a (heads, half) tile of pairs, and copies the dims that are
not rotated. Memory bound: each element is read and written once.
"""

import triton
import triton.language as tl
from torch import Tensor

from kernels.native import on_device, rows_contiguous
from kernels.triton.numeric import round_to


@triton.jit
def _turn(
    x_ptr,  # one token's (heads, HEAD_DIM), as out
    out_ptr,
    c,  # float32 (1, BLOCK_HALF): cosines, as s of the sines
    s,
    x_head_stride,
    out_head_stride,
    heads,
    HALF: tl.constexpr,
    HEAD_DIM: tl.constexpr,
    BLOCK_HEADS: tl.constexpr,
    BLOCK_HALF: tl.constexpr,
    BLOCK_REST: tl.constexpr,
):
    i = tl.arange(0, BLOCK_HALF)[None, :]
    rest = tl.arange(0, BLOCK_REST)[None, :] + 2 * HALF
    for start in range(0, heads, BLOCK_HEADS):
        head = (start + tl.arange(0, BLOCK_HEADS)).to(tl.int64)[:, None]  # a head may lie 2^31 elements on
        x, out = x_ptr + head * x_head_stride, out_ptr + head * out_head_stride
        mask = (head < heads) & (i < HALF)
        a = tl.load(x + i, mask=mask, other=0.0).to(tl.float32)
        b = tl.load(x + i + HALF, mask=mask, other=0.0).to(tl.float32)
        tl.store(out + i, round_to(a * c - b * s, out_ptr.dtype.element_ty), mask=mask)
        tl.store(out + i + HALF, round_to(b * c + a * s, out_ptr.dtype.element_ty), mask=mask)
        if HEAD_DIM > 2 * HALF:
            mask = (head < heads) & (rest < HEAD_DIM)
            tl.store(out + rest, tl.load(x + rest, mask=mask), mask=mask)


@triton.jit
def rotary_kernel(
    q_ptr,  # (batch, seq, heads, head_dim), as q_out
    k_ptr,  # (batch, seq, kv_heads, head_dim), as k_out
    q_out_ptr,
    k_out_ptr,
    cos_ptr,  # float32 (positions, HALF), as sin
    sin_ptr,
    position_ptr,  # int64 (seq,) or (batch, seq), read with HAS_POSITIONS only
    q_batch,  # elements from one batch, token or head to the next; along head_dim they are 1 apart
    q_seq,
    q_head,
    k_batch,
    k_seq,
    k_head,
    q_out_batch,
    q_out_seq,
    q_out_head,
    k_out_batch,
    k_out_seq,
    k_out_head,
    position_batch,  # elements from one batch's positions to the next's, 0 where they share them
    seq,
    heads,
    kv_heads,
    HALF: tl.constexpr,  # pairs that are turned
    HEAD_DIM: tl.constexpr,
    BLOCK_HEADS: tl.constexpr,  # heads at a time
    BLOCK_HALF: tl.constexpr,  # HALF, up to a power of 2
    BLOCK_REST: tl.constexpr,  # dims that are not turned, up to a power of 2
    INVERSE: tl.constexpr,  # turn back
    HAS_POSITIONS: tl.constexpr,
):
    token = tl.program_id(0).to(tl.int64)
    batch, t = token // seq, token % seq
    row = t
    if HAS_POSITIONS:
        row = tl.load(position_ptr + batch * position_batch + t)
    i = tl.arange(0, BLOCK_HALF)[None, :]
    c = tl.load(cos_ptr + row * HALF + i, mask=i < HALF, other=0.0)
    s = tl.load(sin_ptr + row * HALF + i, mask=i < HALF, other=0.0)
    if INVERSE:
        s = -s
    if tl.program_id(1) == 0:
        _turn(
            q_ptr + batch * q_batch + t * q_seq,
            q_out_ptr + batch * q_out_batch + t * q_out_seq,
            c,
            s,
            q_head,
            q_out_head,
            heads,
            HALF,
            HEAD_DIM,
            BLOCK_HEADS,
            BLOCK_HALF,
            BLOCK_REST,
        )
    else:
        _turn(
            k_ptr + batch * k_batch + t * k_seq,
            k_out_ptr + batch * k_out_batch + t * k_out_seq,
            c,
            s,
            k_head,
            k_out_head,
            kv_heads,
            HALF,
            HEAD_DIM,
            BLOCK_HEADS,
            BLOCK_HALF,
            BLOCK_REST,
        )


def rotary(
    q: Tensor, k: Tensor, cos: Tensor, sin: Tensor, positions: Tensor | None, inverse: bool
) -> tuple[Tensor, Tensor]:
    """q and k rotated into new contiguous tensors; see `kernels.apply_rotary`."""
    q, k, cos, sin = rows_contiguous(q), rows_contiguous(k), cos.contiguous(), sin.contiguous()
    q_out, k_out = q.new_empty(q.shape), k.new_empty(k.shape)
    batch, seq, heads, head_dim = q.shape
    half = cos.shape[1]
    if batch * seq == 0:
        return q_out, k_out
    positions = None if positions is None else positions.contiguous()
    with on_device(q):
        rotary_kernel[(batch * seq, 2)](
            q,
            k,
            q_out,
            k_out,
            cos,
            sin,
            q if positions is None else positions,
            *q.stride()[:3],
            *k.stride()[:3],
            *q_out.stride()[:3],
            *k_out.stride()[:3],
            positions.stride(0) if positions is not None and positions.dim() == 2 else 0,
            seq,
            heads,
            k.shape[2],
            HALF=half,
            HEAD_DIM=head_dim,
            BLOCK_HEADS=16,
            BLOCK_HALF=triton.next_power_of_2(half),
            BLOCK_REST=triton.next_power_of_2(max(head_dim - 2 * half, 1)),
            INVERSE=inverse,
            HAS_POSITIONS=positions is not None,
        )
    return q_out, k_out
