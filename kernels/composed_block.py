"""The parallel block composed of the package's ops: `reference` and `torch`, which PyTorch differentiates."""

import functools
from collections.abc import Callable, Mapping
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from kernels import cpu, native, reference, triton
from kernels.attention import flash_attention
from kernels.autograd import operator
from kernels.norm import layer_norm
from kernels.reference import Dropout
from kernels.registry import machine_of, register
from kernels.rotary import apply_rotary
from kernels.seeds import check_not_captured, of_operands, operands


def _attention(
    piece: str | None,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    cu_seqlens_q: Tensor | None,
    cu_seqlens_k: Tensor | None,
    dropout: Dropout,
) -> Tensor:
    options = {"cu_seqlens_q": cu_seqlens_q, "cu_seqlens_k": cu_seqlens_k, "backend": piece}
    attention = flash_attention(q, k, v, dropout_p=dropout.p, dropout_seed=dropout.seed, **options)  # type: ignore[arg-type]
    assert isinstance(attention, Tensor)
    return attention


def _dropped(y: Tensor, dropout: Dropout) -> Tensor:
    if dropout.p == 0:
        return y
    return y * torch.ops.phi1.residual_factor(y.detach(), *operands(dropout.seed), dropout.p)


def _composed(
    linear: Callable[..., Tensor], activations: Mapping[str, Callable[..., Tensor]], *arguments: Any, piece: str | None
) -> Tensor:
    """`reference.parallel_block` of the package's ops, each on the backend `piece`, or None: on its own choice."""
    norm, rotary = functools.partial(layer_norm, backend=piece), functools.partial(apply_rotary, backend=piece)
    steps = reference.Steps(norm, linear, rotary, functools.partial(_attention, piece), activations, _dropped)
    return reference.parallel_block(steps, *arguments)


_TORCH_ACTIVATIONS: dict[str, Callable[..., Tensor]] = {
    "gelu_new": functools.partial(F.gelu, approximate="tanh"),
    "relu2": lambda u: F.relu(u).square(),
}
register("parallel_block", "reference", functools.partial(_composed, reference.linear, reference.ACTIVATIONS))
register("parallel_block", "torch", functools.partial(_composed, F.linear, _TORCH_ACTIVATIONS))

# What residual dropout multiplies each element by: 0, or 1 / (1 - p). An op, so that torch.compile carries the seed as
# a symbol (no new graph for each seed) and does not look inside.
torch.library.define(
    "phi1::residual_factor", "(Tensor like, Tensor? seed_tensor, SymInt dropout_seed, float p) -> Tensor"
)


@operator("phi1::residual_factor")
def _residual_factor(like: Tensor, seed_tensor: Tensor | None, dropout_seed: int, p: float) -> Tensor:
    seed = of_operands(seed_tensor, dropout_seed)
    check_not_captured(p, seed, like)
    # The reference's integer tensors are 142 kernels and 61.8 GB for a layer of phi-1 with 16,384 tokens.
    batch, seq, hidden = like.shape
    shape, scale = (batch * seq, hidden), reference.dropout_scale(p)
    if like.device.type == "cuda" and "triton" not in machine_of(like.device).missing:
        return triton.residual_factor(like, seed, p)
    if like.device.type == "cpu" and native.MISSING is None:
        keep = cpu.residual_keep(seed, *shape, p)
    else:
        keep = reference.residual_keep(seed, *shape, p, like.device)
    return (keep * scale).to(like.dtype).view(like.shape)


@torch.library.register_fake("phi1::residual_factor")
def _residual_factor_fake(like: Tensor, seed_tensor: Tensor | None, dropout_seed: int, p: float) -> Tensor:
    return like.new_empty(like.shape)
