"""Sets mixed by weight: which sample is of which set, and trainings on several."""

import fractions
import random

import numpy as np
import pytest
import torch
from training import change, content, losses, records, write

from phi1 import checkpoint
from phi1.batches import Batches
from phi1.distributed import World
from phi1.errors import UserError
from phi1.mixture import Mixture
from phi1.tokens import IGNORE, TokenDataset, mix
from phi1.train import Trainer, train

pytestmark = pytest.mark.usefixtures("one_thread")


def mixture(*weights):
    """A mixture of sets that are not read: "a" with the first weight, …"""
    names = [chr(ord("a") + index) for index in range(len(weights))]
    return Mixture(dict.fromkeys(names), dict(zip(names, weights, strict=True)))


@pytest.fixture(scope="module")
def big(tmp_path_factory, tokenizer, texts):
    return write(tmp_path_factory.mktemp("data") / "big", tokenizer, texts[:150])


@pytest.fixture(scope="module")
def small(tmp_path_factory, tokenizer, texts):
    return write(
        tmp_path_factory.mktemp("data") / "small", tokenizer, [text.replace("x", "y") for text in texts[150:200]]
    )


@pytest.fixture
def mixed(config, big, small):
    """Three of four sequences of the larger set; both sets are read more than twice in 8 steps of 9 sequences."""
    return change(
        config,
        tokens={"big": big, "small": small},
        weights={"big": 3.0, "small": 1.0},
        sequences_per_step=9,
        micro_batch=2,
        sequence_length=63,
    )


def widest(choices, weights):
    """The most that a set's number of samples in any stretch differs from its share of it, and the set."""
    total = sum(map(fractions.Fraction, weights))
    found = []
    for place, weight in enumerate(weights):
        ahead = [fractions.Fraction(0)]
        for choice in choices:
            ahead.append(ahead[-1] + (choice == place) - fractions.Fraction(weight) / total)
        found.append(max(ahead) - min(ahead))  # of two prefixes: the stretch between them
    return max(found)


def test_every_stretch_meets_the_weights():
    """For k sets fewer than max(1, k - 1) sequences away, in all stretches of 600, at weights of all kinds; drawn at
    random they are not.
    """
    generator = random.Random(0)
    for sets in range(1, 8):
        for kind in range(6):
            weights = [
                generator.choice((1, 1, 10 ** generator.randint(-3, 3), generator.random() + 1e-3)) for _ in range(sets)
            ]
            if kind == 0:
                weights = [1] * sets
            found = mixture(*weights)
            choices = [ord(found.place(index)[0]) - ord("a") for index in range(600)]
            weights = [fractions.Fraction(repr(weight)) for weight in weights]
            assert widest(choices, weights) < max(1, sets - 1), weights
    drawn = [int(mix(0, index) % 4 == 0) for index in range(600)]
    assert widest(drawn, [3, 1]) > 5  # and the measure sees it


def test_a_sets_samples_come_in_its_own_order_at_any_index():
    found = mixture(5, 0.25, 1)
    for first in (0, 1, 10**12):
        seen = found.counts(first)
        for index in range(first, first + 400):
            name, theirs = found.place(index)
            assert theirs == seen[name]
            seen[name] += 1
        assert seen == found.counts(first + 400) and sum(seen.values()) == first + 400
    assert found.counts(6_250) == {"a": 5_000, "b": 250, "c": 1_000}


def test_weights_are_taken_as_they_are_written():
    expected = [mixture(4, 1).place(index) for index in range(1000)]
    for same in ((0.8, 0.2), (80.0, 20.0), (4e-7, 1e-7), (4e200, 1e200)):
        assert [mixture(*same).place(index) for index in range(1000)] == expected
    backwards = Mixture({"b": None, "a": None}, {"b": 1, "a": 4})
    assert [backwards.place(index) for index in range(1000)] == expected
    assert mixture(1e300, 1e-300).place(10**9) == ("a", 10**9 - 1)  # "b" had the first


def test_each_set_keeps_its_shuffling_and_its_shifts(mixed):
    data = Batches(mixed, World("cpu"))
    batches = [batch for step in range(8) for batch in data.of_step(step)]
    rows = torch.cat([batch.inputs for batch in batches]).numpy()
    targets = torch.cat([batch.targets for batch in batches]).numpy()
    assert [index for batch in batches for index in batch.sequences] == list(range(72))
    names = [data.training.place(index)[0] for index in range(72)]
    for name, count in (("big", 54), ("small", 18)):
        alone = data.training.sets[name]
        epochs = count / alone.windows(63)
        assert epochs > 1, epochs  # so that windows were shifted
        inputs, expected = alone.batch(range(count), 63, seed=0)
        mine = [row for row, theirs in enumerate(names) if theirs == name]
        assert (rows[mine] == inputs).all() and (targets[mine] == expected).all()
    assert data.taken(0, 8) == {"big": 54, "small": 18} == {name: names.count(name) for name in ("big", "small")}


@pytest.mark.parametrize("size", [2, 3, 5])
def test_any_number_of_processes_reads_the_same(mixed, size):
    expected = Batches(mixed, World("cpu")).of_step(3)
    found = []
    for rank in range(size):
        world = World("cpu")
        world.rank, world.size = rank, size
        found += [batch for batch in Batches(mixed, world).of_step(3) if batch.sequences]  # not those that idle
    for a, b in zip(found, expected, strict=True):
        assert a.sequences == b.sequences and torch.equal(a.inputs, b.inputs) and torch.equal(a.targets, b.targets)


