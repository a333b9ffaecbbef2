"""Turns documents into token shards for training.

A dataset with columns `prompt` and `solution` gets a loss mask: the solution and the <|endoftext|> after it
count, the prompt does not. Other datasets are read by their column `content`, and all of it counts.

Each shard of the inputs becomes one token shard. With --validation, documents are held out by a hash of their
text, so equal documents are on the same side whatever else is in the inputs.

With --fim-rate that share of the documents to train on is rearranged for filling in the middle (data_tools/fim.py);
held-out ones stay as they are. The tokenizer then has three sentinels more, in all shards that are written.
"""

import dataclasses
import hashlib
import itertools
import pathlib
import sys
import time
from collections.abc import Iterable, Iterator, Sequence
from typing import Any

from data_tools.dataset import Dataset, sweep
from data_tools.engine import Engine, worth
from data_tools.engine import run as run_tasks
from data_tools.fim import Fim
from data_tools.timing import Clock, Timing
from phi1.errors import UserError
from phi1.progress import Progress
from phi1.tokenizer import Tokenizer, codegen_tokenizer
from phi1.tokens import TokenDataset, TokenWriter

# Handed to the tokenizer at a time: enough to keep its threads busy, and no more characters than its encodings, which
# take up to some hundred bytes a character, leave room for.
_BATCH = 256
_BATCH_CHARACTERS = 2 << 20
_SECONDS_A_BYTE = 2.5e-6  # of a parquet file, on one core


@dataclasses.dataclass(frozen=True)
class Config(Engine):
    inputs: list[pathlib.Path]
    """Dataset folders, read in this order."""
    output: pathlib.Path
    """Folder for the token shards."""
    tokenizer: str = "codegen"
    """codegen (codegen-350M-mono's, 50,295 entries), or a tokenizer.json, or a folder or checkpoint with one."""
    validation: pathlib.Path | None = None
    """Folder for the token shards of held-out documents."""
    validation_fraction: float = 0.01
    """Share of the documents to hold out, where --validation is given."""
    fim_rate: float = 0.0
    """Share of the documents to rearrange for filling in the middle (0: none, as the paper)."""
    fim_spm_share: float = 0.5
    """Share of the rearranged ones whose suffix comes before the prefix."""
    fim_seed: int = 0
    """Of which documents are rearranged, and where they are cut."""

    def __post_init__(self) -> None:
        super().__post_init__()
        for name in ("fim_rate", "fim_spm_share"):
            if not 0 <= getattr(self, name) <= 1:
                raise UserError(f"{name} = {getattr(self, name)}: must be from 0 to 1")
        if not 0 < self.validation_fraction < 1:
            raise UserError(f"validation_fraction = {self.validation_fraction}: must be between 0 and 1")


def run(config: Config) -> TokenDataset:
    """Writes (or finishes) the token shards; returns those to train on."""
    started = time.monotonic()
    if not config.inputs:
        raise UserError("--inputs is empty: name at least one dataset folder")
    tokenizer = codegen_tokenizer() if config.tokenizer == "codegen" else Tokenizer.load(config.tokenizer)
    datasets = [Dataset(folder) for folder in config.inputs]
    columns = {dataset.folder: _columns(dataset) for dataset in datasets}
    exercises = [folder for folder, names in columns.items() if names == ["prompt", "solution"]]
    fim = None
    if config.fim_rate > 0:
        if exercises:
            raise UserError(
                f"--fim-rate {config.fim_rate}: {exercises[0]} has exercises, of which the loss counts the solution "
                f"only; "
                f"tokenize them apart, with --tokenizer {config.output}, and mix the sets (data.weights in a recipe)"
            )
        tokenizer = tokenizer.with_fim()
        assert tokenizer.fim_ids is not None
        fim = Fim(tokenizer.fim_ids, config.fim_rate, config.fim_spm_share, config.fim_seed)
    fraction = config.validation_fraction if config.validation else 0.0
    writers = {}
    for held_out, folder in ((False, config.output), (True, config.validation)):
        if folder is not None:
            sweep(folder)
            identity = {
                "inputs": [{"hash": dataset.hash} for dataset in datasets],  # whatever their folders are called
                "validation_fraction": fraction,
                "held_out": held_out,
            }
            if fim and not held_out:
                identity["fim"] = dataclasses.asdict(fim)
            writers[held_out] = TokenWriter(folder, tokenizer, masked=bool(exercises), identity=identity)

    jobs = [(dataset, shard) for dataset in datasets for shard in range(len(dataset.shards))]
    todo = [number for number in range(len(jobs)) if not all(writer.has(number) for writer in writers.values())]
    if len(todo) < len(jobs):
        print(f"tokenize: going on after {len(jobs) - len(todo)} of {len(jobs)} shards", file=sys.stderr)
    receipts = [dataset.shards[shard] for dataset, shard in jobs]
    progress = Progress("tokenize", sum(receipts[number]["rows"] for number in todo), "documents")
    task = _Task(jobs, writers, columns, exercises, fraction, fim)
    engine = worth(config, _SECONDS_A_BYTE * sum(receipts[number]["bytes"] for number in todo))
    if engine.workers > 1:  # the largest first, so that none is left alone at the end
        todo.sort(key=lambda number: -receipts[number]["bytes"])
    tokens = empty = rearranged = 0
    with Timing(config.output, engine, started) as timing:
        for made in run_tasks(engine, task, todo, config.output):
            empty, rearranged = empty + made.pop("empty"), rearranged + made.pop("rearranged")
            tokens += made["tokens"]
            timing.shard(**made)
            progress.advance(receipts[made["shard"]]["rows"], f"{tokens:,} tokens")
    progress.close()
    results = {held_out: writer.finish(len(jobs)) for held_out, writer in writers.items()}
    if empty:
        print(f"tokenize: {empty:,} empty documents were left out", file=sys.stderr)
    if fim:
        print(f"tokenize: {rearranged:,} documents were rearranged to fill in the middle", file=sys.stderr)
    for result in results.values():
        print(
            f"tokenize: {result.tokens:,} tokens in {result.documents:,} documents in {result.folder}", file=sys.stderr
        )
        if result.documents == 0:
            print(f"warning: tokenize: no document in {result.folder}", file=sys.stderr)
    return results[False]


