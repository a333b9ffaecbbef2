"""Generation: batching, sampling, stop strings, limits, and the command."""

import contextlib
import io
import pathlib
import sys
from collections import Counter
from collections.abc import Sequence

import pytest
import torch
from torch import Tensor, nn

from phi1.checkpoint import write_model
from phi1.cli import main
from phi1.config import ModelConfig
from phi1.errors import UserError
from phi1.generate import _print, _sample, complete, load
from phi1.huggingface import export_folder
from phi1.model import Cache, Phi1
from phi1.tokenizer import Tokenizer, codegen_tokenizer, train_tokenizer

CONFIG = ModelConfig(
    vocab_size=400,
    hidden_size=32,
    intermediate_size=64,
    num_layers=2,
    num_heads=4,
    num_kv_heads=2,
    head_dim=16,
    rotary_dim=8,
    max_positions=48,
)
PROMPTS = ["def f(x):\n", "a", "x = 1024\n    y = 2\n", "", "a", "def g():\n        return", "éé 😀", "zz\n\n"]


@pytest.fixture(scope="module")
def tokenizer() -> Tokenizer:
    return train_tokenizer(["def f(x):\n    return x + 1\n", "class A:\n    pass\n"] * 4, 320)


@pytest.fixture(scope="module")
def model() -> Phi1:
    """Random and sharp: the best logit leads the second by far more than float32 rounding."""
    model = Phi1(CONFIG).eval()
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dim() == 2:
                parameter.copy_(torch.randn(parameter.shape, generator=generator) * 0.5)
    return model


class Scripted(nn.Module):
    """Writes `script` after any prompt of `start` tokens, one token after another; reads nothing.

    passes: how many tokens each pass was given.
    """

    def __init__(self, tokenizer: Tokenizer, script: Sequence[int], start: int, max_positions: int = 48) -> None:
        super().__init__()
        self.config = ModelConfig(vocab_size=400, max_positions=max_positions)
        self.embedding = nn.Parameter(torch.zeros(1))
        self.start, self.script = start, [*script, *[tokenizer.encode("!")[0]] * 100]
        self.passes: list[int] = []
        self.cast_once = contextlib.nullcontext

    def new_cache(self, batch: int, max_length: int) -> Cache:
        return Cache(torch.zeros(0), torch.zeros(0))

    def hidden_states(self, tokens: Tensor, *, cu_seqlens: Tensor, cache: Cache) -> Tensor:
        """How many tokens of the script are written, in place of hidden states."""
        self.passes.append(tokens.shape[1])
        cache.length = cache.length + cu_seqlens.diff()
        return (cache.length - self.start).repeat_interleave(cu_seqlens.diff())[None, :, None]

    def logits(self, hidden: Tensor) -> Tensor:
        return nn.functional.one_hot(torch.tensor([self.script[int(row)] for row in hidden[:, 0]]), 400).float()


def naive(model: Phi1, tokenizer: Tokenizer, prompt: str, max_new_tokens: int) -> str:
    """Greedy, one prompt, the whole sequence again for every token: no cache, no batch."""
    start = tokenizer.encode(prompt) or [tokenizer.eot_id]
    new: list[int] = []
    with torch.no_grad():
        while len(new) < max_new_tokens and len(start) + len(new) < CONFIG.max_positions:
            best = int(model(torch.tensor([start + new]))[0, -1, : tokenizer.vocab_size].argmax())
            if best == tokenizer.eot_id:
                break
            new.append(best)
    return tokenizer.decode(new)


@pytest.mark.parametrize("batch_size", [1, 3, 16])
def test_greedy_equals_the_naive_loop_whatever_the_batch(batch_size: int, model: Phi1, tokenizer: Tokenizer) -> None:
    expected = [naive(model, tokenizer, prompt, 12) for prompt in PROMPTS]
    assert complete(model, tokenizer, PROMPTS, max_new_tokens=12, batch_size=batch_size) == expected
    assert len(set(expected)) > 4  # the prompts matter
    assert expected[1] == expected[4]


def test_a_sample_depends_on_its_seed_and_index_only(model: Phi1, tokenizer: Tokenizer) -> None:
    def draw(batch_size: int = 16, seed: int = 3, prompts: Sequence[str] = PROMPTS) -> list[str]:
        return complete(
            model, tokenizer, prompts, max_new_tokens=12, temperature=8.0, top_p=0.9, seed=seed, batch_size=batch_size
        )

    first = draw()
    assert first == draw(batch_size=1) == draw(batch_size=3)
    assert draw(prompts=PROMPTS[:3]) == first[:3]
    assert draw(seed=4) != first
    assert first[1] != first[4]  # the same prompt at another index


