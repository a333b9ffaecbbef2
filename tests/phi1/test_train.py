"""The trainer: gradients, schedule, resuming, stopping, failing."""

import dataclasses
import errno
import json
import math
import os
import pathlib
import random
import signal
import subprocess
import sys
import time

import pytest
import torch
from torch.distributed.run import get_args_parser

import kernels
from phi1 import checkpoint
from phi1.cli import main
from phi1.config import PRESETS, DataConfig, LoopConfig, ModelConfig, OptimizerConfig, TrainConfig
from phi1.distributed import StopSignals, World, native_precision
from phi1.errors import UserError
from phi1.metrics import Metrics, duration, flops_per_token, parameter_count, peak_flops
from phi1.model import Phi1
from phi1.optimizer import learning_rate, make_optimizer
from phi1.tokenizer import train_tokenizer
from phi1.tokens import TokenWriter
from phi1.train import Trainer, train

ROOT = pathlib.Path(__file__).parents[2]
MODEL = ModelConfig(
    vocab_size=320, hidden_size=32, intermediate_size=64, num_layers=2, num_heads=2, num_kv_heads=2, head_dim=16,
    rotary_dim=8, max_positions=64,
)  # fmt: skip
TINY = {"sequence_length": 8, "sequences_per_step": 4, "micro_batch": 2}
"""For what is slow on a CPU: fp16, and whole processes."""
DROPOUT = {"attention_dropout": 0.1, "residual_dropout": 0.1}


@pytest.fixture(scope="module", autouse=True)
def one_thread():
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture(scope="module")
def texts():
    generator = random.Random(0)
    return [f"def f{i % 7}(x):\n    return x + {generator.randint(0, 9)}\n" for i in range(300)]


@pytest.fixture(scope="module")
def tokenizer(texts):
    return train_tokenizer(texts, 320)


def write(folder, tokenizer, texts, masked=False):
    writer = TokenWriter(folder, tokenizer, masked=masked, identity={})
    encoded = tokenizer.encode_batch(texts)
    # With a mask, every document counts a different share of its tokens, some nothing but the end token.
    masks = [[int(j >= len(ids) - i % 6) for j in range(len(ids))] if masked else None for i, ids in enumerate(encoded)]
    writer.write(0, zip(encoded, masks, strict=True))
    return writer.finish(1).folder


@pytest.fixture(scope="module")
def tokens(tmp_path_factory, tokenizer, texts):
    return write(tmp_path_factory.mktemp("data") / "tokens", tokenizer, texts)


@pytest.fixture(scope="module")
def masked_tokens(tmp_path_factory, tokenizer, texts):
    return write(tmp_path_factory.mktemp("data") / "masked", tokenizer, texts, masked=True)


@pytest.fixture
def config(tmp_path, tokens):
    return TrainConfig(
        MODEL,
        DataConfig(tokens, sequence_length=32),
        LoopConfig(tmp_path / "run", steps=8, sequences_per_step=8, micro_batch=4, precision="fp32", device="cpu",
                   log_every=2, checkpoint_every=3, keep_last=99),
        OptimizerConfig(lr=3e-3, warmup_steps=2),
    )  # fmt: skip


def change(config, **changes):
    """config with fields changed by their flat names, as on the command line."""
    for table in dataclasses.fields(config):
        mine = {f.name: changes.pop(f.name) for f in dataclasses.fields(table.type) if f.name in changes}
        config = dataclasses.replace(config, **{table.name: dataclasses.replace(getattr(config, table.name), **mine)})
    assert not changes, changes
    return config


def records(run):
    return [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]


def losses(run):
    return [record["loss"] for record in records(run) if "loss" in record]


def content(folder):
    return {name: (folder / name).read_bytes() for name in ("model.safetensors", "optimizer.safetensors")}


