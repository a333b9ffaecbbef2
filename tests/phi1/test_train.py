"""The trainer: gradients, schedule, failing, what it says."""

import contextlib
import errno
import gzip
import json
import math
import os
import sys
import threading
import types
from collections import Counter

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode
from training import DROPOUT, TINY, change, content, losses, records, trainer_of, write, write_recipe

import kernels
from phi1 import checkpoint
from phi1.cli import main
from phi1.distributed import World
from phi1.engine import Engine
from phi1.errors import UserError
from phi1.metrics import Metrics
from phi1.tokenizer import train_tokenizer
from phi1.train import Trainer, train

pytestmark = pytest.mark.usefixtures("one_thread")


def gradients(config, **changes):
    """Gradients of the first step, unclipped, flat."""
    config = change(config, clip_norm=1e9, **changes)
    with trainer_of(config) as trainer:
        facts = trainer.update()
    return torch.cat([parameter.grad.flatten() for parameter in trainer.model.parameters()]), facts


class Casts(TorchDispatchMode):
    """Counts the casts of each tensor, by its address."""

    def __init__(self):
        super().__init__()
        self.of = Counter()

    def __torch_dispatch__(self, op, types, args=(), kwargs=None):
        if op is torch.ops.aten._to_copy.default and args[0].dtype != kwargs.get("dtype"):
            self.of[args[0].data_ptr()] += 1
        return op(*args, **kwargs or {})


def test_weights_are_cast_once_a_step(config, monkeypatch):
    """Of 4 micro-batches; gradients and loss have the bits that they have with casts in each."""
    config, found = change(config, precision="bf16", **TINY | {"sequences_per_step": 8}, **DROPOUT), []
    for times in (1, 4):
        with trainer_of(config) as trainer, Casts() as casts:
            loss = trainer.update()["loss"]
        weights = [weight for name, weight in trainer.model.named_parameters() if name != "embedding"]  # its rows are
        assert {casts.of[weight.data_ptr()] for weight in weights} == {times}
        found.append(torch.cat([torch.tensor([loss]), *(p.grad.flatten() for p in trainer.model.parameters())]))
        monkeypatch.setattr(Engine, "step", lambda self: contextlib.nullcontext())
    assert torch.equal(*found)


def test_loss_falls_and_everything_is_written(config, tokens, capsys):
    config = change(
        config, steps=25, validation_tokens=tokens, evaluate_every=10, checkpoint_every=10, keep_last=1, **DROPOUT
    )
    final = train(config)
    run = config.train.run_folder
    assert final == run / "step-000025"
    assert [path.name for path in run.glob("step-*")] == ["step-000025"]
    values = losses(run)
    assert len(values) == 25
    assert abs(values[0] - math.log(320)) < 0.2  # random weights know nothing
    assert values[-1] < values[0] - 1.5
    evaluations = {r["step"]: r["validation_loss"] for r in records(run) if "validation_loss" in r}
    assert list(evaluations) == [10, 20, 25]
    assert abs(evaluations[25] - values[-1]) < 0.2
    facts = checkpoint.read_facts(final)
    assert (facts["step"], facts["tokens"]) == (25, 25 * 8 * 32)
    assert facts["recipe"]["train"]["steps"] == 25
    out = capsys.readouterr().out
    assert "FLOPs per token = 6 x (parameters - input embedding) + 12 x layers x attention width x sequence" in out
    assert "no MFU: the peak of CPU in fp32 is not known here" in out and "MFU" not in out.split("not known here")[1]
    assert out.count("ETA") == 13  # every second step, and the last
    assert "tokens/s  data " in out
    for record in records(run):
        if "loss" in record:  # the machine's memory: more than the interpreter's, less than any machine's
            assert (
                0 <= record["data_seconds"] < record["seconds"]
                and 1e7 < record["memory"] < 1e12
                and "mfu" not in record
            )
    # A finished run is left as it is.
    before = (final / "checkpoint.json").stat().st_mtime_ns
    assert train(config) == final
    assert (final / "checkpoint.json").stat().st_mtime_ns == before


@pytest.mark.parametrize("precision", ["bf16", "fp16"])
def test_lower_precisions_follow_fp32(config, tmp_path, precision):
    config = change(config, **TINY)
    train(config)
    train(change(config, run_folder=tmp_path / precision, precision=precision))
    exact, low = losses(config.train.run_folder), losses(tmp_path / precision)
    assert low != exact
    # The loss is of order 5 and its logits carry half a unit in the last place, 2^-9 in bf16: 0.4% of it.
    assert max(abs(a - b) for a, b in zip(exact, low, strict=True)) < 5 * 2**-8
    assert checkpoint.load_model(tmp_path / precision)[0].embedding.dtype == torch.float32  # master parameters


