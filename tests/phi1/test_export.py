"""`phi1 export`: a checkpoint becomes a folder that transformers loads."""

import dataclasses
import pathlib

import pytest
import torch

from phi1.checkpoint import write_model
from phi1.cli import main
from phi1.config import ModelConfig
from phi1.model import Phi1
from phi1.tokenizer import train_tokenizer

CONFIG = ModelConfig(
    vocab_size=320, hidden_size=32, intermediate_size=64, num_layers=2, num_heads=2, num_kv_heads=1,
    head_dim=16, rotary_dim=8, max_positions=48, residual_dropout=0.1,
)  # fmt: skip


@pytest.fixture
def checkpoint(tmp_path: pathlib.Path) -> pathlib.Path:
    torch.manual_seed(0)
    tokenizer = train_tokenizer(["def f(x):\n    return x + 1\n"] * 4, 310)
    # No spare rows: transformers would choose them, `phi1 generate` does not.
    model = Phi1(dataclasses.replace(CONFIG, vocab_size=tokenizer.vocab_size))
    return write_model(tmp_path / "run" / "step-000007", model, tokenizer, {"step": 7})


def test_transformers_continues_as_we_do(
    checkpoint: pathlib.Path, tmp_path: pathlib.Path, capsys: pytest.CaptureFixture[str]
) -> None:
    transformers = pytest.importorskip("transformers")
    # The run's folder stands for its newest checkpoint.
    assert main(["export", "--checkpoint", str(checkpoint.parent), "--output", str(tmp_path / "hf")]) == 0
    assert "PhiForCausalLM, 34,802 parameters in float32" in capsys.readouterr().out
    theirs = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "hf")
    tokenizer = transformers.AutoTokenizer.from_pretrained(tmp_path / "hf")
    assert theirs.config.resid_pdrop == 0.0
    prompt = "def f(x):\n    return"
    ids = theirs.generate(**tokenizer(prompt, return_tensors="pt"), max_new_tokens=10, do_sample=False)
    command = ["generate", "--checkpoint", str(checkpoint), "--prompt", prompt, "--max-new-tokens", "10"]
    capsys.readouterr()
    assert main([*command, "--device", "cpu"]) == 0
    written = tokenizer.decode(ids[0], skip_special_tokens=True)
    assert written == prompt + capsys.readouterr().out


def test_type(checkpoint: pathlib.Path, tmp_path: pathlib.Path) -> None:
    from phi1.huggingface import import_folder

    options = ["--output", str(tmp_path / "hf"), "--dtype", "bfloat16"]
    assert main(["export", "--checkpoint", str(checkpoint), *options]) == 0
    assert import_folder(tmp_path / "hf").embedding.dtype == torch.bfloat16


def test_errors_are_one_line(
    checkpoint: pathlib.Path, tmp_path: pathlib.Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["export", "--checkpoint", str(tmp_path / "nowhere"), "--output", str(tmp_path / "hf")]) == 2
    assert "nowhere: no such folder" in capsys.readouterr().err
    assert main(["export", "--checkpoint", str(checkpoint), "--output", str(checkpoint)]) == 2
    error = capsys.readouterr().err
    assert "step-000007: already exists" in error and error.count("\n") == 1
    weights = checkpoint / "model.safetensors"
    raw = weights.read_bytes()
    weights.write_bytes(raw[:-1] + bytes([raw[-1] ^ 1]))
    assert main(["export", "--checkpoint", str(checkpoint), "--output", str(tmp_path / "hf")]) == 2
    assert "model.safetensors: corrupt" in capsys.readouterr().err
    assert not (tmp_path / "hf").exists()
