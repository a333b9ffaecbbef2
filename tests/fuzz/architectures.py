"""Every causal model of the installed transformers, tiny and random, with our attention against `eager`:
`python tests/fuzz/architectures.py [model type ...]`.

Four calls each: plain, padded on the left, on the right, and greedy generation. Prints a line a model: the calls that
agree, those that are refused in one line (UserError), those in which transformers itself fails, and why a model could
not be made small. Ends with status 1 if any call differs by more than twice what transformers' own `sdpa` differs, or
ends in another exception than ours. About five minutes.
"""

import copy
import os
import pathlib
import signal
import sys
from collections.abc import Callable, Mapping
from typing import Any

ROOT = pathlib.Path(__file__).resolve().parents[2]
sys.path[:0] = [str(ROOT)]
os.environ["HF_HUB_OFFLINE"] = "1"

import torch  # noqa: E402
import transformers  # noqa: E402
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES  # noqa: E402

from phi1.errors import UserError  # noqa: E402
from phi1.huggingface import register_attention  # noqa: E402

# What makes a model small, under all the names that configurations have for it.
SIZES: Mapping[str, Any] = {
    **dict.fromkeys(
        ("hidden_size", "n_embd", "n_embed", "d_model", "dim", "embedding_size", "word_embed_proj_dim"), 64
    ),
    **dict.fromkeys(("intermediate_size", "ffn_dim", "n_inner", "d_ff", "hidden_dim", "ffn_hidden_size"), 96),
    **dict.fromkeys(("num_hidden_layers", "n_layer", "n_layers", "num_layers", "decoder_layers", "encoder_layers"), 2),
    **dict.fromkeys(("num_attention_heads", "n_head", "n_heads", "num_heads"), 4),
    **dict.fromkeys(("decoder_attention_heads", "encoder_attention_heads", "linear_num_value_heads"), 4),
    **dict.fromkeys(("num_key_value_heads", "num_kv_heads", "linear_num_key_heads"), 2),
    **dict.fromkeys(("head_dim", "d_kv", "linear_key_head_dim", "linear_value_head_dim", "rotary_dim"), 16),
    **dict.fromkeys(("q_lora_rank", "kv_lora_rank", "qk_nope_head_dim", "qk_rope_head_dim", "v_head_dim"), 16),
    **dict.fromkeys(("max_position_embeddings", "n_positions", "max_seq_len"), 128),
    **dict.fromkeys(("num_experts", "num_local_experts", "n_routed_experts", "moe_num_experts"), 4),
    **dict.fromkeys(("n_group", "topk_group", "first_k_dense_replace", "mamba_expand"), 1),
    **dict.fromkeys(("moe_intermediate_size", "shared_expert_intermediate_size"), 32),
    **{"num_experts_per_tok": 2, "mamba_d_state": 8, "mamba_n_heads": 4, "mamba_d_head": 16},
    **{"vocab_size": 96, "vocab_size_per_layer_input": 96, "hidden_size_per_layer_input": 8, "sliding_window": 64},
    **{"bos_token_id": 1, "eos_token_id": None, "pad_token_id": 0, "attention_dropout": 0.0},
}
LARGEST = 30e6  # parameters; some parts of some models stay large
SECONDS = 60
KNOWN = {"doge"}  # computes with the mask that it is given, and fails at ours in its own line
TOKENS = torch.randint(2, 90, (2, 14), generator=torch.Generator().manual_seed(2))
MASK = torch.ones_like(TOKENS)
MASK[1, :5] = 0

CALLS: Mapping[str, Callable[[Any], torch.Tensor]] = {
    "plain": lambda model: model(input_ids=TOKENS, use_cache=False).logits,
    "left": lambda model: model(input_ids=TOKENS, attention_mask=MASK).logits * MASK[..., None],
    "right": lambda model: model(input_ids=TOKENS, attention_mask=MASK.flip(1)).logits * MASK.flip(1)[..., None],
    "generate": lambda model: model.generate(
        input_ids=TOKENS, attention_mask=MASK, max_new_tokens=8, min_new_tokens=8, do_sample=False, pad_token_id=0
    ),
}


def made(kind: str, implementation: str) -> Any:
    """The model with the same random weights for each implementation."""
    config = transformers.CONFIG_MAPPING[kind]()
    text = config.get_text_config()
    for name, size in SIZES.items():
        if hasattr(text, name):
            setattr(text, name, size)
    for name in ("layer_types", "mlp_layer_types"):
        if getattr(text, name, None) is not None:
            setattr(text, name, getattr(text, name)[:2])
    torch.manual_seed(0)
    model = transformers.AutoModelForCausalLM.from_config(
        copy.deepcopy(config), attn_implementation=implementation
    ).eval()
    if (count := sum(parameter.numel() for parameter in model.parameters())) > LARGEST:
        raise ValueError(f"{count / 1e6:.0f} million parameters")
    generator = torch.Generator().manual_seed(1)
    for parameter in model.parameters():
        if parameter.dim() == 2:  # initializer_range would leave attention nearly uniform
            parameter.copy_(torch.randn(parameter.shape, generator=generator) * 1.5 / parameter.shape[1] ** 0.5)
    return model


def distance(a: torch.Tensor, b: torch.Tensor) -> float:
    """The largest difference, relative to the largest value; infinite for tokens that differ."""
    if not a.is_floating_point():
        return 0.0 if torch.equal(a, b) else float("inf")
    return float((a - b).abs().max() / a.abs().max().clamp(min=1))


def outcome(call: Callable[[Any], torch.Tensor], eager: Any, sdpa: Any | None, ours: Any) -> str:
    """ok, refused, transformers (it fails itself), or what is wrong."""
    try:
        expected = call(eager)
    except Exception as error:
        return f"transformers: {type(error).__name__}"
    try:
        found = distance(expected, call(ours))
    except UserError as error:
        return "refused" if "\n" not in str(error) else f"WRONG: {error!r}"
    except Exception as error:
        return f"WRONG: {error!r}"
    allowed = 2e-5 if sdpa is None else max(2e-5, 2 * distance(expected, call(sdpa)))
    return "ok" if found <= allowed else f"WRONG: differs by {found:.1e}"


def tried(kind: str) -> dict[str, str]:
    """Each call's outcome, or why the model could not be made."""

    def late(*_: object) -> None:
        raise TimeoutError(f"more than {SECONDS} s")

    signal.signal(signal.SIGALRM, late)
    signal.alarm(SECONDS)
    try:
        eager = made(kind, "eager")
        try:
            sdpa = made(kind, "sdpa")
        except ValueError:  # not every model has it
            sdpa = None
        ours = made(kind, "phi1")
    except Exception as error:  # a configuration that this script does not make small
        return {"not tried": f"{type(error).__name__}: {str(error).strip()[:80]}"}
    finally:
        signal.alarm(0)
    return {name: outcome(call, eager, sdpa, ours) for name, call in CALLS.items()}


@torch.no_grad()
def main(kinds: list[str]) -> int:
    transformers.logging.set_verbosity_error()
    torch.set_num_threads(1)
    register_attention()
    wrong = []
    for kind in kinds or list(MODEL_FOR_CAUSAL_LM_MAPPING_NAMES):
        found = tried(kind)
        print(kind, found, flush=True)
        if kind not in KNOWN and any(value.startswith("WRONG") for value in found.values()):
            wrong.append(kind)
    print(f"wrong: {', '.join(wrong) or 'none'}")
    return bool(wrong)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
