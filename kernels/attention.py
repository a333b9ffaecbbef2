"""Flash attention: softmax(scale q k^T) v without the matrix, for the layouts and options of FlashAttention."""

import math

import torch
from torch import Tensor

from kernels import reference
from kernels import torch as torch_backend
from kernels.autocast import cast_inputs, without_autocast
from kernels.autograd import distinct, once_differentiable, operator, unwatched
from kernels.checks import (
    check_device,
    check_dtype,
    check_int32,
    check_like,
    check_rank,
    overlaps_itself,
    share_memory,
)
from kernels.measured import size_class
from kernels.registry import choose, differentiated, implementation, in_graph, register
from kernels.seeds import Seed, check_not_captured, check_seed, for_backward, of_operands, operands

_OPTIONS = (
    "Tensor? cu_seqlens_q, Tensor? cu_seqlens_k, Tensor? seed_tensor, bool causal, float scale, float dropout_p, "
    "SymInt dropout_seed, str backend"
)
torch.library.define("phi1::attention_forward", f"(Tensor q, Tensor k, Tensor v, {_OPTIONS}) -> (Tensor, Tensor)")
torch.library.define(
    "phi1::attention_backward",
    f"(Tensor grad_out, Tensor q, Tensor k, Tensor v, Tensor out, Tensor lse, {_OPTIONS}) -> (Tensor, Tensor, Tensor)",
)


def _backend_options(cu_q, cu_k, seed_tensor, causal, scale, p, dropout_seed, _) -> tuple:  # type: ignore[no-untyped-def]
    """What a backend takes, of an operator's options."""
    return cu_q, cu_k, causal, scale, p, of_operands(seed_tensor, dropout_seed)


def _forward_options(x: Tensor, options: tuple) -> tuple:
    *_, p, seed = found = _backend_options(*options)
    check_not_captured(p, seed, x)
    return found


@operator("phi1::attention_forward")
@without_autocast
def _forward(q: Tensor, k: Tensor, v: Tensor, *options) -> tuple[Tensor, Tensor]:  # type: ignore[no-untyped-def]
    return implementation("flash_attention", options[-1]).forward(q, k, v, *_forward_options(q, options))


# The same, into the caller's tensor.
torch.library.define(
    "phi1::attention_forward_out", f"(Tensor q, Tensor k, Tensor v, Tensor(a!) out, {_OPTIONS}) -> Tensor"
)


@operator("phi1::attention_forward_out")
@without_autocast
def _forward_out(q: Tensor, k: Tensor, v: Tensor, out: Tensor, *options) -> Tensor:  # type: ignore[no-untyped-def]
    arguments = _forward_options(q, options)
    torch.autograd.graph.increment_version(out)  # a native kernel's writing PyTorch does not see
    return implementation("flash_attention", options[-1]).forward(q, k, v, *arguments, out=out)[1]


@torch.library.register_fake("phi1::attention_forward_out")
def _forward_out_fake(q: Tensor, k: Tensor, v: Tensor, out: Tensor, *options) -> Tensor:  # type: ignore[no-untyped-def]
    return _forward_fake(q, k, v, *options)[1]


@operator("phi1::attention_backward")
@without_autocast
def _backward(grad_out, q, k, v, out, lse, *options) -> tuple[Tensor, Tensor, Tensor]:  # type: ignore[no-untyped-def]
    backward = implementation("flash_attention", options[-1]).backward
    assert backward is not None
    return backward(grad_out, q, k, v, out, lse, *_backend_options(*options))


@torch.library.register_fake("phi1::attention_forward")
def _forward_fake(q: Tensor, k: Tensor, v: Tensor, *options) -> tuple[Tensor, Tensor]:  # type: ignore[no-untyped-def]
    lse = q.new_empty((q.shape[0], q.shape[2], q.shape[1]), dtype=reference.working_dtype(q.dtype))
    return q.new_empty(q.shape), lse


@torch.library.register_fake("phi1::attention_backward")
def _backward_fake(grad_out, q, k, v, out, lse, *options) -> tuple[Tensor, Tensor, Tensor]:  # type: ignore[no-untyped-def]
    return q.new_empty(q.shape), k.new_empty(k.shape), v.new_empty(v.shape)


class _Attention(torch.autograd.Function):
    """Saves q, k, v, out and the log-sum-exp; the lse output carries no gradient."""

    @staticmethod
    def forward(ctx, q, k, v, *options):  # type: ignore[no-untyped-def]
        out, lse = torch.ops.phi1.attention_forward(q, k, v, *options)
        ctx.save_for_backward(q, k, v, out, lse, *options[:3])
        ctx.options = options[3:]
        ctx.mark_non_differentiable(lse)
        return out, lse

    @staticmethod
    @once_differentiable("flash_attention")
    def backward(ctx, saved, grad_out, _):  # type: ignore[no-untyped-def]
        grads = torch.ops.phi1.attention_backward(grad_out, *saved, *ctx.options)
        return *grads, *(None,) * (3 + len(ctx.options))


