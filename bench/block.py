"""One decoder layer: our backends against Hugging Face's PhiDecoderLayer and against plain PyTorch, eager and compiled.

    python bench/block.py --quick

The same weights and inputs for all, no dropout (Hugging Face's masks are PyTorch's own). Triton's layer is measured with
both forms of its matrix products, the vendor's and its own.
"""

import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import torch
from torch import Tensor

import kernels.triton
from bench import harness
from bench.harness import Candidate, Unavailable
from kernels import parallel_block, reference

FORMULA = (
    "FLOPs forward: 2 * tokens * weights of both products + 2 * batch * seq^2 * heads * head_dim (causal attention); "
    "backward: twice the products, 2.5 times attention"
)
FORM = "batch x seq x hidden x heads x head_dim x inner"

_GPU = [(8, 2048, 2048, 32, 64, 8192), (8, 2048, 1024, 16, 64, 4096)]
_CPU = [(2, 1024, 512, 8, 64, 2048)]
_QUICK = {"cuda": _GPU[:1], "cpu": [(1, 512, 512, 8, 64, 2048)]}

Layer = Callable[[Tensor], Tensor]
"""x (batch, seq, hidden) -> y, with the parameters that it was made with."""


def rotary_dim(head_dim: int) -> int:
    """Half of a head, as in phi-1 (32 of 64)."""
    return head_dim // 2


def make_parameters(shape: Sequence[int], dtype: torch.dtype, device: str) -> list[Tensor]:
    """norm_weight, norm_bias, w_in, b_in, w_out, b_out of `kernels.parallel_block`."""
    _, _, hidden, heads, head_dim, inner = shape
    attention = heads * head_dim
    sizes = [(hidden,), (hidden,), (3 * attention + inner, hidden), (3 * attention + inner,), (hidden, attention + inner), (hidden,)]  # fmt: skip
    return [(0.02 * torch.randn(size, device=device)).to(dtype).requires_grad_() for size in sizes]


def ours(backend: str, shape: Sequence[int], parameters: Sequence[Tensor], product: str | None = None) -> Layer:
    """product: the form of Triton's matrix products (`kernels.triton.CHOICES`)."""
    _, seq, _, heads, head_dim, _ = shape
    cos, sin = reference.rotary_table(seq, rotary_dim(head_dim), device=parameters[0].device)

    def layer(x: Tensor) -> Tensor:
        if product is not None:
            kernels.triton.CHOICES["block_product"] = product
        return parallel_block(x, *parameters, cos, sin, heads=heads, kv_heads=heads, head_dim=head_dim, backend=backend)

    return layer


def hugging_face(shape: Sequence[int], parameters: Sequence[Tensor]) -> tuple[Layer, list[Tensor]]:
    """PhiDecoderLayer with our weights, and its parameters."""
    try:
        from transformers import PhiConfig
        from transformers.models.phi.modeling_phi import PhiDecoderLayer
    except ImportError as error:
        raise Unavailable(f"transformers cannot be imported ({error})") from error
    _, seq, hidden, heads, head_dim, inner = shape
    if heads * head_dim != hidden:
        raise Unavailable(f"heads * head_dim = {heads * head_dim}: PhiDecoderLayer takes hidden, {hidden}")
    config = PhiConfig(
        hidden_size=hidden, intermediate_size=inner, num_attention_heads=heads, num_hidden_layers=1,
        partial_rotary_factor=rotary_dim(head_dim) / head_dim, attention_dropout=0.0, resid_pdrop=0.0,
        attn_implementation="sdpa",
    )  # fmt: skip
    norm_weight, norm_bias, w_in, b_in, w_out, b_out = (p.detach() for p in parameters)
    layer = PhiDecoderLayer(config, 0).to(w_in.dtype).to(w_in.device)
    attention, mlp = layer.self_attn, layer.mlp
    sizes = [hidden, hidden, hidden, inner]
    with torch.no_grad():
        layer.input_layernorm.weight.copy_(norm_weight)
        layer.input_layernorm.bias.copy_(norm_bias)
        linears = (attention.q_proj, attention.k_proj, attention.v_proj, mlp.fc1)
        for linear, weight, bias in zip(linears, w_in.split(sizes), b_in.split(sizes), strict=True):
            linear.weight.copy_(weight)
            linear.bias.copy_(bias)
        for linear, weight in zip((attention.dense, mlp.fc2), w_out.split([hidden, inner], dim=1), strict=True):
            linear.weight.copy_(weight)
        attention.dense.bias.copy_(b_out)
        mlp.fc2.bias.zero_()
    tables = reference.rotary_table(seq, rotary_dim(head_dim), device=w_in.device)
    angles = tuple(torch.cat([t, t], -1)[None].to(w_in.dtype) for t in tables)

    def run(x: Tensor) -> Tensor:
        y = layer(x, attention_mask=None, position_embeddings=angles)
        return y[0] if isinstance(y, tuple) else y

    return run, list(layer.parameters())


