"""The README.md of an exported folder, and what other programs than transformers make of it."""

import json
from collections.abc import Iterator, Mapping
from typing import Any

import torch

from phi1 import __version__
from phi1.config import ModelConfig
from phi1.tokenizer import GPT2_PIECES, Tokenizer


def limits(config: ModelConfig, tokenizer: Tokenizer) -> list[str]:
    """Where llama.cpp's converter and vLLM, which load phi-1's own shape and tokenizer, would misread these.

    Both take from config.json what Microsoft's Phi models leave open, and fix the rest: vLLM in
    model_executor/models/phi.py, llama.cpp in `Phi2Model` of its convert_hf_to_gguf.py, which knows a tokenizer by what
    it makes of one text (that of codegen-350M-mono is its "phi-2").
    """
    found = [
        f"llama.cpp's converter and vLLM take {name} = {expected} ({why}), here it is {value}"
        for name, value, expected, why in (
            ("num_key_value_heads", config.num_kv_heads, config.num_heads, "num_attention_heads"),
            ("head_dim", config.head_dim, config.hidden_size // config.num_heads, "hidden_size / num_attention_heads"),
            ("intermediate_size", config.intermediate_size, 4 * config.hidden_size, "4 hidden_size"),
            ("rope_theta", config.rotary_base, 10000.0, "as published"),
        )
        if value != expected
    ]
    if tokenizer.pieces != GPT2_PIECES:
        found.append(f"llama.cpp's converter has no name for the pieces of this vocabulary, {tokenizer.pieces!r}")
    return found


def model_card(
    name: str, config: ModelConfig, parameters: int, dtype: torch.dtype, tokenizer: Tokenizer, facts: Mapping[str, Any]
) -> str:
    """Markdown with the header that model hubs read. name: the folder's. facts: of the checkpoint (`read_facts`)."""
    shape = {
        "parameters": f"{parameters:,} in {str(dtype).removeprefix('torch.')}",
        "layers": config.num_layers,
        "hidden size, inner size": f"{config.hidden_size:,}, {config.intermediate_size:,}",
        "heads": f"{config.num_heads} of {config.head_dim} on {config.num_kv_heads} key/value heads",
        "rotary dims": config.rotary_dim,
        "positions": f"{config.max_positions:,}",
        "vocabulary": f"{tokenizer.vocab_size:,} entries, {config.vocab_size:,} rows",
        "pieces before BPE": f"`{tokenizer.pieces}`",
    }
    others = limits(config, tokenizer)
    programs = ["transformers 4.57 and 5, and what loads models by it, lm-eval's `hf` model for one, load this folder."]
    programs += others or ["Its shape and tokenizer are those that llama.cpp's converter and vLLM know of Phi models."]
    return f"""---
library_name: transformers
pipeline_tag: text-generation
tags: [phi, code]
---

# {name}

A decoder of parallel blocks, phi-1's architecture ("Textbooks Are All You Need", arXiv 2306.11644), as a
`PhiForCausalLM`, written by phi1 {__version__}.

```python
from transformers import AutoModelForCausalLM, AutoTokenizer

model, tokenizer = (auto.from_pretrained({json.dumps(name)}) for auto in (AutoModelForCausalLM, AutoTokenizer))
ids = model.generate(**tokenizer("def add(a, b):", return_tensors="pt"), max_new_tokens=64)
print(tokenizer.decode(ids[0], skip_special_tokens=True))
```

{_table("shape", shape.items())}

{chr(10).join(f"- {sentence}" for sentence in programs)}

## Record

{_table("of the checkpoint", _flat(facts)) if facts else "The checkpoint has none."}
"""


def _table(title: str, rows: Any) -> str:
    def cell(value: Any) -> str:
        return str(value).replace("|", "\\|").replace("\n", " ")

    return "\n".join([f"| {title} | |", "|---|---|", *(f"| {cell(name)} | {cell(value)} |" for name, value in rows)])


def _flat(facts: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
    """Facts of facts by their names joined with dots; what is None is left out."""
    for name, value in facts.items():
        if isinstance(value, Mapping):
            yield from _flat(value, f"{prefix}{name}.")
        elif value is not None:
            yield prefix + name, value if isinstance(value, str | int | float) else json.dumps(value)
