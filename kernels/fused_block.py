"""The parallel block as two matrix products and one kernel after each, with its gradient made from x and z alone.

Forward, over the folded batch * seq tokens:

    n = LN(x)
    z = n W_in^T                   (tokens, width), rows [q | k | v | u]; then in place: q, k, v get their bias,
                                   q and k are turned, and act(u + bias) goes into the right part of g
    g = [attention(q, k, v) | act(u + bias)]          attention reads views of z and writes the left part of g
    y = x + dropout(g W_out^T + b_out)

Saved for the backward pass: x, z (u without its bias, as the product gave it), attention's output and log-sum-exp.
LN(x) and the activation are made again there. Attention made again saved 69 of 606 MB for a phi-1 layer of 16,384
tokens, and took 5.6% of its forward and backward on an H200 (8% with dropout), 6% on a CPU (hidden 512, 1,024 tokens,
Zen 4).

A backend brings `Pieces`; the order of the steps is here, once for all of them.
"""

import dataclasses
import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor

from kernels import memory, reference
from kernels.autocast import without_autocast
from kernels.autograd import once_differentiable, operator
from kernels.checks import check_positions
from kernels.reference import BlockShape, Dropout
from kernels.registry import implementation
from kernels.seeds import Seed, check_not_captured, of_operands


class Layout(NamedTuple):
    """What a token's row of z holds, and by which angles its q and k are turned."""

    shape: BlockShape
    batch: int
    seq: int
    inner: int
    cos: Tensor
    """(positions, rotary_dim / 2) float32, like sin."""
    sin: Tensor
    positions: Tensor | None
    """Row of the table for each token: (seq,) or (batch, seq) int64; None: its index in the sequence."""

    @property
    def tokens(self) -> int:
        return self.batch * self.seq

    @property
    def turned_width(self) -> int:
        """Columns of q and k."""
        return self.shape.attention_width + self.shape.kv_width

    @property
    def qkv_width(self) -> int:
        return self.turned_width + self.shape.kv_width

    def qkv(self, z: Tensor, documents: bool) -> tuple[Tensor, Tensor, Tensor]:
        """Views q, k, v of z (tokens, width): (batch, seq, heads, head_dim), or (1, tokens, ...) with documents."""
        lead, shape = (1, self.tokens) if documents else (self.batch, self.seq), self.shape
        sizes = [shape.attention_width, shape.kv_width, shape.kv_width]
        q, k, v = (x.view(*lead, -1, shape.head_dim) for x in z[:, : self.qkv_width].split(sizes, dim=1))
        return q, k, v

    def attention(self, g: Tensor, documents: bool) -> Tensor:
        """The view of g's (tokens, attention width + inner) left part that attention writes, shaped as q."""
        lead = (1, self.tokens) if documents else (self.batch, self.seq)
        return g[:, : self.shape.attention_width].view(*lead, self.shape.heads, self.shape.head_dim)


class Pieces(NamedTuple):
    """A backend's part of the block. Matrices are (tokens, columns); all but views of z and g are contiguous."""

    norm_forward: Callable[..., tuple[Tensor, Tensor]]
    """(x, weight, bias, eps) -> (LN(x), stats)"""
    norm_backward: Callable[..., tuple[Tensor, Tensor, Tensor]]
    """(grad, x, weight, stats, residual) -> gradients of x (residual added), weight and bias"""
    project_in: Callable[[Tensor, Tensor, Tensor, Tensor, Layout], Tensor]
    """(n, w_in, b_in, activated, layout) -> z as above; act(u + bias) is written to activated (tokens, inner), a view
    whose rows are apart"""
    project_in_backward: Callable[[Tensor, Tensor, Tensor, Tensor, Layout], Tensor]
    """(grad_z, z, b_in, activated, layout) -> gradient of b_in. In place: grad_z holds the gradients of the turned q
    and k and of v, and gets those of all of z; activated holds its own gradient and gets act(u + bias) again
    """
    attention_forward: Callable[..., tuple[Tensor, Tensor]]
    """(q, k, v, cu_q, cu_k, causal, scale, p, seed, out=) -> (out, lse); out is a strided view"""
    attention_backward: Callable[..., tuple[Tensor, Tensor, Tensor]]
    """(grad_out, q, k, v, out, lse, cu_q, cu_k, causal, scale, p, seed, grads=); grads are strided views"""
    project_out: Callable[[Tensor, Tensor, Tensor, Tensor, Dropout], Tensor]
    """(g, w_out, b_out, x, residual dropout) -> y"""
    project_out_backward: Callable[[Tensor, Dropout], tuple[Tensor, Tensor]]
    """(grad_y, residual dropout) -> gradients of g W_out^T (grad_y itself where p = 0) and of b_out"""