# (q, k, v, cu_q, cu_k, causal, scale, p, seed, out=) -> (out, lse);
# (grad_out, q, k, v, out, lse, cu_q, cu_k, causal, scale, p, seed) -> gradients of q, k and v.
register("flash_attention", "reference", reference.attention_forward, reference.attention_backward, differentiable=True)
register("flash_attention", "torch", torch_backend.attention, refuses=torch_backend.attention_refuses)


def _check_out(out: Tensor, q: Tensor, k: Tensor, v: Tensor) -> None:
    """Raises ValueError unless the result can be written to out."""
    check_rank("out", out, 4, "as q is")
    if out.shape != q.shape:
        raise ValueError(f"out.shape = {tuple(out.shape)}: must be q.shape = {tuple(q.shape)}")
    check_like("out", out, "q", q)
    if torch.is_grad_enabled() and (q.requires_grad or k.requires_grad or v.requires_grad):
        raise ValueError("out is given while gradients are recorded: call under torch.no_grad(), or leave out=None")
    if out.requires_grad:
        raise ValueError("out requires grad, and is to be overwritten: give out.detach()")
    if overlaps_itself(out):
        raise ValueError(
            f"out.stride() = {out.stride()}: elements share memory, as of an expanded tensor; give out.contiguous()"
        )
    if torch.compiler.is_compiling():
        return  # nothing has an address there, and the compiler puts copies where tensors share memory
    shared = [name for name, x in (("q", q), ("k", k), ("v", v)) if share_memory(out, x)]
    if shared:
        raise ValueError(
            f"out shares memory with {shared[0]}, which is read after out is written: give memory of its own"
        )


def check_documents(cu_seqlens_q: Tensor, cu_seqlens_k: Tensor, x: Tensor) -> None:
    """Raises ValueError unless both are int32 (documents + 1,) on x's device, of equally many documents."""
    for name, cu in (("cu_seqlens_q", cu_seqlens_q), ("cu_seqlens_k", cu_seqlens_k)):
        check_rank(name, cu, 1, "(documents + 1,)")
        check_int32(name, cu)
        check_device(name, cu, "the input", x)
    if cu_seqlens_q.shape[0] < 2:
        raise ValueError(f"cu_seqlens_q.shape = {tuple(cu_seqlens_q.shape)}: must be (documents + 1,)")
    if cu_seqlens_q.shape != cu_seqlens_k.shape:
        raise ValueError(
            f"cu_seqlens_q and cu_seqlens_k hold {cu_seqlens_q.shape[0] - 1} and {cu_seqlens_k.shape[0] - 1} "
            f"documents: must agree"
        )


