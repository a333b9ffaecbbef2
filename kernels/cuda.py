"""The `cuda` backend: CUDA C++ kernels (csrc/cuda), compiled where nvcc is."""

import torch
from torch import Tensor

from kernels import native
from kernels.registry import register


def _missing() -> str | None:
    if native.MISSING is not None:
        return native.MISSING
    if not native._native.has_cuda:
        return "kernels._native was built without CUDA; build it where nvcc is, with PHI1_CUDA=on"
    if not torch.cuda.is_available():
        return "torch.cuda.is_available() is False: no usable NVIDIA GPU, or a CPU build of torch"
    return None


def rotary(
    q: Tensor, k: Tensor, cos: Tensor, sin: Tensor, positions: Tensor | None, inverse: bool
) -> tuple[Tensor, Tensor]:
    """q and k rotated into new contiguous tensors; see `kernels.apply_rotary`."""
    q, k = native.rows_contiguous(q), native.rows_contiguous(k)
    q_out, k_out = q.new_empty(q.shape), k.new_empty(k.shape)
    if q.numel() + k.numel() == 0:
        return q_out, k_out
    cos, sin = cos.contiguous(), sin.contiguous()
    positions = None if positions is None else positions.contiguous()
    with torch.cuda.device(q.device):
        native._native.rotary_cuda(
            *native.rotary_arguments(q, k, q_out, k_out, cos, sin, positions, inverse),
            torch.cuda.current_stream(q.device).cuda_stream,
        )
    return q_out, k_out


register("apply_rotary", "cuda", rotary, devices=("cuda",), missing=_missing(), refuses=native.refuses_dtype)
