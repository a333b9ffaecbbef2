"""One small call of every op, in the forms that differ in how they hand tensors on, for tests of all ops and
backends.
"""

import dataclasses
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from kernels import (
    BlockShape,
    apply_rotary,
    flash_attention,
    layer_norm,
    linear_cross_entropy,
    parallel_block,
    reference,
)

BATCH, SEQ, HEADS, KV_HEADS, HEAD_DIM, HALF, HIDDEN, INNER, COLUMNS, CAPACITY = 2, 6, 2, 1, 32, 8, 16, 8, 24, 9
SHAPE = BlockShape(HEADS, KV_HEADS, HEAD_DIM)
ROWS = 12
"""Of the rotary table."""


@dataclasses.dataclass(frozen=True)
class Call:
    """A call of `op`; `tensors` by their argument names, `run(backend, tensors)` gives the outputs."""

    name: str
    op: str
    tensors: Callable[[torch.dtype], dict[str, Tensor]]
    run: Callable[..., Any]
    differentiable: tuple[str, ...]
    """Names of the tensors that gradients flow to."""

    def outputs(self, backend: str, tensors: dict[str, Tensor]) -> tuple[Tensor, ...]:
        result = self.run(backend, **tensors)
        return result if isinstance(result, tuple) else (result,)

    def outputs_and_grads(self, backend: str, tensors: dict[str, Tensor]) -> list[Tensor]:
        """The outputs, then the gradients of the differentiable tensors, each as strided as it was given."""
        leaves = {name: tensors[name].detach().requires_grad_() for name in self.differentiable}
        outputs = self.outputs(backend, {**tensors, **leaves})
        grads = (
            torch.autograd.grad(
                [x for x in outputs if x.requires_grad],
                list(leaves.values()),
                [grad_of(x) for x in outputs if x.requires_grad],
            )
            if leaves
            else ()
        )
        return [*(x.detach() for x in outputs), *grads]


def grad_of(x: Tensor) -> Tensor:
    """A gradient for an output: not contiguous, where it has two dims to turn around."""
    grad = numbers(*x.shape, seed=9, dtype=x.dtype)
    return grad.transpose(0, -1).contiguous().transpose(0, -1) if x.dim() > 1 else grad


def numbers(*shape: int, seed: int, dtype: torch.dtype = torch.float32) -> Tensor:
    """Normal numbers, the same for a seed."""
    generator = torch.Generator("cpu").manual_seed(seed)
    return torch.randn(shape, generator=generator, device="cpu", dtype=torch.float32).to(dtype)


def _table() -> dict[str, Tensor]:
    cos, sin = reference.rotary_table(ROWS, 2 * HALF, device=torch.device("cpu"))
    return {"cos": cos, "sin": sin}


def _positions() -> Tensor:
    return torch.tensor([[3, 0, 11, 2, 2, 5], [1, 4, 7, 0, 10, 6]], device="cpu")


def _starts() -> Tensor:
    return torch.tensor([0, 2, 2, 2 * SEQ], dtype=torch.int32, device="cpu")


def _rotary(dtype: torch.dtype) -> dict[str, Tensor]:
    q, k = (
        numbers(BATCH, SEQ, HEADS, HEAD_DIM, seed=1, dtype=dtype),
        numbers(BATCH, SEQ, KV_HEADS, HEAD_DIM, seed=2, dtype=dtype),
    )
    return {"q": q, "k": k, **_table()}


def _attention(dtype: torch.dtype, batch: int = BATCH, seq: int = SEQ) -> dict[str, Tensor]:
    heads = {"q": HEADS, "k": KV_HEADS, "v": KV_HEADS}
    return {x: numbers(batch, seq, n, HEAD_DIM, seed=i, dtype=dtype) for i, (x, n) in enumerate(heads.items())}


def _norm(dtype: torch.dtype) -> dict[str, Tensor]:
    shapes = {"x": (BATCH, SEQ, HIDDEN), "weight": (HIDDEN,), "bias": (HIDDEN,)}
    return {name: numbers(*shape, seed=i, dtype=dtype) for i, (name, shape) in enumerate(shapes.items())}


