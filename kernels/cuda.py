"""The `cuda` backend: CUDA C++ kernels (csrc/cuda), compiled where nvcc is.

The functions take the module that launches: kernels._native on a GPU; the tests register the emulator
(csrc/emulator), which runs the same kernels on CPU tensors.
"""

import contextlib
import functools
from typing import Any

import torch
from torch import Tensor

from kernels import native, reference
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


HEAD_DIMS = (32, 64, 128)


def attention_refuses(*, dtype: torch.dtype, head_dim: int, **_: object) -> str | None:
    """Why the kernels cannot serve this call of `flash_attention`, or None."""
    if dtype not in (torch.bfloat16, torch.float16):
        return f"dtype = {dtype}: the kernels multiply bfloat16 or float16"
    if head_dim not in HEAD_DIMS:
        return f"head_dim = {head_dim}: the kernels are compiled for {', '.join(map(str, HEAD_DIMS))}; pad q, k and v"
    return None


def _aligned(x: Tensor) -> Tensor:
    """x if each of its rows starts at a multiple of 16 bytes and is contiguous, else a contiguous copy."""
    strides = [stride for stride, size in zip(x.stride()[:-1], x.shape[:-1], strict=True) if size > 1]
    fits = x.stride(-1) == 1 and x.data_ptr() % 16 == 0 and all(stride % 8 == 0 for stride in strides)
    return x if fits else x.clone(memory_format=torch.contiguous_format)


def _attention_arguments(
    q: Tensor, k: Tensor, v: Tensor, out: Tensor, lse: Tensor, cu_q: Tensor | None, cu_k: Tensor | None,
    causal: bool, scale: float, dropout_p: float, dropout_seed: int,
) -> tuple[object, ...]:  # fmt: skip
    if not 0 < scale < float("inf"):
        raise ValueError(f"scale = {scale}: the cuda backend takes a positive number; negate q for a negative one")
    for name, size in (("seqlen_q", q.shape[1]), ("seqlen_k", k.shape[1])):
        if size >= 2**30:
            raise ValueError(f"{name} = {size}: the cuda backend counts rows up to {2**30 - 1}; split the sequence")
    if q.shape[0] * q.shape[2] >= 2**31:
        raise ValueError(f"batch * heads = {q.shape[0] * q.shape[2]}: must be below {2**31}; split the batch")
    cu = tuple(0 if x is None else x.data_ptr() for x in (cu_q, cu_k))
    return (
        *(native.heads_spec(x) for x in (q, k, v, out)), lse.data_ptr(),
        (q.shape[0], q.shape[1], k.shape[1], q.shape[2], k.shape[2], q.shape[3]),
        cu, 0 if cu_q is None else cu_q.shape[0] - 1, causal, scale,
        reference.dropout_threshold(dropout_p), reference.dropout_scale(dropout_p), dropout_seed % 2**64,
        native.DTYPE_CODES[q.dtype], _stream(q),
    )  # fmt: skip


def attention_forward(
    module: Any, q: Tensor, k: Tensor, v: Tensor, cu_q: Tensor | None, cu_k: Tensor | None, *options: Any
) -> tuple[Tensor, Tensor]:
    """out (contiguous) and the log-sum-exp (batch, heads, seqlen_q) float32; see `kernels.flash_attention`."""
    q, k, v = _aligned(q), _aligned(k), _aligned(v)
    cu_q, cu_k = (None if x is None else x.contiguous() for x in (cu_q, cu_k))
    out = torch.empty(q.shape, dtype=q.dtype, device=q.device)
    lse = torch.empty((q.shape[0], q.shape[2], q.shape[1]), dtype=torch.float32, device=q.device)
    if q.numel():
        with _device(q):
            module.attention_forward_cuda(*_attention_arguments(q, k, v, out, lse, cu_q, cu_k, *options))
    return out, lse


def attention_backward(
    module: Any, grad_out: Tensor, q: Tensor, k: Tensor, v: Tensor, out: Tensor, lse: Tensor,
    cu_q: Tensor | None, cu_k: Tensor | None, *options: Any,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    """Gradients of q, k, v (contiguous), bitwise reproducible."""
    grad_out, q, k, v, out = (_aligned(x) for x in (grad_out, q, k, v, out))
    cu_q, cu_k = (None if x is None else x.contiguous() for x in (cu_q, cu_k))
    lse = lse.contiguous()
    grads = [torch.empty(x.shape, dtype=x.dtype, device=x.device) for x in (q, k, v)]
    row_stats = torch.empty((*lse.shape, 2), dtype=torch.float32, device=q.device)
    if q.numel():
        with _device(q):
            module.attention_backward_cuda(
                [native.heads_spec(x) for x in (grad_out, *grads)],
                row_stats.data_ptr(),
                *_attention_arguments(q, k, v, out, lse, cu_q, cu_k, *options),
            )
    return grads[0], grads[1], grads[2]


def register_kernels(module: Any, devices: tuple[str, ...], missing: str | None = None) -> None:
    """Makes the launches of `module` the `cuda` backend of every op, for tensors on `devices`."""
    register(
        "apply_rotary", "cuda", functools.partial(rotary, module),
        devices=devices, missing=missing, refuses=native.refuses_dtype,
    )  # fmt: skip
    register(
        "flash_attention", "cuda",
        (functools.partial(attention_forward, module), functools.partial(attention_backward, module)),
        devices=devices, missing=missing, refuses=attention_refuses,
    )  # fmt: skip


register_kernels(native._native, devices=("cuda",), missing=_missing())
