"""Token shards and the order of samples."""

import collections
import errno
import json
import os

import numpy as np
import pytest

from phi1.errors import UserError
from phi1.tokenizer import train_tokenizer
from phi1.tokens import IGNORE, TokenDataset, TokenWriter, document_bounds, mix, permute

DOCUMENTS = [[index % 50] * (index % 13) + [60 + index % 7] for index in range(120)]


@pytest.fixture(scope="module")
def tokenizer():
    return train_tokenizer(["def f(x):\n    return x\n"] * 3, 300)


def write(folder, tokenizer, *, masked=False, shards=3):
    writer = TokenWriter(folder, tokenizer, masked=masked, identity={"inputs": ["a"]})
    for shard in range(shards):
        part = DOCUMENTS[shard::shards]
        writer.write(shard, ((ids, [0] * (len(ids) - 1) + [1] if masked else None) for ids in part))
    return writer.finish(shards)


@pytest.fixture
def dataset(tmp_path, tokenizer):
    return write(tmp_path / "tokens", tokenizer)


def flat(tokenizer, shards=3):
    return [token for shard in range(shards) for ids in DOCUMENTS[shard::shards] for token in [*ids, tokenizer.eot_id]]


def test_mix_is_a_function_of_values_and_order():
    assert mix(1, 2) == mix(1, 2)
    assert len({mix(*values) for values in [(1, 2), (2, 1), (1,), (1, 2, 0), (0,), (0, 0)]}) == 6
    assert all(0 <= mix(value) < 2**63 for value in (0, 1, 2**63, 2**64 - 1))


@pytest.mark.parametrize("size", [*range(1, 70), 255, 256, 257, 1000, 4097])
def test_permute_is_a_permutation(size):
    assert sorted(permute(index, size, 7) for index in range(size)) == list(range(size))


def test_permute_sends_every_index_everywhere():
    size, keys = 10, 4000
    counts = np.zeros((size, size))
    for key in range(keys):
        for index in range(size):
            counts[index, permute(index, size, mix(key))] += 1
    # Chi-square per index with 9 degrees of freedom: above 33.7 once in 10,000 for a uniform draw.
    assert (((counts - keys / size) ** 2 / (keys / size)).sum(axis=1) < 33.7).all()


def test_permute_mixes_neighbours():
    size = 100_000
    images = np.array([permute(index, size, 3) for index in range(2000)])
    assert abs(np.corrcoef(images[:-1], images[1:])[0, 1]) < 0.07  # 3 standard errors of an independent pair


def test_the_array_is_documents_with_end_tokens(dataset, tokenizer):
    tokens = flat(tokenizer)
    assert dataset.tokens == len(tokens)
    assert dataset.documents == len(DOCUMENTS)
    stored = np.concatenate([np.fromfile(dataset.folder / f"{shard:05d}.bin", "<u2") for shard in range(3)])
    assert stored.tolist() == tokens


def test_an_epoch_reads_every_window_once_and_windows_cross_shards(dataset, tokenizer):
    length, tokens = 32, np.array(flat(tokenizer))
    windows = dataset.windows(length)
    assert windows == (len(tokens) - 1) // length
    inputs, targets = dataset.batch(range(windows), length, seed=5)
    starts = [dataset.start(index, length, 5) for index in range(windows)]
    assert sorted(starts) == list(range(0, windows * length, length))
    for row, start in enumerate(starts):
        assert inputs[row].tolist() == tokens[start : start + length].tolist()
        assert targets[row].tolist() == tokens[start + 1 : start + length + 1].tolist()
    boundaries = np.cumsum([receipt["tokens"] for receipt in dataset.manifest["shards"]])[:-1]
    assert any(start < boundary < start + length for start in starts for boundary in boundaries)
    assert inputs.dtype == targets.dtype == np.int64


def test_a_sample_depends_on_seed_and_index_only(dataset):
    length = 16
    together, _ = dataset.batch(range(100), length, seed=1)
    alone = np.concatenate([TokenDataset(dataset.folder).batch([index], length, seed=1)[0] for index in range(100)])
    assert (together == alone).all()
    windows = dataset.windows(length)
    order = {
        key: [dataset.start(index + key[1] * windows, length, key[0]) for index in range(windows)]
        for key in [(1, 0), (1, 1), (2, 0)]
    }
    assert order[1, 0] != order[1, 1] and order[1, 0] != order[2, 0]
    assert sorted(order[1, 0]) == sorted(order[2, 0]) == list(range(0, windows * length, length))


