"""Tensor descriptors: by them Hopper's tensor memory accelerator (TMA) copies a tile to shared memory.

One thread asks for the whole tile, so no registers go to addresses, and what lies outside the tensor arrives as zeros.
A kernel that can load by them has two constants: DESCRIPTORS, whether this call's tensors may have them, and TMA,
whether this candidate uses them where they may be. Attention's are made by the host at each launch (`head_rows`); the
persistent products make their own, once a program, because warp specialisation wants them so.
"""

from collections.abc import Callable
from typing import Any

import torch
import triton
from torch import Tensor
from triton.tools.tensor_descriptor import TensorDescriptor

from kernels.triton import INTERPRETED


def allowed(*tensors: Tensor) -> bool:
    """Whether all these tensors may have descriptors: on Hopper, aligned to 16 bytes, not empty.

    Later GPUs have TMA too, but bench/triton_aot.py has checked no candidate for one.
    """
    capable = INTERPRETED or torch.cuda.get_device_capability(tensors[0].device)[0] == 9
    return capable and all(_fits(x) for x in tensors)


def _fits(x: Tensor) -> bool:
    strides = [stride * x.element_size() for stride in x.stride()[:-1]]
    aligned = x.data_ptr() % 16 == 0 and all(stride > 0 and stride % 16 == 0 for stride in strides)
    return aligned and x.stride(-1) == 1 and x.numel() > 0


def prune(configs: list[triton.Config], named: dict[str, Any], **options: Any) -> list[triton.Config]:
    """For triton.autotune: the candidates of a call with this DESCRIPTORS."""
    return [config for config in configs if {**named, **options}["DESCRIPTORS"] or not config.kwargs["TMA"]]


def head_rows(**blocks: str) -> Callable[[Any], Any]:
    """Decorator of a kernel: makes its arguments NAME_rows, of the tensors NAME_ptr (batch, seq, heads, head_dim).

    Each is None, or the descriptor of tiles (1, 1, rows, head_dim) of (batch, heads, seq, head_dim); blocks[NAME] names
    the constant that holds rows. Made at the launch, when the candidate is known: a hook of triton.Config, the usual
    place, would keep the winner off the disk.
    """

    def of(name: str, block: str) -> Callable[[dict[str, Any]], TensorDescriptor | None]:
        def make(call: dict[str, Any]) -> TensorDescriptor | None:
            if not (call["TMA"] and call["DESCRIPTORS"]):
                return None
            x = call[f"{name}_ptr"].transpose(1, 2)
            return TensorDescriptor(x, list(x.shape), list(x.stride()), [1, 1, call[block], x.shape[-1]])

        return make

    def decorate(function: Any) -> Any:
        wanted = {f"{name}_rows": of(name, block) for name, block in blocks.items()}
        return triton.heuristics({name: make for name, make in wanted.items() if name in function.arg_names})(function)

    return decorate


def provide_scratch() -> None:
    """Lets kernels that make descriptors on the GPU have memory for them, 128 bytes each, from PyTorch."""
    triton.set_allocator(lambda size, alignment, stream: torch.empty(size, dtype=torch.int8, device="cuda"))