def implementations(
    shape: Sequence[int], dtype: torch.dtype, device: str, parameters: list[Tensor]
) -> list[tuple[str, bool, Callable[[], tuple[Layer, list[Tensor]]]]]:
    """(name, ours?, maker of the layer and its parameters) of all that take part."""
    found: list[tuple[str, bool, Callable[[], tuple[Layer, list[Tensor]]]]] = []

    def add(name: str, mine: bool, reason: str | None, make: Callable[[], tuple[Layer, list[Tensor]]]) -> None:
        def made() -> tuple[Layer, list[Tensor]]:
            if reason is not None:
                raise Unavailable(reason)
            return make()

        found.append((name, mine, made))

    options = {"dtype": dtype, "head_dim": shape[4], "hidden": shape[2], "inner": shape[5]}
    for backend, reason in harness.our_backends("parallel_block", device, **options):
        if backend == "torch":
            continue  # plain PyTorch is a peer here, below
        for product in ("vendor", "triton") if backend == "triton" else (None,):
            name = f"phi1 {backend}" + (f", {product} product" if product else "")
            add(name, True, reason, lambda b=backend, p=product: (ours(b, shape, parameters, p), parameters))
    plain = lambda: ours("torch", shape, parameters)  # noqa: E731
    add("plain PyTorch", False, None, lambda: (plain(), parameters))
    add("plain PyTorch compiled", False, None, lambda: (torch.compile(plain(), dynamic=False), parameters))
    add("Hugging Face", False, None, lambda: hugging_face(shape, parameters))

    def compiled() -> tuple[Layer, list[Tensor]]:
        layer, own = hugging_face(shape, parameters)
        return torch.compile(layer, dynamic=False), own

    add("Hugging Face compiled", False, None, compiled)
    return found


def timed(make: Callable[[], tuple[Layer, list[Tensor]]], work: str, x: Tensor, grad: Tensor) -> Callable[[], Any]:
    """The call to time: the forward pass without a graph, or forward and backward to x and every parameter."""
    layer, parameters = make()
    if work == "forward":

        def forward() -> Tensor:
            with torch.no_grad():
                return layer(x)

        return forward
    leaf = x.detach().requires_grad_()
    return lambda: torch.autograd.grad(layer(leaf), [leaf, *parameters], grad)


def main(argv: Sequence[str] | None = None) -> None:
    parser = harness.arguments(__doc__ or "", shapes=f"comma-separated, each {FORM}, e.g. 2x1024x512x8x64x2048")
    options = harness.parse(parser, argv)
    device, gpu = options.device, options.device == "cuda"
    shapes = _QUICK[device] if options.quick else {"cuda": _GPU, "cpu": _CPU}[device]
    if options.shapes:
        shapes = [harness.parse_integers(parser, text, FORM) for text in options.shapes.split(",")]
    dtypes = harness.parse_dtypes(parser, options.dtypes, ["bf16"] if gpu else ["fp32", "bf16"])
    scale = 1e12 if gpu else 1e9
    bench = harness.Benchmark(
        "block", device, unit="TFLOP/s" if gpu else "GFLOP/s", formula=FORMULA,
        seconds=0.3 if options.quick else 2.0, rounds=10 if gpu else 3,
    )  # fmt: skip
    for name in dtypes:
        dtype = harness.DTYPES[name]
        peak = harness.matrix_peak(device, dtype) / scale
        bench.notes.append(f"matrix product in {name}, measured in this run: {peak:.4g} {bench.unit}")
        for shape in shapes:
            batch, seq, hidden, heads, head_dim, inner = shape
            x, grad = (torch.randn(batch, seq, hidden, device=device).to(dtype) for _ in range(2))
            parameters = make_parameters(shape, dtype, device)
            weights = hidden * (3 * heads * head_dim + inner) + (heads * head_dim + inner) * hidden
            products = 2 * batch * seq * weights / scale
            attention = 2 * batch * seq**2 * heads * head_dim / scale
            makers = implementations(shape, dtype, device, parameters)
            for work, flops in (
                ("forward", products + attention),
                ("forward + backward", 3 * products + 3.5 * attention),
            ):
                candidates = [
                    Candidate(label, mine, lambda make=make, work=work, x=x, grad=grad: timed(make, work, x, grad))
                    for label, mine, make in makers
                ]
                bench.group(f"{'x'.join(map(str, shape))} {name}", work, flops, candidates, peak)
    bench.finish(options)


if __name__ == "__main__":
    main()
