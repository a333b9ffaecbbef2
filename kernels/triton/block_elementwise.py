"""The parallel block's elementwise kernels: after the products, where these are the vendor's, and the backward pass.

The columns of z, [q k | v | u], are tiled region by region, so that no tile straddles two. In q and k a tile holds
pairs: the two dims that one angle turns, or, behind the rotary dims of a head, two neighbours that no angle turns
(cos 1, sin 0). The kernels load and store the pair's dims apart, each by its own column index, so any even rotary
width fits any tile.
"""

import triton
import triton.language as tl

from kernels.triton.numeric import activate, residual_keep, round_to


@triton.jit
def region_tiles(turned, first_u, width, BLOCK: tl.constexpr):
    """Tiles of BLOCK columns that cover the regions [0, turned), [turned, first_u) and [first_u, width)."""
    return tl.cdiv(turned, BLOCK) + tl.cdiv(first_u - turned, BLOCK) + tl.cdiv(width - first_u, BLOCK)


@triton.jit
def find_region(tile, turned, first_u, width, BLOCK: tl.constexpr):
    """(first column of the tile, end of its region)."""
    turned_tiles = tl.cdiv(turned, BLOCK)
    v_tiles = tl.cdiv(first_u - turned, BLOCK)
    in_v, in_u = tile >= turned_tiles, tile >= turned_tiles + v_tiles
    first = tl.where(in_v, turned + (tile - turned_tiles) * BLOCK, tile * BLOCK)
    first = tl.where(in_u, first_u + (tile - turned_tiles - v_tiles) * BLOCK, first)
    return first, tl.where(in_u, width, tl.where(in_v, first_u, turned))


@triton.jit
def pair_columns(pair, HEAD_DIM: tl.constexpr, HALF: tl.constexpr):
    """(column of each pair's first dim, of its second dim, index of its angle); angles from HALF on do not exist."""
    head, angle = pair // (HEAD_DIM // 2), pair % (HEAD_DIM // 2)
    first = head * HEAD_DIM + tl.where(angle < HALF, angle, 2 * angle)
    return first, first + tl.where(angle < HALF, HALF, 1), angle


