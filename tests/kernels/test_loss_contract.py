"""linear_cross_entropy on what a model gives it, on every backend that takes CPU tensors: one contract."""

import copy
import importlib.util
import pickle
import threading

import pytest
import torch
import torch.nn.functional as F
import torch.utils.checkpoint
from cpu_isa import CPU_BACKENDS
from error_rule import check
from test_loss import DTYPES, make, plain, set_chunk, with_grads
from torch import Tensor

from kernels import chunked_loss, linear_cross_entropy, use_backend

TRITON = importlib.util.find_spec("triton") is not None and not torch.cuda.is_available()
BACKENDS = ["reference", "torch", *["cpu"] * bool(CPU_BACKENDS), "cuda", *["triton"] * TRITON]
TWICE = ("reference", "torch")
RESULTS = ("loss", "dhidden", "dweight", "dbias")


@pytest.fixture(params=BACKENDS)
def backend(request: pytest.FixtureRequest) -> str:
    """A backend that takes CPU tensors; `cuda` is the emulator, `triton` its interpreter."""
    if request.param == "cuda":
        request.getfixturevalue("emulator")
    return request.param


def one_target(rows: int, value: float, dtype: torch.dtype) -> tuple[list[Tensor], Tensor]:
    """Rows that are all alike and all wrong: each gradient of the weight is a sum of equal terms."""
    hidden = torch.full((rows, 8), value)
    weight, bias = torch.zeros(24, 8), torch.zeros(24)
    bias[0], bias[1] = 8.0, 0.5
    return [x.to(dtype) for x in (hidden, weight, bias)], torch.ones(rows, dtype=torch.int64)


def scaled_grads(backend: str, inputs: list[Tensor], targets: Tensor, scale: float, **options: object) -> list[Tensor]:
    return with_grads(
        lambda *a: scale * linear_cross_entropy(*a, targets, backend=backend, **options), inputs, inputs[0].dtype
    )


@pytest.mark.parametrize("reduction", ["mean", "sum"])
@pytest.mark.parametrize("chunk_rows", [4096, 40])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_a_mean_whose_sum_overflows_float16(backend, dtype, chunk_rows, reduction, monkeypatch):
    """4,096 rows of one target: the weight's gradient is 19.7, of the sum 80,870. Sums go on to be scaled, too.

    96 rows of 1,000 where kernels are emulated."""
    set_chunk(monkeypatch, chunk_rows * 24)
    rows, value = (96, 1000.0) if backend in ("cuda", "triton") else (4096, 19.75)
    inputs, targets = one_target(rows, value, dtype)
    scale = 1.0 if reduction == "mean" else 1 / rows
    truth = with_grads(lambda *a: plain(*a, targets), inputs, torch.float64)
    found = scaled_grads(backend, inputs, targets, scale, reduction=reduction)
    assert rows * truth[2].abs().max() > 65504
    for what, a, b in zip(RESULTS[1:], found[1:], truth[1:], strict=True):
        # The softmax, the product and the result are rounded to the dtype.
        assert ((a.double() - b).abs() <= 2 * torch.finfo(dtype).eps * b.abs().max()).all(), what


@pytest.mark.parametrize("scale", [65536.0, 2.0**22, 2.0**-12, 1.2345e-3, 0.0])
def test_the_upstream_factor_is_in_before_float16s_rounding(backend, scale):
    """A GradScaler's 65,536, or a small one. Infinite only where the truth does not fit."""
    inputs, targets = make(40, 16, 24, torch.float16)
    truth = with_grads(lambda *a: scale * plain(*a, targets), inputs, torch.float64)
    found = scaled_grads(backend, inputs, targets, scale)
    for what, a, c in zip(RESULTS[1:], found[1:], truth[1:], strict=True):
        wide = a.double()
        # The softmax is rounded to 16 bits, and the result: 2^-24 at the least. At 65,520 numbers begin to round to
        # inf.
        bound = 2e-3 * c.abs() + 1e-3 * scale / 40 + 2.0**-24
        over = c.abs() - bound > 65520
        assert wide[over].isinf().all(), what
        assert ((wide - c).abs() <= bound)[c.abs() + bound < 65520].all(), what
    if scale == 2.0**22:
        assert any(bool(a.isinf().any()) for a in found[1:]), "some of these do overflow"