def _block(dtype: torch.dtype) -> dict[str, Tensor]:
    width = (HEADS + 2 * KV_HEADS) * HEAD_DIM + INNER
    shapes = {
        "x": (BATCH, SEQ, HIDDEN),
        "norm_weight": (HIDDEN,),
        "norm_bias": (HIDDEN,),
        "w_in": (width, HIDDEN),
        "b_in": (width,),
        "w_out": (HIDDEN, HEADS * HEAD_DIM + INNER),
        "b_out": (HIDDEN,),
    }
    tensors = {x: numbers(*shape, seed=i, dtype=dtype) for i, (x, shape) in enumerate(shapes.items())}
    for name in ("w_in", "w_out"):  # products of order one
        tensors[name] = tensors[name] / tensors[name].shape[1] ** 0.5
    return {**tensors, **_table()}


def _loss(dtype: torch.dtype) -> dict[str, Tensor]:
    shapes = {"hidden": (BATCH, SEQ, HIDDEN), "weight": (COLUMNS, HIDDEN), "bias": (COLUMNS,)}
    tensors = {name: numbers(*shape, seed=i, dtype=dtype) for i, (name, shape) in enumerate(shapes.items())}
    generator = torch.Generator("cpu").manual_seed(5)
    return {**tensors, "targets": torch.randint(COLUMNS, (BATCH, SEQ), generator=generator, device="cpu")}


def _run_out(backend: str, out: Tensor, **tensors: Tensor) -> Any:
    with torch.no_grad():
        return flash_attention(**tensors, out=out, backend=backend)  # type: ignore[arg-type]


def _run_block(backend: str, keys: Tensor | None = None, values: Tensor | None = None, **tensors: Tensor) -> Any:
    cache = None if keys is None or values is None else (keys, values, 2)
    y = parallel_block(**tensors, shape=SHAPE, kv_cache=cache, backend=backend)
    return y if keys is None else (y.detach(), keys[:, 2:], values[:, 2:])  # type: ignore[index]


def _run_attention(backend: str, cu: Tensor | None = None, **tensors: Tensor) -> Any:
    return flash_attention(**tensors, cu_seqlens_q=cu, cu_seqlens_k=cu, backend=backend)


_CACHE_SHAPE = (BATCH, CAPACITY, KV_HEADS, HEAD_DIM)
_PARAMETERS = ("x", "norm_weight", "norm_bias", "w_in", "b_in", "w_out", "b_out")
CALLS = [
    Call("apply_rotary", "apply_rotary", _rotary, lambda backend, **t: apply_rotary(**t, backend=backend), ("q", "k")),
    Call(
        "apply_rotary, positions",
        "apply_rotary",
        lambda d: {**_rotary(d), "positions": _positions()},
        lambda backend, **t: apply_rotary(**t, backend=backend),
        ("q", "k"),
    ),
    Call("flash_attention", "flash_attention", _attention, _run_attention, ("q", "k", "v")),
    Call(
        "flash_attention, documents",
        "flash_attention",
        lambda d: {**_attention(d, 1, 2 * SEQ), "cu": _starts()},
        _run_attention,
        ("q", "k", "v"),
    ),
    Call(
        "flash_attention, out",
        "flash_attention",
        lambda d: {**_attention(d), "out": numbers(BATCH, SEQ, HEADS, HEAD_DIM, seed=8, dtype=d)},
        _run_out,
        (),
    ),
    Call(
        "layer_norm",
        "layer_norm",
        _norm,
        lambda backend, **t: layer_norm(**t, backend=backend),
        ("x", "weight", "bias"),
    ),
    Call("parallel_block", "parallel_block", _block, _run_block, _PARAMETERS),
    Call(
        "parallel_block, positions",
        "parallel_block",
        lambda d: {**_block(d), "positions": _positions()},
        _run_block,
        _PARAMETERS,
    ),
    Call(
        "parallel_block, documents",
        "parallel_block",
        lambda d: {**_block(d), "cu_seqlens": _starts()},
        _run_block,
        _PARAMETERS,
    ),
    Call(
        "parallel_block, kv_cache",
        "parallel_block",
        lambda d: {
            **_block(d),
            "keys": numbers(*_CACHE_SHAPE, seed=11, dtype=d),
            "values": numbers(*_CACHE_SHAPE, seed=12, dtype=d),
        },
        _run_block,
        (),
    ),
    Call(
        "linear_cross_entropy",
        "linear_cross_entropy",
        _loss,
        lambda backend, **t: linear_cross_entropy(**t, backend=backend),
        ("hidden", "weight", "bias"),
    ),
]
