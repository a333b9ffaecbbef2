"""A training step, forward, backward and AdamW: ours against Hugging Face's PhiForCausalLM, eager and compiled.

    python bench/train.py --quick

Same shapes, weights in the benchmark's dtype, dropout off, `torch.optim.AdamW(fused=True)` for both.
"""

import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import torch
from torch import Tensor, nn

from bench import harness
from bench.harness import Candidate, Unavailable
from kernels import use_backend
from phi1.config import ModelConfig
from phi1.model import Phi1

FORM = "batch x seq x hidden x layers x vocabulary"
FORMULA = "FLOP per token = 6 x (parameters - input embedding) + 12 x layers x attention width x sequence / 2 (causal)"
HEAD_DIM = 64

_SHAPES = {
    "cuda": [(8, 2048, 2048, 24, 51200), (16, 2048, 1024, 20, 51200)],
    "cpu": [(2, 1024, 512, 8, 51200), (2, 1024, 512, 8, 4096)],
}
_QUICK = {"cuda": [(4, 2048, 1024, 20, 51200)], "cpu": [(2, 256, 512, 2, 4096)]}


def model_config(shape: Sequence[int]) -> ModelConfig:
    _, seq, hidden, layers, vocabulary = shape
    return ModelConfig(
        vocab_size=vocabulary, hidden_size=hidden, intermediate_size=4 * hidden, num_layers=layers,
        num_heads=hidden // HEAD_DIM, num_kv_heads=hidden // HEAD_DIM, head_dim=HEAD_DIM, rotary_dim=32,
        max_positions=seq, attention_dropout=0.0, residual_dropout=0.0,
    )  # fmt: skip


def step_of(model: nn.Module, loss_of: Callable[[], Tensor]) -> Callable[[], Any]:
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-4, fused=True)

    def step() -> None:
        loss_of().backward()
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)

    return step


def ours(shape: Sequence[int], tokens: Tensor, dtype: torch.dtype, backend: str | None) -> Callable[[], Any]:
    model = Phi1(model_config(shape)).to(tokens.device, dtype)
    targets = tokens.roll(-1, 1)

    def loss() -> Tensor:
        if backend is None:
            return model(tokens, targets=targets) / tokens.numel()
        with use_backend(backend):
            return model(tokens, targets=targets) / tokens.numel()

    return step_of(model, loss)


def hugging_face(shape: Sequence[int], tokens: Tensor, dtype: torch.dtype, compiled: bool) -> Callable[[], Any]:
    try:
        from transformers import PhiConfig, PhiForCausalLM
    except ImportError:
        raise Unavailable("the package transformers is not installed: pip install transformers") from None
    _, seq, hidden, layers, vocabulary = shape
    config = PhiConfig(
        vocab_size=vocabulary, hidden_size=hidden, intermediate_size=4 * hidden, num_hidden_layers=layers,
        num_attention_heads=hidden // HEAD_DIM, partial_rotary_factor=32 / HEAD_DIM, max_position_embeddings=seq,
        resid_pdrop=0.0, embd_pdrop=0.0, attention_dropout=0.0, use_cache=False, attn_implementation="sdpa",
    )  # fmt: skip
    model = PhiForCausalLM(config).to(tokens.device, dtype).train()
    run = torch.compile(model, dynamic=False) if compiled else model
    return step_of(model, lambda: run(input_ids=tokens, labels=tokens).loss)


def main(argv: Sequence[str] | None = None) -> None:
    parser = harness.arguments(__doc__ or "", shapes=f"comma-separated, each {FORM}, e.g. 2x1024x512x8x51200")
    options = harness.parse(parser, argv)
    device = options.device
    shapes = (_QUICK if options.quick else _SHAPES)[device]
    if options.shapes:
        shapes = [harness.parse_integers(parser, text, FORM) for text in options.shapes.split(",")]
    bench = harness.Benchmark(
        "train", device, unit="GFLOP/s", formula=FORMULA, seconds=1.0 if options.quick else 30.0, rounds=3
    )
    for name in harness.parse_dtypes(parser, options.dtypes, ["bf16"]):
        dtype = harness.DTYPES[name]
        peak = harness.matrix_peak(device, dtype)
        for shape in shapes:
            batch, seq, hidden, layers, vocabulary = shape
            if hidden % HEAD_DIM:
                parser.error(f"--shapes: hidden {hidden} must be a multiple of {HEAD_DIM}, the head's width")
            tokens = torch.randint(vocabulary, (batch, seq), device=device)
            with torch.device("meta"):
                model = Phi1(model_config(shape))
            parameters = sum(p.numel() for p in model.parameters()) - model.embedding.numel()
            flops = batch * seq * (6 * parameters + 6 * layers * hidden * seq)
            candidates = [
                Candidate("phi1", True, lambda shape=shape, tokens=tokens, dtype=dtype: ours(shape, tokens, dtype, None)),
                Candidate(
                    "phi1 on torch ops", True,
                    lambda shape=shape, tokens=tokens, dtype=dtype: ours(shape, tokens, dtype, "torch"),
                ),
                *(
                    Candidate(
                        f"Hugging Face {kind}", False,
                        lambda shape=shape, tokens=tokens, dtype=dtype, kind=kind: hugging_face(
                            shape, tokens, dtype, kind == "compiled"
                        ),
                    )
                    for kind in ("eager", "compiled")
                ),
            ]  # fmt: skip
            case = f"{'x'.join(map(str, shape))} {name}"
            bench.group(case, "step", flops / 1e9, candidates, peak / 1e9)
    bench.finish(options)


if __name__ == "__main__":
    main()
