"""layer_norm against its formula in float64."""

import itertools

import pytest
import torch
from cpu_isa import CPU_BACKENDS
from error_rule import bound, check, error
from torch import Tensor

from kernels import layer_norm

DTYPES = [torch.float32, torch.bfloat16, torch.float16]
BACKENDS = ["reference", "torch", *CPU_BACKENDS]


@pytest.fixture(params=BACKENDS)
def name(request):
    """A backend's name, with the CPU backend's instruction set in use."""
    yield request.param


def plain(x: Tensor, weight: Tensor, bias: Tensor, eps: float = 1e-5) -> Tensor:
    """The formula, every intermediate in x's dtype."""
    centred = x - x.mean(-1, keepdim=True)
    return centred / torch.sqrt((centred * centred).mean(-1, keepdim=True) + eps) * weight + bias


def make(shape: tuple[int, ...], dtype: torch.dtype, spread: float = 1.0) -> list[Tensor]:
    """x with a mean of its own in each row, weight, bias, gradient of the output."""
    generator = torch.Generator().manual_seed(3)
    rows = torch.randn((*shape[:-1], 1), generator=generator)
    x = spread * (torch.randn(shape, generator=generator) + rows)
    weight, bias = (torch.randn(shape[-1], generator=generator) for _ in range(2))
    return [t.to(dtype) for t in (x, weight, bias, torch.randn(shape, generator=generator))]


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", [(8,), (1, 8), (3, 33), (2, 5, 64), (113, 203), (7, 1024), (3, 2048)], ids=str)
def test_output_and_gradients_obey_the_error_rule(name, shape, dtype):
    inputs = make(shape, dtype)
    results = []
    for function, kind in ((plain, torch.float64), (plain, dtype), (lambda *a: layer_norm(*a, backend=name), dtype)):
        leaves = [t.to(kind).clone().requires_grad_() for t in inputs[:3]]
        y = function(*leaves)
        results.append((y.detach(), *torch.autograd.grad(y, leaves, inputs[3].to(kind))))
    for what, truth, low, found in zip(("y", "dx", "dweight", "dbias"), *results, strict=True):
        check(what, found, low, truth, dtype)


def test_rows_that_are_strided_or_far_from_zero(name):
    x, weight, bias, grad = make((6, 48), torch.float32)
    wide = torch.randn(6, 100)
    wide[:, 3:51] = x
    view = wide[:, 3:51].requires_grad_()
    y = layer_norm(view, weight, bias, backend=name)
    torch.testing.assert_close(y, layer_norm(x, weight, bias, backend=name), rtol=1e-5, atol=1e-6)
    transposed = grad.T.contiguous().T
    (dx,) = torch.autograd.grad(y, view, transposed)
    x.requires_grad_()
    (expected,) = torch.autograd.grad(layer_norm(x, weight, bias, backend=name), x, grad)
    torch.testing.assert_close(dx, expected, rtol=1e-5, atol=1e-6)
    # Mean 1000, deviation 1: E[x^2] - E[x]^2 would lose the variance (1e6 * 2^-24 = 0.06); two passes keep 3 digits.
    far = x.detach() + 1000
    truth = plain(far.double(), weight.double(), bias.double())
    assert error(layer_norm(far, weight, bias, backend=name), truth) < 1e-3


# Of eps in float32 only: 1/500 of the output is below the rounding of 16-bit floats.
@pytest.mark.parametrize(
    ("mutation", "dtype"),
    [
        *itertools.product(("sample_variance", "no_mean", "no_bias"), DTYPES),
        ("no_eps", torch.float32),
        ("other_eps", torch.float32),
    ],
    ids=str,
)
def test_the_tolerance_bites(mutation, dtype):
    # Rows of deviation 0.05: a variance of 0.0025, on which eps = 1e-5 has a weight of 1/250.
    x, weight, bias, _ = make((64, 32), dtype, spread=0.05 if "eps" in mutation else 1.0)
    a, w, b = x.double(), weight.double(), bias.double()
    truth = plain(a, w, b)
    n = a.shape[-1]
    wrong = {
        "no_eps": lambda: plain(a, w, b, eps=0.0),
        "other_eps": lambda: plain(a, w, b, eps=1e-6),
        "sample_variance": lambda: (truth - b) * ((n - 1) / n) ** 0.5 + b,
        "no_mean": lambda: a / torch.sqrt(a.square().mean(-1, keepdim=True) + 1e-5) * w + b,
        "no_bias": lambda: truth - b,
    }[mutation]()
    assert error(wrong, truth) > bound(plain(x, weight, bias), truth, dtype)


def test_a_constant_row_gives_the_bias(name):
    _, weight, bias, _ = make((2, 16), torch.float32)
    y = layer_norm(torch.full((2, 16), 3.0), weight, bias, backend=name)
    torch.testing.assert_close(y, bias.expand(2, 16), rtol=0, atol=0)


@pytest.mark.parametrize("name", ["reference", "torch"])
def test_gradcheck(name):
    inputs = [t.requires_grad_() for t in make((3, 7), torch.float64)[:3]]
    assert torch.autograd.gradcheck(lambda *a: layer_norm(*a, backend=name), inputs)


def test_compiles_to_one_graph(name):
    inputs = make((5, 33), torch.float32)[:3]
    compiled = torch.compile(lambda *a: layer_norm(*a, backend=name), fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(compiled(*inputs), layer_norm(*inputs, backend=name))


@pytest.mark.parametrize(
    ("x", "weight", "bias", "message"),
    [
        (torch.zeros(2, 4).int(), torch.zeros(4), torch.zeros(4), "x.dtype = torch.int32: must be float64"),
        (torch.zeros(2, 4), torch.zeros(3), torch.zeros(4), r"weight.shape = \(3,\): must be \(4,\)"),
        (torch.zeros(2, 4), torch.zeros(4), torch.zeros(1, 4), r"bias.shape = \(1, 4\): must be \(4,\)"),
        (
            torch.zeros(2, 4).half(),
            torch.zeros(4),
            torch.zeros(4),
            r"weight.dtype = torch.float32, x.dtype = torch.float16",
        ),
        (torch.zeros(2, 4), torch.zeros(4, device="meta"), torch.zeros(4), "weight is on meta, x on cpu"),
    ],
)
def test_bad_input(x, weight, bias, message):
    with pytest.raises(ValueError, match=message):
        layer_norm(x, weight, bias)


def test_none_is_named_under_autocast_too():
    with torch.autocast("cpu", torch.bfloat16), pytest.raises(ValueError, match=r"^weight = None: must be a tensor"):
        layer_norm(torch.zeros(2, 4), None, torch.zeros(4))