@triton.jit
def load_angles(
    cos_ptr,
    sin_ptr,
    position_ptr,
    position_batch,
    token,
    angle,
    tokens,
    seq,
    HALF: tl.constexpr,
    POSITIONS: tl.constexpr,
):
    """cos and sin (tokens, angles); 1 and 0 for an angle that does not exist."""
    row = (token % seq).to(tl.int64)
    if POSITIONS:
        row = tl.load(position_ptr + (token // seq) * position_batch + row, mask=token < tokens, other=0)
    mask = (token < tokens)[:, None] & (angle < HALF)[None, :]
    at = row[:, None] * HALF + angle[None, :]
    return tl.load(cos_ptr + at, mask=mask, other=1.0), tl.load(sin_ptr + at, mask=mask, other=0.0)


@triton.jit
def turn(a, b, c, s):
    return a * c - b * s, b * c + a * s


@triton.jit
def _load(ptr, mask):
    return tl.load(ptr, mask=mask, other=0.0).to(tl.float32)


@triton.jit
def _store(ptr, value, mask):
    tl.store(ptr, round_to(value, ptr.dtype.element_ty), mask=mask)


# --------------------------------------------------------------------------------------- after the input product


@triton.jit
def after_in_kernel(
    z_ptr, bias_ptr,  # (tokens, width): n W_in^T; (width,)
    activated_ptr,  # (tokens, width - first_u), rows activated_stride apart
    cos_ptr, sin_ptr,  # float32 (positions, HALF)
    position_ptr,  # int64, a token's row of the table, read with POSITIONS only
    tokens, seq, turned, first_u, width,  # turned: columns of q and k; first_u: the first column of u
    activated_stride, position_batch,  # elements from one batch's positions to the next's
    HEAD_DIM: tl.constexpr, HALF: tl.constexpr, POSITIONS: tl.constexpr, ACTIVATION: tl.constexpr,
    ROWS: tl.constexpr, BLOCK: tl.constexpr,  # tokens and columns of a tile
):  # fmt: skip
    """In place: q, k and v get their bias, q and k are turned; act(u + bias) goes to activated."""
    token = tl.program_id(1) * ROWS + tl.arange(0, ROWS)
    first, end = find_region(tl.program_id(0), turned, first_u, width, BLOCK)
    row = z_ptr + token.to(tl.int64)[:, None] * width
    if first < turned:
        pair = first // 2 + tl.arange(0, BLOCK // 2)
        a_column, b_column, angle = pair_columns(pair, HEAD_DIM, HALF)
        pair_inside = pair < turned // 2
        pair_mask = (token < tokens)[:, None] & pair_inside[None, :]
        a = _load(row + a_column[None, :], pair_mask) + _load(bias_ptr + a_column, pair_inside)[None, :]
        b = _load(row + b_column[None, :], pair_mask) + _load(bias_ptr + b_column, pair_inside)[None, :]
        c, s = load_angles(cos_ptr, sin_ptr, position_ptr, position_batch, token, angle, tokens, seq, HALF, POSITIONS)
        a, b = turn(a, b, c, s)
        _store(row + a_column[None, :], a, pair_mask)
        _store(row + b_column[None, :], b, pair_mask)
    else:
        column = first + tl.arange(0, BLOCK)
        mask = (token < tokens)[:, None] & (column < end)[None, :]
        x = _load(row + column[None, :], mask) + _load(bias_ptr + column, column < end)[None, :]
        if first < first_u:
            _store(row + column[None, :], x, mask)
        else:
            value, _slope = activate(x, ACTIVATION)
            to = activated_ptr + token.to(tl.int64)[:, None] * activated_stride + (column - first_u)[None, :]
            _store(to, value, mask)


@triton.jit
def after_in_backward_kernel(
    grad_ptr,  # (tokens, width): of the turned q and k and of v; gets that of all of z
    z_ptr,  # (tokens, width), of the forward pass
    bias_ptr,  # (width,)
    activated_ptr,  # (tokens, width - first_u), rows activated_stride apart: its gradient
    partial_ptr,  # float32 (chunks, width)
    cos_ptr,  # float32 (positions, HALF), as sin
    sin_ptr,
    position_ptr,  # int64, a token's row of the table, read with POSITIONS only
    tokens,
    seq,
    turned,  # columns of q and k
    first_u,  # the first column of u
    width,
    activated_stride,
    position_batch,  # elements from one batch's positions to the next's
    HEAD_DIM: tl.constexpr,
    HALF: tl.constexpr,
    POSITIONS: tl.constexpr,
    ACTIVATION: tl.constexpr,
    CHUNK: tl.constexpr,  # tokens of a program
    ROWS: tl.constexpr,  # tokens at a time, and columns
    BLOCK: tl.constexpr,
):
    """In place: the gradients of q and k are turned back, u's comes from activated's, which gets act(u + bias) again.

    partial (chunks, width): the column sums of each chunk of CHUNK tokens, for the gradient of the bias.
    """
    chunk = tl.program_id(1)
    first, end = find_region(tl.program_id(0), turned, first_u, width, BLOCK)
    begin, until = chunk * CHUNK, tl.minimum((chunk + 1) * CHUNK, tokens)
    partial = partial_ptr + chunk.to(tl.int64) * width
    if first < turned:
        pair = first // 2 + tl.arange(0, BLOCK // 2)
        a_column, b_column, angle = pair_columns(pair, HEAD_DIM, HALF)
        pair_inside = pair < turned // 2
        a_sum, b_sum = tl.zeros((ROWS, BLOCK // 2), tl.float32), tl.zeros((ROWS, BLOCK // 2), tl.float32)
        for start in range(begin, until, ROWS):
            token = start + tl.arange(0, ROWS)
            pair_mask = (token < tokens)[:, None] & pair_inside[None, :]
            row = grad_ptr + token.to(tl.int64)[:, None] * width
            c, s = load_angles(
                cos_ptr, sin_ptr, position_ptr, position_batch, token, angle, tokens, seq, HALF, POSITIONS
            )
            a, b = turn(_load(row + a_column[None, :], pair_mask), _load(row + b_column[None, :], pair_mask), c, -s)
            _store(row + a_column[None, :], a, pair_mask)
            _store(row + b_column[None, :], b, pair_mask)
            a_sum += a
            b_sum += b
        tl.store(partial + a_column, tl.sum(a_sum, 0), mask=pair_inside)
        tl.store(partial + b_column, tl.sum(b_sum, 0), mask=pair_inside)
    else:
        column = first + tl.arange(0, BLOCK)
        inside = column < end
        total = tl.zeros((ROWS, BLOCK), tl.float32)
        if first < first_u:
            for start in range(begin, until, ROWS):
                token = start + tl.arange(0, ROWS)
                mask = (token < tokens)[:, None] & inside[None, :]
                total += _load(grad_ptr + token.to(tl.int64)[:, None] * width + column[None, :], mask)
        else:
            bias = _load(bias_ptr + column, inside)[None, :]
            for start in range(begin, until, ROWS):
                token = start + tl.arange(0, ROWS)
                mask = (token < tokens)[:, None] & inside[None, :]
                at = token.to(tl.int64)[:, None] * width + column[None, :]
                activated = activated_ptr + token.to(tl.int64)[:, None] * activated_stride + (column - first_u)[None, :]
                value, slope = activate(_load(z_ptr + at, mask) + bias, ACTIVATION)
                d = _load(activated, mask) * slope
                _store(grad_ptr + at, d, mask)
                _store(activated, value, mask)
                total += d
        tl.store(partial + column, tl.sum(total, 0), mask=inside)


# -------------------------------------------------------------------------------------- after the output product


@triton.jit(do_not_specialize=["seed_low", "seed_high", "threshold"])
def after_out_kernel(
    y_ptr,  # (rows, columns): g W_out^T
    bias_ptr,  # (columns,)
    x_ptr,  # (rows, columns)
    rows,
    columns,
    keep_scale,  # 1 / (1 - p)
    threshold,  # a byte of the random words below it is dropped
    seed_low,  # the seed's two words, or pointers to them
    seed_high,
    DROPOUT: tl.constexpr,
    ROWS: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """In place: y = x + dropout(y + bias)."""
    first_row, first_column = tl.program_id(0) * ROWS, tl.program_id(1) * BLOCK
    row, column = first_row + tl.arange(0, ROWS), first_column + tl.arange(0, BLOCK)
    mask = (row < rows)[:, None] & (column < columns)[None, :]
    at = row.to(tl.int64)[:, None] * columns + column[None, :]
    h = _load(y_ptr + at, mask) + _load(bias_ptr + column, column < columns)[None, :]
    if DROPOUT:
        kept = residual_keep(seed_low, seed_high, first_row, first_column, threshold, ROWS, BLOCK)
        h *= tl.where(kept, keep_scale, 0.0)
    _store(y_ptr + at, _load(x_ptr + at, mask) + h, mask)


@triton.jit(do_not_specialize=["seed_low", "seed_high", "threshold"])
def after_out_backward_kernel(
    grad_ptr,  # of y: (rows, columns)
    dh_ptr,  # (rows, columns)
    partial_ptr,  # float32 (chunks, columns)
    rows,
    columns,
    keep_scale,  # 1 / (1 - p)
    threshold,  # a byte of the random words below it is dropped
    seed_low,  # the seed's two words, or pointers to them
    seed_high,
    DROPOUT: tl.constexpr,
    CHUNK: tl.constexpr,  # rows of a program
    ROWS: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """dh = the gradient of what dropout took (not written without dropout), and its column sums a chunk of rows."""
    chunk, first_column = tl.program_id(0), tl.program_id(1) * BLOCK
    column = first_column + tl.arange(0, BLOCK)
    total = tl.zeros((ROWS, BLOCK), tl.float32)
    for first_row in range(chunk * CHUNK, tl.minimum((chunk + 1) * CHUNK, rows), ROWS):
        row = first_row + tl.arange(0, ROWS)
        mask = (row < rows)[:, None] & (column < columns)[None, :]
        at = row.to(tl.int64)[:, None] * columns + column[None, :]
        d = _load(grad_ptr + at, mask)
        if DROPOUT:
            kept = residual_keep(seed_low, seed_high, first_row, first_column, threshold, ROWS, BLOCK)
            d *= tl.where(kept, keep_scale, 0.0)
            _store(dh_ptr + at, d, mask)
        total += d
    partial = partial_ptr + chunk.to(tl.int64) * columns + column
    tl.store(partial, tl.sum(total, 0), mask=column < columns)


@triton.jit(do_not_specialize=["seed_low", "seed_high", "threshold"])
def residual_factor_kernel(
    factor_ptr, rows, columns, keep_scale, threshold, seed_low, seed_high, ROWS: tl.constexpr, BLOCK: tl.constexpr
):
    """factor (rows, columns): keep_scale where residual dropout keeps an element, else 0."""
    first_row, first_column = tl.program_id(0) * ROWS, tl.program_id(1) * BLOCK
    row, column = first_row + tl.arange(0, ROWS), first_column + tl.arange(0, BLOCK)
    mask = (row < rows)[:, None] & (column < columns)[None, :]
    kept = residual_keep(seed_low, seed_high, first_row, first_column, threshold, ROWS, BLOCK)
    _store(factor_ptr + row.to(tl.int64)[:, None] * columns + column[None, :], tl.where(kept, keep_scale, 0.0), mask)
