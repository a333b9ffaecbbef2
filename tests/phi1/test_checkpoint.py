"""Checkpoints: whole or absent, checked when read, the right ones kept."""

import contextlib
import dataclasses
import errno
import itertools
import json
import os
import pathlib
import resource
import shutil
import subprocess

import pytest
import safetensors
import safetensors.torch
import torch

from phi1 import checkpoint
from phi1.checkpoint import Damaged, Gone
from phi1.config import ModelConfig, OptimizerConfig
from phi1.errors import UserError
from phi1.files import write_json
from phi1.model import Phi1
from phi1.optimizer import make_optimizer
from phi1.tokenizer import train_tokenizer

CONFIG = ModelConfig(
    vocab_size=300,
    hidden_size=16,
    intermediate_size=32,
    num_layers=2,
    num_heads=2,
    num_kv_heads=1,
    head_dim=8,
    rotary_dim=4,
    max_positions=32,
)


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
    return checkpoint.write(
        tmp_path / "run" / "step-000003", checkpoint.snapshot(model, stepped(model)), tokenizer, facts
    )


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
    checkpoint.load_optimizer(checkpoint.read_optimizer(folder), model, optimizer)
    other = Phi1(CONFIG)
    other_optimizer = make_optimizer(other, OptimizerConfig())
    checkpoint.load_parameters(folder, other)
    checkpoint.load_optimizer(checkpoint.read_optimizer(folder), other, other_optimizer)
    forgetful = Phi1(CONFIG)  # the same without the moments: to show that they matter here
    forgetful_optimizer = make_optimizer(forgetful, OptimizerConfig())
    checkpoint.load_parameters(folder, forgetful)
    for one, its_optimizer in ((model, optimizer), (other, other_optimizer), (forgetful, forgetful_optimizer)):
        take_steps(one, its_optimizer, 2, seed=5)
    for name, value in model.state_dict().items():
        assert torch.equal(other.state_dict()[name], value), name
    assert not torch.equal(forgetful.head_weight, model.head_weight)


def flipped(path, place):
    """The file with one bit of one byte changed, another bit for each place."""
    content = bytearray(path.read_bytes())
    content[place] ^= 1 << place % 8
    path.write_bytes(content)


