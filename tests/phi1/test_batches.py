"""A step's micro-batches, and which process computes them."""

import errno
import json
import os

import pytest
import torch
from training import change, write

from phi1 import checkpoint
from phi1.batches import Batches
from phi1.distributed import World
from phi1.errors import UserError
from phi1.files import sha256_file
from phi1.tokens import IGNORE, TokenWriter
from phi1.train import Trainer, train

pytestmark = pytest.mark.usefixtures("one_thread")


def world(rank=0, size=1):
    world = World("cpu")
    world.rank, world.size = rank, size
    return world


def test_every_micro_batch_has_its_own_samples_and_dropout(config):
    data = Batches(config, world())
    first, again, later = data.of_step(0), data.of_step(0), data.of_step(1)
    assert len({batch.seed for batch in first + later}) == 4
    assert all(0 <= batch.seed < 2**52 for batch in first + later)
    assert [batch.seed for batch in again] == [batch.seed for batch in first]
    rows = {tuple(row) for batch in first + later for row in batch.inputs.tolist()}
    assert len(rows) == 16  # sequences 0 … 15, none twice
    assert torch.equal(first[1].inputs, torch.from_numpy(data.training.batch(range(4, 8), 32, seed=0)[0]))
    assert [batch.sequences for batch in first + later] == [range(n, n + 4) for n in (0, 4, 8, 12)]


@pytest.mark.parametrize("micro_batch", [1, 2, 3, 4, 5, 8, 9])
def test_any_number_of_processes_computes_the_same_micro_batches(config, micro_batch):
    """The last one of a step may be smaller; no process has two more than another."""
    config = change(config, micro_batch=micro_batch, sequences_per_step=8)
    expected = Batches(config, world()).of_step(3)
    assert [index for batch in expected for index in batch.sequences] == list(range(24, 32))
    assert [len(batch.inputs) for batch in expected[:-1]] == [micro_batch] * (len(expected) - 1)
    for size in range(2, len(expected) + 1):
        everyones = [Batches(config, world(rank, size)) for rank in range(size)]
        shares = [data.of_step(3) for data in everyones]
        assert {len(share) for share in shares} == {everyones[0].most}
        found = [batch for share in shares for batch in share if batch.sequences]
        idle = [share[0] for share in shares if not share[0].sequences]
        assert len(found) + len(idle) == size * everyones[0].most
        assert all(batch.counted == 0 and (batch.targets == IGNORE).all() for batch in idle)
        assert [(batch.sequences, batch.seed) for batch in found] == [(b.sequences, b.seed) for b in expected]
        assert all(torch.equal(a.inputs, b.inputs) for a, b in zip(found, expected, strict=True))
        counts = {len(data.mine) for data in everyones}
        assert max(counts) == everyones[0].most and max(counts) - min(counts) <= 1
    with pytest.raises(
        UserError, match=rf"{len(expected)} micro-batches, fewer than the 9 processes; lower --micro-batch"
    ):
        Batches(config, world(8, 9))


