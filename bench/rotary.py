"""Rotary on q and k: our backends against plain PyTorch, eager and compiled.

    python bench/rotary.py --quick

q and k are strided views of the packed product [q | k | v | u], as in the model.
"""

import sys
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import torch
from torch import Tensor

from bench import suite
from bench.suite import Case, Shape
from kernels import apply_rotary, reference
from kernels.measured import size_class

FORMULA = "bytes: every element of q and k read once and written once, cos and sin not counted"
ROTARY_DIM = 32


def plain(q: Tensor, k: Tensor, cos: Tensor, sin: Tensor) -> tuple[Tensor, Tensor]:
    """What a user would write (transformers' modeling_phi.py), in q's dtype."""
    cos, sin = (torch.cat([x, x], -1)[: q.shape[1], None].to(q.dtype) for x in (cos, sin))

    def turn(x: Tensor) -> Tensor:
        head, rest = x[..., : cos.shape[-1]], x[..., cos.shape[-1] :]
        half = head.shape[-1] // 2
        return torch.cat([head * cos + torch.cat([-head[..., half:], head[..., :half]], -1) * sin, rest], -1)

    return turn(q), turn(k)


def cases(device: str, dtype: str, shape: Shape) -> Iterator[Case]:
    batch, seq, heads, head_dim = shape
    precision, width = suite.DTYPES[dtype], heads * head_dim
    packed = torch.randn(batch, seq, 7 * width, device=device).to(precision)  # q, k, v and 4x inner
    inputs = [packed[..., i * width :][..., :width].unflatten(-1, (heads, -1)) for i in (0, 1)]
    grads = [torch.randn(shape, device=device).to(precision) for _ in range(2)]
    cos, sin = reference.rotary_table(seq, ROTARY_DIM, device=torch.device(device))
    moved = 2 * 2 * batch * seq * width * precision.itemsize
    peers: dict[str, Callable[[], Callable[..., Any]]] = {
        "PyTorch eager": lambda: partial(plain, cos=cos, sin=sin),
        "PyTorch compiled": lambda: partial(torch.compile(plain, dynamic=False), cos=cos, sin=sin),
    }
    ours = partial(apply_rotary, cos=cos, sin=sin)
    candidates = suite.op_candidates("apply_rotary", device, ours, peers, inputs, grads, size=size_class(batch * seq))
    yield Case("", {"forward": moved, "forward + backward": 2 * moved}, candidates, size_class(batch * seq))


def check(shape: Shape) -> str | None:
    return f"head_dim must be at least {ROTARY_DIM}, the rotated dims" if shape[3] < ROTARY_DIM else None


SUITE = suite.Suite(
    name="rotary",
    description=__doc__ or "",
    form="batch x seq x heads x head_dim",
    formula=FORMULA,
    shapes={
        "cuda": [(8, 2048, 32, 64), (1, 16384, 32, 64), (8, 2048, 16, 64)],
        "cpu": [(1, 2048, 32, 64), (4, 2048, 32, 64), (1, 2048, 16, 64)],
    },
    quick_shapes={"cuda": [(8, 2048, 32, 64)], "cpu": [(1, 2048, 32, 64)]},
    dtypes={"cuda": ["bf16"], "cpu": ["fp32", "bf16"]},
    cases=cases,
    check=check,
    quantity="B",
    seconds=(0.3, 1.0),
    rounds={"cuda": 10, "cpu": 10},
)

if __name__ == "__main__":
    suite.main(SUITE)
