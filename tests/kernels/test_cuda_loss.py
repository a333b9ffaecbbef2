"""csrc/cuda/cross_entropy.cuh under the emulator and, where there is one, on the GPU."""

import contextlib
from collections.abc import Iterator
from types import ModuleType

import pytest
import torch
import torch.nn.functional as F
from error_rule import check
from test_loss import make, plain, plain_with_z_loss, with_grads
from torch import Tensor

from kernels import BackendError, chunked_loss, linear_cross_entropy, native
from kernels.registry import implementation

DTYPES = (torch.float32, torch.bfloat16, torch.float16)
RESULTS = ("loss", "dhidden", "dweight", "dbias")
# (rows, width, columns). 4,112 columns are more than a block of pass 1 takes in one turn, 1,032 more than one of pass
# 2.
SHAPES = [(1, 1, 8), (2, 8, 40), (13, 16, 72), (40, 24, 512), (9, 17, 1032), (3, 8, 4112)]


@contextlib.contextmanager
def chunk_of(logits: int) -> Iterator[None]:
    """Within the block at most so many logits exist at a time."""
    before, chunked_loss._CHUNK_LOGITS = chunked_loss._CHUNK_LOGITS, dict.fromkeys(("cpu", "cuda"), logits)
    try:
        yield
    finally:
        chunked_loss._CHUNK_LOGITS = before


def run(inputs: list[Tensor], targets: Tensor, **options: object) -> list[Tensor]:
    """Loss and the gradients of hidden, weight and bias."""
    loss = lambda *t: linear_cross_entropy(*t, targets, backend="cuda", **options)
    return with_grads(loss, inputs, inputs[0].dtype)


def check_loss(
    shape: tuple[int, int, int], dtype: torch.dtype, device: str = "cpu", chunk_rows: int = 7, z_loss: float = 0.0
) -> None:
    """The error rule, in chunks of so many rows at most: 13 rows end in a part of a chunk, 40 in 5 rows."""
    rows, _, columns = shape
    inputs, targets = make(*shape, dtype)
    if rows > 5:
        targets[3] = targets[-1] = -100
    truth = with_grads(lambda *t: plain_with_z_loss(*t, targets, z_loss), inputs, torch.float64)
    low = with_grads(lambda *t: plain_with_z_loss(*t, targets, z_loss), inputs, dtype)
    with chunk_of(chunk_rows * columns + 5):
        found = run([t.to(device) for t in inputs], targets.to(device), z_loss=z_loss)
    assert found[0].dtype == torch.float32 and found[0].shape == ()
    for what, x, y, z in zip(RESULTS, (t.cpu() for t in found), low, truth, strict=True):
        check(what, x.to(dtype) if what == "loss" else x, y, z, dtype)


def check_extremes(dtype: torch.dtype, device: str = "cpu") -> None:
    """Logits about 1,000 and -1,000, columns of -inf: as exact as float32, since the product is exact here.

    A target's logit is 4 below the greatest: log2(e) times 1,000, rounded, would be wrong by 6e-5 of the exponential.
    The columns of a thread's second turn in pass 1 are greater than those of its first by 8, or by all.
    """
    columns, target = 4160, 4102
    logits = torch.arange(columns) * 5 % 8 / 4 * torch.tensor([[16.0], [16.0], [1.0]])
    logits += torch.tensor([[972], [-1000], [0]]) + 8 * (torch.arange(columns) >= 4096)
    kept = (torch.arange(columns) < 8) | (torch.arange(columns) >= 32)
    bias = torch.where(kept, 0.0, -torch.inf)
    inputs, targets = [torch.eye(3), logits.T.contiguous(), bias], torch.full((3,), target)
    assert all(torch.equal(x.to(dtype).float(), x) for x in inputs)
    truth = with_grads(lambda *x: plain(*x, targets, reduction="sum"), inputs, torch.float64)
    found = run([x.to(dtype).to(device) for x in inputs], targets.to(device), reduction="sum")
    assert abs(float(found[0]) - float(truth[0])) <= 1e-6 * float(truth[0]), (float(found[0]), float(truth[0]))
    for what, x, z in zip(RESULTS[2:], found[2:], truth[2:], strict=True):
        # Each gradient is one number of the softmax, or a sum of three: rounded in the chunk, and again.
        assert ((x.cpu().double() - z).abs() <= 4 * torch.finfo(dtype).eps * z.abs() + 1e-6).all(), what
        assert not x.cpu()[~kept].any()