def test_the_papers_step_on_any_number_of_gpus(config):
    config = change(config, micro_batch=8, sequences_per_step=1024)
    for size in range(1, 9):
        shares = [Batches(config, world(rank, size)).mine for rank in range(size)]
        assert [number for share in shares for number in share] == list(range(128))
        assert max(map(len, shares)) == -(-128 // size)


def test_an_evaluation_is_shared(config, tokens):
    config = change(config, validation_tokens=tokens, evaluation_sequences=11, micro_batch=1)
    for size in (1, 2, 3, 5):
        everyones = [Batches(config, world(rank, size)) for rank in range(size)]
        shares = [data.of_evaluation(data.validation[""]) for data in everyones]
        assert len({len(share) for share in shares}) == 1  # as many turns for each
        found = sorted(index for share in shares for batch in share if batch for index in batch.sequences)
        assert found == list(range(11))


def test_a_manifest_that_calls_the_vocabulary_smaller(config, tmp_path, tokenizer, texts):
    folder = write(tmp_path / "lying", tokenizer, texts)
    manifest = json.loads((folder / "manifest.json").read_text())
    (folder / "manifest.json").write_text(json.dumps(manifest | {"vocab_size": 280}))
    with pytest.raises(UserError, match=r"00000\.bin: corrupt shard \(token [\d,]+ is \d+, of a vocabulary of 280\)"):
        train(change(config, tokens=folder))


def test_a_token_past_the_vocabulary_is_named(config, tmp_path, tokenizer):
    writer = TokenWriter(tmp_path / "tokens", tokenizer, masked=False, identity={})
    writer.write(0, [([1] * 300, None)])
    writer.write(1, [([1] * 10 + [60_000] + [1] * 300, None)])
    writer.finish(2)
    with pytest.raises(UserError, match=r"00001\.bin: corrupt shard \(token 10 is 60000, of a vocabulary of 306\)"):
        train(change(config, tokens=tmp_path / "tokens"))


@pytest.mark.parametrize("how", ["shrinks", "is written anew", "is deleted"])
def test_a_shard_that_changes_while_it_is_trained_on(config, tmp_path, tokenizer, texts, monkeypatch, how):
    folder = write(tmp_path / "tokens", tokenizer, texts)
    path, real = folder / "00000.bin", Batches.of_step

    def of_step(self, step):
        if step == 2:
            if how == "shrinks":
                with open(path, "r+b") as file:
                    file.truncate(64)
            elif how == "is deleted":
                path.unlink()
            else:
                path.write_bytes(path.read_bytes()[::-1])
        return real(self, step)

    monkeypatch.setattr(Batches, "of_step", of_step)
    with pytest.raises(UserError, match=r"00000\.bin: corrupt shard \(it was (changed|deleted) since it was opened\)"):
        train(change(config, tokens=folder))
    assert checkpoint.resolve(config.train.run_folder).name == "step-000002"  # what was done is not lost


def test_a_shard_that_is_replaced_by_its_copy(config, tmp_path, tokenizer, texts, monkeypatch):
    """Or gets another time: hashed again, once, and the run goes on."""
    folder = write(tmp_path / "tokens", tokenizer, texts)
    path, real, hashed = folder / "00000.bin", Batches.of_step, []

    def of_step(self, step):
        if step == 2:
            path.write_bytes(path.read_bytes())
            os.utime(path, ns=(1, 1))
            monkeypatch.setattr("phi1.tokens.sha256_file", lambda path: hashed.append(path) or sha256_file(path))
        return real(self, step)

    monkeypatch.setattr(Batches, "of_step", of_step)
    train(change(config, tokens=folder))
    assert hashed == [path]


def test_a_disk_that_fails_loses_no_step(config, monkeypatch):
    real = Batches.of_step

    def of_step(self, step):
        if step == 2:
            raise OSError(errno.EIO, os.strerror(errno.EIO), "/data/00000.bin")
        return real(self, step)

    monkeypatch.setattr(Batches, "of_step", of_step)
    with pytest.raises(OSError, match="Input/output error"):
        train(config)
    assert checkpoint.resolve(config.train.run_folder).name == "step-000002"


@pytest.mark.parametrize("fails", ["to be read", "to count"])
def test_an_evaluation_that_fails_loses_no_step(config, tmp_path, tokenizer, texts, monkeypatch, fails):
    """A checkpoint that is due at its step comes first, and one that is not is written then."""
    held_out = write(tmp_path / "held-out", tokenizer, texts)
    config = change(config, checkpoint_every=4, evaluate_every=2, validation_tokens=held_out)
    real = Trainer.evaluate

    def evaluate(self, dataset):
        if self.step == (2 if fails == "to be read" else 4):
            if fails == "to count":
                raise UserError("no token counts")
            (held_out / "00000.bin").unlink()
        return real(self, dataset)

    monkeypatch.setattr(Trainer, "evaluate", evaluate)
    with pytest.raises(UserError, match=r"it was deleted since|no token counts"):
        train(config)
    kept = checkpoint.resolve(config.train.run_folder)
    assert kept.name == ("step-000002" if fails == "to be read" else "step-000004")
    checkpoint.verify(kept)


def test_a_held_out_set_that_counts_nothing_is_named_at_the_start(config, tmp_path, tokenizer):
    writer = TokenWriter(tmp_path / "masked", tokenizer, masked=True, identity={})
    writer.write(0, [([1] * 4000, [0] * 4000)])
    folder = writer.finish(1).folder
    config = change(config, validation_tokens=folder, evaluation_sequences=9)
    with pytest.raises(UserError, match=r"masked: no token counts in the evaluation loss; .*--evaluation-sequences"):
        train(config)
    assert not (config.train.run_folder / "metrics.jsonl").exists()
    train(change(config, loss_mask=False, steps=1))


def test_a_note_of_checked_hashes_that_is_damaged(config, tmp_path, tokenizer, texts):
    folder = write(tmp_path / "tokens", tokenizer, texts)
    (folder / "verified.json").write_text('{"00000.bin": [')
    train(change(config, tokens=folder, steps=1))
    assert "00000.bin" in json.loads((folder / "verified.json").read_text())
