"""Argument checks shared by the ops: each raises a ValueError that names the argument, its value and the remedy."""

import torch
from torch import Tensor

DTYPES = (torch.float64, torch.float32, torch.bfloat16, torch.float16)


def check(condition: bool, message: str) -> None:
    """Raises ValueError(message) unless condition."""
    if not condition:
        raise ValueError(message)


def check_like(name: str, x: Tensor, reference_name: str, reference: Tensor) -> None:
    """x has the dtype and the device of reference."""
    check(
        x.dtype == reference.dtype,
        f"{name}.dtype = {x.dtype}, {reference_name}.dtype = {reference.dtype}: must be equal; use {name}.to({reference.dtype})",
    )
    check_device(name, x, reference_name, reference)


def check_device(name: str, x: Tensor, reference_name: str, reference: Tensor) -> None:
    """x is on the device of reference."""
    check(
        x.device == reference.device,
        f"{name} is on {x.device}, {reference_name} on {reference.device}: move one to the other's device",
    )


def check_dtype(name: str, x: Tensor) -> None:
    """x has a floating dtype that the ops take."""
    check(x.dtype in DTYPES, f"{name}.dtype = {x.dtype}: must be float64, float32, bfloat16 or float16")


def check_shape(name: str, x: Tensor, shape: tuple[int, ...], meaning: str) -> None:
    """x has exactly this shape."""
    check(tuple(x.shape) == shape, f"{name}.shape = {tuple(x.shape)}: must be {shape} {meaning}")