@pytest.mark.parametrize("name", ["config.json", "model.safetensors", "optimizer.safetensors", "tokenizer.json"])
def test_a_changed_byte_is_found(folder, name):
    size = (folder / name).stat().st_size
    whole = (folder / name).read_bytes()
    for place in range(size) if size < 1000 else range(0, size, size // 50):
        flipped(folder / name, place)
        with pytest.raises(Damaged, match=rf"{name}: corrupt, its SHA-256 is not checkpoint\.json's; .* make it again"):
            checkpoint.verify(folder)
        (folder / name).write_bytes(whole)
    checkpoint.load_model(folder)
    (folder / name).unlink()
    with pytest.raises(Damaged, match=rf"{name}: missing"):
        checkpoint.load_model(folder)


def test_every_changed_byte_of_the_record_is_found(folder):
    """checkpoint.json is under its own hash: blanks, hexadecimal's case and all that JSON does not care for too."""
    path = folder / "checkpoint.json"
    whole = path.read_bytes()
    assert checkpoint.read_facts(folder) == {"step": 3, "tokens": 99}
    unnoticed = []
    for byte, bit in itertools.product(range(len(whole)), (0, 3, 5)):  # 5: the case of letters
        path.write_bytes(whole[:byte] + bytes([whole[byte] ^ 1 << bit]) + whole[byte + 1 :])
        try:
            unnoticed.append((byte, bit, checkpoint.read_facts(folder)))
        except Damaged as error:
            assert "checkpoint.json: corrupt" in str(error)
    assert not unnoticed
    for other in (
        whole + b"\n",
        whole[:-1],
        b" " + whole,
        b"",
        b"[]",
        b"null",
        b"[" * 100_000,
        whole.replace(b"99", b"99.0"),
    ):
        path.write_bytes(other)
        with pytest.raises(Damaged, match=r"checkpoint\.json: corrupt"):
            checkpoint.read_facts(folder)


def test_a_record_with_other_contents_and_its_old_hash(folder):
    """Not only the form is checked: canonical text of other facts is found too."""
    path = folder / "checkpoint.json"
    record = json.loads(path.read_text())
    record["facts"]["step"] = 4
    write_json(path, record)
    with pytest.raises(Damaged, match=r"its SHA-256 is not its own"):
        checkpoint.read_facts(folder)


def test_a_corrupt_checkpoint_names_the_one_before(folder, model, tokenizer):
    newer = checkpoint.write_model(folder.parent / "step-000009", model, tokenizer, {"step": 9})
    (newer / "model.safetensors").write_bytes(b"")
    with pytest.raises(Damaged, match=r"corrupt.*; the one before it is .*step-000003"):
        checkpoint.load_model(folder.parent)
    (newer / "checkpoint.json").unlink()
    with pytest.raises(Damaged, match=r"step-000009: unfinished.*; the one before it is .*step-000003"):
        checkpoint.load_model(folder.parent)


def test_unfinished_and_absent(tmp_path, folder):
    (folder / "checkpoint.json").unlink()
    with pytest.raises(UserError, match=r"step-000003: no whole checkpoint there \(no checkpoint\.json\)"):
        checkpoint.load_model(folder)
    with pytest.raises(UserError, match="none: no such folder"):
        checkpoint.load_model(tmp_path / "none")


def test_a_checkpoint_that_goes_while_it_is_read(folder, model, tokenizer, monkeypatch):
    """As a training deletes it: from the run folder the then newest is read, by its own name the error says why."""
    run, hashed = folder.parent, []

    def sha256_file(path):
        if path.parent == folder and path.name == "model.safetensors":
            hashed.append(path)
            checkpoint.write_model(run / "step-000009", model, tokenizer, {"step": 9})
            shutil.rmtree(folder.rename(run / "step-000003.tmp-delete"))
        return real(path)

    real = checkpoint.sha256_file
    monkeypatch.setattr(checkpoint, "sha256_file", sha256_file)
    kept = shutil.copytree(folder, run.parent / "copy")
    assert checkpoint.load_model(run)[0].config == CONFIG
    assert len(hashed) == 1
    shutil.rmtree(run / "step-000009")
    shutil.copytree(kept, folder)
    with pytest.raises(Gone, match=r"step-000003: deleted while it was read .*name the run folder"):
        checkpoint.load_model(folder)
    with pytest.raises(Gone):
        checkpoint.digest(folder)


def test_what_counts_as_a_runs_checkpoint(folder):
    run = folder.parent
    for name in ("step-3", "step-0000003", "step-000009 (copy)", "step-00000٣", "step-000008.damaged", "xstep-000007"):
        shutil.copytree(folder, run / name)
    (run / "step-000010").write_text("a file")
    for step in (2, 1_000_000, 999_999):
        (run / f"step-{step:06d}").mkdir()
    assert [path.name for path in checkpoint.in_run(run)] == [
        "step-000002",
        "step-000003",
        "step-999999",
        "step-1000000",
    ]
    assert checkpoint.in_run(run / "none") == []


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
        checkpoint.load_optimizer(checkpoint.read_optimizer(folder), model, make_optimizer(model, OptimizerConfig()))


def test_an_existing_folder_is_not_overwritten(folder, model, tokenizer):
    with pytest.raises(UserError, match="already exists"):
        checkpoint.write_model(folder, model, tokenizer, {})


def fail_fsync(monkeypatch):
    def full(descriptor):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(os, "fsync", full)


def fail_safetensors(monkeypatch):
    def full(tensors, path, metadata):
        pathlib.Path(path).write_bytes(b"half")
        # What safetensors 0.8.0 says on a full tmpfs.
        raise safetensors.SafetensorError("Error while serializing: I/O error: No space left on device (os error 28)")

    monkeypatch.setattr(safetensors.torch, "save_file", full)


def limit_files(stack):
    """As `ulimit -f` does; the signal that comes with it Python ignores."""
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (20_000, before[1]))
    stack.callback(resource.setrlimit, resource.RLIMIT_FSIZE, before)


@pytest.mark.parametrize(
    ("fail", "why"),
    [
        (fail_fsync, "no space left while writing"),
        (fail_safetensors, "no space left while writing"),
        (limit_files, r"step-000009 cannot be written \(File too large\): mend that"),
    ],
)
def test_a_write_that_fails_keeps_the_checkpoint_before(folder, model, tokenizer, monkeypatch, fail, why):
    with contextlib.ExitStack() as stack, monkeypatch.context() as patch:
        fail(stack if fail is limit_files else patch)
        with pytest.raises(UserError, match=why):
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
            content = checkpoint.snapshot(model, stepped(model))
            checkpoint.write(tmp_path / "step-000002", content, tokenizer, {"step": 2})
        assert sorted(path.name for path in tmp_path.iterdir()) == ["ballast", "step-000001"]
        checkpoint.load_model(first)
    finally:
        subprocess.run(["umount", str(tmp_path)], check=True)


def test_files_are_readable_as_others_are(folder):
    modes = {path.name: path.stat().st_mode & 0o777 for path in folder.iterdir()}
    assert len(set(modes.values())) == 1, modes
