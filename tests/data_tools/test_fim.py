"""Documents rearranged for filling in the middle, and put together again."""

import collections
import dataclasses
import math

import numpy as np
import pyarrow
import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from data_tools import tokenize
from data_tools.dataset import run_stage
from data_tools.fim import Fim
from data_tools.tokenize import Config, run
from phi1.errors import UserError
from phi1.tokenizer import FIM, Tokenizer, codegen_tokenizer, train_tokenizer
from phi1.tokens import TokenDataset

CODEGEN = codegen_tokenizer().with_fim()
TEXTS = [f"def f{i}(x):\r\n    return x * {i}  # été 👩‍👩‍👧 中文 e\u0301\n" * (1 + i % 3) for i in range(300)]
ODD = ["", None, "x", "\r\n", "<|fim_prefix|>a<|fim_suffix|><|fim_middle|>", "<|endoftext|>", "".join(FIM)]


def put_together(ids, tokenizer):
    """The document that ids stand for, and its order: PSM, SPM or plain."""
    before, between, after = tokenizer.fim_ids
    if before not in ids:
        assert between not in ids and after not in ids
        return tokenizer.decode(ids), "plain"
    assert [ids.count(sentinel) for sentinel in tokenizer.fim_ids] == [1, 1, 1] and ids[0] == before
    middle_at, suffix_at = ids.index(between), ids.index(after)
    suffix = tokenizer.decode(ids[suffix_at + 1 : middle_at])
    if suffix_at == 1:
        return tokenizer.decode(ids[middle_at + 1 :]) + suffix, "SPM or no prefix"
    return tokenizer.decode(ids[1:suffix_at]) + tokenizer.decode(ids[middle_at + 1 :]) + suffix, "PSM"


@dataclasses.dataclass(frozen=True)
class Made:
    kind: str = "documents"


def produce(config, inputs, shard):
    yield from ({"content": text} for text in [*TEXTS, *ODD][shard::3])


def produce_exercises(config, inputs, shard):
    yield {"prompt": "def f():\n", "solution": "    return 1\n"}


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return tmp_path_factory.mktemp("data")


@pytest.fixture(scope="module")
def documents(folder):
    schema = pyarrow.schema([("content", pyarrow.string())])
    return run_stage("made", Made(), folder / "documents", [], 3, produce, schema, quiet=True).folder


@pytest.fixture(scope="module")
def plain_tokenizer(folder):
    tokenizer = train_tokenizer(TEXTS, 330)
    tokenizer.save(folder / "tokenizer.json")
    return tokenizer


@pytest.fixture
def config(folder, documents, plain_tokenizer, tmp_path):
    return Config([documents], tmp_path / "tokens", tokenizer=str(folder / "tokenizer.json"), fim_rate=0.5)


def shards(dataset):
    return [np.fromfile(path, "<u2").tolist() for path in sorted(dataset.folder.glob("*.bin"))]


def split(tokens, eot_id):
    found, current = [], []
    for token in tokens:
        if token == eot_id:
            found.append(current)
            current = []
        else:
            current.append(token)
    assert not current
    return found


@given(
    st.lists(
        st.sampled_from(["\r\n", "\n", "    ", " " * 40, "😀", "👩‍👩‍👧", "e\u0301", "中文", *FIM, "<|endoftext|>"])
        | st.text(max_size=6),
        max_size=8,
    ).map("".join),
    st.integers(0, 2**64),
)
@example("\r\n", 0)
@example("", 0)
@settings(deadline=None, max_examples=60)
def test_parts_make_up_the_text(text, seed):
    """Before they are encoded and after; sentinels come from no text."""
    for spm_share in (0.0, 1.0):
        parts = Fim(CODEGEN.fim_ids, 1.0, spm_share, seed).arrange(text, 3, 4)
        before, between, after = CODEGEN.fim_ids
        if spm_share:
            assert (parts[0], parts[1], parts[3]) == (before, after, between)
            prefix, middle, suffix = parts[4], parts[5], parts[2]
        else:
            assert (parts[0], parts[2], parts[4]) == (before, after, between)
            prefix, middle, suffix = parts[1], parts[5], parts[3]
        assert prefix + middle + suffix == text
        ids = [token for part in parts for token in ([part] if isinstance(part, int) else CODEGEN.encode(part))]
        assert put_together(ids, CODEGEN)[0] == text
    assert Fim(CODEGEN.fim_ids, 0.0, 0.5, seed).arrange(text, 3, 4) == (text,)


def test_the_rate_the_share_and_the_cuts_are_met():
    fim, text, count = Fim((1, 2, 3), 0.3, 0.2, 5), "abcdefgh", 20_000
    arranged = [parts for parts in (fim.arrange(text, 0, row) for row in range(count)) if len(parts) > 1]
    # Five standard deviations of a binomial draw.
    assert abs(len(arranged) - 0.3 * count) < 5 * math.sqrt(count * 0.3 * 0.7)
    first = [parts for parts in arranged if parts[1] == 3]
    assert abs(len(first) - 0.2 * len(arranged)) < 5 * math.sqrt(len(arranged) * 0.2 * 0.8)
    cuts = collections.Counter((len(parts[4]), len(parts[4] + parts[5])) for parts in first)
    assert set(cuts) == {(a, b) for a in range(9) for b in range(a, 9)}  # also with empty parts
    for (a, b), found in cuts.items():
        share = (1 if a == b else 2) / 81
        assert abs(found - share * len(first)) < 5 * math.sqrt(len(first) * share) + 1
    # Another document, another cut; the same one, the same.
    assert fim.arrange(text, 1, 7) == fim.arrange(text, 1, 7)
    assert len({fim.arrange(text, shard, row) for shard in range(9) for row in range(9)}) > 12


