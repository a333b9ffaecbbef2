"""A training step: ours against Hugging Face's and plain torch's, eager and compiled.

    python bench/train.py --quick

"step": forward, backward and AdamW (`torch.optim.AdamW(fused=True)`) of our model and of Hugging Face's PhiForCausalLM
with weights in the benchmark's dtype, without dropout and with phi-1's 0.1 of attention and residual. "loop": a step of
a whole training loop in mixed precision, with that dropout: phi1's Trainer, Hugging Face's, and nanoGPT's loop in plain
torch (bench/loops.py).
"""

import sys
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import torch
from torch import Tensor, nn

from bench import loops, suite
from bench.harness import Candidate, Unavailable
from bench.suite import Case, Shape
from kernels import use_backend
from phi1.config import ModelConfig
from phi1.model import Phi1

FORMULA = "FLOP per token = 6 x (parameters - input embedding) + 12 x layers x attention width x sequence / 2 (causal)"
HEAD_DIM = 64


def model_config(shape: Sequence[int], dropout: float = 0.0) -> ModelConfig:
    _, seq, hidden, layers, vocabulary = shape
    return ModelConfig(
        vocab_size=vocabulary,
        hidden_size=hidden,
        intermediate_size=4 * hidden,
        num_layers=layers,
        num_heads=hidden // HEAD_DIM,
        num_kv_heads=hidden // HEAD_DIM,
        head_dim=HEAD_DIM,
        rotary_dim=32,
        max_positions=seq,
        attention_dropout=dropout,
        residual_dropout=dropout,
    )


def step_of(model: nn.Module, loss_of: Callable[[], Tensor]) -> Callable[[], Any]:
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-4, fused=True)

    def step() -> None:
        loss_of().backward()
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)

    return step


def ours(
    shape: Sequence[int], tokens: Tensor, dtype: torch.dtype, dropout: float, backend: str | None
) -> Callable[[], Any]:
    with tokens.device:  # a GPU draws 1.3G weights in no time, a CPU does not
        model = Phi1(model_config(shape, dropout)).to(dtype)
    targets = tokens.roll(-1, 1)

    def loss() -> Tensor:
        if backend is None:
            return model(tokens, targets=targets) / tokens.numel()
        with use_backend(backend):
            return model(tokens, targets=targets) / tokens.numel()

    return step_of(model, loss)


def hugging_face(
    shape: Sequence[int], tokens: Tensor, dtype: torch.dtype, dropout: float, compiled: bool
) -> Callable[[], Any]:
    try:
        from transformers import PhiForCausalLM
    except ImportError:
        raise Unavailable("the package transformers is not installed: pip install transformers") from None
    with tokens.device:
        model = PhiForCausalLM(loops.phi_config(model_config(shape, dropout)))
    model = model.to(dtype).train()
    run = torch.compile(model, dynamic=False) if compiled else model
    return step_of(model, lambda: run(input_ids=tokens, labels=tokens).loss)


def _make(of: Callable[[Any], Callable[[], Any]], option: Any, _: str) -> Callable[[], Any]:
    return of(option)


def _loop(
    of: Callable[..., Callable[[], Any]],
    config: ModelConfig,
    batch: int,
    device: str,
    dtype: str,
    compiled: bool,
    _: str,
) -> Callable[[], Any]:
    return of(config, batch, device, dtype, compiled=compiled)


def cases(device: str, dtype: str, shape: Shape) -> Iterator[Case]:
    batch, seq, hidden, layers, vocabulary = shape
    precision = suite.DTYPES[dtype]
    tokens = torch.randint(vocabulary, (batch, seq), device=device)
    with torch.device("meta"):
        model = Phi1(model_config(shape))
    parameters = sum(p.numel() for p in model.parameters()) - model.embedding.numel()
    flops = batch * seq * (6 * parameters + 6 * layers * hidden * seq)
    for dropout in (0.0, 0.1):
        mine = partial(ours, shape, tokens, precision, dropout)
        theirs = partial(hugging_face, shape, tokens, precision, dropout)
        backends = suite.our_backends(
            "parallel_block", device, dtype=precision, head_dim=HEAD_DIM, hidden=hidden, inner=4 * hidden, rotary_dim=32
        )
        attention = dict(
            suite.our_backends("flash_attention", device, dtype=precision, head_dim=HEAD_DIM, dropout_p=dropout)
        )
        candidates = [
            Candidate("phi1", True, partial(_make, mine, None)),
            *(
                Candidate(f"phi1 on {backend}", True, partial(_make, mine, backend), reason or attention.get(backend))
                for backend, reason in backends
            ),
            Candidate("Hugging Face eager", False, partial(_make, theirs, False)),
            Candidate("Hugging Face compiled", False, partial(_make, theirs, True)),
        ]
        yield Case(f"dropout {dropout}" if dropout else "", {"step": flops}, candidates)
    config = model_config(shape, 0.1)
    loop_candidates = [
        Candidate(
            f"{name}{', compiled' * compiled}",
            name == "phi1 Trainer",
            partial(_loop, of, config, batch, device, dtype, compiled),
        )
        for name, of in (
            ("phi1 Trainer", loops.phi1),
            ("Hugging Face Trainer", loops.hugging_face),
            ("nanoGPT's loop", loops.nanogpt),
        )
        for compiled in (False, True)
    ]
    yield Case("dropout 0.1", {"loop": loops.MICRO_BATCHES * flops}, loop_candidates)


def check(shape: Shape) -> str | None:
    return f"hidden must be a multiple of {HEAD_DIM}, the head's width" if shape[2] % HEAD_DIM else None


SUITE = suite.Suite(
    name="train",
    description=__doc__ or "",
    form="batch x seq x hidden x layers x vocabulary",
    formula=FORMULA,
    shapes={
        "cuda": [(8, 2048, 2048, 24, 51200), (16, 2048, 1024, 20, 51200)],
        "cpu": [(2, 1024, 512, 8, 51200), (2, 1024, 512, 8, 4096)],
    },
    quick_shapes={"cuda": [(4, 2048, 1024, 20, 51200)], "cpu": [(2, 256, 512, 2, 4096)]},
    dtypes={"cuda": ["bf16"], "cpu": ["bf16"]},
    cases=cases,
    check=check,
    seconds=(1.0, 30.0),
    rounds={"cuda": 3, "cpu": 3},
)

if __name__ == "__main__":
    suite.main(SUITE)
