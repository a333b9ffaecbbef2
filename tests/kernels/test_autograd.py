"""Derivatives of derivatives: exact on `reference`, and of rotary on every backend; elsewhere exact or an error."""

import pytest
import torch
from calls import CALLS, Call
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from kernels import apply_rotary, flash_attention, layer_norm, reference

DIFFERENTIABLE = [call for call in CALLS if call.differentiable]
OURS = ("flash_attention", "layer_norm")
"""Ops of which native backends have the first derivative only. Rotary is linear: it has all."""
MESSAGE = "a second derivative was asked for, and this backend has the first only; use backend='reference'"


def leaves_of(call: Call, dtype: torch.dtype) -> tuple[dict[str, Tensor], list[Tensor]]:
    tensors = call.tensors(dtype)
    tensors |= {name: tensors[name].requires_grad_() for name in call.differentiable}
    return tensors, [tensors[name] for name in call.differentiable]


@pytest.mark.parametrize(
    "call", [c for c in DIFFERENTIABLE if c.op in (*OURS, "apply_rotary")], ids=lambda call: call.name
)
@pytest.mark.parametrize("backend", ["reference", "torch"])
def test_gradients_of_gradients_are_those_of_finite_differences(backend: str, call: Call) -> None:
    tensors, leaves = leaves_of(call, torch.float64)

    def run(*leaves: Tensor) -> tuple[Tensor, ...]:
        return call.outputs(backend, {**tensors, **dict(zip(call.differentiable, leaves, strict=True))})

    if backend == "torch" and call.op == "flash_attention":
        with pytest.raises(RuntimeError, match=r"derivative for aten::_scaled_dot_product.* is not implemented"):
            torch.autograd.gradgradcheck(run, leaves, fast_mode=True)
        return
    assert torch.autograd.gradgradcheck(run, leaves, fast_mode=True)


@pytest.mark.parametrize("backend", ["cpu", "cuda"])  # triton: by the same autograd.Function
@pytest.mark.parametrize("call", [c for c in DIFFERENTIABLE if c.op in OURS], ids=lambda call: call.name)
def test_a_gradient_penalty_on_a_native_backend_is_an_error(
    request: pytest.FixtureRequest, backend: str, call: Call
) -> None:
    """Whichever way it is asked for: of a sum, whose gradient depends on inputs only; with respect to any input."""
    if backend == "cuda":
        request.getfixturevalue("emulator")
    tensors, leaves = leaves_of(call, torch.bfloat16)
    y = call.outputs(backend, tensors)[0]
    grad = torch.autograd.grad(y.sum(), leaves[0], create_graph=True)[0]
    penalty = grad.float().square().sum() + y.float().sum()
    for leaf in leaves:
        if leaf is tensors.get("bias"):
            continue  # which no gradient depends on
        with pytest.raises(NotImplementedError, match=f"{call.op}: {MESSAGE}"):
            torch.autograd.grad(penalty, leaf, retain_graph=True)
    with pytest.raises(NotImplementedError, match=MESSAGE):
        penalty.backward(retain_graph=True)
    y.sum().backward()  # the first derivative is there all the same
    assert torch.equal(leaves[0].grad, grad)  # type: ignore[arg-type]


@pytest.mark.parametrize("backend", ["cpu", "cuda"])  # triton: by the same autograd.Function
def test_rotary_has_derivatives_of_any_order(request: pytest.FixtureRequest, backend: str) -> None:
    if backend == "cuda":
        request.getfixturevalue("emulator")
    call = next(call for call in CALLS if call.name == "apply_rotary, positions")
    results = []
    for name in (backend, "reference"):
        tensors, leaves = leaves_of(call, torch.float32)
        outputs = call.outputs(name, tensors)
        first = torch.autograd.grad(sum((y**3).sum() for y in outputs), leaves, create_graph=True)  # type: ignore[arg-type]
        second = torch.autograd.grad(sum((g**2).sum() for g in first), leaves, create_graph=True)  # type: ignore[arg-type]
        results.append([*first, *second, *torch.autograd.grad(sum(g.sum() for g in second), leaves)])  # type: ignore[arg-type]
    for found, expected in zip(*results, strict=True):
        assert float(expected.abs().detach().max()) > 1
        torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-3)


def test_without_gradients_of_the_gradient_nothing_is_refused() -> None:
    """create_graph=True alone is no error: a penalty may be on another part of the graph."""
    call = next(call for call in CALLS if call.name == "layer_norm")
    tensors, leaves = leaves_of(call, torch.float32)
    (y,) = call.outputs("cpu", tensors)
    (grad,) = torch.autograd.grad(y.square().sum(), leaves[0], create_graph=True)
    assert grad.requires_grad and torch.equal(grad, torch.autograd.grad(y.square().sum(), leaves[0])[0])


class _Seen(TorchDispatchMode):
    def __init__(self) -> None:
        super().__init__()
        self.names: set[str] = set()

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):  # type: ignore[no-untyped-def]
        self.names.add(func.name())
        return func(*args, **(kwargs or {}))


class _Subclass(Tensor):
    pass


@pytest.mark.parametrize("op", ["attention_forward", "layer_norm_forward", "rotary"])
def test_a_call_is_an_operator_only_where_somebody_looks(op: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """A mode, a profiler, a gradient or a subclass finds the operator; a plain call goes past it to the same bits."""
    q, x = torch.randn(1, 3, 2, 32), torch.randn(3, 32)
    cos, sin = reference.rotary_table(3, 16)
    run = {
        "attention_forward": lambda q: flash_attention(q, q, q, backend="cpu"),
        "layer_norm_forward": lambda q: layer_norm(q, x[0], x[1], backend="cpu"),
        "rotary": lambda q: apply_rotary(q, q, cos, sin, backend="cpu")[0],
    }[op]
    plain = run(q)
    with _Seen() as seen:
        assert torch.equal(run(q), plain)
    assert f"phi1::{op}" in seen.names
    with torch.profiler.profile() as profile:
        assert torch.equal(run(q), plain)
    assert f"phi1::{op}" in {event.key for event in profile.key_averages()}

    def reached(*_: object, **__: object) -> None:
        raise AssertionError("through the dispatcher")

    monkeypatch.setattr(torch.ops.phi1, op, reached)
    assert torch.equal(run(q), plain)
    for watched in (q.clone().requires_grad_(), q.as_subclass(_Subclass)):
        with pytest.raises(AssertionError, match="through the dispatcher"):
            run(watched)
