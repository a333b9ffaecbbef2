"""The parallel block's pieces (`kernels.fused_block.Pieces`) in Triton.

Each of the two products has two forms: the vendor's library and one elementwise kernel after it, and, `_whole`, one
kernel that does all of it (kernels/triton/block_product.py).
"""

from typing import Any

import torch
import triton
from torch import Tensor

from kernels.fused_block import Dropout, Layout
from kernels.native import on_device
from kernels.reference import dropout_scale, dropout_threshold
from kernels.seeds import Seed
from kernels.triton import INTERPRETED, descriptors, trial
from kernels.triton.block_elementwise import (
    after_in_backward_kernel,
    after_in_kernel,
    after_out_backward_kernel,
    after_out_kernel,
    residual_factor_kernel,
)
from kernels.triton.block_product import BLOCK_HALVES, project_in_kernel, project_out_kernel
from kernels.triton.column_sums import CHUNK_ROWS, column_sums, partial_sums
from kernels.triton.numeric import seed_words

# (BLOCK_M, BLOCK_N, BLOCK_K, warps, stages) of the products. bench/triton_aot.py compiles each for sm_80 and sm_90,
# those with descriptors for sm_90; one that spills registers on either is left out.
PRODUCT_TILES = [(128, 128, 64, 8, 3), (128, 128, 32, 8, 4), (128, 64, 64, 8, 3), (64, 128, 64, 4, 3)]
DESCRIPTOR_TILES = [(128, 128, 64, 8, 3), (128, 128, 64, 8, 4), (64, 128, 64, 4, 4)]
# Of project_out: one warp group loads, two multiply, each half of the rows (triton counts the first one's warps).
SPECIALIZED_TILES = [(128, 128, 64, 4, 3), (128, 128, 64, 4, 4)]
_NO_SPECIALIZED_DROPOUT = tuple(map(int, triton.__version__.split(".")[:2])) < (3, 7)
# The interpreter runs one program after another: few tiles, but enough for the tests to cross their borders.
_INTERPRETER_TILE = (32, 64, 32, 4, 1)
# Tiles of the elementwise kernels, (rows, columns); unmeasured on a GPU.
ELEMENTWISE_TILE = (16, 64) if not INTERPRETED else (16, 128)


def candidates(specialized: bool) -> list[triton.Config]:
    """Of project_in, or, with those whose warps are specialised, of project_out."""
    forms = [
        (PRODUCT_TILES, False, False),
        (DESCRIPTOR_TILES, True, False),
        (SPECIALIZED_TILES if specialized else [], True, True),
    ]
    found = []
    for tiles, tma, special in [([_INTERPRETER_TILE], True, False)] if INTERPRETED else forms:
        for m, n, k, warps, stages in tiles:
            constants = {"BLOCK_M": m, "BLOCK_N": n, "BLOCK_K": k, "TMA": tma}
            constants |= {"WARP_SPECIALIZE": special} if specialized else {}
            found.append(triton.Config(constants, num_warps=warps, num_stages=stages))
    return found


def _prune(configs: list[triton.Config], named: dict[str, Any], **options: Any) -> list[triton.Config]:
    """For triton.autotune: `descriptors.prune`, and no warp specialisation with dropout before triton 3.7, whose
    compiler fails.
    """
    found = descriptors.prune(configs, named, **options)
    if _NO_SPECIALIZED_DROPOUT and {**named, **options}.get("DROPOUT"):
        found = [config for config in found if not config.kwargs.get("WARP_SPECIALIZE")]
    return found


def _tuned(function, key: list[str], specialized: bool):
    return trial.tuned(candidates(specialized), [*key, "row_class", "DESCRIPTORS"], _prune)(function)


_project_in_kernel = _tuned(project_in_kernel, ["hidden", "width"], specialized=False)
_project_out_kernel = _tuned(project_out_kernel, ["summed", "columns", "DROPOUT"], specialized=True)
_MOST_BLOCK_K = 64


