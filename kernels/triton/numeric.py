"""What Triton kernels share: products, rounding, GELU, the dropout mask, and how they are launched."""

import torch
import triton
import triton.language as tl
from triton.language.random import philox_impl

from kernels import reference
from kernels.triton import INTERPRETED

LOG2E = tl.constexpr(1.4426950408889634)
ATTENTION_OFFSET = tl.constexpr(reference.ATTENTION_OFFSET)
RESIDUAL_OFFSET = tl.constexpr(reference.RESIDUAL_OFFSET)

# Triton's interpreter multiplies the bit patterns of bfloat16, and truncates to it. Under it, operands of products
# are widened first, which is exact, and numbers are rounded to nearest as on a GPU.
_EMULATED = tl.constexpr(INTERPRETED)


@triton.jit
def dot(a, b, accumulated=None):
    """a b (+ accumulated) in float32: tensor cores for 16-bit operands, full precision for float32."""
    if _EMULATED:
        a, b = a.to(tl.float32), b.to(tl.float32)
    return tl.dot(a, b, accumulated, input_precision="ieee")


@triton.jit
def round_to(x, dtype: tl.constexpr):
    """x, float32, to dtype."""
    if _EMULATED and dtype == tl.bfloat16:
        bits = x.to(tl.uint32, bitcast=True)
        bits = (bits + 0x7FFF + ((bits >> 16) & 1)) & 0xFFFF0000
        x = bits.to(tl.float32, bitcast=True)
    return x.to(dtype)


_DOUBLE_C = tl.constexpr(1.5957691216057308)


@triton.jit
def gelu(y):
    """(GELU(y), its slope), tanh approximation (arXiv 1606.08415): y sigmoid(2 c (y + 0.044715 y^3)), c = sqrt(2 / pi)."""
    # Beyond 9.9 the sigmoid is 1, or less than 2^-122: there it and the slope are taken of 9.9, and no square runs over.
    above = tl.maximum(y, -9.9, propagate_nan=tl.PropagateNan.ALL)
    t = tl.minimum(above, 9.9, propagate_nan=tl.PropagateNan.ALL)
    square = t * t
    sigmoid = 1.0 / (1.0 + tl.exp2(t * (1.0 + 0.044715 * square) * (-LOG2E * _DOUBLE_C)))
    value = above * sigmoid
    return value, sigmoid + value * (1.0 - sigmoid) * (1.0 + 3 * 0.044715 * square) * _DOUBLE_C


@triton.jit
def keep(
    seed_low, seed_high, offset, plane, first_row, first_column, threshold,
    ROWS: tl.constexpr, COLUMNS: tl.constexpr, TRANSPOSED: tl.constexpr,
):  # fmt: skip
    """reference.dropout_keep of a tile, (ROWS, COLUMNS) or transposed; one Philox call for eight columns.

    first_column is a multiple of 32. Column 32 g + 8 w + 2 t + h is half h of word w of counter 4 g + t.
    """
    counter = (first_column // 8 + tl.arange(0, COLUMNS // 8)).to(tl.uint32)
    row = (first_row + tl.arange(0, ROWS)).to(tl.uint32)
    if TRANSPOSED:
        zero = tl.zeros((COLUMNS // 8, ROWS), tl.uint32)
        counter, row = zero + counter[:, None], zero + row[None, :]
    else:
        zero = tl.zeros((ROWS, COLUMNS // 8), tl.uint32)
        counter, row = zero + counter[None, :], zero + row[:, None]
    low, high = tl.cast(seed_low, tl.uint32, bitcast=True), tl.cast(seed_high, tl.uint32, bitcast=True)
    w0, w1, w2, w3 = philox_impl(counter, row, zero + tl.cast(plane, tl.uint32), zero + offset, low, high)
    even, odd = tl.join(_halves(w0, threshold), _halves(w2, threshold)), tl.join(_halves(w1, threshold), _halves(w3, threshold))  # fmt: skip
    kept = tl.join(even, odd)  # (..., h, w // 2, w % 2)
    if TRANSPOSED:
        kept = tl.permute(tl.reshape(kept, (COLUMNS // 32, 4, ROWS, 2, 2, 2)), (0, 4, 5, 1, 3, 2))
        kept = tl.reshape(kept, (COLUMNS, ROWS))
    else:
        kept = tl.permute(tl.reshape(kept, (ROWS, COLUMNS // 32, 4, 2, 2, 2)), (0, 1, 4, 5, 2, 3))
        kept = tl.reshape(kept, (ROWS, COLUMNS))
    return kept != 0


@triton.jit
def _halves(word, threshold):
    """Is each 16-bit half of the word kept: low half first, along a new last dim."""
    return tl.join(((word & 0xFFFF) >= threshold).to(tl.int8), ((word >> 16) >= threshold).to(tl.int8))


def int32(word: int) -> int:
    """The int32 with the same bits as the low 32 bits of word."""
    word &= 0xFFFFFFFF
    return word - (1 << 32) if word >= 1 << 31 else word


def on_device(device: torch.device):
    """Launches go to this device; on a CPU (the interpreter) there is nothing to choose."""
    return torch.cuda.device(device) if device.type == "cuda" else torch.no_grad()


def seed_words(seed: int) -> tuple[int, int]:
    """A 64-bit seed as the two int32 that `keep` takes."""
    return int32(seed), int32(seed >> 32)
