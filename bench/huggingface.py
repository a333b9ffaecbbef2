"""Our attention in a transformers model, `attn_implementation="phi1"`, against `sdpa` and `eager`: prefill and training
step.

    python bench/huggingface.py --quick

The model is a Llama of SmolLM2-135M's shape (30 layers, 9 heads of 64 on 3 key/value heads, vocabulary 49,152) with
random weights; all three implementations run the same one. "prefill" makes the logits of the last token, as generation
does; "step" is forward, backward and AdamW with attention dropout 0. "padded" cases have prompts between half and the
whole of the sequence, padded on the left.
"""

import functools
import sys
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import torch
from torch import Tensor

from bench import suite
from bench.harness import Candidate, Unavailable
from bench.suite import Case, Shape

HIDDEN, HEADS, KV_HEADS, INNER, VOCABULARY = 576, 9, 3, 1536, 49152
FORMULA = (
    "FLOP per token = 2 x (weights of the layers) + 4 x layers x attention width x sequence / 2 (causal), three times "
    "that and lm_head in a step; padding counts as tokens"
)


def llama(shape: Sequence[int], device: str, dtype: torch.dtype) -> Any:
    """The model on its device; which attention it takes is set before each call."""
    try:
        import transformers
    except ImportError:
        raise Unavailable("the package transformers is not installed: pip install transformers") from None
    from phi1.huggingface import register_attention

    register_attention()
    _, seq, layers = shape
    config = transformers.LlamaConfig(
        vocab_size=VOCABULARY,
        hidden_size=HIDDEN,
        intermediate_size=INNER,
        num_hidden_layers=layers,
        num_attention_heads=HEADS,
        num_key_value_heads=KV_HEADS,
        max_position_embeddings=seq,
        tie_word_embeddings=True,
        bos_token_id=0,
        eos_token_id=0,
        use_cache=False,
    )
    torch.manual_seed(0)
    with torch.device(device):
        return transformers.LlamaForCausalLM(config).to(dtype)


def call(
    implementation: str, model: Callable[[], Any], tokens: Tensor, mask: Tensor | None, work: str
) -> Callable[[], Any]:
    """The call to time."""
    network = model()
    inputs = {"input_ids": tokens, "attention_mask": mask}
    if work == "prefill":

        def prefill() -> None:
            network.set_attn_implementation(implementation)
            with torch.no_grad():
                network.eval()(**inputs, logits_to_keep=1)

        return prefill
    labels = tokens if mask is None else tokens.masked_fill(mask == 0, -100)
    optimizer = torch.optim.AdamW(network.parameters(), lr=1e-5, fused=True)

    def step() -> None:
        network.set_attn_implementation(implementation)
        network.train()(**inputs, labels=labels).loss.backward()
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)

    return step


def cases(device: str, dtype: str, shape: Shape) -> Iterator[Case]:
    batch, seq, layers = shape
    tokens = torch.randint(1, VOCABULARY, (batch, seq), device=device)
    made: list[Any] = []

    def model() -> Any:
        if not made:
            made.append(llama(shape, device, suite.DTYPES[dtype]))
        return made[0]

    layer = HIDDEN * (2 * HIDDEN + 2 * 64 * KV_HEADS + 3 * INNER)
    flops = batch * seq * layers * (2 * layer + 2 * HIDDEN * seq)
    works: dict[str, float] = {"prefill": flops, "step": 3 * (flops + 2 * batch * seq * HIDDEN * VOCABULARY)}
    lengths = torch.linspace(seq // 2, seq, batch).long()
    padded = (torch.arange(seq) >= seq - lengths[:, None]).long().to(device)
    for case, mask in (("", None), ("padded", padded)):
        candidates = [
            Candidate(name, name == "phi1", functools.partial(call, name, model, tokens, mask))
            for name in ("phi1", "sdpa", "eager")
        ]
        yield Case(case, works, candidates)


SUITE = suite.Suite(
    name="huggingface",
    description=__doc__ or "",
    form="batch x seq x layers",
    formula=FORMULA,
    shapes={"cuda": [(8, 2048, 30), (1, 8192, 30)], "cpu": [(4, 512, 30), (1, 2048, 30)]},
    quick_shapes={"cuda": [(4, 1024, 4)], "cpu": [(2, 256, 2)]},
    dtypes={"cuda": ["bf16"], "cpu": ["fp32", "bf16"]},
    cases=cases,
    seconds=(1.0, 30.0),
    rounds={"cuda": 5, "cpu": 3},
)

if __name__ == "__main__":
    suite.main(SUITE)
