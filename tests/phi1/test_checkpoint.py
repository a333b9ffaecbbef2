"""Checkpoints: whole or absent, checked when read, the right ones kept."""

import dataclasses
import errno
import json
import os
import pathlib
import subprocess

import pytest
import safetensors
import safetensors.torch
import torch

from phi1 import checkpoint
from phi1.config import ModelConfig, OptimizerConfig
from phi1.errors import UserError
from phi1.model import Phi1
from phi1.optimizer import make_optimizer
from phi1.tokenizer import train_tokenizer

CONFIG = ModelConfig(
    vocab_size=300, hidden_size=16, intermediate_size=32, num_layers=2, num_heads=2, num_kv_heads=1, head_dim=8,
    rotary_dim=4, max_positions=32,
)  # fmt: skip


@pytest.fixture(scope="module")
def tokenizer():
    return train_tokenizer(["def f(x):\n    return x\n"] * 3, 300)


@pytest.fixture
def model():
    torch.set_num_threads(1)
    model = Phi1(CONFIG)
    model.reset_parameters(torch.Generator().manual_seed(1))
    return model


def stepped(model, steps=3):
    """An optimizer that has taken `steps` steps on random gradients."""
    optimizer = make_optimizer(model, OptimizerConfig())
    take_steps(model, optimizer, steps, seed=2)
    return optimizer


def take_steps(model, optimizer, steps, seed):
    generator = torch.Generator().manual_seed(seed)
    for _ in range(steps):
        for parameter in model.parameters():
            parameter.grad = torch.randn(parameter.shape, generator=generator)
        optimizer.step()


@pytest.fixture
def folder(tmp_path, model, tokenizer):
    facts = {"step": 3, "tokens": 99}
    return checkpoint.write_model(tmp_path / "step-000003", model, tokenizer, facts, optimizer=stepped(model))


def test_a_model_comes_back(folder, model, tokenizer):
    loaded, loaded_tokenizer = checkpoint.load_model(folder)
    assert loaded.config == CONFIG and not loaded.training
    assert loaded_tokenizer.hash == tokenizer.hash
    for name, value in model.state_dict().items():
        assert torch.equal(loaded.state_dict()[name], value), name
    tokens = torch.arange(20).view(2, 10)
    assert torch.equal(loaded(tokens), model.eval()(tokens))
    assert checkpoint.read_facts(folder) == {"step": 3, "tokens": 99}


def test_a_model_comes_back_in_another_type(folder, model):
    loaded, _ = checkpoint.load_model(folder, dtype=torch.bfloat16)
    assert {parameter.dtype for parameter in loaded.parameters()} == {torch.bfloat16}
    assert torch.equal(loaded.head_weight, model.head_weight.bfloat16())
    assert loaded(torch.arange(4).view(1, 4)).dtype == torch.bfloat16


def test_training_goes_on_bitwise(folder, model):
    """Parameters, both moments and the step count come back: the next steps are the same bits."""
    optimizer = make_optimizer(model, OptimizerConfig())
    checkpoint.load_optimizer(folder, model, optimizer)
    other = Phi1(CONFIG)
    other_optimizer = make_optimizer(other, OptimizerConfig())
    checkpoint.load_parameters(folder, other)
    checkpoint.load_optimizer(folder, other, other_optimizer)
    forgetful = Phi1(CONFIG)  # the same without the moments: to show that they matter here
    forgetful_optimizer = make_optimizer(forgetful, OptimizerConfig())
    checkpoint.load_parameters(folder, forgetful)
    for one, its_optimizer in ((model, optimizer), (other, other_optimizer), (forgetful, forgetful_optimizer)):
        take_steps(one, its_optimizer, 2, seed=5)
    for name, value in model.state_dict().items():
        assert torch.equal(other.state_dict()[name], value), name
    assert not torch.equal(forgetful.head_weight, model.head_weight)


@pytest.mark.parametrize("name", ["config.json", "model.safetensors", "optimizer.safetensors", "tokenizer.json"])
def test_a_changed_byte_is_found(folder, name):
    content = bytearray((folder / name).read_bytes())
    content[-3] ^= 1
    (folder / name).write_bytes(content)
    with pytest.raises(UserError, match=rf"{name}: corrupt \(its SHA-256 .*; delete .* and make it again"):
        checkpoint.load_model(folder)
    (folder / name).unlink()
    with pytest.raises(UserError, match=rf"{name}: missing"):
        checkpoint.load_model(folder)


def test_a_corrupt_checkpoint_names_the_one_before(folder, model, tokenizer):
    newer = checkpoint.write_model(folder.parent / "step-000009", model, tokenizer, {"step": 9})
    (newer / "model.safetensors").write_bytes(b"")
    with pytest.raises(UserError, match=r"corrupt .*delete .*step-000009 to go on from step-000003"):
        checkpoint.load_model(folder.parent)


def test_unfinished_and_absent(tmp_path, folder):
    (folder / "checkpoint.json").unlink()
    with pytest.raises(UserError, match=r"step-000003: no whole checkpoint there \(no checkpoint\.json\)"):
        checkpoint.load_model(folder)
    with pytest.raises(UserError, match="none: no such folder"):
        checkpoint.load_model(tmp_path / "none")
    (folder / "checkpoint.json").write_text("{")
    with pytest.raises(UserError, match=r"checkpoint\.json: corrupt"):
        checkpoint.load_model(folder)


