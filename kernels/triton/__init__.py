"""The `triton` backend. On a machine without a GPU it runs in Triton's interpreter, if TRITON_INTERPRET=1 is set.

Its versions, of the ops where there is more than one way: `triton/pointers`, `triton/descriptors` (tiles of attention
are loaded by tensor descriptors where a call's tensors may have them, if the first call of a kind finds that faster;
Hopper only), and of the layer `triton/product` (its two products by one persistent kernel each, with what follows in
the epilogue, loading as `descriptors` does where it can), in place of cuBLASLt and one elementwise kernel.
"""

import functools
import importlib
from collections.abc import Callable
from typing import Any

import torch

from kernels import chunked_loss, fused_block, native
from kernels.fused_block import Pieces
from kernels.machine import TRITON_INTERPRETED as INTERPRETED
from kernels.machine import Machine
from kernels.registry import missing_here, register


def _of(module: str, name: str) -> Callable[..., Any]:
    """kernels.triton.<module>.<name>, imported when it is first called: triton may be missing."""

    def call(*arguments: Any, **options: Any) -> Any:
        return getattr(importlib.import_module(f"kernels.triton.{module}"), name)(*arguments, **options)

    return call


residual_factor = _of("block", "residual_factor")


def _attention_refuses(*, dtype: torch.dtype, head_dim: int, **options: object) -> str | None:
    if dtype == torch.float32 and not INTERPRETED:  # there it serves to check the arithmetic
        return "dtype = torch.float32: these kernels spill registers in it (bench/results/triton-aot.md)"
    return native.refuses_head_dim(head_dim) or native.refuses_dtype(dtype=dtype)


def _needs_descriptors(machine: Machine) -> str | None:
    """Later GPUs have them too, but bench/triton_aot.py has checked no candidate for one."""
    why = missing_here("triton")(machine)
    if why is None and not INTERPRETED and machine.capability[0] != 9:
        why = f"tensor descriptors are used on Hopper (compute capability 9), this is {machine.name}"
    return why


def _register_kernels() -> None:
    devices = ("cpu",) if INTERPRETED else ("cuda",)
    norm = _of("norm", "layer_norm_forward"), _of("norm", "layer_norm_backward")
    loss = chunked_loss.operators(chunked_loss.Pieces(_of("loss", "cross_entropy")))
    rotary = _of("rotary", "rotary"), _of("rotary", "rotary")
    for op, run in (("apply_rotary", rotary), ("layer_norm", norm), ("linear_cross_entropy", loss)):
        register(op, "triton", *run, devices=devices, refuses=native.refuses_dtype)
    forms: list[tuple[str, Callable[[Machine], str | None], bool, bool]] = [
        ("pointers", missing_here("triton"), False, False),
        ("descriptors", _needs_descriptors, True, False),
        ("product", missing_here("triton"), True, True),
    ]
    for name, needs, by_descriptors, own_product in forms:
        attention = [
            functools.partial(_of("attention", function), by_descriptors=by_descriptors)
            for function in ("attention_forward", "attention_backward")
        ]
        if not own_product:
            register(
                "flash_attention",
                f"triton/{name}",
                *attention,
                devices=devices,
                needs=needs,
                refuses=_attention_refuses,
            )
        project_in, project_out = (_of("block", function) for function in ("project_in", "project_out"))
        if own_product:
            project_in, project_out = _of("block", "project_in_whole"), _of("block", "project_out_whole")
        pieces: list[Callable[..., Any]] = [
            *norm,
            project_in,
            _of("block", "project_in_backward"),
            *attention,
            project_out,
            _of("block", "project_out_backward"),
        ]
        block = fused_block.operators(Pieces(*pieces))
        register("parallel_block", f"triton/{name}", *block, devices=devices, needs=needs, refuses=_attention_refuses)


_register_kernels()
