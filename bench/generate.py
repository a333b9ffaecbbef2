"""`phi1 generate` against `transformers.generate`: a batch of 16 prompts, equal and unequal, greedy.

    python bench/generate.py --quick

The model is phi-1's architecture with random weights, exported for transformers, which runs it with `sdpa` and its
dynamic cache; unequal prompts, between a quarter and the whole of the length, it gets padded on the left. Both write as
many new tokens for each prompt; <|endoftext|> is never chosen. Where the greedy tokens are not the same the run fails.
"""

import sys
import tempfile
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import torch

from bench import suite
from bench.harness import Candidate, Unavailable
from bench.suite import Case, Shape
from bench.train import HEAD_DIM, check
from phi1 import generate
from phi1.config import ModelConfig
from phi1.huggingface import export_folder
from phi1.model import Phi1
from phi1.tokenizer import Tokenizer, train_tokenizer

BATCH = 16


def made(shape: Shape, device: str, dtype: torch.dtype) -> tuple[Phi1, Tokenizer]:
    """A model whose greedy tokens are no matter of rounding, and a tokenizer with an id for each of its rows."""
    prompt, new, hidden, layers, vocabulary = shape
    tokenizer = train_tokenizer(["def f(x):\n    return x + 1\n"] * 4, 320)
    heads = hidden // HEAD_DIM
    torch.manual_seed(0)
    with torch.device(device):
        model = Phi1(
            ModelConfig(
                vocab_size=vocabulary,
                hidden_size=hidden,
                intermediate_size=4 * hidden,
                num_layers=layers,
                num_heads=heads,
                num_kv_heads=heads,
                head_dim=HEAD_DIM,
                rotary_dim=32,
                max_positions=prompt + new,
                initializer_range=0.1,
            )
        ).eval()
    with torch.no_grad():  # nothing else than text is chosen, and no end of it
        model.head_bias[tokenizer.vocab_size :] = -1e4
        model.head_bias[tokenizer.eot_id] = -1e4
    return model.to(dtype), tokenizer


def ours(model: Phi1, tokenizer: Tokenizer, prompts: list[str], new: int) -> list[str]:
    return generate.complete(model, tokenizer, prompts, max_new_tokens=new, batch_size=BATCH)


def theirs(model: Phi1, tokenizer: Tokenizer, prompts: list[str], new: int) -> Callable[[], list[str]]:
    try:
        import transformers
    except ImportError:
        raise Unavailable("the package transformers is not installed: pip install transformers") from None
    with tempfile.TemporaryDirectory() as folder:
        export_folder(f"{folder}/hf", model, tokenizer)
        network: Any = transformers.AutoModelForCausalLM.from_pretrained(f"{folder}/hf", attn_implementation="sdpa")
        text = transformers.AutoTokenizer.from_pretrained(f"{folder}/hf")
    network = network.to(model.embedding.device).eval()

    def run() -> list[str]:
        inputs = text(prompts, padding=True, return_tensors="pt").to(network.device)
        out = network.generate(**inputs, max_new_tokens=new, min_new_tokens=new, do_sample=False)
        return [tokenizer.decode(row) for row in out[:, inputs["input_ids"].shape[1] :].tolist()]

    return run


def cases(device: str, dtype: str, shape: Shape) -> Iterator[Case]:
    prompt, new, *_ = shape
    model, tokenizer = made(shape, device, suite.DTYPES[dtype])
    letters = "qwertyuiopasdfgh"
    lengths = {"equal": [prompt] * BATCH, "unequal": torch.linspace(prompt // 4, prompt, BATCH).long().tolist()}
    for name, of in lengths.items():
        # No two letters stand together in the tokenizer's text: each is a token.
        prompts = [("".join(letters[(i + j * j) % 16] for j in range(n))) for i, n in enumerate(of)]
        assert [len(ids) for ids in tokenizer.encode_batch(prompts)] == of

        def make(_: str, prompts: list[str] = prompts, mine: bool = True) -> Callable[[], list[str]]:
            run = partial(ours, model, tokenizer, prompts, new)
            if mine:
                return run
            other = theirs(model, tokenizer, prompts, new)
            if dtype == "fp32" and other() != run():
                raise AssertionError("the greedy tokens differ")
            return other

        candidates = [
            Candidate("phi1 generate", True, make),
            Candidate("transformers.generate", False, partial(make, mine=False)),
        ]
        yield Case(f"{name} prompts", {"new tokens": BATCH * new}, candidates)


SUITE = suite.Suite(
    name="generate",
    description=__doc__ or "",
    form="prompt x new x hidden x layers x vocabulary",
    formula=f"new tokens of {BATCH} prompts, all of them, per second",
    shapes={"cuda": [(512, 128, 2048, 24, 51200)], "cpu": [(128, 64, 1024, 20, 51200), (64, 64, 512, 8, 4096)]},
    quick_shapes={"cuda": [(128, 32, 1024, 4, 51200)], "cpu": [(32, 8, 256, 2, 4096)]},
    dtypes={"cuda": ["bf16"], "cpu": ["fp32", "bf16"]},
    cases=cases,
    check=check,
    quantity="tokens",
    seconds=(1.0, 30.0),
    rounds={"cuda": 3, "cpu": 3},
)

if __name__ == "__main__":
    suite.main(SUITE)
