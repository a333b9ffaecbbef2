"""Token shards on disk, and the order in which training reads them.

    folder/
      00000.bin …      tokens, uint16 little-endian; every document is followed by <|endoftext|>
      00000.mask …     where the set has a loss mask: uint8 per token, 1 if it counts in the loss
      00000.json …     that shard's receipt: counts and SHA-256s
      tokenizer.json   the tokenizer, for `transformers.PreTrainedTokenizerFast` too
      stage.json       what is being made (written first)
      manifest.json    the same plus all receipts (written last: its presence means "whole")

The shards, one after the other, are one long array, whose end the beginning follows. Window w of length T is T inputs
from token o + wT on and, shifted by one, T targets. The first epoch has o = 0; each later one another o, so that a
token's context is not always the same and the few tokens that no window of an epoch holds are others each time. An
epoch reads all its windows in a pseudo-random order. Offset and order are computed for each index alone, so sample i is
a pure function of (seed, i): neither a resume nor the number of devices nor the batch size changes it.
"""

import bisect
import json
import os
import pathlib
import sys
from collections.abc import Iterable, Mapping, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

from phi1 import __version__
from phi1.errors import UserError
from phi1.files import atomic_write, claim, sha256_file, sha256_json, write_json

if TYPE_CHECKING:
    from phi1.tokenizer import Tokenizer

MANIFEST = "manifest.json"
STAGE = "stage.json"
VERIFIED = "verified.json"
IGNORE = -100
"""Target of a token that does not count in the loss."""
_TYPES: dict[str, np.dtype[Any]] = {".bin": np.dtype("<u2"), ".mask": np.dtype("u1")}


def mix(*values: int) -> int:
    """A 63-bit integer that depends on all of `values` and their order.

    Each value is folded in by the finaliser of splitmix64 (Steele, Lea, Flood 2014), a bijection of 64-bit words.
    """
    word = 0
    for value in values:
        word = (word + value + 0x9E3779B97F4A7C15) & 0xFFFFFFFFFFFFFFFF
        word = ((word ^ (word >> 30)) * 0xBF58476D1CE4E5B9) & 0xFFFFFFFFFFFFFFFF
        word = ((word ^ (word >> 27)) * 0x94D049BB133111EB) & 0xFFFFFFFFFFFFFFFF
        word ^= word >> 31
    return word >> 1


def permute(index: int, size: int, key: int) -> int:
    """Where a pseudo-random permutation of range(size) sends `index`, in O(1) memory.

    A Feistel network over the smallest power of two that holds `size` (less than 2 size), whose halves
    change each other in turn; an image past `size` is sent on until it lies inside (cycle walking).
    """
    bits = max(2, (size - 1).bit_length())
    low = bits // 2
    mask = (1 << low) - 1, (1 << bits - low) - 1
    while True:
        half = [index & mask[0], index >> low]
        for turn in range(8):
            side = turn % 2
            half[side] ^= mix(key, turn, half[1 - side]) & mask[side]
        index = half[1] << low | half[0]
        if index < size:
            return index


class TokenWriter:
    """Makes a folder of token shards; one interrupted goes on after its last whole shard.

    identity: JSON-able facts that decide the contents (inputs' hashes, options). UserError if the folder
    holds shards made from another identity or by another tokenizer.
    """

    def __init__(
        self, folder: pathlib.Path | str, tokenizer: "Tokenizer", *, masked: bool, identity: Mapping[str, Any]
    ) -> None:
        self.folder = pathlib.Path(folder)
        if tokenizer.vocab_size > 1 << 16:
            raise UserError(f"tokenizer of {tokenizer.vocab_size} entries: token shards hold at most {1 << 16}")
        self.tokenizer = tokenizer
        self.masked = masked
        self.identity: dict[str, Any] = {
            "stage": "tokenize",
            "tokenizer_hash": tokenizer.hash,
            "vocab_size": tokenizer.vocab_size,
            "eot_id": tokenizer.eot_id,
            "masked": masked,
            **identity,
        }
        claim(self.folder / STAGE, self.identity, "token shards")
        tokenizer.save(self.folder / "tokenizer.json")

    def has(self, shard: int) -> bool:
        """Whether shard `shard` is whole."""
        return (self.folder / f"{shard:05d}.json").exists()

    def write(self, shard: int, documents: Iterable[tuple[Sequence[int], Sequence[int] | None]]) -> dict[str, Any]:
        """Writes a shard of (tokens, mask) documents, with <|endoftext|> after each; returns its receipt.

        mask: 0 or 1 per token (None: all 1), kept if the writer is `masked`. The end token counts.
        """
        path = self.folder / f"{shard:05d}.bin"
        count = tokens = 0
        masks: list[np.ndarray] = []
        end = np.array([self.tokenizer.eot_id], dtype="<u2").tobytes()
        with atomic_write(path) as file:
            for ids, mask in documents:
                file.write(np.asarray(ids, dtype="<u2").tobytes() + end)
                count, tokens = count + 1, tokens + len(ids) + 1
                if self.masked:
                    assert mask is None or len(mask) == len(ids)
                    masks.append(np.asarray([*([1] * len(ids) if mask is None else mask), 1], dtype=np.uint8))
        receipt: dict[str, Any] = {"documents": count, "tokens": tokens, "sha256": sha256_file(path)}
        if self.masked:
            with atomic_write(path.with_suffix(".mask")) as file:
                for array in masks:
                    file.write(array.tobytes())
            receipt["mask_sha256"] = sha256_file(path.with_suffix(".mask"))
            receipt["counted_tokens"] = int(sum(array.sum() for array in masks))
        write_json(path.with_suffix(".json"), receipt)
        return receipt

    def finish(self, shards: int) -> "TokenDataset":
        """Writes the manifest over shards 0 … shards - 1, all of them whole, and opens the dataset."""
        receipts = [
            json.loads((self.folder / f"{shard:05d}.json").read_text(encoding="utf-8")) for shard in range(shards)
        ]
        totals = {name: sum(receipt[name] for receipt in receipts) for name in ("documents", "tokens")}
        manifest = self.identity | totals | {"code_version": __version__, "shards": receipts}
        write_json(self.folder / MANIFEST, manifest)
        return TokenDataset(self.folder)


