"""What Triton kernels share: products, rounding, activations, the dropout mask, and how they are launched."""

import torch
import triton
import triton.language as tl
from torch import Tensor
from triton.language.random import philox_impl

from kernels import reference
from kernels.seeds import Seed
from kernels.triton import INTERPRETED

LOG2E = tl.constexpr(1.4426950408889634)
ATTENTION_OFFSET = tl.constexpr(reference.ATTENTION_OFFSET)
RESIDUAL_OFFSET = tl.constexpr(reference.RESIDUAL_OFFSET)

if INTERPRETED and tuple(map(int, triton.__version__.split(".")[:2])) < (3, 7):
    # Triton 3.6 takes the int of an array of one element, which NumPy 2.4 and later refuse.
    from triton.runtime import interpreter

    _patch = interpreter._patch_lang_tensor

    def _patch_index(tensor, scope):
        _patch(tensor, scope)
        scope.set_attr(tensor, "__index__", lambda self: int(self.handle.data.squeeze()))

    interpreter._patch_lang_tensor = _patch_index

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
def activate(y, ACTIVATION: tl.constexpr):
    """(the value of an activation of kernels/reference.py's ACTIVATIONS, its slope)."""
    if ACTIVATION == "gelu_new":
        value, slope = _gelu(y)
    else:
        tl.static_assert(ACTIVATION == "relu2")
        positive = tl.maximum(y, 0.0, propagate_nan=tl.PropagateNan.ALL)
        value, slope = positive * positive, positive + positive
    return value, slope


@triton.jit
def _gelu(y):
    """(GELU(y), its slope), tanh approximation (arXiv 1606.08415): y sigmoid(2 c (y + 0.044715 y^3)), c = sqrt(2 /
    pi).
    """
    # Beyond 9.9 the sigmoid is 1, or less than 2^-122: there it and the slope are taken of 9.9, and no square runs
    # over.
    above = tl.maximum(y, -9.9, propagate_nan=tl.PropagateNan.ALL)
    t = tl.minimum(above, 9.9, propagate_nan=tl.PropagateNan.ALL)
    square = t * t
    sigmoid = 1.0 / (1.0 + tl.exp2(t * (1.0 + 0.044715 * square) * (-LOG2E * _DOUBLE_C)))
    value = above * sigmoid
    return value, sigmoid + value * (1.0 - sigmoid) * (1.0 + 3 * 0.044715 * square) * _DOUBLE_C


@triton.jit
def attention_keep(
    seed_low,
    seed_high,
    plane,
    first_query,
    first_key,
    threshold,
    QUERIES: tl.constexpr,
    KEYS: tl.constexpr,
    TRANSPOSED: tl.constexpr,
):
    """reference.attention_keep of a tile, (QUERIES, KEYS) or transposed; one Philox call for 4 x 4 elements.

    first_query, first_key, QUERIES and KEYS are multiples of 16.
    """
    query = (first_query // 4 + tl.arange(0, QUERIES // 4)).to(tl.uint32)
    key = (first_key // 4 + tl.arange(0, KEYS // 4)).to(tl.uint32)
    if TRANSPOSED:
        query, key = query[None, :], key[:, None]
    else:
        query, key = query[:, None], key[None, :]
    kept = _kept(seed_low, seed_high, key, query, plane, ATTENTION_OFFSET, threshold)
    # Of each dim of the tile: group of 16, pair of a group's 8; then query / 8, key / 8, key % 2, query % 2.
    if TRANSPOSED:
        kept = tl.reshape(kept, (KEYS // 16, 4, QUERIES // 16, 4, 2, 2, 2, 2))
        kept = tl.reshape(tl.permute(kept, (0, 5, 1, 6, 2, 4, 3, 7)), (KEYS, QUERIES))
    else:
        kept = tl.reshape(kept, (QUERIES // 16, 4, KEYS // 16, 4, 2, 2, 2, 2))
        kept = tl.reshape(tl.permute(kept, (0, 4, 1, 7, 2, 5, 3, 6)), (QUERIES, KEYS))
    return kept != 0


@triton.jit
def residual_keep(seed_low, seed_high, first_row, first_column, threshold, ROWS: tl.constexpr, COLUMNS: tl.constexpr):
    """reference.residual_keep of a tile, (ROWS, COLUMNS); one Philox call for 8 columns of 2 rows.

    first_row and ROWS are multiples of 2, first_column and COLUMNS of 8.
    """
    row = (first_row // 2 + tl.arange(0, ROWS // 2)).to(tl.uint32)[:, None]
    column = (first_column // 8 + tl.arange(0, COLUMNS // 8)).to(tl.uint32)[None, :]
    kept = _kept(seed_low, seed_high, column, row, 0, RESIDUAL_OFFSET, threshold)
    # (pair of rows, eight columns, the bits of byte column % 4, column % 8 / 4, row % 2)
    return tl.reshape(tl.permute(kept, (0, 5, 1, 4, 2, 3)), (ROWS, COLUMNS)) != 0


@triton.jit
def _kept(seed_low, seed_high, c0, c1, c2, c3, threshold):
    """Is each byte of Philox 4x32-7 kept: along four new last dims, the bits of the byte's index, then the word's.

    The higher bit of the byte's index, the lower one; the lower bit of the word's index, the higher one.
    """
    low, high = _seed_word(seed_low), _seed_word(seed_high)
    zero = (c0 + c1) * 0
    w0, w1, w2, w3 = philox_impl(zero + c0, zero + c1, zero + tl.cast(c2, tl.uint32), zero + c3, low, high, n_rounds=7)
    first, second = (
        tl.join(_bytes(w0, threshold), _bytes(w1, threshold)),
        tl.join(_bytes(w2, threshold), _bytes(w3, threshold)),
    )
    return tl.join(first, second)


@triton.jit
def _seed_word(word):
    """A word of the seed, given as an int32 or as a pointer to one."""
    if word.dtype.is_ptr():
        word = tl.load(word)
    return tl.cast(word, tl.uint32, bitcast=True)


@triton.jit
def _bytes(word, threshold):
    """Is each byte of the word kept, the lowest first: along two new last dims, the higher bit of its index first."""
    b0, b1 = ((word & 0xFF) >= threshold).to(tl.int8), (((word >> 8) & 0xFF) >= threshold).to(tl.int8)
    b2, b3 = (((word >> 16) & 0xFF) >= threshold).to(tl.int8), ((word >> 24) >= threshold).to(tl.int8)
    return tl.join(tl.join(b0, b2), tl.join(b1, b3))


def int32(word: int) -> int:
    """The int32 with the same bits as the low 32 bits of word."""
    word &= 0xFFFFFFFF
    return word - (1 << 32) if word >= 1 << 31 else word


def seed_words(seed: Seed) -> tuple[int, int] | tuple[Tensor, Tensor]:
    """A 64-bit seed as the two int32 that the masks take, the lower first; of a tensor, where these are."""
    if isinstance(seed, Tensor):
        low, high = seed.view(1).view(torch.int32).unbind()
        return low, high
    return int32(seed), int32(seed >> 32)
