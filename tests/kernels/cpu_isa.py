"""The instruction sets of this CPU, for tests of csrc/cpu."""

import contextlib
from collections.abc import Iterator
from typing import Any

import torch

from kernels import native

ISAS = [isa.name for isa in native.ISAS if isa.missing is None]
"""Those that this CPU runs."""
CPU_BACKENDS = [f"cpu/{isa}" for isa in ISAS]


def kernels_of(isa: str) -> Any:
    """The native kernels of an instruction set."""
    return next(found for found in native.ISAS if found.name == isa)


@contextlib.contextmanager
def use_threads(count: int) -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(count)
    try:
        yield
    finally:
        torch.set_num_threads(before)