def _programs(x: Tensor, tiles) -> tuple[int]:
    """Twice the multiprocessors: of the candidates with 4 warps two programs fit on one, those with 8 take two waves.

    The interpreter gets 3, so that each has several tiles.
    """
    most = 2 * torch.cuda.get_device_properties(x.device).multi_processor_count if x.is_cuda else 3
    return (min(tiles, most),)


def _row_class(rows: int) -> int:
    """Calls of one power of two share a winner; from 8,192 rows on the choice has settled."""
    return min(max(rows.bit_length(), 7), 14)


def _in_arguments(layout: Layout, width: int, activated: Tensor) -> tuple[tuple, tuple, dict]:
    """(cos, sin, positions), the sizes from seq on, and the constants of the kernels of the input side."""
    positions = None if layout.positions is None else layout.positions.contiguous()
    cos, sin = layout.cos.contiguous(), layout.sin.contiguous()
    per_batch = positions.stride(0) if positions is not None and positions.dim() == 2 else 0
    return (
        (cos, sin, cos if positions is None else positions),
        (layout.seq, layout.turned_width, layout.qkv_width, width, activated.stride(0), per_batch),
        {
            "HEAD_DIM": layout.shape.head_dim,
            "HALF": cos.shape[1],
            "POSITIONS": positions is not None,
            "ACTIVATION": layout.shape.activation,
        },
    )


def _region_tiles(layout: Layout, block: int) -> int:
    regions = (layout.turned_width, layout.shape.kv_width, layout.inner)
    return sum(triton.cdiv(columns, block) for columns in regions)


def project_in(n: Tensor, w_in: Tensor, b_in: Tensor, activated: Tensor, layout: Layout) -> Tensor:
    """z (tokens, width) of `kernels.fused_block`; act(u + bias) is written to activated."""
    z, b_in = torch.mm(n, w_in.T), b_in.contiguous()
    tokens, width = z.shape
    tables, sizes, constants = _in_arguments(layout, width, activated)
    rows, block = ELEMENTWISE_TILE
    with on_device(n):
        after_in_kernel[(_region_tiles(layout, block), triton.cdiv(tokens, rows))](
            z, b_in, activated, *tables, tokens, *sizes, **constants, ROWS=rows, BLOCK=block
        )
    return z


def project_in_whole(n: Tensor, w_in: Tensor, b_in: Tensor, activated: Tensor, layout: Layout) -> Tensor:
    """`project_in` in one kernel."""
    (tokens, hidden), width = n.shape, w_in.shape[0]
    n, w_in, b_in, z = n.contiguous(), w_in.contiguous(), b_in.contiguous(), n.new_empty((tokens, width))
    tables, sizes, constants = _in_arguments(layout, width, activated)
    by_descriptors = constants["HALF"] in BLOCK_HALVES and descriptors.allowed(n, w_in)
    if by_descriptors:
        descriptors.provide_scratch()
    with on_device(n):
        _project_in_kernel[
            lambda meta: _programs(n, triton.cdiv(tokens, meta["BLOCK_M"]) * _region_tiles(layout, meta["BLOCK_N"]))
        ](
            n,
            w_in,
            b_in,
            z,
            activated,
            *tables,
            tokens,
            hidden,
            *sizes,
            _row_class(tokens),
            **constants,
            EVEN=hidden % _MOST_BLOCK_K == 0,
            DESCRIPTORS=by_descriptors,
        )
    return z


def project_in_backward(grad_z: Tensor, z: Tensor, b_in: Tensor, activated: Tensor, layout: Layout) -> Tensor:
    """Gradient of b_in; grad_z and activated change in place as `kernels.fused_block.Pieces` says."""
    tokens, width = z.shape
    tables, sizes, constants = _in_arguments(layout, width, activated)
    rows, block = ELEMENTWISE_TILE
    partial = partial_sums(tokens, width, z.device)
    with on_device(z):
        after_in_backward_kernel[(_region_tiles(layout, block), partial.shape[0])](
            grad_z,
            z,
            b_in.contiguous(),
            activated,
            partial,
            *tables,
            tokens,
            *sizes,
            **constants,
            CHUNK=CHUNK_ROWS,
            ROWS=rows,
            BLOCK=block,
        )
    return column_sums(partial, torch.empty(width, dtype=z.dtype, device=z.device))


