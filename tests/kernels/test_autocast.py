"""kernels/autocast.py's rule, for every op on every backend: as if the inputs had been cast by hand, and no cast
within.
"""

import contextlib
import importlib.util
from collections.abc import Callable, Iterator

import pytest
import torch
import torch.utils.checkpoint
from cpu_isa import CPU_BACKENDS
from torch import Tensor

from kernels import (
    BlockShape,
    apply_rotary,
    flash_attention,
    layer_norm,
    linear_cross_entropy,
    parallel_block,
    reference,
    registry,
)

TRITON = importlib.util.find_spec("triton") is not None and not torch.cuda.is_available()
BACKENDS = ["reference", "torch", *["cpu"] * bool(CPU_BACKENDS), "cuda", *["triton"] * TRITON]
HALVES = (torch.bfloat16, torch.float16)


@pytest.fixture(params=BACKENDS)
def backend(request: pytest.FixtureRequest) -> str:
    """A backend that takes CPU tensors; `cuda` is the emulator."""
    if request.param == "cuda":
        request.getfixturevalue("emulator")
    return request.param


def randn(*shape: int, seed: int, scale: float = 1.0) -> Tensor:
    return scale * torch.randn(shape, generator=torch.Generator().manual_seed(seed))


COS, SIN = reference.rotary_table(9, 16)
TARGETS = torch.tensor([3, -100, 0, 23, 7])
Op = Callable[..., Tensor | tuple[Tensor, ...]]
# name: (the op of its floating inputs and a backend, those inputs, does autocast cast them?)
OPS: dict[str, tuple[Op, list[Tensor], bool]] = {
    "flash_attention": (
        lambda q, k, v, backend: flash_attention(q, k, v, backend=backend),
        [randn(1, 9, 2, 32, seed=1), randn(1, 9, 1, 32, seed=2), randn(1, 9, 1, 32, seed=3)],
        True,
    ),
    "parallel_block": (
        lambda *t, backend: parallel_block(*t, COS, SIN, BlockShape(2, 1, 32), backend=backend),
        [
            randn(1, 9, 24, seed=4),
            randn(24, seed=5),
            randn(24, seed=6),
            randn(168, 24, seed=7, scale=0.2),
            randn(168, seed=8, scale=0.1),
            randn(24, 104, seed=9, scale=0.1),
            randn(24, seed=10),
        ],
        True,
    ),
    "linear_cross_entropy": (
        lambda *t, backend: linear_cross_entropy(*t, TARGETS, backend=backend),
        [randn(5, 16, seed=11), randn(24, 16, seed=12), randn(24, seed=13)],
        True,
    ),
    "layer_norm": (
        lambda x, weight, bias, backend: layer_norm(x, weight, bias, backend=backend),
        [randn(5, 16, seed=14), randn(16, seed=15), randn(16, seed=16)],
        False,
    ),
    "apply_rotary": (
        lambda q, k, backend: apply_rotary(q, k, COS, SIN, backend=backend),
        [randn(1, 9, 2, 32, seed=17), randn(1, 9, 1, 32, seed=18)],
        False,
    ),
}


def call(name: str, backend: str, inputs: list[Tensor]) -> tuple[list[Tensor], list[Tensor]]:
    """The op's leaves and results."""
    leaves = [x.clone().requires_grad_() for x in inputs]
    out = OPS[name][0](*leaves, backend=backend)
    return leaves, [out] if isinstance(out, Tensor) else list(out)


def gradients(leaves: list[Tensor], outs: list[Tensor]) -> list[Tensor]:
    weights = [randn(*out.shape, seed=20).to(out.dtype) for out in outs]
    return list(torch.autograd.grad(outs, leaves, weights))


def expected(name: str, backend: str, inputs: list[Tensor], dtype: torch.dtype) -> tuple[list[Tensor], list[Tensor]]:
    """Without autocast, the inputs cast by hand where the rule says so."""
    leaves = [x.clone().requires_grad_() for x in inputs]
    cast = [x.to(dtype) for x in leaves] if OPS[name][2] else leaves
    out = OPS[name][0](*cast, backend=backend)
    outs = [out] if isinstance(out, Tensor) else list(out)
    return outs, gradients(leaves, outs)


