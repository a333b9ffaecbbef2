"""The matrix product of the layer and of the loss: the vendor's library's, in numbers that it has a kernel for."""

import functools

import torch
from torch import Tensor


@functools.cache
def _has_kernel(dtype: torch.dtype) -> bool:
    """Whether oneDNN multiplies matrices of a 16-bit type on this CPU; where it does not, PyTorch's own loops do."""
    asks = {torch.bfloat16: "_is_mkldnn_bf16_supported", torch.float16: "_is_mkldnn_fp16_supported"}
    return dtype not in asks or getattr(torch.ops.mkldnn, asks[dtype])()


def matrix_product(a: Tensor, b: Tensor, out: Tensor | None = None) -> Tensor:
    """a b for matrices of one dtype, summed in float32 where that is of 16 bits; in `out`, if given.

    On a CPU without products in that dtype it is computed in float32 and rounded: of 512 x 512 by 512 x 2,048 in bfloat16
    PyTorch's loops made 6 GFLOP/s on a Zen 3, float32 with both conversions 29.
    """
    if a.device.type == "cpu" and not _has_kernel(a.dtype):
        wide = torch.mm(a.float(), b.float())
        return wide.to(a.dtype) if out is None else out.copy_(wide)
    return torch.mm(a, b) if out is None else torch.mm(a, b, out=out)
