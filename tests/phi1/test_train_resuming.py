"""Trainings that stop and go on."""

import signal
import subprocess
import sys
import threading
import time
import types

import pytest
import torch
import transformers
from safetensors.torch import load_file
from training import DROPOUT, ROOT, TINY, change, content, environment, losses, records, trainer_of, write, write_recipe

from phi1 import checkpoint
from phi1.errors import Interrupted, UserError
from phi1.huggingface import export_folder, import_folder, import_tokenizer
from phi1.model import Phi1
from phi1.tokenizer import train_tokenizer
from phi1.train import Trainer, train

pytestmark = pytest.mark.usefixtures("one_thread")


def test_a_crashed_run_goes_on_as_if_it_had_not_crashed(config, tmp_path, monkeypatch):
    config = change(config, **DROPOUT, document_masking=True)
    whole = train(config)
    crashed = change(config, run_folder=tmp_path / "crashed", device="auto" if not torch.cuda.is_available() else "cpu")
    real = Trainer.update

    def update(self):
        if self.step == 5:
            raise RuntimeError("power cut")
        return real(self)

    with monkeypatch.context() as patch:
        patch.setattr(Trainer, "update", update)
        with pytest.raises(RuntimeError, match="power cut"):
            train(crashed)
    assert checkpoint.resolve(crashed.train.run_folder).name == "step-000003"
    with open(crashed.train.run_folder / "metrics.jsonl", "a") as file:
        file.write('{"step": 6, "lo')  # a torn line
    (crashed.train.run_folder / "step-000006.tmp-1").mkdir()  # a torn checkpoint
    resumed = train(crashed)
    assert content(resumed) == content(whole)
    assert [r["step"] for r in records(crashed.train.run_folder)] == list(range(1, 9))
    assert losses(crashed.train.run_folder) == losses(config.train.run_folder)
    assert not list(crashed.train.run_folder.glob("*.tmp*"))


def test_interrupted_by_ctrl_c_then_resumed(config, tmp_path, capsys):
    """Through the real command line: exit status 130, then the same bits as a run that was left alone."""
    # Endless, so that the signal comes in time however slow the machine is; in its warmup, where the learning rate does
    # not depend on the number of steps.
    config = change(config, steps=100_000, warmup_steps=100_000, lr=30.0, checkpoint_every=100_000, **TINY, **DROPOUT)
    run = config.train.run_folder
    process = subprocess.Popen(
        [sys.executable, ROOT / "phi1" / "train.py", write_recipe(tmp_path, config)],
        cwd=tmp_path,
        env=environment(),
        stderr=subprocess.PIPE,
        text=True,
    )
    deadline = time.monotonic() + 300
    while not ((run / "metrics.jsonl").exists() and (run / "metrics.jsonl").read_bytes().count(b"\n") >= 3):
        assert process.poll() is None and time.monotonic() < deadline
        time.sleep(0.005)
    process.send_signal(signal.SIGINT)
    _, errors = process.communicate(timeout=300)
    assert process.returncode == 130, errors
    assert "stopping after this micro-batch" in errors and "Traceback" not in errors
    stopped = checkpoint.resolve(run)
    step = checkpoint.read_facts(stopped)["step"]
    assert step >= 3 and len(losses(run)) == step
    longer = change(config, steps=step + 5)
    resumed = train(longer)
    assert f"going on from {stopped}" in capsys.readouterr().out
    assert content(resumed) == content(train(change(longer, run_folder=tmp_path / "whole")))
    assert losses(run) == losses(tmp_path / "whole")


def test_a_changed_setting_is_said_or_refused(config, tokens, masked_tokens, capsys):
    train(change(config, steps=3))
    train(change(config, steps=4, lr=1e-3))
    out = capsys.readouterr().out
    assert (
        "changed since then: train.steps = 3 -> 4" in out and "changed since then: optimizer.lr = 0.003 -> 0.001" in out
    )
    with pytest.raises(UserError, match=r"run: holds a run made otherwise \(train\.seed = 0 there, 1 here\)"):
        train(change(config, seed=1))
    with pytest.raises(UserError, match=r"made otherwise \(other token shards\)"):
        train(change(config, tokens=masked_tokens))
    with pytest.raises(UserError, match=r"step-000004: past --steps 2"):
        train(change(config, steps=2))
    with pytest.raises(UserError, match=r"another model \(hidden_size = 32 there, 64 in the recipe\)"):
        train(change(config, hidden_size=64))


