"""Checkpoints: folders that are whole or absent, and checked when read.

    runs/<name>/
      step-001000/
        config.json             the model's shape (`ModelConfig`)
        model.safetensors       its parameters (in training: the float32 master parameters)
        tokenizer.json
        optimizer.safetensors   training only: the optimizer's state, `<parameter>/<key>`
        checkpoint.json         facts (step, tokens seen, recipe, …), each file's SHA-256 and its own; written last
      last -> step-001000       the newest whole one

A checkpoint is written to a temporary folder beside its place, synced, and renamed. Every byte of it is under a hash:
checkpoint.json ends with the SHA-256 of what it says, and is read only if it is written exactly as `write` does.
A checkpoint knows nothing of the processes that trained it: what they hold in shards is put together when it is taken
(`Snapshot`) and cut again when it is read, so that any number of them, each with all or with a shard, goes on from it.
There is no generator state to keep: weights, order and dropout are functions of (seed, step). What a run does with its
folder (`last`, which ones are kept) is in phi1/run.py.
"""

import contextlib
import dataclasses
import errno
import json
import os
import pathlib
import re
import shutil
from collections.abc import Iterator
from typing import Any

import safetensors
import safetensors.torch
import torch

from phi1 import __version__
from phi1.config import ModelConfig
from phi1.distributed import sharded_like, whole
from phi1.errors import UserError
from phi1.files import json_text, sha256_file, sha256_json, write_json
from phi1.model import Phi1
from phi1.tokenizer import Tokenizer

CONFIG = "config.json"
MODEL = "model.safetensors"
OPTIMIZER = "optimizer.safetensors"
TOKENIZER = "tokenizer.json"
CHECKPOINT = "checkpoint.json"

# Fields of ModelConfig that may differ between a checkpoint and the recipe that starts from it.
_FREE_FIELDS = {"attention_dropout", "residual_dropout", "initializer_range"}


class Damaged(UserError):
    """A checkpoint of which a file is missing, or is not what was written."""


class Gone(UserError):
    """A checkpoint that was deleted while it was read: a training keeps its newest ones only."""


@dataclasses.dataclass(frozen=True)
class Snapshot:
    """What a checkpoint holds of a model, whole."""

    config: ModelConfig
    weights: dict[str, torch.Tensor]
    """Parameters by name."""
    optimizer: dict[str, torch.Tensor] | None = None
    """The optimizer's state, `<parameter>/<key>`."""


def snapshot(model: Phi1, optimizer: torch.optim.Optimizer, *, keep: bool = True) -> Snapshot | None:
    """Copies a model and its optimizer's state to host memory, from where they are written while training goes on.

    Where processes hold shards all of them must call this. keep: False for those that only hand theirs over, and get
    None.
    """

    def host(tensor: torch.Tensor) -> torch.Tensor:
        tensor = whole(tensor.detach())
        return tensor.to("cpu", copy=True) if keep else tensor.new_empty(0)

    # First the weights: under FSDP2 state_dict() has parameters that an evaluation left whole be shards again.
    weights = {name: host(value) for name, value in model.state_dict().items()}
    names: dict[torch.Tensor, str] = {parameter: name for name, parameter in model.named_parameters()}
    state = {
        f"{names[parameter]}/{key}": host(optimizer.state[parameter][key])
        for parameter in _parameters(optimizer)
        for key in sorted(optimizer.state.get(parameter, {}))
    }
    return Snapshot(model.config, weights, state) if keep else None


def write(folder: pathlib.Path | str, content: Snapshot, tokenizer: Tokenizer, facts: dict[str, Any]) -> pathlib.Path:
    """Writes a checkpoint: whole at `folder`, or not at all.

    facts: JSON-able, kept in checkpoint.json. UserError if `folder` exists, or the disk is full.
    """
    folder = pathlib.Path(folder)
    if folder.exists():
        raise UserError(f"{folder}: already exists; choose another folder, or delete it")
    with atomic_folder(folder) as temporary:
        write_json(temporary / CONFIG, dataclasses.asdict(content.config))
        save_tensors(temporary / MODEL, content.weights)
        tokenizer.save(temporary / TOKENIZER)
        if content.optimizer is not None:
            save_tensors(temporary / OPTIMIZER, content.optimizer)
        files = {path.name: sha256_file(path) for path in sorted(temporary.iterdir())}
        record = {"facts": facts, "code_version": __version__, "files": files}
        write_json(temporary / CHECKPOINT, record | {"sha256": sha256_json(record)})
    return folder


def write_model(folder: pathlib.Path | str, model: Phi1, tokenizer: Tokenizer, facts: dict[str, Any]) -> pathlib.Path:
    """Writes a checkpoint of a model as it is now, without an optimizer's state; as `write`."""
    return write(folder, Snapshot(model.config, model.state_dict()), tokenizer, facts)


