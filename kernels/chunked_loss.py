"""The linear cross-entropy as three matrix products for each chunk of rows, and one piece between them.

For a chunk's rows h of hidden, ignored rows set to zero (0 times their NaN would be NaN):

    d = h W^T                                            logits without their bias; `cpu` makes W h^T
    d = softmax(d + b) (1 + 2 z_loss lse) - one-hot      in place, with the loss and the sums for the bias's gradient
    grad_hidden = d W
    grad_weight += d^T h                                 a run of columns at a time

These are gradients of the sum of the rows' losses. What the loss is multiplied with later, the mean's divisor too, they
are multiplied with in the backward pass, in float32, and then rounded to hidden's dtype. Until then they are bfloat16
for bfloat16 (two roundings to 8 bits, of numbers with float32's range) and float32 for float16, which holds neither a
sum over many rows nor, with its 2^-24, a mean.

Memory beside the loss and the gradients, whatever the number of rows: a chunk's logits (on a CPU 25 MiB in 16 bits, 50
in float32; on a GPU 16 times that) and its rows h. Float32 and float64 gradients of the weight are their own sums. In
bfloat16 they add up in float32, which takes 4 bytes more for each of the weight's elements, or 2 where a backend keeps
the sums' upper halves in the gradient's memory; and one run's product. In float16 the gradients of hidden and weight
take 4 bytes an element instead of 2 until the backward pass is done. On a CPU with bf16 instructions, two threads,
4,096 rows of width 512 and 51,200 columns: 82 MiB, 50 of them halves of sums. `cpu` copies a weight that is not
contiguous.

A backend brings `Pieces`; the order of the steps is here, once for all of them.
"""

import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor

from kernels import memory, reference

# Logits in a chunk, by device type. On a CPU 256 rows of phi-1's 51,200 columns, 25 MiB in 16 bits: whole tiles of the
# products. On a GPU 8,192 rows: each chunk adds to float32 sums of the weight's size. Forward and backward of 16,384
# rows of width 2,048 on an H200, when the sums were added beside the products: 50.5 ms with 256 rows a chunk, 23.3 with
# 1,024, 18.0 with 4,096, 16.3 with 8,192.
_CHUNK_LOGITS = {"cpu": 256 * 51_200, "cuda": 8192 * 51_200}
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
    """(grad, scratch, product, first, last): adds a chunk's bfloat16 product to a float32 sum, kept in grad and
    scratch.
    first: nothing is there to add to. last: grad gets the sum, rounded to nearest even"""
    scratch: torch.dtype = torch.float32
    """Of add_product's scratch, which is shaped as grad"""
    columns_first: bool = False
    """Logits are made as (columns, rows) and handed over as a transposed view of that"""


def gradient_dtype(dtype: torch.dtype) -> torch.dtype:
    """Of the gradients of hidden and weight before they are scaled, for hidden of `dtype`."""
    return torch.float32 if dtype == torch.float16 else dtype


def check_targets(targets: Tensor, columns: int, ignore_index: int) -> None:
    """Raises IndexError for a target that is no column. Waits for targets: for those on a CPU."""
    kept = targets[targets != ignore_index]
    low, high = (int(x) for x in torch.aminmax(kept)) if kept.numel() else (0, 0)
    if low < 0 or high >= columns:
        raise IndexError(f"targets in [{low}, {high}]: must be in [0, {columns}) or ignore_index = {ignore_index}")


def _logits(h: Tensor, weight: Tensor, space: Tensor, columns_first: bool) -> Tensor:
    """h W^T (rows, columns) in the first elements of `space`."""
    rows, columns = h.shape[0], weight.shape[0]
    to = space[: rows * columns]
    if columns_first:
        return torch.mm(weight, h.T, out=to.view(columns, rows)).T
    return torch.mm(h, weight.T, out=to.view(rows, columns))


def _add_product(sums: Tensor, a: Tensor, b: Tensor, first: bool) -> None:
    """sums (+)= a b, of 16-bit matrices in float32. A product in float16 overflows before its scale is known."""
    if a.is_cuda:  # the product itself adds up in float32
        if first:
            torch.mm(a, b, out_dtype=torch.float32, out=sums)
        else:
            torch.addmm(sums, a, b, out_dtype=torch.float32, out=sums)
        return
    # A CPU has no such product, and its own of float16 took 170 times as long as float32's (Zen 3, 256 x 2048 x 4096).
    product = torch.mm(a.float(), b.float())
    if first:
        sums.copy_(product)
    else:
        sums.add_(product)


