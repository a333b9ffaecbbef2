"""The language-model loss: lm_head and cross-entropy in one op, logits never all at once."""

import functools

import torch
from torch import Tensor

from kernels import chunked_loss, reference
from kernels import torch as torch_backend
from kernels.autocast import cast_inputs, without_autocast
from kernels.autograd import once_differentiable, operator
from kernels.checks import check_device, check_dtype, check_int64, check_like, check_shape, check_tensor
from kernels.measured import size_class
from kernels.registry import choose, differentiated, implementation, in_graph, register

torch.library.define(
    "phi1::linear_cross_entropy",
    "(Tensor hidden, Tensor weight, Tensor bias, Tensor targets, int ignore_index, float z_loss, bool with_grads, str "
    "backend) -> (Tensor, Tensor, Tensor, Tensor)",
)


torch.library.define("phi1::scaled_gradient", "(Tensor gradient, Tensor scale, ScalarType dtype) -> Tensor")


@operator("phi1::linear_cross_entropy")
@without_autocast
def _impl(hidden, weight, bias, targets, ignore_index, z_loss, with_grads, backend):  # type: ignore[no-untyped-def]
    if targets.device.type == "cpu":
        chunked_loss.check_targets(targets, weight.shape[0], ignore_index)
    forward = implementation("linear_cross_entropy", backend).forward
    return forward(hidden, weight, bias, targets, ignore_index, z_loss, with_grads)


@torch.library.register_fake("phi1::linear_cross_entropy")
def _fake(hidden, weight, bias, targets, ignore_index, z_loss, with_grads, backend):  # type: ignore[no-untyped-def]
    wide = reference.working_dtype(hidden.dtype)
    kinds = (
        (hidden, chunked_loss.gradient_dtype(hidden.dtype)),
        (weight, chunked_loss.gradient_dtype(hidden.dtype)),
        (bias, wide),
    )
    grads = [x.new_empty(x.shape if with_grads else (0,), dtype=dtype) for x, dtype in kinds]
    return hidden.new_empty((), dtype=wide), *grads


@operator("phi1::scaled_gradient")
def _scaled(gradient: Tensor, scale: Tensor, dtype: torch.dtype) -> Tensor:
    return chunked_loss.scaled(gradient, scale, dtype)


@torch.library.register_fake("phi1::scaled_gradient")
def _scaled_fake(gradient: Tensor, scale: Tensor, dtype: torch.dtype) -> Tensor:
    return gradient.new_empty(gradient.shape, dtype=dtype)


@once_differentiable("linear_cross_entropy")
def _scaled_gradients(ctx, saved, grad):  # type: ignore[no-untyped-def]
    inputs, made = saved[:3], saved[4:]
    return tuple(
        torch.ops.phi1.scaled_gradient(gradient, grad, x.dtype) if needed else None
        for x, gradient, needed in zip(inputs, made, ctx.needs_input_grad, strict=False)
    )


class _LinearCrossEntropy(torch.autograd.Function):
    """The gradients are made in the forward pass, while a chunk's logits exist, and only scaled in the backward."""

    @staticmethod
    def forward(*arguments):  # type: ignore[no-untyped-def]
        return torch.ops.phi1.linear_cross_entropy(*arguments)

    @staticmethod
    def setup_context(ctx, inputs, output):  # type: ignore[no-untyped-def]
        _, *grads = output
        ctx.options = inputs[4:]
        ctx.mark_non_differentiable(*grads)
        ctx.set_materialize_grads(False)  # theirs would be as large as they are
        ctx.save_for_backward(*inputs[:4], *grads)

    @staticmethod
    def backward(ctx, grad, *_):  # type: ignore[no-untyped-def]
        ignore_index, z_loss, _, backend = ctx.options
        if grad is None:
            return (None,) * 8
        if backend == "torch" and torch.is_grad_enabled() and not torch.compiler.is_compiling():
            grads = _differentiable_gradients(ctx, grad, ignore_index, z_loss)
        else:
            grads = _scaled_gradients(ctx, grad)
        return *grads, None, None, None, None, None


def _differentiable_gradients(ctx, grad, ignore_index, z_loss):  # type: ignore[no-untyped-def]
    """For create_graph=True, by PyTorch: with the logits in full."""
    *inputs, targets = ctx.saved_tensors[:4]
    loss = functools.partial(reference.linear_cross_entropy, targets=targets, ignore_index=ignore_index, z_loss=z_loss)
    return torch.func.vjp(loss, *inputs)[1](grad)


