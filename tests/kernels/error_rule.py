"""The error rule for ops other than attention (attention_cases has its own, with attention's eager baseline).

The greatest error against the truth in float64 is at most twice that of the same formula in PyTorch eager in the
inputs' dtype, plus twice the greatest |(truth + 0.3 - 0.3) - truth| in that dtype, the rounding of a sum of numbers
of order one. For float32 both sides are the same arithmetic in another order, and twice a baseline that happens to
round well leaves no room: four float32 epsilons of the greatest value are added, nothing beside 16-bit roundings.
"""

import json
import os

import torch
from torch import Tensor


def record(what: str, dtype: torch.dtype, found: float, allowed: float) -> None:
    """Appends a line of JSON to the file that PHI1_ERROR_LOG names, if it does: how far from the bound a result is.

    bench/on_gpu.py reads it: on a new device that says more than that a test passed.
    """
    path = os.environ.get("PHI1_ERROR_LOG")
    if path:
        test = os.environ.get("PYTEST_CURRENT_TEST", "").split(" ")[0]
        entry = {"test": test, "what": what, "dtype": str(dtype), "error": found, "allowed": allowed}
        with open(path, "a") as file:
            file.write(json.dumps(entry) + "\n")


def error(x: Tensor, truth: Tensor) -> float:
    """Greatest |x - truth|, infinite if x has a NaN."""
    difference = (x.double() - truth.double()).abs()
    return float(difference.nan_to_num(nan=float("inf")).max()) if x.numel() else 0.0


def bound(low: Tensor, truth: Tensor, dtype: torch.dtype, times: float = 2.0) -> float:
    """The greatest error that the rule allows. low: the formula in eager `dtype`. truth: float64."""
    rounded = truth.to(dtype)
    rounding = float((rounded + 0.3 - 0.3 - rounded).abs().max()) if truth.numel() else 0.0
    order = 4 * torch.finfo(torch.float32).eps * float(truth.abs().max()) if truth.numel() else 0.0
    return times * error(low, truth) + 2 * rounding + order


def check(name: str, x: Tensor, low: Tensor, truth: Tensor, dtype: torch.dtype, times: float = 2.0) -> None:
    """Asserts shape, dtype and the rule."""
    assert x.shape == truth.shape and x.dtype == dtype, (name, x.shape, x.dtype)
    found, allowed = error(x, truth), bound(low, truth, dtype, times)
    record(name, dtype, found, allowed)
    assert found <= allowed, f"{name}, {dtype}: error {found:.3g}, allowed {allowed:.3g}"