def same(found: list[Tensor], wanted: list[Tensor]) -> None:
    for a, b in zip(found, wanted, strict=True):
        assert a.dtype == b.dtype
        assert torch.equal(a, b), float((a.double() - b.double()).abs().max())


def refuses_float32(name: str, backend: str) -> bool:
    """The cuda backend's products take 16 bits."""
    return backend == "cuda" and name in ("flash_attention", "parallel_block")


@pytest.mark.parametrize("name", OPS)
@pytest.mark.parametrize("given", [torch.float32, *HALVES], ids=str)
@pytest.mark.parametrize("dtype", HALVES, ids=str)
def test_results_and_gradients_are_those_of_inputs_cast_by_hand(backend, name, dtype, given):
    inputs = [x.to(given) for x in OPS[name][1]]
    outs, grads = expected(name, backend, inputs, dtype)
    with torch.autocast("cpu", dtype):
        leaves, found = call(name, backend, inputs)
    same(found, outs)
    assert found[0].dtype == (torch.float32 if name == "linear_cross_entropy" else dtype if OPS[name][2] else given)
    same(gradients(leaves, found), grads)


@pytest.mark.parametrize("name", OPS)
def test_a_backward_pass_inside_the_region(backend, name):
    """Within our operators nothing is cast, in a region of another dtype neither. `reference` and `torch` are PyTorch's
    ops, whose backward passes autocast casts too (and fails where the dtypes differ): theirs is in the same region."""
    inputs = [x.to(torch.float16) for x in OPS[name][1]]
    _, grads = expected(name, backend, inputs, torch.float16)
    with torch.autocast("cpu", torch.float16):
        leaves, found = call(name, backend, inputs)
    if backend in ("reference", "torch"):
        with torch.autocast("cpu", torch.float16):
            for a, b in zip(gradients(leaves, found), grads, strict=True):
                torch.testing.assert_close(a, b, rtol=0.004, atol=0.004)
    else:
        with torch.autocast("cpu", torch.bfloat16):
            same(gradients(leaves, found), grads)


@pytest.mark.parametrize("name", OPS)
def test_a_region_without_autocast_inside(backend, name):
    given = torch.float16 if refuses_float32(name, backend) else torch.float32
    inputs = [x.to(given) for x in OPS[name][1]]
    outs, grads = expected(name, backend, inputs, given)
    with torch.autocast("cpu", torch.bfloat16), torch.autocast("cpu", enabled=False):
        leaves, found = call(name, backend, inputs)
    same(found, outs)
    same(gradients(leaves, found), grads)


@pytest.mark.parametrize("name", OPS)
@pytest.mark.parametrize("name_of_backend", ["reference", "torch"])
def test_float64_is_left_alone(name, name_of_backend):
    inputs = [x.double() for x in OPS[name][1]]
    outs, grads = expected(name, name_of_backend, inputs, torch.float64)
    with torch.autocast("cpu", torch.bfloat16):
        leaves, found = call(name, name_of_backend, inputs)
    same(found, outs)
    same(gradients(leaves, found), grads)


@pytest.mark.parametrize("name", OPS)
@pytest.mark.parametrize("inside", [True, False], ids=["region compiled", "region around"])
def test_compiled(backend, name, inside):
    if backend == "triton":
        pytest.skip("needs a GPU: torch.compile does not compile Triton's interpreter")
    torch._dynamo.reset()
    inputs = OPS[name][1]
    outs, grads = expected(name, backend, inputs, torch.bfloat16)

    def op(*leaves: Tensor) -> Tensor | tuple[Tensor, ...]:
        with torch.autocast("cpu", torch.bfloat16) if inside else contextlib.nullcontext():
            return OPS[name][0](*leaves, backend=backend)

    compiled = torch.compile(op, fullgraph=True, backend="aot_eager")
    leaves = [x.clone().requires_grad_() for x in inputs]
    with contextlib.nullcontext() if inside else torch.autocast("cpu", torch.bfloat16):
        out = compiled(*leaves)
    found = [out] if isinstance(out, Tensor) else list(out)
    for a, b in zip([*found, *gradients(leaves, found)], [*outs, *grads], strict=True):
        assert a.dtype == b.dtype
        # A graph may leave out the rounding between two of PyTorch's ops: two epsilons of bfloat16, of the greatest
        # number, since a sum of such may cancel.
        torch.testing.assert_close(a, b, rtol=2**-6, atol=2**-6 * max(1.0, float(b.abs().max())))


