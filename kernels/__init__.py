"""One library of ops, several backends behind each.

    apply_rotary, flash_attention, parallel_block, layer_norm, linear_cross_entropy

`print(kernels.backends())` shows what runs here; `use_backend` and PHI1_KERNELS override the choice.
"""

from kernels import cpu, cuda, triton  # noqa: F401  (each registers its kernels)
from kernels.attention import flash_attention
from kernels.block import cache_rows, parallel_block
from kernels.linear import linear
from kernels.loss import linear_cross_entropy
from kernels.measured import BACKENDS
from kernels.norm import layer_norm
from kernels.reference import BlockShape
from kernels.registry import BackendError, read_environment, use_backend
from kernels.rotary import apply_rotary
from kernels.summary import backends

read_environment()

__all__ = [
    "BACKENDS",
    "BackendError",
    "BlockShape",
    "apply_rotary",
    "backends",
    "cache_rows",
    "flash_attention",
    "layer_norm",
    "linear",
    "linear_cross_entropy",
    "parallel_block",
    "use_backend",
]