def test_top_p_and_temperature_give_the_right_frequencies() -> None:
    probabilities = torch.tensor([0.1, 0.5, 0.15, 0.25])
    draws = 4000

    def frequencies(temperature: float, top_p: float) -> dict[int, float]:
        uniform = torch.rand(draws, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
        chosen = _sample(probabilities.log().expand(draws, -1), temperature, top_p, uniform)
        return {token: count / draws for token, count in Counter(chosen.tolist()).items()}

    # Five standard deviations of a frequency over 4,000 draws are at most 0.04.
    assert frequencies(1.0, 1.0) == pytest.approx({1: 0.5, 3: 0.25, 2: 0.15, 0: 0.1}, abs=0.04)
    assert frequencies(1.0, 0.7) == pytest.approx({1: 2 / 3, 3: 1 / 3}, abs=0.04)  # .5 alone holds less than .7
    assert frequencies(1.0, 0.5) == {1: 1.0}
    assert frequencies(1.0, 1e-9) == {1: 1.0}
    squares = probabilities.square() / probabilities.square().sum()
    assert frequencies(0.5, 1.0) == pytest.approx(dict(enumerate(squares.tolist())), abs=0.04)


def by_sorting(logits: Tensor, temperature: float, top_p: float, uniform: Tensor) -> Tensor:
    """What `_sample` gives for top_p < 1, from all probabilities in order."""
    probability, token = (logits.double() / temperature).softmax(-1).sort(dim=-1, descending=True, stable=True)
    cumulative = probability.cumsum(-1)
    kept = (cumulative - probability < top_p).sum(-1, keepdim=True)
    mass = cumulative.gather(-1, kept - 1)
    rank = torch.searchsorted(cumulative, uniform[:, None] * mass, right=True).minimum(kept - 1)
    return token.gather(-1, rank)[:, 0]


@pytest.mark.parametrize("sharpness", [0.0, 0.3, 3.0])
@pytest.mark.parametrize("top_p", [1e-9, 0.3, 0.95, 0.9999])
def test_partial_selection_draws_what_sorting_draws(top_p: float, sharpness: float) -> None:
    generator = torch.Generator().manual_seed(0)
    logits = (sharpness * torch.randn(32, 3000, generator=generator)).bfloat16()  # equal values are frequent
    logits[3] = 0.0  # of a row that needs them all the others take no note
    uniform = torch.rand(32, dtype=torch.float64, generator=generator)
    uniform[:2] = torch.tensor([0.0, 1 - 2**-53])
    drawn = _sample(logits, 0.8, top_p, uniform)
    assert torch.equal(drawn, by_sorting(logits, 0.8, top_p, uniform))
    assert torch.equal(drawn[4:5], _sample(logits[4:5], 0.8, top_p, uniform[4:5]))


def test_a_token_of_no_probability_is_never_drawn() -> None:
    logits = torch.tensor([[0.0, -torch.inf, 0.0, -torch.inf]]).expand(3, -1)
    uniform = torch.tensor([0.0, 0.5, 1 - 2**-53], dtype=torch.float64)
    assert _sample(logits, 1.0, 1.0, uniform).tolist() == [0, 2, 2]


def test_a_temperature_near_zero_is_greedy() -> None:
    logits = torch.tensor([[3.0, 40.0, -7.0], [1.0, -2.0, 0.5]])
    uniform = torch.tensor([0.0, 1 - 2**-53], dtype=torch.float64)
    assert _sample(logits, 1e-320, 1.0, uniform).tolist() == [1, 0] == _sample(logits, 1e-320, 0.9, uniform).tolist()


@pytest.mark.parametrize(
    ("text", "stop", "expected"),
    [
        ("    return 1\n\ndef g", ["\ndef ", "\nclass "], "    return 1\n"),  # ends inside a token's text
        ("  x  \n ", [], None),  # nothing is stripped
        ("é😀 stop é", ["😀"], "é"),  # a character of several tokens
        ("aXbYc", ["Y", "X"], "a"),  # the first in the text, not in the list
        ("abc", ["zzz"], None),
        ("def f", ["def "], ""),
    ],
)
def test_stop_strings_cut_the_text(text: str, stop: list[str], expected: str | None, tokenizer: Tokenizer) -> None:
    script = [*tokenizer.encode(text), tokenizer.eot_id]
    prompts = ["a\ndef ", "a\ndef "]  # a stop string in the prompt does not count
    model = Scripted(tokenizer, script, len(tokenizer.encode(prompts[0])), max_positions=200)
    got = complete(model, tokenizer, prompts, stop=stop)  # type: ignore[arg-type]
    assert got == [text if expected is None else expected] * 2


def test_decoding_ends_at_a_stop_string(tokenizer: Tokenizer) -> None:
    script = tokenizer.encode("ab#@?")  # the stop string is as many tokens as it has bytes
    model = Scripted(tokenizer, script, 1, max_positions=200)
    assert complete(model, tokenizer, ["a"], stop=["#@?"]) == ["ab"]  # type: ignore[arg-type]
    assert len(model.passes) == len(script) == 5


def test_a_pass_holds_whole_prompts_and_no_finished_row(tokenizer: Tokenizer) -> None:
    """Two rows: the third prompt begins where the first one ends, in the pass of the second one's next token."""
    model = Scripted(tokenizer, [*tokenizer.encode("ok"), tokenizer.eot_id], 4)
    prompts = ["#@?!", "#@?", "#@?!"]  # the second writes one token more: it is one behind in the script
    texts = complete(model, tokenizer, prompts, max_new_tokens=3, batch_size=2)  # type: ignore[arg-type]
    assert texts[0] == texts[2] == "ok"
    assert model.passes == [4 + 3, 2, 2, 4, 1, 1]


def test_ids_without_text_are_never_chosen(tokenizer: Tokenizer) -> None:
    class Spare(Scripted):
        def logits(self, hidden: Tensor) -> Tensor:
            logits = super().logits(hidden)
            logits[:, tokenizer.vocab_size :] = 99.0
            return logits

    model = Spare(tokenizer, [*tokenizer.encode("ok"), tokenizer.eot_id], 1)
    assert complete(model, tokenizer, ["a"]) == ["ok"]  # type: ignore[arg-type]
    assert complete(model, tokenizer, ["a"], temperature=0.01) == ["ok"]  # type: ignore[arg-type]


def test_max_positions_is_never_passed(model: Phi1, tokenizer: Tokenizer, capsys: pytest.CaptureFixture[str]) -> None:
    texts = ["q" * n for n in (46, 47, 48, 60)]
    script = Scripted(tokenizer, [], 46)
    assert complete(script, tokenizer, texts[:1]) == ["!!"]  # type: ignore[arg-type]
    got = complete(model, tokenizer, texts, max_new_tokens=20)
    assert got[2:] == ["", ""] and got[0] == naive(model, tokenizer, texts[0], 20)
    assert "warning: 2 of 4 prompts fill the model's 48 positions" in capsys.readouterr().err


def test_progress_and_mode(model: Phi1, tokenizer: Tokenizer) -> None:
    calls: list[tuple[int, int]] = []
    model.train()
    complete(
        model,
        tokenizer,
        PROMPTS,
        max_new_tokens=1,
        batch_size=3,
        progress=lambda done, total: calls.append((done, total)),
    )
    assert calls == [(3, 8), (6, 8), (8, 8)]
    assert model.training
    model.eval()
    assert complete(model, tokenizer, []) == []


@pytest.mark.parametrize(
    "option",
    [
        {"max_new_tokens": 0},
        {"temperature": -1.0},
        {"top_p": 0.0},
        {"top_p": 1.5},
        {"stop": ["a", ""]},
        {"seed": -1},
        {"batch_size": 0},
    ],
)
def test_senseless_options_are_refused(option: dict[str, object], model: Phi1, tokenizer: Tokenizer) -> None:
    with pytest.raises(UserError, match=f"^{next(iter(option))} = "):
        complete(model, tokenizer, ["a"], **option)  # type: ignore[arg-type]


@pytest.mark.parametrize("stop", [[], ["\ndef ", "\nclass "], ["zz\n\nz"]])
def test_streamed_pieces_are_the_completion(stop: list[str], model: Phi1, tokenizer: Tokenizer) -> None:
    text = "é😀 \ndef\n\ufffd\nde\nclass x"
    scripted = Scripted(tokenizer, [*tokenizer.encode(text), tokenizer.eot_id], 1, max_positions=200)
    for network in (scripted, model):
        prompts = ["a"] if network is scripted else PROMPTS
        pieces: list[list[str]] = [[] for _ in prompts]
        texts = complete(
            network,
            tokenizer,
            prompts,
            stop=stop,
            max_new_tokens=40,
            batch_size=3,
            stream=lambda i, new, pieces=pieces: pieces[i].append(new),  # type: ignore[arg-type, misc]
        )
        assert ["".join(parts) for parts in pieces] == texts
        assert all(piece for parts in pieces for piece in parts)
        if network is scripted:
            assert texts == [text.split("\nclass ")[0] if "\nclass " in stop else text]
            assert len(pieces[0]) > 5 and "😀" in "".join(pieces[0])


def test_the_tokens_are_those_of_transformers(model: Phi1, tokenizer: Tokenizer, tmp_path: pathlib.Path) -> None:
    import transformers

    export_folder(tmp_path / "hf", model, tokenizer)
    theirs = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "hf").eval()
    ids = transformers.AutoTokenizer.from_pretrained(tmp_path / "hf")
    ours, own = load(tmp_path / "hf", "cpu")
    assert own.hash == tokenizer.hash and not ours.training
    for prompts in (["abcd", "bcde", "zzzz"], ["def f(x):\n", "a", "x = 1024\n    y = 2\n", "zz\n\n"]):
        batch = ids(prompts, padding=True, return_tensors="pt")
        out = theirs.generate(
            **batch, max_new_tokens=12, do_sample=False, suppress_tokens=list(range(tokenizer.vocab_size, 400))
        )
        new = out[:, batch["input_ids"].shape[1] :].tolist()
        ended = [row[: row.index(tokenizer.eot_id)] if tokenizer.eot_id in row else row for row in new]
        assert complete(ours, own, prompts, max_new_tokens=12) == [tokenizer.decode(row) for row in ended]


