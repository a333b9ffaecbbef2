"""Linear cross-entropy, a chunk of rows at a time: the products by the vendor's library, all between them in one kernel.

A chunk's logits become softmax - one-hot in their own memory, and from there the gradients of hidden, weight and bias.
At most one chunk of logits exists (64 MiB in 16 bits), beside the gradients and the float32 sums of weight's.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from kernels.triton import INTERPRETED
from kernels.triton.column_sums import column_sums
from kernels.triton.numeric import LOG2E, on_device, round_to

# 32 Mi logits at a time: at 51,200 columns 655 rows, a program each. Unmeasured on a GPU.
_CHUNK_LOGITS = 1 << 25
# Columns whose gradient of the weight is made by one product: bounds what that product needs beside the sum in float32.
_WEIGHT_COLUMNS = 8192
LOSS_TILE = {"BLOCK": 4096 if not INTERPRETED else 16384, "num_warps": 8}


@triton.jit(do_not_specialize=["ignore_index", "z_loss"])
def cross_entropy_kernel(
    logits_ptr, bias_ptr, target_ptr, loss_ptr, columns, ignore_index, z_loss, GRADS: tl.constexpr, BLOCK: tl.constexpr
):  # fmt: skip
    """A program owns a row: its log-sum-exp, online over blocks of columns, then its loss and, in place, its gradient."""
    row = tl.program_id(0).to(tl.int64)
    logits = logits_ptr + row * columns
    target = tl.load(target_ptr + row)
    ignored = target == ignore_index
    # A target that is no column makes the loss NaN: neither a read out of bounds nor a silent number. Read before the
    # first reduction: no thread may still read this logit when another overwrites it.
    valid = (target >= 0) & (target < columns)
    picked = tl.load(logits + target, mask=valid, other=float("nan")).to(tl.float32)
    picked += tl.load(bias_ptr + target, mask=valid, other=0.0).to(tl.float32)
    top, total = tl.full((), float("-inf"), tl.float32), tl.full((), 0.0, tl.float32)
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


def linear_cross_entropy(
    hidden: Tensor, weight: Tensor, bias: Tensor, targets: Tensor, ignore_index: int, z_loss: float, with_grads: bool
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """As `kernels.torch.linear_cross_entropy`; a target that is no column makes the loss NaN."""
    hidden, weight, bias, targets = (x.contiguous() for x in (hidden, weight, bias, targets))
    (rows, width), columns, device = hidden.shape, weight.shape[0], hidden.device
    chunk = min(max(1, _CHUNK_LOGITS // columns), max(rows, 1))
    logits = hidden.new_empty((chunk, columns))
    loss = torch.empty(rows, dtype=torch.float32, device=device)
    grad_hidden = torch.empty_like(hidden) if with_grads else hidden.new_empty(0)
    grad_bias = torch.zeros(columns if with_grads else 0, dtype=torch.float32, device=device)
    starts = range(0, columns if with_grads else 0, _WEIGHT_COLUMNS)
    # float32 sums, a tensor for each run of columns so that each can be let go once it is rounded.
    sums = [
        torch.zeros((min(_WEIGHT_COLUMNS, columns - at), width), dtype=torch.float32, device=device) for at in starts
    ]
    for start in range(0, rows, chunk):
        h = hidden[start : start + chunk]
        d = torch.mm(h, weight.T, out=logits[: h.shape[0]])
        with on_device(device):
            cross_entropy_kernel[(h.shape[0],)](
                d, bias, targets[start:], loss[start:], columns, ignore_index, z_loss, GRADS=with_grads, **LOSS_TILE
            )
        if with_grads:
            torch.mm(d, weight, out=grad_hidden[start : start + chunk])
            column_sums(d, grad_bias, add=True)
            for at, total in zip(starts, sums, strict=True):
                part = d[:, at : at + _WEIGHT_COLUMNS].T
                total.addmm_(part, h) if hidden.dtype == torch.float32 else total.add_(part @ h)
    del logits
    grad_weight = hidden.new_empty(weight.shape if with_grads else 0)
    for at in reversed(starts):
        grad_weight[at : at + _WEIGHT_COLUMNS] = sums.pop()
    return loss.sum(dtype=torch.float64).float(), grad_hidden, grad_weight, grad_bias.to(bias.dtype)