def check_parts(module: ModuleType) -> None:
    """Each part of the rows adds its sums to its own row of `partial`: blocks on a GPU run at the same time. An ignored
    row adds nothing, and its logits become zeros.
    """
    generator = torch.Generator().manual_seed(7)
    logits, bias = torch.randn(13, 40, generator=generator), torch.randn(40, generator=generator)
    targets = torch.randint(40, (13,), generator=generator)
    targets[2] = -100
    loss, stats, partial = torch.empty(13), torch.empty(13, 2), torch.ones(3, 40)
    d, bias = logits.to(torch.bfloat16), bias.to(torch.bfloat16)
    expected = (d.double() + bias).softmax(-1) - F.one_hot(targets.clamp(min=0), 40)
    expected[2] = 0.0
    tensors = (d, bias, targets, loss, partial, stats)
    module.cross_entropy_cuda(*tensors, 3, (13, 40, -100), 0.0, native.DTYPE_CODES[d.dtype], 0)
    sums = torch.stack([x.sum(0) for x in expected.split(5)])
    torch.testing.assert_close(partial.double(), 1 + sums, rtol=1e-6, atol=1e-6)
    assert not d[2].any(), "an ignored row's gradient is zero, whatever its logits"


def check_wrong_targets(device: str = "cpu") -> None:
    """A target that is no column makes its row's loss and gradient NaN, and no other row's."""
    for wrong in (-1, 40, 2**32 + 3):
        inputs, targets = make(4, 8, 40, torch.bfloat16)
        targets[2] = wrong
        with torch.no_grad():
            # Not by the op, which looks at targets that are on a CPU.
            forward = implementation("linear_cross_entropy", "cuda").forward
            loss, grad, *_ = forward(*(t.to(device) for t in (*inputs, targets)), -100, 0.0, True)
        assert loss.isnan(), wrong
        assert grad.isnan().any(1).tolist() == [False, False, True, False], wrong


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_loss_keeps_the_error_rule(cuda_device, shape, dtype):
    check_loss(shape, dtype, cuda_device)


def test_loss_in_several_parts_of_the_rows(cuda_device):
    """Chunks of 33 rows, in three parts for the bias's gradient, and one of 7 rows, fewer than would fill them."""
    check_loss((40, 8, 1032), torch.bfloat16, cuda_device, chunk_rows=33)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_large_logits_and_columns_of_minus_infinity(cuda_device, dtype):
    check_extremes(dtype, cuda_device)


def test_each_part_of_the_rows_has_its_own_sums(emulator):
    check_parts(emulator)


def test_a_target_that_is_no_column_is_nan(cuda_device):
    check_wrong_targets(cuda_device)


@pytest.mark.parametrize("position", ["hidden", "bias"])
def test_nan_stays_nan(cuda_device, position):
    inputs, targets = (make(3, 8, 40, torch.bfloat16)[0], torch.tensor([1, 2, 3], device=cuda_device))
    {"hidden": inputs[0][1], "bias": inputs[2]}[position][5] = torch.nan
    assert run([t.to(cuda_device) for t in inputs], targets)[0].isnan()


@pytest.mark.parametrize("chunk_rows", [1, 4, 6, 12, 13])
def test_chunks_make_no_difference(cuda_device, chunk_rows):
    inputs, targets = make(12, 8, 40, torch.float32)
    targets[5] = -100
    inputs, targets = [t.to(cuda_device) for t in inputs], targets.to(cuda_device)
    whole = run(inputs, targets)
    with chunk_of(chunk_rows * 40 + 39):
        parts = run(inputs, targets)
    for a, b in zip(whole, parts, strict=True):
        torch.testing.assert_close(a, b, rtol=2e-6, atol=1e-7)


def test_all_ignored_is_zero_not_nan(cuda_device):
    """Whatever the logits are; also when a column is the index that is ignored."""
    inputs, targets = make(5, 8, 16, torch.bfloat16)
    inputs[0][2] = torch.nan
    for index in (-100, 3):
        targets = torch.full((5,), index, device=cuda_device)
        loss, grad_hidden, _, grad_bias = run([t.to(cuda_device) for t in inputs], targets, ignore_index=index)
        assert float(loss) == 0 and not grad_bias.any() and not grad_hidden.any()


def test_no_rows(cuda_device):
    inputs, targets = make(0, 8, 16, torch.bfloat16)
    found = run([t.to(cuda_device) for t in inputs], targets.to(cuda_device))
    assert all(not x.any() for x in found) and found[2].shape == (16, 8)


def test_without_gradients_one_launch_a_chunk(emulator):
    inputs, targets = make(12, 8, 40, torch.bfloat16)
    expected = run(inputs, targets)[0]
    emulator.reset_counters()
    with torch.no_grad(), chunk_of(5 * 40):
        loss = linear_cross_entropy(*inputs, targets, backend="cuda")
    assert not loss.requires_grad and emulator.counters()["launches"] == 3
    torch.testing.assert_close(loss, expected, rtol=1e-6, atol=0)