def test_windows_shift_between_epochs(tmp_path, tokenizer):
    """Around the end of the array: in each epoch no token twice, over the epochs every token and no place alone."""
    dataset, length = write(tmp_path / "tokens", tokenizer, masked=True), 37
    tokens, windows, size = np.array(flat(tokenizer)), dataset.windows(37), dataset.tokens
    assert size - windows * length == 20  # are in no window of the first epoch
    seen, offsets = np.zeros(size, int), set()
    for epoch in range(12):
        starts = [dataset.start(epoch * windows + index, length, 3) for index in range(windows)]
        places = np.concatenate([np.arange(start, start + length) % size for start in starts])
        assert len(set(places)) == len(places) == windows * length
        seen[places] += 1
        offsets.add(min(start % length for start in starts))
    assert seen.min() > 0 and seen.max() == 12 and len(offsets) > 6
    index = next(index for index in range(windows, 99 * windows) if dataset.start(index, length, 3) > size - length + 3)
    start = dataset.start(index, length, 3)  # a window that goes on at the beginning
    inputs, targets = dataset.batch([index], length, seed=3, loss_mask=False)
    places = np.arange(start, start + length + 1) % size
    assert inputs[0].tolist() == tokens[places[:-1]].tolist() and targets[0].tolist() == tokens[places[1:]].tolist()
    # A document that begins with the array is not one that was cut.
    masked = dataset.batch([index], length, seed=3)[1][0]
    counts = (targets[0] >= 60) & (targets[0] < 67) | (targets[0] == tokenizer.eot_id)
    counts[: tokens.tolist().index(tokenizer.eot_id, start) - start if tokens[start - 1] != tokenizer.eot_id else 0] = (
        False
    )
    assert (masked == np.where(counts, targets[0], IGNORE)).all()


def test_loss_mask(tmp_path, tokenizer):
    dataset = write(tmp_path / "tokens", tokenizer, masked=True)
    inputs, targets = dataset.batch(range(dataset.windows(32)), 32, seed=0)
    plain_inputs, plain = dataset.batch(range(dataset.windows(32)), 32, seed=0, loss_mask=False)
    assert (inputs == plain_inputs).all()
    # The writer's mask counts the last token of each document (60 …) and the end token.
    counts = (plain >= 60) & (plain < 67) | (plain == tokenizer.eot_id)
    # The rest of a document that began before the window does not count: up to and with its end token.
    everything = flat(tokenizer)
    for row, counted in enumerate(counts):
        start = dataset.start(row, 32, 0)
        if start and everything[start - 1] != tokenizer.eot_id:
            counted[: everything.index(tokenizer.eot_id, start) - start] = False
    assert (targets == np.where(counts, plain, IGNORE)).all()
    assert sum(shard["counted_tokens"] for shard in dataset.manifest["shards"]) == 2 * len(DOCUMENTS)


def test_document_bounds():
    bounds = document_bounds(np.array([[1, 9, 2, 3], [9, 4, 5, 9]]), eot_id=9)
    assert bounds.tolist() == [0, 2, 4, 5, 8]
    assert bounds.dtype == np.int32


def test_fewer_tokens_than_a_sequence(dataset):
    assert dataset.windows(dataset.tokens - 1) == 1
    with pytest.raises(UserError, match=r"fewer than a sequence needs .*--sequence-length"):
        dataset.windows(dataset.tokens)


@pytest.mark.parametrize("suffix", [".bin", ".mask"])
def test_a_flipped_bit_is_found(tmp_path, tokenizer, suffix):
    dataset = write(tmp_path / "tokens", tokenizer, masked=True)
    path = dataset.folder / f"00001{suffix}"
    content = bytearray(path.read_bytes())
    content[7] ^= 1
    path.write_bytes(content)
    with pytest.raises(UserError, match=rf"00001\{suffix}: corrupt shard \(its SHA-256"):
        TokenDataset(dataset.folder).verify()


def test_hashes_are_checked_once_and_again_after_a_change(dataset, monkeypatch):
    hashed = []

    def spy(path):
        hashed.append(path.name)
        return real(path)

    import phi1.tokens

    real = phi1.tokens.sha256_file
    monkeypatch.setattr(phi1.tokens, "sha256_file", spy)
    dataset.verify()
    TokenDataset(dataset.folder).verify()
    assert hashed == ["00000.bin", "00001.bin", "00002.bin"]
    os.utime(dataset.folder / "00001.bin", ns=(1, 1))
    TokenDataset(dataset.folder).verify()
    assert hashed[3:] == ["00001.bin"]


@pytest.mark.parametrize("code", [errno.EROFS, errno.EACCES, errno.ENOSPC])
def test_the_note_of_checked_hashes_is_optional(dataset, monkeypatch, capsys, code):
    def refused(*arguments):
        raise OSError(code, os.strerror(code))

    with monkeypatch.context() as patch:
        patch.setattr("phi1.files.os.replace", refused)
        dataset.verify()
    assert f"{dataset.folder}: its hashes are checked at each start (" in capsys.readouterr().err
    assert not list(dataset.folder.glob("verified.json*"))
    for damaged in ("null", "[1]", "7", '{"00000.bin": 3}'):
        (dataset.folder / "verified.json").write_text(damaged)
        dataset.verify()
        assert len(json.loads((dataset.folder / "verified.json").read_text())) == 3