def gradients(config, **changes):
    """Gradients of the first step, unclipped, flat."""
    config = change(config, clip_norm=1e9, **changes)
    with World("cpu") as world:
        trainer = Trainer(config, world)
        facts, _ = trainer.update(False)
    return torch.cat([parameter.grad.flatten() for parameter in trainer.model.parameters()]), facts


# --- the loop ---


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
    assert "measured: 1024 x 1024 matrix product" in out
    assert out.count("ETA") == 13  # every second step, and the last
    assert "tokens/s  MFU" in out
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


@pytest.mark.parametrize(("flags", "precision"), [("avx2 avx512f", "fp32"), ("avx512_bf16 avx2", "bf16")])
def test_automatic_precision_is_what_the_device_has_instructions_for(config, monkeypatch, capsys, flags, precision):
    monkeypatch.setattr(pathlib.Path, "read_text", lambda self, encoding: f"flags : fpu {flags}\n")
    assert native_precision(torch.device("cpu")) == precision
    monkeypatch.undo()
    monkeypatch.setattr("phi1.train.native_precision", lambda device: precision)
    train(change(config, steps=1, precision="auto"))
    assert f"{precision} on 1 x CPU" in capsys.readouterr().out
    assert native_precision(torch.device("cpu")) in ("bf16", "fp32")  # whatever this machine is


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
        with World("cpu") as world:
            trainer = Trainer(change(config, micro_batch=2, run_folder=config.train.run_folder / "naive"), world)
            for index in range(4):
                inputs, targets, _, _ = trainer._batch(index)
                (trainer.model(inputs, targets=targets) / (targets != -100).sum() / 4).backward()
        naive = torch.cat([parameter.grad.flatten() for parameter in trainer.model.parameters()])
        assert (naive - whole).norm() > 1e-2 * whole.norm()


def test_compiled_code_gives_the_same_gradient(config):
    """Accumulated over micro-batches with dropout seeds of their own; needs a C++ compiler, as torch.compile does."""
    config = change(config, num_layers=1, **TINY, **DROPOUT)
    eager, facts = gradients(config)
    compiled, its_facts = gradients(change(config, compile=True, run_folder=config.train.run_folder / "compiled"))
    assert its_facts["loss"] == pytest.approx(facts["loss"], rel=1e-6)
    assert (compiled - eager).norm() < 1e-6 * eager.norm()


def test_every_micro_batch_has_its_own_samples_and_dropout(config):
    with World("cpu") as world:
        trainer = Trainer(config, world)
        first = [trainer._batch(index) for index in range(2)]
        again = [trainer._batch(index) for index in range(2)]
        trainer.step = 1
        later = [trainer._batch(index) for index in range(2)]
    assert len({seed for *_, seed in first + later}) == 4
    assert all(0 <= seed < 2**52 for *_, seed in first + later)
    assert [seed for *_, seed in again] == [seed for *_, seed in first]
    rows = {tuple(row) for inputs, *_ in first + later for row in inputs.tolist()}
    assert len(rows) == 16  # sequences 0 … 15, none twice
    assert torch.equal(first[1][0], torch.from_numpy(trainer.dataset.batch(range(4, 8), 32, seed=0)[0]))


def test_the_loss_mask_can_be_ignored(config, masked_tokens):
    _, facts = gradients(change(config, tokens=masked_tokens, loss_mask=False))
    assert facts["counted_tokens"] == 8 * 32


def test_document_masking_reaches_the_model(config):
    crossing, _ = gradients(config)
    inside, _ = gradients(change(config, document_masking=True, run_folder=config.train.run_folder / "inside"))
    assert (crossing - inside).norm() > 1e-3 * crossing.norm()


