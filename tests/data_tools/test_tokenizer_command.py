"""`phi1 data tokenizer`: from dataset folders to one tokenizer.json."""

import dataclasses
import pathlib
from collections.abc import Iterator
from typing import Any

import pyarrow
import pytest

from data_tools.dataset import Dataset, run_stage
from phi1.cli import main
from phi1.tokenizer import Tokenizer, train_tokenizer

TEXTS = ["def f(x):\n    return x + 1\n", "class A:\n    pass\n", "x = 2024\n"]


@dataclasses.dataclass(frozen=True)
class Nothing:
    """A stage without options."""


def produce(config: Nothing, inputs: object, shard: int) -> Iterator[dict[str, Any]]:
    yield from ({"content": text} for text in TEXTS[shard::2])


@pytest.fixture
def dataset(tmp_path: pathlib.Path) -> Dataset:
    schema = pyarrow.schema([("content", pyarrow.string())])
    return run_stage("test", Nothing(), tmp_path / "data", [], 2, produce, schema, quiet=True)


def test_command(dataset: Dataset, tmp_path: pathlib.Path, capsys: pytest.CaptureFixture[str]) -> None:
    output = tmp_path / "new" / "tokenizer.json"
    command = ["data", "tokenizer", "--inputs", str(dataset.folder), "--output", str(output), "--vocab-size", "300"]
    assert main(command) == 0
    assert f"300 entries from 3 documents, {sum(map(len, TEXTS))} characters" in capsys.readouterr().out
    made = Tokenizer.load(output)
    assert made.vocab_size == 300 and made.hash == train_tokenizer(TEXTS, 300).hash
    assert main(command) == 0  # again: the same file
    assert Tokenizer.load(output).hash == made.hash


def test_errors_are_one_line(dataset: Dataset, tmp_path: pathlib.Path, capsys: pytest.CaptureFixture[str]) -> None:
    folder, output = str(dataset.folder), str(tmp_path / "tokenizer.json")
    for inputs, out, size, message in (
        ([str(tmp_path / "absent")], output, "300", "absent: no dataset there"),
        ([folder], output, "295", "vocab_size = 295: must be at least 296"),
        ([folder], str(tmp_path), "300", "is a folder; name a file"),
        ([], output, "300", "--inputs: name at least one dataset folder"),
    ):
        assert main(["data", "tokenizer", "--inputs", *inputs, "--output", out, "--vocab-size", size]) == 2
        error = capsys.readouterr().err
        assert message in error and error.count("\n") == 1
    assert not pathlib.Path(output).exists()


def test_a_corrupt_shard_is_named(dataset: Dataset, tmp_path: pathlib.Path, capsys: pytest.CaptureFixture[str]) -> None:
    shard = dataset.folder / "00001.parquet"
    raw = shard.read_bytes()
    shard.write_bytes(raw[:-1] + bytes([raw[-1] ^ 1]))
    assert main(["data", "tokenizer", "--inputs", str(dataset.folder), "--output", str(tmp_path / "t.json")]) == 2
    assert "00001.parquet: corrupt shard" in capsys.readouterr().err