def test_bits_do_not_depend_on_the_order_of_threads(emulator):
    inputs, targets = make(37, 8, 1040, torch.bfloat16)
    first = run(inputs, targets)
    for seed in range(1, 4):
        emulator.set_seed(seed)
        assert all(torch.equal(x, y) for x, y in zip(first, run(inputs, targets), strict=True))


def test_runs_repeat(cuda_device):
    inputs, targets = make(37, 64, 1040, torch.bfloat16)
    inputs, targets = [t.to(cuda_device) for t in inputs], targets.to(cuda_device)
    with chunk_of(16 * 1040):
        first = run(inputs, targets)
        assert all(torch.equal(x, y) for x, y in zip(first, run(inputs, targets), strict=True))


def test_memory_requests_are_dense(emulator):
    """Whole sectors, but where a lane's 8 numbers are float32, two requests of half a sector each: the sums."""
    rows, columns = 40, 1024
    inputs, targets = make(rows, 8, columns, torch.bfloat16)
    run(inputs, targets)
    counters, parts = emulator.counters(), -(-rows // 16)
    assert counters["global_sectors"] - counters["global_sectors_least"] == 2 * parts * columns * 4 // 32
    assert counters["shared_wavefronts"] == counters["shared_wavefronts_least"] > 0, "bank conflicts"
    # Pass 1 reads logits and bias of each row; pass 2 reads and writes the logits, reads the bias once a part; the sums
    # are read and written.
    row = columns * 2 // 32
    large = (2 * rows + 2 * rows + parts) * row + 2 * parts * 2 * row
    # Of a row: its target in 16 warps, the target's logit and bias, loss and stats; target and stats in 4 warps.
    assert counters["global_sectors_least"] == large + rows * (16 + 4 + 2 * 4)


def test_tensors_that_are_not_dense_give_the_same_bits(emulator):
    """hidden a slice, weight a transpose, bias off by 2 bytes, every other target."""
    inputs, targets = make(6, 16, 40, torch.bfloat16)
    wide = torch.zeros(6, 20, dtype=torch.bfloat16)
    wide[:, 3:19] = inputs[0]
    odd = torch.cat([inputs[2][:1], inputs[2]])[1:]
    doubled = targets.repeat_interleave(2)[::2]
    found = torch.ops.phi1.linear_cross_entropy(
        wide[:, 3:19], inputs[1].T.contiguous().T, odd, doubled, -100, 0.0, True, "cuda"
    )
    expected = torch.ops.phi1.linear_cross_entropy(*inputs, targets, -100, 0.0, True, "cuda")
    for x, y in zip(found, expected, strict=True):
        assert x.is_contiguous()
        # The product may round otherwise for another layout.
        torch.testing.assert_close(x, y, rtol=2**-7, atol=2**-9)


@pytest.mark.parametrize(
    ("columns", "dtype", "message"),
    [
        (
            5,
            torch.bfloat16,
            r"columns = weight.shape\[0\] = 5: the kernels take a multiple of 8; pad weight with rows of",
        ),
        (8, torch.float64, "dtype = torch.float64: native kernels take float32, bfloat16 and float16"),
    ],
)
def test_what_the_kernels_are_not_made_for_is_refused(emulator, columns, dtype, message):
    inputs, targets = make(3, 8, columns, dtype)
    with pytest.raises(BackendError, match=message):
        linear_cross_entropy(*inputs, targets, backend="cuda")
    assert emulator.counters()["launches"] == 0


def test_the_remedy_for_columns_is_exact(emulator):
    """5 columns, padded to 8 as the refusal says."""
    inputs, targets = make(7, 8, 5, torch.float32)
    expected = with_grads(lambda *t: plain(*t, targets), inputs, torch.float64)
    padded = [
        inputs[0],
        torch.cat([inputs[1], torch.zeros(3, 8)]),
        torch.cat([inputs[2], torch.full((3,), -torch.inf)]),
    ]
    found = run(padded, targets)
    for x, y in zip((*found[:2], found[2][:5], found[3][:5]), expected, strict=True):
        torch.testing.assert_close(x.double(), y, rtol=1e-5, atol=1e-6)
    assert not found[2][5:].any() and not found[3][5:].any()


@pytest.mark.parametrize("grads", [True, False])
def test_opcheck(emulator, grads):
    inputs, targets = make(5, 4, 16, torch.bfloat16)
    torch.library.opcheck(torch.ops.phi1.linear_cross_entropy.default, (*inputs, targets, -100, 1e-4, grads, "cuda"))


def test_compiles_to_one_graph(emulator):
    inputs, targets = make(12, 8, 40, torch.bfloat16)
    function = lambda *t: linear_cross_entropy(*t, targets, backend="cuda")
    eager = with_grads(function, inputs, torch.bfloat16)
    compiled = with_grads(torch.compile(function, fullgraph=True, backend="aot_eager"), inputs, torch.bfloat16)
    assert all(torch.equal(x, y) for x, y in zip(eager, compiled, strict=True))