def test_weight_decay_acts_on_matrices_only():
    optimizer = make_optimizer(Phi1(MODEL), OptimizerConfig(weight_decay=0.1))
    decayed, free = optimizer.param_groups
    assert (decayed["weight_decay"], free["weight_decay"]) == (0.1, 0.0)
    assert {parameter.dim() for parameter in decayed["params"]} == {2}
    assert {parameter.dim() for parameter in free["params"]} == {1}
    assert len(decayed["params"]) == 2 + 2 * MODEL.num_layers  # embedding, lm_head, w_in and w_out a layer
    assert optimizer.defaults["fused"]


def test_the_papers_learning_rates():
    paper = OptimizerConfig(lr=1e-3, warmup_steps=750)
    expected = {0: 1e-3 / 750, 374: 0.5e-3, 749: 1e-3, 750: 1e-3, 18_375: 0.5e-3, 24_000: 1e-3 * 12_000 / 35_250,
                35_999: 1e-3 / 35_250}  # fmt: skip
    assert {step: learning_rate(paper, step, 36_000) for step in expected} == pytest.approx(expected, rel=1e-12)
    floor = OptimizerConfig(lr=1e-3, lr_floor=1e-4, warmup_steps=0)
    assert learning_rate(floor, 0, 10) == 1e-3
    assert learning_rate(floor, 5, 10) == pytest.approx(5.5e-4)
    short = [learning_rate(paper, step, 100) for step in range(100)]  # --steps 100 on a recipe: all warmup
    assert short == sorted(short) and short[-1] == pytest.approx(1e-3 * 100 / 750)


def test_the_schedule_and_clipping_reach_the_optimizer(config):
    train(change(config, steps=4, lr=1e-2, clip_norm=1e-3))
    assert [record["lr"] for record in records(config.train.run_folder)] == pytest.approx([5e-3, 1e-2, 1e-2, 5e-3])
    with World("cpu") as world:
        trainer = Trainer(change(config, clip_norm=1e-3, run_folder=config.train.run_folder / "clipped"), world)
        facts, _ = trainer.update(False)
        norm = torch.cat([parameter.grad.flatten() for parameter in trainer.model.parameters()]).norm()
    assert facts["grad_norm"] > 0.1 and float(norm) == pytest.approx(1e-3, rel=1e-3)


def test_evaluation_is_the_mean_over_counted_tokens(config, masked_tokens):
    config = change(config, validation_tokens=masked_tokens, evaluation_sequences=10, **DROPOUT)
    with World("cpu") as world:
        trainer = Trainer(config, world)
        found = trainer.evaluate(trainer.validation)
        inputs, targets = (torch.from_numpy(a) for a in trainer.validation.batch(range(10), 32, seed=0))
    model = trainer.model.eval()  # no dropout
    with torch.no_grad():
        expected = torch.nn.functional.cross_entropy(model(inputs).flatten(0, 1), targets.flatten())
    assert found == pytest.approx(expected.item(), rel=1e-5)


# --- going on ---


def test_a_crashed_run_goes_on_as_if_it_had_not_crashed(config, tmp_path, monkeypatch):
    config = change(config, **DROPOUT, document_masking=True)
    whole = train(config)
    crashed = change(config, run_folder=tmp_path / "crashed", device="auto" if not torch.cuda.is_available() else "cpu")
    real = Trainer.update

    def update(self, stop):
        if self.step == 5:
            raise RuntimeError("power cut")
        return real(self, stop)

    with monkeypatch.context() as patch:
        patch.setattr(Trainer, "update", update)
        with pytest.raises(RuntimeError, match="power cut"):
            train(crashed)
    assert checkpoint.newest(crashed.train.run_folder).name == "step-000003"
    with open(crashed.train.run_folder / "metrics.jsonl", "a") as file:
        file.write('{"step": 6, "lo')  # a torn line
    (crashed.train.run_folder / "step-000006.tmp-1").mkdir()  # a torn checkpoint
    resumed = train(crashed)
    assert content(resumed) == content(whole)
    assert [r["step"] for r in records(crashed.train.run_folder)] == list(range(1, 9))
    assert losses(crashed.train.run_folder) == losses(config.train.run_folder)
    assert not list(crashed.train.run_folder.glob("*.tmp*"))


