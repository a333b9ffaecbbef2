"""The `triton` backend. On a machine without a GPU it runs in Triton's interpreter, if TRITON_INTERPRET=1 is set."""

import importlib
import importlib.util
import os
from typing import Any

import torch

from kernels import chunked_loss, native
from kernels.fused_block import Pieces
from kernels.registry import register

HEAD_DIMS = (32, 64, 128)
INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"

CHOICES = {"block_product": "vendor", "loads": "either"}
"""How a kernel does its work where there are two ways; the table that measurements on a GPU decide.

block_product, of the parallel block's two products: "vendor" (cuBLASLt and one elementwise kernel after it) or "triton"
(one persistent GEMM with all of it in its epilogue). The default is unmeasured; bench/block.py measures both.
loads, of attention's and the products' tiles: "either" (pointers, or on Hopper tensor descriptors where a call can have
them, whichever the first call of a kind finds faster; the interpreter takes descriptors) or "pointers".
"""


def _missing() -> str | None:
    if importlib.util.find_spec("triton") is None:
        return "the package triton is not installed: pip install triton"
    if not INTERPRETED and not torch.cuda.is_available():
        return "no usable GPU; TRITON_INTERPRET=1 in the environment runs Triton kernels on the CPU, slowly"
    return None


def _of(module: str, name: str):
    """kernels.triton.<module>.<name>, imported when it is first called: triton may be missing."""

    def call(*arguments: Any, **options: Any) -> Any:
        return getattr(importlib.import_module(f"kernels.triton.{module}"), name)(*arguments, **options)

    return call


def _attention_refuses(*, dtype: torch.dtype, head_dim: int, **options: object) -> str | None:
    if head_dim not in HEAD_DIMS:
        return f"head_dim = {head_dim}: the kernels are made for {', '.join(map(str, HEAD_DIMS))}"
    if dtype == torch.float32 and not INTERPRETED:  # there it serves to check the arithmetic
        return "dtype = torch.float32: these kernels spill registers in it (bench/results/triton-aot.md)"
    return native.refuses_dtype(dtype=dtype)


# In the interpreter kernels take CPU tensors.
_DEVICES = ("cpu",) if INTERPRETED else ("cuda",)
_attention = _of("attention", "attention_forward"), _of("attention", "attention_backward")
register("apply_rotary", "triton", _of("rotary", "rotary"), devices=_DEVICES, missing=_missing(), refuses=native.refuses_dtype)  # fmt: skip
register("flash_attention", "triton", _attention, devices=_DEVICES, missing=_missing(), refuses=_attention_refuses)
register(
    "layer_norm", "triton", (_of("norm", "layer_norm_forward"), _of("norm", "layer_norm_backward")),
    devices=_DEVICES, missing=_missing(), refuses=native.refuses_dtype,
)  # fmt: skip
register(
    "parallel_block",
    "triton",
    Pieces(
        _of("norm", "layer_norm_forward"), _of("norm", "layer_norm_backward"),
        _of("block", "project_in"), _of("block", "project_in_backward"),
        *_attention,
        _of("block", "project_out"), _of("block", "project_out_backward"),
    ),
    devices=_DEVICES,
    missing=_missing(),
    refuses=_attention_refuses,
)  # fmt: skip
register(
    "linear_cross_entropy", "triton", chunked_loss.Pieces(_of("loss", "cross_entropy")),
    devices=_DEVICES, missing=_missing(), refuses=native.refuses_dtype,
)  # fmt: skip
