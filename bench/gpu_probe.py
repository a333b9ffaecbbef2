"""Small programs that bench/on_gpu.py runs in processes of their own, under a profiler or a sanitizer.

    python bench/gpu_probe.py module | attention | elementwise | loss-chunks | layer | calls | triton   [--device cpu]

Lines that start with RATE go to the summary. On --device cpu (a rehearsal) the shapes are toys and nothing is a figure.
"""

import argparse
import statistics
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import torch
from torch import Tensor

from bench.harness import _Clock
from kernels import (
    BlockShape,
    apply_rotary,
    chunked_loss,
    flash_attention,
    layer_norm,
    linear_cross_entropy,
    machine,
    parallel_block,
    reference,
    registry,
)


class Probe:
    """Where the programs run."""

    def __init__(self, device: str) -> None:
        self.device, self.small = device, device == "cpu"
        self.backend = "cuda"
        self.clock = _Clock(device)

    def leaf(self, *shape: int, scale: float = 1.0) -> Tensor:
        """Normal numbers in bfloat16 that want a gradient."""
        return (scale * torch.randn(shape, device=self.device)).to(torch.bfloat16).requires_grad_()

    def median(self, call: Callable[[], Any], rounds: int = 10) -> float:
        """Seconds."""
        call()
        return statistics.median(self.clock(call) for _ in range(2 if self.small else rounds))

    def device_time(self, call: Callable[[], Any], rows: int = 12) -> list[tuple[str, float, int]]:
        """(kernel, microseconds, launches) of one call on the GPU, the longest first."""
        from torch.profiler import ProfilerActivity, profile

        call()
        with profile(activities=[ProfilerActivity.CPU if self.small else ProfilerActivity.CUDA]) as found:
            call()
            if not self.small:
                torch.cuda.synchronize()
        events = [(e.key, e.self_device_time_total, e.count) for e in found.key_averages() if e.self_device_time_total]
        return sorted(events, key=lambda event: -event[1])[:rows]


def module(probe: Probe) -> None:
    """Whether the native module loads and has what this device needs."""
    missing = machine.cpu().missing
    needs = ("cpu",) if probe.small else ("cpu", "cuda", "cuda/hopper")
    for why in filter(None, map(missing.get, needs)):
        raise SystemExit(why)
    print("loads")


def attention(probe: Probe) -> None:
    """Forward and backward without and with dropout: three runs, four kernels each."""
    batch, seq, heads = (1, 64, 1) if probe.small else (4, 2048, 16)
    q, k, v = (probe.leaf(batch, seq, heads, 64) for _ in range(3))
    for p in (0.0, 0.0, 0.1):
        out = flash_attention(q, k, v, dropout_p=p, backend=probe.backend)
        torch.autograd.grad(out, (q, k, v), torch.randn_like(q))
    print("ran")


def elementwise(probe: Probe) -> None:
    """Kernels that memory bounds, as a share of what a copy of the same bytes reaches."""
    tokens, width = (64, 64) if probe.small else (16384, 2048)
    source = torch.randn(tokens * width * 4, device=probe.device).to(torch.bfloat16)
    target = torch.empty_like(source)
    copied = 2 * source.numel() * 2 / probe.median(lambda: target.copy_(source))
    print(f"RATE copy {copied / 1e9:.0f} GB/s")
    x, weight, bias = probe.leaf(tokens, width), probe.leaf(width), probe.leaf(width)
    heads = width // 64
    q, k = (probe.leaf(1, tokens, heads, 64).detach() for _ in range(2))
    cos, sin = reference.rotary_table(tokens, 32, device=torch.device(probe.device))
    y = layer_norm(x, weight, bias, backend=probe.backend)
    works: dict[str, tuple[int, Callable[[], Any]]] = {
        "rotary": (4 * tokens * width * 2, lambda: apply_rotary(q, k, cos, sin, backend=probe.backend)),
        "layer_norm": (
            2 * tokens * width * 2,
            lambda: layer_norm(x.detach(), weight.detach(), bias.detach(), backend=probe.backend),
        ),
        "layer_norm backward": (
            3 * tokens * width * 2,
            lambda: torch.autograd.grad(y, (x, weight, bias), y.detach(), retain_graph=True),
        ),
    }
    for name, (moved, call) in works.items():
        on_device = sum(time for _, time, _ in probe.device_time(call)) * 1e-6
        seconds = probe.median(call)
        share = f"{moved / on_device / copied:.0%} of the copy's rate" if on_device else "no device time"
        print(
            f"RATE {name}: {share} on the device ({on_device * 1e6:.0f} us), {seconds * 1e6:.0f} us with the call",
            flush=True,
        )


