"""`kernels.linear`, and the CPU's product of a few rows."""

import dataclasses
import re
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from cpu_isa import ISAS, kernels_of
from error_rule import check
from test_registry import COOPER, SAPPHIRE, ZEN3, ZEN4, fake_cpu
from torch import Tensor
from torch.fx.experimental.proxy_tensor import make_fx
from torch.utils.flop_counter import FlopCounterMode

from kernels import cpu, linear, machine, measured, native, registry, use_backend
from kernels.measured import Cell, Row

pytestmark = pytest.mark.skipif(native.MISSING is not None, reason=str(native.MISSING))
DTYPES = [torch.float32, torch.bfloat16, torch.float16]


def make(rows: int, width: int, columns: int, dtype: torch.dtype = torch.float32) -> tuple[Tensor, Tensor, Tensor]:
    generator = torch.Generator().manual_seed(rows + width)
    return tuple(torch.randn(*s, generator=generator).to(dtype) for s in ((rows, width), (columns, width), (columns,)))  # type: ignore[return-value]


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("isa", ISAS)
def test_the_product_of_a_few_rows(isa: str, dtype: torch.dtype) -> None:
    kernels = kernels_of(isa)
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
    kernels = kernels_of(isa)
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
    ("of", "dtype", "size", "version"),
    [
        (ZEN3, torch.float32, "1-row", "torch"),
        (ZEN3, torch.float32, "2-3-rows", "cpu/avx2"),
        (ZEN3, torch.bfloat16, "9-16-rows-small", "cpu/avx2"),
        (ZEN3, torch.float16, "4-8-rows", "cpu/avx2"),
        (fake_cpu("GenuineIntel", "avx2", 6), torch.float32, "4-8-rows", "torch"),
        (ZEN4, torch.bfloat16, "9-16-rows", "torch"),
        (COOPER, torch.bfloat16, "9-16-rows", "torch"),
        (SAPPHIRE, torch.bfloat16, "1-row-small", "cpu/amx_bf16"),
        (SAPPHIRE, torch.float16, "9-16-rows", "torch"),
        (fake_cpu("0x41", "portable"), torch.float32, "9-16-rows", "torch"),
    ],
    ids=lambda x: x.kind if isinstance(x, machine.Machine) else str(x),
)
def test_without_a_measurement_the_product_is_ours_only_where_it_is_known_to_be_faster(
    of: machine.Machine, dtype: torch.dtype, size: str, version: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(registry, "_rows", {})
    assert registry.select("product", of, None, dtype=dtype, size=size) == version


def measured_as(of: machine.Machine, size: str, *versions: str) -> dict[Cell, Row]:
    cell = Cell("product", of.kind, torch.float32, None, size, "forward")
    return {cell: Row({version: 1 / (1 + i) for i, version in enumerate(versions)}, ("here",))}


def test_what_is_fastest_may_have_fewer_instructions_than_the_caller_and_not_more(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    rows = measured_as(SAPPHIRE, "4-8-rows", "cpu/avx512", "cpu/avx2", "torch")
    monkeypatch.setattr(registry, "_rows", rows)
    for caller, version in (
        ("amx_bf16", "cpu/avx512"),
        ("avx512", "cpu/avx512"),
        ("avx2", "cpu/avx2"),
        ("portable", "torch"),
    ):
        call = {"dtype": torch.float32, "size": "4-8-rows", "caller": caller}
        assert registry.select("product", SAPPHIRE, None, **call) == version


@pytest.mark.parametrize("isa", ISAS)
def test_the_product_is_what_was_measured_fastest(isa: str, monkeypatch: pytest.MonkeyPatch) -> None:
    kernels, here = kernels_of(isa), machine.cpu()
    rows = measured_as(here, "9-16-rows-small", f"cpu/{isa}", "torch")
    rows |= measured_as(here, "2-3-rows-small", "torch", f"cpu/{isa}")
    monkeypatch.setattr(registry, "_rows", rows)
    registry._forget()
    ran: list[tuple[str, int]] = []
    for name in ("torch", f"cpu/{isa}"):
        found = registry._IMPLEMENTATIONS["product"][name]

        def run(x: Tensor, weight: Tensor, name: str = name, found: Any = found) -> Any:
            ran.append((name, x.shape[0]))
            return found.forward(x, weight)

        watched = dataclasses.replace(found, forward=run)
        monkeypatch.setitem(registry._IMPLEMENTATIONS["product"], name, watched)
    try:
        for number in (0, 2, 16, 17):
            x, weight, _ = make(number, 64, 40)
            torch.testing.assert_close(cpu.product(kernels, x, weight), x @ weight.T)
        x, weight, _ = make(16, 64, 40)
        apart = x.T.contiguous().T  # rows that are not contiguous are the vendor's
        torch.testing.assert_close(cpu.product(kernels, apart, weight), x @ weight.T)
    finally:
        registry._forget()
    assert ran == [("torch", 2), (f"cpu/{isa}", 16)]


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


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize(
    ("x", "weight", "bias"),
    [
        ((2, 64), (40, 32), (40,)),
        ((2, 32), (40, 64), (40,)),
        ((2, 64), (40, 64), (39,)),
        ((2, 64), (3, 40, 64), (40,)),
        ((0, 64), (40, 64), (40,)),
        ((3, 0, 64), (40, 64), (40,)),
        ((2, 0), (40, 0), (40,)),
        ((2, 64), (40, 64), None),
        ((2, 64), (40, 64), (1,)),
        ((64,), (40, 64), (40,)),
    ],
)
def test_what_does_not_fit_or_is_empty_is_pytorchs(
    x: tuple[int, ...],
    weight: tuple[int, ...],
    bias: tuple[int, ...] | None,
    dtype: torch.dtype,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Ours, were it chosen, would read beyond a tensor's end."""
    monkeypatch.setattr(registry, "_rows", every_size_is_ours(dtype))
    registry._forget()
    arguments = [None if size is None else torch.ones(size, dtype=dtype) for size in (x, weight, bias)]
    try:
        expected = F.linear(*arguments)  # type: ignore[arg-type]
    except RuntimeError as error:
        with pytest.raises(RuntimeError, match=re.escape(str(error))):
            linear(*arguments)  # type: ignore[arg-type]
    else:
        torch.testing.assert_close(linear(*arguments), expected)  # type: ignore[arg-type]


def every_size_is_ours(dtype: torch.dtype) -> dict[Cell, Row]:
    row = Row({f"cpu/{ISAS[0]}": 1.0, "torch": 0.5}, ("here",))
    kind = machine.cpu().kind
    return {Cell("product", kind, dtype, None, size, work): row for size, work in measured.calls("product")}


@pytest.mark.filterwarnings("ignore:.torch.jit:DeprecationWarning")
def test_what_traces_or_transforms_sees_pytorchs_function(monkeypatch: pytest.MonkeyPatch) -> None:
    """A native product would be invisible to it: `torch.jit.trace` kept the memory before the product."""
    monkeypatch.setattr(registry, "_rows", every_size_is_ours(torch.float32))
    registry._forget()
    x, weight, bias = make(2, 64, 40)
    other, expected = x + 1, F.linear(x + 1, weight, bias)
    with torch.no_grad():
        traced = torch.jit.trace(lambda x: linear(x, weight, bias), x)
        torch.testing.assert_close(traced(other), expected)
        torch.testing.assert_close(make_fx(lambda x: linear(x, weight, bias))(x)(other), expected)
        torch.testing.assert_close(torch.func.vmap(lambda row: linear(row, weight, bias))(other), expected)
        tangent = torch.func.jvp(lambda x: linear(x, weight, bias), (x,), (other,))[1]
        torch.testing.assert_close(tangent, expected - bias)
        with FlopCounterMode(display=False) as counter:
            linear(x, weight, bias)
        assert counter.get_total_flops() == 2 * 2 * 64 * 40
        negative = torch._neg_view(-x)
        assert negative.is_neg() and torch.equal(negative, x)
        torch.testing.assert_close(linear(negative, weight, bias), F.linear(x, weight, bias))
