"""What the fuzzers of all ops share: numbers, dtypes, and how a call is run."""

import contextlib
from collections.abc import Callable, Iterator

import torch
from cpu_isa import use_threads
from hypothesis import strategies as st
from memory import poisoned_and_guarded
from torch import Tensor

seeds = st.integers(0, 2**63 - 1) | st.integers(0, 2**16)
BY_DTYPE = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}


def dtypes(*names: str) -> st.SearchStrategy[torch.dtype]:
    return st.sampled_from(names or tuple(BY_DTYPE)).map(BY_DTYPE.__getitem__)


def normal(seed: int, dtype: torch.dtype, *shape: int, exponent: int = 0) -> Tensor:
    """Normal numbers times 2^exponent."""
    x = torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    return (x * 2.0**exponent).clamp(-torch.finfo(dtype).max, torch.finfo(dtype).max).to(dtype)


def is_cpu(backend: str) -> bool:
    return backend.startswith("cpu")


@contextlib.contextmanager
def unchanged(*tensors: Tensor | None) -> Iterator[None]:
    """No argument may be written to."""
    before = [None if x is None else x.clone() for x in tensors]
    yield
    for x, y in zip(tensors, before, strict=True):
        assert y is None or (x is not None and torch.equal(x.nan_to_num(nan=0.5), y.nan_to_num(nan=0.5))), (
            "input changed"
        )


def runs(
    backend: str, threads: tuple[int, int], run: Callable[[str], dict[str, Tensor]], products: bool = False
) -> dict[str, Tensor]:
    """The results of run(backend name); on the CPU equal bits with either number of threads.

    products: the op has matrix products of the vendor's library in it, whose bits are its own affair (MKL's in float32
    of a 1023 x 2 by 2 x 17 matrix differ between 1 and 3 threads).
    """
    with use_threads(threads[0]), poisoned_and_guarded():
        found = run(backend)
    if is_cpu(backend) and not products:
        with use_threads(threads[1]), poisoned_and_guarded():
            again = run(backend)
        for key, value in found.items():
            assert torch.equal(value.nan_to_num(nan=0.5), again[key].nan_to_num(nan=0.5)), f"{key}: threads {threads}"
    return found


thread_pairs = st.tuples(st.integers(1, 3), st.integers(1, 3))