class TokenDataset:
    """A whole folder of token shards.

    Opening checks every shard's size. `verify` checks the hashes; the trainer calls it. A read finds out if a shard was
    cut or written anew since, and checks the hash of one that was. (Read, not mapped: a file that shrinks under a map
    ends the process without a word.)
    """

    def __init__(self, folder: pathlib.Path | str) -> None:
        self.folder = pathlib.Path(folder)
        path = self.folder / MANIFEST
        if not path.exists():
            what = "tokenizing was interrupted there" if (self.folder / STAGE).exists() else "no token shards there"
            raise UserError(f"{self.folder}: {what} (no {MANIFEST}); run `phi1 data tokenize` (again) to write it")
        try:
            self.manifest: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
            self.tokens: int = self.manifest["tokens"]
            self.documents: int = self.manifest["documents"]
            self.tokenizer_hash: str = self.manifest["tokenizer_hash"]
            self.vocab_size: int = self.manifest["vocab_size"]
            self.eot_id: int = self.manifest["eot_id"]
            self.masked: bool = self.manifest["masked"]
            shards = self.manifest["shards"]
            self._starts = [0]
            for receipt in shards:
                self._starts.append(self._starts[-1] + receipt["tokens"])
            for name in ("tokens", "documents", "vocab_size", "eot_id"):
                if type(self.manifest[name]) is not int:
                    raise TypeError(f"{name} = {self.manifest[name]!r}, no integer")
            if self.tokens != self._starts[-1]:
                raise ValueError(f"{self.tokens:,} tokens, but {self._starts[-1]:,} in its {len(shards)} shards")
        except (ValueError, KeyError, TypeError) as error:
            raise UserError(
                f"{path}: not a manifest of token shards ({type(error).__name__}: {error}); "
                "delete the folder and run `phi1 data tokenize` again"
            ) from error
        suffixes = (".bin", ".mask") if self.masked else (".bin",)
        self._opened = {(n, suffix): self._check_size(n, suffix) for n in range(len(shards)) for suffix in suffixes}

    @property
    def hash(self) -> str:
        """SHA-256 over the tokenizer and the shards' hashes."""
        return sha256_json(
            {
                "tokenizer": self.tokenizer_hash,
                "shards": [[receipt["sha256"], receipt.get("mask_sha256")] for receipt in self.manifest["shards"]],
            }
        )

    def verify(self) -> None:
        """Checks every shard's SHA-256, once: what was checked is noted in verified.json by size and time.

        Hashing reads the whole set (12 GB for the paper's 6 billion tokens), so a file that still has
        the size and modification time it had when it was checked is not read again.
        UserError names the shard that is corrupt.
        """
        path = self.folder / VERIFIED
        try:
            known = json.loads(path.read_bytes())
        except (FileNotFoundError, ValueError):  # a note that cannot be read is made again
            known = {}
        known = known if isinstance(known, dict) else {}
        seen = {}
        for shard, receipt in enumerate(self.manifest["shards"]):
            for suffix, digest in ((".bin", receipt["sha256"]), (".mask", receipt.get("mask_sha256"))):
                if digest is None:
                    continue
                file = self.folder / f"{shard:05d}{suffix}"
                stat = file.stat()
                fact = [digest, stat.st_size, stat.st_mtime_ns]
                if known.get(file.name) != fact and sha256_file(file) != digest:
                    raise self._corrupt(shard, suffix, "its SHA-256 is not the manifest's")
                seen[file.name] = fact
        if seen != known:
            try:
                write_json(path, seen)
            except (OSError, UserError) as error:  # a read-only mount, another's folder, a full disk: no need to end
                print(f"{self.folder}: its hashes are checked at each start ({error})", file=sys.stderr)

    def windows(self, length: int) -> int:
        """Windows of `length` tokens (and the target after them) in an epoch. UserError if there is none."""
        count = (self.tokens - 1) // length
        if count < 1:
            raise UserError(
                f"{self.folder}: {self.tokens:,} tokens, fewer than a sequence needs ({length:,} + 1); "
                "add documents, or lower --sequence-length"
            )
        return count

    def start(self, index: int, length: int, seed: int) -> int:
        """The token that sample `index` begins at."""
        epoch, place = divmod(index, self.windows(length))
        key = mix(seed, epoch)
        offset = mix(key) % self.tokens if epoch else 0
        return (offset + permute(place, self.windows(length), key) * length) % self.tokens

    def batch(
        self, indices: Iterable[int], length: int, *, seed: int, loss_mask: bool = True
    ) -> tuple[np.ndarray, np.ndarray]:
        """Samples `indices` as inputs and targets, int64 (len(indices), length).

        A target is IGNORE where the set has a loss mask that is 0 there (unless loss_mask is False), and then also
        in what remains of a document that began before the window: its prompt is out of sight.

        UserError if a token is not in the vocabulary, or a shard is not the file that was opened.
        """
        rows = [self.start(index, length, seed) for index in indices]
        tokens = np.stack([self._read(".bin", row, length + 1) for row in rows]).astype(np.int64)
        if tokens.max() >= self.vocab_size:
            row, column = np.argwhere(tokens >= self.vocab_size)[0]
            shard, offset = self._place((rows[row] + column) % self.tokens)
            raise self._corrupt(
                shard, ".bin", f"token {offset:,} is {tokens[row, column]}, of a vocabulary of {self.vocab_size:,}"
            )
        inputs, targets = tokens[:, :-1].copy(), tokens[:, 1:].copy()
        if self.masked and loss_mask:
            targets[np.stack([self._read(".mask", row + 1, length) for row in rows]) == 0] = IGNORE
            cut = [self._read(".bin", row - 1, 1)[0] != self.eot_id for row in rows]
            before_first_end = np.cumsum(inputs == self.eot_id, axis=1) == 0
            targets[before_first_end & np.array(cut)[:, None]] = IGNORE
        return inputs, targets

    def _place(self, index: int) -> tuple[int, int]:
        """The shard that token `index` of the whole array is in, and where in it."""
        shard = bisect.bisect_right(self._starts, index) - 1
        return shard, index - self._starts[shard]

    def _read(self, suffix: str, start: int, count: int) -> np.ndarray:
        """Elements [start, start + count) of the array that the shards' files with `suffix` are together, modulo its
        size.
        """
        kind, parts = _TYPES[suffix], []
        while count > 0:
            start %= self.tokens
            shard, offset = self._place(start)
            here = min(count, self._starts[shard + 1] - start)
            try:
                with open(self.folder / f"{shard:05d}{suffix}", "rb", buffering=0) as file:
                    stamp = _stamp(os.fstat(file.fileno()))
                    data = os.pread(file.fileno(), here * kind.itemsize, offset * kind.itemsize)
                # A copy that was put in its place, or a new time: the same shard, if its hash says so.
                same = stamp == self._opened[shard, suffix] or self._hash_is_right(shard, suffix)
            except FileNotFoundError:
                raise self._corrupt(shard, suffix, "it was deleted since it was opened") from None
            if not same or len(data) != here * kind.itemsize:
                raise self._corrupt(shard, suffix, "it was changed since it was opened")
            self._opened[shard, suffix] = stamp
            parts.append(np.frombuffer(data, kind))
            start, count = start + here, count - here
        return np.concatenate(parts)

    def _hash_is_right(self, shard: int, suffix: str) -> bool:
        digest = self.manifest["shards"][shard]["sha256" if suffix == ".bin" else "mask_sha256"]
        return sha256_file(self.folder / f"{shard:05d}{suffix}") == digest

    def _check_size(self, shard: int, suffix: str) -> tuple[int, int]:
        path = self.folder / f"{shard:05d}{suffix}"
        count = self._starts[shard + 1] - self._starts[shard]
        if not path.exists():
            raise self._corrupt(shard, suffix, "it is missing")
        stat = path.stat()
        if stat.st_size != count * _TYPES[suffix].itemsize:
            raise self._corrupt(shard, suffix, f"{stat.st_size:,} bytes for {count:,} tokens")
        return _stamp(stat)

    def _corrupt(self, shard: int, suffix: str, reason: str) -> UserError:
        return UserError(
            f"{self.folder / f'{shard:05d}{suffix}'}: corrupt shard ({reason}); delete "
            f"{self.folder / f'{shard:05d}.json'} and {self.folder / MANIFEST}, and run `phi1 data tokenize` again"
        )


def _stamp(stat: os.stat_result) -> tuple[int, int]:
    return stat.st_size, stat.st_mtime_ns


def document_bounds(inputs: np.ndarray, eot_id: int) -> np.ndarray:
    """cu_seqlens of a batch folded to (B*T): int32, 0, then the end of each document or row, B*T last.

    inputs: (B, T). A document ends with its <|endoftext|>, which belongs to it, or with its row.
    """
    batch, length = inputs.shape
    ends = inputs == eot_id
    ends[:, -1] = True
    return np.concatenate([[0], np.flatnonzero(ends.reshape(batch * length)) + 1]).astype(np.int32)