@pytest.mark.parametrize("masked", [False, True])
def test_accumulation_does_not_change_the_gradient(config, masked_tokens, masked):
    if masked:
        config = change(config, tokens=masked_tokens)
    whole, facts = gradients(config, micro_batch=8)
    if masked:
        assert 0 < facts["counted_tokens"] < 8 * 32
    for micro_batch in (1, 2, 4):
        parts, its_facts = gradients(
            config, micro_batch=micro_batch, run_folder=config.train.run_folder / str(micro_batch)
        )
        # float32 sums in another order: a few units in the last place (2^-24) of the largest terms.
        assert (parts - whole).norm() < 1e-6 * whole.norm()
        assert its_facts["loss"] == pytest.approx(facts["loss"], rel=1e-6)
        assert its_facts["counted_tokens"] == facts["counted_tokens"]
    if masked:  # the tolerance bites: a mean of the micro-batches' means is another gradient
        with trainer_of(change(config, micro_batch=2, run_folder=config.train.run_folder / "naive")) as trainer:
            for batch in trainer.data.of_step(0):
                (trainer.model(batch.inputs, targets=batch.targets) / batch.counted / 4).backward()
        naive = torch.cat([parameter.grad.flatten() for parameter in trainer.model.parameters()])
        assert (naive - whole).norm() > 1e-2 * whole.norm()


def test_compiled_code_gives_the_same_gradient(config):
    """Accumulated over micro-batches with dropout seeds of their own; needs a C++ compiler, as torch.compile does."""
    config = change(config, num_layers=1, **TINY, **DROPOUT)
    eager, facts = gradients(config)
    compiled, its_facts = gradients(change(config, compile=True, run_folder=config.train.run_folder / "compiled"))
    assert its_facts["loss"] == pytest.approx(facts["loss"], rel=1e-6)
    assert (compiled - eager).norm() < 1e-6 * eager.norm()


def test_the_loss_mask_can_be_ignored(config, masked_tokens):
    _, facts = gradients(change(config, tokens=masked_tokens, loss_mask=False))
    assert facts["counted_tokens"] == 8 * 32


def test_document_masking_reaches_the_model(config):
    crossing, _ = gradients(config)
    inside, _ = gradients(change(config, document_masking=True, run_folder=config.train.run_folder / "inside"))
    assert (crossing - inside).norm() > 1e-3 * crossing.norm()


def test_the_schedule_and_clipping_reach_the_optimizer(config):
    train(change(config, steps=4, lr=1e-2, clip_norm=1e-3))
    assert [record["lr"] for record in records(config.train.run_folder)] == pytest.approx([5e-3, 1e-2, 1e-2, 5e-3])
    with trainer_of(change(config, clip_norm=1e-3, run_folder=config.train.run_folder / "clipped")) as trainer:
        facts = trainer.update()
        norm = torch.cat([parameter.grad.flatten() for parameter in trainer.model.parameters()]).norm()
    assert facts["grad_norm"] > 0.1 and float(norm) == pytest.approx(1e-3, rel=1e-3)


def test_evaluation_is_the_mean_over_counted_tokens(config, masked_tokens):
    config = change(config, validation_tokens=masked_tokens, evaluation_sequences=10, **DROPOUT)
    with trainer_of(config) as trainer:
        found = trainer.evaluate(trainer.data.validation[""])
        inputs, targets = (torch.from_numpy(a) for a in trainer.data.validation[""].batch(range(10), 32, seed=0))
    model = trainer.model.eval()  # no dropout
    with torch.no_grad():
        expected = torch.nn.functional.cross_entropy(model(inputs).flatten(0, 1), targets.flatten())
    assert found == pytest.approx(expected.item(), rel=1e-5)


def test_an_overflow_in_fp16_skips_the_step_and_lowers_the_scale(config):
    config = change(config, precision="fp16", loss_scale=2.0**40, **TINY)
    with trainer_of(config) as trainer:
        before = {name: value.clone() for name, value in trainer.model.state_dict().items()}
        facts = trainer.update()
        assert facts["skipped"] and "grad_norm" not in facts and facts["loss_scale"] == 2.0**39
        assert all(torch.equal(value, before[name]) for name, value in trainer.model.state_dict().items())
        skipped = 1
        while facts["skipped"]:
            assert "trouble" not in facts
            facts = trainer.update()
            skipped += 1
            assert skipped < 40
        assert not torch.equal(trainer.model.head_weight, before["head_weight"])
        assert skipped > 12  # more than the steps in a row that trouble may skip


