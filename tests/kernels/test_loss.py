"""linear_cross_entropy against PyTorch's cross_entropy of the full logits in float64."""

import os
import subprocess
import sys

import pytest
import torch
import torch.nn.functional as F
from cpu_isa import CPU_BACKENDS, ISAS, use_threads
from error_rule import check
from torch import Tensor

from kernels import chunked_loss, linear_cross_entropy, native, reference

DTYPES = [torch.float32, torch.bfloat16, torch.float16]
FLOAT64_BACKENDS = ["reference", "torch"]
BACKENDS = [*FLOAT64_BACKENDS, *CPU_BACKENDS]


@pytest.fixture(params=BACKENDS)
def name(request):
    """A backend's name, with the CPU backend's instruction set in use."""
    yield request.param


def set_chunk(monkeypatch: pytest.MonkeyPatch, logits: int) -> None:
    monkeypatch.setattr(chunked_loss, "_CHUNK_LOGITS", dict.fromkeys(("cpu", "cuda"), logits))


def make(rows: int, width: int, columns: int, dtype: torch.dtype) -> tuple[list[Tensor], Tensor]:
    """[hidden, weight, bias] and targets; logits have a deviation of about 1."""
    generator = torch.Generator().manual_seed(5)
    hidden = torch.randn(rows, width, generator=generator)
    weight, bias = (
        torch.randn(columns, width, generator=generator) / width**0.5,
        torch.randn(columns, generator=generator),
    )
    targets = torch.randint(columns, (rows,), generator=generator)
    return [t.to(dtype) for t in (hidden, weight, bias)], targets


def plain(hidden: Tensor, weight: Tensor, bias: Tensor, targets: Tensor, **options: object) -> Tensor:
    return F.cross_entropy(hidden @ weight.T + bias, targets, **options)


def with_grads(function, inputs: list[Tensor], dtype: torch.dtype) -> list[Tensor]:
    leaves = [t.to(dtype).clone().requires_grad_() for t in inputs]
    loss = function(*leaves)
    return [loss.detach(), *torch.autograd.grad(loss, leaves)]


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("reduction", ["mean", "sum"])
@pytest.mark.parametrize(
    ("rows", "width", "columns"), [(1, 1, 1), (1, 8, 5), (13, 16, 33), (64, 32, 512), (9, 16, 1100)]
)
def test_loss_and_gradients_obey_the_error_rule(name, rows, width, columns, reduction, dtype, monkeypatch):
    # Chunks of 7 rows at most: 13 rows end in a part of a chunk, 64 in one row.
    set_chunk(monkeypatch, 7 * columns)
    monkeypatch.setattr(chunked_loss, "_WEIGHT_COLUMNS", 200)  # 512 columns end in a part of a run
    inputs, targets = make(rows, width, columns, dtype)
    if rows > 5:
        targets[3] = targets[-1] = -100
    truth = with_grads(lambda *a: plain(*a, targets, reduction=reduction), inputs, torch.float64)
    low = with_grads(lambda *a: plain(*a, targets, reduction=reduction), inputs, dtype)
    found = with_grads(lambda *a: linear_cross_entropy(*a, targets, reduction=reduction, backend=name), inputs, dtype)
    assert found[0].dtype == torch.float32 and found[0].shape == ()
    for what, a, b, c in zip(("loss", "dhidden", "dweight", "dbias"), found, low, truth, strict=True):
        check(what, a.to(dtype) if what == "loss" else a, b, c, dtype)


