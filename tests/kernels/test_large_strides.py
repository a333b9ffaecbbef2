"""Strides that fit 32 bits and whose products do not, in memory that is mapped and hardly touched: addresses are 64-bit
arithmetic.

Sliced caches and packed buffers of long sequences have such strides; 32 bits wrap and read somewhere else.
"""

import contextlib
from collections.abc import Iterator

import pytest
import torch
from cpu_isa import CPU_BACKENDS
from emulator import as_cuda_backend, build, load
from torch import Tensor

from kernels import apply_rotary, flash_attention, layer_norm, reference

FAR = 2**30
"""Elements between neighbours: twice that is the least number that int32 does not hold."""
BACKENDS = [*CPU_BACKENDS, "cuda", "triton"]


@pytest.fixture(scope="module")
def emulated():
    return load(build())


@pytest.fixture(params=BACKENDS)
def backend(request: pytest.FixtureRequest) -> Iterator[str]:
    with contextlib.ExitStack() as stack:
        if request.param == "cuda":
            stack.enter_context(as_cuda_backend(request.getfixturevalue("emulated")))
        yield request.param


def far_apart(value: Tensor, dim: int) -> Tensor:
    """`value`, whose `dim` has three entries, these FAR elements apart."""
    assert value.shape[dim] == 3
    memory = torch.empty(2 * FAR + value.numel(), dtype=value.dtype)
    strides = list(value.stride())
    strides[dim] = FAR
    return memory.as_strided(value.shape, strides).copy_(value)


def randn(seed: int, *shape: int) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed)).bfloat16()


@pytest.mark.parametrize("dim", [0, 1, 2], ids=["batch", "seq", "head"])
def test_rotary(dim: int, backend: str) -> None:
    q, k, grad_q, grad_k = (randn(i, 3, 3, 3, 48) for i in range(4))
    table = reference.rotary_table(3, 32)

    def run(*tensors: Tensor) -> list[Tensor]:
        leaves = [x.detach().requires_grad_() for x in tensors[:2]]
        turned = apply_rotary(*leaves, *table, backend=backend)
        return [*turned, *torch.autograd.grad(turned, leaves, tensors[2:])]

    expected = run(q, k, grad_q, grad_k)
    found = run(*(far_apart(x, dim) for x in (q, k, grad_q, grad_k)))
    assert all(torch.equal(a, b) for a, b in zip(found, expected, strict=True))


@pytest.mark.parametrize("dim", [0, 1, 2], ids=["batch", "seq", "head"])
def test_attention(dim: int, backend: str) -> None:
    q, k, v, grad = (randn(i, 3, 3, 3, 64) for i in range(4))

    def run(q: Tensor, k: Tensor, v: Tensor, grad: Tensor, out: Tensor | None) -> list[Tensor]:
        leaves = [x.detach().requires_grad_() for x in (q, k, v)]
        result = flash_attention(*leaves, backend=backend)
        assert isinstance(result, Tensor)
        grads = torch.autograd.grad(result, leaves, grad)
        if out is None:
            return [result, *grads, result]
        with torch.no_grad():
            flash_attention(q, k, v, backend=backend, out=out)
        return [result, *grads, out]

    expected = run(q, k, v, grad, None)
    found = run(*(far_apart(x, dim) for x in (q, k, v, grad)), far_apart(torch.zeros_like(q), dim))
    assert all(torch.equal(a, b) for a, b in zip(found, expected, strict=True))


def test_layer_norm(backend: str) -> None:
    x, weight, bias, grad = randn(0, 3, 64), randn(1, 64), randn(2, 64), randn(3, 3, 64)

    def run(x: Tensor, grad: Tensor) -> list[Tensor]:
        leaves = [t.detach().requires_grad_() for t in (x, weight, bias)]
        y = layer_norm(*leaves, backend=backend)
        return [y, *torch.autograd.grad(y, leaves, grad)]

    expected = run(x, grad)
    found = run(far_apart(x, 0), far_apart(grad, 0))
    assert all(torch.equal(a, b) for a, b in zip(found, expected, strict=True))
