"""The `triton` backend. On a machine without a GPU it runs in Triton's interpreter, if TRITON_INTERPRET=1 is set."""

import importlib.util
import os

import torch

from kernels import native
from kernels.registry import register

HEAD_DIMS = (32, 64, 128)
INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"


def _missing() -> str | None:
    if importlib.util.find_spec("triton") is None:
        return "the package triton is not installed: pip install triton"
    if not INTERPRETED and not torch.cuda.is_available():
        return "no usable GPU; TRITON_INTERPRET=1 in the environment runs Triton kernels on the CPU, slowly"
    return None


def _rotary(*arguments):
    from kernels.triton.rotary import rotary  # triton is imported when it is first used

    return rotary(*arguments)


def _attention_forward(*arguments):
    from kernels.triton.attention import attention_forward

    return attention_forward(*arguments)


def _attention_backward(*arguments):
    from kernels.triton.attention import attention_backward

    return attention_backward(*arguments)


def _attention_refuses(*, dtype: torch.dtype, head_dim: int, **options: object) -> str | None:
    if head_dim not in HEAD_DIMS:
        return f"head_dim = {head_dim}: the kernels are made for {', '.join(map(str, HEAD_DIMS))}"
    if dtype == torch.float32 and not INTERPRETED:  # there it serves to check the arithmetic
        return "dtype = torch.float32: these kernels spill registers in it (bench/results/triton-aot.md)"
    return native.refuses_dtype(dtype=dtype)


# In the interpreter kernels take CPU tensors.
_DEVICES = ("cpu",) if INTERPRETED else ("cuda",)
register("apply_rotary", "triton", _rotary, devices=_DEVICES, missing=_missing(), refuses=native.refuses_dtype)
register(
    "flash_attention",
    "triton",
    (_attention_forward, _attention_backward),
    devices=_DEVICES,
    missing=_missing(),
    refuses=_attention_refuses,
)