@pytest.fixture(scope="module")
def checkpoint(model: Phi1, tokenizer: Tokenizer, tmp_path_factory: pytest.TempPathFactory) -> pathlib.Path:
    return write_model(tmp_path_factory.mktemp("runs") / "step-000001", model, tokenizer, {"step": 1})


def test_command(
    checkpoint: pathlib.Path,
    model: Phi1,
    tokenizer: Tokenizer,
    tmp_path: pathlib.Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    prompt = "def f(x):\r\n  "  # neither CRLF nor trailing blanks are touched
    (expected,) = complete(model, tokenizer, [prompt], max_new_tokens=9)
    options = ["generate", "--checkpoint", str(checkpoint), "--max-new-tokens", "9", "--device", "cpu"]
    (tmp_path / "prompt").write_bytes(prompt.encode())
    assert main([*options, "--prompt", prompt]) == 0
    assert capsys.readouterr().out == expected
    assert main([*options, "--prompt-file", str(tmp_path / "prompt")]) == 0
    assert capsys.readouterr().out == expected
    monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(prompt.encode())))
    assert main(options) == 0
    assert capsys.readouterr().out == expected


def test_command_errors(checkpoint: pathlib.Path, tmp_path: pathlib.Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "latin").write_bytes(b"caf\xe9")
    options = ["generate", "--checkpoint", str(checkpoint)]
    for extra, message in (
        (["--prompt-file", str(tmp_path / "latin")], "not UTF-8 at byte 3"),
        (["--prompt-file", str(tmp_path / "absent")], "cannot be read (No such file or directory)"),
        (["--prompt", "a", "--prompt-file", "b"], "give one of them"),
        (["--prompt", "q" * 48], "the prompt has 48 tokens and the model 48 positions"),
        (["--prompt", "a", "--temperature", "-1"], "temperature = -1.0: must be at least 0"),
    ):
        assert main([*options, *extra]) == 2
        error = capsys.readouterr().err
        assert message in error and error.count("\n") == 1, error
    assert main(["generate", "--checkpoint", str(tmp_path / "nowhere"), "--prompt", "a"]) == 2
    assert "nowhere: no such folder" in capsys.readouterr().err


