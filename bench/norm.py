"""LayerNorm alone, as behind the last layer: our backends against PyTorch's op, eager and compiled.

python bench/norm.py --quick
"""

import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import torch
import torch.nn.functional as F
from torch import Tensor

from bench import suite
from bench.suite import Case, Shape
from kernels import layer_norm
from kernels.measured import size_class


def plain(x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    return F.layer_norm(x, weight.shape, weight, bias)


def cases(device: str, dtype: str, shape: Shape) -> Iterator[Case]:
    rows, columns = shape
    precision = suite.DTYPES[dtype]
    inputs = [torch.randn(size, device=device).to(precision) for size in (shape, (columns,), (columns,))]
    grad = torch.randn(shape, device=device).to(precision)
    once = float(inputs[0].nbytes)
    peers: dict[str, Callable[[], Callable[..., Any]]] = {
        "PyTorch eager": lambda: plain,
        "PyTorch compiled": lambda: torch.compile(plain, dynamic=False),
    }
    candidates = suite.op_candidates("layer_norm", device, layer_norm, peers, inputs, grad, size=size_class(rows))
    # Of one row, as decoding has it, there is no backward pass.
    works = {"forward": 2 * once, "forward + backward": 5 * once} if rows > 1 else {"forward": 2 * once}
    yield Case("", works, candidates, size_class(rows))


SUITE = suite.Suite(
    name="norm",
    description=__doc__ or "",
    form="rows x columns",
    formula="bytes: x read and y written; with the backward pass x and two gradients more",
    shapes={
        "cuda": [(16384, 2048), (16, 2048), (256, 2048)],
        "cpu": [(rows, columns) for columns in (512, 2048) for rows in (1, 16, 256, 2048)],
    },
    quick_shapes={"cuda": [(16384, 2048)], "cpu": [(2048, 512)]},
    dtypes={"cuda": ["bf16"], "cpu": ["fp32", "bf16"]},
    cases=cases,
    quantity="B",
    seconds=(0.3, 1.0),
    rounds={"cuda": 10, "cpu": 10},
)

if __name__ == "__main__":
    suite.main(SUITE)
