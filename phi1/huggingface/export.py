"""Write a model as a Hugging Face folder that transformers loads as a `PhiForCausalLM`.

Hugging Face keeps the query, key, value and MLP projections apart; here they are rows of one matrix (phi1/model.py),
so they are cut.
"""

import math
import pathlib
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from phi1.checkpoint import atomic_folder, save_tensors
from phi1.config import ModelConfig
from phi1.errors import UserError
from phi1.files import write_json
from phi1.huggingface.card import model_card
from phi1.model import Phi1
from phi1.tokenizer import END_OF_TEXT, Tokenizer

MAX_SHARD_BYTES = 5_000_000_000  # as transformers' save_pretrained: hubs and file systems dislike larger files


def export_folder(
    folder: pathlib.Path | str,
    model: Phi1,
    tokenizer: Tokenizer,
    *,
    dtype: torch.dtype | None = None,
    max_shard_bytes: int = MAX_SHARD_BYTES,
    facts: Mapping[str, Any] | None = None,
) -> None:
    """Writes a folder that transformers (4.57 and 5) loads: `AutoModelForCausalLM.from_pretrained(folder)`.

    dtype: type of the written weights, default the parameters' own. Dropout is written as 0, as in phi-1's own
    config. facts: the checkpoint's (`phi1.checkpoint.read_facts`), for README.md, the model card. The folder appears
    whole or not at all. Raises UserError if it exists, if the disk is full, or if the tokenizer has more entries than
    the model has rows.
    """
    folder, config = pathlib.Path(folder), model.config
    if folder.exists():
        raise UserError(f"{folder}: already exists; choose another folder, or delete it")
    if tokenizer.vocab_size > config.vocab_size:
        raise UserError(
            f"the tokenizer has {tokenizer.vocab_size:,} entries, the model {config.vocab_size:,} rows: "
            "export the tokenizer that the model was trained with"
        )
    dtype = dtype or model.embedding.dtype
    tensors = to_phi(model.state_dict(), config)
    count = sum(tensor.numel() for tensor in tensors.values())
    shards = _shards({name: tensor.numel() * dtype.itemsize for name, tensor in tensors.items()}, max_shard_bytes)
    with atomic_folder(folder) as temporary:
        weight_map: dict[str, str] = {}
        for i, names in enumerate(shards):
            single = len(shards) == 1
            file = "model.safetensors" if single else f"model-{i + 1:05d}-of-{len(shards):05d}.safetensors"
            save_tensors(temporary / file, {name: tensors[name].to(dtype) for name in names})
            weight_map |= dict.fromkeys(names, file)
        if len(shards) > 1:
            index = {"metadata": {"total_size": count * dtype.itemsize}, "weight_map": weight_map}
            write_json(temporary / "model.safetensors.index.json", index)
        tokenizer.save(temporary / "tokenizer.json")
        write_json(
            temporary / "tokenizer_config.json",
            {
                "tokenizer_class": "PreTrainedTokenizerFast",
                "bos_token": END_OF_TEXT,
                "eos_token": END_OF_TEXT,
                "unk_token": END_OF_TEXT,
                "pad_token": END_OF_TEXT,
                "padding_side": "left",  # so that batches of unequal prompts can be generated from
                "model_max_length": config.max_positions,
                "model_input_names": ["input_ids", "attention_mask"],  # 4.57 would add token_type_ids
                "clean_up_tokenization_spaces": False,
            },
        )
        ends = {"bos_token_id": tokenizer.eot_id, "eos_token_id": tokenizer.eot_id}
        # Not in config.json: there transformers would keep the embedding of <|endoftext|> from being trained.
        write_json(temporary / "generation_config.json", ends | {"pad_token_id": tokenizer.eot_id})
        write_json(temporary / "config.json", phi_config(config, dtype) | ends)
        card = model_card(folder.name, config, count, dtype, tokenizer, facts or {})
        (temporary / "README.md").write_text(card, encoding="utf-8")


