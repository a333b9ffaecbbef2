"""Attention: our backends against PyTorch's, FlexAttention, flash_attn and zentorch, on the same inputs in one run.

    python bench/attn.py --quick

Layout (batch, seq, heads, head_dim) for all: peers that want heads first get the transposed view, as a model
would pass it. Dropout masks differ between libraries; their cost does not depend on the values.
Beside whole sequences the last 1, 4 and 16 queries after a cache of the others are measured.
"""

import sys
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

from bench import suite
from bench.harness import Unavailable
from bench.suite import Case, Shape
from kernels import flash_attention
from kernels.measured import size_class

FORMULA = "FLOPs: forward 4·B·S²·H·D, backward 2.5 times that, halved if causal"
FORM = "batch x seq x heads x head_dim [x kv_heads]"

Attention = Callable[[Tensor, Tensor, Tensor], Tensor]


def sdpa(kernel: SDPBackend | None, causal: bool, dropout: float, shape: Sequence[int]) -> Attention:
    """scaled_dot_product_attention held to one of its kernels, or its own choice (None)."""
    batch, seq, heads, _, kv_heads = shape
    gib = 4 * batch * heads * seq**2 / 2**30
    if kernel is SDPBackend.MATH and gib > 2:
        raise Unavailable(f"its score matrix would take {gib:.0f} GiB (limit 2)")

    def run(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        q, k, v = (x.transpose(1, 2) for x in (q, k, v))
        return F.scaled_dot_product_attention(
            q, k, v, dropout_p=dropout, is_causal=causal, enable_gqa=kv_heads != heads
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
        q, k, v = (x.transpose(1, 2) for x in (q, k, v))
        return F.scaled_dot_product_attention(q, k, v, dropout_p=dropout, is_causal=causal).transpose(1, 2)

    return run


def flex(device: str, causal: bool, dropout: float, shape: Sequence[int]) -> Attention:
    """FlexAttention, compiled."""
    if device != "cuda":
        raise Unavailable("compared on a GPU only")
    if dropout > 0:
        raise Unavailable("it has no dropout")
    import torch._dynamo.config
    import torch._functorch.config
    from torch.nn.attention.flex_attention import create_block_mask, flex_attention

    torch._dynamo.config.recompile_limit = (
        256  # at the ninth shape it would run unfused, and be listed as what it is not
    )
    torch._functorch.config.donated_buffer = False  # the backward is timed many times on one graph
    seq = shape[1]
    mask = create_block_mask(lambda b, h, i, j: j <= i, None, None, seq, seq, device=device) if causal else None
    compiled = torch.compile(flex_attention, dynamic=False)
    gqa = shape[2] != shape[4]

    def run(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        q, k, v = (x.transpose(1, 2) for x in (q, k, v))
        return compiled(q, k, v, block_mask=mask, enable_gqa=gqa).transpose(1, 2)

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


def flash_attn_4(device: str, causal: bool, dropout: float) -> Attention:
    try:
        from flash_attn.cute import flash_attn_func
    except ImportError as error:
        raise Unavailable(f"FlashAttention-4's flash_attn.cute cannot be imported ({error})") from error
    if device != "cuda":
        raise Unavailable("it takes CUDA tensors only")
    if dropout > 0:
        raise Unavailable("it has no dropout")

    def run(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        result = flash_attn_func(q, k, v, causal=causal)
        return result[0] if isinstance(result, tuple) else result

    return run


def zentorch(device: str, causal: bool, dropout: float, shape: Sequence[int]) -> Attention:
    """AMD's plug-in for PyTorch on its CPUs: the attention that its compiler puts where a model calls SDPA."""
    if device != "cpu":
        raise Unavailable("it takes CPU tensors only")
    try:
        import zentorch  # noqa: F401 (registers torch.ops.zentorch)
    except ImportError as error:
        raise Unavailable(f"zentorch cannot be imported ({error})") from error
    if shape[2] != shape[4]:
        raise Unavailable("it takes as many kv_heads as heads")

    def run(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        if q.requires_grad:
            raise Unavailable("it has no backward")
        q, k, v = (x.transpose(1, 2) for x in (q, k, v))
        out: Tensor = torch.ops.zentorch.zentorch_sdpa(q, k, v, dropout, causal)[0]
        return out.transpose(1, 2)

    return run


def peers(device: str, causal: bool, dropout: float, shape: Shape) -> dict[str, Callable[[], Attention]]:
    """By name, what makes each. shape: with kv_heads."""
    kernels: dict[str, SDPBackend | None] = {"SDPA": None, "SDPA math": SDPBackend.MATH}
    if device == "cuda":
        kernels |= {
            "SDPA flash": SDPBackend.FLASH_ATTENTION,
            "SDPA cuDNN": SDPBackend.CUDNN_ATTENTION,
            "SDPA mem-efficient": SDPBackend.EFFICIENT_ATTENTION,
        }
    found: dict[str, Callable[[], Attention]] = {
        name: partial(sdpa, kernel, causal, dropout, shape) for name, kernel in kernels.items()
    }
    if shape[2] != shape[4]:
        found["SDPA, keys repeated"] = partial(sdpa_repeated, causal, dropout, shape)
    found["FlexAttention"] = partial(flex, device, causal, dropout, shape)
    found["flash_attn 2"] = partial(flash_attn_2, device, causal, dropout)
    found["flash_attn 3"] = partial(flash_attn_3, device, causal, dropout)
    found["flash_attn 4"] = partial(flash_attn_4, device, causal, dropout)
    found["zentorch"] = partial(zentorch, device, causal, dropout, shape)
    return found


def sdpa_of_last(queries: int) -> Attention:
    """scaled_dot_product_attention of the last queries of a sequence, whose keys are in a cache."""

    def run(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        keys = k.shape[1]
        mask = None if queries == 1 else q.new_ones(queries, keys, dtype=torch.bool).tril(keys - queries)
        q, k, v = (x.transpose(1, 2) for x in (q, k, v))
        gqa = q.shape[1] != k.shape[1]
        return F.scaled_dot_product_attention(q, k, v, attn_mask=mask, enable_gqa=gqa).transpose(1, 2)

    return run


def cases(device: str, dtype: str, shape: Shape) -> Iterator[Case]:
    batch, seq, heads, head_dim, *rest = shape
    kv_heads = rest[0] if rest else heads
    *inputs, grad = (
        torch.randn(batch, seq, h, head_dim, device=device).to(suite.DTYPES[dtype])
        for h in (heads, kv_heads, kv_heads, heads)
    )
    # cuDNN's dropout resolves p to 1/16 only, so that PyTorch takes it for 0.125 and not for phi-1's 0.1.
    for causal, dropout in ((True, 0.0), (False, 0.0), (True, 0.1), *(((True, 0.125),) if device == "cuda" else ())):
        flops = 4 * batch * seq**2 * heads * head_dim / (2 if causal else 1)
        ours = partial(flash_attention, causal=causal, dropout_p=dropout, dropout_seed=1)
        candidates = suite.op_candidates(
            "flash_attention",
            device,
            ours,
            peers(device, causal, dropout, (*shape[:4], kv_heads)),
            inputs,
            grad,
            head_dim=head_dim,
            size=size_class(seq),
            dropout_p=dropout,
            return_lse=False,
        )
        name = ("causal" if causal else "full") + (f" dropout {dropout}" if dropout else "")
        yield Case(name, {"forward": flops, "backward": 2.5 * flops, "both": 3.5 * flops}, candidates, size_class(seq))
    for queries in (1, 4, 16) if seq > 16 else ():
        few = [inputs[0][:, :queries], *inputs[1:]]
        last: dict[str, Callable[[], Attention]] = {"SDPA": partial(sdpa_of_last, queries)}
        candidates = suite.op_candidates(
            "flash_attention", device, flash_attention, last, few, head_dim=head_dim, size=size_class(queries, seq)
        )
        works = {"forward": 4.0 * batch * queries * seq * heads * head_dim}
        yield Case(f"{queries} after a cache", works, candidates, size_class(queries, seq))


def check(shape: Shape) -> str | None:
    wrong = len(shape) == 5 and shape[2] % shape[4] != 0
    return f"{shape[4]} kv_heads must divide {shape[2]} heads" if wrong else None


SUITE = suite.Suite(
    name="attn",
    description=__doc__ or "",
    form=FORM,
    formula=FORMULA,
    # phi-1: 32 heads of 64, phi-1-small: 16 heads of 64; 16k tokens on a GPU whatever the length, as in
    # FlashAttention's benchmark.
    shapes={
        "cuda": [(16384 // s, s, h, 64) for h in (32, 16) for s in (512, 1024, 2048, 4096, 8192, 16384)],
        "cpu": [(1, 512, 32, 64), (1, 1024, 32, 64), (1, 2048, 16, 64)],
    },
    quick_shapes={
        "cuda": [(8, 2048, 32, 64), (1, 16384, 32, 64), (8, 2048, 16, 64)],
        "cpu": [(1, 512, 32, 64), (1, 512, 16, 64)],
    },
    dtypes={"cuda": ["bf16", "fp16"], "cpu": ["fp32"]},
    cases=cases,
    check=check,
    seconds=(0.3, 1.0),
)

if __name__ == "__main__":
    suite.main(SUITE)
