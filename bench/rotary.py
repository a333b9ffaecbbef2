"""Rotary on q and k: our backends against plain PyTorch, eager and compiled.

    python bench/rotary.py --quick

q and k are strided views of the packed product [q | k | v | u], as in the model.
"""

import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import torch
from torch import Tensor

from bench import harness
from bench.harness import Candidate, Unavailable
from kernels import apply_rotary, reference

FORMULA = "bytes: every element of q and k read once and written once, cos and sin not counted"
FORM = "batch x seq x heads x head_dim"
ROTARY_DIM = 32

_GPU = [(8, 2048, 32, 64), (1, 16384, 32, 64), (8, 2048, 16, 64)]
_CPU = [(1, 2048, 32, 64), (4, 2048, 32, 64), (1, 2048, 16, 64)]
_QUICK = {"cuda": [(8, 2048, 32, 64)], "cpu": [(1, 2048, 32, 64)]}

Rotary = Callable[[Tensor, Tensor, Tensor, Tensor], tuple[Tensor, Tensor]]


def plain(q: Tensor, k: Tensor, cos: Tensor, sin: Tensor) -> tuple[Tensor, Tensor]:
    """What a user would write (transformers' modeling_phi.py), in q's dtype."""
    cos, sin = (torch.cat([x, x], -1)[: q.shape[1], None].to(q.dtype) for x in (cos, sin))

    def turn(x: Tensor) -> Tensor:
        head, rest = x[..., : cos.shape[-1]], x[..., cos.shape[-1] :]
        half = head.shape[-1] // 2
        return torch.cat([head * cos + torch.cat([-head[..., half:], head[..., :half]], -1) * sin, rest], -1)

    return turn(q), turn(k)


def ours(backend: str, reason: str | None) -> Rotary:
    if reason is not None:
        raise Unavailable(reason)
    return lambda q, k, cos, sin: apply_rotary(q, k, cos, sin, backend=backend)


def compiled() -> Rotary:
    return torch.compile(plain, dynamic=False)


def timed(make: Callable[[], Rotary], work: str, inputs: Sequence[Tensor]) -> Callable[[], Any]:
    rotary = make()
    q, k, cos, sin, grad_q, grad_k = inputs
    if work == "forward":

        def forward() -> object:
            with torch.no_grad():
                return rotary(q, k, cos, sin)

        return forward
    leaves = [x.detach().requires_grad_() for x in (q, k)]
    return lambda: torch.autograd.grad(rotary(*leaves, cos, sin), leaves, (grad_q, grad_k))


def main(argv: Sequence[str] | None = None) -> None:
    parser = harness.arguments(__doc__ or "", shapes=f"comma-separated, each {FORM}, e.g. 1x2048x32x64")
    options = harness.parse(parser, argv)
    device = options.device
    shapes = _QUICK[device] if options.quick else {"cuda": _GPU, "cpu": _CPU}[device]
    if options.shapes:
        shapes = [harness.parse_integers(parser, text, FORM) for text in options.shapes.split(",")]
    dtypes = harness.parse_dtypes(parser, options.dtypes, ["bf16"] if device == "cuda" else ["fp32", "bf16"])
    bench = harness.Benchmark(
        "rotary", device, unit="GB/s", formula=FORMULA, seconds=0.3 if options.quick else 1.0, rounds=10
    )  # fmt: skip
    for name in dtypes:
        dtype = harness.DTYPES[name]
        for shape in shapes:
            batch, seq, heads, head_dim = shape
            if head_dim < ROTARY_DIM:
                parser.error(f"--shapes: head_dim {head_dim} must be at least {ROTARY_DIM}, the rotated dims")
            packed = torch.randn(batch, seq, 7 * heads * head_dim, device=device).to(dtype)  # q, k, v and 4x inner
            q, k = (packed[..., i * heads * head_dim :][..., : heads * head_dim].unflatten(-1, (heads, -1)) for i in (0, 1))  # fmt: skip
            grads = [torch.randn(shape, device=device).to(dtype) for _ in range(2)]
            inputs = [q, k, *reference.rotary_table(seq, ROTARY_DIM, device=torch.device(device)), *grads]
            makers: list[tuple[str, bool, Callable[[], Rotary]]] = [
                (f"phi1 {b}", True, lambda b=b, r=r: ours(b, r))
                for b, r in harness.our_backends("apply_rotary", device, dtype=dtype)
            ]
            makers += [("PyTorch eager", False, lambda: plain), ("PyTorch compiled", False, compiled)]
            moved = 2 * 2 * batch * seq * heads * head_dim * dtype.itemsize / 1e9
            for work, factor in (("forward", 1), ("forward + backward", 2)):
                candidates = [
                    Candidate(label, mine, lambda make=make, work=work, inputs=inputs: timed(make, work, inputs))
                    for label, mine, make in makers
                ]
                bench.group(f"{'x'.join(map(str, shape))} {name}", work, factor * moved, candidates)
    bench.finish(options)


if __name__ == "__main__":
    main()
