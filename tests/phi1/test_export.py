"""`phi1 export`: a checkpoint becomes a folder that transformers loads."""

import dataclasses
import hashlib
import pathlib

import pytest
import torch

from phi1.checkpoint import write_model
from phi1.cli import main
from phi1.config import PRESETS, ModelConfig
from phi1.huggingface import limits
from phi1.model import Phi1
from phi1.tokenizer import codegen_tokenizer, train_tokenizer

CONFIG = ModelConfig(
    vocab_size=320,
    hidden_size=32,
    intermediate_size=64,
    num_layers=2,
    num_heads=2,
    num_kv_heads=1,
    head_dim=16,
    rotary_dim=8,
    max_positions=48,
    residual_dropout=0.1,
)


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
    import transformers

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


def test_what_other_programs_would_misread_is_said(
    checkpoint: pathlib.Path, tmp_path: pathlib.Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["export", "--checkpoint", str(checkpoint), "--output", str(tmp_path / "hf")]) == 0
    (note,) = [line for line in capsys.readouterr().out.splitlines() if line.startswith("note: ")]
    assert "num_key_value_heads = 2 (num_attention_heads), here it is 1" in note
    assert "intermediate_size = 128 (4 hidden_size), here it is 64" in note
    assert "no name for the pieces of this vocabulary" in note and "head_dim" not in note
    card = (tmp_path / "hf" / "README.md").read_text()
    assert "| step | 7 |" in card and "34,802 in float32" in card and "2 of 16 on 1 key/value heads" in card
    assert all(
        f"- {reason}" in card for reason in note.removeprefix("note: for transformers and lm-eval; ").split("; ")
    )
    assert card.startswith("---\nlibrary_name: transformers\n")


def test_the_published_shape_and_tokenizer_are_what_converters_know() -> None:
    tokenizer = codegen_tokenizer()
    assert limits(PRESETS["phi1"], tokenizer) == limits(PRESETS["phi1-small"], tokenizer) == []
    (reason,) = limits(dataclasses.replace(PRESETS["phi1-small"], head_dim=32), tokenizer)
    assert "head_dim = 64 (hidden_size / num_attention_heads), here it is 32" in reason
    # How llama.cpp's convert_hf_to_gguf.py knows a tokenizer: this hash, of what becomes of this text, is its "phi-2".
    text = (
        "\n \n\n \n\n\n \t \t\t \t\n  \n   \n    \n     \n🚀 (normal) 😶\u200d🌫️ (multiple emojis concatenated) ✅ 🦙🦙 3 "
        "33 333 3333 33333 "
        "333333 3333333 33333333 3.3 3..3 3...3 កាន់តែពិសេសអាច😁 ?我想在apple工作1314151天～ ------======= нещо на Български "
        "''''''```````\"\"\"\"......!!!!!!?????? I've been 'told he's there, 'RE you sure? 'M not sure I'll make it, "
        "'D you like some tea? We'Ve a'lL"
    )
    made = hashlib.sha256(str(tokenizer.encode(text)).encode()).hexdigest()
    assert made == "fcace8b9cac38ce847670c970cd5892031a753a1ef381abd1d9af00f713da085"


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
