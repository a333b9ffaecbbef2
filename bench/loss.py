"""The language-model loss: lm_head and cross-entropy in one op against F.linear and F.cross_entropy, eager and compiled.

    python bench/loss.py --quick

Time, and the memory that a call takes beyond its inputs: the logits are what this op does not keep.
"""

import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import torch
import torch.nn.functional as F
from torch import Tensor

from bench import harness
from bench.harness import Candidate, Unavailable
from kernels import linear_cross_entropy

FORMULA = "FLOPs: 2 * tokens * hidden * columns forward, three times that with the gradients of hidden and weight"
FORM = "tokens x hidden x columns"

_GPU = [(4096, 2048, 51200), (16384, 2048, 51200)]
_CPU = [(4096, 512, 51200)]
_QUICK = {"cuda": _GPU[:1], "cpu": [(512, 512, 51200)]}

Loss = Callable[[Tensor, Tensor, Tensor, Tensor], Tensor]
"""(hidden, weight, bias, targets) -> the mean cross-entropy."""


def plain(hidden: Tensor, weight: Tensor, bias: Tensor, targets: Tensor) -> Tensor:
    """What a user would write. The logits are widened, as transformers does it."""
    return F.cross_entropy(F.linear(hidden, weight, bias).float(), targets)


def ours(backend: str, reason: str | None) -> Loss:
    if reason is not None:
        raise Unavailable(reason)
    return lambda hidden, weight, bias, targets: linear_cross_entropy(hidden, weight, bias, targets, backend=backend)


def compiled() -> Loss:
    return torch.compile(plain, dynamic=False)


def timed(make: Callable[[], Loss], work: str, inputs: Sequence[Tensor], targets: Tensor) -> Callable[[], Any]:
    loss = make()
    if work == "forward":

        def forward() -> Tensor:
            with torch.no_grad():
                return loss(*inputs, targets)

        return forward
    leaves = [x.detach().requires_grad_() for x in inputs]
    return lambda: torch.autograd.grad(loss(*leaves, targets), leaves)


def main(argv: Sequence[str] | None = None) -> None:
    parser = harness.arguments(__doc__ or "", shapes=f"comma-separated, each {FORM}, e.g. 4096x512x51200")
    options = harness.parse(parser, argv)
    device, gpu = options.device, options.device == "cuda"
    shapes = _QUICK[device] if options.quick else {"cuda": _GPU, "cpu": _CPU}[device]
    if options.shapes:
        shapes = [harness.parse_integers(parser, text, FORM) for text in options.shapes.split(",")]
    dtypes = harness.parse_dtypes(parser, options.dtypes, ["bf16"] if gpu else ["fp32", "bf16"])
    scale = 1e12 if gpu else 1e9
    bench = harness.Benchmark(
        "loss", device, unit="TFLOP/s" if gpu else "GFLOP/s", formula=FORMULA,
        seconds=0.3 if options.quick else 2.0, rounds=10 if gpu else 3,
    )  # fmt: skip
    for name in dtypes:
        dtype = harness.DTYPES[name]
        peak = harness.matrix_peak(device, dtype) / scale
        bench.notes.append(f"matrix product in {name}, measured in this run: {peak:.4g} {bench.unit}")
        for shape in shapes:
            tokens, width, columns = shape
            sizes = [(tokens, width), (columns, width), (columns,)]
            inputs = [(torch.randn(size, device=device) / size[-1] ** 0.5).to(dtype) for size in sizes]
            targets = torch.randint(columns, (tokens,), device=device)
            makers: list[tuple[str, bool, Callable[[], Loss]]] = [
                (f"phi1 {b}", True, lambda b=b, r=r: ours(b, r))
                for b, r in harness.our_backends("linear_cross_entropy", device, dtype=dtype)
            ]
            makers += [("PyTorch eager", False, lambda: plain), ("PyTorch compiled", False, compiled)]
            flops = 2 * tokens * width * columns / scale
            for work, factor in (("forward", 1), ("forward + backward", 3)):
                candidates = [
                    Candidate(
                        label, mine,
                        lambda make=make, work=work, inputs=inputs, targets=targets: timed(make, work, inputs, targets),
                    )
                    for label, mine, make in makers
                ]  # fmt: skip
                bench.group(f"{'x'.join(map(str, shape))} {name}", work, factor * flops, candidates, peak)
    bench.finish(options)


if __name__ == "__main__":
    main()