def loss_chunks(probe: Probe) -> None:
    """The loss, forward and backward, at several numbers of rows a chunk."""
    rows, width, columns = (64, 64, 512) if probe.small else (16384, 2048, 51200)
    hidden, weight, bias = (probe.leaf(*s, scale=s[-1] ** -0.5) for s in ((rows, width), (columns, width), (columns,)))
    targets = torch.randint(columns, (rows,), device=probe.device)

    def step() -> None:
        loss = linear_cross_entropy(hidden, weight, bias, targets, backend=probe.backend)
        torch.autograd.grad(loss, (hidden, weight, bias))

    default = chunked_loss._CHUNK_LOGITS[probe.device]
    for chunk in dict.fromkeys((default // columns, 1024, 8192, 16384)):
        chunked_loss._CHUNK_LOGITS[probe.device] = chunk * columns
        seconds = probe.median(step, 5)
        print(
            f"RATE loss, {chunk} rows a chunk: {seconds * 1e3:.2f} ms, "
            f"{6 * rows * width * columns / seconds / 1e12:.0f} TFLOP/s",
            flush=True,
        )
        if chunk == default // columns:
            for name, time, count in probe.device_time(step):
                print(f"  {time / 1e3:8.2f} ms {count:4d} x {name[:110]}")


def layer(probe: Probe) -> None:
    """One layer of phi-1, forward and backward, by kernel: where its time goes."""
    batch, seq, hidden, heads = (1, 64, 64, 1) if probe.small else (8, 2048, 2048, 32)
    inner, width = 4 * hidden, 64 * heads
    shapes = [
        (hidden,),
        (hidden,),
        (3 * width + inner, hidden),
        (3 * width + inner,),
        (hidden, width + inner),
        (hidden,),
    ]
    parameters = [probe.leaf(*shape, scale=0.02) for shape in shapes]
    x = probe.leaf(batch, seq, hidden)
    grad = torch.randn_like(x)
    norm_weight, norm_bias, w_in, b_in, w_out, b_out = parameters
    cos, sin = reference.rotary_table(seq, 32, device=torch.device(probe.device))
    for p in (0.0, 0.1):
        of = BlockShape(heads, heads, 64, attention_dropout=p, residual_dropout=p)

        def step(of: BlockShape = of) -> None:
            y = parallel_block(
                x, norm_weight, norm_bias, w_in, b_in, w_out, b_out, cos, sin, of, dropout_seed=1, backend=probe.backend
            )
            torch.autograd.grad(y, (x, *parameters), grad)

        found = probe.device_time(step, 20)
        print(
            f"RATE layer, dropout {p}: {probe.median(step) * 1e3:.2f} ms, {sum(t for _, t, _ in found) / 1e3:.2f} on "
            f"the device"
        )
        for name, time, count in found:
            print(f"  {time:8.0f} us {count:3d} x {name[:120]}")


def calls(probe: Probe) -> None:
    """A few small calls of every kernel of ours, for a sanitizer. No product of the vendor's: cuBLAS fails under
    racecheck (CUBLAS_STATUS_EXECUTION_FAILED, H200, CUDA 13.0).
    """
    cu = torch.tensor([0, 5, 40, 77], dtype=torch.int32, device=probe.device)
    runs: list[tuple[tuple[int, ...], tuple[int, ...], dict[str, Any]]] = [
        ((1, 77, 4, 64), (1, 77, 2, 64), {"cu_seqlens_q": cu, "cu_seqlens_k": cu, "dropout_p": 0.1}),
        ((2, 65, 2, 128), (2, 99, 1, 128), {"causal": False}),
        ((1, 203, 2, 32), (1, 113, 2, 32), {}),
        ((1, 300, 1, 64), (1, 300, 1, 64), {"dropout_p": 0.1}),
    ]
    for shape, kv_shape, options in runs:
        here, of = registry.machine_of(torch.device(probe.device)), {"dtype": torch.bfloat16, "head_dim": shape[3]}
        for version in ("mma", "hopper"):
            if not registry.serves("flash_attention", f"cuda/{version}", here, of):
                continue
            q, k, v = probe.leaf(*shape), probe.leaf(*kv_shape), probe.leaf(*kv_shape)
            out = flash_attention(q, k, v, backend=f"cuda/{version}", **options)
            torch.autograd.grad(out, (q, k, v), torch.randn_like(q))
            if not probe.small:
                torch.cuda.synchronize()
            print(f"attention by {version}, {shape} ran", flush=True)
    cos, sin = reference.rotary_table(9, 32, device=torch.device(probe.device))
    q, k = probe.leaf(2, 9, 3, 64), probe.leaf(2, 9, 3, 64)
    torch.autograd.grad(apply_rotary(q, k, cos, sin, backend=probe.backend), (q, k), (q.detach(), k.detach()))
    layer_norm(probe.leaf(7, 264), probe.leaf(264), probe.leaf(264), backend=probe.backend).float().sum().backward()
    if not probe.small:
        torch.cuda.synchronize()
    print("rotary and layer_norm ran", flush=True)
    pieces = registry.implementation("linear_cross_entropy", "cuda").forward.args[0]  # type: ignore[attr-defined]
    logits, bias = probe.leaf(13, 520).detach(), probe.leaf(520).detach()
    loss, sums = (torch.zeros(shape, device=probe.device) for shape in ((13,), (pieces.bias_parts(13, 520), 520)))
    pieces.cross_entropy(logits, bias, torch.arange(13, device=probe.device), loss, sums, -100, 0.0)
    assert loss.isfinite().all() and sums.any()
    print("the loss ran")


def triton(probe: Probe) -> None:
    """Triton's attention chooses its tiles for phi-1's shape."""
    if probe.small:
        print("no GPU: nothing to choose")
        return
    q, k, v = (probe.leaf(8, 2048, 32, 64) for _ in range(3))
    for p in (0.0, 0.1):
        out = flash_attention(q, k, v, dropout_p=p, backend="triton")
        torch.autograd.grad(out, (q, k, v), torch.randn_like(q))
    torch.cuda.synchronize()
    print("chose")


PROGRAMS = {
    "module": module,
    "attention": attention,
    "elementwise": elementwise,
    "loss-chunks": loss_chunks,
    "layer": layer,
    "calls": calls,
    "triton": triton,
}

if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("program", choices=PROGRAMS)
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cuda")
    options = parser.parse_args()
    PROGRAMS[options.program](Probe(options.device))
