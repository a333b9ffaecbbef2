"""What the native backends share: how tensors are handed to kernels._native.

A binding takes tensors, never addresses, so that what a kernel reads and writes lives as long as the call: a copy made in
the argument list too.
"""

import importlib
from typing import Any

import torch
from torch import Tensor

MISSING: str | None = None
"""Why there is no native module, or None."""
_native: Any = None
try:
    _native = importlib.import_module("kernels._native")
except ImportError as error:  # not built, or built for another Python
    MISSING = f"kernels._native cannot be imported ({error}); build it with `pip install -e .`"

ISA_NAMES = ("amx_bf16", "avx512_bf16", "avx512", "avx2", "portable")
ISAS: list[Any] = [] if MISSING is not None else _native.isas()
"""The CPU's kernels of each instruction set (`name`, `missing`: why not here, and the kernels), most capable first."""

DTYPE_CODES = {torch.float32: 0, torch.bfloat16: 1, torch.float16: 2}


def refuses_dtype(*, dtype: torch.dtype, **_: object) -> str | None:
    """Why native kernels cannot serve this dtype, or None."""
    return None if dtype in DTYPE_CODES else f"dtype = {dtype}: native kernels take float32, bfloat16 and float16"


def rows_contiguous(x: Tensor) -> Tensor:
    """x if its last dim is contiguous, else a contiguous copy."""
    return x if x.stride(-1) == 1 or x.shape[-1] == 1 else x.contiguous()


def positive_scale(q: Tensor, scale: float) -> tuple[Tensor, float, float]:
    """(s q, t, s) with the same scores, t > 0 and s of -1, 0 and 1, for kernels whose running maximum grows with scale."""
    if scale > 0:
        return q, scale, 1.0
    return (-q, -scale, -1.0) if scale < 0 else (q * 0.0, 1.0, 0.0)


def rotary_arguments(
    q: Tensor,
    k: Tensor,
    q_out: Tensor,
    k_out: Tensor,
    cos: Tensor,
    sin: Tensor,
    positions: Tensor | None,
    inverse: bool,
) -> tuple[object, ...]:
    """The arguments of `Isa.rotary` (an entry of `ISAS`) and `_native.rotary_cuda`, but for the last (threads or stream)."""
    batch, seq, heads, head_dim = q.shape
    position_stride = positions.stride(0) if positions is not None and positions.dim() == 2 else 0
    return (
        q, k, q_out, k_out, (batch, seq, heads, k.shape[2], head_dim),
        cos, sin, cos.shape[1], positions, position_stride, inverse, DTYPE_CODES[q.dtype],
    )  # fmt: skip