def load_model(
    folder: pathlib.Path | str, *, device: str | torch.device = "cpu", dtype: torch.dtype | None = None
) -> tuple[Phi1, Tokenizer]:
    """The model, in evaluation mode, and the tokenizer of a checkpoint (or of a run folder's newest one).

    dtype: type to hold the parameters in; None: as they were written. UserError if the checkpoint is damaged. Of a run
    folder whose training deletes the checkpoint meanwhile, the then newest is read.
    """
    while True:
        found = resolve(folder)
        try:
            with _reading(found):
                verify(found)
                with torch.device("meta"):
                    model = Phi1(read_config(found))
                weights = safetensors.torch.load_file(found / MODEL, device=str(device))
                tokenizer = Tokenizer.load(found / TOKENIZER)
        except Gone:
            if found == pathlib.Path(folder).resolve():
                raise
            continue
        model.load_state_dict(weights, assign=True)
        return model.to(dtype=dtype).eval(), tokenizer


def load_parameters(folder: pathlib.Path, model: Phi1) -> None:
    """Copies a checkpoint's parameters into `model`, whatever type they were written in.

    UserError if the checkpoint's model has another shape. The caller checks the hashes (`verify`).
    """
    require_shape(folder, model.config)
    model.load_state_dict(safetensors.torch.load_file(folder / MODEL))


def read_optimizer(folder: pathlib.Path) -> dict[str, torch.Tensor]:
    """The optimizer's state in a training checkpoint, `<parameter>/<key>`, whole and on the CPU.

    UserError if it has none. The caller checks the hashes (`verify`).
    """
    if not (folder / OPTIMIZER).exists():
        raise UserError(f"{folder}: has no optimizer state, so training cannot go on from it; use it as --init-from")
    return safetensors.torch.load_file(folder / OPTIMIZER)


def load_optimizer(state: dict[str, torch.Tensor], model: Phi1, optimizer: torch.optim.Optimizer) -> None:
    """Puts what `read_optimizer` read into `optimizer`, which holds the parameters of `model`, or shards."""
    parameters = dict(model.named_parameters())
    by_name: dict[str, dict[str, torch.Tensor]] = {}
    for path, value in state.items():
        name, key = path.split("/")
        by_name.setdefault(name, {})[key] = sharded_like(value, parameters[name])
    names: dict[torch.Tensor, str] = {parameter: name for name, parameter in parameters.items()}
    found = [by_name.get(names[parameter]) for parameter in _parameters(optimizer)]
    numbered = {i: values for i, values in enumerate(found) if values is not None}
    optimizer.load_state_dict({"state": numbered, "param_groups": optimizer.state_dict()["param_groups"]})


def _parameters(optimizer: torch.optim.Optimizer) -> list[torch.Tensor]:
    return [parameter for group in optimizer.param_groups for parameter in group["params"]]


def resolve(folder: pathlib.Path | str) -> pathlib.Path:
    """The checkpoint folder meant by a checkpoint folder, a run folder (its newest) or its `last`."""
    folder = pathlib.Path(folder)
    if (folder / CHECKPOINT).exists():
        return folder.resolve()
    found = in_run(folder)
    if not found:
        reason = "no such folder" if not folder.is_dir() else f"no whole checkpoint there (no {CHECKPOINT})"
        raise UserError(f"{folder}: {reason}; name a folder that phi1 train or phi1 import wrote")
    return found[-1].resolve()


def in_run(run: pathlib.Path) -> list[pathlib.Path]:
    """The folders in a run folder that have the name of a checkpoint, by step; they need not be whole."""
    names = [path.name for path in run.iterdir()] if run.is_dir() else []
    steps = {int(name[5:]): name for name in names if re.fullmatch(r"step-([0-9]{6}|[1-9][0-9]{6,})", name)}
    return [run / steps[step] for step in sorted(steps) if (run / steps[step]).is_dir()]


def step_of(folder: pathlib.Path) -> int:
    """The step in the name of a run's checkpoint."""
    return int(folder.name.removeprefix("step-"))


def read_facts(folder: pathlib.Path) -> dict[str, Any]:
    """The facts of a checkpoint; its other files are not read. Damaged if they are not what was written."""
    return _read_record(folder)["facts"]


def verify(folder: pathlib.Path) -> dict[str, Any]:
    """The facts of a checkpoint, all its files checked against their SHA-256. Damaged names the file that is not
    whole.
    """
    with _reading(folder):
        record = _read_record(folder)
        for name, digest in record["files"].items():
            if not (folder / name).exists():
                raise Damaged(f"{folder / name}: missing{_way_out(folder)}")
            if sha256_file(folder / name) != digest:
                raise Damaged(f"{folder / name}: corrupt, its SHA-256 is not {CHECKPOINT}'s{_way_out(folder)}")
        return record["facts"]


