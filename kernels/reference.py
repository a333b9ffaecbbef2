"""The ground truth: every op in plain PyTorch, written to be read, exact in float64.

Arithmetic is in float64 for float64 inputs and in float32 for all others; results are rounded once, to the
inputs' type. Every other backend is tested against this file.
"""

import dataclasses
import itertools
from collections.abc import Callable, Mapping
from typing import NamedTuple

import torch
from torch import Tensor

from kernels.autocast import without_autocast
from kernels.checks import check_offsets
from kernels.seeds import Seed

ATTENTION_OFFSET = 0
"""Philox offset of the attention mask."""
RESIDUAL_OFFSET = 1
"""Philox offset of the residual mask."""


def working_dtype(dtype: torch.dtype) -> torch.dtype:
    """float64 for float64, float32 for everything else."""
    return torch.float64 if dtype == torch.float64 else torch.float32


# ------------------------------------------------------------------------------------------------ dropout


def philox(counter: tuple[Tensor, Tensor, Tensor, Tensor], seed: Seed) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Philox 4x32-7 (Salmon et al., "Parallel Random Numbers: As Easy as 1, 2, 3", SC 2011).

    Seven rounds are the fewest that pass BigCrush (there, table 2).
    counter: four int64 tensors holding 32-bit words, broadcastable. seed: 64 bits, the key; a tensor: int64 ().
    Returns four int64 tensors of 32-bit words.
    """
    mask = 0xFFFFFFFF
    c0, c1, c2, c3 = counter
    k0, k1 = seed & mask, (seed >> 32) & mask
    for _ in range(7):
        # The int64 products wrap; their 64 bits are those of the unsigned product.
        p0, p1 = c0 * 0xD2511F53, c2 * 0xCD9E8D57
        c0, c1, c2, c3 = ((p1 >> 32) & mask) ^ c1 ^ k0, p1 & mask, ((p0 >> 32) & mask) ^ c3 ^ k1, p0 & mask
        k0, k1 = (k0 + 0x9E3779B9) & mask, (k1 + 0xBB67AE85) & mask
    return c0, c1, c2, c3


def dropout_threshold(p: float) -> int:
    """Elements whose random byte is below this are dropped: 256 p rounded, for p > 0 from 1 to 255.

    So that p is one of 1/256, ..., 255/256: 0.1 becomes 26/256 = 0.1016.
    """
    return min(max(round(256 * p), 1), 255) if p > 0 else 0


def dropout_scale(p: float) -> float:
    """What kept elements are multiplied by: one over the exact probability of being kept."""
    return 256 / (256 - dropout_threshold(p))


def _random_byte(counter: tuple[Tensor, Tensor, Tensor, Tensor], seed: Seed, word: Tensor, byte: Tensor) -> Tensor:
    words = torch.stack(torch.broadcast_tensors(*philox(counter, seed)))
    chosen = words.gather(0, word.expand(words[0].shape)[None])[0]
    return (chosen >> 8 * byte) & 0xFF


def attention_keep(seed: Seed, plane: Tensor, query: Tensor, key: Tensor, p: float) -> Tensor:
    """Which probabilities dropout keeps: a pure function of (seed, plane, query, key), on every backend.

    plane, query, key: int64 tensors, broadcast together. plane is batch * heads + head, or document * heads + head.
    One Philox counter (key / 16 * 4 + key % 8 / 2, query / 16 * 4 + query % 8 / 2, plane, ATTENTION_OFFSET) yields 16
    bytes, for 4 queries and 4 keys: {0, 1, 8, 9} + 2 (query % 8 / 2) of a group of 16 and likewise keys. Byte
    2 (query / 8 % 2) + key / 8 % 2, the lowest first, of word 2 (query % 2) + key % 2 is the element's.
    Two neighbouring lanes hold the 16 elements of an accumulator of `mma.sync` or `wgmma` (rows lane / 4 and 8 further,
    columns 2 (lane % 4), the next and 8 further), whether its rows are the queries or the keys, and each lane's eight
    are two words.
    Returns a bool tensor of the broadcast shape.
    """
    counter = (
        key // 16 * 4 + key % 8 // 2,
        query // 16 * 4 + query % 8 // 2,
        plane,
        torch.full_like(key, ATTENTION_OFFSET),
    )
    word, byte = 2 * (query % 2) + key % 2, 2 * (query // 8 % 2) + key // 8 % 2
    return _random_byte(counter, seed, word, byte) >= dropout_threshold(p)


def residual_keep(seed: Seed, rows: int, columns: int, p: float, device: torch.device) -> Tensor:
    """The (rows, columns) residual mask of a block: row is the token in the folded batch, column the hidden index.

    A pure function of (seed, row, column), on every backend. One Philox counter (column / 8, row / 2, 0,
    RESIDUAL_OFFSET) yields 16 bytes, for 8 columns of 2 rows: byte column % 4, the lowest first, of word
    2 (row % 2) + column % 8 / 4 is the element's.
    """
    row = torch.arange(rows, device=device)[:, None]
    column = torch.arange(columns, device=device)[None, :]
    zero = torch.zeros_like(row)
    counter = (column // 8, row // 2, zero, zero + RESIDUAL_OFFSET)
    return _random_byte(counter, seed, 2 * (row % 2) + column % 8 // 4, column % 4) >= dropout_threshold(p)


# ------------------------------------------------------------------------------------------------- rotary


def rotary_table(
    positions: int, rotary_dim: int, base: float = 10000.0, device: torch.device | None = None
) -> tuple[Tensor, Tensor]:
    """cos and sin, each (positions, rotary_dim / 2) float32: angles position * base^(-2i / rotary_dim).

    Source: RoFormer (arXiv 2104.09864) section 3.2; frequencies over rotary_dim as in transformers' modeling_phi.py.
    """
    exponents = torch.arange(0, rotary_dim, 2, dtype=torch.float64, device=device) / rotary_dim
    angles = torch.arange(positions, dtype=torch.float64, device=device)[:, None] * base**-exponents
    return angles.cos().float(), angles.sin().float()


def rotate(x: Tensor, cos: Tensor, sin: Tensor, positions: Tensor | None, inverse: bool) -> Tensor:
    """Rotates the first 2 * cos.shape[-1] dims of x (batch, seq, heads, head_dim); see `kernels.apply_rotary`."""
    half = cos.shape[-1]
    dtype = working_dtype(x.dtype)
    # (seq, 1, half) or (batch, seq, 1, half)
    c = (cos[: x.shape[1]] if positions is None else cos[positions]).to(dtype).unsqueeze(-2)
    s = (sin[: x.shape[1]] if positions is None else sin[positions]).to(dtype).unsqueeze(-2)
    if inverse:
        s = -s
    first, second, rest = x[..., :half].to(dtype), x[..., half : 2 * half].to(dtype), x[..., 2 * half :]
    return torch.cat([(first * c - second * s).to(x.dtype), (second * c + first * s).to(x.dtype), rest], dim=-1)


@without_autocast  # in a region of bfloat16 PyTorch's cat refuses float16
def rotary(
    q: Tensor, k: Tensor, cos: Tensor, sin: Tensor, positions: Tensor | None, inverse: bool
) -> tuple[Tensor, Tensor]:
    """q and k rotated by +angle, or by -angle (`inverse`, the gradient)."""
    return rotate(q, cos, sin, positions, inverse), rotate(k, cos, sin, positions, inverse)


# ---------------------------------------------------------------------------------------------- attention


def _probabilities(q: Tensor, k: Tensor, lse: Tensor | None, causal: bool, scale: float) -> tuple[Tensor, Tensor]:
    """(softmax(scale q k^T) , log-sum-exp) for q (batch, heads, m, d) and k (batch, heads, n, d)."""
    scores = scale * (q @ k.transpose(-1, -2))
    m, n = scores.shape[-2:]
    if causal:  # bottom-right aligned: the last query sees the last key
        visible = torch.ones(m, n, dtype=torch.bool, device=q.device).tril(n - m)
        scores = scores.masked_fill(~visible, float("-inf"))
    if lse is None:
        # The derivative of a logsumexp of nothing but -inf would be NaN.
        blind = (scores == float("-inf")).all(-1)
        lse = torch.logsumexp(scores.masked_fill(blind[..., None], 0.0), dim=-1).masked_fill(blind, float("-inf"))
    # A row that sees no key has lse = -inf: its probabilities are zeros, not exp(-inf + inf).
    p = torch.exp(scores - lse.masked_fill(lse == float("-inf"), 0.0)[..., None])
    return p, lse


def _attention_keep(p: Tensor, dropout_p: float, seed: Seed, first_batch: int) -> Tensor:
    batch, heads, m, n = p.shape
    index = [torch.arange(size, device=p.device) for size in (batch, heads, m, n)]
    plane = ((first_batch + index[0])[:, None] * heads + index[1])[:, :, None, None]
    return attention_keep(seed, plane, index[2][:, None], index[3][None, :], dropout_p)


def document_starts(name: str, offsets: Tensor, length: int) -> list[int]:
    """Where each document starts, and the last ends; offsets that do not rise from 0 to length (which only a GPU's can)
    count as their running maximum, no greater than length."""
    check_offsets(name, offsets, length)
    return list(itertools.accumulate((min(max(x, 0), length) for x in offsets.tolist()), max))


def _documents(cu_q: Tensor | None, cu_k: Tensor | None, q: Tensor, k: Tensor) -> list[tuple[slice, slice, slice, int]]:
    """(batch slice, query slice, key slice, index of the first batch entry) per independent problem."""
    if cu_q is None or cu_k is None:
        return [(slice(None), slice(None), slice(None), 0)]
    starts_q = document_starts("cu_seqlens_q", cu_q, q.shape[1])
    starts_k = document_starts("cu_seqlens_k", cu_k, k.shape[1])
    return [
        (slice(None), slice(starts_q[i], starts_q[i + 1]), slice(starts_k[i], starts_k[i + 1]), i)
        for i in range(len(starts_q) - 1)
    ]


def _heads_first(x: Tensor, heads: int) -> Tensor:
    """(batch, seq, kv_heads, d) -> (batch, heads, seq, d) in the working type, key/value heads repeated."""
    x = x.to(working_dtype(x.dtype)).transpose(1, 2)
    return x.repeat_interleave(heads // x.shape[1], dim=1)


def attention_forward(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    cu_seqlens_q: Tensor | None,
    cu_seqlens_k: Tensor | None,
    causal: bool,
    scale: float,
    dropout_p: float,
    dropout_seed: Seed,
    *,
    out: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """out (like q, or the tensor given) and the log-sum-exp (batch, heads, seqlen_q) of `kernels.flash_attention`."""
    heads = q.shape[2]
    out = torch.zeros(q.shape, dtype=q.dtype, device=q.device) if out is None else out.zero_()
    lse = torch.full((q.shape[0], heads, q.shape[1]), float("-inf"), dtype=working_dtype(q.dtype), device=q.device)
    for b, i, j, first in _documents(cu_seqlens_q, cu_seqlens_k, q, k):
        qs, ks, vs = _heads_first(q[b, i], heads), _heads_first(k[b, j], heads), _heads_first(v[b, j], heads)
        p, lse[b, :, i] = _probabilities(qs, ks, None, causal, scale)
        if dropout_p > 0:
            p = p * _attention_keep(p, dropout_p, dropout_seed, first) * dropout_scale(dropout_p)
        out[b, i] = (p @ vs).transpose(1, 2).to(q.dtype)
    return out, lse


def attention_backward(
    grad_out: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    out: Tensor,
    lse: Tensor,
    cu_seqlens_q: Tensor | None,
    cu_seqlens_k: Tensor | None,
    causal: bool,
    scale: float,
    dropout_p: float,
    dropout_seed: Seed,
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of q, k, v from the saved log-sum-exp (FlashAttention, arXiv 2205.14135, appendix B.4)."""
    heads, kv_heads = q.shape[2], k.shape[2]
    grads = [torch.zeros(x.shape, dtype=x.dtype, device=x.device) for x in (q, k, v)]
    for b, i, j, first in _documents(cu_seqlens_q, cu_seqlens_k, q, k):
        qs, ks, vs = _heads_first(q[b, i], heads), _heads_first(k[b, j], heads), _heads_first(v[b, j], heads)
        do, o = _heads_first(grad_out[b, i], heads), _heads_first(out[b, i], heads)
        p, _ = _probabilities(qs, ks, lse[b, :, i].to(qs.dtype), causal, scale)
        dropped, dp = p, do @ vs.transpose(-1, -2)
        if dropout_p > 0:
            keep = _attention_keep(p, dropout_p, dropout_seed, first).to(p.dtype) * dropout_scale(dropout_p)
            dropped, dp = p * keep, dp * keep
        ds = scale * p * (dp - (do * o).sum(-1, keepdim=True))
        dk, dv = ds.transpose(-1, -2) @ qs, dropped.transpose(-1, -2) @ do
        grads[0][b, i] = (ds @ ks).transpose(1, 2).to(q.dtype)
        for grad, full in ((grads[1], dk), (grads[2], dv)):  # query heads of a group add up
            grad[b, j] = full.unflatten(1, (kv_heads, -1)).sum(2).transpose(1, 2).to(grad.dtype)
    return grads[0], grads[1], grads[2]


# --------------------------------------------------------------------------------------- the other pieces


def layer_norm(x: Tensor, weight: Tensor, bias: Tensor, eps: float) -> Tensor:
    """(x - mean) / sqrt(variance + eps) * weight + bias over the last dim (arXiv 1607.06450)."""
    dtype = working_dtype(x.dtype)
    y = x.to(dtype)
    y = y - y.mean(-1, keepdim=True)
    y = y * torch.rsqrt(y.square().mean(-1, keepdim=True) + eps)
    return (y * weight.to(dtype) + bias.to(dtype)).to(x.dtype)


def gelu(x: Tensor) -> Tensor:
    """GELU, tanh approximation (arXiv 1606.08415)."""
    y = x.to(working_dtype(x.dtype))
    return (0.5 * y * (1 + torch.tanh((2 / torch.pi) ** 0.5 * (y + 0.044715 * y**3)))).to(x.dtype)


def relu2(x: Tensor) -> Tensor:
    """The square of ReLU (Primer, arXiv 2109.08668)."""
    return x.to(working_dtype(x.dtype)).relu().square().to(x.dtype)


ACTIVATIONS = {"gelu_new": gelu, "relu2": relu2}
"""The MLP's activations by their names in transformers, in the order of `Activation` in csrc/arguments.h."""


def linear(x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    """x W^T + b."""
    dtype = working_dtype(x.dtype)
    return (x.to(dtype) @ weight.to(dtype).T + bias.to(dtype)).to(x.dtype)


def linear_cross_entropy(
    hidden: Tensor, weight: Tensor, bias: Tensor, targets: Tensor, ignore_index: int, z_loss: float
) -> Tensor:
    """Summed cross-entropy of softmax(hidden W^T + b) plus z_loss times the squared log-sum-exp, logits in full."""
    dtype = working_dtype(hidden.dtype)
    kept = targets != ignore_index
    hidden = torch.where(kept[:, None], hidden, 0.0)  # a NaN in an ignored row times the gradient's 0 would be NaN
    logits = hidden.to(dtype) @ weight.to(dtype).T + bias.to(dtype)
    picked = logits.gather(-1, torch.where(kept, targets, 0)[:, None])[:, 0]
    lse = torch.logsumexp(logits, -1)
    return torch.where(kept, lse - picked + z_loss * lse.square(), 0.0).sum()


# ---------------------------------------------------------------------------------------------- the parallel block


class Dropout(NamedTuple):
    """p and the seed of a mask."""

    p: float
    seed: Seed


@dataclasses.dataclass(frozen=True)
class BlockShape:
    """What a parallel block is, but for its weights and tensors. Made once for a model, checked then: ValueError."""

    heads: int
    """Query heads."""
    kv_heads: int
    """Key/value heads, a divisor of heads."""
    head_dim: int
    """Width of a head."""
    eps: float = 1e-5
    """Of the LayerNorm."""
    attention_dropout: float = 0.0
    """Probability on attention weights; rounded to a multiple of 1/256, as in `flash_attention`: 0.1 becomes 0.1016."""
    residual_dropout: float = 0.0
    """Probability on the sum of both branches, rounded likewise."""
    activation: str = "gelu_new"
    """Of the MLP: a key of `kernels.reference.ACTIVATIONS`."""

    def __post_init__(self) -> None:
        if min(self.heads, self.kv_heads, self.head_dim) < 1:
            sizes = f"heads = {self.heads}, kv_heads = {self.kv_heads}, head_dim = {self.head_dim}"
            raise ValueError(f"{sizes}: must be at least 1")
        if self.heads % self.kv_heads:
            raise ValueError(f"kv_heads = {self.kv_heads}: must divide heads = {self.heads}")
        for name, p in (("attention_dropout", self.attention_dropout), ("residual_dropout", self.residual_dropout)):
            if not 0.0 <= p < 1.0:
                raise ValueError(f"{name} = {p}: must be in [0, 1)")
        if self.activation not in ACTIVATIONS:
            raise ValueError(f"activation = {self.activation!r}: must be one of {', '.join(ACTIVATIONS)}")

    @property
    def attention_width(self) -> int:
        """Columns of q, and of attention's output."""
        return self.heads * self.head_dim

    @property
    def kv_width(self) -> int:
        """Columns of k, and of v."""
        return self.kv_heads * self.head_dim

    @property
    def values(self) -> tuple[int, int, int, float, float, float, str]:
        """The fields in order, as operators of PyTorch take them."""
        sizes, dropout = (self.heads, self.kv_heads, self.head_dim), (self.attention_dropout, self.residual_dropout)
        return *sizes, self.eps, *dropout, self.activation


class Steps(NamedTuple):
    """What `parallel_block` is made of."""

    layer_norm: Callable[..., Tensor]
    """(x, weight, bias, eps) -> x's shape"""
    linear: Callable[..., Tensor]
    """(x, weight, bias) -> x W^T + b"""
    rotary: Callable[..., tuple[Tensor, Tensor]]
    """(q, k, cos, sin, positions=) -> q, k, turned"""
    attention: Callable[..., Tensor]
    """(q, k, v, cu_seqlens_q, cu_seqlens_k, dropout) -> q's shape; causal"""
    activations: Mapping[str, Callable[..., Tensor]]
    """elementwise, by the names of ACTIVATIONS"""
    dropout: Callable[..., Tensor]
    """(y, dropout) -> y's shape"""


class CacheRows(NamedTuple):
    """Where documents go on in a cache, document i in row i, and what they see then; `kernels.cache_rows` makes it."""

    row: Tensor
    """(tokens,) int64, like `place`: where each new token's key and value belong."""
    place: Tensor
    cu_seqlens_q: Tensor
    """int32 (2 documents + 1,), like the keys': documents of the rows one behind the other, in which the room behind
    each row's tokens is a document of its own, without queries.
    """
    cu_seqlens_k: Tensor
    capacity: int
    """Tokens that a row of the cache has room for."""


KVCache = tuple[Tensor, Tensor, int | Tensor | CacheRows]
"""Keys and values (batch or more, capacity, kv_heads, head_dim) of the tokens so far, and how many there are: a number,
or with documents int32 (documents,), a row of the cache for each, or what `kernels.cache_rows` made of those."""


def cache_rows(lengths: Tensor, cu_seqlens: Tensor, tokens: int, capacity: int) -> CacheRows:
    """Of `tokens` tokens, document i behind the lengths[i] that row i holds. See `kernels.cache_rows`."""
    device, documents, new = lengths.device, lengths.shape[0], cu_seqlens.diff()
    row = torch.arange(documents, device=device).repeat_interleave(new, output_size=tokens)
    place = torch.arange(tokens, device=device) + (lengths - cu_seqlens[:-1])[row]
    starts = capacity * torch.arange(documents, device=device)
    ends = torch.stack([starts + lengths + new, starts + capacity], dim=1).flatten()
    cu_q, cu_k = (torch.nn.functional.pad(x, (1, 0)).int() for x in (cu_seqlens[1:].repeat_interleave(2), ends))
    return CacheRows(row, place, cu_q, cu_k, capacity)


def extend(kv_cache: KVCache, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor, Tensor | None, Tensor | None]:
    """Writes new keys and values behind those that the cache holds; returns all that are to be seen, and the documents
    of queries and of keys.

    k, v: (batch, seq, kv_heads, head_dim); with documents (1, tokens, kv_heads, head_dim), and the rows are returned
    folded into one sequence, (1, documents * capacity, kv_heads, head_dim).
    """
    keys, values, at = kv_cache
    if isinstance(at, CacheRows):
        keys[at.row, at.place], values[at.row, at.place] = k[0], v[0]
        documents = at.cu_seqlens_q.shape[0] // 2
        return (
            keys[:documents].flatten(0, 1)[None],
            values[:documents].flatten(0, 1)[None],
            at.cu_seqlens_q,
            at.cu_seqlens_k,
        )
    assert not isinstance(at, Tensor)  # parallel_block has made rows of it
    rows, until = k.shape[0], at + k.shape[1]
    keys[:rows, at:until], values[:rows, at:until] = k, v
    return keys[:rows, :until], values[:rows, :until], None, None


def parallel_block(
    steps: Steps, x: Tensor, norm_weight: Tensor, norm_bias: Tensor, w_in: Tensor, b_in: Tensor,
    w_out: Tensor, b_out: Tensor, cos: Tensor, sin: Tensor, shape: BlockShape, positions: Tensor | None,
    cu_seqlens: Tensor | None, dropout_seed: Seed, kv_cache: KVCache | None,
) -> Tensor:  # fmt: skip
    """phi-1's layer: attention and MLP side by side on one LayerNorm. See `kernels.parallel_block` for the
    arguments.
    """
    batch, seq, _ = x.shape
    z = steps.linear(steps.layer_norm(x, norm_weight, norm_bias, shape.eps), w_in, b_in)
    qkv, u = z.tensor_split([shape.attention_width + 2 * shape.kv_width], dim=-1)
    q, k, v = qkv.unflatten(-1, (-1, shape.head_dim)).split([shape.heads, shape.kv_heads, shape.kv_heads], dim=2)
    q, k = steps.rotary(q, k, cos, sin, positions=positions)
    if cu_seqlens is not None:  # documents of all sequences, one after another
        q, k, v = (part.reshape(1, batch * seq, -1, shape.head_dim) for part in (q, k, v))
    cu_q = cu_k = cu_seqlens
    if kv_cache is not None:
        k, v, cu_q, cu_k = extend(kv_cache, k, v)
    attention = steps.attention(q, k, v, cu_q, cu_k, Dropout(shape.attention_dropout, dropout_seed))
    attention = attention.reshape(batch, seq, shape.attention_width)
    y = steps.linear(torch.cat([attention, steps.activations[shape.activation](u)], dim=-1), w_out, b_out)
    return x + steps.dropout(y, Dropout(shape.residual_dropout, dropout_seed))
