"""One decoder layer: our backends against Hugging Face's PhiDecoderLayer and against plain PyTorch, eager and compiled.

    python bench/block.py --quick

The same weights and inputs for all, no dropout (Hugging Face's masks are PyTorch's own).
"""

import sys
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import torch
from torch import Tensor

from bench import suite
from bench.harness import Candidate, Unavailable
from bench.suite import Case, Shape
from kernels import BlockShape, parallel_block, reference
from kernels.measured import size_class

FORMULA = (
    "FLOPs forward: 2 * tokens * weights of both products + 2 * batch * seq^2 * heads * head_dim (causal attention); "
    "backward: twice the products, 2.5 times attention"
)
FORM = "batch x seq x hidden x heads x head_dim x inner"

Layer = Callable[[Tensor], Tensor]
"""x (batch, seq, hidden) -> y, with the parameters that it was made with."""


def rotary_dim(head_dim: int) -> int:
    """Half of a head, as in phi-1 (32 of 64)."""
    return head_dim // 2


def make_parameters(shape: Sequence[int], dtype: torch.dtype, device: str) -> list[Tensor]:
    """norm_weight, norm_bias, w_in, b_in, w_out, b_out of `kernels.parallel_block`."""
    _, _, hidden, heads, head_dim, inner = shape
    attention = heads * head_dim
    sizes = [
        (hidden,),
        (hidden,),
        (3 * attention + inner, hidden),
        (3 * attention + inner,),
        (hidden, attention + inner),
        (hidden,),
    ]
    return [(0.02 * torch.randn(size, device=device)).to(dtype).requires_grad_() for size in sizes]


def ours(version: str | None, shape: Sequence[int], parameters: Sequence[Tensor]) -> tuple[Layer, list[Tensor]]:
    """Our layer, by a version or, None, by automatic choice, and its parameters."""
    _, seq, _, heads, head_dim, _ = shape
    cos, sin = reference.rotary_table(seq, rotary_dim(head_dim), device=parameters[0].device)

    def layer(x: Tensor) -> Tensor:
        norm_weight, norm_bias, w_in, b_in, w_out, b_out = parameters
        return parallel_block(
            x,
            norm_weight,
            norm_bias,
            w_in,
            b_in,
            w_out,
            b_out,
            cos,
            sin,
            BlockShape(heads, heads, head_dim),
            backend=version,
        )

    return layer, list(parameters)


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
        hidden_size=hidden,
        intermediate_size=inner,
        num_attention_heads=heads,
        num_hidden_layers=1,
        partial_rotary_factor=rotary_dim(head_dim) / head_dim,
        attention_dropout=0.0,
        resid_pdrop=0.0,
        attn_implementation="sdpa",
    )
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


def candidates(device: str, shape: Shape, parameters: list[Tensor], x: Tensor, grad: Tensor) -> list[Candidate]:
    """All that take part."""
    found: list[Candidate] = []

    def add(
        name: str,
        make: Callable[[], tuple[Layer, list[Tensor]]],
        compiled: bool = False,
        mine: bool = False,
        unavailable: str | None = None,
        version: str | None = None,
        chosen: Callable[[str], str] | None = None,
    ) -> None:
        def made(work: str) -> Callable[[], Any]:
            layer, own = make()
            return suite.timed(torch.compile(layer, dynamic=False) if compiled else layer, [x], grad, work, own)

        found.append(Candidate(name, mine, made, unavailable, version, chosen))

    options: dict[str, Any] = {"dtype": x.dtype, "head_dim": shape[4], "hidden": shape[2], "inner": shape[5]}
    options["rotary_dim"] = rotary_dim(shape[4])
    automatic = partial(suite.automatic_choice, "parallel_block", device, size=size_class(shape[1]), **options)
    add("phi1", partial(ours, None, shape, parameters), mine=True, chosen=automatic)
    for version, reason in suite.our_backends("parallel_block", device, **options):
        if version != "torch":  # plain PyTorch is a peer here, below
            make = partial(ours, version, shape, parameters)
            add(f"phi1 {version}", make, mine=True, unavailable=reason, version=version)
    plain = partial(ours, "torch", shape, parameters)
    add("plain PyTorch", plain, version="torch")
    add("plain PyTorch compiled", plain, compiled=True)
    for compiled in (False, True):
        add("Hugging Face" + " compiled" * compiled, partial(hugging_face, shape, parameters), compiled)
    return found


def cases(device: str, dtype: str, shape: Shape) -> Iterator[Case]:
    batch, seq, hidden, heads, head_dim, inner = shape
    x, grad = (torch.randn(batch, seq, hidden, device=device).to(suite.DTYPES[dtype]) for _ in range(2))
    parameters = make_parameters(shape, suite.DTYPES[dtype], device)
    weights = hidden * (3 * heads * head_dim + inner) + (heads * head_dim + inner) * hidden
    products = 2 * batch * seq * weights
    attention = 2 * batch * seq**2 * heads * head_dim
    works = {"forward": products + attention, "forward + backward": 3 * products + 3.5 * attention}
    yield Case("", works, candidates(device, shape, parameters, x, grad), size_class(seq))


_GPU: list[Shape] = [(8, 2048, 2048, 32, 64, 8192), (8, 2048, 1024, 16, 64, 4096)]
SUITE = suite.Suite(
    name="block",
    description=__doc__ or "",
    form=FORM,
    formula=FORMULA,
    shapes={"cuda": _GPU, "cpu": [(2, 1024, 512, 8, 64, 2048)]},
    quick_shapes={"cuda": _GPU[:1], "cpu": [(1, 512, 512, 8, 64, 2048)]},
    dtypes={"cuda": ["bf16"], "cpu": ["fp32", "bf16"]},
    cases=cases,
)

if __name__ == "__main__":
    suite.main(SUITE)