register("linear_cross_entropy", "reference", reference.linear_cross_entropy)
register("linear_cross_entropy", "torch", *chunked_loss.operators(chunked_loss.Pieces(torch_backend.cross_entropy)))


@cast_inputs("hidden", "weight", "bias")
def linear_cross_entropy(
    hidden: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    targets: Tensor,
    *,
    ignore_index: int = -100,
    z_loss: float = 0.0,
    reduction: str = "mean",
    backend: str | None = None,
) -> Tensor:
    """Cross-entropy of softmax(hidden W^T + b) against targets.

    hidden: (..., width). weight: (columns, width), bias: (columns,) or None, hidden's dtype. targets: (...) int64 in
    [0, columns) or ignore_index. z_loss: adds z_loss * log(sum exp logits)^2 to each term, which keeps the
    softmax's denominator near 1 (PaLM, arXiv 2204.02311, section 5: 1e-4). reduction: "sum", or "mean" over the
    targets that are not ignored (0 if all are). What hidden holds in an ignored row, NaN too, changes nothing.
    Returns a float32 scalar (float64 for float64 inputs). Gradients flow to hidden, weight and bias; they are
    made during the forward pass, so a loss that is only read should be computed under torch.no_grad(). Memory beside
    them: see kernels/chunked_loss.py. The backward pass scales them into copies, in float32 before the rounding.
    Second derivatives: on `reference` and `torch`, with the logits in full; the others raise NotImplementedError.
    Under torch.autocast hidden, weight and bias are cast to its dtype (kernels/autocast.py); logits have that dtype.
    A target that is neither raises IndexError on the CPU. On a GPU, where looking at it would stop the stream, `cuda`
    and `triton` make the loss and its row's gradients NaN, and PyTorch's ops fail a device-side assertion.
    Raises ValueError for arguments that do not fit, BackendError if `backend` cannot serve the call.
    """
    check_dtype("hidden", hidden)
    if hidden.dim() == 0:
        raise ValueError("hidden.shape = (): must be (..., width)")
    check_tensor("weight", weight, "(columns, width)")
    check_tensor("targets", targets, "hidden's leading dims")
    ignore_index = check_int64("ignore_index", ignore_index)
    width = hidden.shape[-1]
    if not (weight.dim() == 2 and weight.shape[0] > 0 and weight.shape[1] == width):
        raise ValueError(f"weight.shape = {tuple(weight.shape)}: must be (columns, {width}), with a column at least")
    columns = weight.shape[0]
    if bias is None:
        bias = weight.new_zeros(columns)
    check_shape("bias", bias, (columns,), "(columns,)")
    check_like("weight", weight, "hidden", hidden)
    check_like("bias", bias, "hidden", hidden)
    if targets.dtype != torch.int64:
        raise ValueError(f"targets.dtype = {targets.dtype}: must be int64")
    check_shape("targets", targets, tuple(hidden.shape[:-1]), "(hidden's leading dims)")
    check_device("targets", targets, "hidden", hidden)
    if not z_loss >= 0:
        raise ValueError(f"z_loss = {z_loss}: must be at least 0")
    if reduction not in ("mean", "sum"):
        raise ValueError(f"reduction = {reduction!r}: must be 'mean' or 'sum'")
    name = choose(
        "linear_cross_entropy",
        hidden.device,
        backend,
        dtype=hidden.dtype,
        size=size_class(targets.numel()),
        training=differentiated(hidden, weight, bias),
        columns=columns,
    )
    flat, flat_targets = hidden.reshape(targets.numel(), width), targets.reshape(-1)
    forward = in_graph("linear_cross_entropy", name)
    if forward is not None:
        if targets.device.type == "cpu" and not torch.compiler.is_compiling():  # there gather fails by itself
            chunked_loss.check_targets(flat_targets, columns, ignore_index)
        loss = forward(flat, weight, bias, flat_targets, ignore_index, z_loss)
    else:
        with_grads = differentiated(hidden, weight, bias)
        loss, *_ = _LinearCrossEntropy.apply(flat, weight, bias, flat_targets, ignore_index, z_loss, with_grads, name)
    return loss if reduction == "sum" else loss / (flat_targets != ignore_index).sum().clamp(min=1)
