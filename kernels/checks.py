"""Argument checks shared by the ops: each raises a ValueError that names the argument, its value and the remedy."""

from collections.abc import Callable

import torch
from torch import Tensor

DTYPES = (torch.float64, torch.float32, torch.bfloat16, torch.float16)


def check(condition: bool, message: Callable[[], str]) -> None:
    """Raises ValueError(message()) unless condition. The text is made only then: checks run on every call."""
    if not condition:
        raise ValueError(message())


def check_like(name: str, x: Tensor, reference_name: str, reference: Tensor) -> None:
    """x has the dtype and the device of reference."""
    check(
        x.dtype == reference.dtype,
        lambda: (
            f"{name}.dtype = {x.dtype}, {reference_name}.dtype = {reference.dtype}: must be equal; use {name}.to({reference.dtype})"
        ),
    )
    check_device(name, x, reference_name, reference)


def check_device(name: str, x: Tensor, reference_name: str, reference: Tensor) -> None:
    """x is on the device of reference."""
    check(
        x.device == reference.device,
        lambda: f"{name} is on {x.device}, {reference_name} on {reference.device}: move one to the other's device",
    )


def check_dtype(name: str, x: Tensor) -> None:
    """x has a floating dtype that the ops take."""
    check(x.dtype in DTYPES, lambda: f"{name}.dtype = {x.dtype}: must be float64, float32, bfloat16 or float16")


def check_shape(name: str, x: Tensor, shape: tuple[int, ...], meaning: str) -> None:
    """x has exactly this shape."""
    check(tuple(x.shape) == shape, lambda: f"{name}.shape = {tuple(x.shape)}: must be {shape} {meaning}")


def check_rank(name: str, x: Tensor, rank: int, meaning: str) -> None:
    """x has this many dims."""
    check(x.dim() == rank, lambda: f"{name}.shape = {tuple(x.shape)}: must be {meaning}")


def check_float32(name: str, x: Tensor) -> None:
    """x is float32."""
    check(x.dtype == torch.float32, lambda: f"{name}.dtype = {x.dtype}: must be float32; use {name}.float()")


def check_int32(name: str, x: Tensor) -> None:
    """x is int32."""
    check(x.dtype == torch.int32, lambda: f"{name}.dtype = {x.dtype}: must be int32; use {name}.int()")