def test_a_set_without_a_mask_counts_whole(big, masked_tokens):
    sets = {"masked": TokenDataset(masked_tokens), "whole": TokenDataset(big)}
    found = Mixture(sets, {"masked": 1, "whole": 1})
    names = [found.place(index)[0] for index in range(20)]
    _, targets = found.batch(range(20), 32, seed=0)
    ignored = (targets == IGNORE).any(axis=1)
    assert [names[row] for row in np.flatnonzero(ignored)] == ["masked"] * 10
    assert not (found.batch(range(20), 32, seed=0, loss_mask=False)[1] == IGNORE).any()


def test_a_run_says_what_each_set_gives_and_goes_on_to_the_bit(mixed, tmp_path, monkeypatch, capsys, big, small):
    whole = train(change(mixed, run_folder=tmp_path / "whole"))
    said = [line for line in capsys.readouterr().out.splitlines() if line.startswith("data: ")]
    assert len(said) == 2 and said[0].startswith("data: big: ") and "; 54 of 72 (75.00%) are " in said[0]
    gave = [(r["sequences/big"], r["sequences/small"]) for r in records(tmp_path / "whole")]
    assert {sum(pair) for pair in gave} == {9} and [sum(each) for each in zip(*gave, strict=True)] == [54, 18]
    assert checkpoint.read_facts(whole)["sequences"] == {"big": 54, "small": 18}
    real = Trainer.update

    def update(self):
        if self.step == 5:
            raise RuntimeError("power cut")
        return real(self)

    with monkeypatch.context() as patch, pytest.raises(RuntimeError, match="power cut"):
        patch.setattr(Trainer, "update", update)
        train(mixed)
    # Names in another order, and folders in another place, are the same run.
    moved = write_again(tmp_path / "moved", small)
    resumed = train(change(mixed, tokens={"small": moved, "big": big}, weights={"small": 1.0, "big": 3.0}))
    assert content(resumed) == content(whole)
    assert losses(mixed.train.run_folder) == losses(tmp_path / "whole")
    with pytest.raises(
        UserError, match=r"made otherwise \(data\.weights = \{'small': 1\.0, 'big': 3\.0\} there, .*2\.0\} here\)"
    ):
        train(change(mixed, weights={"big": 3.0, "small": 2.0}))
    with pytest.raises(UserError, match=r"made otherwise \(.*other token shards\)"):
        train(change(mixed, tokens={"big": big, "tiny": small}, weights={"big": 3.0, "tiny": 1.0}))
    with pytest.raises(UserError, match=r"made otherwise \(.*other token shards\)"):
        train(change(mixed, tokens=big, weights=None))


def write_again(folder, dataset):
    folder.mkdir()
    for path in dataset.iterdir():
        (folder / path.name).write_bytes(path.read_bytes())
    return folder


def test_sets_that_cannot_be_mixed(config, tmp_path, big, small, tokenizer, texts):
    copy = write_again(tmp_path / "copy", big)
    for option in ("tokens", "validation_tokens"):
        for same in (big, copy):
            sets = {
                option: {"a": big, "b": small, "c": same},
                **({"weights": dict.fromkeys("abc", 1.0)} if option == "tokens" else {}),
            }
            with pytest.raises(
                UserError, match=rf"data\.{option}: a \(.*\) and c \(.*\) hold the same tokens; name a set once"
            ):
                train(change(config, **sets))
    tiny = write(tmp_path / "tiny", tokenizer, texts[:1])
    with pytest.raises(UserError, match=r"tiny: .* fewer than a sequence needs"):
        train(change(config, tokens={"a": big, "b": tiny}, weights={"a": 1.0, "b": 1.0}))


def test_held_out_sets_have_a_loss_each(config, big, small, monkeypatch, capsys):
    """Each a line of its own; one that a crash left out is made up for, the others are not done again."""
    config = change(config, steps=6, evaluate_every=3, evaluation_sequences=6)
    alone = {}
    for name, folder in (("new", small), ("old", big)):
        run = config.train.run_folder.with_name(name)
        train(change(config, run_folder=run, validation_tokens=folder))
        alone |= {(r["step"], name): r["validation_loss"] for r in records(run) if "validation_loss" in r}
    assert len(set(alone.values())) == 4
    config = change(config, validation_tokens={"old": big, "new": small})
    real, done = Trainer.evaluate, []

    def evaluate(self, dataset):
        done.append(dataset.folder)
        if len(done) == 4:
            raise RuntimeError("power cut")
        return real(self, dataset)

    monkeypatch.setattr(Trainer, "evaluate", evaluate)
    with pytest.raises(RuntimeError, match="power cut"):
        train(change(config, checkpoint_every=1))
    run = config.train.run_folder
    checkpoint_of_the_end = run / "step-000006"  # comes before the validation, which may fail
    assert checkpoint.resolve(run) == checkpoint_of_the_end.resolve()
    capsys.readouterr()
    train(change(config, checkpoint_every=1))
    found = [r for r in records(run) if any(name.startswith("validation_loss") for name in r)]
    assert all(len(record) == 2 for record in found)
    assert {(r["step"], name[16:]): r[name] for r in found for name in r if name != "step"} == alone
    assert len(found) == 4
    said = capsys.readouterr().out
    assert "step 6  validation loss of old " in said and "validation loss of new " not in said
    # At the end of a run one set more is asked for: its loss alone is taken.
    del done[:]
    more = {"old": big, "new": small, "third": small}
    with pytest.raises(UserError, match="hold the same tokens"):
        train(change(config, validation_tokens=more))
    lines = (run / "metrics.jsonl").read_text().splitlines(keepends=True)
    (run / "metrics.jsonl").write_text("".join(line for line in lines if '6, "validation_loss/new"' not in line))
    train(config)
    assert done == [small]
    assert records(run)[-1] == {"step": 6, "validation_loss/new": alone[6, "new"]}
