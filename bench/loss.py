"""The language-model loss: lm_head and cross-entropy in one op against F.linear and F.cross_entropy, eager and
compiled.

    python bench/loss.py --quick

Time, and the memory that a call takes beyond its inputs: the logits are what this op does not keep.
"""

import sys
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import torch
import torch.nn.functional as F
from torch import Tensor

from bench import suite
from bench.harness import Unavailable
from bench.suite import Case, Shape
from kernels import linear_cross_entropy
from kernels.measured import size_class

FORMULA = "FLOPs: 2 * tokens * hidden * columns forward, three times that with the gradients of hidden and weight"
FORM = "tokens x hidden x columns"


def plain(hidden: Tensor, weight: Tensor, bias: Tensor, targets: Tensor) -> Tensor:
    """What a user would write. The logits are widened, as transformers does it."""
    return F.cross_entropy(F.linear(hidden, weight, bias).float(), targets)


def chunked(targets: Tensor) -> Callable[[Tensor, Tensor, Tensor], Tensor]:
    """PyTorch's own op in chunks, which torch 2.13 brought."""
    op, options = getattr(F, "linear_cross_entropy", None), getattr(torch.nn, "LinearCrossEntropyOptions", None)
    if op is None or options is None:
        raise Unavailable(f"torch {torch.__version__} has no linear_cross_entropy in chunks; torch 2.13 has")

    def run(hidden: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
        # One graph is differentiated many times here.
        return op(hidden, weight, targets, linear_bias=bias, options=options(allow_retain_graph=True))

    return run


def cases(device: str, dtype: str, shape: Shape) -> Iterator[Case]:
    tokens, width, columns = shape
    sizes = [(tokens, width), (columns, width), (columns,)]
    inputs = [(torch.randn(size, device=device) / size[-1] ** 0.5).to(suite.DTYPES[dtype]) for size in sizes]
    flops = 2.0 * tokens * width * columns
    targets = torch.randint(columns, (tokens,), device=device)
    peers: dict[str, Callable[[], Callable[..., Tensor]]] = {
        "PyTorch eager": lambda: partial(plain, targets=targets),
        "PyTorch compiled": lambda: partial(torch.compile(plain, dynamic=False), targets=targets),
        "PyTorch linear_cross_entropy": partial(chunked, targets),
    }
    candidates = suite.op_candidates(
        "linear_cross_entropy",
        device,
        partial(linear_cross_entropy, targets=targets),
        peers,
        inputs,
        size=size_class(tokens),
        columns=columns,
    )
    yield Case("", {"forward": flops, "forward + backward": 3 * flops}, candidates, size_class(tokens))


_GPU: list[Shape] = [(4096, 2048, 51200), (16384, 2048, 51200)]
SUITE = suite.Suite(
    name="loss",
    description=__doc__ or "",
    form=FORM,
    formula=FORMULA,
    shapes={"cuda": _GPU, "cpu": [(4096, 512, 51200)]},
    quick_shapes={"cuda": _GPU[:1], "cpu": [(512, 512, 51200)]},
    dtypes={"cuda": ["bf16"], "cpu": ["fp32", "bf16"]},
    cases=cases,
)

if __name__ == "__main__":
    suite.main(SUITE)