def test_small_means_keep_their_bits_for_a_scaler(backend):
    """A mean over many rows is below float16's least normal number: unscaled it would lose most bits."""
    inputs, targets = make(512, 16, 24, torch.float16)
    inputs[1] = inputs[1] / 64
    truth = with_grads(lambda *a: 4096 * plain(*a, targets), inputs, torch.float64)
    found = scaled_grads(backend, inputs, targets, 4096.0)
    assert (truth[1].abs() / 4096).max() < 2.0**-14
    for what, a, b in zip(RESULTS[1:], found[1:], truth[1:], strict=True):
        assert (a.double() - b).abs().max() <= 1e-3 * b.abs().max(), what


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("garbage", [torch.nan, torch.inf])
def test_what_an_ignored_row_holds_changes_nothing(backend, dtype, garbage, monkeypatch):
    """Padding may be NaN, and 0 times NaN is NaN. A width that is odd: oneDNN on AMX would spread it over rows."""
    set_chunk(monkeypatch, 7 * 24)
    inputs, targets = make(16, 17, 24, dtype)
    targets[[3, 8, 15]] = -100
    clean = scaled_grads(backend, inputs, targets, 1.0)
    inputs[0][[3, 8, 15]] = garbage
    found = scaled_grads(backend, inputs, targets, 1.0)
    for what, a, b in zip(RESULTS, found, clean, strict=True):
        assert torch.equal(a, b) and bool(a.isfinite().all()), what
    assert not found[1][[3, 8, 15]].any()


def test_a_nan_in_a_row_that_counts_is_seen(backend):
    inputs, targets = make(5, 16, 24, torch.float32)
    inputs[0][2, 3] = torch.nan
    assert scaled_grads(backend, inputs, targets, 1.0)[0].isnan()


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_no_bias_is_a_bias_of_zeros(backend, dtype):
    inputs, targets = make(5, 16, 24, dtype)
    wanted = scaled_grads(backend, [*inputs[:2], torch.zeros_like(inputs[2])], targets, 1.0)
    found = with_grads(lambda h, w: linear_cross_entropy(h, w, None, targets, backend=backend), inputs[:2], dtype)
    assert all(map(torch.equal, found, wanted[:3]))


@pytest.mark.parametrize("name", TWICE)
def test_columns_of_minus_infinity(name):
    """No number for a column that cannot be; infinite for a target there, as for `reference`; gradients stay finite."""
    inputs, targets = make(5, 16, 24, torch.float64)
    inputs[2][:20], targets[:] = -torch.inf, 22
    truth = with_grads(lambda *a: plain(*a, targets), inputs, torch.float64)
    for a, b in zip(scaled_grads(name, inputs, targets, 1.0), truth, strict=True):
        torch.testing.assert_close(a, b)
    targets[3] = 4
    found = scaled_grads(name, inputs, targets, 1.0)
    assert float(found[0]) == torch.inf
    expected = scaled_grads("reference", inputs, targets, 1.0)
    for a, b in zip(found[1:], expected[1:], strict=True):
        torch.testing.assert_close(a, b)


@pytest.mark.parametrize("rows", [0, 1, 5])
@pytest.mark.parametrize("reduction", ["mean", "sum"])
def test_no_target_counts(backend, rows, reduction):
    """Zero, not NaN: a micro-batch may have none."""
    inputs, targets = make(rows, 16, 24, torch.float32)
    targets[:] = -100
    found = scaled_grads(backend, inputs, targets, 1.0, reduction=reduction)
    assert found[0].shape == () and not any(bool(x.any()) for x in found)


def test_no_width_leaves_the_bias(backend):
    hidden, weight, bias = torch.zeros(3, 0), torch.zeros(24, 0), torch.arange(24.0)
    targets = torch.tensor([1, -100, 5])
    found = scaled_grads(backend, [hidden, weight, bias], targets, 1.0)
    logits = bias.clone().requires_grad_()
    expected = F.cross_entropy(logits.expand(3, 24), targets)
    torch.testing.assert_close(found[0], expected)
    torch.testing.assert_close(found[3], torch.autograd.grad(expected, logits)[0])


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (
            {"weight": torch.zeros(0, 4), "bias": torch.zeros(0)},
            r"weight.shape = \(0, 4\): must be \(columns, 4\), with a",
        ),
        ({"hidden": torch.zeros(())}, r"hidden.shape = \(\): must be \(..., width\)"),
        ({"bias": torch.zeros(23)}, r"bias.shape = \(23,\): must be \(24,\)"),
        ({"hidden": None}, "hidden = None: must be a tensor"),
        ({"weight": None}, r"weight = None: must be a tensor: \(columns, width\)"),
        ({"targets": [0, 1, 2]}, r"targets = \[0, 1, 2\]: must be a tensor"),
        ({"ignore_index": None}, "ignore_index = None: must be a whole number"),
        ({"ignore_index": 2.0}, "ignore_index = 2.0: must be a whole number"),
        ({"ignore_index": 2**63}, f"ignore_index = {2**63}: must fit 64 bits"),
    ],
)
def test_bad_arguments(backend, change, message):
    arguments = {"hidden": torch.zeros(3, 4), "weight": torch.zeros(24, 4), "bias": torch.zeros(24)}
    arguments |= {"targets": torch.zeros(3).long()} | change
    with pytest.raises(ValueError, match=message):
        linear_cross_entropy(**arguments, backend=backend)