def block_forward(
    pieces: Pieces,
    x: Tensor,
    norm_weight: Tensor,
    norm_bias: Tensor,
    w_in: Tensor,
    b_in: Tensor,
    w_out: Tensor,
    b_out: Tensor,
    layout: Layout,
    cu_seqlens: Tensor | None,
    dropout_seed: Seed,
    kv_cache: reference.KVCache | None = None,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """(y (tokens, hidden), z, attention's part of g, lse) for x (tokens, hidden)."""
    check_positions(layout.positions, layout.cos.shape[0])
    shape, documents = layout.shape, cu_seqlens is not None
    # Both halves of g are written where the product behind them reads: nothing is concatenated.
    g = memory.empty(x, (layout.tokens, shape.attention_width + layout.inner))
    normed = pieces.norm_forward(x, norm_weight, norm_bias, shape.eps)[0]
    z = pieces.project_in(normed, w_in, b_in, g[:, shape.attention_width :], layout)
    q, k, v = layout.qkv(z, documents)
    cu_q = cu_k = cu_seqlens
    if kv_cache is not None:
        k, v, cu_q, cu_k = reference.extend(kv_cache, k, v)
    attention, lse = pieces.attention_forward(
        q,
        k,
        v,
        cu_q,
        cu_k,
        True,
        shape.head_dim**-0.5,
        shape.attention_dropout,
        dropout_seed,
        out=layout.attention(g, documents),
    )
    y = pieces.project_out(g, w_out, b_out, x, Dropout(shape.residual_dropout, dropout_seed))
    return y, z, attention, lse


def block_backward(
    pieces: Pieces,
    grad_y: Tensor,
    x: Tensor,
    z: Tensor,
    attention: Tensor,
    lse: Tensor,
    norm_weight: Tensor,
    norm_bias: Tensor,
    w_in: Tensor,
    b_in: Tensor,
    w_out: Tensor,
    layout: Layout,
    cu_seqlens: Tensor | None,
    dropout_seed: Seed,
) -> tuple[Tensor, ...]:
    """Gradients of x, norm_weight, norm_bias, w_in, b_in, w_out, b_out."""
    shape, documents = layout.shape, cu_seqlens is not None
    options = (cu_seqlens, cu_seqlens, True, shape.head_dim**-0.5, shape.attention_dropout, dropout_seed)
    q, k, v = layout.qkv(z, documents)

    # Through the output: dropout's mask is drawn again, W_out's product gives the gradient of both halves of g.
    grad_h, grad_b_out = pieces.project_out_backward(grad_y, Dropout(shape.residual_dropout, dropout_seed))
    g = memory.product(grad_h, w_out)  # the gradient of g at first, g itself in the end
    # Through attention and the activation, which both write their part of z's gradient in place.
    grad_z = memory.empty(z, z.shape)
    pieces.attention_backward(
        layout.attention(g, documents), q, k, v, attention, lse, *options, grads=layout.qkv(grad_z, documents)
    )
    grad_b_in = pieces.project_in_backward(grad_z, z, b_in, g[:, shape.attention_width :], layout)
    # g's left half is no longer a gradient: with attention's output it is what W_out was multiplied by.
    layout.attention(g, documents).copy_(attention)
    grad_w_out = memory.product(grad_h.T, g)
    del g, attention  # the largest of what is left, before LN(x) is made again

    # Through W_in and LayerNorm; grad_y comes in once more as the gradient of the residual.
    normed, stats = pieces.norm_forward(x, norm_weight, norm_bias, shape.eps)
    grad_w_in = memory.product(grad_z.T, normed)
    grad_normed = memory.product(grad_z, w_in)
    grad_x, grad_norm_weight, grad_norm_bias = pieces.norm_backward(grad_normed, x, norm_weight, stats, grad_y)
    return grad_x, grad_norm_weight, grad_norm_bias, grad_w_in, grad_b_in, grad_w_out, grad_b_out


def operators(pieces: Pieces) -> tuple[Callable[..., Any], Callable[..., Any]]:
    """What a backend registers: its forward and backward of `parallel_block`."""
    return functools.partial(block_forward, pieces), functools.partial(block_backward, pieces)


# ------------------------------------------------------------------------------------------- as torch operators

_TABLE = "Tensor cos, Tensor sin, Tensor? positions, Tensor? cu_seqlens, Tensor? seed_tensor"
_SHAPE = ", ".join(f"{field.type.__name__} {field.name}" for field in dataclasses.fields(BlockShape))  # type: ignore[union-attr]
_OPTIONS = f"{_TABLE}, int seq, {_SHAPE}, SymInt dropout_seed, str backend"
torch.library.define(
    "phi1::parallel_block_forward",
    "(Tensor x, Tensor norm_weight, Tensor norm_bias, Tensor w_in, Tensor b_in, Tensor w_out, Tensor b_out,"
    f" bool with_grads, {_OPTIONS}) -> (Tensor, Tensor, Tensor, Tensor)",
)
torch.library.define(
    "phi1::parallel_block_backward",
    "(Tensor grad_y, Tensor x, Tensor z, Tensor attention, Tensor lse, Tensor norm_weight, Tensor norm_bias,"
    f" Tensor w_in, Tensor b_in, Tensor w_out, {_OPTIONS}) -> (Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor)",
)
torch.library.define(
    "phi1::parallel_block_cached",
    "(Tensor x, Tensor norm_weight, Tensor norm_bias, Tensor w_in, Tensor b_in, Tensor w_out, Tensor b_out,"
    f" Tensor(a!) keys, Tensor(b!) values, SymInt length, Tensor[] rows, {_OPTIONS}) -> Tensor",
)


_shape_of = functools.cache(BlockShape)  # a model has few


def _arguments(x, w_in, cos, sin, positions, cu_seqlens, seed_tensor, seq, *rest):  # type: ignore[no-untyped-def]
    *values, dropout_seed, _ = rest
    shape = _shape_of(*values)
    inner = w_in.shape[0] - shape.attention_width - 2 * shape.kv_width
    layout = Layout(shape, x.shape[0] // seq, seq, inner, cos, sin, positions)
    return layout, cu_seqlens, of_operands(seed_tensor, dropout_seed)


def _forward_arguments(x, w_in, *options):  # type: ignore[no-untyped-def]
    layout, _, seed = found = _arguments(x, w_in, *options)
    check_not_captured(max(layout.shape.attention_dropout, layout.shape.residual_dropout), seed, x)
    return found


def _saved_shapes(layout: Layout, documents: bool) -> tuple[tuple[int, ...], tuple[int, ...]]:
    """Shapes of attention's output and lse as the forward operator returns them, where a backward pass may come."""
    batch, seq = (1, layout.tokens) if documents else (layout.batch, layout.seq)
    return (batch, seq, layout.shape.heads, layout.shape.head_dim), (batch, layout.shape.heads, seq)


@operator("phi1::parallel_block_forward")
@without_autocast
def forward_of_rows(x, norm_weight, norm_bias, w_in, b_in, w_out, b_out, with_grads, *options):  # type: ignore[no-untyped-def]
    forward = implementation("parallel_block", options[-1]).forward
    arguments = _forward_arguments(x, w_in, *options)
    y, z, attention, lse = forward(x, norm_weight, norm_bias, w_in, b_in, w_out, b_out, *arguments)
    if not with_grads:
        return y, z, x.new_empty(0), x.new_empty(0, dtype=torch.float32)
    return y, z, attention.contiguous(), lse


@torch.library.register_fake("phi1::parallel_block_forward")
def _forward_fake(x, norm_weight, norm_bias, w_in, b_in, w_out, b_out, with_grads, *options):  # type: ignore[no-untyped-def]
    layout, cu_seqlens, *_ = _arguments(x, w_in, *options)
    attention, lse = _saved_shapes(layout, cu_seqlens is not None) if with_grads else ((0,), (0,))
    z = x.new_empty((x.shape[0], w_in.shape[0]))
    return x.new_empty(x.shape), z, x.new_empty(attention), x.new_empty(lse, dtype=torch.float32)


@operator("phi1::parallel_block_cached")
@without_autocast
def forward_cached(x, norm_weight, norm_bias, w_in, b_in, w_out, b_out, keys, values, length, rows, *options):  # type: ignore[no-untyped-def]
    torch.autograd.graph.increment_version((keys, values))  # a native kernel's writing PyTorch does not see
    arguments = _forward_arguments(x, w_in, *options)
    parameters = (norm_weight, norm_bias, w_in, b_in, w_out, b_out)
    forward = implementation("parallel_block", options[-1]).forward
    return forward(
        x,
        *parameters,
        *arguments,
        kv_cache=(keys, values, reference.CacheRows(*rows, keys.shape[1]) if rows else length),
    )[0]


@torch.library.register_fake("phi1::parallel_block_cached")
def _cached_fake(x, norm_weight, norm_bias, w_in, b_in, w_out, b_out, keys, values, length, rows, *options):  # type: ignore[no-untyped-def]
    return x.new_empty(x.shape)


@operator("phi1::parallel_block_backward")
@without_autocast
def _backward(grad_y, x, z, attention, lse, norm_weight, norm_bias, w_in, b_in, w_out, *options):  # type: ignore[no-untyped-def]
    backward = implementation("parallel_block", options[-1]).backward
    assert backward is not None
    return backward(
        grad_y.contiguous(),
        x,
        z,
        attention,
        lse,
        norm_weight,
        norm_bias,
        w_in,
        b_in,
        w_out,
        *_arguments(x, w_in, *options),
    )


@torch.library.register_fake("phi1::parallel_block_backward")
def _backward_fake(grad_y, x, z, attention, lse, norm_weight, norm_bias, w_in, b_in, w_out, *options):  # type: ignore[no-untyped-def]
    like = (x, norm_weight, norm_bias, w_in, b_in, w_out, norm_bias)
    return tuple(t.new_empty(t.shape) for t in like)


class FusedBlock(torch.autograd.Function):
    """The two operators, differentiable: (x (tokens, hidden), six parameters, whether a backward pass may come, then
    the operators' options) -> y, and what the backward pass needs of the forward pass."""

    @staticmethod
    def forward(x, *arguments):  # type: ignore[no-untyped-def]
        return torch.ops.phi1.parallel_block_forward(x, *arguments)

    @staticmethod
    def setup_context(ctx, inputs, output):  # type: ignore[no-untyped-def]
        x, norm_weight, norm_bias, w_in, b_in, w_out, _, _, *options = inputs
        _, z, attention, lse = output
        tables, ctx.options = options[:5], options[5:]
        ctx.mark_non_differentiable(z, attention, lse)
        ctx.set_materialize_grads(False)  # theirs would be as large as they are
        ctx.save_for_backward(x, z, attention, lse, norm_weight, norm_bias, w_in, b_in, w_out, *tables)

    @staticmethod
    def backward(ctx, grad_y, *_):  # type: ignore[no-untyped-def]
        grads = (None,) * 7 if grad_y is None else _gradients(ctx, grad_y)
        return *grads, *(None,) * (6 + len(ctx.options))


@once_differentiable("parallel_block")
def _gradients(ctx, saved, grad_y):  # type: ignore[no-untyped-def]
    return torch.ops.phi1.parallel_block_backward(grad_y, *saved, *ctx.options)
