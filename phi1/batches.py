"""What a training reads: its sets of tokens, and each process's share of a step.

A step's sequences are cut into micro-batches of `micro_batch`, the last of which may be smaller, numbered through all
processes; each process takes a run of them. So with the same micro_batch any number of processes computes the same
micro-batches, dropout included.
"""

import functools
import pathlib
from typing import NamedTuple

import torch

from phi1.config import TrainConfig
from phi1.distributed import World
from phi1.errors import UserError
from phi1.mixture import Mixture
from phi1.tokenizer import Tokenizer
from phi1.tokens import IGNORE, TokenDataset, document_bounds, mix


class Batch(NamedTuple):
    """A micro-batch, on the device."""

    sequences: range
    """Indices of its samples in the order of training (`Mixture.batch` reads them)."""
    inputs: torch.Tensor
    """(batch, time) int64."""
    targets: torch.Tensor
    """(batch, time) int64, IGNORE where a token does not count."""
    bounds: torch.Tensor | None
    """cu_seqlens of its documents, where attention stays inside them."""
    seed: int
    """Of its dropout."""
    counted: int
    """Targets that count."""


class Batches:
    """The data of a run, and this process's part of it.

    UserError if a set is missing, too short, or made by another tokenizer than the model and the other sets are for.
    """

    def __init__(self, config: TrainConfig, world: World) -> None:
        self.config, self.world = config, world
        options, settings, vocab_size = config.data, config.train, config.model.vocab_size
        sets = _open("tokens", options.tokens)
        self.training = Mixture(sets, options.weights or dict.fromkeys(sets, 1))
        self.validation = _open("validation_tokens", options.validation_tokens)
        """Held-out sets by name; one without a name is called ""."""
        self.sets = {
            f"{option}.{name}" if name else option: dataset
            for option, sets in (("tokens", self.training.sets), ("validation_tokens", self.validation))
            for name, dataset in sets.items()
        }
        """All of them, by what the recipe calls them."""
        self.origin = next(iter(self.sets.values()))
        """The set whose tokenizer all others have."""
        for dataset in self.sets.values():
            dataset.windows(options.sequence_length)  # at least one
            if dataset.vocab_size > vocab_size:
                raise UserError(
                    f"{dataset.folder}: made by a tokenizer of {dataset.vocab_size:,} entries, more than "
                    f"model.vocab_size = {vocab_size:,}; raise it, or tokenize with a smaller one"
                )
            if dataset.tokenizer_hash != self.origin.tokenizer_hash:
                raise UserError(
                    f"{dataset.folder}: made by another tokenizer than {self.origin.folder}; make it again with "
                    f"--tokenizer {self.origin.folder}"
                )
        self.tokenizer = Tokenizer.load(self.origin.folder)
        if self.tokenizer.hash != self.origin.tokenizer_hash:
            raise UserError(
                f"{self.origin.folder / 'tokenizer.json'}: not the tokenizer that made the shards; "
                "run `phi1 data tokenize` again"
            )
        micro_batches = -(-settings.sequences_per_step // settings.micro_batch)
        if micro_batches < world.size:
            raise UserError(
                f"train.micro_batch = {settings.micro_batch}: {settings.sequences_per_step} sequences a step make "
                f"{micro_batches} micro-batches, fewer than the {world.size} processes; lower --micro-batch to at most "
                f"{settings.sequences_per_step // world.size or 1}, or start fewer processes"
            )
        first, last = (micro_batches * rank // world.size for rank in (world.rank, world.rank + 1))
        self.mine = range(first, last)
        """Numbers of this process's micro-batches in a step."""
        self.most = -(-micro_batches // world.size)
        """Micro-batches of a process that has most."""

    def verify(self) -> None:
        """Checks every shard's SHA-256, and that each evaluation has a token that counts; all processes call it. On
        each machine one reads all shards, rank 0 before the others.
        """
        world = self.world
        for dataset in self.sets.values():
            world.first(dataset.verify)
            world.each(dataset.verify if world.local_rank == 0 else lambda: None)
        for dataset in self.validation.values():
            batches = world.each(functools.partial(self.of_evaluation, dataset))
            if not world.sum(sum(batch.counted for batch in batches))[0]:
                world.fail(
                    f"{dataset.folder}: no token counts in the evaluation loss; its loss mask is 0 there: raise "
                    "--evaluation-sequences, name another set, or --no-loss-mask"
                )

    def of_step(self, step: int) -> list[Batch]:
        """This process's micro-batches of step 0 …, as many in every process: the first may be idle (`_idle`).

        UserError if a shard is not what it was when it was opened.
        """
        settings = self.config.train
        start = step * settings.sequences_per_step
        batches = []
        for number in self.mine:
            first = number * settings.micro_batch
            samples = range(first, min(first + settings.micro_batch, settings.sequences_per_step))
            seed = mix(settings.seed, step, number) >> 11  # the model reads 52 bits of it
            samples = range(start + samples.start, start + samples.stop)
            batches.append(self._read(self.training, samples, settings.seed, seed))
        return [_idle(batches[0])] * (self.most - len(batches)) + batches

    def of_evaluation(self, dataset: TokenDataset) -> list[Batch]:
        """The first `evaluation_sequences` samples of seed 0, shared among processes; idle where only others have
        one.
        """
        settings, world = self.config.train, self.world
        size = settings.micro_batch
        count = min(settings.evaluation_sequences, dataset.windows(self.config.data.sequence_length))
        rounds = [range(start, min(start + size * world.size, count)) for start in range(0, count, size * world.size)]
        shares = [samples[world.rank :: world.size] for samples in rounds]
        return [
            self._read(dataset, mine, 0, 0) if mine else _idle(self._read(dataset, samples[:1], 0, 0))
            for mine, samples in zip(shares, rounds, strict=True)
        ]

    def taken(self, first: int, last: int) -> dict[str, int]:
        """How many sequences steps first … last - 1 take from each training set that has a name."""
        size = self.config.train.sequences_per_step
        before, after = self.training.counts(first * size), self.training.counts(last * size)
        return {name: after[name] - before[name] for name in after if name}

    def describe(self, steps: int) -> list[str]:
        """What the training sets hold, and what so many steps take from each, a line a set."""
        size, length, lines = self.config.train.sequences_per_step, self.config.data.sequence_length, []
        for name, dataset in self.training.sets.items():
            windows, count = dataset.windows(length), self.training.counts(steps * size)[name]
            called = f"{name}: " if name else ""
            what = (
                f"{count:,} of {steps * size:,} ({count / (steps * size):.2%})"
                if name
                else f"{steps:,} steps of {size:,} sequences"
            )
            lines.append(
                f"data: {called}{dataset.tokens:,} tokens in {dataset.documents:,} documents; an epoch is {windows:,} "
                f"sequences of {length:,}; {what} are {count / windows:.2f} epochs"
            )
        return lines

    def _read(self, dataset: Mixture | TokenDataset, samples: range, seed: int, dropout_seed: int) -> Batch:
        options, device = self.config.data, self.world.device
        inputs, targets = dataset.batch(samples, options.sequence_length, seed=seed, loss_mask=options.loss_mask)
        bounds = None
        if options.document_masking:
            bounds = torch.from_numpy(document_bounds(inputs, self.origin.eot_id)).to(device)
        return Batch(
            samples,
            torch.from_numpy(inputs).to(device),
            torch.from_numpy(targets).to(device),
            bounds,
            dropout_seed,
            int((targets != IGNORE).sum()),
        )


def _idle(batch: Batch) -> Batch:
    """A micro-batch in which no target counts, for a process that has none where others do: a forward or backward pass
    under FSDP2, and DDP's first, is one that all processes make."""
    return batch._replace(sequences=range(0), targets=torch.full_like(batch.targets, IGNORE), counted=0)


def _open(option: str, folders: pathlib.Path | dict[str, pathlib.Path] | None) -> dict[str, TokenDataset]:
    """The sets that an option names, by name; one without a name is called "". UserError if one is there twice."""
    if not isinstance(folders, dict):
        folders = {} if folders is None else {"": folders}
    sets = {name: TokenDataset(folders[name]) for name in sorted(folders)}
    names: dict[str, str] = {}
    for name, dataset in sets.items():
        other = names.setdefault(dataset.hash, name)
        if other != name:
            raise UserError(
                f"data.{option}: {other} ({sets[other].folder}) and {name} ({dataset.folder}) hold the same tokens; "
                f"name a set once, and give it the weight of both"
            )
    return sets
