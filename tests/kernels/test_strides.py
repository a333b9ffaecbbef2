"""Every op on every backend, each tensor argument in turn replaced by an equal one that is not contiguous."""

import itertools
from collections.abc import Iterator

import pytest
import torch
from calls import CALLS, Call
from torch import Tensor

from kernels import native

BACKENDS = ("reference", "torch", "cpu", "triton", "cuda")
WRITTEN = ("out", "keys", "values")
"""Arguments whose memory an op writes: their elements must not overlap."""
DTYPE = torch.bfloat16
INTERPRETED = ("triton", "cuda")
"""Slow here, and one layout goes their way as well as another: their kernels take strides or copies, and are given
tensors.
"""
needs_native = pytest.mark.skipif(native.MISSING is not None, reason=str(native.MISSING))


@pytest.fixture(params=BACKENDS)
def backend(request: pytest.FixtureRequest) -> str:
    if request.param == "cuda":
        request.getfixturevalue("emulator")
    return request.param


def layouts(name: str, x: Tensor) -> Iterator[tuple[str, Tensor]]:
    """Tensors of x's shape that are not contiguous, holding x or (expanded) one slice of it over and over."""
    if name not in WRITTEN and name not in ("cu", "cu_seqlens"):
        for dim, size in enumerate(x.shape):
            if size > 1:
                yield f"expanded along {dim}", x.narrow(dim, 0, 1).expand(x.shape)
    if x.dim() > 1:
        yield "transposed", x.transpose(0, -1).contiguous().transpose(0, -1)
    width = x.shape[-1]
    yield "a slice at an odd offset", x.new_zeros((*x.shape[:-1], width + 3))[..., 1 : 1 + width].copy_(x)
    yield "every other element", x.new_zeros((*x.shape[:-1], 2 * width))[..., ::2].copy_(x)


NAMES = [(call, name) for call in CALLS for name in call.tensors(DTYPE)]


def greatest_error(call: Call, name: str, backend: str, expected: Tensor, found: Tensor) -> float:
    """Of outputs and gradients with `found` for the argument, against those with `expected`; of the greatest number."""
    results = [call.outputs_and_grads(backend, {**call.tensors(DTYPE), name: x}) for x in (expected, found)]
    errors = [
        float((y.double() - x.double()).abs().nan_to_num(nan=torch.inf).max()) for x, y in zip(*results, strict=True)
    ]
    # Where gradients cancel out in theory, the greatest of each would say nothing.
    return max(errors) / max(float(x.abs().max()) for x in results[0])


BOUND = 2**-4
"""16 roundings to bfloat16: a library may add in another order for other strides."""


@pytest.mark.parametrize(("call", "name"), NAMES, ids=[f"{call.name}-{name}" for call, name in NAMES])
def test_a_tensor_that_is_not_contiguous_gives_the_same(backend: str, call: Call, name: str) -> None:
    kinds = list(layouts(name, call.tensors(DTYPE)[name]))
    for layout, view in kinds[-1:] if backend in INTERPRETED else kinds:
        error = greatest_error(call, name, backend, view.clone(memory_format=torch.contiguous_format), view)
        assert error <= BOUND, f"{name} {layout}: off by {error:.3g} of the greatest number, allowed {BOUND:.3g}"


@pytest.mark.parametrize("name", ["q", "k", "positions"])
def test_the_bound_bites(name: str) -> None:
    """Strides that are not looked at."""
    call = next(call for call in CALLS if call.name == "apply_rotary, positions")
    for layout, view in layouts(name, call.tensors(DTYPE)[name]):
        if not layout.startswith("expanded") and view.storage_offset() == 0:
            wrong = view.as_strided(view.shape, torch.empty(view.shape, device="meta").stride())
            assert greatest_error(call, name, "cpu", view, wrong) > BOUND, layout


@needs_native
def test_a_binding_takes_tensors_not_addresses() -> None:
    """A tensor that is given lives as long as the call; who knows what an address needs?"""
    x, y = torch.zeros(4), torch.empty(4)
    isa = next(isa for isa in native._native.isas() if isa.missing is None)
    isa.exp2(x, y, 4, 0)
    assert torch.equal(y, torch.ones(4))
    with pytest.raises(AttributeError, match="data_ptr"):
        isa.exp2(x.data_ptr(), y, 4, 0)
    with pytest.raises(ValueError, match="a native kernel was given 4 elements without memory, on meta"):
        isa.exp2(x, torch.empty(4, device="meta"), 4, 0)


def test_every_tensor_argument_is_tried() -> None:
    tried = {(call.op, name) for call, name in NAMES}
    assert {
        ("apply_rotary", "positions"),
        ("apply_rotary", "cos"),
        ("flash_attention", "cu"),
        ("flash_attention", "out"),
        ("parallel_block", "keys"),
    } <= tried
    for call, name in itertools.product(CALLS, ("q", "x", "hidden")):
        x = call.tensors(DTYPE).get(name)
        if x is not None:
            kinds = dict(layouts(name, x))
            assert (
                not any(view.is_contiguous() for view in kinds.values())
                and len(kinds) == sum(n > 1 for n in x.shape) + 3
            ), call.name