@pytest.mark.parametrize("where", ["micro-batch", "evaluation", "first step"])
def test_a_signal_is_acted_on_within_the_step(config, tmp_path, tokens, monkeypatch, where):
    """The half step's gradients are dropped: a run that goes on gives the bits of one that was not stopped."""
    config = change(
        config,
        steps=6,
        micro_batch=2,
        checkpoint_every=4,
        validation_tokens=tokens,
        evaluate_every=2,
        evaluation_sequences=8,
        **DROPOUT,
    )
    whole = train(change(config, run_folder=tmp_path / "whole"))
    at, passes = {"micro-batch": (5, 5 * 4 + 2 * 4 + 2), "evaluation": (2, 2 * 4 + 1), "first step": (0, 2)}[where], []
    real = Phi1.forward

    def forward(self, *arguments, **options):
        passes.append(1)
        if len(passes) == at[1]:
            signal.raise_signal(signal.SIGUSR1)
        return real(self, *arguments, **options)

    with monkeypatch.context() as patch, pytest.raises(Interrupted) as caught:
        patch.setattr(Phi1, "forward", forward)
        train(config)
    assert caught.value.status == 75 and len(passes) == at[1]  # not one micro-batch more
    run = config.train.run_folder
    kept = [checkpoint.step_of(path) for path in checkpoint.in_run(run)]
    assert kept == ([4, 5] if at[0] == 5 else [at[0]] if at[0] else [])
    resumed = train(config)
    assert content(resumed) == content(whole)
    assert losses(run) == losses(tmp_path / "whole")
    validated = [[r for r in records(folder) if "validation_loss" in r] for folder in (run, tmp_path / "whole")]
    assert validated[0] == validated[1] and len(validated[0]) == 3


def test_a_signal_waits_for_the_checkpoint_that_is_being_written(config, monkeypatch):
    """And then comes that of the last whole step."""
    told, real_update, real_write = threading.Event(), Trainer.update, checkpoint.write

    def update(self):
        if self.step == 4:
            signal.raise_signal(signal.SIGTERM)
            told.set()
        return real_update(self)

    def write(folder, *arguments):
        assert told.wait(60)
        return real_write(folder, *arguments)

    monkeypatch.setattr(Trainer, "update", update)
    monkeypatch.setattr(checkpoint, "write", write)
    with pytest.raises(Interrupted):
        train(config)
    assert [checkpoint.step_of(path) for path in checkpoint.in_run(config.train.run_folder)] == [3, 4]
    checkpoint.verify(config.train.run_folder / "step-000004")


def test_checkpoints_by_time(config, monkeypatch):
    """One more when the last is so old, and none where it is not."""
    clock = [0.0]
    monkeypatch.setattr("phi1.train.time", types.SimpleNamespace(monotonic=lambda: clock[0]))
    real = Trainer.update

    def update(self):
        clock[0] += 50.0
        return real(self)

    monkeypatch.setattr(Trainer, "update", update)
    config = change(config, steps=7, checkpoint_every=4, checkpoint_minutes=1.5)
    train(config)
    assert [checkpoint.step_of(path) for path in checkpoint.in_run(config.train.run_folder)] == [2, 4, 6, 7]
    with pytest.raises(UserError, match=r"train\.checkpoint_minutes = -1: must be at least 0"):
        change(config, checkpoint_minutes=-1)


def test_the_loss_scale_is_resumed(config, tmp_path):
    config = change(config, precision="fp16", loss_scale=2.0**30, steps=12, checkpoint_every=4, **TINY)
    whole = train(config)
    scale = checkpoint.read_facts(config.train.run_folder / "step-000004")["scaler"]["scale"]
    assert 2.0**26 <= scale < 2.0**30  # steps were skipped, and the others are still to come
    assert sum(record["skipped"] for record in records(config.train.run_folder)) > 4
    for step in (8, 12):
        (config.train.run_folder / f"step-{step:06d}").rename(tmp_path / f"step-{step:06d}")
    assert content(train(config)) == content(tmp_path / whole.name)