def test_interrupted_by_ctrl_c_then_resumed(config, tmp_path):
    """Through the real command line: exit status 130, then the same bits as a run that was left alone."""
    config = change(config, steps=60, checkpoint_every=1000, **TINY, **DROPOUT)
    recipe = write_recipe(tmp_path, change(config, run_folder=tmp_path / "interrupted"))
    run = tmp_path / "interrupted"
    process = subprocess.Popen(
        [sys.executable, ROOT / "phi1" / "train.py", recipe], cwd=tmp_path, env=environment(), stderr=subprocess.PIPE, text=True
    )  # fmt: skip
    deadline = time.monotonic() + 120
    while not ((run / "metrics.jsonl").exists() and len((run / "metrics.jsonl").read_text().splitlines()) >= 3):
        assert process.poll() is None and time.monotonic() < deadline
        time.sleep(0.005)
    process.send_signal(signal.SIGINT)
    _, errors = process.communicate(timeout=60)
    assert process.returncode == 130, errors
    assert "stopping after this step" in errors and "Traceback" not in errors
    stopped = checkpoint.newest(run)
    assert 3 <= checkpoint.read_facts(stopped)["step"] < 60
    assert len(losses(run)) == checkpoint.read_facts(stopped)["step"]
    resumed = subprocess.run([sys.executable, ROOT / "phi1" / "train.py", recipe], cwd=tmp_path, env=environment(),
                             capture_output=True, text=True)  # fmt: skip
    assert resumed.returncode == 0, resumed.stderr
    assert f"going on from {stopped}" in resumed.stdout
    assert content(run / "step-000060") == content(train(config))
    assert losses(run) == losses(config.train.run_folder)


def test_torchrun_leaves_our_options_alone():
    """torchrun takes a prefix of one of its own options for that option, even behind the script's name."""
    theirs = get_args_parser()._option_string_actions
    for table in dataclasses.fields(TrainConfig):
        for field in dataclasses.fields(table.type):
            flag = f"--{field.name.replace('_', '-')}"
            assert not [option for option in theirs if option.startswith(flag)], flag


def test_two_processes_give_the_same_losses(config, tmp_path, masked_tokens):
    """torchrun with gloo: the same micro-batches in two processes, dropout included, masks uneven."""
    config = change(config, steps=6, micro_batch=2, tokens=masked_tokens, validation_tokens=masked_tokens,
                    evaluation_sequences=11, checkpoint_every=4, **DROPOUT)  # fmt: skip
    one = train(config)
    recipe = write_recipe(tmp_path, config)
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2",
               ROOT / "phi1" / "train.py", recipe, "--run-folder", tmp_path / "two"]  # fmt: skip
    result = subprocess.run(command, cwd=tmp_path, env=environment(), capture_output=True, text=True)
    assert result.returncode == 0, result.stdout + result.stderr
    two = tmp_path / "two" / "step-000006"
    # Only the order of float32 additions differs; Adam turns that into 1e-6 of the parameters in a few steps.
    assert losses(tmp_path / "two") == pytest.approx(losses(config.train.run_folder), rel=2e-6)
    expected, found = (records(run)[-1]["validation_loss"] for run in (config.train.run_folder, tmp_path / "two"))
    assert found == pytest.approx(expected, rel=2e-6)
    (first, _), (second, _) = checkpoint.load_model(one), checkpoint.load_model(two)
    moved = max((a - b).abs().max().item() for a, b in zip(first.parameters(), second.parameters(), strict=True))
    assert moved < 1e-4  # a step moves each parameter by about lr = 3e-3
    assert result.stdout.count("step 6/6") == 1  # one process speaks


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


def test_a_corrupt_checkpoint_stops_the_run(config):
    final = train(change(config, steps=3))
    (final / "optimizer.safetensors").write_bytes(b"x")
    with pytest.raises(UserError, match=r"optimizer\.safetensors: corrupt"):
        train(config)


