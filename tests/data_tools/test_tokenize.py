"""Documents and exercises into token shards."""

import dataclasses

import numpy as np
import pyarrow
import pytest

from data_tools import tokenize
from data_tools.dataset import Dataset, run_stage
from data_tools.tokenize import Config, run
from phi1.cli import main
from phi1.errors import UserError
from phi1.tokenizer import Tokenizer, train_tokenizer
from phi1.tokens import IGNORE, TokenDataset

TEXTS = [f"def f{i}(x):\n    return x * {i}\n" for i in range(90)] + ["", None, "print('<|endoftext|>')\n"]
EXERCISES = [
    {
        "prompt": f'def add_{i}(x):\n    """Adds {i}."""\n',
        "solution": f"    return x + {i}\n",
        "entry_point": f"add_{i}",
    }
    for i in range(40)
]


@dataclasses.dataclass(frozen=True)
class Made:
    kind: str


def produce_texts(config, inputs, shard):
    yield from ({"content": text, "source": "test"} for text in TEXTS[shard::3])


def produce_exercises(config, inputs, shard):
    yield from EXERCISES[shard::2]


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return tmp_path_factory.mktemp("data")


@pytest.fixture(scope="module")
def documents(folder):
    schema = pyarrow.schema([("content", pyarrow.string()), ("source", pyarrow.string())])
    return run_stage("made", Made("documents"), folder / "documents", [], 3, produce_texts, schema, quiet=True)


@pytest.fixture(scope="module")
def exercises(folder):
    schema = pyarrow.schema([(name, pyarrow.string()) for name in ("prompt", "solution", "entry_point")])
    return run_stage("made", Made("exercises"), folder / "exercises", [], 2, produce_exercises, schema, quiet=True)


@pytest.fixture(scope="module")
def tokenizer(folder):
    tokenizer = train_tokenizer([text for text in TEXTS if text], 320)
    tokenizer.save(folder / "tokenizer.json")
    return tokenizer


@pytest.fixture
def config(folder, documents, tokenizer, tmp_path):
    return Config([documents.folder], tmp_path / "tokens", tokenizer=str(folder / "tokenizer.json"))


def stored(dataset, dtype="<u2", suffix="bin"):
    paths = sorted(dataset.folder.glob(f"*.{suffix}"))
    return [np.fromfile(path, dtype).tolist() for path in paths]


def split(tokens, eot_id):
    """Documents of a flat list of tokens, without their end tokens."""
    documents, current = [], []
    for token in tokens:
        if token == eot_id:
            documents.append(current)
            current = []
        else:
            current.append(token)
    assert not current
    return documents


@pytest.mark.usefixtures("elsewhere")
def test_documents_come_back_in_order(config, tokenizer, capsys):
    dataset = run(config)
    texts = [text for shard in range(3) for text in TEXTS[shard::3] if text]
    found = [tokenizer.decode(ids) for shard in stored(dataset) for ids in split(shard, tokenizer.eot_id)]
    assert found == texts
    assert dataset.documents == len(texts) == 91
    assert not dataset.masked
    errors = capsys.readouterr().err
    assert "2 empty documents were left out" in errors
    assert f"{dataset.tokens:,} tokens in 91 documents" in errors
    assert Tokenizer.load(dataset.folder).hash == tokenizer.hash


def test_end_of_text_inside_a_document_does_not_end_it(config, tokenizer):
    dataset = run(config)
    assert sum(token == tokenizer.eot_id for shard in stored(dataset) for token in shard) == dataset.documents


def test_exercises_count_the_solution_and_the_end(config, exercises, tokenizer):
    dataset = run(dataclasses.replace(config, inputs=[exercises.folder]))
    assert dataset.masked
    tokens = [token for shard in stored(dataset) for token in shard]
    counts = [count for shard in stored(dataset, "u1", "mask") for count in shard]
    expected = [
        (tokenizer.encode(row["prompt"]), tokenizer.encode(row["solution"]))
        for k in range(2)
        for row in EXERCISES[k::2]
    ]
    assert tokens == [token for p, s in expected for token in [*p, *s, tokenizer.eot_id]]
    assert counts == [count for p, s in expected for count in [*[0] * len(p), *[1] * len(s), 1]]
    _, targets = dataset.batch([0], 64, seed=0)
    assert 0 < (targets == IGNORE).sum() < 64


def test_documents_beside_exercises_count_whole(config, documents, exercises):
    dataset = run(dataclasses.replace(config, inputs=[exercises.folder, documents.folder]))
    masks = stored(dataset, "u1", "mask")
    assert len(masks) == 5
    assert all(0 in mask for mask in masks[:2]) and all(set(mask) == {1} for mask in masks[2:])


