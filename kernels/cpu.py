"""The `cpu` backend: C++ kernels (csrc/cpu), chosen at run time by the CPU's instruction sets (PHI1_ISA overrides)."""

import torch
from torch import Tensor

from kernels import native
from kernels.registry import register


def rotary(
    q: Tensor, k: Tensor, cos: Tensor, sin: Tensor, positions: Tensor | None, inverse: bool
) -> tuple[Tensor, Tensor]:
    """q and k rotated into new contiguous tensors; see `kernels.apply_rotary`."""
    if positions is not None:
        positions = positions.contiguous()
        low, high = (int(x) for x in torch.aminmax(positions)) if positions.numel() else (0, 0)
        if low < 0 or high >= cos.shape[0]:
            raise IndexError(f"positions in [{low}, {high}]: the rotary table has rows 0..{cos.shape[0] - 1}")
    q, k = native.rows_contiguous(q), native.rows_contiguous(k)
    q_out, k_out = q.new_empty(q.shape), k.new_empty(k.shape)
    native._native.rotary_cpu(
        *native.rotary_arguments(q, k, q_out, k_out, cos.contiguous(), sin.contiguous(), positions, inverse),
        torch.get_num_threads(),
    )
    return q_out, k_out


register("apply_rotary", "cpu", rotary, devices=("cpu",), missing=native.MISSING, refuses=native.refuses_dtype)
