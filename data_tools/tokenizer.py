"""Train a small byte-level BPE tokenizer on datasets' text, for models that a 51,200-row vocabulary would swamp.

Newlines are tokens of their own, digits are single, runs of spaces and tabs are one token each (phi1/tokenizer.py).
"""

import dataclasses
import pathlib
from collections.abc import Iterator

from phi1.errors import UserError


@dataclasses.dataclass(frozen=True)
class Config:
    """Options of `phi1 data tokenizer`."""

    inputs: tuple[pathlib.Path, ...]
    """Dataset folders; their `content` columns are the training text, in this order."""
    output: pathlib.Path
    """The tokenizer.json to write (replaced if it exists)."""
    vocab_size: int = 1024
    """Entries: 256 bytes, <|endoftext|>, 38 whitespace runs, and as many merges as are left."""


def run(config: Config) -> None:
    """Writes the tokenizer and prints how far it compresses its training text."""
    from data_tools.dataset import Dataset
    from phi1.tokenizer import train_tokenizer

    if not config.inputs:
        raise UserError("--inputs: name at least one dataset folder")
    if config.output.is_dir():
        raise UserError(f"--output {config.output}: is a folder; name a file, e.g. {config.output / 'tokenizer.json'}")
    datasets = [Dataset(folder) for folder in config.inputs]
    for dataset in datasets:
        dataset.require("content")

    def texts() -> Iterator[str]:
        return (row["content"] for dataset in datasets for row in dataset.read(["content"]))

    tokenizer = train_tokenizer(texts(), config.vocab_size)
    tokenizer.save(config.output)
    documents = characters = tokens = 0
    for text in texts():
        documents, characters = documents + 1, characters + len(text)
        tokens += len(tokenizer.encode(text))
    print(
        f"{config.output}: {tokenizer.vocab_size:,} entries from {documents:,} documents, {characters:,} characters; "
        f"{characters / tokens:.2f} characters a token on them"
    )