@pytest.mark.parametrize("wrong", [-1, 24, 2**40])
@pytest.mark.parametrize("grads", [True, False])
def test_a_target_that_is_no_column(backend, wrong, grads):
    inputs, targets = make(5, 16, 24, torch.float32)
    targets[2] = wrong
    with torch.set_grad_enabled(grads), pytest.raises(IndexError, match=rf"{wrong}\]?.*: must be in \[0, 24\)"):
        linear_cross_entropy(*[x.requires_grad_() for x in inputs], targets, backend=backend)


@pytest.mark.parametrize("name", TWICE)
def test_twice_differentiable(name, monkeypatch):
    set_chunk(monkeypatch, 14)
    inputs, targets = make(5, 3, 7, torch.float64)
    targets[2] = -100
    leaves = [t.requires_grad_() for t in inputs]
    loss = lambda *a: linear_cross_entropy(*a, targets, z_loss=0.3, backend=name)
    assert torch.autograd.gradgradcheck(loss, leaves)
    hessian = torch.func.jacrev(torch.func.jacrev(lambda h: loss(h, *inputs[1:])))(inputs[0].detach())
    assert hessian.shape == (5, 3, 5, 3) and hessian[2].abs().max() == 0


def test_a_second_derivative_is_right_or_an_error(backend):
    inputs, targets = make(5, 16, 24, torch.float32)
    leaves = [t.requires_grad_() for t in inputs]
    loss = linear_cross_entropy(*leaves, targets, backend=backend)
    grads = torch.autograd.grad(loss, leaves, create_graph=True)
    expected = with_grads(lambda *a: plain(*a, targets), inputs, torch.float32)[1:]
    for a, b in zip(grads, expected, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-6)
    penalty = sum(g.square().sum() for g in grads)
    if backend in TWICE:
        assert all(bool(x.isfinite().all()) for x in torch.autograd.grad(penalty, leaves))
    else:
        with pytest.raises(NotImplementedError, match="linear_cross_entropy: a second derivative was asked for"):
            torch.autograd.grad(penalty, leaves)


# ------------------------------------------------------------------------------------------------------------ uses


def _expected(inputs: list[Tensor], targets: Tensor, backend: str) -> list[Tensor]:
    return scaled_grads(backend, inputs, targets, 1.0)


@pytest.mark.parametrize("reentrant", [True, False])
def test_checkpoint(backend, reentrant):
    inputs, targets = make(9, 16, 24, torch.float32)
    leaves = [t.clone().requires_grad_() for t in inputs]
    loss = torch.utils.checkpoint.checkpoint(
        lambda *a: linear_cross_entropy(*a, targets, backend=backend), *leaves, use_reentrant=reentrant
    )
    loss.backward()
    for a, b in zip([loss.detach(), *(x.grad for x in leaves)], _expected(inputs, targets, backend), strict=True):
        assert torch.equal(a, b)


def test_compiled_with_ignored_rows_and_no_bias(backend):
    if backend == "triton":
        pytest.skip("needs a GPU: torch.compile does not compile Triton's interpreter")
    torch._dynamo.reset()
    inputs, targets = make(9, 16, 24, torch.float16)
    targets[4] = -100
    loss = lambda h, w: linear_cross_entropy(h, w, None, targets, backend=backend)
    eager = with_grads(loss, inputs[:2], torch.float16)
    compiled = with_grads(torch.compile(loss, fullgraph=True, backend="aot_eager"), inputs[:2], torch.float16)
    for a, b in zip(compiled, eager, strict=True):
        torch.testing.assert_close(a, b, rtol=2e-3, atol=1e-6)


def test_functional_gradients(backend):
    inputs, targets = make(9, 16, 24, torch.float32)
    loss = lambda *a: linear_cross_entropy(*a, targets, backend=backend)
    grads = torch.func.grad(loss, argnums=(0, 1, 2))(*inputs)
    for a, b in zip(grads, _expected(inputs, targets, backend)[1:], strict=True):
        torch.testing.assert_close(a, b)
    if backend != "reference":
        with pytest.raises(RuntimeError, match="vmap over _LinearCrossEntropy"):
            torch.func.vmap(lambda h: loss(h, *inputs[1:]))(torch.stack([inputs[0]] * 2))