def test_truncated_and_missing_shards(dataset):
    path = dataset.folder / "00002.bin"
    path.write_bytes(path.read_bytes()[:-2])
    with pytest.raises(UserError, match=r"00002\.bin: corrupt shard .* bytes for .* run `phi1 data tokenize` again"):
        TokenDataset(dataset.folder)
    path.unlink()
    with pytest.raises(UserError, match=r"00002\.bin: corrupt shard \(it is missing\)"):
        TokenDataset(dataset.folder)


def test_a_shard_is_remade_as_the_error_says(dataset, tokenizer):
    before = (dataset.folder / "00001.bin").read_bytes()
    for name in ("00001.bin", "00001.json", "manifest.json"):
        (dataset.folder / name).unlink()
    writer = TokenWriter(dataset.folder, tokenizer, masked=False, identity={"inputs": ["a"]})
    assert [writer.has(shard) for shard in range(3)] == [True, False, True]
    writer.write(1, ((ids, None) for ids in DOCUMENTS[1::3]))
    assert writer.finish(3).hash == dataset.hash
    assert (dataset.folder / "00001.bin").read_bytes() == before


def test_unfinished_absent_and_broken_folders(tmp_path, tokenizer):
    with pytest.raises(UserError, match="no token shards there"):
        TokenDataset(tmp_path / "none")
    TokenWriter(tmp_path / "begun", tokenizer, masked=False, identity={})
    with pytest.raises(UserError, match="interrupted there"):
        TokenDataset(tmp_path / "begun")
    (tmp_path / "begun" / "manifest.json").write_text("{}")
    with pytest.raises(UserError, match="not a manifest of token shards"):
        TokenDataset(tmp_path / "begun")


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"shards": []}, r"ValueError: [\d,]+ tokens, but 0 in its 0 shards"),
        ({"tokens": 5}, r"ValueError: 5 tokens, but [\d,]+ in its 3 shards"),
        ({"vocab_size": "300"}, r"TypeError: vocab_size = '300', no integer"),
        ({"tokens": "900"}, r"TypeError: tokens = '900', no integer"),
        ({"documents": None}, r"TypeError: documents = None, no integer"),
        ({"shards": [{"tokens": "9"}]}, "TypeError"),
    ],
)
def test_a_manifest_that_is_none(dataset, change, message):
    path = dataset.folder / "manifest.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | change))
    with pytest.raises(UserError, match=rf"not a manifest of token shards \({message}"):
        TokenDataset(dataset.folder)


def test_a_folder_of_other_shards_is_refused(dataset, tokenizer):
    with pytest.raises(UserError, match=r"other settings \(different: inputs: .* there, .* asked\)"):
        TokenWriter(dataset.folder, tokenizer, masked=False, identity={"inputs": ["b"]})
    with pytest.raises(UserError, match=r"different: .*masked"):
        TokenWriter(dataset.folder, tokenizer, masked=True, identity={"inputs": ["a"]})
    other = train_tokenizer(["while True:\n\tpass\n" * 9], 310)
    with pytest.raises(UserError, match=r"different: .*tokenizer_hash"):
        TokenWriter(dataset.folder, other, masked=False, identity={"inputs": ["a"]})


def test_a_vocabulary_past_uint16_is_refused(tmp_path):
    huge = collections.namedtuple("Huge", "vocab_size")(65537)
    with pytest.raises(UserError, match="at most 65536"):
        TokenWriter(tmp_path, huge, masked=False, identity={})


def test_a_full_disk_leaves_whole_shards_only(tmp_path, tokenizer, monkeypatch):
    writer = TokenWriter(tmp_path, tokenizer, masked=False, identity={})
    writer.write(0, [([1, 2, 3], None)])

    def full(descriptor):
        raise OSError(errno.ENOSPC, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(os, "fsync", full)
        with pytest.raises(UserError, match=r"no space left while writing .*00001\.bin"):
            writer.write(1, [([4], None)])
    assert writer.has(0) and not writer.has(1)
    assert not list(tmp_path.glob("*.tmp*"))
    writer.write(1, [([4], None)])
    assert writer.finish(2).tokens == 6


def test_an_empty_shard_is_allowed(tmp_path, tokenizer):
    writer = TokenWriter(tmp_path, tokenizer, masked=True, identity={})
    writer.write(0, [])
    writer.write(1, [([1, 2, 3], [0, 1, 1])])
    dataset = writer.finish(2)
    dataset.verify()
    inputs, targets = dataset.batch([0], 3, seed=0)
    assert inputs.tolist() == [[1, 2, 3]]
    assert targets.tolist() == [[2, 3, tokenizer.eot_id]]


def test_the_manifest_says_what_the_shards_are(dataset, tokenizer):
    manifest = json.loads((dataset.folder / "manifest.json").read_text())
    assert manifest["tokenizer_hash"] == tokenizer.hash
    assert manifest["eot_id"] == dataset.eot_id == tokenizer.eot_id
    assert manifest["tokens"] == sum(shard["tokens"] for shard in manifest["shards"])
    assert (dataset.folder / "tokenizer.json").exists()
