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
    for rows, width, columns in ((1, 7, 5), (2, 1, 1), (3, 513, 7), (16, 1100, 30)):
        x, weight, _ = make(rows, width, columns, dtype)
        apart = torch.randn(rows, 2 * width).to(dtype)[:, :width]
        for left in (x, apart):
            truth = left.double() @ weight.double().T
            check(f"{rows} rows", cpu.product_of_few(kernels, left, weight), left @ weight.T, truth, dtype)


def test_the_product_is_ours_only_where_it_was_measured(monkeypatch: pytest.MonkeyPatch) -> None:
    ours: list[int] = []
    monkeypatch.setattr(cpu, "product_of_few", lambda isa, x, weight: ours.append(x.shape[0]) or x @ weight.T)
    isa = {name: SimpleNamespace(name=name) for name in ("avx2", "avx512", "portable")}
    (measured,) = cpu.PRODUCT_KINDS
    for kind, name, expected in (
        (measured, "avx2", [2, 16]),
        (measured, "portable", []),
        ("GenuineIntel family 6, amx_bf16", "avx2", []),
        ("AuthenticAMD family 25, avx512_bf16", "avx512", []),
    ):
        monkeypatch.setattr(machine, "cpu", lambda kind=kind: machine.Machine("cpu", kind, "a CPU"))
        ours.clear()
        for rows in (1, 2, 16, 17):
            x, weight, _ = make(rows, 7, 5)
            torch.testing.assert_close(cpu.product(isa[name], x, weight), x @ weight.T)
            assert torch.equal(cpu.product(isa[name], x.T.contiguous().T, weight), F.linear(x.T.contiguous().T, weight))
        assert ours == expected, (kind, name)


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