# A row's text: (content,) or (prompt, solution); rearranged also with ids of sentinels between.
_Text = tuple[str, ...]
_Parts = tuple[str | int, ...]


@dataclasses.dataclass
class _Task:
    """Makes a token shard of a dataset's shard: of jobs[number], for each writer."""

    jobs: list[tuple[Dataset, int]]
    writers: dict[bool, TokenWriter]
    columns: dict[pathlib.Path, list[str]]
    exercises: list[pathlib.Path]
    fraction: float
    fim: Fim | None

    def __call__(self, number: int) -> dict[str, Any]:
        clock, rows, tokens = Clock(), 0, 0
        dataset, shard = self.jobs[number]
        reader = _Reader(self.writers[False].tokenizer)
        for held_out, writer in self.writers.items():
            texts = enumerate(_texts(dataset, shard, self.columns[dataset.folder]))
            mine = ((row, text) for row, text in texts if _held_out(text, self.fraction) == held_out)
            arrange = self.fim if self.fim and not held_out else None
            # A document's place is the number of its shard among the inputs', and its row there.
            parts = (arrange.arrange(text[0], number, row) if arrange and text[0] else text for row, text in mine)
            receipt = writer.write(number, reader.documents(parts, prompts=dataset.folder in self.exercises))
            rows, tokens = rows + receipt["documents"], tokens + receipt["tokens"]
        facts = {"shard": number, "rows": rows, "tokens": tokens}
        return facts | clock.read() | {"empty": reader.empty, "rearranged": reader.rearranged}


class _Reader:
    """Tokenizes texts, and counts those that are empty or rearranged."""

    def __init__(self, tokenizer: Tokenizer) -> None:
        self.tokenizer = tokenizer
        self.empty = self.rearranged = 0

    def documents(self, texts: Iterable[_Parts], *, prompts: bool) -> Iterator[tuple[list[int], list[int] | None]]:
        """(ids, loss mask or None) of each text that is not empty. prompts: the first part of a text is a prompt."""
        for batch in _batches(texts):
            # Parts are encoded apart: a prompt as it will be when the model is asked to complete it.
            to_encode = [part or "" for text in batch for part in text if not isinstance(part, int)]
            encoded = iter(self.tokenizer.encode_batch(to_encode))
            for text in batch:
                parts = [[part] if isinstance(part, int) else next(encoded) for part in text]
                body = parts[0] if len(parts) == 1 else list(itertools.chain(*parts[prompts:]))
                if not body:
                    self.empty += 1
                    continue
                self.rearranged += isinstance(text[0], int)
                if prompts:
                    yield [*parts[0], *body], [0] * len(parts[0]) + [1] * len(body)
                else:
                    yield body, None


def _texts(dataset: Dataset, shard: int, columns: Sequence[str]) -> Iterator[_Text]:
    return (tuple(row[name] for name in columns) for row in dataset.read(columns, [shard]))


def _batches(texts: Iterable[_Parts]) -> Iterator[list[_Parts]]:
    """Bounded by the number of texts and by their characters (a longer text is alone)."""
    batch: list[_Parts] = []
    characters = 0
    for text in texts:
        length = sum(len(part or "") for part in text if not isinstance(part, int))
        if batch and (len(batch) == _BATCH or characters + length > _BATCH_CHARACTERS):
            yield batch
            batch, characters = [], 0
        batch.append(text)
        characters += length
    if batch:
        yield batch


def _columns(dataset: Dataset) -> list[str]:
    """The columns that hold a dataset's text."""
    names = dataset.schema.names
    for columns in (["prompt", "solution"], ["content"]):
        if set(columns) <= set(names):
            return columns
    raise UserError(
        f"{dataset.folder}: has neither `content` nor `prompt` and `solution` (its columns: {', '.join(names)}); "
        "name a dataset of documents or exercises"
    )


def _held_out(text: _Text, fraction: float) -> bool:
    """Whether a text is held out: the same for the same text, in `fraction` of all texts."""
    digest = hashlib.sha256("\0".join(part or "" for part in text).encode()).digest()
    return int.from_bytes(digest[:8], "big") < fraction * 2**64
