"""Read a Hugging Face folder (PhiForCausalLM, Microsoft's first phi layout, CodeGenForCausalLM) into a checkpoint."""

import dataclasses
import pathlib


@dataclasses.dataclass(frozen=True)
class Config:
    """Options of `phi1 import`."""

    source: pathlib.Path
    """The Hugging Face folder: config.json, weights, tokenizer."""
    output: pathlib.Path
    """The checkpoint folder to write; it must not exist yet."""
    tokenizer: pathlib.Path | None = None
    """A tokenizer.json, or a folder with one or with vocab.json and merges.txt; default: the source folder."""


def run(config: Config) -> None:
    """Writes the checkpoint and says what is in it."""
    from phi1.checkpoint import write_model
    from phi1.errors import UserError
    from phi1.huggingface import import_folder, import_tokenizer

    if not (config.source / "config.json").is_file():
        where = config.source / "config.json"
        raise UserError(f"{where}: missing or broken; --source names the folder of a Hugging Face model")
    tokenizer = import_tokenizer(config.tokenizer or config.source)
    model = import_folder(config.source)
    if tokenizer.vocab_size > model.config.vocab_size:
        raise UserError(
            f"the tokenizer has {tokenizer.vocab_size:,} entries, the model in {config.source} "
            f"{model.config.vocab_size:,} rows: name its own with --tokenizer"
        )
    write_model(config.output, model, tokenizer, {"imported_from": str(config.source)})
    count = sum(parameter.numel() for parameter in model.parameters())
    print(f"{config.output}: {count:,} parameters in {str(model.embedding.dtype)[6:]}, {model.config}")
