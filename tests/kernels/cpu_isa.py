"""The instruction sets of this CPU, for tests of csrc/cpu."""

import contextlib
from collections.abc import Iterator

import pytest
import torch

from kernels import native


def _instruction_sets() -> list[str]:
    """Those that this CPU runs, from the error that lists them."""
    if native.MISSING is not None:
        return []
    with pytest.raises(ValueError, match="this CPU runs") as error:
        native._native.use_isa("none")
    return str(error.value).rpartition("runs ")[2].split()


ISAS = _instruction_sets()
CPU_BACKENDS = [f"cpu:{isa}" for isa in ISAS]
"""Names that `chosen` takes beside those of the backends."""


@contextlib.contextmanager
def use_isa(name: str) -> Iterator[None]:
    before = native._native.isa_name()
    native._native.use_isa(name)
    try:
        yield
    finally:
        native._native.use_isa(before)


@contextlib.contextmanager
def use_threads(count: int) -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(count)
    try:
        yield
    finally:
        torch.set_num_threads(before)


@contextlib.contextmanager
def chosen(name: str) -> Iterator[str]:
    """The backend's name of "cpu:avx2" and its like, that instruction set in use meanwhile."""
    backend, _, isa = name.partition(":")
    with use_isa(isa) if isa else contextlib.nullcontext():
        yield backend
