"""`kernels.linear`, and the CPU's product of a few rows."""

from types import SimpleNamespace

import pytest
import torch
import torch.nn.functional as F
from cpu_isa import ISAS
from error_rule import check
from torch import Tensor

from kernels import cpu, linear, machine, native, use_backend

pytestmark = pytest.mark.skipif(native.MISSING is not None, reason=str(native.MISSING))
DTYPES = [torch.float32, torch.bfloat16, torch.float16]


def make(rows: int, width: int, columns: int, dtype: torch.dtype = torch.float32) -> tuple[Tensor, Tensor, Tensor]:
    generator = torch.Generator().manual_seed(rows + width)
    return tuple(torch.randn(*s, generator=generator).to(dtype) for s in ((rows, width), (columns, width), (columns,)))  # type: ignore[return-value]


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("isa", ISAS)
def test_the_product_of_a_few_rows(isa: str, dtype: torch.dtype) -> None:
    kernels = next(found for found in native.ISAS if found.name == isa)
    generator = torch.Generator().manual_seed(0)
    for rows, width, columns in (
        (1, 7, 5),
        (2, 1, 1),
        (2, 0, 3),
        (3, 513, 7),
        (5, 1100, 16),
        (9, 48, 31),
        (16, 1101, 30),
    ):
        x, weight, _ = make(rows, width, columns, dtype)
        # Rows with something between them, as one of a wider matrix has.
        apart = torch.randn(rows + columns, 2 * width + 1, generator=generator).to(dtype)[:, :width]
        for left, right in ((x, weight), (apart[:rows], apart[rows:])):
            truth = left.double() @ right.double().T
            result = cpu.product_of_few(kernels, left, right)
            check(f"{rows} x {width} x {columns}", result, left @ right.T, truth, dtype)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("isa", ISAS)
def test_what_is_computed_of_a_row_is_its_own(isa: str, dtype: torch.dtype) -> None:
    """Neither other rows nor columns nor threads matter, nor what lies beside a matrix, whatever that is."""
    kernels = next(found for found in native.ISAS if found.name == isa)
    x, weight, _ = make(16, 1100, 37, dtype)
    whole = cpu.product_of_few(kernels, x, weight)
    for rows in (5, 8, 13):
        assert torch.equal(cpu.product_of_few(kernels, x[:rows], weight), whole[:rows])
    threads = torch.get_num_threads()
    try:
        torch.set_num_threads(3)
        assert torch.equal(cpu.product_of_few(kernels, x, weight), whole)
    finally:
        torch.set_num_threads(threads)
    beside = torch.full((40, 1200), torch.nan, dtype=dtype)
    beside[:37, :1100] = weight
    rows = torch.full((18, 1200), torch.inf, dtype=dtype)
    rows[:16, :1100] = x
    assert torch.equal(cpu.product_of_few(kernels, rows[:16, :1100], beside[:37, :1100]), whole)
    x[3, 7], weight[20, 9] = torch.inf, torch.nan
    spoilt = cpu.product_of_few(kernels, x, weight)
    kept = torch.ones_like(spoilt, dtype=torch.bool)
    kept[3], kept[:, 20] = False, False
    assert torch.equal(spoilt[kept], whole[kept]) and not spoilt[~kept].isfinite().any()


@pytest.mark.parametrize(
    ("kind", "isa", "dtype", "expected"),
    [
        ("AuthenticAMD family 25, avx2", "avx2", torch.float32, [2, 4, 16]),
        ("AuthenticAMD family 25, avx2", "avx2", torch.float16, [2, 4, 16]),
        ("AuthenticAMD family 25, avx2", "portable", torch.float32, []),
        ("AuthenticAMD family 25, avx512_bf16", "avx512", torch.float32, []),
        ("GenuineIntel family 6, amx_bf16", "avx512", torch.float32, [4, 16]),
        ("GenuineIntel family 6, amx_bf16", "amx_bf16", torch.bfloat16, [1, 2, 4, 16]),
        ("GenuineIntel family 6, amx_bf16", "amx_bf16", torch.float16, []),
        ("GenuineIntel family 6, avx512", "avx512", torch.float32, []),
    ],
)
def test_the_product_is_ours_only_where_it_was_measured(
    kind: str, isa: str, dtype: torch.dtype, expected: list[int], monkeypatch: pytest.MonkeyPatch
) -> None:
    ours: list[int] = []
    monkeypatch.setattr(cpu, "product_of_few", lambda isa, x, weight: ours.append(x.shape[0]) or x @ weight.T)
    monkeypatch.setattr(machine, "cpu", lambda: machine.Machine("cpu", kind, "a CPU"))
    for rows in (1, 2, 4, 16, 17):
        x, weight, _ = make(rows, 512, 2048, dtype)
        torch.testing.assert_close(cpu.product(SimpleNamespace(name=isa), x, weight), x @ weight.T)
        x = x.T.contiguous().T
        assert torch.equal(cpu.product(SimpleNamespace(name=isa), x, weight), F.linear(x, weight))
    assert sorted(set(ours)) == expected
    ours.clear()
    small, weight, _ = make(16, 256, 512, dtype)
    cpu.product(SimpleNamespace(name=isa), small, weight)
    assert bool(ours) == (bool(expected) and "avx512" not in isa)


def taken(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """Fills with the rows of each call of the CPU's product from now on."""
    rows: list[int] = []
    product = cpu.product

    def watched(isa: object, x: Tensor, weight: Tensor) -> Tensor:
        rows.append(x.shape[0])
        return product(isa, x, weight)

    monkeypatch.setattr(cpu, "product", watched)
    return rows


def test_linear_is_pytorchs_and_ours_where_it_may(monkeypatch: pytest.MonkeyPatch) -> None:
    rows = taken(monkeypatch)
    x, weight, bias = make(6, 64, 40)
    expected = F.linear(x, weight, bias)
    torch.testing.assert_close(linear(x.view(2, 3, 64), weight, bias), expected.view(2, 3, 40))
    assert rows == [6]
    with use_backend("torch"):
        assert torch.equal(linear(x, weight, bias), expected)
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(linear(x, weight, bias), F.linear(x, weight, bias))
    assert torch.equal(
        linear(x.double(), weight.double(), bias.double()), F.linear(x.double(), weight.double(), bias.double())
    )
    assert torch.equal(torch.compile(linear, backend="eager", fullgraph=True)(x, weight, bias), expected)
    weight.requires_grad_()
    linear(x, weight, bias).sum().backward()
    torch.testing.assert_close(weight.grad, x.sum(0).expand(40, 64))
    assert rows == [6], "none of these is ours"