def test_all_documents_come_back_from_the_windows_of_training(config, plain_tokenizer, capsys):
    """Nothing is lost at the end of a document or of a window, however parts grow; shards go on where they were."""
    dataset = run(config)
    tokenizer = Tokenizer.load(dataset.folder)
    assert tokenizer.vocab_size == dataset.vocab_size == plain_tokenizer.vocab_size + 3
    size = dataset.tokens
    length = 61
    windows = dataset.windows(length)
    starts = [dataset.start(index, length, 0) for index in range(windows)]
    inputs, targets = dataset.batch(range(windows), length, seed=0)
    read = np.full(size, -1)
    for start, row, following in zip(starts, inputs, targets, strict=True):
        read[start : start + length] = row
        read[start + 1 : start + length + 1] = following
    whole = [token for shard in shards(dataset) for token in shard]
    assert read[: windows * length + 1].tolist() == whole[: windows * length + 1]
    found = [put_together(ids, tokenizer) for ids in split(whole, tokenizer.eot_id)]
    expected = [text for shard in range(3) for text in [*TEXTS, *ODD][shard::3] if text]
    assert [text for text, _ in found] == expected
    orders = collections.Counter(order for _, order in found)
    assert set(orders) == {"plain", "PSM", "SPM or no prefix"}
    assert abs(orders["plain"] - len(expected) / 2) < 5 * math.sqrt(len(expected) / 4)
    assert (
        f"{len(expected) - orders['plain']:,} documents were rearranged to fill in the middle"
        in capsys.readouterr().err
    )


def test_interrupted_in_other_batches_and_with_other_inputs_before(config, tmp_path, monkeypatch):
    """The same documents are cut at the same places, whatever is read at a time."""
    whole = run(config)
    monkeypatch.setattr(tokenize, "_BATCH", 7)
    again = run(dataclasses.replace(config, output=tmp_path / "again"))
    assert again.hash == whole.hash
    for name in ("00001.json", "manifest.json"):
        (again.folder / name).unlink()
    assert run(dataclasses.replace(config, output=tmp_path / "again")).hash == whole.hash
    other = run(dataclasses.replace(config, output=tmp_path / "other", fim_seed=1))
    assert other.hash != whole.hash and other.tokenizer_hash == whole.tokenizer_hash
    with pytest.raises(UserError, match=r"different: fim"):
        run(dataclasses.replace(config, output=tmp_path / "again", fim_spm_share=0.25))


def test_held_out_documents_stay_as_they_are(config, tmp_path, plain_tokenizer):
    config = dataclasses.replace(config, validation=tmp_path / "held-out", validation_fraction=0.2, fim_rate=1.0)
    dataset, held_out = run(config), TokenDataset(tmp_path / "held-out")
    assert held_out.tokenizer_hash == dataset.tokenizer_hash  # so that they can be used together
    plain = run(dataclasses.replace(config, fim_rate=0.0, output=tmp_path / "p", validation=tmp_path / "plain"))
    ids, expected = (
        [t for shard in shards(TokenDataset(tmp_path / name)) for t in shard] for name in ("held-out", "plain")
    )
    assert ids == expected  # with the same ids: the sentinels come after them
    trained = [t for shard in shards(dataset) for t in shard]
    assert trained.count(dataset.eot_id) == trained.count(Tokenizer.load(dataset.folder).fim_ids[0]) == plain.documents


def test_a_plain_set_beside_one(config, documents, tmp_path, plain_tokenizer):
    """Made with the tokenizer of the other; twice with sentinels is once."""
    dataset = run(config)
    beside = run(Config([documents], tmp_path / "beside", tokenizer=str(config.output)))
    assert beside.tokenizer_hash == dataset.tokenizer_hash != plain_tokenizer.hash
    twice = run(dataclasses.replace(config, output=tmp_path / "twice", tokenizer=str(config.output)))
    assert twice.hash == dataset.hash
    assert plain_tokenizer.fim_ids is None and "fim" not in beside.manifest and dataset.manifest["fim"]["rate"] == 0.5


def test_sentinels_take_spare_rows(plain_tokenizer):
    assert CODEGEN.fim_ids == (50295, 50296, 50297) and CODEGEN.vocab_size == 50298 < 51200
    assert CODEGEN.decode(CODEGEN.fim_ids) == "".join(FIM)
    text = "".join(FIM) + "<|endoftext|> x"
    assert not set(CODEGEN.fim_ids) & set(CODEGEN.encode(text)) and CODEGEN.decode(CODEGEN.encode(text)) == text
    assert CODEGEN.encode(text) == codegen_tokenizer().encode(text)
    assert CODEGEN.with_fim().hash == CODEGEN.hash != codegen_tokenizer().hash


def test_what_is_refused(config, tmp_path):
    schema = pyarrow.schema([(name, pyarrow.string()) for name in ("prompt", "solution")])
    exercises = run_stage(
        "made", Made("exercises"), tmp_path / "exercises", [], 1, produce_exercises, schema, quiet=True
    )
    with pytest.raises(
        UserError, match=r"--fim-rate 0\.5: .*exercises has exercises, .*; tokenize them apart, with --tokenizer"
    ):
        run(dataclasses.replace(config, inputs=[*config.inputs, exercises.folder]))
    assert not config.output.exists()
    for name in ("fim_rate", "fim_spm_share"):
        for value in (-0.1, 1.1, math.nan):
            with pytest.raises(UserError, match=rf"{name} = {value}: must be from 0 to 1"):
                dataclasses.replace(config, **{name: value})
