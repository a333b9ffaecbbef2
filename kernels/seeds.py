"""Dropout's seed, 64 bits: a number, or a tensor whose value the kernels read.

A number is part of the launch: a CUDA graph that was captured with one would drop the same elements at every replay,
and so it is refused there. A tensor's value may change between replays.

Operators take both forms, `Tensor? seed_tensor` and `SymInt dropout_seed`, of which the tensor counts if there is one;
backends take a `Seed`.
"""

import torch
from torch import Tensor

from kernels.checks import check_device, check_whole
from kernels.recompute import keep

Seed = int | Tensor
"""A number below 2^63 (a negative one is its two's complement), or int64 () on the device of what is dropped."""


def check_seed(seed: Seed, p: float, name: str, x: Tensor) -> Seed:
    """The `dropout_seed` of a call on x, whose name is `name`, that drops with probability p; 0 if it drops nothing.

    Raises ValueError for a number of more than 64 bits, for a tensor that is not one int64 on x's device, and for a
    number while a CUDA graph is captured.
    """
    if isinstance(seed, Tensor):
        if seed.dtype != torch.int64:
            raise ValueError(f"dropout_seed.dtype = {seed.dtype}: must be int64; use dropout_seed.long()")
        if seed.numel() != 1:
            raise ValueError(f"dropout_seed.shape = {tuple(seed.shape)}: must be (), one seed for the whole call")
        check_device("dropout_seed", seed, name, x)
        return seed.reshape(()) if p > 0 else 0
    seed = check_whole("dropout_seed", seed, "a whole number, or an int64 tensor")
    if not -(2**63) <= seed < 2**64:
        raise ValueError(f"dropout_seed = {seed}: must fit 64 bits; use dropout_seed % 2**64")
    if not torch.compiler.is_compiling():  # what is compiled is captured later: the operators look again
        check_not_captured(p, seed, x)
    return seed - 2**64 if seed >= 2**63 else seed


def check_not_captured(p: float, seed: Seed, x: Tensor) -> None:
    """Raises ValueError for dropout by a number while a CUDA graph is captured."""
    if p > 0 and not isinstance(seed, Tensor) and x.is_cuda and torch.cuda.is_current_stream_capturing():
        raise ValueError(
            f"dropout_p = {p} with dropout_seed = {seed} while a CUDA graph is captured: every replay would drop the "
            f"same elements; give dropout_seed as an int64 tensor on {x.device}, and change its value between replays"
        )


def for_backward(seed: Tensor) -> Tensor:
    """The seed for a call that a backward pass may follow: a copy, made in the stream's order, which keeps the value of
    the forward pass; in a non-reentrant checkpoint's recomputation the forward pass's copy.
    """
    return seed.clone() if torch.compiler.is_compiling() else keep(seed.clone())


def operands(seed: Seed) -> tuple[Tensor | None, int]:
    """(seed_tensor, dropout_seed) of an operator."""
    return (seed, 0) if isinstance(seed, Tensor) else (None, seed)


def of_operands(seed_tensor: Tensor | None, dropout_seed: int) -> Seed:
    """The seed for a backend."""
    return dropout_seed if seed_tensor is None else seed_tensor