def phi_config(config: ModelConfig, dtype: torch.dtype) -> dict[str, Any]:
    """config.json of a PhiForCausalLM, without the token ids."""
    # transformers takes int(head_dim * factor) for rotary_dim: the quotient must not round down.
    factor = config.rotary_dim / config.head_dim
    if int(config.head_dim * factor) < config.rotary_dim:
        factor = math.nextafter(factor, 1.0)
    rope = {"rope_theta": config.rotary_base, "partial_rotary_factor": factor}
    type_name = str(dtype).removeprefix("torch.")
    return {
        "architectures": ["PhiForCausalLM"],
        "model_type": "phi",
        "vocab_size": config.vocab_size,
        "hidden_size": config.hidden_size,
        "intermediate_size": config.intermediate_size,
        "num_hidden_layers": config.num_layers,
        "num_attention_heads": config.num_heads,
        "num_key_value_heads": config.num_kv_heads,
        "head_dim": config.head_dim,  # not a field of PhiConfig, but PhiAttention reads it before hidden / heads
        "max_position_embeddings": config.max_positions,
        "layer_norm_eps": config.layer_norm_eps,
        "initializer_range": config.initializer_range,
        "hidden_act": config.activation,
        "attention_dropout": 0.0,
        "resid_pdrop": 0.0,
        "embd_pdrop": 0.0,
        "qk_layernorm": False,
        "tie_word_embeddings": False,
        "use_cache": True,
        "dtype": type_name,
        "torch_dtype": type_name,  # transformers 4
        "rope_parameters": {"rope_type": "default", **rope},
        **rope,  # transformers 4
    }


def to_phi(state: Mapping[str, Tensor], config: ModelConfig) -> dict[str, Tensor]:
    """A `Phi1` state dict under PhiForCausalLM's names, as views. Prefixes from torch.compile are dropped."""
    state = {name.replace("_orig_mod.", ""): tensor for name, tensor in state.items()}
    in_rows = [config.attention_width, config.kv_width, config.kv_width, config.intermediate_size]
    out_columns = [config.attention_width, config.intermediate_size]
    phi = {"model.embed_tokens.weight": state["embedding"]}
    for i in range(config.num_layers):
        block = {name: state[f"blocks.{i}.{name}"] for name in _BLOCK_NAMES}
        q, k, v, fc1 = zip(block["w_in"].split(in_rows), block["b_in"].split(in_rows), strict=True)
        w_dense, w_fc2 = block["w_out"].split(out_columns, dim=1)
        parts = {
            "input_layernorm": (block["norm_weight"], block["norm_bias"]),
            "self_attn.q_proj": q,
            "self_attn.k_proj": k,
            "self_attn.v_proj": v,
            "self_attn.dense": (w_dense, block["b_attention"]),
            "mlp.fc1": fc1,
            "mlp.fc2": (w_fc2, block["b_mlp"]),
        }
        for name, (weight, bias) in parts.items():
            phi[f"model.layers.{i}.{name}.weight"] = weight
            phi[f"model.layers.{i}.{name}.bias"] = bias
    phi["model.final_layernorm.weight"], phi["model.final_layernorm.bias"] = state["norm_weight"], state["norm_bias"]
    phi["lm_head.weight"], phi["lm_head.bias"] = state["head_weight"], state["head_bias"]
    return phi


_BLOCK_NAMES = ("norm_weight", "norm_bias", "w_in", "b_in", "w_out", "b_attention", "b_mlp")


def _shards(sizes: Mapping[str, int], limit: int) -> list[list[str]]:
    """Names in order, cut into lists of at most `limit` bytes (a larger tensor alone)."""
    shards: list[list[str]] = [[]]
    filled = 0
    for name, size in sizes.items():
        if shards[-1] and filled + size > limit:
            shards.append([])
            filled = 0
        shards[-1].append(name)
        filled += size
    return shards