def test_held_out_documents_are_apart_and_stable(config, exercises, tokenizer, tmp_path):
    config = dataclasses.replace(config, validation=tmp_path / "held-out", validation_fraction=0.2)
    train, held_out = run(config), TokenDataset(tmp_path / "held-out")
    texts = [
        {tokenizer.decode(ids) for shard in stored(dataset) for ids in split(shard, tokenizer.eot_id)}
        for dataset in (train, held_out)
    ]
    assert texts[0] | texts[1] == {text for text in TEXTS if text} and not texts[0] & texts[1]
    assert 8 <= held_out.documents <= 28  # 91 draws at 0.2: three standard deviations either way
    # With other inputs beside them, the same documents are held out.
    more = dataclasses.replace(
        config, inputs=[exercises.folder, *config.inputs], output=tmp_path / "b", validation=tmp_path / "c"
    )
    run(more)
    again = {
        tokenizer.decode(ids)
        for shard in stored(TokenDataset(tmp_path / "c"))[2:]
        for ids in split(shard, tokenizer.eot_id)
    }
    assert again == texts[1]


def test_interrupted_then_run_again(config, tmp_path, monkeypatch, capsys):
    whole = run(dataclasses.replace(config, output=tmp_path / "whole"))
    real, calls = tokenize.TokenWriter.write, []

    def write(self, shard, documents):
        if shard == 1:
            list(documents)  # the work is lost, as in an interruption
            raise KeyboardInterrupt
        return real(self, shard, documents)

    with monkeypatch.context() as patch:
        patch.setattr(tokenize.TokenWriter, "write", write)
        with pytest.raises(KeyboardInterrupt):
            run(config)
    with pytest.raises(UserError, match="interrupted there"):
        TokenDataset(config.output)

    def count(self, shard, documents):
        calls.append(shard)
        return real(self, shard, documents)

    monkeypatch.setattr(tokenize.TokenWriter, "write", count)
    resumed = run(config)
    assert calls == [1, 2]
    assert "going on after 1 of 3 shards" in capsys.readouterr().err
    assert resumed.hash == whole.hash and stored(resumed) == stored(whole)
    run(config)  # nothing left to do
    assert calls == [1, 2]


def test_other_settings_are_refused(config, exercises, folder):
    run(config)
    with pytest.raises(UserError, match=r"different: .*inputs"):
        run(dataclasses.replace(config, inputs=[exercises.folder]))
    train_tokenizer(["while True:\n\tpass\n" * 9], 310).save(folder / "other.json")
    with pytest.raises(UserError, match=r"different: .*tokenizer_hash"):
        run(dataclasses.replace(config, tokenizer=str(folder / "other.json")))


def test_bad_input(config, documents, tmp_path):
    schema = pyarrow.schema([("entry_point", pyarrow.string())])
    odd = run_stage("made", Made("odd"), tmp_path / "odd", [], 2, produce_odd, schema, quiet=True)
    with pytest.raises(UserError, match=r"odd: has neither `content` nor .*its columns: entry_point"):
        run(dataclasses.replace(config, inputs=[odd.folder]))
    with pytest.raises(UserError, match="none: no dataset there"):
        run(dataclasses.replace(config, inputs=[tmp_path / "none"]))
    with pytest.raises(UserError, match="--inputs is empty"):
        run(dataclasses.replace(config, inputs=[]))
    with pytest.raises(UserError, match="no such tokenizer file"):
        run(dataclasses.replace(config, tokenizer=str(tmp_path / "none.json")))
    with pytest.raises(UserError, match=r"validation_fraction = 1\.5"):
        dataclasses.replace(config, validation_fraction=1.5)
    assert not config.output.exists()


def produce_odd(config, inputs, shard):
    yield from ({"entry_point": row["entry_point"]} for row in EXERCISES[shard::2])


def test_a_corrupt_input_shard(config, tmp_path):
    schema = pyarrow.schema([("content", pyarrow.string()), ("source", pyarrow.string())])
    made = run_stage("made", Made("documents"), tmp_path / "made", [], 3, produce_texts, schema, quiet=True)
    path = made.folder / "00002.parquet"
    path.write_bytes(path.read_bytes()[:-1] + b"x")
    with pytest.raises(UserError, match=r"00002\.parquet: corrupt shard"):
        run(dataclasses.replace(config, inputs=[made.folder]))


def test_command_line_and_codegen(documents, tmp_path, capsys):
    assert main(["data", "tokenize", "--inputs", str(documents.folder), "--output", str(tmp_path / "t")]) == 0
    dataset = TokenDataset(tmp_path / "t")
    assert (dataset.vocab_size, dataset.eot_id) == (50295, 50256)
    assert Dataset(documents.folder).hash == dataset.manifest["inputs"][0]["hash"]
    assert main(["data", "tokenize", "--inputs", str(tmp_path / "none"), "--output", str(tmp_path / "u")]) == 2
    assert capsys.readouterr().err.endswith("run the stage that writes it (again)\n")


def test_batches_are_bounded_by_characters_too(monkeypatch):
    monkeypatch.setattr(tokenize, "_BATCH_CHARACTERS", 10)
    texts = [("12345",), (None,), ("123", "45"), ("1",), ("a" * 30,), ("1",)]
    batches = list(tokenize._batches(texts))
    assert batches == [texts[:3], texts[3:4], texts[4:5], texts[5:]]
    monkeypatch.setattr(tokenize, "_BATCH", 2)
    assert [len(batch) for batch in tokenize._batches([("",)] * 5)] == [2, 2, 1]