def test_a_tokenizer_with_more_entries_than_the_model_has_rows(
    model: Phi1, tokenizer: Tokenizer, tmp_path: pathlib.Path
) -> None:
    export_folder(tmp_path / "hf", model, tokenizer)
    codegen_tokenizer().save(tmp_path / "hf" / "tokenizer.json")
    with pytest.raises(
        UserError, match=r"hf: its tokenizer has 50,295 entries, its model 400 rows: .* phi1 import and"
    ):
        load(tmp_path / "hf", "cpu")


def test_characters_that_cannot_be(
    checkpoint: pathlib.Path, model: Phi1, tokenizer: Tokenizer, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Half a character to stop at; a completion that the output's encoding does not have."""
    with pytest.raises(UserError, match=r"stop = .*: must be Unicode text"):
        complete(model, tokenizer, ["a"], stop=["b", "\udcff"])
    monkeypatch.setattr(sys, "stdout", io.TextIOWrapper(io.BytesIO(), encoding="ascii"))
    with pytest.raises(UserError, match=r"standard output, in ascii, cannot hold .*; set PYTHONIOENCODING=utf-8"):
        _print("f(x) é")


def test_a_missing_gpu_is_said(
    checkpoint: pathlib.Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert main(["generate", "--checkpoint", str(checkpoint), "--prompt", "a", "--device", "cuda"]) == 2
    assert "--device = 'cuda': no GPU that torch can use here; choose auto or cpu" in capsys.readouterr().err


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
def test_a_gpu_gives_the_same_greedy_text(model: Phi1, tokenizer: Tokenizer) -> None:
    expected = complete(model, tokenizer, PROMPTS, max_new_tokens=12)
    try:
        assert complete(model.cuda(), tokenizer, PROMPTS, max_new_tokens=12) == expected
    finally:
        model.cpu()