def test_a_full_disk_ends_the_run_and_keeps_the_checkpoint_before(config, monkeypatch, capsys, tmp_path):
    recipe = write_recipe(tmp_path, config)
    real = checkpoint.write

    def write_full(folder, *arguments, **options):
        if folder.name == "step-000006":

            def full(descriptor):
                raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

            monkeypatch.setattr(os, "fsync", full)
        return real(folder, *arguments, **options)

    with monkeypatch.context() as patch:
        patch.setattr(checkpoint, "write", write_full)
        assert main(["train", str(recipe)]) == 2
        monkeypatch.undo()
    assert "phi1: error: no space left while writing" in capsys.readouterr().err
    assert checkpoint.resolve(config.train.run_folder).name == "step-000003"
    assert train(config).name == "step-000008"


def test_training_goes_on_while_a_checkpoint_is_written(config, tmp_path, monkeypatch):
    """Of what was when it was taken: here it is written only when the next step is done, to the same bits."""
    real_update, real_write, stepped, waited = Trainer.update, checkpoint.write, threading.Event(), []

    def update(self):
        facts = real_update(self)
        stepped.set()
        return facts

    def write(folder, *arguments):
        if folder.name == "step-000003":
            stepped.clear()
            waited.append(stepped.wait(60))
        return real_write(folder, *arguments)

    config = change(config, steps=6)
    whole = train(change(config, run_folder=tmp_path / "whole"))
    monkeypatch.setattr(Trainer, "update", update)
    monkeypatch.setattr(checkpoint, "write", write)
    train(config)
    assert waited == [True]
    for name in ("step-000003", "step-000006"):
        assert content(config.train.run_folder / name) == content(whole.with_name(name))


def test_a_checkpoint_that_cannot_be_written_ends_the_run_at_the_next_step(config, monkeypatch):
    def write(folder, *arguments):
        raise OSError(errno.EIO, os.strerror(errno.EIO))

    monkeypatch.setattr(checkpoint, "write", write)
    real = Trainer.update

    def update(self):
        if self.step == 3:
            self.writer._thread.join()
        return real(self)

    monkeypatch.setattr(Trainer, "update", update)
    with pytest.raises(OSError, match=os.strerror(errno.EIO)):
        train(change(config, steps=100))
    assert [record["step"] for record in records(config.train.run_folder)] == [1, 2, 3]


def test_a_disk_too_full_for_metrics_ends_the_run(config, monkeypatch):
    real = Metrics.record

    def record(self, step, **values):
        if step == 5:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        real(self, step, **values)

    with monkeypatch.context() as patch:
        patch.setattr(Metrics, "record", record)
        with pytest.raises(UserError, match=r"no space left in .*run: free space"):
            train(config)
    train(config)
    assert [record["step"] for record in records(config.train.run_folder)] == list(range(1, 9))


def test_what_refuses_metrics_is_told_to_all_processes(config, monkeypatch):
    """Of which rank 0 alone writes them: it is raised where they agree on the next step, not in rank 0 alone."""

    def record(self, step, **values):
        raise OSError(errno.EIO, os.strerror(errno.EIO))

    agreed, real = [], World.each

    def each(self, action):
        try:
            return real(self, action)
        except OSError as error:
            agreed.append(error.errno)
            raise

    monkeypatch.setattr(Metrics, "record", record)
    monkeypatch.setattr(World, "each", each)
    with pytest.raises(OSError, match=os.strerror(errno.EIO)):
        train(config)
    assert agreed == [errno.EIO]
    with pytest.raises(OSError, match=os.strerror(errno.EIO)):
        train(change(config, steps=1, run_folder=config.train.run_folder / "short"))  # no next step


def test_bad_data_is_named_before_anything_is_built(config, tmp_path, tokenizer, texts):
    with pytest.raises(UserError, match="no token shards there"):
        train(change(config, tokens=tmp_path / "none"))
    small = write(tmp_path / "small", tokenizer, texts[:1])
    with pytest.raises(UserError, match="fewer than a sequence needs"):
        train(change(config, tokens=small))
    with pytest.raises(UserError, match=r"tokenizer of \d+ entries, more than model\.vocab_size = 300"):
        train(change(config, vocab_size=300))
    other = write(tmp_path / "other", train_tokenizer(["while True:\n\tpass\n" * 9], 310), texts)
    with pytest.raises(UserError, match="other: made by another tokenizer"):
        train(change(config, validation_tokens=other))
    path = other / "00000.bin"
    path.write_bytes(path.read_bytes()[:-2] + b"\0\0")
    with pytest.raises(UserError, match=r"00000\.bin: corrupt shard \(its SHA-256"):
        train(change(config, tokens=other))


