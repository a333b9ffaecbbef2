"""x W^T for a few rows of x, as decoding multiplies: every version of ours and automatic choice against PyTorch's
product.

    python bench/linear.py --quick

As many weights as fill 200 MB, at most 12, are multiplied in turn, so that they come from memory as a model's do.
"""

import sys
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import torch
from torch import Tensor

from bench import suite
from bench.suite import Case, Shape
from kernels import cpu, native, registry
from kernels.measured import MOST_ROWS, product_class

BYTES, MOST = 200 * 10**6, 12


def ours(x: Tensor, *weights: Tensor, backend: str | None) -> list[Tensor]:
    automatic = partial(cpu.product, next(isa for isa in native.ISAS if isa.missing is None))
    multiply = automatic if backend is None else registry.implementation("product", backend).forward
    return [multiply(x, weight) for weight in weights]


def pytorchs() -> Callable[..., list[Tensor]]:
    return lambda x, *weights: [x @ weight.T for weight in weights]


def cases(device: str, dtype: str, shape: Shape) -> Iterator[Case]:
    rows, width, columns = shape
    precision = suite.DTYPES[dtype]
    number = max(1, min(MOST, BYTES // (width * columns * precision.itemsize)))
    weights = [torch.randn(columns, width).to(precision) for _ in range(number)]
    inputs = [torch.randn(rows, width).to(precision), *weights]
    size = product_class(rows, rows * width * columns)
    candidates = suite.op_candidates("product", device, ours, {"PyTorch": pytorchs}, inputs, size=size)
    yield Case("", {"forward": float(number * weights[0].nbytes)}, candidates, size)


def check(shape: Shape) -> str | None:
    return None if shape[0] <= MOST_ROWS else f"rows must be at most {MOST_ROWS}, which the kernel is for"


SHAPES = [(512, 3584), (2560, 512), (512, 51200), (1024, 7168), (5120, 1024), (256, 1024)]
SUITE = suite.Suite(
    name="linear",
    description=__doc__ or "",
    form="rows x width x columns",
    formula="bytes of the weights, each read once",
    shapes={"cpu": [(rows, *shape) for rows in (1, 2, 4, 8, 16) for shape in SHAPES]},
    quick_shapes={"cpu": [(rows, 512, 3584) for rows in (1, 4, 16)]},
    dtypes={"cpu": ["fp32", "bf16"]},
    cases=cases,
    check=check,
    quantity="B",
    seconds=(0.2, 1.0),
    rounds={"cpu": 5},
)

if __name__ == "__main__":
    suite.main(SUITE)
