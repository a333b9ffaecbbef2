"""csrc/cuda/layer_norm.cuh under the emulator and, where there is one, on the GPU."""

import pytest
import torch
import torch.nn.functional as F
from error_rule import record

from kernels import layer_norm, reference
from kernels.registry import implementation

DTYPES = (torch.float32, torch.bfloat16, torch.float16)
SHAPES = [(1, 8), (3, 64), (2, 5, 200), (70, 264), (1, 130, 1032), (4, 2048), (1100, 8)]


def _inputs(shape: tuple[int, ...], dtype: torch.dtype) -> tuple[torch.Tensor, ...]:
    generator = torch.Generator().manual_seed(2)
    x, grad = (torch.randn(shape, generator=generator) for _ in range(2))
    weight, bias = (torch.randn(shape[-1], generator=generator) for _ in range(2))
    # A mean that is large against the deviation: a variance by E[x^2] - E[x]^2 would lose its digits.
    return tuple(t.to(dtype) for t in (3 * x + 20, weight, bias, grad))


def _results(run, x, weight, bias, grad):
    leaves = [t.detach().requires_grad_() for t in (x, weight, bias)]
    y = run(*leaves)
    return [y.detach(), *torch.autograd.grad(y, leaves, grad)]


def check_layer_norm(shape: tuple[int, ...], dtype: torch.dtype, device: str = "cpu") -> None:
    """y, dx, dweight, dbias and dx with a residual: at most twice PyTorch's own error in this dtype, plus twice the
    rounding of order one.

    Plus float32's rounding of the mean, 20 against a deviation of 3, in each row that is added up.
    """
    inputs = _inputs(shape, dtype)
    residual = torch.randn(shape, generator=torch.Generator().manual_seed(3)).to(dtype)
    truth = _results(lambda *t: reference.layer_norm(*t, 1e-5), *(t.double() for t in inputs))
    peer = _results(lambda x, weight, bias: F.layer_norm(x, weight.shape, weight, bias, 1e-5), *inputs)
    there = [t.to(device) for t in inputs]
    ours = _results(lambda *t: layer_norm(*t, backend="cuda"), *there)
    found = implementation("layer_norm", "cuda")
    forward, backward = found.forward, found.backward
    x, weight, bias, grad = there
    stats = forward(x, weight, bias, 1e-5)[1]
    ours.append(backward(grad, x, weight, stats, residual.to(device))[0])
    truth.append(truth[1] + residual.double())
    peer.append(peer[1] + residual)
    for name, x, y, z in zip(("y", "dx", "dweight", "dbias", "dx + residual"), ours, peer, truth, strict=True):
        low = z.to(dtype)
        mean = 30 * torch.finfo(torch.float32).eps * inputs[0][..., 0].numel() ** 0.5
        rounding = float((low + 0.3 - 0.3 - low).abs().max())
        error, allowed = float((x.cpu().double() - z).abs().max()), float((y.double() - z).abs().max())
        record(name, dtype, error, 2 * allowed + 2 * rounding + mean)
        assert error <= 2 * allowed + 2 * rounding + mean, f"{name}: {error:.3g}, PyTorch's {allowed:.3g}"


def check_equal_numbers(device: str = "cpu") -> None:
    """Rows without variance: y is the bias, and eps keeps the gradient finite: its mean over a row is taken out."""
    _, weight, bias, grad = (t.to(device) for t in _inputs((3, 64), torch.bfloat16))
    x = torch.full((3, 64), 2.0, dtype=torch.bfloat16, device=device)
    y, dx, *_ = _results(lambda *t: layer_norm(*t, backend="cuda"), x, weight, bias, grad)
    assert torch.equal(y, bias.expand(3, 64))
    d = (grad.double() * weight.double()).cpu()
    expected = (d - d.mean(-1, keepdim=True)) * 1e-5**-0.5
    assert ((dx.cpu().double() - expected).abs() <= expected.abs() * 2**-8 + 1e-3).all()


def test_rows_of_equal_numbers(cuda_device):
    check_equal_numbers(cuda_device)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_layer_norm_keeps_the_error_rule(cuda_device, shape, dtype):
    check_layer_norm(shape, dtype, cuda_device)


def test_strided_rows_and_gradients(emulator):
    """x as a slice of a wider tensor, grad_y transposed: the same bits as from contiguous copies."""
    x, weight, bias, grad = _inputs((6, 5, 64), torch.bfloat16)
    wide = torch.zeros(6, 5, 80, dtype=torch.bfloat16)
    wide[..., 8:72] = x
    strided_grad = grad.transpose(0, 1).contiguous().transpose(0, 1)
    run = lambda *t: layer_norm(*t, backend="cuda")
    for ours, dense in zip(
        _results(run, wide[..., 8:72], weight, bias, strided_grad), _results(run, x, weight, bias, grad), strict=True
    ):
        assert torch.equal(ours, dense)


def test_bits_do_not_depend_on_the_order_of_threads(emulator):
    inputs = _inputs((90, 72), torch.bfloat16)
    run = lambda *t: layer_norm(*t, backend="cuda")
    first = _results(run, *inputs)
    for seed in range(1, 9):
        emulator.set_seed(seed)
        assert all(torch.equal(x, y) for x, y in zip(first, _results(run, *inputs), strict=True))


def test_memory_requests_are_dense(emulator):
    _results(lambda *t: layer_norm(*t, backend="cuda"), *_inputs((64, 256), torch.bfloat16))
    counters = emulator.counters()
    assert counters["global_sectors"] == counters["global_sectors_least"] > 0
    # Stores of the columns' sums have no bank conflict; their loads, one in eighteen of the requests, meet two by two.
    assert counters["shared_wavefronts"] <= 1.6 * counters["shared_wavefronts_least"]


def test_width_that_is_no_multiple_of_8_is_refused(emulator):
    x, weight = torch.zeros(2, 12), torch.ones(12)
    with pytest.raises(ValueError, match=r"x.shape\[-1\] = 12: .* a multiple of 8"):
        layer_norm(x, weight, weight, backend="cuda")


def test_opcheck_and_one_graph(emulator):
    x, weight, bias, grad = _inputs((5, 16), torch.bfloat16)
    torch.library.opcheck(torch.ops.phi1.layer_norm_forward, (x, weight, bias, 1e-5, "cuda"))
    _, stats = torch.ops.phi1.layer_norm_forward(x, weight, bias, 1e-5, "cuda")
    torch.library.opcheck(torch.ops.phi1.layer_norm_backward, (grad, x, weight, stats, "cuda"))
    run = lambda *t: layer_norm(*t, backend="cuda")
    compiled = torch.compile(run, fullgraph=True, backend="aot_eager")
    for ours, eager in zip(
        _results(compiled, x, weight, bias, grad), _results(run, x, weight, bias, grad), strict=True
    ):
        assert torch.equal(ours, eager)
