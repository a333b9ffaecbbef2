"""The product of a layer that stands alone, as lm_head does: x W^T + b.

The op `product` is x W^T of up to 16 rows without derivatives, as decoding multiplies: a piece of this function and of
the CPU's `parallel_block`.
"""

import torch
import torch.nn.functional as F
from torch import Tensor

from kernels import cpu, memory, native, reference
from kernels.autocast import autocast_dtype
from kernels.autograd import untransformed
from kernels.registry import forced_backend, register


def _reference(x: Tensor, weight: Tensor) -> Tensor:
    return reference.linear(x, weight, x.new_zeros(()))


def _vendors(x: Tensor, weight: Tensor) -> Tensor:
    return memory.product(x, weight.T)


# (x (rows, width), weight (columns, width)) -> (rows, columns)
register("product", "reference", _reference)
register("product", "torch", _vendors)


def linear(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """`torch.nn.functional.linear`, and for a few rows on a CPU, of which no gradient is asked, `kernels.cpu.product`.

    x: (..., width). weight: (columns, width). bias: (columns,) or None. Returns (..., columns). Where another backend
        than `cpu` is asked for, under torch.autocast, in compiled code and whatever else traces or transforms it is
        PyTorch's function whatever the call, as it is for arguments that do not fit.
    """
    if torch.compiler.is_compiling() or x.device.type != "cpu" or x.dtype not in native.DTYPE_CODES:
        return F.linear(x, weight, bias)
    if bias is None or not _plain(x, weight, bias):
        return F.linear(x, weight, bias)
    forced = forced_backend(None)
    usable = [isa for isa in native.ISAS if isa.missing is None and forced in (None, "cpu", f"cpu/{isa.name}")]
    if not usable:
        return F.linear(x, weight, bias)
    y = cpu.product(usable[0], x.reshape(-1, x.shape[-1]), weight)
    return y.add_(bias).view(*x.shape[:-1], weight.shape[0])


def _plain(x: Tensor, weight: Tensor, bias: Tensor) -> bool:
    """Whether the kernels, which look at no shape, may be given these."""
    return (
        untransformed(x, weight, bias)  # first: a tracer wonders at the rest
        and x.numel() > 0
        and weight.dim() == 2
        and x.shape[-1] == weight.shape[1]
        and bias.shape == weight.shape[:1]
        and x.dtype == weight.dtype == bias.dtype
        and x.device == weight.device == bias.device
        and autocast_dtype(x.device) is None
    )
