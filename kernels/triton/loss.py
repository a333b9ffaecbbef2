"""The loss of a chunk of rows (kernels/chunked_loss.py): between the products, all in one kernel.

A chunk's logits become softmax - one-hot in their own memory.
"""

import triton
import triton.language as tl
from torch import Tensor

from kernels.native import on_device
from kernels.triton import INTERPRETED
from kernels.triton.column_sums import column_sums
from kernels.triton.numeric import LOG2E, round_to

LOSS_TILE = {"BLOCK": 4096 if not INTERPRETED else 16384, "num_warps": 8}


@triton.jit(do_not_specialize=["ignore_index", "z_loss"])
def cross_entropy_kernel(
    logits_ptr, bias_ptr, target_ptr, loss_ptr, columns, ignore_index, z_loss, GRADS: tl.constexpr, BLOCK: tl.constexpr
):
    """A program owns a row: its log-sum-exp, online over blocks of columns, then its loss and, in place, its
    gradient.
    """
    row = tl.program_id(0).to(tl.int64)
    logits = logits_ptr + row * columns
    target = tl.load(target_ptr + row)
    ignored = target == ignore_index
    # A target that is no column makes the loss NaN: neither a read out of bounds nor a silent number. Read before the
    # first reduction: no thread may still read this logit when another overwrites it.
    valid = (target >= 0) & (target < columns)
    picked = tl.load(logits + target, mask=valid, other=float("nan")).to(tl.float32)
    picked += tl.load(bias_ptr + target, mask=valid, other=0.0).to(tl.float32)
    # Of no logits yet the least float, so that those of -inf add nothing and never meet -inf - -inf. No exp2 here is of
    # more than 0: top is taken off.
    top, total = tl.full((), -3.40282347e38, tl.float32), tl.full((), 0.0, tl.float32)
    for first in range(0, columns, BLOCK):
        column = first + tl.arange(0, BLOCK)
        mask = column < columns
        x = tl.load(logits + column, mask=mask, other=float("-inf")).to(tl.float32)
        x += tl.load(bias_ptr + column, mask=mask, other=0.0).to(tl.float32)
        new = tl.maximum(top, tl.max(x, 0))
        total = total * tl.exp2((top - new) * LOG2E) + tl.sum(tl.exp2((x - new) * LOG2E), 0)
        top = new
    lse = top + tl.log(total)
    tl.store(loss_ptr + row, tl.where(ignored, 0.0, tl.log(total) + (top - picked) + z_loss * lse * lse))
    if GRADS:
        scale = (1.0 + 2.0 * z_loss * lse) / total
        for first in range(0, columns, BLOCK):
            column = first + tl.arange(0, BLOCK)
            mask = column < columns
            x = tl.load(logits + column, mask=mask, other=float("-inf")).to(tl.float32)
            x += tl.load(bias_ptr + column, mask=mask, other=0.0).to(tl.float32)
            d = tl.exp2((x - top) * LOG2E) * scale - tl.where(column == target, 1.0, 0.0)
            d = tl.where(ignored, 0.0, d)
            tl.store(logits + column, round_to(d, logits_ptr.dtype.element_ty), mask=mask)


def cross_entropy(
    logits: Tensor,
    bias: Tensor,
    targets: Tensor,
    loss: Tensor,
    bias_sums: Tensor | None,
    ignore_index: int,
    z_loss: float,
) -> None:
    """See `kernels.chunked_loss.Pieces.cross_entropy`; a target that is no column makes the loss NaN."""
    rows, columns = logits.shape
    with on_device(logits):
        cross_entropy_kernel[(rows,)](
            logits, bias, targets, loss, columns, ignore_index, z_loss, GRADS=bias_sums is not None, **LOSS_TILE
        )
    if bias_sums is not None:
        column_sums(logits, bias_sums, add=True)