@pytest.mark.parametrize("mode", [torch.no_grad, torch.inference_mode])
def test_without_gradients(backend, mode):
    inputs, targets = make(9, 16, 24, torch.float32)
    with mode():
        loss = linear_cross_entropy(*inputs, targets, backend=backend)
    assert not loss.requires_grad
    torch.testing.assert_close(loss.clone(), _expected(inputs, targets, backend)[0], rtol=1e-6, atol=0)


def test_the_gradients_that_are_not_asked_for(backend):
    inputs, targets = make(9, 16, 24, torch.float32)
    expected = _expected(inputs, targets, backend)
    for i in range(3):
        leaves = [x.clone().requires_grad_(i == j) for j, x in enumerate(inputs)]
        linear_cross_entropy(*leaves, targets, backend=backend).backward()
        assert [x.grad is not None for x in leaves] == [i == j for j in range(3)]
        assert torch.equal(leaves[i].grad, expected[1 + i])


def test_a_graph_that_is_kept_and_used_twice(backend):
    inputs, targets = make(9, 16, 24, torch.float16)
    leaves = [x.clone().requires_grad_() for x in inputs]
    loss = linear_cross_entropy(*leaves, targets, backend=backend)
    first = torch.autograd.grad(loss, leaves, retain_graph=True)
    second = torch.autograd.grad(loss, leaves, torch.tensor(2.0))
    for a, b in zip(second, first, strict=True):
        torch.testing.assert_close(a.double(), 2 * b.double(), rtol=1e-3, atol=2.0**-24)


@pytest.mark.parametrize("device", ["meta", "cpu"])
def test_another_default_device(backend, device):
    inputs, targets = make(9, 16, 24, torch.bfloat16)
    expected = _expected(inputs, targets, backend)
    leaves = [x.clone().requires_grad_() for x in inputs]
    with torch.device(device):
        loss = linear_cross_entropy(*leaves, targets, backend=backend)
        without = linear_cross_entropy(*leaves[:2], None, targets, backend=backend)
        loss.backward()
    assert without.device.type == "cpu"
    assert all(map(torch.equal, [loss, *(x.grad for x in leaves)], expected))


def test_threads(backend):
    if backend in ("cuda", "triton"):
        pytest.skip("needs a GPU: the emulator and Triton's interpreter run one kernel at a time")
    inputs, targets = make(64, 16, 24, torch.float32)
    expected = _expected(inputs, targets, backend)
    results: list[list[Tensor]] = [[] for _ in range(4)]

    def work(i: int) -> None:
        for _ in range(20):
            results[i] = scaled_grads(backend, copy.deepcopy(inputs), pickle.loads(pickle.dumps(targets)), 1.0)

    threads = [threading.Thread(target=work, args=(i,)) for i in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    for found in results:
        assert all(map(torch.equal, found, expected))


def test_use_backend_is_the_forward_passes(backend):
    """The backward pass is of the backend that ran forward, whatever is in use by then."""
    inputs, targets = make(9, 16, 24, torch.float32)
    expected = _expected(inputs, targets, backend)
    leaves = [x.clone().requires_grad_() for x in inputs]
    with use_backend(backend):
        loss = linear_cross_entropy(*leaves, targets)
    with use_backend("torch" if backend == "reference" else "reference"):
        loss.backward()
    assert all(map(torch.equal, (x.grad for x in leaves), expected[1:]))


def test_the_rule_where_all_scales_are_in(backend):
    """The error rule for a mean that is scaled on: bfloat16 is rounded when made and when scaled."""
    for dtype in DTYPES:
        inputs, targets = make(40, 24, 72, dtype)
        truth = with_grads(lambda *a, t=targets: 0.37 * plain(*a, t), inputs, torch.float64)
        low = with_grads(lambda *a, t=targets: 0.37 * plain(*a, t), inputs, dtype)
        found = scaled_grads(backend, inputs, targets, 0.37)
        for what, a, b, c in zip(RESULTS[1:], found[1:], low[1:], truth[1:], strict=True):
            check(what, a, b, c, dtype)


def test_scaling_multiplies_in_float32():
    gradient, scale = torch.randn(5000, 3, generator=torch.Generator().manual_seed(1)), torch.tensor(1.2345678)
    for dtype in (torch.bfloat16, torch.float16, torch.float32):
        found = chunked_loss.scaled(gradient.to(dtype), 70_000 * scale, dtype)
        assert torch.equal(found, (gradient.to(dtype).float() * (70_000 * scale)).to(dtype))