def test_another_models_checkpoint(folder):
    checkpoint.require_shape(folder, dataclasses.replace(CONFIG, attention_dropout=0.1, initializer_range=1.0))
    wider = dataclasses.replace(CONFIG, hidden_size=24, num_layers=3)
    message = r"another model \(hidden_size = 16 there, 24 in the recipe; num_layers = 2 there, 3 in the recipe\)"
    with pytest.raises(UserError, match=message):
        checkpoint.load_parameters(folder, Phi1(wider))


def test_a_config_of_another_program(folder):
    (folder / "config.json").write_text(json.dumps({"architectures": ["PhiForCausalLM"]}))
    with pytest.raises(UserError, match=r"config\.json: not a model shape"):
        checkpoint.read_config(folder)


def test_a_model_without_optimizer_state(tmp_path, model, tokenizer):
    folder = checkpoint.write_model(tmp_path / "model", model, tokenizer, {})
    assert not (folder / "optimizer.safetensors").exists()
    with pytest.raises(UserError, match="no optimizer state"):
        checkpoint.load_optimizer(folder, model, make_optimizer(model, OptimizerConfig()))


def test_an_existing_folder_is_not_overwritten(folder, model, tokenizer):
    with pytest.raises(UserError, match="already exists"):
        checkpoint.write_model(folder, model, tokenizer, {})


def test_run_folder_and_last_name_the_newest(folder, model, tokenizer):
    run = folder.parent
    checkpoint.publish(folder, keep_last=2, keep_every=0)
    newer = checkpoint.write_model(run / "step-000010", model, tokenizer, {"step": 10})
    assert checkpoint.resolve(run) == newer
    assert checkpoint.resolve(run / "last") == folder  # not published yet
    checkpoint.publish(newer, keep_last=2, keep_every=0)
    assert checkpoint.resolve(run / "last") == newer
    assert os.readlink(run / "last") == "step-000010"  # relative: the run folder may move


@pytest.mark.parametrize(
    ("keep_last", "keep_every", "kept"),
    [(1, 0, [7]), (2, 0, [6, 7]), (1, 3, [3, 6, 7]), (3, 2, [2, 4, 5, 6, 7]), (9, 0, [1, 2, 3, 4, 5, 6, 7])],
)
def test_what_is_kept(tmp_path, model, tokenizer, keep_last, keep_every, kept):
    for step in range(1, 8):
        folder = checkpoint.write_model(tmp_path / f"step-{step:06d}", model, tokenizer, {"step": step})
        checkpoint.publish(folder, keep_last=keep_last, keep_every=keep_every)
    assert sorted(path.name for path in tmp_path.glob("step-*")) == [f"step-{step:06d}" for step in kept]
    assert checkpoint.newest(tmp_path) == tmp_path / "step-000007"


def test_leftovers_are_removed_and_never_taken_for_checkpoints(folder):
    run = folder.parent
    for name in ("step-000009.tmp-123", "step-000008.tmp-delete"):
        (run / name).mkdir()
        (run / name / "checkpoint.json").write_text("{}")
    assert checkpoint.newest(run) == folder
    checkpoint.remove_leftovers(run)
    assert [path.name for path in run.glob("step-*")] == ["step-000003"]


def fail_fsync(monkeypatch):
    def full(descriptor):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(os, "fsync", full)


def fail_safetensors(monkeypatch):
    def full(tensors, path, metadata):
        pathlib.Path(path).write_bytes(b"half")
        raise safetensors.SafetensorError(
            "Error while serializing: I/O error: No space left on device (os error 28)"
        )  # what safetensors 0.8.0 says on a full tmpfs

    monkeypatch.setattr(safetensors.torch, "save_file", full)


@pytest.mark.parametrize("fail", [fail_fsync, fail_safetensors])
def test_a_full_disk_keeps_the_checkpoint_before(folder, model, tokenizer, monkeypatch, fail):
    with monkeypatch.context() as patch:
        fail(patch)
        with pytest.raises(UserError, match=r"no space left while writing"):
            checkpoint.write_model(folder.parent / "step-000009", model, tokenizer, {"step": 9})
    assert [path.name for path in folder.parent.iterdir()] == ["step-000003"]
    checkpoint.load_model(folder.parent)


@pytest.mark.parametrize("ballast", [40_000, 60_000, 100_000])  # optimizer, tokenizer, model do not fit
def test_a_really_full_disk(tmp_path, model, tokenizer, ballast):
    mounted = subprocess.run(
        ["mount", "-t", "tmpfs", "-o", "size=200k", "tmpfs", str(tmp_path)], capture_output=True, text=True
    )
    if mounted.returncode:
        pytest.skip(f"cannot mount a small file system here: {mounted.stderr.strip()}")
    try:
        first = checkpoint.write_model(tmp_path / "step-000001", model, tokenizer, {"step": 1})
        (tmp_path / "ballast").write_bytes(bytes(ballast))
        with pytest.raises(UserError, match=r"no space left while writing .*step-000002"):
            checkpoint.write_model(tmp_path / "step-000002", model, tokenizer, {"step": 2}, optimizer=stepped(model))
        assert sorted(path.name for path in tmp_path.iterdir()) == ["ballast", "step-000001"]
        checkpoint.load_model(first)
    finally:
        subprocess.run(["umount", str(tmp_path)], check=True)


def test_files_are_readable_as_others_are(folder):
    modes = {path.name: path.stat().st_mode & 0o777 for path in folder.iterdir()}
    assert len(set(modes.values())) == 1, modes
