"""LayerNorm, forward and backward: a row is in registers between its one load and its one store.

Statistics are in float32, by two passes over the registers: the mean, then the squares around it. The gradients of
weight and bias are summed a chunk of rows a program, and the chunks in order: bitwise reproducible.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from kernels.native import on_device, rows_contiguous
from kernels.triton import INTERPRETED
from kernels.triton.column_sums import CHUNK_ROWS, column_sums, partial_sums
from kernels.triton.numeric import round_to

MOST_COLUMNS = 8192
"""Twice that would spill registers in the backward kernel (bench/triton_aot.py): 328 bytes a thread on sm_80."""


@triton.jit
def layer_norm_forward_kernel(
    x_ptr,  # (rows, hidden), rows x_stride apart
    weight_ptr,  # (hidden,), as bias
    bias_ptr,
    y_ptr,  # (rows, hidden)
    stats_ptr,  # float32 (rows, 2): mean, 1 / sqrt(variance + eps)
    rows,
    hidden,
    x_stride,
    eps,
    ROWS: tl.constexpr,  # rows of a program
    BLOCK: tl.constexpr,  # hidden, up to a power of 2
):
    row = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    column = tl.arange(0, BLOCK)[None, :]
    mask = (row < rows)[:, None] & (column < hidden)
    start = row.to(tl.int64)[:, None]
    x = tl.load(x_ptr + start * x_stride + column, mask=mask, other=0.0).to(tl.float32)
    mean = tl.sum(x, 1) / hidden
    centred = tl.where(mask, x - mean[:, None], 0.0)
    factor = 1.0 / tl.sqrt(tl.sum(centred * centred, 1) / hidden + eps)
    weight = tl.load(weight_ptr + column, mask=column < hidden, other=0.0).to(tl.float32)
    bias = tl.load(bias_ptr + column, mask=column < hidden, other=0.0).to(tl.float32)
    y = centred * factor[:, None] * weight + bias
    tl.store(y_ptr + start * hidden + column, round_to(y, y_ptr.dtype.element_ty), mask=mask)
    stats = stats_ptr + 2 * row.to(tl.int64)
    tl.store(stats, mean, mask=row < rows)
    tl.store(stats + 1, factor, mask=row < rows)


@triton.jit
def layer_norm_backward_kernel(
    grad_ptr,  # of y: (rows, hidden)
    x_ptr,  # (rows, hidden), rows x_stride apart
    weight_ptr,  # (hidden,)
    stats_ptr,  # float32 (rows, 2), of the forward kernel
    residual_ptr,  # (rows, hidden), read with RESIDUAL only
    dx_ptr,  # (rows, hidden)
    partial_ptr,  # float32 (chunks, 2, hidden): sums over a chunk for weight and bias
    rows,
    hidden,
    x_stride,
    RESIDUAL: tl.constexpr,
    CHUNK: tl.constexpr,  # rows of a program
    ROWS: tl.constexpr,  # rows at a time
    BLOCK: tl.constexpr,  # hidden, up to a power of 2
):
    """With n = (x - mean) factor and d = grad weight: dx = factor (d - mean(d) - n mean(d n)) (+ residual)."""
    chunk = tl.program_id(0)
    column = tl.arange(0, BLOCK)[None, :]
    inside = column < hidden
    weight = tl.load(weight_ptr + column, mask=inside, other=0.0).to(tl.float32)
    dweight, dbias = tl.zeros((ROWS, BLOCK), tl.float32), tl.zeros((ROWS, BLOCK), tl.float32)
    for first in range(chunk * CHUNK, tl.minimum((chunk + 1) * CHUNK, rows), ROWS):
        row = first + tl.arange(0, ROWS)
        mask = (row < rows)[:, None] & inside
        start = row.to(tl.int64)[:, None]
        mean = tl.load(stats_ptr + 2 * start, mask=start < rows, other=0.0)
        factor = tl.load(stats_ptr + 2 * start + 1, mask=start < rows, other=0.0)
        x = tl.load(x_ptr + start * x_stride + column, mask=mask, other=0.0).to(tl.float32)
        grad = tl.load(grad_ptr + start * hidden + column, mask=mask, other=0.0).to(tl.float32)
        normed = (x - mean) * factor
        dweight += grad * normed
        dbias += grad
        d = grad * weight
        dx = (d - (tl.sum(d, 1) / hidden)[:, None] - normed * (tl.sum(d * normed, 1) / hidden)[:, None]) * factor
        if RESIDUAL:
            dx += tl.load(residual_ptr + start * hidden + column, mask=mask, other=0.0).to(tl.float32)
        tl.store(dx_ptr + start * hidden + column, round_to(dx, dx_ptr.dtype.element_ty), mask=mask)
    partial = partial_ptr + chunk.to(tl.int64) * 2 * hidden + tl.arange(0, BLOCK)
    tl.store(partial, tl.sum(dweight, 0), mask=tl.arange(0, BLOCK) < hidden)
    tl.store(partial + hidden, tl.sum(dbias, 0), mask=tl.arange(0, BLOCK) < hidden)


def launch_options(hidden: int) -> dict[str, int]:
    """Rows and columns of a program's tile and its warps: 16 elements a thread."""
    block = triton.next_power_of_2(hidden)
    # The interpreter takes its time by the operation: many rows at once there.
    rows = CHUNK_ROWS // 2 if INTERPRETED else min(max(1, 512 // block), CHUNK_ROWS)
    return {"ROWS": rows, "BLOCK": block, "num_warps": min(max(rows * block // 512, 1), 16)}


def _rows(x: Tensor, hidden: int) -> Tensor:
    if hidden > MOST_COLUMNS:
        raise ValueError(
            f"x.shape[-1] = {hidden}: the triton backend's layer_norm holds a row in registers, up to {MOST_COLUMNS}; "
            f"use backend='torch'"
        )
    return rows_contiguous(x.reshape(-1, hidden))


def layer_norm_forward(x: Tensor, weight: Tensor, bias: Tensor, eps: float) -> tuple[Tensor, Tensor]:
    """y (contiguous) and (mean, 1 / sqrt(variance + eps)) of each row; see `kernels.layer_norm`."""
    hidden = weight.numel()
    rows = _rows(x, hidden)
    y = torch.empty(x.shape, dtype=x.dtype, device=x.device)
    stats = torch.empty((rows.shape[0], 2), dtype=torch.float32, device=x.device)
    options = launch_options(hidden)
    if x.numel():
        with on_device(x):
            layer_norm_forward_kernel[(triton.cdiv(rows.shape[0], options["ROWS"]),)](
                rows, weight.contiguous(), bias.contiguous(), y, stats, *rows.shape, rows.stride(0), eps, **options
            )
    return y, stats


def layer_norm_backward(
    grad: Tensor, x: Tensor, weight: Tensor, stats: Tensor, residual: Tensor | None = None
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of x (plus `residual`, x's shape), weight and bias (contiguous), bitwise reproducible."""
    hidden = weight.numel()
    rows, grad, weight = _rows(x, hidden), grad.contiguous(), weight.contiguous()
    residual = None if residual is None else residual.contiguous()
    dx = torch.empty(x.shape, dtype=x.dtype, device=x.device)
    partial = partial_sums(rows.shape[0], 2 * hidden, x.device)
    if x.numel():
        with on_device(x):
            layer_norm_backward_kernel[(partial.shape[0],)](
                grad,
                rows,
                weight,
                stats.contiguous(),
                grad if residual is None else residual,
                dx,
                partial,
                *rows.shape,
                rows.stride(0),
                RESIDUAL=residual is not None,
                CHUNK=CHUNK_ROWS,
                **launch_options(hidden),
            )
    dweight = column_sums(partial[:, :hidden], torch.empty_like(weight))
    return dx, dweight, column_sums(partial[:, hidden:], torch.empty_like(weight))
