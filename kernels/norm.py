"""LayerNorm."""

import math

import torch
import torch.nn.functional as F
from torch import Tensor

from kernels import reference
from kernels.autocast import autocast_dtype, without_autocast
from kernels.autograd import distinct, once_differentiable, operator, unwatched
from kernels.checks import check_device, check_dtype, check_like, check_shape
from kernels.measured import size_class
from kernels.registry import choose, differentiated, implementation, in_graph, register

torch.library.define(
    "phi1::layer_norm_forward", "(Tensor x, Tensor weight, Tensor bias, float eps, str backend) -> (Tensor, Tensor)"
)
torch.library.define(
    "phi1::layer_norm_backward",
    "(Tensor grad, Tensor x, Tensor weight, Tensor stats, str backend) -> (Tensor, Tensor, Tensor)",
)


@operator("phi1::layer_norm_forward")
def _forward(x: Tensor, weight: Tensor, bias: Tensor, eps: float, backend: str) -> tuple[Tensor, Tensor]:
    return implementation("layer_norm", backend).forward(x, weight, bias, eps)


@operator("phi1::layer_norm_backward")
def _backward(grad: Tensor, x: Tensor, weight: Tensor, stats: Tensor, backend: str) -> tuple[Tensor, Tensor, Tensor]:
    backward = implementation("layer_norm", backend).backward
    assert backward is not None
    return backward(grad, x, weight, stats)


@torch.library.register_fake("phi1::layer_norm_forward")
def _forward_fake(x, weight, bias, eps, backend):  # type: ignore[no-untyped-def]
    return x.new_empty(x.shape), x.new_empty((x.numel() // weight.numel(), 2), dtype=torch.float32)


@torch.library.register_fake("phi1::layer_norm_backward")
def _backward_fake(grad, x, weight, stats, backend):  # type: ignore[no-untyped-def]
    return x.new_empty(x.shape), weight.new_empty(weight.shape), weight.new_empty(weight.shape)


class _LayerNorm(torch.autograd.Function):
    """Saves x and of each row its mean and 1 / sqrt(variance + eps)."""

    @staticmethod
    def forward(ctx, x, weight, bias, eps, backend):  # type: ignore[no-untyped-def]
        y, stats = torch.ops.phi1.layer_norm_forward(x, weight, bias, eps, backend)
        ctx.save_for_backward(x, weight, stats)
        ctx.backend = backend
        return y

    @staticmethod
    @once_differentiable("layer_norm")
    def backward(ctx, saved, grad):  # type: ignore[no-untyped-def]
        return *torch.ops.phi1.layer_norm_backward(grad, *saved, ctx.backend), None, None


@without_autocast
def _torch(x: Tensor, weight: Tensor, bias: Tensor, eps: float) -> Tensor:
    if x.device.type == "cpu" and x.dtype in (torch.bfloat16, torch.float16):
        # PyTorch adds up the gradients of weight and bias in 16 bits on a CPU: up to 7 times eager's error, with one
        # thread.
        return F.layer_norm(x.float(), weight.shape, weight.float(), bias.float(), eps).to(x.dtype)
    return F.layer_norm(x, weight.shape, weight, bias, eps)


# (x, weight, bias, eps) -> y; with a backward, (y, stats) and (grad, x, weight, stats) -> the three gradients.
register("layer_norm", "reference", reference.layer_norm)
register("layer_norm", "torch", _torch)


def layer_norm(x: Tensor, weight: Tensor, bias: Tensor, eps: float = 1e-5, *, backend: str | None = None) -> Tensor:
    """(x - mean) / sqrt(variance + eps) * weight + bias over the last dim, statistics in float32.

    x: (..., hidden). weight, bias: (hidden,), x's dtype; under torch.autocast cast to it. Returns x's shape and dtype,
    under autocast too (`torch.nn.functional.layer_norm` then returns float32 on a GPU).
    Raises ValueError for arguments that do not fit, BackendError if `backend` cannot serve the call.
    """
    check_dtype("x", x)
    if x.dim() == 0 or x.shape[-1] == 0:
        raise ValueError(f"x.shape = {tuple(x.shape)}: must be (..., hidden), hidden at least 1")
    for name, parameter in (("weight", weight), ("bias", bias)):
        check_shape(name, parameter, (x.shape[-1],), "(hidden,), x's last dim")
    if autocast_dtype(x.device) is not None:
        weight, bias = weight.to(x.dtype), bias.to(x.dtype)
    for name, parameter in (("weight", weight), ("bias", bias)):
        check_like(name, parameter, "x", x)
        check_device(name, parameter, "x", x)
    name = choose(
        "layer_norm",
        x.device,
        backend,
        dtype=x.dtype,
        size=size_class(math.prod(x.shape[:-1])),
        training=differentiated(x, weight, bias),
    )
    forward = in_graph("layer_norm", name)
    if forward is not None:
        return forward(x, weight, bias, eps)
    if unwatched(x, weight, bias):
        return _forward(x, weight, bias, eps, name)[0]
    return _LayerNorm.apply(*distinct(x, weight, bias), eps, name)
