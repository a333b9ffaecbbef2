"""`kernels.linear`, and the CPU's product of a few rows."""

import pytest
import torch
import torch.nn.functional as F
from cpu_isa import ISAS
from error_rule import check
from torch import Tensor

from kernels import cpu, linear, native, use_backend

pytestmark = pytest.mark.skipif(native.MISSING is not None, reason=str(native.MISSING))
DTYPES = [torch.float32, torch.bfloat16, torch.float16]


def make(rows: int, width: int, columns: int, dtype: torch.dtype = torch.float32) -> tuple[Tensor, Tensor, Tensor]:
    generator = torch.Generator().manual_seed(rows + width)
    return tuple(torch.randn(*s, generator=generator).to(dtype) for s in ((rows, width), (columns, width), (columns,)))  # type: ignore[return-value]


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("isa", ISAS)
def test_the_product_of_a_few_rows(isa: str, dtype: torch.dtype) -> None:
    kernels = next(found for found in native.ISAS if found.name == isa)
    for rows, width, columns in ((1, 7, 5), (2, 1, 1), (3, 513, 7), (16, 1100, 30), (17, 64, 8)):
        x, weight, _ = make(rows, width, columns, dtype)
        truth = x.double() @ weight.double().T
        check(f"{rows} rows", cpu.product(kernels, x, weight), x @ weight.T, truth, dtype)
        wide = torch.randn(rows, 2 * width).to(dtype)  # rows apart, and columns apart
        for part in (wide[:, :width], wide[:, ::2]):
            check(
                "strided", cpu.product(kernels, part, weight), part @ weight.T, part.double() @ weight.double().T, dtype
            )


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
