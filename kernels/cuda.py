"""The `cuda` backend: CUDA C++ kernels (csrc/cuda), compiled where nvcc is.

The functions take the module that launches: kernels._native on a GPU; the tests register the emulator
(csrc/emulator), which runs the same kernels on CPU tensors.
"""

import contextlib
import functools
from typing import Any

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


def _device(x: Tensor) -> contextlib.AbstractContextManager[Any]:
    return torch.cuda.device(x.device) if x.is_cuda else contextlib.nullcontext()


def _stream(x: Tensor) -> int:
    return torch.cuda.current_stream(x.device).cuda_stream if x.is_cuda else 0


def rotary(
    module: Any, q: Tensor, k: Tensor, cos: Tensor, sin: Tensor, positions: Tensor | None, inverse: bool
) -> tuple[Tensor, Tensor]:
    """q and k rotated into new contiguous tensors; see `kernels.apply_rotary`."""
    q, k = native.rows_contiguous(q), native.rows_contiguous(k)
    q_out, k_out = q.new_empty(q.shape), k.new_empty(k.shape)
    if q.numel() + k.numel() == 0:
        return q_out, k_out
    cos, sin = cos.contiguous(), sin.contiguous()
    positions = None if positions is None else positions.contiguous()
    with _device(q):
        module.rotary_cuda(*native.rotary_arguments(q, k, q_out, k_out, cos, sin, positions, inverse), _stream(q))
    return q_out, k_out


def register_kernels(module: Any, devices: tuple[str, ...], missing: str | None = None) -> None:
    """Makes the launches of `module` the `cuda` backend of every op, for tensors on `devices`."""
    register(
        "apply_rotary", "cuda", functools.partial(rotary, module),
        devices=devices, missing=missing, refuses=native.refuses_dtype,
    )  # fmt: skip


register_kernels(native._native, devices=("cuda",), missing=_missing())