def test_finetuning_starts_from_a_checkpoint(config, tmp_path, tokenizer, texts, capsys):
    base = train(change(config, steps=3))
    tuned = change(config, run_folder=tmp_path / "tuned", init_from=config.train.run_folder, **DROPOUT)
    with World("cpu") as world:
        trainer = Trainer(tuned, world)
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


# --- failing ---


def test_an_overflow_in_fp16_skips_the_step_and_lowers_the_scale(config):
    config = change(config, precision="fp16", loss_scale=2.0**40, **TINY)
    with World("cpu") as world:
        trainer = Trainer(config, world)
        before = {name: value.clone() for name, value in trainer.model.state_dict().items()}
        facts, _ = trainer.update(False)
        assert facts["skipped"] and facts["grad_norm"] is None and facts["loss_scale"] == 2.0**39
        assert all(torch.equal(value, before[name]) for name, value in trainer.model.state_dict().items())
        skipped = 1
        while facts["skipped"]:
            facts, _ = trainer.update(False)
            skipped += 1
            assert skipped < 40
        assert not torch.equal(trainer.model.head_weight, before["head_weight"])


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
def test_a_loss_that_is_not_finite_ends_the_run(config, precision):
    config = change(config, precision=precision, **TINY)
    train(change(config, steps=3))
    with World("cpu") as world:
        trainer = Trainer(config, world)
        with torch.no_grad():
            trainer.model.head_bias.fill_(math.nan)
        with pytest.raises(UserError, match=r"step 4: the loss is nan; try .*--lr.*goes on from .*step-000003"):
            trainer.update(False)


def test_a_full_disk_ends_the_run_and_keeps_the_checkpoint_before(config, monkeypatch, capsys, tmp_path):
    recipe = write_recipe(tmp_path, config)
    real = checkpoint.write_model

    def write_model(folder, *arguments, **options):
        if folder.name == "step-000006":

            def full(descriptor):
                raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

            monkeypatch.setattr(os, "fsync", full)
        return real(folder, *arguments, **options)

    with monkeypatch.context() as patch:
        patch.setattr(checkpoint, "write_model", write_model)
        assert main(["train", str(recipe)]) == 2
        monkeypatch.undo()
    assert "phi1: error: no space left while writing" in capsys.readouterr().err
    assert checkpoint.newest(config.train.run_folder).name == "step-000003"
    assert train(config).name == "step-000008"


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
    with pytest.raises(
        UserError, match=r"sequences_per_step = 8: must be a multiple of micro_batch x processes = 3 x 1"
    ):
        train(change(config, micro_batch=3))


@pytest.mark.skipif(torch.cuda.is_available(), reason="this machine has a GPU")
def test_a_gpu_that_is_not_there(config):
    with pytest.raises(UserError, match="no GPU that torch can use here; choose auto or cpu"):
        train(change(config, device="cuda"))
    for device in ("tpu9", "meta"):
        with pytest.raises(UserError, match=f"train.device = '{device}': must be auto, cpu, cuda or cuda:N"):
            train(change(config, device=device))


def test_a_run_folder_has_one_training(config, monkeypatch):
    refused = []
    real = Trainer.update

    def update(self, stop):
        with pytest.raises(UserError, match="run: another training is running there"):
            train(config)
        refused.append(self.step)
        return real(self, stop)

    monkeypatch.setattr(Trainer, "update", update)
    train(change(config, steps=1))
    assert refused == [0]


def test_a_backend_that_cannot_serve_is_named(config):
    with kernels.use_backend("cuda"), pytest.raises(UserError, match="backend 'cuda' cannot serve this call"):
        train(config)