@cast_inputs("q", "k", "v")
def flash_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    *,
    causal: bool = True,
    scale: float | None = None,
    dropout_p: float = 0.0,
    dropout_seed: Seed = 0,
    cu_seqlens_q: Tensor | None = None,
    cu_seqlens_k: Tensor | None = None,
    deterministic: bool = True,
    return_lse: bool = False,
    out: Tensor | None = None,
    backend: str | None = None,
) -> Tensor | tuple[Tensor, Tensor]:
    """out = dropout(softmax(scale q k^T + mask)) v, in FlashAttention's layout.

    q: (batch, seqlen_q, heads, head_dim). k, v: (batch, seqlen_k, kv_heads, head_dim); kv_heads divides heads.
    causal: query i sees key j if j <= i + seqlen_k - seqlen_q (bottom-right aligned). A row that sees no
        key gives zeros and lse = -inf.
    scale: default head_dim ** -0.5.
    dropout_p, dropout_seed: dropout of the probabilities; the mask is `kernels.reference.attention_keep`, bit for bit
        the same on every backend that serves dropout. p is rounded to a multiple of 1/256 (for p > 0 at least 1/256, at
        most 255/256): 0.1 becomes 26/256 = 0.1016, and what is kept is divided by one minus that. A seed has 64 bits, a
        negative one those of its two's complement. It is a number, or an int64 tensor of one element on q's device,
        which the kernels read where it is: a CUDA graph that was captured draws anew when the tensor's value was
        changed, where a number is an error. The backward pass, and a non-reentrant checkpoint's recomputation, take the
        value that the tensor had in the forward pass.
    cu_seqlens_q, cu_seqlens_k: packed documents: batch is 1, int32 (documents + 1,) offsets into the sequence that rise
        from 0 to its length; document i's queries see document i's keys only. In the mask, plane counts documents, and
        rows and columns start at 0 in each. Other offsets are an error, but on a GPU, where looking at them would stop
        the stream: `cuda` and `triton` take their running maximum, no greater than the length; queries of no document
        get zeros and lse = -inf, and what no document holds gets gradients of zero.
    deterministic: ask for a bitwise reproducible backward; a backend without a faster way ignores False.
    return_lse: also return the log-sum-exp (batch, heads, seqlen_q), float32, no gradient.
    out: write the result here (q's shape and dtype, may be a strided view, not in the memory of q, k or v); only where
        no gradient is needed.

    Under torch.autocast q, k and v are cast to its dtype (kernels/autocast.py).
    Returns out (q's shape and dtype), or (out, lse). Gradients flow to q, k, v; on `reference` they can be
    differentiated again, elsewhere that is an error (of PyTorch's on `torch`, where its kernel has no second
    derivative). Raises ValueError for arguments that do not fit, BackendError if `backend` cannot serve the call.
    """
    for name, x in (("q", q), ("k", k), ("v", v)):
        check_rank(name, x, 4, "(batch, seqlen, heads, head_dim)")
    check_dtype("q", q)
    check_like("k", k, "q", q)
    check_like("v", v, "q", q)
    batch, _, heads, head_dim = q.shape
    if k.shape[0] != batch or k.shape[3] != head_dim:
        raise ValueError(
            f"k.shape = {tuple(k.shape)}: must be ({batch}, seqlen_k, kv_heads, {head_dim}), q being {tuple(q.shape)}"
        )
    if v.shape != k.shape:
        raise ValueError(f"v.shape = {tuple(v.shape)}: must be k.shape = {tuple(k.shape)}")
    if k.shape[2] == 0 or heads % k.shape[2]:
        raise ValueError(f"k.shape[2] = {k.shape[2]} key/value heads: must divide q's {heads} heads")
    if q.shape[1] == 0 or k.shape[1] == 0:
        raise ValueError(f"seqlen_q = {q.shape[1]}, seqlen_k = {k.shape[1]}: must be at least 1")
    if heads == 0 or head_dim == 0:
        raise ValueError(f"q.shape = {tuple(q.shape)}: heads and head_dim must be at least 1")
    if not 0.0 <= dropout_p < 1.0:
        raise ValueError(f"dropout_p = {dropout_p}: must be in [0, 1)")
    if (cu_seqlens_q is None) != (cu_seqlens_k is None):
        raise ValueError("cu_seqlens_q and cu_seqlens_k: give both or neither")
    if cu_seqlens_q is not None and cu_seqlens_k is not None:
        check_documents(cu_seqlens_q, cu_seqlens_k, q)
        if batch != 1:
            raise ValueError(f"q.shape[0] = {batch} with cu_seqlens_q: fold the batch into the sequence (batch 1)")
    scale = head_dim**-0.5 if scale is None else scale
    if not -math.inf < scale < math.inf:
        raise ValueError(f"scale = {scale}: must be finite")
    seed = check_seed(dropout_seed, dropout_p, "q", q)
    if out is not None:
        _check_out(out, q, k, v)
    name = choose(
        "flash_attention",
        q.device,
        backend,
        dtype=q.dtype,
        head_dim=head_dim,
        size=size_class(q.shape[1], k.shape[1]),
        training=differentiated(q, k, v),
        dropout_p=dropout_p,
        return_lse=return_lse,
        packed=cu_seqlens_q is not None,
    )
    if isinstance(seed, Tensor) and differentiated(q, k, v):
        seed = for_backward(seed)
    forward = in_graph("flash_attention", name)
    if forward is not None:
        result, lse = forward(q, k, v, cu_seqlens_q, cu_seqlens_k, causal, scale, dropout_p, seed, out=out)
        return (result, lse.detach()) if return_lse else result
    if cu_seqlens_q is not None and cu_seqlens_k is not None:
        cu_seqlens_q, cu_seqlens_k = distinct(cu_seqlens_q, cu_seqlens_k)
    seed_tensor, number = operands(seed)
    arguments = (cu_seqlens_q, cu_seqlens_k, seed_tensor, causal, scale, dropout_p, number, name)
    if unwatched(q, k, v):
        if out is None:
            result, lse = _forward(q, k, v, *arguments)
        else:
            result, lse = out, _forward_out(q, k, v, out, *arguments)
    elif out is None:
        result, lse = _Attention.apply(*distinct(q, k, v), *arguments)
    else:
        result, lse = out, torch.ops.phi1.attention_forward_out(q, k, v, out, *arguments)
    return (result, lse) if return_lse else result