@pytest.mark.parametrize("precision", ["fp32", "fp16"])
def test_muon_goes_on_to_the_bit(config, tmp_path, precision):
    config = change(
        config, algorithm="muon", precision=precision, loss_scale=2.0**12, **(TINY if precision == "fp16" else {})
    )
    whole = train(config)
    run = config.train.run_folder
    assert losses(run)[-1] < losses(run)[0] - 0.3
    keys = {name: set() for name in ("w_in", "w_out", "b_in", "norm_weight", "embedding", "head_weight")}
    for path in load_file(whole / "optimizer.safetensors"):
        name, key = path.split("/")
        keys.get(name.split(".")[-1], set()).add(key)
    matrices = {"w_in", "w_out"}
    assert all(
        found == ({"momentum_buffer"} if name in matrices else {"exp_avg", "exp_avg_sq", "step"})
        for name, found in keys.items()
    )
    for step in (6, 8):
        (run / f"step-{step:06d}").rename(tmp_path / str(step))
    assert content(train(config)) == content(tmp_path / "8")
    with pytest.raises(UserError, match=r"made otherwise \(optimizer\.algorithm = muon there, adamw here\)"):
        train(change(config, algorithm="adamw"))


def test_a_checkpoint_from_before_an_option(config, capsys):
    """It was at what is now the default: that goes on without a word, another value is said or refused."""
    real = checkpoint.write_model

    def write_model(folder, model, tokenizer, facts, **options):
        for table, name in (("optimizer", "algorithm"), ("data", "weights"), ("train", "spikes")):
            del facts["recipe"][table][name]
        return real(folder, model, tokenizer, facts, **options)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(checkpoint, "write_model", write_model)
        train(change(config, steps=3))
    capsys.readouterr()
    with pytest.raises(UserError, match=r"made otherwise \(optimizer\.algorithm = adamw there, muon here\)"):
        train(change(config, algorithm="muon"))
    train(change(config, steps=4, spikes="skip"))
    said = [line for line in capsys.readouterr().out.splitlines() if "changed since then" in line]
    assert said == ["  changed since then: train.steps = 3 -> 4", "  changed since then: train.spikes = log -> skip"]


def test_finetuning_starts_from_a_model_that_went_through_transformers(config, tmp_path, tokenizer):
    """Which gives the tokenizer's file a post-processor."""
    base = train(change(config, steps=1))
    export_folder(tmp_path / "hf", *checkpoint.load_model(base))
    for kind in (transformers.AutoModelForCausalLM, transformers.AutoTokenizer):
        kind.from_pretrained(tmp_path / "hf").save_pretrained(tmp_path / "again")
    there = checkpoint.write_model(
        tmp_path / "imported", import_folder(tmp_path / "again"), import_tokenizer(tmp_path / "again"), {}
    )
    train(change(config, steps=1, run_folder=tmp_path / "tuned", init_from=there))
    other = checkpoint.write_model(tmp_path / "other", checkpoint.load_model(base)[0], tokenizer.with_fim(), {})
    with pytest.raises(UserError, match=r"has another tokenizer than .*tokens; tokenize with"):
        train(change(config, steps=1, run_folder=tmp_path / "x", init_from=other))


def test_finetuning_starts_from_a_checkpoint(config, tmp_path, tokenizer, texts, capsys):
    base = train(change(config, steps=3))
    tuned = change(config, run_folder=tmp_path / "tuned", init_from=config.train.run_folder, **DROPOUT)
    with trainer_of(tuned) as trainer:
        pass
    for name, value in checkpoint.load_model(base)[0].state_dict().items():
        assert torch.equal(trainer.model.state_dict()[name], value)
    assert not trainer.optimizer.state and trainer.step == 0
    final = train(tuned)
    assert checkpoint.read_facts(final)["init_from"] == {
        "folder": str(base),
        "step": 3,
        "hash": checkpoint.digest(base),
    }
    assert losses(tmp_path / "tuned")[0] < 5.5 < losses(config.train.run_folder)[0]
    other = write(tmp_path / "other", train_tokenizer(["while True:\n\tpass\n" * 9], 310), texts)
    with pytest.raises(UserError, match=r"has another tokenizer than .*other"):
        train(change(tuned, run_folder=tmp_path / "x", tokens=other))
    with pytest.raises(UserError, match=r"none: no such folder"):
        train(change(tuned, run_folder=tmp_path / "y", init_from=tmp_path / "none"))
    with pytest.raises(UserError, match=r"another model \(num_layers = 2 there, 3 in the recipe\)"):
        train(change(tuned, run_folder=tmp_path / "z", num_layers=3))
