"""The parallel block's two products with everything elementwise in their epilogues: persistent, grouped GEMMs.

A launch has a fixed number of programs, each of which takes every n-th output tile. Tiles are numbered so that
neighbours share GROUP rows of tiles: what they load of both operands stays in L2.

Rotary in the epilogue needs the two dims that one angle turns, HALF columns apart, in one thread. There are two ways:

- Loaded by pointers, the columns of a tile of q and k are numbered by pairs (`pair_columns`): the rows of W_in are
  loaded in that order, which costs nothing (a row is contiguous along the summed dim whatever its number), so that a
  pair's products are neighbours in the accumulator. Any tile width, any rotary width.
- Loaded by descriptors, rows come in their own order. With a HALF of `BLOCK_HALVES` a tile is whole blocks of
  2 HALF columns, and the halves of a block are taken apart; a thread holds both, as they are a multiple of 8 columns
  apart.

tl.reshape and tl.split take pairs apart inside a thread, in the layouts of mma.sync and of wgmma (the compiled TTGIR
has no layout conversion before or between the two, for sm_80 by pointers and for sm_90 either way), and each half is
stored in its own columns, runs of HALF. No tl.gather, no reload.
"""

import triton
import triton.language as tl

from kernels.triton.block_elementwise import find_region, load_angles, pair_columns, region_tiles, turn
from kernels.triton.numeric import activate, dot, residual_keep, round_to

BLOCK_HALVES = (8, 16, 32)
"""The HALF for which a tile of any candidate is whole blocks of 2 HALF columns, and so is a head that has a HALF so
wide.
"""