def plain_with_z_loss(hidden: Tensor, weight: Tensor, bias: Tensor, targets: Tensor, z_loss: float) -> Tensor:
    logits = hidden @ weight.T + bias
    lse = torch.logsumexp(logits, -1)
    return F.cross_entropy(logits, targets) + z_loss * lse[targets != -100].square().mean()


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_z_loss_obeys_the_error_rule(name, dtype, monkeypatch):
    set_chunk(monkeypatch, 7 * 33)
    inputs, targets = make(13, 16, 33, dtype)
    targets[3] = -100
    truth = with_grads(lambda *a: plain_with_z_loss(*a, targets, 0.1), inputs, torch.float64)
    low = with_grads(lambda *a: plain_with_z_loss(*a, targets, 0.1), inputs, dtype)
    found = with_grads(lambda *a: linear_cross_entropy(*a, targets, z_loss=0.1, backend=name), inputs, dtype)
    wrong = with_grads(lambda *a: plain_with_z_loss(*a, targets, 0.05), inputs, torch.float64)
    for what, a, b, c, d in zip(("loss", "dhidden", "dweight", "dbias"), found, low, truth, wrong, strict=True):
        check(what, a.to(dtype) if what == "loss" else a, b, c, dtype)
        with pytest.raises(AssertionError):  # half of it would be seen
            check(what, d.to(dtype), b, c, dtype)


@pytest.mark.parametrize("chunk_rows", [1, 4, 6, 12, 13])
def test_chunks_make_no_difference(chunk_rows, monkeypatch):
    inputs, targets = make(12, 8, 31, torch.float64)
    targets[5] = -100
    whole = with_grads(lambda *a: linear_cross_entropy(*a, targets, backend="torch"), inputs, torch.float64)
    set_chunk(monkeypatch, chunk_rows * 31 + 30)
    parts = with_grads(lambda *a: linear_cross_entropy(*a, targets, backend="torch"), inputs, torch.float64)
    for a, b in zip(whole, parts, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-13, atol=1e-15)


@pytest.mark.parametrize("name", FLOAT64_BACKENDS)
def test_leading_dims_and_another_ignore_index(name):
    inputs, targets = make(12, 8, 9, torch.float64)
    targets[::4] = 0
    shaped = [inputs[0].view(3, 4, 8), *inputs[1:]]
    loss, grad, *_ = with_grads(
        lambda *a: linear_cross_entropy(*a, targets.view(3, 4), ignore_index=0, backend=name), shaped, torch.float64
    )
    truth, expected, *_ = with_grads(lambda *a: plain(*a, targets, ignore_index=0), inputs, torch.float64)
    torch.testing.assert_close(loss, truth)
    torch.testing.assert_close(grad, expected.view(3, 4, 8))
    assert grad.view(12, 8)[targets == 0].abs().max() == 0


def test_all_ignored_is_zero_not_nan(name):
    inputs, targets = make(5, 4, 6, torch.float32)
    found = with_grads(
        lambda *a: linear_cross_entropy(*a, torch.full_like(targets, -100), backend=name), inputs, torch.float32
    )
    assert all(float(x.abs().max()) == 0 for x in found)


def test_no_rows(name):
    found = with_grads(
        lambda *a: linear_cross_entropy(*a, torch.zeros(0).long(), backend=name),
        make(0, 4, 6, torch.bfloat16)[0],
        torch.bfloat16,
    )
    assert all(not x.any() for x in found) and found[2].shape == (6, 4)


