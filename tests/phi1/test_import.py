"""`phi1 import`: Hugging Face folders become checkpoints."""

import json
import pathlib

import pytest
import torch
import transformers

from phi1.checkpoint import load_model, read_facts
from phi1.cli import main
from phi1.tokenizer import codegen_tokenizer, train_tokenizer


def codegen_folder(folder: pathlib.Path, vocab_size: int) -> "transformers.CodeGenForCausalLM":
    torch.manual_seed(0)
    config = transformers.CodeGenConfig(
        vocab_size=vocab_size, n_positions=64, n_ctx=64, n_embd=64, n_layer=1, n_head=4, rotary_dim=8
    )
    model = transformers.CodeGenForCausalLM(config).eval()
    model.save_pretrained(folder)
    return model


def test_codegen_with_its_own_tokenizer_files(tmp_path: pathlib.Path, capsys: pytest.CaptureFixture[str]) -> None:
    theirs = codegen_folder(tmp_path / "hf", 51200)
    # vocab.json and merges.txt, as CodeGen's folder holds them.
    codegen = codegen_tokenizer()
    codegen.save(tmp_path / "codegen.json")
    bpe = json.loads((tmp_path / "codegen.json").read_text(encoding="utf-8"))["model"]
    (tmp_path / "hf" / "vocab.json").write_text(json.dumps(bpe["vocab"], ensure_ascii=False), encoding="utf-8")
    merges = "".join(" ".join(pair) + "\n" for pair in bpe["merges"])
    (tmp_path / "hf" / "merges.txt").write_text("#version: 0.2\n" + merges, encoding="utf-8")

    assert main(["import", "--source", str(tmp_path / "hf"), "--output", str(tmp_path / "checkpoint")]) == 0
    assert "parameters in float32" in capsys.readouterr().out
    ours, tokenizer = load_model(tmp_path / "checkpoint")
    assert tokenizer.hash == codegen.hash
    assert read_facts(tmp_path / "checkpoint")["imported_from"] == str(tmp_path / "hf")
    tokens = torch.tensor([tokenizer.encode("def f(x):\n    return x")])
    with torch.no_grad():
        torch.testing.assert_close(ours(tokens), theirs(tokens).logits, atol=1e-5, rtol=0)


def test_an_exported_checkpoint_comes_back(tmp_path: pathlib.Path) -> None:
    codegen_folder(tmp_path / "hf", 320)
    train_tokenizer(["def f(x):\n    return x\n"] * 3, 310).save(tmp_path / "small.json")
    first, second = tmp_path / "first", tmp_path / "second"
    source = ["--source", str(tmp_path / "hf"), "--tokenizer", str(tmp_path / "small.json")]
    assert main(["import", *source, "--output", str(first)]) == 0
    assert main(["export", "--checkpoint", str(first), "--output", str(tmp_path / "phi")]) == 0
    assert main(["import", "--source", str(tmp_path / "phi"), "--output", str(second)]) == 0
    for name in ("config.json", "model.safetensors", "tokenizer.json"):
        assert (first / name).read_bytes() == (second / name).read_bytes(), name


def test_errors_are_one_line(tmp_path: pathlib.Path, capsys: pytest.CaptureFixture[str]) -> None:
    codegen_folder(tmp_path / "hf", 320)
    codegen_tokenizer().save(tmp_path / "codegen.json")
    (tmp_path / "llama").mkdir()
    (tmp_path / "llama" / "config.json").write_text('{"model_type": "llama"}')
    codegen_json = ["--tokenizer", str(tmp_path / "codegen.json")]
    capsys.readouterr()  # transformers' progress bar
    for source, extra, message in (
        ("hf", [], "hf: has neither tokenizer.json nor vocab.json and merges.txt"),
        ("hf", codegen_json, "the tokenizer has 50,295 entries, the model in"),
        ("llama", codegen_json, "model_type = 'llama': cannot be read as phi-1"),
        ("absent", codegen_json, "config.json: missing or broken"),
    ):
        command = ["import", "--source", str(tmp_path / source), "--output", str(tmp_path / "out"), *extra]
        assert main(command) == 2
        error = capsys.readouterr().err
        assert message in error and error.count("\n") == 1, error
    assert not (tmp_path / "out").exists()


def test_a_folder_without_a_model_is_said(tmp_path: pathlib.Path, capsys: pytest.CaptureFixture[str]) -> None:
    for source in (tmp_path, tmp_path / "nothere"):
        assert main(["import", "--source", str(source), "--output", str(tmp_path / "checkpoint")]) == 2
        message = f"{source}/config.json: missing or broken; --source names the folder of a Hugging Face model"
        assert capsys.readouterr().err == f"phi1: error: {message}\n"
