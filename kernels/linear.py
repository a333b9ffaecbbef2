"""The product of a layer that stands alone, as lm_head does: x W^T + b.

The op `product` is x W^T of up to 16 rows without derivatives, as decoding multiplies: a piece of this function and of
the CPU's `parallel_block`.
"""

import torch
import torch.nn.functional as F
from torch import Tensor

from kernels import cpu, memory, native, reference
from kernels.autocast import autocast_dtype
from kernels.registry import differentiated, forced_backend, register


def _reference(x: Tensor, weight: Tensor) -> Tensor:
    return reference.linear(x, weight, x.new_zeros(()))


def _vendors(x: Tensor, weight: Tensor) -> Tensor:
    return memory.product(x, weight.T)


# (x (rows, width), weight (columns, width)) -> (rows, columns)
register("product", "reference", _reference)
register("product", "torch", _vendors)


def linear(x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    """`torch.nn.functional.linear`, and for a few rows on a CPU, of which no gradient is asked, `kernels.cpu.product`.

    x: (..., width). weight: (columns, width). bias: (columns,). Returns (..., columns). Where another backend than
        `cpu`
    is asked for, under torch.autocast and in compiled code it is PyTorch's function whatever the call.
    """
    if torch.compiler.is_compiling() or x.device.type != "cpu" or x.dtype not in native.DTYPE_CODES:
        return F.linear(x, weight, bias)
    forced = forced_backend(None)
    usable = [isa for isa in native.ISAS if isa.missing is None and forced in (None, "cpu", f"cpu/{isa.name}")]
    plain = autocast_dtype(x.device) is None and x.dtype == weight.dtype == bias.dtype
    if not usable or not plain or differentiated(x, weight, bias):
        return F.linear(x, weight, bias)
    y = cpu.product(usable[0], x.reshape(-1, x.shape[-1]), weight)
    return y.add_(bias).view(*x.shape[:-1], -1)
