"""Sums over the rows of a matrix, in a fixed order: the second half of every gradient of a bias or a gain."""

import torch
import triton
import triton.language as tl
from torch import Tensor

from kernels.native import on_device
from kernels.triton import INTERPRETED
from kernels.triton.numeric import round_to

CHUNK_ROWS = 32
"""Rows that one program sums before `column_sums` adds the chunks up. Fixed, so that sums do not depend on the machine;
the float32 sums are 1/16 of the size of the 16-bit rows. Unmeasured on a GPU."""
BLOCK = (16, 64) if not INTERPRETED else (64, 1024)
"""Rows and columns of a tile of `column_sums`; unmeasured on a GPU."""


@triton.jit
def column_sums_kernel(
    x_ptr,
    sum_ptr,
    rows,
    columns,
    x_stride,
    ADD: tl.constexpr,
    BLOCK_ROWS: tl.constexpr,
    BLOCK_COLUMNS: tl.constexpr,
):
    column = tl.program_id(0) * BLOCK_COLUMNS + tl.arange(0, BLOCK_COLUMNS)
    total = tl.zeros((BLOCK_ROWS, BLOCK_COLUMNS), tl.float32)
    for first in range(0, rows, BLOCK_ROWS):
        row = first + tl.arange(0, BLOCK_ROWS)
        mask = (row < rows)[:, None] & (column < columns)[None, :]
        total += tl.load(x_ptr + row.to(tl.int64)[:, None] * x_stride + column[None, :], mask=mask, other=0.0).to(
            tl.float32
        )
    result = tl.sum(total, 0)
    if ADD:
        result += tl.load(sum_ptr + column, mask=column < columns, other=0.0).to(tl.float32)
    tl.store(sum_ptr + column, round_to(result, sum_ptr.dtype.element_ty), mask=column < columns)


def column_sums(x: Tensor, out: Tensor, add: bool = False) -> Tensor:
    """out (columns,) = the sums over the rows of x (rows, columns), in float32; add: plus what out held."""
    (rows, columns), (block_rows, block_columns) = x.shape, BLOCK
    with on_device(x):
        column_sums_kernel[(triton.cdiv(columns, block_columns),)](
            x, out, rows, columns, x.stride(0), ADD=add, BLOCK_ROWS=block_rows, BLOCK_COLUMNS=block_columns
        )
    return out


def partial_sums(rows: int, columns: int, device: torch.device) -> Tensor:
    """Room for the sums of each chunk of CHUNK_ROWS rows: (chunks, columns) float32."""
    return torch.empty((triton.cdiv(rows, CHUNK_ROWS), columns), dtype=torch.float32, device=device)
