"""What the native backends share: how tensors are handed to kernels._native.

A binding takes tensors, never addresses, so that what a kernel reads and writes lives as long as the call: a copy made
in the argument list too.
"""

import contextlib
import importlib
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from kernels import reference
from kernels.reference import Dropout
from kernels.seeds import Seed

if TYPE_CHECKING:
    from kernels.fused_block import Layout

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
_ACTIVATION_CODES = {name: code for code, name in enumerate(reference.ACTIVATIONS)}


def on_device(x: Tensor) -> contextlib.AbstractContextManager[Any]:
    """Launches go to x's GPU; on a CPU (an emulator, Triton's interpreter) there is nothing to choose."""
    return torch.cuda.device(x.device) if x.is_cuda else contextlib.nullcontext()


def refuses_dtype(*, dtype: torch.dtype, **_: object) -> str | None:
    """Why native kernels cannot serve this dtype, or None."""
    return None if dtype in DTYPE_CODES else f"dtype = {dtype}: native kernels take float32, bfloat16 and float16"


HEAD_DIMS = (32, 64, 128)
"""What the attention kernels of all backends of ours are made for."""


def refuses_head_dim(head_dim: int) -> str | None:
    """Why our attention kernels cannot serve this head_dim, or None."""
    if head_dim in HEAD_DIMS:
        return None
    return f"head_dim = {head_dim}: the kernels are made for {', '.join(map(str, HEAD_DIMS))}; pad q, k and v"


def rows_contiguous(x: Tensor) -> Tensor:
    """x if its last dim is contiguous, else a contiguous copy."""
    return x if x.stride(-1) == 1 or x.shape[-1] == 1 else x.contiguous()


def positive_scale(q: Tensor, scale: float) -> tuple[Tensor, float, float]:
    """(s q, t, s) with the same scores, t > 0 and s of -1, 0 and 1, for kernels whose running maximum grows with scale.

    The gradient of q is s times the kernel's. For a scale of 0, t is so small that the kernel's is finite in fp16 too:
    0 times infinity would be NaN.
    """
    if scale > 0:
        return q, scale, 1.0
    return (-q, -scale, -1.0) if scale < 0 else (q * 0.0, 2.0**-64, 0.0)


def dropout_arguments(dropout: Dropout) -> tuple[int, float, int, Tensor | None]:
    """(threshold, scale, seed, the memory that holds the seed, or None): csrc/bindings.h, Dropout."""
    seed = dropout.seed
    number, memory = (0, seed) if isinstance(seed, Tensor) else (seed % 2**64, None)
    return reference.dropout_threshold(dropout.p), reference.dropout_scale(dropout.p), number, memory


def attention_arguments(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    out: Tensor,
    lse: Tensor,
    cu_q: Tensor | None,
    cu_k: Tensor | None,
    causal: bool,
    scale: float,
    dropout_p: float,
    dropout_seed: Seed,
) -> tuple[object, ...]:
    """csrc/bindings.h, attention_args."""
    (batch, seqlen_q, heads, head_dim), (_, seqlen_k, kv_heads, _) = q.shape, k.shape
    return (
        q,
        k,
        v,
        out,
        lse,
        (batch, seqlen_q, seqlen_k, heads, kv_heads, head_dim),
        (None, None, 0) if cu_q is None or cu_k is None else (cu_q, cu_k, cu_q.shape[0] - 1),
        causal,
        scale,
        dropout_arguments(Dropout(dropout_p, dropout_seed)),
        DTYPE_CODES[q.dtype],
    )


def after_in_arguments(z: Tensor, bias: Tensor, activated: Tensor, layout: "Layout") -> tuple[object, ...]:
    """csrc/bindings.h, after_in_args. The tensors in `layout` are contiguous."""
    cos, sin, positions = layout.cos, layout.sin, layout.positions
    sizes = (
        layout.batch,
        layout.seq,
        layout.shape.heads + layout.shape.kv_heads,
        layout.shape.head_dim,
        cos.shape[1],
        z.shape[1],
        layout.inner,
        activated.stride(0),
    )
    position_stride = positions.stride(0) if positions is not None and positions.dim() == 2 else 0
    codes = _ACTIVATION_CODES[layout.shape.activation], DTYPE_CODES[z.dtype]
    return z, bias, activated, sizes, (cos, sin, cos.shape[0]), positions, position_stride, *codes


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
    """The arguments of `Isa.rotary` (an entry of `ISAS`) and `_native.rotary_cuda`, but for the last (threads or
    stream).
    """
    batch, seq, heads, head_dim = q.shape
    position_stride = positions.stride(0) if positions is not None and positions.dim() == 2 else 0
    return (
        q,
        k,
        q_out,
        k_out,
        (batch, seq, heads, k.shape[2], head_dim),
        cos,
        sin,
        cos.shape[1],
        positions,
        position_stride,
        inverse,
        DTYPE_CODES[q.dtype],
    )
