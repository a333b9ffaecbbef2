"""Steps that go wrong: noted, skipped, and not for ever."""

import json
import math
import random

import pytest
import torch
from training import change, content, losses, records, trainer_of

from phi1 import checkpoint, trouble
from phi1.errors import UserError
from phi1.metrics import Metrics
from phi1.tokens import TokenWriter
from phi1.train import Trainer, train
from phi1.trouble import IN_A_ROW, Trouble

pytestmark = pytest.mark.usefixtures("one_thread")


def watched(skip_spikes, steps=200):
    """Trouble that has seen steps with a loss of about 3 and a norm of about 1, deviation 0.1."""
    generator, found = random.Random(0), Trouble(skip_spikes)
    for step in range(1, steps + 1):
        assert found.judge(step, generator.gauss(3, 0.1), generator.gauss(1, 0.1)) == (None, False)
    return found


@pytest.mark.parametrize("skip", [False, True])
def test_what_is_a_spike(skip):
    for loss, norm, what in (
        (3.7, 1.0, r"the loss is 3.7, a spike: above 3."),
        (3.0, 1.7, "the gradient's norm is 1.7"),
    ):
        wrong, skipped = watched(skip).judge(201, loss, norm)
        assert wrong.startswith(what) and skipped == skip
    assert watched(skip).judge(201, 3.4, 1.4) == (None, False)
    assert watched(skip).judge(201, 0.1, 0.01) == (None, False)  # falling is not trouble
    assert watched(skip, 63).judge(64, 1e9, 1e9) == (None, False)  # too few steps to tell
    assert watched(skip, 64).judge(65, 1e9, 1e9)[0] is not None


def test_a_new_level_is_accepted_in_time():
    found = watched(True)
    skipped = [found.judge(step, 5.0, 1.0)[1] for step in range(201, 260)]
    assert skipped[0] and not any(skipped[IN_A_ROW:])


@pytest.mark.parametrize("loss", [math.nan, math.inf, None])
def test_what_is_always_skipped(loss):
    found = watched(False)
    assert found.judge(201, loss, 1.0)[1]
    assert found.judge(202, 3.0, math.inf)[1]
    assert found.skipped == [201, 202]
    assert math.isfinite(sum(found.state()["losses"] + found.state()["norms"]))  # never judged by
    json.dumps(found.state(), allow_nan=False)


def test_what_is_too_much():
    found = Trouble(False)
    for step in range(5, 5 + IN_A_ROW):
        found.judge(step, math.nan, 1.0)
        assert not found.too_much(step)
    assert Trouble(False, json.loads(json.dumps(found.state()))).judge(15, math.nan, 1.0)[1]
    found.judge(15, math.nan, 1.0)
    assert found.too_much(15) and not found.too_much(16)


def poison(monkeypatch, steps, value=math.nan):
    """Makes the loss of micro-batch 1 of these steps (from 0) what it is times `value`."""
    real = Trainer.update

    def update(self):
        batches = {batch.seed for batch in self.data.of_step(self.step)[1:]} if self.step in steps else set()
        network = self.engine.network
        self.engine.network = lambda *a, **k: network(*a, **k) * (value if k["dropout_seed"] in batches else 1.0)
        try:
            return real(self)
        finally:
            self.engine.network = network

    monkeypatch.setattr(Trainer, "update", update)


@pytest.mark.parametrize("precision", ["fp32", "fp16"])
def test_a_step_that_is_not_finite_is_skipped_again_after_a_restart(config, tmp_path, monkeypatch, capsys, precision):
    """A run goes on from before it to the same bits: it neither ends there nor ends there again."""
    config = change(config, precision=precision, sequence_length=8)
    poison(monkeypatch, {4})
    whole = train(config)
    record = records(config.train.run_folder)[4]
    assert record["step"] == 5 and record["skipped"] and "loss" not in record
    assert record["trouble"] == "the loss is nan" and record["sequences"] == [36, 37, 38, 39]  # of 32 … 39
    assert checkpoint.read_facts(whole)["trouble"]["skipped"] == [5]
    assert "step 5  the loss is nan; the step is skipped" in capsys.readouterr().out
    assert len(losses(config.train.run_folder)) == 7
    again = tmp_path / "again"
    train(change(config, run_folder=again, steps=3))
    train(change(config, run_folder=again))
    assert content(again / "step-000008") == content(whole)
    assert checkpoint.read_facts(again / "step-000008")["trouble"] == checkpoint.read_facts(whole)["trouble"]


def test_a_skipped_step_changes_nothing_but_the_count(config, monkeypatch):
    poison(monkeypatch, {1}, math.inf)
    with trainer_of(config) as trainer:
        trainer.update()
        before = [value.clone() for value in trainer.model.parameters()]
        moments = [value.clone() for state in trainer.optimizer.state.values() for value in state.values()]
        assert trainer.update()["trouble"] == "the loss is inf"
        assert trainer.step == 2 and trainer.tokens_seen == 2 * 8 * 32
        assert all(torch.equal(a, b) for a, b in zip(before, trainer.model.parameters(), strict=True))
        after = [value for state in trainer.optimizer.state.values() for value in state.values()]
        assert all(torch.equal(a, b) for a, b in zip(moments, after, strict=True))
        assert not trainer.update().get("skipped")


