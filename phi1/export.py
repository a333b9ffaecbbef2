"""Write a checkpoint as a Hugging Face PhiForCausalLM folder, which transformers loads without our code."""

import dataclasses
import pathlib
from typing import Literal


@dataclasses.dataclass(frozen=True)
class Config:
    """Options of `phi1 export`."""

    checkpoint: pathlib.Path
    """A checkpoint's folder, or a run's (its newest checkpoint)."""
    output: pathlib.Path
    """The folder to write; it must not exist yet."""
    dtype: Literal["checkpoint", "float32", "bfloat16", "float16"] = "checkpoint"
    """Type of the weights; checkpoint: as they are stored (training stores float32)."""


def run(config: Config) -> None:
    """Writes the folder and says what is in it."""
    import torch

    from phi1.checkpoint import load_model, read_facts, resolve
    from phi1.huggingface import export_folder, limits

    checkpoint = resolve(config.checkpoint)
    model, tokenizer = load_model(checkpoint)
    dtype = None if config.dtype == "checkpoint" else getattr(torch, config.dtype)
    export_folder(config.output, model, tokenizer, dtype=dtype, facts=read_facts(checkpoint))
    count = sum(parameter.numel() for parameter in model.parameters())
    print(f"{config.output}: PhiForCausalLM, {count:,} parameters in {str(dtype or model.embedding.dtype)[6:]}")
    others = limits(model.config, tokenizer)
    if others:
        print(f"note: for transformers and lm-eval; {'; '.join(others)}")