def test_a_fully_masked_step_is_an_error(config, tmp_path, tokenizer):
    writer = TokenWriter(tmp_path / "masked", tokenizer, masked=True, identity={})
    writer.write(0, [([1] * 4000, [0] * 4000)])
    writer.finish(1)
    with pytest.raises(UserError, match="step 1: no token counts in the loss"):
        train(change(config, tokens=tmp_path / "masked"))


# --- what it says ---


def test_tensorboard(config, monkeypatch):
    with monkeypatch.context() as patch:
        patch.setitem(sys.modules, "torch.utils.tensorboard", None)
        with pytest.raises(UserError, match="tensorboard is not installed: `pip install tensorboard`"):
            train(change(config, steps=1, tensorboard=True))
        train(change(config, steps=1))  # not asked for: not needed
    event_accumulator = pytest.importorskip("tensorboard.backend.event_processing.event_accumulator")
    train(change(config, steps=4, tensorboard=True))
    events = event_accumulator.EventAccumulator(str(config.train.run_folder / "tensorboard")).Reload()
    assert [event.step for event in events.Scalars("loss")] == [2, 3, 4]
    assert [event.value for event in events.Scalars("loss")] == pytest.approx(losses(config.train.run_folder)[1:])


def test_metrics_drop_what_will_be_done_again(tmp_path):
    (tmp_path / "metrics.jsonl").write_text('{"step": 1}\n{"step": 2}\n{"step": 2, "v": 1}\n{"step": 3}\n{"st')
    metrics = Metrics(tmp_path, 2, tensorboard=False)
    metrics.record(3, loss=1.5)
    metrics.close()
    assert records(tmp_path) == [{"step": 1}, {"step": 2}, {"step": 2, "v": 1}, {"step": 3, "loss": 1.5}]


def test_flops_per_token_of_phi1():
    with torch.device("meta"):
        model = Phi1(PRESETS["phi1"])
    flops = flops_per_token(PRESETS["phi1"], parameter_count(model), 2048)
    # 6 (1,418,270,720 - 51,200 x 2,048) + 12 x 24 x 2,048 x 2,048
    assert flops == 7_880_478_720 + 1_207_959_552


@pytest.mark.parametrize(
    ("name", "peak"),
    [
        ("NVIDIA H100 80GB HBM3", 989e12),
        ("NVIDIA H100 PCIe", 756e12),
        ("NVIDIA H200", 989e12),
        ("NVIDIA A100-SXM4-80GB", 312e12),
        ("NVIDIA L4", 121e12),
        ("NVIDIA L40S", 362e12),
    ],
)
def test_the_peak_is_the_cards_own(name, peak, monkeypatch):
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: name)
    found, source = peak_flops(torch.device("cuda"), torch.bfloat16)
    assert found == peak and name in source and "bfloat16" in source


def test_durations():
    assert [duration(s) for s in (0, 61.9, 3599, 90_061)] == ["0 m 00 s", "1 m 01 s", "59 m 59 s", "25 h 01 m"]


def test_stop_signals():
    before = signal.getsignal(signal.SIGTERM)
    with StopSignals() as signals:
        os.kill(os.getpid(), signal.SIGTERM)
        assert signals.received
        os.kill(os.getpid(), signal.SIGTERM)  # again, as torchrun may: nothing more
        with pytest.raises(KeyboardInterrupt):
            os.kill(os.getpid(), signal.SIGINT)
            time.sleep(1)
    assert signal.getsignal(signal.SIGTERM) is before


def environment():
    return os.environ | {"OMP_NUM_THREADS": "1"}


def write_recipe(folder, config):
    lines = []
    for table in dataclasses.fields(config):
        lines.append(f"[{table.name}]")
        for field in dataclasses.fields(table.type):
            value = getattr(getattr(config, table.name), field.name)
            if value is not None:
                lines.append(f"{field.name} = {json.dumps(str(value) if isinstance(value, pathlib.Path) else value)}")
    path = folder / "recipe.toml"
    path.write_text("\n".join(lines))
    return path