def test_large_logits_do_not_overflow(name):
    inputs, targets = make(5, 4, 6, torch.float32)
    inputs[0] = 1000 * inputs[0]
    truth = with_grads(lambda *a: plain(*a, targets), inputs, torch.float64)
    found = with_grads(lambda *a: linear_cross_entropy(*a, targets, backend=name), inputs, torch.float32)
    for a, b in zip(found, truth, strict=True):
        torch.testing.assert_close(a.double(), b, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("name", FLOAT64_BACKENDS)
def test_gradcheck(name, monkeypatch):
    set_chunk(monkeypatch, 14)  # 2 rows
    inputs, targets = make(5, 3, 7, torch.float64)
    targets[2] = -100
    leaves = [t.requires_grad_() for t in inputs]
    assert torch.autograd.gradcheck(lambda *a: linear_cross_entropy(*a, targets, z_loss=0.3, backend=name), leaves)


def test_gradients_scale_and_only_where_asked():
    inputs, targets = make(5, 4, 6, torch.float32)
    single = with_grads(lambda *a: linear_cross_entropy(*a, targets, backend="torch"), inputs, torch.float32)
    tripled = with_grads(lambda *a: 3 * linear_cross_entropy(*a, targets, backend="torch"), inputs, torch.float32)
    for a, b in zip(single, tripled, strict=True):
        torch.testing.assert_close(3 * a, b)
    frozen = inputs[1].clone().requires_grad_(False)
    hidden = inputs[0].clone().requires_grad_()
    loss = linear_cross_entropy(hidden, frozen, inputs[2], targets, backend="torch")
    torch.testing.assert_close(torch.autograd.grad(loss, hidden)[0], single[1])
    with torch.no_grad():
        assert not linear_cross_entropy(hidden, frozen, inputs[2], targets, backend="torch").requires_grad


_MEASURE = """
import pathlib, re, sys, torch
from kernels import linear_cross_entropy
torch.set_num_threads(2)
name, rows, width, dtype = sys.argv[1], int(sys.argv[2]), int(sys.argv[3]), getattr(torch, sys.argv[4])
def make(rows, columns):
    return [torch.randn(*shape).to(dtype).requires_grad_() for shape in ((rows, width), (columns, width), (columns,))]
def step(inputs):
    linear_cross_entropy(*inputs, torch.zeros(len(inputs[0])).long(), backend=name).backward()
def peak():  # MiB; unlike ru_maxrss, not inherited from the process that forked this one
    return int(re.search(r"VmHWM:\\s+(\\d+)", open("/proc/self/status").read())[1]) / 1024
step(make(8, 64))
inputs = make(rows, 51200)
pathlib.Path("/proc/self/clear_refs").write_text("5")  # the peak is from here on
before = peak()
step(inputs)
print(peak() - before - sum(x.grad.nbytes for x in inputs) / 2**20)
"""


def _beyond_gradients(name: str, rows: int, width: int, dtype: str) -> float:
    """MiB that the process gains in forward and backward pass, less the gradients: workspace, and the gradients'
    copies.
    """
    command = [sys.executable, "-c", _MEASURE, name, str(rows), str(width), dtype]
    # Every tensor is mapped and unmapped by itself: glibc's heap would keep up to 35 MiB of what the call gave back.
    environment = {**os.environ, "MALLOC_MMAP_THRESHOLD_": "131072"}
    done = subprocess.run(command, capture_output=True, text=True, timeout=120, env=environment)
    assert done.returncode == 0, done.stderr
    return float(done.stdout)


def test_logits_never_exist_in_full():
    """1,024 rows of 51,200 columns, phi-1's vocabulary: 200 MiB of float32 logits."""
    assert _beyond_gradients("reference", 1024, 16, "float32") > 400  # logits and gradient: the measurement sees them
    assert _beyond_gradients("torch", 1024, 16, "float32") < 100  # a chunk's logits are 50 MiB


@pytest.mark.skipif(
    "avx512_bf16" not in ISAS, reason="needs a CPU with AVX-512 BF16: without, oneDNN copies the weight for a product"
)
@pytest.mark.parametrize("width", [16, 512])
def test_peak_memory_on_the_cpu(width):
    """4,096 rows of 51,200 columns in bfloat16, 400 MiB of logits: under 100 MB beside the gradients.

    At width 512 a chunk's logits are 25 MiB, the lower halves of the sums for the weight's gradient 50, and a run of
    them and the copy that oneDNN makes of its logits 6.
    """
    assert _beyond_gradients("cpu", 4096, width, "bfloat16") < {16: 45, 512: 1e8 / 2**20}[width]


@pytest.mark.parametrize("grads", [True, False])
@pytest.mark.parametrize("name", ["torch", *["cpu"] * bool(CPU_BACKENDS)])
def test_opcheck(name, grads):
    inputs, targets = make(5, 4, 6, torch.float32)
    torch.library.opcheck(torch.ops.phi1.linear_cross_entropy.default, (*inputs, targets, -100, 1e-4, grads, name))


@pytest.mark.parametrize("name", CPU_BACKENDS)
def test_bitwise_equal_for_any_thread_count(name):
    inputs, targets = make(37, 16, 5000, torch.bfloat16)
    targets[4] = -100
    arguments = (*inputs, targets, -100, 1e-4, True)
    results = []
    for threads in (1, 2, 3, 8):
        with use_threads(threads):
            results.append(torch.ops.phi1.linear_cross_entropy(*arguments, name))
    for other in results[1:]:
        assert all(torch.equal(a, b) for a, b in zip(results[0], other, strict=True))


@pytest.mark.skipif(native.MISSING is not None, reason=str(native.MISSING))
def test_a_target_outside_the_columns_is_an_error_on_the_cpu():
    inputs, targets = make(5, 4, 6, torch.float32)
    targets[2] = 6
    with pytest.raises(IndexError, match=r"targets in \[\d, 6\]: must be in \[0, 6\) or ignore_index = -100"):
        linear_cross_entropy(*inputs, targets, backend="cpu")


def test_compiles_to_one_graph(name):
    inputs, targets = make(12, 8, 31, torch.float32)
    function = lambda *a: linear_cross_entropy(*a, targets, backend=name)
    eager = with_grads(function, inputs, torch.float32)
    compiled = with_grads(torch.compile(function, fullgraph=True, backend="aot_eager"), inputs, torch.float32)
    for a, b in zip(eager, compiled, strict=True):
        torch.testing.assert_close(a, b)


def test_the_tolerance_bites():
    """In bfloat16, the widest bound: targets off by one, no bias, ignored rows counted."""
    inputs, targets = make(64, 32, 512, torch.bfloat16)
    targets[3] = -100
    truth = with_grads(lambda *a: plain(*a, targets), inputs, torch.float64)
    low = with_grads(lambda *a: plain(*a, targets), inputs, torch.bfloat16)
    shifted = torch.where(targets == -100, targets, (targets + 1) % 512)
    wrong = {
        "shifted": with_grads(lambda *a: plain(*a, shifted), inputs, torch.float64),
        "no bias": with_grads(lambda h, w, b: plain(h, w, 0 * b, targets), inputs, torch.float64),
        "ignored counted": [x * 63 / 64 for x in truth],
    }
    for mutation, results in wrong.items():
        with pytest.raises(AssertionError):
            for what, a, b, c in zip(("loss", "dhidden", "dweight", "dbias"), results, low, truth, strict=True):
                check(f"{mutation}: {what}", a.to(torch.bfloat16), b, c, torch.bfloat16)


_H, _W, _B, _T = torch.zeros(3, 4), torch.zeros(5, 4), torch.zeros(5), torch.zeros(3).long()


@pytest.mark.parametrize(
    ("hidden", "weight", "bias", "targets", "reduction", "message"),
    [
        (_H.int(), _W, _B, _T, "mean", "hidden.dtype = torch.int32"),
        (_H, _W[:, :3], _B, _T, "mean", r"weight.shape = \(5, 3\): must be \(columns, 4\)"),
        (_H, _W, _B[:4], _T, "mean", r"bias.shape = \(4,\): must be \(5,\)"),
        (_H, _W.half(), _B, _T, "mean", "weight.dtype = torch.float16, hidden.dtype = torch.float32"),
        (_H, _W, _B, _T.int(), "mean", "targets.dtype = torch.int32: must be int64"),
        (_H, _W, _B, _T[:2], "mean", r"targets.shape = \(2,\): must be \(3,\)"),
        (_H, _W, _B, _T, "none", "reduction = 'none': must be 'mean' or 'sum'"),
    ],
)
def test_bad_input(hidden, weight, bias, targets, reduction, message):
    with pytest.raises(ValueError, match=message):
        linear_cross_entropy(hidden, weight, bias, targets, reduction=reduction)


def test_a_negative_z_loss_is_an_error():
    with pytest.raises(ValueError, match=r"z_loss = -0.1: must be at least 0"):
        linear_cross_entropy(_H, _W, _B, _T, z_loss=-0.1)


def test_reference_is_the_definition():
    inputs, targets = make(4, 3, 5, torch.float64)
    logits = inputs[0] @ inputs[1].T + inputs[2]
    expected = sum(float(torch.log(torch.exp(row).sum()) - row[t]) for row, t in zip(logits, targets, strict=True))
    assert float(reference.linear_cross_entropy(*inputs, targets, -100, 0.0)) == pytest.approx(expected, rel=1e-12)
