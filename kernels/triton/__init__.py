"""The `triton` backend. On a machine without a GPU it runs in Triton's interpreter, if TRITON_INTERPRET=1 is set."""

import importlib.util
import os

import torch

from kernels import native
from kernels.registry import register

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


# In the interpreter kernels take CPU tensors.
register(
    "apply_rotary",
    "triton",
    _rotary,
    devices=("cpu",) if INTERPRETED else ("cuda",),
    missing=_missing(),
    refuses=native.refuses_dtype,
)