@triton.jit
def _block_columns(pair, HEAD_DIM: tl.constexpr, HALF: tl.constexpr):
    """As `pair_columns`, of pairs of columns HALF apart; the first block of a head turns, the others do not."""
    block = pair // HALF
    first = pair + block * HALF
    angle = tl.where(block % (HEAD_DIM // (2 * HALF)) == 0, pair % HALF, HALF)
    return first, first + HALF, angle


@triton.jit
def _grouped(tile, row_tiles, column_tiles, GROUP: tl.constexpr = 8):
    """(row, column) of an output tile: down GROUP rows first, then along the columns."""
    first = tile // (GROUP * column_tiles) * GROUP
    rows = tl.minimum(row_tiles - first, GROUP)
    within = tile % (GROUP * column_tiles)
    return first + within % rows, within // rows


@triton.jit
def _tile_product(
    a_ptr,  # (rows, summed), as b
    b_ptr,
    a_tiles,  # descriptors of both, or None
    b_tiles,
    a_row,  # (BLOCK_M,): the rows of a, and (BLOCK_N,) those of b, loaded by pointers
    b_row,
    first_a,  # the first row of each, loaded by descriptors
    first_b,
    summed,
    EVEN: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
):
    """A B^T in float32, of the rows from first_a and first_b on by descriptors, else of the rows a_row and b_row.

    Both are (rows, summed); EVEN: summed is a multiple of BLOCK_K.
    """
    accumulated = tl.zeros((BLOCK_M, BLOCK_N), tl.float32)
    if a_tiles is None:
        k = tl.arange(0, BLOCK_K)
        a = a_ptr + a_row.to(tl.int64)[:, None] * summed + k[None, :]
        b = b_ptr + b_row.to(tl.int64)[None, :] * summed + k[:, None]
        for start in range(0, summed, BLOCK_K):
            if EVEN:
                accumulated = dot(tl.load(a), tl.load(b), accumulated)
            else:
                inside = k < summed - start
                left = tl.load(a, mask=inside[None, :], other=0.0)
                right = tl.load(b, mask=inside[:, None], other=0.0)
                accumulated = dot(left, right, accumulated)
            a += BLOCK_K
            b += BLOCK_K
    else:
        for start in range(0, summed, BLOCK_K):
            accumulated = dot(a_tiles.load([first_a, start]), b_tiles.load([first_b, start]).T, accumulated)
    return accumulated


@triton.jit(do_not_specialize=["row_class"])
def project_in_kernel(
    n_ptr,  # (tokens, hidden): LN(x)
    weight_ptr,  # (width, hidden)
    bias_ptr,  # (width,)
    z_ptr,  # (tokens, width)
    activated_ptr,  # (tokens, width - first_u), rows activated_stride apart
    cos_ptr,  # float32 (positions, HALF), as sin
    sin_ptr,
    position_ptr,  # int64, a token's row of the table, read with POSITIONS only
    tokens,
    hidden,
    seq,
    turned,  # columns of q and k
    first_u,  # the first column of u
    width,
    activated_stride,
    position_batch,  # elements from one batch's positions to the next's
    row_class,  # which tuning counts; not used
    HEAD_DIM: tl.constexpr,
    HALF: tl.constexpr,
    POSITIONS: tl.constexpr,
    ACTIVATION: tl.constexpr,
    EVEN: tl.constexpr,  # hidden is a multiple of BLOCK_K
    DESCRIPTORS: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
    TMA: tl.constexpr,  # operands are loaded through descriptors
):
    """z = n W^T with bias and rotary on q and k, bias on v, u as it is; act(u + bias) to activated."""
    n_tiles, weight_tiles = None, None
    if TMA and DESCRIPTORS:
        n_tiles = tl.make_tensor_descriptor(n_ptr, (tokens, hidden), (hidden, 1), (BLOCK_M, BLOCK_K))
        weight_tiles = tl.make_tensor_descriptor(weight_ptr, (width, hidden), (hidden, 1), (BLOCK_N, BLOCK_K))
    row_tiles, column_tiles = tl.cdiv(tokens, BLOCK_M), region_tiles(turned, first_u, width, BLOCK_N)
    for tile in range(tl.program_id(0), row_tiles * column_tiles, tl.num_programs(0)):
        row_tile, column_tile = _grouped(tile, row_tiles, column_tiles)
        first, end = find_region(column_tile, turned, first_u, width, BLOCK_N)
        token = row_tile * BLOCK_M + tl.arange(0, BLOCK_M)
        column = first + tl.arange(0, BLOCK_N)
        # Rows past the end repeat the last one, and are not stored.
        weight_row = tl.minimum(column, end - 1)
        a_row, b_row, _angle = pair_columns(weight_row // 2, HEAD_DIM, HALF)
        weight_row = tl.where(first < turned, tl.where(weight_row % 2 == 0, a_row, b_row), weight_row)
        x = _tile_product(
            n_ptr,
            weight_ptr,
            n_tiles,
            weight_tiles,
            tl.minimum(token, tokens - 1),
            weight_row,
            row_tile * BLOCK_M,
            first,
            hidden,
            EVEN,
            BLOCK_M,
            BLOCK_N,
            BLOCK_K,
        )
        row = z_ptr + token.to(tl.int64)[:, None] * width
        if first < turned:
            pair = first // 2 + tl.arange(0, BLOCK_N // 2)
            pair_inside = pair < turned // 2
            if n_tiles is None:
                a_column, b_column, angle = pair_columns(pair, HEAD_DIM, HALF)
                a, b = tl.split(tl.reshape(x, (BLOCK_M, BLOCK_N // 2, 2)))
            else:
                a_column, b_column, angle = _block_columns(pair, HEAD_DIM, HALF)
                blocks = tl.reshape(x, (BLOCK_M, BLOCK_N // (2 * HALF), 2, HALF))
                a, b = tl.split(tl.permute(blocks, (0, 1, 3, 2)))
                a, b = tl.reshape(a, (BLOCK_M, BLOCK_N // 2)), tl.reshape(b, (BLOCK_M, BLOCK_N // 2))
            a += tl.load(bias_ptr + a_column, mask=pair_inside, other=0.0).to(tl.float32)[None, :]
            b += tl.load(bias_ptr + b_column, mask=pair_inside, other=0.0).to(tl.float32)[None, :]
            c, s = load_angles(
                cos_ptr, sin_ptr, position_ptr, position_batch, token, angle, tokens, seq, HALF, POSITIONS
            )
            a, b = turn(a, b, c, s)
            pair_mask = (token < tokens)[:, None] & pair_inside[None, :]
            tl.store(row + a_column[None, :], round_to(a, z_ptr.dtype.element_ty), mask=pair_mask)
            tl.store(row + b_column[None, :], round_to(b, z_ptr.dtype.element_ty), mask=pair_mask)
        else:
            mask = (token < tokens)[:, None] & (column < end)[None, :]
            bias = tl.load(bias_ptr + column, mask=column < end, other=0.0).to(tl.float32)[None, :]
            if first < first_u:
                tl.store(row + column[None, :], round_to(x + bias, z_ptr.dtype.element_ty), mask=mask)
            else:
                # Of the rounded u: what the backward pass, which has no other, makes again.
                u = round_to(x, z_ptr.dtype.element_ty)
                tl.store(row + column[None, :], u, mask=mask)
                value, _slope = activate(u.to(tl.float32) + bias, ACTIVATION)
                to = activated_ptr + token.to(tl.int64)[:, None] * activated_stride + (column - first_u)[None, :]
                tl.store(to, round_to(value, z_ptr.dtype.element_ty), mask=mask)


@triton.jit(do_not_specialize=["seed_low", "seed_high", "threshold", "row_class"])
def project_out_kernel(
    g_ptr,  # (tokens, summed): attention's output, then the activated u
    weight_ptr,  # (columns, summed)
    bias_ptr,  # (columns,)
    x_ptr,  # (tokens, columns), as y
    y_ptr,
    tokens,
    summed,
    columns,
    row_class,  # which tuning counts; not used
    keep_scale,  # 1 / (1 - p)
    threshold,  # a byte of the random words below it is dropped
    seed_low,  # the seed's two words, or pointers to them
    seed_high,
    DROPOUT: tl.constexpr,
    EVEN: tl.constexpr,  # summed is a multiple of BLOCK_K
    DESCRIPTORS: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
    TMA: tl.constexpr,  # operands are loaded through descriptors
    WARP_SPECIALIZE: tl.constexpr,
):
    """y = x + dropout(g W^T + bias)."""
    g_tiles, weight_tiles = None, None
    if TMA and DESCRIPTORS:
        g_tiles = tl.make_tensor_descriptor(g_ptr, (tokens, summed), (summed, 1), (BLOCK_M, BLOCK_K))
        weight_tiles = tl.make_tensor_descriptor(weight_ptr, (columns, summed), (summed, 1), (BLOCK_N, BLOCK_K))
    row_tiles, column_tiles = tl.cdiv(tokens, BLOCK_M), tl.cdiv(columns, BLOCK_N)
    for tile in tl.range(
        tl.program_id(0), row_tiles * column_tiles, tl.num_programs(0), warp_specialize=WARP_SPECIALIZE
    ):
        row_tile, column_tile = _grouped(tile, row_tiles, column_tiles)
        first_row, first_column = row_tile * BLOCK_M, column_tile * BLOCK_N
        row, column = first_row + tl.arange(0, BLOCK_M), first_column + tl.arange(0, BLOCK_N)
        h = _tile_product(
            g_ptr,
            weight_ptr,
            g_tiles,
            weight_tiles,
            tl.minimum(row, tokens - 1),
            tl.minimum(column, columns - 1),
            first_row,
            first_column,
            summed,
            EVEN,
            BLOCK_M,
            BLOCK_N,
            BLOCK_K,
        )
        h += tl.load(bias_ptr + column, mask=column < columns, other=0.0).to(tl.float32)[None, :]
        if DROPOUT:
            kept = residual_keep(seed_low, seed_high, first_row, first_column, threshold, BLOCK_M, BLOCK_N)
            h *= tl.where(kept, keep_scale, 0.0)
        mask = (row < tokens)[:, None] & (column < columns)[None, :]
        at = row.to(tl.int64)[:, None] * columns + column[None, :]
        y = tl.load(x_ptr + at, mask=mask, other=0.0).to(tl.float32) + h
        tl.store(y_ptr + at, round_to(y, y_ptr.dtype.element_ty), mask=mask)
