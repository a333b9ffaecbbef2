"""The language-model loss: lm_head and cross-entropy in one op, logits never all at once."""

import torch
from torch import Tensor

from kernels import chunked_loss, reference
from kernels import torch as torch_backend
from kernels.checks import check, check_device, check_dtype, check_like, check_shape
from kernels.measured import size_class
from kernels.registry import choose, differentiated, implementation, register

torch.library.define(
    "phi1::linear_cross_entropy",
    "(Tensor hidden, Tensor weight, Tensor bias, Tensor targets, int ignore_index, float z_loss, bool with_grads, str backend)"
    " -> (Tensor, Tensor, Tensor, Tensor)",
)


@torch.library.impl("phi1::linear_cross_entropy", ("cpu", "cuda"))
def _impl(hidden, weight, bias, targets, ignore_index, z_loss, with_grads, backend):  # type: ignore[no-untyped-def]
    pieces = implementation("linear_cross_entropy", backend)
    return chunked_loss.linear_cross_entropy(hidden, weight, bias, targets, ignore_index, z_loss, with_grads, pieces)


@torch.library.register_fake("phi1::linear_cross_entropy")
def _fake(hidden, weight, bias, targets, ignore_index, z_loss, with_grads, backend):  # type: ignore[no-untyped-def]
    grads = [x.new_empty(x.shape if with_grads else (0,)) for x in (hidden, weight, bias)]
    return hidden.new_empty((), dtype=reference.working_dtype(hidden.dtype)), *grads


class _LinearCrossEntropy(torch.autograd.Function):
    """The gradients are made in the forward pass, while a chunk's logits exist, and only scaled in the backward."""

    @staticmethod
    def forward(ctx, hidden, weight, bias, targets, ignore_index, z_loss, with_grads, backend):  # type: ignore[no-untyped-def]
        loss, *grads = torch.ops.phi1.linear_cross_entropy(
            hidden, weight, bias, targets, ignore_index, z_loss, with_grads, backend
        )
        ctx.save_for_backward(*grads)
        return loss

    @staticmethod
    def backward(ctx, grad):  # type: ignore[no-untyped-def]
        return *((grad * g).to(g.dtype) for g in ctx.saved_tensors), None, None, None, None, None


register("linear_cross_entropy", "reference", reference.linear_cross_entropy)
register("linear_cross_entropy", "torch", chunked_loss.Pieces(torch_backend.cross_entropy))


def linear_cross_entropy(
    hidden: Tensor,
    weight: Tensor,
    bias: Tensor,
    targets: Tensor,
    *,
    ignore_index: int = -100,
    z_loss: float = 0.0,
    reduction: str = "mean",
    backend: str | None = None,
) -> Tensor:
    """Cross-entropy of softmax(hidden W^T + b) against targets.

    hidden: (..., width). weight: (columns, width), bias: (columns,), hidden's dtype. targets: (...) int64 in
    [0, columns) or ignore_index. z_loss: adds z_loss * log(sum exp logits)^2 to each term, which keeps the
    softmax's denominator near 1 (PaLM, arXiv 2204.02311, section 5: 1e-4). reduction: "sum", or "mean" over the targets that are not ignored (0 if all are).
    Returns a float32 scalar (float64 for float64 inputs). Gradients flow to hidden, weight and bias; they are
    made during the forward pass, so a loss that is only read should be computed under torch.no_grad(). Memory beside
    them: see kernels/chunked_loss.py. The backward pass scales them into copies.
    A target that is neither raises an error on the CPU. On a GPU, where looking at it would stop the stream, `cuda`
    makes the loss and its row's gradients NaN, and PyTorch's ops fail a device-side assertion.
    Raises ValueError for arguments that do not fit, BackendError if `backend` cannot serve the call.
    """
    check_dtype("hidden", hidden)
    width = hidden.shape[-1]
    check(
        weight.dim() == 2 and weight.shape[1] == width,
        lambda: f"weight.shape = {tuple(weight.shape)}: must be (columns, {width})",
    )
    check_shape("bias", bias, (weight.shape[0],), "(columns,)")
    check_like("weight", weight, "hidden", hidden)
    check_like("bias", bias, "hidden", hidden)
    check(targets.dtype == torch.int64, lambda: f"targets.dtype = {targets.dtype}: must be int64")
    check_shape("targets", targets, tuple(hidden.shape[:-1]), "(hidden's leading dims)")
    check_device("targets", targets, "hidden", hidden)
    check(z_loss >= 0, lambda: f"z_loss = {z_loss}: must be at least 0")
    check(reduction in ("mean", "sum"), lambda: f"reduction = {reduction!r}: must be 'mean' or 'sum'")
    name = choose(
        "linear_cross_entropy", hidden.device, backend,
        dtype=hidden.dtype, size=size_class(targets.numel()), training=differentiated(hidden, weight, bias),
        columns=weight.shape[0],
    )  # fmt: skip
    flat, flat_targets = hidden.reshape(-1, width), targets.reshape(-1)
    if name == "reference":
        loss = reference.linear_cross_entropy(flat, weight, bias, flat_targets, ignore_index, z_loss)
    else:
        with_grads = torch.is_grad_enabled() and any(x.requires_grad for x in (hidden, weight, bias))
        loss = _LinearCrossEntropy.apply(flat, weight, bias, flat_targets, ignore_index, z_loss, with_grads, name)
    return loss if reduction == "sum" else loss / (flat_targets != ignore_index).sum().clamp(min=1)
