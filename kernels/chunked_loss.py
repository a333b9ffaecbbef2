"""The linear cross-entropy as three matrix products for each chunk of rows, and one piece between them.

For a chunk's rows h of hidden:

    d = h W^T                                            logits without their bias
    d = softmax(d + b) (1 + 2 z_loss lse) - one-hot      in place, with the loss and the sums for the bias's gradient
    grad_hidden = d W
    grad_weight += d^T h                                 a run of columns at a time

Memory beside the loss and the gradients, whatever the number of rows: a chunk's logits (25 MiB in 16 bits, 50 in
float32). Float32 and float64 gradients of the weight are their own sums. In 16 bits they add up in float32, which takes
4 bytes more for each of the weight's elements, or 2 where a backend keeps the sums' upper halves in the gradient's
memory; and one run's product. On a CPU with bf16 instructions, two threads, 4,096 rows of width 512 and 51,200 columns:
82 MiB, 50 of them halves of sums.

A backend brings `Pieces`; the order of the steps is here, once for all of them.
"""

from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor

from kernels import reference

# 256 rows of phi-1's 51,200 columns, 25 MiB in 16 bits: whole tiles of the products, and fewer bytes than the L2 cache of
# an A100 or H100 holds. Unmeasured on a GPU.
_CHUNK_LOGITS = 256 * 51_200
# Columns in one product for grad_weight, which is made beside the sums: 4 MiB at width 512.
_WEIGHT_COLUMNS = 4096


def add_in_float32(grad: Tensor, sums: Tensor, product: Tensor, first: bool, last: bool) -> None:
    """`Pieces.add_product` with float32 sums beside the gradient."""
    if first:
        sums.copy_(product)
    else:
        sums.add_(product)
    if last:
        grad.copy_(sums)


class Pieces(NamedTuple):
    """A backend's part of the loss. Tensors are contiguous; `wide` is float32 (float64 for float64 inputs)."""

    cross_entropy: Callable[[Tensor, Tensor, Tensor, Tensor, Tensor | None, int, float], None]
    """(logits, bias, targets, loss, bias_sums, ignore_index, z_loss) of a chunk. logits (rows, columns) have no bias
    yet. Writes loss (rows,) wide; unless bias_sums is None also, in place, the logits' gradient, and adds the columns'
    sums of it to bias_sums (parts, columns) wide, to whichever parts it likes"""
    bias_parts: Callable[[int, int], int] = lambda rows, columns: 1
    """(rows of a chunk, columns) -> parts of bias_sums"""
    add_product: Callable[[Tensor, Tensor, Tensor, bool, bool], None] = add_in_float32
    """(grad, scratch, product, first, last): adds a chunk's 16-bit product to a float32 sum, kept in grad and scratch.
    first: nothing is there to add to. last: grad gets the sum, rounded to nearest even"""
    scratch: torch.dtype = torch.float32
    """Of add_product's scratch, which is shaped as grad"""


def linear_cross_entropy(
    hidden: Tensor, weight: Tensor, bias: Tensor, targets: Tensor, ignore_index: int, z_loss: float, with_grads: bool,
    pieces: Pieces,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:  # fmt: skip
    """Summed cross-entropy (with z_loss, see `kernels.linear_cross_entropy`) and, in the same pass, its gradients.

    hidden (rows, width), weight (columns, width), bias (columns,), targets (rows,) int64.
    Returns (loss, grad_hidden, grad_weight, grad_bias); the gradients are empty unless with_grads.
    """
    rows, columns, wide = hidden.shape[0], weight.shape[0], reference.working_dtype(hidden.dtype)
    bias, targets = bias.contiguous(), targets.contiguous()
    chunk = min(max(1, _CHUNK_LOGITS // columns), max(rows, 1))
    logits = hidden.new_empty((chunk, columns))
    loss = hidden.new_empty(rows, dtype=wide)
    grad_hidden, grad_weight = (x.new_empty(x.shape if with_grads else 0) for x in (hidden, weight))
    bias_sums = bias.new_zeros((pieces.bias_parts(chunk, columns), columns), dtype=wide) if with_grads else None
    narrow = hidden.dtype != wide
    scratch = weight.new_empty(grad_weight.shape if narrow else 0, dtype=pieces.scratch)
    product = weight.new_empty((min(_WEIGHT_COLUMNS, columns), weight.shape[1]) if narrow and with_grads else 0)
    if rows == 0:
        grad_weight.zero_()  # no chunk will write it
    for start in range(0, rows, chunk):
        block = slice(start, start + chunk)
        h = hidden[block]
        d = torch.mm(h, weight.T, out=logits[: h.shape[0]])
        pieces.cross_entropy(d, bias, targets[block], loss[block], bias_sums, ignore_index, z_loss)
        if not with_grads:
            continue
        torch.mm(d, weight, out=grad_hidden[block])
        if not narrow:
            grad_weight.addmm_(d.T, h, beta=int(start > 0))
            continue
        for first_column in range(0, columns, _WEIGHT_COLUMNS):
            run = slice(first_column, first_column + _WEIGHT_COLUMNS)
            grad = grad_weight[run]
            part = torch.mm(d[:, run].T, h, out=product[: grad.shape[0]])
            pieces.add_product(grad, scratch[run], part, start == 0, start + chunk >= rows)
    grad_bias = bias.new_empty(0) if bias_sums is None else bias_sums.sum(0).to(bias.dtype)
    return loss.sum(dtype=torch.float64).to(wide), grad_hidden, grad_weight, grad_bias
