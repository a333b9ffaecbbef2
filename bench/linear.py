"""x W^T for a few rows of x, as decoding multiplies: our kernels by name against PyTorch's product.

    python bench/linear.py --quick

As many weights as fill 200 MB, at most 12, are multiplied in turn, so that they come from memory as a model's do.
kernels/cpu.py, FEW_ROWS, says from these figures where our kernel is taken.
"""

import sys
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import torch
from torch import Tensor

from bench import suite
from bench.harness import Candidate
from bench.suite import Case, Shape
from kernels import cpu, native

BYTES, MOST = 200 * 10**6, 12


def cases(device: str, dtype: str, shape: Shape) -> Iterator[Case]:
    rows, width, columns = shape
    precision = suite.DTYPES[dtype]
    number = max(1, min(MOST, BYTES // (width * columns * precision.itemsize)))
    weights = [torch.randn(columns, width).to(precision) for _ in range(number)]
    x = torch.randn(rows, width).to(precision)

    def candidate(name: str, product: Callable[[Tensor, Tensor], Tensor], missing: str | None, ours: bool) -> Candidate:
        return Candidate(name, ours, lambda _: lambda: [product(x, weight) for weight in weights], missing)

    theirs = candidate("PyTorch", lambda x, weight: x @ weight.T, None, False)
    ours = [
        candidate(f"phi1 cpu/{isa.name}", partial(cpu.product_of_few, isa), isa.missing, True) for isa in native.ISAS
    ]
    yield Case("", {"weights read": float(number * weights[0].nbytes)}, [theirs, *ours])


def check(shape: Shape) -> str | None:
    return None if shape[0] <= 16 else "rows must be at most 16, which the kernel is for"


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
