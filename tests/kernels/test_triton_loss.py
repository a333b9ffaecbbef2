"""Triton's linear cross-entropy: on a GPU compiled, elsewhere in Triton's interpreter."""

import importlib
import subprocess
import sys

import pytest
import torch
from error_rule import check
from test_loss import DTYPES, make, plain, plain_with_z_loss, with_grads
from torch import Tensor
from triton_mutation import mutate

from kernels import chunked_loss, linear_cross_entropy
from kernels.registry import implementation

GPU = torch.cuda.is_available()
DEVICE = "cuda" if GPU else "cpu"
RESULTS = ("loss", "dhidden", "dweight", "dbias")


@pytest.fixture(autouse=True)
def small_pieces(monkeypatch):
    """Chunks of 7 rows at 1,100 columns, blocks of 256 columns, the weight's gradient 200 columns at a time."""
    use_small_pieces(monkeypatch)


def use_small_pieces(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(chunked_loss, "_CHUNK_LOGITS", dict.fromkeys(("cpu", "cuda"), 7 * 1100))
    monkeypatch.setattr(chunked_loss, "_WEIGHT_COLUMNS", 200)
    monkeypatch.setitem(importlib.import_module("kernels.triton.loss").LOSS_TILE, "BLOCK", 256)


def run(inputs: list[Tensor], targets: Tensor, dtype: torch.dtype, **options: object) -> list[Tensor]:
    """loss and the gradients of hidden, weight and bias by the backend, on the CPU."""
    call = lambda *a: linear_cross_entropy(*a, targets.to(DEVICE), backend="triton", **options)
    return [t.cpu() for t in with_grads(call, [t.to(DEVICE) for t in inputs], dtype)]


def check_run(found: list[Tensor], inputs: list[Tensor], targets: Tensor, dtype: torch.dtype, reduction: str) -> None:
    truth, low = (
        with_grads(lambda *a: plain(*a, targets, reduction=reduction), inputs, k) for k in (torch.float64, dtype)
    )
    assert found[0].dtype == torch.float32 and found[0].shape == ()
    for what, a, b, c in zip(RESULTS, found, low, truth, strict=True):
        check(what, a.to(dtype) if what == "loss" else a, b, c, dtype)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(
    ("rows", "width", "columns", "reduction"),
    [(1, 1, 1, "mean"), (1, 8, 5, "sum"), (13, 16, 33, "mean"), (64, 32, 512, "sum"), (16, 16, 1100, "mean")],
)
def test_loss_and_gradients_obey_the_error_rule(rows, width, columns, reduction, dtype):
    inputs, targets = make(rows, width, columns, dtype)
    if rows > 5:
        targets[3] = targets[-1] = -100
    check_run(run(inputs, targets, dtype, reduction=reduction), inputs, targets, dtype, reduction)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_z_loss_obeys_the_error_rule(dtype):
    inputs, targets = make(13, 16, 33, dtype)
    targets[3] = -100
    truth, low = (with_grads(lambda *a: plain_with_z_loss(*a, targets, 0.1), inputs, k) for k in (torch.float64, dtype))
    for what, a, b, c in zip(RESULTS, run(inputs, targets, dtype, z_loss=0.1), low, truth, strict=True):
        check(what, a.to(dtype) if what == "loss" else a, b, c, dtype)


def test_all_ignored_is_zero_not_nan():
    inputs, targets = make(5, 4, 6, torch.float32)
    found = run(inputs, torch.full_like(targets, -100), torch.float32)
    assert all(float(x.abs().max()) == 0 for x in found)


def test_another_ignore_index_and_leading_dims():
    inputs, targets = make(12, 8, 9, torch.float32)
    targets[::4] = 0
    truth = with_grads(lambda *a: plain(*a, targets, ignore_index=0), inputs, torch.float64)
    found = run([inputs[0].view(3, 4, 8), *inputs[1:]], targets.view(3, 4), torch.float32, ignore_index=0)
    for a, b in zip(found, truth, strict=True):
        torch.testing.assert_close(a.double(), b.view(a.shape), rtol=1e-5, atol=1e-6)
    assert found[1].view(12, 8)[targets == 0].abs().max() == 0


def test_large_logits_do_not_overflow():
    inputs, targets = make(5, 4, 600, torch.float32)
    inputs[0] = 1000 * inputs[0]
    truth = with_grads(lambda *a: plain(*a, targets), inputs, torch.float64)
    for a, b in zip(run(inputs, targets, torch.float32), truth, strict=True):
        torch.testing.assert_close(a.double(), b, rtol=1e-5, atol=1e-4)


@pytest.mark.parametrize("target", [6, -1])
def test_a_target_that_is_no_column_makes_the_loss_nan(target):
    inputs, targets = make(5, 4, 6, torch.float32)
    targets[2] = target
    forward = implementation("linear_cross_entropy", "triton").forward  # the op looks at targets that are on a CPU
    loss, *_ = forward(*(t.to(DEVICE) for t in (*inputs, targets)), -100, 0.0, True)
    assert bool(loss.isnan())


def test_not_contiguous_and_frozen_inputs():
    inputs, targets = make(13, 8, 33, torch.float32)
    expected = run(inputs, targets, torch.float32)
    strided = [inputs[0].T.contiguous().T, inputs[1].T.contiguous().T, inputs[2].repeat_interleave(2)[::2]]
    found = run(strided, targets.repeat_interleave(2)[::2], torch.float32)
    for a, b in zip(found, expected, strict=True):
        torch.testing.assert_close(a, b)
    with torch.no_grad():
        loss = linear_cross_entropy(*(t.to(DEVICE) for t in inputs), targets.to(DEVICE), backend="triton")
    assert not loss.requires_grad and torch.equal(loss.cpu(), expected[0])


def test_bitwise_reproducible():
    inputs, targets = make(15, 16, 1100, torch.bfloat16)
    first = run(inputs, targets, torch.bfloat16)
    for _ in range(50 if GPU else 1):
        assert all(torch.equal(a, b) for a, b in zip(first, run(inputs, targets, torch.bfloat16), strict=True))


@pytest.mark.parametrize(
    ("module", "old", "new"),
    [
        ("loss", "column == target, 1.0", "column == target + 1, 1.0"),
        ("loss", "picked = tl.load(logits + target,", "picked = tl.load(logits + target - 1,"),
        ("loss", "    picked += tl.load(bias_ptr + target, mask=valid, other=0.0).to(tl.float32)\n", ""),
        ("loss", "total * tl.exp2((top - new) * LOG2E) + ", "total + "),
        ("loss", "        top = new\n", "        top = tl.max(x, 0)\n"),
        ("loss", "d = tl.where(ignored, 0.0, d)", "d = d + 0.0"),
        ("loss", "tl.where(ignored, 0.0, tl.log(total)", "tl.where(ignored, 1.0, tl.log(total)"),
        ("loss", "z_loss * lse) / total", "z_loss * lse)"),
        ("loss", "column_sums(logits, bias_sums, add=True)", "column_sums(logits, bias_sums)"),
    ],
)
def test_mutations_fail(module, old, new, monkeypatch, tmp_path):
    # A row's missing bias is a few roundings of the summed loss in 16 bits.
    dtype = torch.float32 if "picked +=" in old else torch.bfloat16
    inputs, targets = make(16, 16, 1100, dtype)
    targets[3] = targets[-1] = -100
    mutate(monkeypatch, tmp_path, module, old, new)
    use_small_pieces(monkeypatch)
    with pytest.raises(AssertionError, match="error"):
        check_run(run(inputs, targets, dtype, reduction="sum"), inputs, targets, dtype, "sum")


@pytest.mark.parametrize(
    ("old", "new"), [("2.0 * z_loss * lse)", "z_loss * lse)"), ("+ z_loss * lse * lse", "+ z_loss * lse")]
)
def test_mutations_of_the_z_loss_fail(old, new, monkeypatch, tmp_path):
    mutate(monkeypatch, tmp_path, "loss", old, new)
    use_small_pieces(monkeypatch)
    with pytest.raises(AssertionError, match="error"):
        test_z_loss_obeys_the_error_rule(torch.bfloat16)


_MEASURE = """
import re, sys, torch
from kernels import chunked_loss, linear_cross_entropy
chunked_loss._CHUNK_LOGITS.update(cpu=8 * 51200, cuda=8 * 51200)
torch.set_num_threads(1)
device = sys.argv[1]
hidden = torch.randn(64, 4, device=device).requires_grad_()
weight = torch.randn(51200, 4, device=device).requires_grad_()
bias = torch.zeros(51200, device=device).requires_grad_()
targets = torch.randint(51200, (64,), device=device)
def peak():  # MiB
    if device == "cuda":
        return torch.cuda.max_memory_allocated() / 2**20
    return int(re.search(r"VmHWM:\\s+(\\d+)", open("/proc/self/status").read())[1]) / 1024
def step(rows):
    linear_cross_entropy(hidden[:rows], weight, bias, targets[:rows], backend="triton").backward()
step(1)
before = peak()
step(64)
chunked = peak()
chunked_loss._CHUNK_LOGITS.update(cpu=64 * 51200, cuda=64 * 51200)
step(64)
print(chunked - before, peak() - before)
"""


def test_logits_never_exist_in_full():
    """64 rows of 51,200 columns, phi-1's vocabulary: 12.5 MiB of float32 logits. A chunk of 8 rows is 1.6 MiB."""
    done = subprocess.run([sys.executable, "-c", _MEASURE, DEVICE], capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    chunked, full = map(float, done.stdout.split())
    assert full > 11, "the measurement sees a chunk that is everything"
    assert chunked < 8, done.stdout


@pytest.mark.parametrize("grads", [True, False])
def test_opcheck(grads):
    inputs, targets = make(5, 4, 6, torch.float32)
    arguments = (*(t.to(DEVICE) for t in inputs), targets.to(DEVICE), -100, 1e-4, grads, "triton")
    torch.library.opcheck(torch.ops.phi1.linear_cross_entropy.default, arguments)


def test_compiles_to_one_graph():
    inputs, targets = make(12, 8, 31, torch.float32)
    inputs, targets = [t.to(DEVICE) for t in inputs], targets.to(DEVICE)
    function = lambda *a: linear_cross_entropy(*a, targets, backend="triton")
    eager = with_grads(function, inputs, torch.float32)
    compiled = with_grads(torch.compile(function, fullgraph=True, backend="aot_eager"), inputs, torch.float32)
    assert all(torch.equal(a, b) for a, b in zip(eager, compiled, strict=True))