def test_a_gpu_that_is_not_there(config, monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(UserError, match="no GPU that torch can use here; choose auto or cpu"):
        train(change(config, device="cuda"))
    for device in ("tpu9", "meta"):
        with pytest.raises(UserError, match=f"train.device = '{device}': must be auto, cpu, cuda or cuda:N"):
            train(change(config, device=device))


def test_a_backend_that_cannot_serve_is_named(config):
    with kernels.use_backend("cuda"), pytest.raises(UserError, match="backend 'cuda' cannot serve this call"):
        train(config)


def test_a_known_peak_gives_an_mfu(config, monkeypatch, capsys):
    monkeypatch.setattr("phi1.train.peak_flops", lambda device, dtype: 1e12)
    train(change(config, steps=2))
    out = capsys.readouterr().out
    assert (
        "MFU = tokens/s x FLOPs per token / peak of 1 TFLOP/s (data sheet, dense bf16)" in out
        and "tokens/s  MFU " in out
    )
    for record in records(config.train.run_folder):
        # 6 (parameters - embedding) + 12 x 2 layers x 32 wide x 32 tokens, of 256 tokens a step.
        flop = 6 * (37_824 - 320 * 32) + 12 * 2 * 32 * 32
        assert record["mfu"] == pytest.approx(flop * 8 * 32 / record["seconds"] / 1e12, rel=1e-9)


def test_a_trace_of_steps(config, tmp_path, capsys):
    train(change(config, profile=2))
    path = config.train.run_folder / "profile" / "step-000004-000005.json.gz"
    assert [p.name for p in path.parent.iterdir()] == [path.name]
    events = json.loads(gzip.decompress(path.read_bytes()))["traceEvents"]
    steps = {e["name"] for e in events if e.get("name", "").startswith("ProfilerStep#")}
    assert len(steps) == 2 and any("linear_cross_entropy" in e.get("name", "") for e in events)
    assert f"a trace of steps 4 to 5 is {path}" in capsys.readouterr().out
    # Of a run that ends before, what there is, or that there is none.
    train(change(config, profile=9, steps=5, run_folder=tmp_path / "short"))
    assert [p.name for p in (tmp_path / "short" / "profile").iterdir()] == ["step-000004-000005.json.gz"]
    capsys.readouterr()
    train(change(config, profile=2, steps=3, run_folder=tmp_path / "shorter"))
    assert "no trace: only 3 steps were done" in capsys.readouterr().out
    assert not (tmp_path / "shorter" / "profile").exists()


@pytest.mark.parametrize("tracker", ["trackio", "wandb"])
def test_a_tracker(config, tokens, monkeypatch, tracker):
    """Its calls, by the interface that both have: init(project, name, group, config), log(numbers, step), finish()."""
    with monkeypatch.context() as patch:
        patch.setitem(sys.modules, tracker, None)
        with pytest.raises(
            UserError, match=f"{tracker} is not installed: `pip install {tracker}`, or leave --tracker out"
        ):
            train(change(config, steps=1, tracker=tracker))
    calls = []

    def init(*, project, name, group, config):
        calls.append(("init", project, name, group, config["train"]["steps"]))
        if len(calls) > 10:
            raise RuntimeError("no account")

    module = types.SimpleNamespace(
        init=init,
        log=lambda metrics, step: calls.append(("log", metrics, step)),
        finish=lambda: calls.append(("finish",)),
    )
    monkeypatch.setitem(sys.modules, tracker, module)
    config = change(config, steps=2, tracker=tracker, validation_tokens=tokens, evaluation_sequences=4)
    train(config)
    assert calls[0] == ("init", "phi1", "run-from-0", "run", 2) and calls[-1] == ("finish",)
    written = [
        {name: value for name, value in record.items() if name != "step"} for record in records(config.train.run_folder)
    ]
    assert [call[1] for call in calls[1:-1]] == written and [call[2] for call in calls[1:-1]] == [1, 2, 2]
    train(change(config, steps=4))
    assert calls[5] == ("init", "phi1", "run-from-2", "run", 4)
    with pytest.raises(UserError, match=rf"--tracker {tracker} cannot start: no account; mend that, or leave it out"):
        train(change(config, steps=5))


def test_tensorboard(config, monkeypatch, tokens, masked_tokens):
    with monkeypatch.context() as patch:
        patch.setitem(sys.modules, "torch.utils.tensorboard", None)
        with pytest.raises(UserError, match="tensorboard is not installed: `pip install tensorboard`"):
            train(change(config, steps=1, tensorboard=True))
        train(change(config, steps=1))  # not asked for: not needed
    from tensorboard.backend.event_processing import event_accumulator

    config = change(config, validation_tokens={"a": tokens, "b": masked_tokens}, evaluation_sequences=4)
    train(change(config, steps=4, tensorboard=True))
    events = event_accumulator.EventAccumulator(str(config.train.run_folder / "tensorboard")).Reload()
    assert [event.step for event in events.Scalars("loss")] == [2, 3, 4]
    for name in ("validation_loss/a", "validation_loss/b"):  # a curve each
        assert [event.step for event in events.Scalars(name)] == [4]
    assert [event.value for event in events.Scalars("loss")] == pytest.approx(losses(config.train.run_folder)[1:])