def linear_cross_entropy(
    pieces: Pieces,
    hidden: Tensor,
    weight: Tensor,
    bias: Tensor,
    targets: Tensor,
    ignore_index: int,
    z_loss: float,
    with_grads: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Summed cross-entropy (with z_loss, see `kernels.linear_cross_entropy`) and, in the same pass, its gradients.

    hidden (rows, width), weight (columns, width), bias (columns,), targets (rows,) int64.
    Returns (loss, grad_hidden, grad_weight, grad_bias): loss and grad_bias in the working dtype, the other gradients in
    `gradient_dtype`; the gradients are empty unless with_grads.
    """
    (rows, width), columns, wide = hidden.shape, weight.shape[0], reference.working_dtype(hidden.dtype)
    bias, targets = bias.contiguous(), targets.contiguous()
    if pieces.columns_first:  # oneDNN with AMX multiplies what lies between rows by 0 (issue 5717): NaN may lie there
        weight = weight.contiguous()
    ignored = (targets == ignore_index)[:, None]
    chunk = min(max(1, _CHUNK_LOGITS[hidden.device.type] // columns), max(rows, 1))
    space = memory.empty(hidden, (chunk * columns,))
    loss = hidden.new_empty(rows, dtype=wide)
    grad_dtype = gradient_dtype(hidden.dtype)
    grad_hidden, grad_weight = (memory.empty(x, x.shape if with_grads else (0,), grad_dtype) for x in (hidden, weight))
    bias_sums = bias.new_zeros((pieces.bias_parts(chunk, columns), columns), dtype=wide) if with_grads else None
    narrow, on_gpu = hidden.dtype == torch.bfloat16, hidden.is_cuda
    scratch_dtype = torch.float32 if on_gpu else pieces.scratch
    scratch = memory.empty(weight, grad_weight.shape if narrow and chunk < rows else (0,), scratch_dtype)
    run_columns = columns if on_gpu else min(_WEIGHT_COLUMNS, columns)
    product = weight.new_empty((run_columns, width) if narrow and with_grads and not on_gpu else 0)
    if rows == 0:
        grad_weight.zero_()  # no chunk will write it
    for start in range(0, rows, chunk):
        block, first, last = slice(start, start + chunk), start == 0, start + chunk >= rows
        h = hidden[block].masked_fill(ignored[block], 0.0)
        d = _logits(h, weight, space, pieces.columns_first)
        pieces.cross_entropy(d, bias, targets[block], loss[block], bias_sums, ignore_index, z_loss)
        if not with_grads:
            continue
        if grad_dtype == hidden.dtype:
            torch.mm(d, weight, out=grad_hidden[block])
        if grad_dtype == wide == hidden.dtype:
            grad_weight.addmm_(d.T, h, beta=int(not first))
            continue
        if narrow and first and last:
            torch.mm(d.T, h, out=grad_weight)  # nothing to add to
            continue
        for first_column in range(0, columns, run_columns):
            run = slice(first_column, first_column + run_columns)
            grad = grad_weight[run]
            if not narrow:
                _add_product(grad, d[:, run].T, h, first)
                _add_product(grad_hidden[block], d[:, run], weight[run], first_column == 0)
            elif on_gpu:
                _add_product(scratch[run], d[:, run].T, h, first)
                if last:
                    grad.copy_(scratch[run])
            else:
                part = torch.mm(d[:, run].T, h, out=product[: grad.shape[0]])
                pieces.add_product(grad, scratch[run], part, first, last)
    grad_bias = bias.new_empty(0, dtype=wide) if bias_sums is None else bias_sums.sum(0)
    return loss.sum(dtype=torch.float64).to(wide), grad_hidden, grad_weight, grad_bias


def scaled(gradient: Tensor, scale: Tensor, dtype: torch.dtype) -> Tensor:
    """gradient times scale (a scalar of the working dtype), computed in that dtype and rounded once, to `dtype`."""
    result = memory.empty(gradient, gradient.shape, dtype)
    factor = scale.reshape(1)  # of no dims it would be rounded to gradient's dtype first
    for first in range(0, gradient.shape[0], _WEIGHT_COLUMNS):  # a CPU makes a copy in float32 of what it multiplies
        run = slice(first, first + _WEIGHT_COLUMNS)
        torch.mul(gradient[run], factor, out=result[run])
    return result


def operators(pieces: Pieces) -> tuple[Callable[..., Any], Callable[..., Any]]:
    """What a backend registers: its forward of `linear_cross_entropy`, which makes the gradients, and their scaling."""
    return functools.partial(linear_cross_entropy, pieces), scaled
