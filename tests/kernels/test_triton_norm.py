"""Triton's LayerNorm: on a GPU compiled, elsewhere in Triton's interpreter."""

import pytest
import torch
from error_rule import check
from test_norm import DTYPES, make, plain
from torch import Tensor
from triton_mutation import mutate

from kernels import layer_norm
from kernels.triton import norm as triton_norm

GPU = torch.cuda.is_available()
DEVICE = "cuda" if GPU else "cpu"
RESULTS = ("y", "dx", "dweight", "dbias")


def run(inputs: list[Tensor]) -> list[Tensor]:
    """y and the gradients of x, weight and bias by the backend, on the CPU."""
    leaves = [t.to(DEVICE).clone().requires_grad_() for t in inputs[:3]]
    y = layer_norm(*leaves, backend="triton")
    return [t.cpu() for t in (y.detach(), *torch.autograd.grad(y, leaves, inputs[3].to(DEVICE)))]


def check_run(found: list[Tensor], inputs: list[Tensor], dtype: torch.dtype) -> None:
    results = []
    for kind in (torch.float64, dtype):
        leaves = [t.to(kind).clone().requires_grad_() for t in inputs[:3]]
        y = plain(*leaves)
        results.append((y.detach(), *torch.autograd.grad(y, leaves, inputs[3].to(kind))))
    for what, a, truth, low in zip(RESULTS, found, *results, strict=True):
        check(what, a, low, truth, dtype)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(
    "shape", [(8,), (1, 8), (3, 1), (3, 33), (2, 5, 64), (113, 203), (65, 1024), (3, 2048)], ids=str
)
def test_output_and_gradients_obey_the_error_rule(shape, dtype):
    inputs = make(shape, dtype)
    check_run(run(inputs), inputs, dtype)


def test_rows_that_are_strided_or_far_from_zero():
    x, weight, bias, grad = (t.to(DEVICE) for t in make((6, 48), torch.float32))
    wide = torch.full((6, 100), float("nan"), device=DEVICE)
    wide[:, 3:51] = x
    results = []
    for rows, g in ((wide[:, 3:51], grad.T.contiguous().T), (x.T.contiguous().T, grad), (x, grad)):
        leaf = rows.detach().requires_grad_()
        y = layer_norm(leaf, weight, bias, backend="triton")
        results.append((y.detach(), *torch.autograd.grad(y, leaf, g)))
    for other in results[:2]:
        assert all(torch.equal(a, b) for a, b in zip(other, results[2], strict=True))
    # Mean 1000, deviation 1: E[x^2] - E[x]^2 would lose the variance (1e6 * 2^-24 = 0.06); two passes keep 3 digits.
    truth = plain((x + 1000).double(), weight.double(), bias.double())
    assert float((layer_norm(x + 1000, weight, bias, backend="triton") - truth).abs().max()) < 1e-3


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_a_residual_is_added_to_the_gradient_of_x(dtype):
    x, weight, bias, grad = (t.to(DEVICE) for t in make((40, 33), dtype))
    residual = torch.randn(33, 40, generator=torch.Generator().manual_seed(1)).to(dtype).to(DEVICE).T
    _, stats = triton_norm.layer_norm_forward(x, weight, bias, 1e-5)
    dx, *others = triton_norm.layer_norm_backward(grad, x, weight, stats)
    added, *same = triton_norm.layer_norm_backward(grad, x, weight, stats, residual)
    assert all(torch.equal(a, b) for a, b in zip(others, same, strict=True))
    epsilon = torch.finfo(dtype).eps  # dx is rounded before this sum, and not in the kernel
    torch.testing.assert_close(added, dx + residual, rtol=epsilon, atol=4 * epsilon)


def test_gradients_are_bitwise_reproducible():
    inputs = make((70, 96), torch.bfloat16)
    first = run(inputs)
    for _ in range(50 if GPU else 1):
        assert all(torch.equal(a, b) for a, b in zip(first, run(inputs), strict=True))


@pytest.mark.parametrize(
    ("module", "old", "new"),
    [
        ("norm", "/ hidden + eps", "/ (hidden - 1) + eps"),
        ("norm", "* weight + bias", "* weight"),
        ("norm", "tl.where(mask, x - mean[:, None], 0.0)", "x - mean[:, None]"),
        ("norm", "- normed * (tl.sum(d * normed, 1) / hidden)[:, None]", ""),
        ("norm", "(d - (tl.sum(d, 1) / hidden)[:, None]", "(d"),
        ("norm", "dweight += grad * normed", "dweight += grad * x"),
        ("norm", "dbias += grad", "dbias = grad"),
        ("norm", "d = grad * weight", "d = grad"),
        ("norm", "partial[:, hidden:]", "partial[1:, hidden:]"),
        ("column_sums", "range(0, rows, BLOCK_ROWS)", "range(0, rows - 1, BLOCK_ROWS)"),
    ],
)
def test_mutations_fail(module, old, new, monkeypatch, tmp_path):
    dtype = torch.bfloat16
    inputs = make((65, 33), dtype)  # three chunks of rows
    if module == "column_sums":
        inputs = make((32 * 64 + 1, 3), dtype)  # 65 chunks, of which the last fills a tile of its own
    mutate(monkeypatch, tmp_path, module, old, new)
    with pytest.raises(AssertionError, match="error"):
        check_run(run(inputs), inputs, dtype)


def test_opcheck():
    x, weight, bias, grad = (t.to(DEVICE) for t in make((5, 33), torch.float32))
    torch.library.opcheck(torch.ops.phi1.layer_norm_forward.default, (x, weight, bias, 1e-5, "triton"))
    _, stats = torch.ops.phi1.layer_norm_forward(x, weight, bias, 1e-5, "triton")
    torch.library.opcheck(torch.ops.phi1.layer_norm_backward.default, (grad, x, weight, stats, "triton"))


def test_compiles_to_one_graph():
    inputs = [t.to(DEVICE) for t in make((5, 33), torch.float32)[:3]]
    compiled = torch.compile(lambda *a: layer_norm(*a, backend="triton"), fullgraph=True, backend="aot_eager")
    assert torch.equal(compiled(*inputs), layer_norm(*inputs, backend="triton"))


def test_rows_that_are_too_wide():
    x, weight = torch.zeros(1, 8193, device=DEVICE), torch.zeros(8193, device=DEVICE)
    with pytest.raises(ValueError, match=r"x\.shape\[-1\] = 8193: .* up to 8192; use backend='torch'"):
        layer_norm(x, weight, weight, backend="triton")