@pytest.mark.parametrize("spikes", ["log", "skip"])
def test_a_spike_is_noted_or_skipped(config, monkeypatch, spikes):
    monkeypatch.setattr(trouble, "MEMORY", 6)  # three steps tell what is usual
    poison(monkeypatch, {5}, 1000.0)
    train(change(config, spikes=spikes))
    found = {record["step"]: record for record in records(config.train.run_folder)}
    assert [step for step, record in found.items() if "trouble" in record] == [6]
    assert "a spike: above" in found[6]["trouble"] and found[6]["sequences"] == list(range(40, 48))
    assert found[6].get("skipped", False) == (spikes == "skip") and found[6]["loss"] > 100


def test_too_many_in_a_row_end_the_run(config, monkeypatch, capsys):
    poison(monkeypatch, set(range(4, 99)))
    config = change(config, steps=30)
    for _ in range(2):  # the count is in the checkpoints: after steps 6, 9, 12
        with pytest.raises(
            UserError, match=r"step 15: the loss is nan, and the 10 steps before it were skipped too;.*--lr"
        ):
            train(config)
    assert capsys.readouterr().out.count("going on from") == 1
    monkeypatch.undo()
    assert train(config).name == "step-000030"


def test_a_step_in_which_no_token_counts_is_skipped(config, tmp_path, tokenizer):
    """A set that masks all of it ends the run."""
    for name, documents in (("some", [40] * 30 + [4] * 200), ("none", [4000])):
        writer = TokenWriter(tmp_path / name, tokenizer, masked=True, identity={})
        writer.write(0, [([1] * length, [int(length < 9)] * length) for length in documents])
        writer.finish(1)
    config = change(config, sequences_per_step=1, micro_batch=1, steps=12)
    train(change(config, tokens=tmp_path / "some"))
    found = [record["trouble"] for record in records(config.train.run_folder) if record.get("skipped")]
    assert 0 < len(found) < 12 and set(found) == {"no token counts in the loss (the loss mask is 0 throughout)"}
    with pytest.raises(UserError, match=r"step 11: no token counts in the loss .*and the 10 steps before it"):
        train(change(config, tokens=tmp_path / "none", run_folder=tmp_path / "none-run"))


def test_weights_that_are_not_finite_are_called_that(config, tmp_path, tokenizer):
    """At the start, and instead of a checkpoint of them."""
    base = train(change(config, steps=3))
    model, _ = checkpoint.load_model(base)
    with torch.no_grad():
        model.blocks[1].w_in[3, :5] = math.inf
    bad = checkpoint.write_model(tmp_path / "bad", model, tokenizer, {})
    message = (
        r"bad: weights that are NaN or infinite \(5 of 5,120 in blocks\.1\.w_in\); choose an earlier or another one"
    )
    with pytest.raises(UserError, match=message):
        train(change(config, init_from=bad, run_folder=tmp_path / "tuned"))
    with trainer_of(config) as trainer:
        trainer.update()
        with torch.no_grad():
            trainer.model.head_bias[7] = math.nan
        with pytest.raises(UserError, match=r"step 4 is not saved: .* \(1 of 320 in head_bias\); .*step 3 is kept"):
            trainer._save()
    assert checkpoint.resolve(config.train.run_folder) == base


def test_a_damaged_line_of_metrics_is_left_out_and_kept(config, capsys):
    train(change(config, steps=6))
    path = config.train.run_folder / "metrics.jsonl"
    lines = path.read_bytes().splitlines(keepends=True)
    damaged = [
        lines[0],
        b'{"step": 2, "lo\xff\n',
        b'{"loss": 1}\n',
        b"\n",
        b"7\n",
        b'{"step": null}\n',
        *lines[1:],
        b'{"st',
    ]
    path.write_bytes(b"".join(damaged))
    train(change(config, steps=7))
    said = f"{path}: lines 2, 3, 4, 5, 6 are no records and left out; the file as it was is {path}.damaged"
    assert said in capsys.readouterr().out.splitlines()
    assert path.with_name("metrics.jsonl.damaged").read_bytes() == b"".join(damaged)
    assert [record["step"] for record in records(config.train.run_folder)] == list(range(1, 8))


def test_metrics_know_what_was_validated(tmp_path):
    metrics = Metrics(tmp_path, 0, tensorboard=False)
    assert metrics.validated == {}
    for step in (1, 2, 3):
        metrics.record(step, loss=1.0, trouble="words", sequences=[1, 2])
        metrics.record(step, validation_loss=2.0)
        if step == 1:
            metrics.record(step, **{"validation_loss/code": 2.0})
    metrics.close()
    for step in (2, 9):
        metrics = Metrics(tmp_path, step, tensorboard=False)
        assert metrics.validated == {"validation_loss": 2, "validation_loss/code": 1}
        metrics.close()
