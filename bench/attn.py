"""Attention: our backends against PyTorch's, FlexAttention and flash_attn, on the same inputs in one run.

    python bench/attn.py --quick

Layout (batch, seq, heads, head_dim) for all: peers that want heads first get the transposed view, as a model
would pass it. Dropout masks differ between libraries; their cost does not depend on the values.
"""

import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

from bench import harness
from bench.harness import Candidate, Unavailable
from kernels import flash_attention

FORMULA = "FLOPs: forward 4·B·S²·H·D, backward 2.5 times that, halved if causal"
FORM = "batch x seq x heads x head_dim"
FORM_GQA = f"{FORM} x kv_heads"

# phi-1: 32 heads of 64, phi-1-small: 16 heads of 64; 16k tokens on a GPU whatever the length, as in FlashAttention's benchmark.
_GPU = [(16384 // s, s, h, 64) for h in (32, 16) for s in (512, 1024, 2048, 4096, 8192, 16384)]
_GPU_QUICK = [(8, 2048, 32, 64), (1, 16384, 32, 64), (8, 2048, 16, 64)]
_CPU = [(1, 512, 32, 64), (1, 1024, 32, 64), (1, 2048, 16, 64)]
_CPU_QUICK = [(1, 512, 32, 64), (1, 512, 16, 64)]

Attention = Callable[[Tensor, Tensor, Tensor], Tensor]


def ours(backend: str, reason: str | None, causal: bool, dropout: float) -> Attention:
    if reason is not None:
        raise Unavailable(reason)
    return lambda q, k, v: flash_attention(q, k, v, causal=causal, dropout_p=dropout, dropout_seed=1, backend=backend)


def sdpa(kernel: SDPBackend | None, causal: bool, dropout: float, shape: Sequence[int]) -> Attention:
    """scaled_dot_product_attention held to one of its kernels, or its own choice (None)."""
    batch, seq, heads, _, kv_heads = shape
    gib = 4 * batch * heads * seq**2 / 2**30
    if kernel is SDPBackend.MATH and gib > 2:
        raise Unavailable(f"its score matrix would take {gib:.0f} GiB (limit 2)")

    def run(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        heads_first = (x.transpose(1, 2) for x in (q, k, v))
        return F.scaled_dot_product_attention(
            *heads_first, dropout_p=dropout, is_causal=causal, enable_gqa=kv_heads != heads
        ).transpose(1, 2)

    def held(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        assert kernel is not None
        with sdpa_kernel(kernel):
            try:
                return run(q, k, v)
            except RuntimeError as error:
                if "No available kernel" not in str(error):
                    raise
                raise Unavailable("PyTorch has no such kernel for this call") from error

    return run if kernel is None else held


def sdpa_repeated(causal: bool, dropout: float, shape: Sequence[int]) -> Attention:
    """As transformers does it: keys and values repeated for each query head, then scaled_dot_product_attention."""
    _, _, heads, _, kv_heads = shape

    def run(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        k, v = (x.repeat_interleave(heads // kv_heads, dim=2) for x in (k, v))
        heads_first = (x.transpose(1, 2) for x in (q, k, v))
        return F.scaled_dot_product_attention(*heads_first, dropout_p=dropout, is_causal=causal).transpose(1, 2)

    return run


def flex(device: str, causal: bool, dropout: float, shape: Sequence[int]) -> Attention:
    """FlexAttention, compiled."""
    if device != "cuda":
        raise Unavailable("compared on a GPU only")
    if dropout > 0:
        raise Unavailable("it has no dropout")
    import torch._functorch.config
    from torch.nn.attention.flex_attention import create_block_mask, flex_attention

    torch._functorch.config.donated_buffer = False  # the backward is timed many times on one graph
    seq = shape[1]
    mask = create_block_mask(lambda b, h, i, j: j <= i, None, None, seq, seq, device=device) if causal else None
    compiled = torch.compile(flex_attention, dynamic=False)
    gqa = shape[2] != shape[4]

    def run(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        heads_first = (x.transpose(1, 2) for x in (q, k, v))
        return compiled(*heads_first, block_mask=mask, enable_gqa=gqa).transpose(1, 2)

    return run


def flash_attn_2(device: str, causal: bool, dropout: float) -> Attention:
    try:
        from flash_attn import flash_attn_func
    except ImportError as error:
        raise Unavailable(f"flash_attn cannot be imported ({error})") from error
    if device != "cuda":
        raise Unavailable("it takes CUDA tensors only")
    return lambda q, k, v: flash_attn_func(q, k, v, dropout_p=dropout, causal=causal)


def flash_attn_3(device: str, causal: bool, dropout: float) -> Attention:
    try:
        from flash_attn_interface import flash_attn_func
    except ImportError as error:
        raise Unavailable(f"FlashAttention-3's flash_attn_interface cannot be imported ({error})") from error
    if device != "cuda":
        raise Unavailable("it takes CUDA tensors only")
    if dropout > 0:
        raise Unavailable("it has no dropout")

    def run(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        result = flash_attn_func(q, k, v, causal=causal)
        return result[0] if isinstance(result, tuple) else result

    return run


def implementations(
    device: str, dtype: torch.dtype, causal: bool, dropout: float, shape: Sequence[int]
) -> list[tuple[str, bool, Callable[[], Attention]]]:
    """(name, ours?, maker) of all that take part."""
    found: list[tuple[str, bool, Callable[[], Attention]]] = []
    options = {"dropout_p": dropout, "return_lse": False, "dtype": dtype, "head_dim": shape[3]}
    for backend, reason in harness.our_backends("flash_attention", device, **options):
        found.append((f"phi1 {backend}", True, lambda b=backend, r=reason: ours(b, r, causal, dropout)))
    kernels: dict[str, SDPBackend | None] = {"SDPA": None, "SDPA math": SDPBackend.MATH}
    if device == "cuda":
        kernels |= {
            "SDPA flash": SDPBackend.FLASH_ATTENTION,
            "SDPA cuDNN": SDPBackend.CUDNN_ATTENTION,
            "SDPA mem-efficient": SDPBackend.EFFICIENT_ATTENTION,
        }
    for name, kernel in kernels.items():
        found.append((name, False, lambda kernel=kernel: sdpa(kernel, causal, dropout, shape)))
    if shape[2] != shape[4]:
        found.append(("SDPA, keys repeated", False, lambda: sdpa_repeated(causal, dropout, shape)))
    found.append(("FlexAttention", False, lambda: flex(device, causal, dropout, shape)))
    found.append(("flash_attn 2", False, lambda: flash_attn_2(device, causal, dropout)))
    found.append(("flash_attn 3", False, lambda: flash_attn_3(device, causal, dropout)))
    return found


def timed(make: Callable[[], Attention], work: str, inputs: Sequence[Tensor]) -> Callable[[], Any]:
    """The call to time: the forward pass without a graph, the backward on a kept graph, or both."""
    attention = make()
    *qkv, grad = inputs
    if work == "forward":

        def forward() -> Tensor:
            with torch.no_grad():
                return attention(*qkv)

        return forward
    leaves = [x.detach().requires_grad_() for x in qkv]
    if work == "backward":
        out = attention(*leaves)
        return lambda: torch.autograd.grad(out, leaves, grad, retain_graph=True)
    return lambda: torch.autograd.grad(attention(*leaves), leaves, grad)


def main(argv: Sequence[str] | None = None) -> None:
    parser = harness.arguments(__doc__ or "", shapes=f"comma-separated, each {FORM}, or {FORM_GQA}, e.g. 1x512x32x64")
    options = harness.parse(parser, argv)
    device, gpu = options.device, options.device == "cuda"
    if options.shapes:
        shapes = [
            harness.parse_integers(parser, text, FORM_GQA if text.count("x") == 4 else FORM)
            for text in options.shapes.split(",")
        ]
    elif gpu:
        shapes = _GPU_QUICK if options.quick else _GPU
    else:
        shapes = _CPU_QUICK if options.quick else _CPU
    dtypes = harness.parse_dtypes(
        parser, options.dtypes, (["bf16"] if options.quick else ["bf16", "fp16"]) if gpu else ["fp32"]
    )

    scale = 1e12 if gpu else 1e9
    bench = harness.Benchmark(
        "attn", device, unit="TFLOP/s" if gpu else "GFLOP/s", formula=FORMULA,
        seconds=0.3 if options.quick else 1.0, rounds=10 if gpu else 3,
    )  # fmt: skip
    for name in dtypes:
        peak = harness.matrix_peak(device, harness.DTYPES[name]) / scale
        bench.notes.append(f"matrix product in {name}, measured in this run: {peak:.4g} {bench.unit}")
        for shape in shapes:
            batch, seq, heads, head_dim = shape[:4]
            kv_heads = shape[4] if len(shape) == 5 else heads
            if heads % kv_heads:
                parser.error(f"--shapes: {kv_heads} kv_heads must divide {heads} heads")
            inputs = [
                torch.randn(batch, seq, h, head_dim, device=device).to(harness.DTYPES[name])
                for h in (heads, kv_heads, kv_heads, heads)
            ]
            for causal, dropout in ((True, 0.0), (False, 0.0), (True, 0.1)):
                case = f"{'x'.join(map(str, shape))} {name} {'causal' if causal else 'full'}"
                case += f" dropout {dropout}" if dropout else ""
                flops = 4 * batch * seq**2 * heads * head_dim / (2 if causal else 1) / scale
                makers = implementations(
                    device, harness.DTYPES[name], causal, dropout, (batch, seq, heads, head_dim, kv_heads)
                )
                for work, factor in (("forward", 1.0), ("backward", 2.5), ("both", 3.5)):
                    candidates = [
                        Candidate(label, mine, lambda make=make, work=work, inputs=inputs: timed(make, work, inputs))
                        for label, mine, make in makers
                    ]
                    bench.group(case, work, factor * flops, candidates, peak)
    bench.finish(options)


if __name__ == "__main__":
    main()