def _dropout_arguments(dropout: Dropout) -> tuple:
    threshold = dropout_threshold(dropout.p)
    return dropout_scale(dropout.p), threshold, *seed_words(dropout.seed if threshold else 0)


def project_out(g: Tensor, w_out: Tensor, b_out: Tensor, x: Tensor, dropout: Dropout) -> Tensor:
    """y = x + dropout(g w_out^T + b_out), (tokens, hidden)."""
    y, x, b_out = torch.mm(g, w_out.T), x.contiguous(), b_out.contiguous()
    tokens, columns = y.shape
    arguments = _dropout_arguments(dropout)
    rows, block = ELEMENTWISE_TILE
    with on_device(g):
        after_out_kernel[(triton.cdiv(tokens, rows), triton.cdiv(columns, block))](
            y, b_out, x, tokens, columns, *arguments, DROPOUT=arguments[1] > 0, ROWS=rows, BLOCK=block
        )
    return y


def residual_factor(like: Tensor, seed: Seed, p: float) -> Tensor:
    """`phi1::residual_factor` of kernels/composed_block.py: 0 or 1 / (1 - p), in like's (batch, seq, hidden) and
    dtype.
    """
    factor = torch.empty_like(like, memory_format=torch.contiguous_format)
    columns = like.shape[-1]
    tokens = like.numel() // columns
    arguments = _dropout_arguments(Dropout(p, seed))
    rows, block = ELEMENTWISE_TILE
    with on_device(like):
        residual_factor_kernel[(triton.cdiv(tokens, rows), triton.cdiv(columns, block))](
            factor, tokens, columns, *arguments, ROWS=rows, BLOCK=block
        )
    return factor


def project_out_whole(g: Tensor, w_out: Tensor, b_out: Tensor, x: Tensor, dropout: Dropout) -> Tensor:
    """`project_out` in one kernel."""
    w_out, b_out, x = w_out.contiguous(), b_out.contiguous(), x.contiguous()
    (tokens, summed), columns, y = g.shape, w_out.shape[0], torch.empty_like(x)
    arguments = _dropout_arguments(dropout)
    by_descriptors = descriptors.allowed(g, w_out)
    if by_descriptors:
        descriptors.provide_scratch()
    with on_device(g):
        _project_out_kernel[
            lambda meta: _programs(g, triton.cdiv(tokens, meta["BLOCK_M"]) * triton.cdiv(columns, meta["BLOCK_N"]))
        ](
            g,
            w_out,
            b_out,
            x,
            y,
            tokens,
            summed,
            columns,
            _row_class(tokens),
            *arguments,
            DROPOUT=arguments[1] > 0,
            EVEN=summed % _MOST_BLOCK_K == 0,
            DESCRIPTORS=by_descriptors,
        )
    return y


def project_out_backward(grad_y: Tensor, dropout: Dropout) -> tuple[Tensor, Tensor]:
    """Gradients of g w_out^T (grad_y itself where nothing is dropped) and of b_out."""
    tokens, columns = grad_y.shape
    arguments = _dropout_arguments(dropout)
    grad_h = torch.empty_like(grad_y) if arguments[1] > 0 else grad_y
    rows, block = ELEMENTWISE_TILE
    partial = partial_sums(tokens, columns, grad_y.device)
    with on_device(grad_y):
        after_out_backward_kernel[(partial.shape[0], triton.cdiv(columns, block))](
            grad_y,
            grad_h,
            partial,
            tokens,
            columns,
            *arguments,
            DROPOUT=arguments[1] > 0,
            CHUNK=CHUNK_ROWS,
            ROWS=rows,
            BLOCK=block,
        )
    return grad_h, column_sums(partial, torch.empty(columns, dtype=grad_y.dtype, device=grad_y.device))
