"""What a training reads: its sets of tokens, and each process's share of a step.

A step's sequences are cut into micro-batches of `micro_batch`, the last of which may be smaller, numbered through all
processes; each process takes a run of them. So with the same micro_batch any number of processes computes the same
micro-batches, dropout included.
"""

from typing import NamedTuple

import torch

from phi1.config import TrainConfig
from phi1.distributed import World
from phi1.errors import UserError
from phi1.tokenizer import Tokenizer
from phi1.tokens import IGNORE, TokenDataset, document_bounds, mix


class Batch(NamedTuple):
    """A micro-batch, on the device."""

    sequences: range
    """Indices of its samples in the order of training."""
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
        self.training = TokenDataset(options.tokens)
        self.validation = None if options.validation_tokens is None else TokenDataset(options.validation_tokens)
        self.sets = {"tokens": self.training} | ({"validation_tokens": self.validation} if self.validation else {})
        for dataset in self.sets.values():
            dataset.windows(options.sequence_length)  # at least one
            if dataset.vocab_size > vocab_size:
                raise UserError(
                    f"{dataset.folder}: made by a tokenizer of {dataset.vocab_size:,} entries, more than "
                    f"model.vocab_size = {vocab_size:,}; raise it, or tokenize with a smaller one"
                )
            if dataset.tokenizer_hash != self.training.tokenizer_hash:
                raise UserError(
                    f"{dataset.folder}: made by another tokenizer than {self.training.folder}; make it again"
                )
        self.tokenizer = Tokenizer.load(self.training.folder)
        if self.tokenizer.hash != self.training.tokenizer_hash:
            raise UserError(
                f"{self.training.folder / 'tokenizer.json'}: not the tokenizer that made the shards; "
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
        """Checks every shard's SHA-256; all processes call it. On each machine one does, rank 0 before the others."""
        for dataset in self.sets.values():
            self.world.first(dataset.verify)
            self.world.each(dataset.verify if self.world.local_rank == 0 else lambda: None)

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
        """The first `evaluation_sequences` samples of seed 0, shared among processes; idle where only others have one."""
        settings, world = self.config.train, self.world
        size = settings.micro_batch
        count = min(settings.evaluation_sequences, dataset.windows(self.config.data.sequence_length))
        rounds = [range(start, min(start + size * world.size, count)) for start in range(0, count, size * world.size)]
        shares = [samples[world.rank :: world.size] for samples in rounds]
        return [
            self._read(dataset, mine, 0, 0) if mine else _idle(self._read(dataset, samples[:1], 0, 0))
            for mine, samples in zip(shares, rounds, strict=True)
        ]

    def _read(self, dataset: TokenDataset, samples: range, seed: int, dropout_seed: int) -> Batch:
        options, device = self.config.data, self.world.device
        inputs, targets = dataset.batch(samples, options.sequence_length, seed=seed, loss_mask=options.loss_mask)
        bounds = None
        if options.document_masking:
            bounds = torch.from_numpy(document_bounds(inputs, dataset.eot_id)).to(device)
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