def _read_record(folder: pathlib.Path) -> dict[str, Any]:
    path = folder / CHECKPOINT
    with _reading(folder):
        try:
            text = path.read_bytes().decode()
            record = json.loads(text)
            unsigned = {name: value for name, value in record.items() if name != "sha256"}
            if text != json_text(record) or record["sha256"] != sha256_json(unsigned):
                raise ValueError("its SHA-256 is not its own")
        except FileNotFoundError:
            raise Damaged(f"{folder}: unfinished, or not a checkpoint (no {CHECKPOINT}){_way_out(folder)}") from None
        except (ValueError, KeyError, AttributeError, RecursionError) as error:
            why = f"{type(error).__name__}: {error}"
            raise Damaged(f"{path}: corrupt, or not of this version of phi1 ({why}){_way_out(folder)}") from error
        return record


@contextlib.contextmanager
def _reading(folder: pathlib.Path) -> Iterator[None]:
    """Turns what goes wrong in the block into Gone if it is that the checkpoint is not there any more."""
    try:
        yield
    except (OSError, UserError, safetensors.SafetensorError) as error:
        if folder.is_dir() or isinstance(error, Gone):
            raise
        raise Gone(
            f"{folder}: deleted while it was read (its training keeps the newest only); name the run folder for its "
            "newest, or raise --keep-last"
        ) from error


def digest(folder: pathlib.Path) -> str:
    """What identifies a checkpoint: the SHA-256 of its checkpoint.json, which holds those of its files."""
    with _reading(folder):
        return sha256_file(folder / CHECKPOINT)


def read_config(folder: pathlib.Path) -> ModelConfig:
    """The model shape of a checkpoint."""
    path = folder / CONFIG
    try:
        return ModelConfig(**json.loads(path.read_text(encoding="utf-8")))
    except (ValueError, TypeError) as error:
        raise UserError(f"{path}: not a model shape of this version of phi1 ({error})") from error


def require_shape(folder: pathlib.Path, config: ModelConfig) -> None:
    """UserError unless the checkpoint's model has the shape `config` (dropout may differ)."""
    there, here = dataclasses.asdict(read_config(folder)), dataclasses.asdict(config)
    differing = [
        f"{name} = {there[name]} there, {here[name]} in the recipe"
        for name in here
        if name not in _FREE_FIELDS and there[name] != here[name]
    ]
    if differing:
        raise UserError(
            f"{folder}: a checkpoint of another model ({'; '.join(differing)}); "
            "make [model] the same, or choose another checkpoint or --run-folder"
        )


def _way_out(folder: pathlib.Path) -> str:
    siblings = in_run(folder.parent)
    older = siblings[: siblings.index(folder)] if folder in siblings else []
    return f"; the one before it is {older[-1]}" if older else "; restore it from a copy, or make it again"


def save_tensors(path: pathlib.Path, tensors: dict[str, torch.Tensor]) -> None:
    """Writes a safetensors file that transformers loads too (it asks for the format's name)."""
    contiguous = {name: tensor.detach().contiguous() for name, tensor in tensors.items()}
    safetensors.torch.save_file(contiguous, path, metadata={"format": "pt"})
    path.chmod(0o666 & ~_umask())  # safetensors writes for the owner alone


def _umask() -> int:
    os.umask(mask := os.umask(0o022))
    return mask


@contextlib.contextmanager
def atomic_folder(folder: pathlib.Path) -> Iterator[pathlib.Path]:
    """A temporary folder that is synced and takes the name `folder` when the block ends well."""
    temporary = folder.with_name(f"{folder.name}.tmp-{os.getpid()}")
    try:
        shutil.rmtree(temporary, ignore_errors=True)  # of a process that had the same number and was killed
        temporary.mkdir(parents=True)
        yield temporary
        for path in [*temporary.iterdir(), temporary]:
            _sync(path)
        temporary.rename(folder)
        _sync(folder.parent)
    except (OSError, safetensors.SafetensorError) as error:
        full = {errno.ENOSPC, errno.EDQUOT}
        # safetensors reports the system's error number in its text only.
        code = error.errno if isinstance(error, OSError) else int((re.findall(r"os error (\d+)", str(error)) or [0])[0])
        if code in full:
            raise UserError(
                f"no space left while writing the checkpoint {folder}: free space on that disk and run the same "
                "command again; earlier checkpoints are whole"
            ) from error
        if code:  # read-only by now, a limit on the size of files, a disk that fails, …
            raise UserError(
                f"the checkpoint {folder} cannot be written ({os.strerror(code)}): mend that and run the same command "
                f"again; earlier checkpoints are whole"
            ) from error
        raise
    finally:
        shutil.rmtree(temporary, ignore_errors=True)


def _sync(path: pathlib.Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