@pytest.fixture
def _nothing_measured(monkeypatch):
    """The fixed order: what was measured may name one version for a forward pass alone, another for training."""
    monkeypatch.setattr(registry, "_rows", {})
    registry._forget()
    yield
    registry._forget()


@pytest.mark.usefixtures("_nothing_measured")  # a reentrant checkpoint's forward pass records no gradient
@pytest.mark.parametrize("name", OPS)
@pytest.mark.parametrize("reentrant", [True, False])
def test_checkpoints_recompute_under_autocast(backend, name, reentrant):
    inputs = OPS[name][1]
    outs, grads = expected(name, backend, inputs, torch.bfloat16)
    leaves = [x.clone().requires_grad_() for x in inputs]
    with torch.autocast("cpu", torch.bfloat16):
        out = torch.utils.checkpoint.checkpoint(
            lambda *x: OPS[name][0](*x, backend=backend), *leaves, use_reentrant=reentrant
        )
    found = [out] if isinstance(out, Tensor) else list(out)
    same(found, outs)
    same(gradients(leaves, found) if not reentrant else _backward(leaves, found), grads)


def _backward(leaves: list[Tensor], outs: list[Tensor]) -> list[Tensor]:
    """Reentrant checkpoints serve backward() only."""
    torch.autograd.backward(outs, [randn(*out.shape, seed=20).to(out.dtype) for out in outs])
    return [x.grad for x in leaves if x.grad is not None]


def test_arguments_by_name_and_the_callers_output(backend):
    q, k, v = (x.clone() for x in OPS["flash_attention"][1])
    out = torch.empty(q.shape, dtype=torch.bfloat16)
    with torch.autocast("cpu", torch.bfloat16):
        found = flash_attention(q=q, k=k, v=v, out=out, backend=backend)
        assert found is out
        with pytest.raises(ValueError, match=r"out\.dtype = torch\.float32, q\.dtype = torch\.bfloat16: must be equal"):
            flash_attention(q, k, v, out=torch.empty_like(q), backend=backend)
    half = [x.bfloat16() for x in (q, k, v)]
    wanted = flash_attention(*half, backend=backend)
    assert torch.equal(found, wanted)


def test_norms_parameters_follow_x(backend):
    x, weight, bias = OPS["layer_norm"][1]
    with torch.autocast("cpu", torch.bfloat16):
        found = layer_norm(x.bfloat16(), weight, bias, backend=backend)
    assert torch.equal(found, layer_norm(x.bfloat16(), weight.bfloat16(), bias.bfloat16(), backend=backend))
    with pytest.raises(ValueError, match=r"weight\.dtype = torch\.float32"):
        layer_norm(x.bfloat16(), weight, bias, backend=backend)


@contextlib.contextmanager
def _other_device() -> Iterator[None]:
    with torch.autocast("cuda", torch.bfloat16) if torch.cuda.is_available() else torch.autocast("xpu", torch.bfloat16):
        yield


@pytest.mark.filterwarnings("ignore:User provided device_type")
@pytest.mark.parametrize("name", OPS)
def test_a_region_of_another_device_changes_nothing(name):
    inputs = OPS[name][1]
    outs, grads = expected(name, "reference", inputs, torch.float32)
    with _other_device():
        leaves, found = call(name, "reference", inputs)
    same(found, outs)
    same(gradients(leaves, found), grads)
