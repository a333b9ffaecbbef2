"""A run: its folder claimed, what it goes on from found, and its processes agreed, before anything is trained.

    runs/<name>/
      .lock                   held by the training that runs there
      metrics.jsonl           a line a step (phi1/metrics.py)
      step-001000/ …          checkpoints (phi1/checkpoint.py)
      last -> step-001000     the newest whole one
      step-002000.damaged/    one that was found damaged and set aside

A run that finds a checkpoint in its folder goes on from the newest that is whole; a damaged one is set aside under a
name that says so, never deleted, and said. Rank 0 alone writes, deletes and hashes; it tells the others what to load.
"""

import contextlib
import dataclasses
import errno
import json
import os
import pathlib
import re
import shutil
from collections.abc import Callable, Iterator
from typing import IO, Any

import torch

import kernels
from phi1 import __version__, checkpoint
from phi1.batches import Batches
from phi1.checkpoint import Damaged, in_run, step_of
from phi1.config import TrainConfig
from phi1.distributed import World, native_precision
from phi1.errors import UserError
from phi1.files import lock_folder, set_aside
from phi1.tokenizer import Tokenizer

LAST = "last"

# A run that goes on with another value of one of these would not be the same run.
_FIXED = (
    "data.sequence_length",
    "data.document_masking",
    "data.loss_mask",
    "data.weights",
    "train.sequences_per_step",
    "train.seed",
    "optimizer.algorithm",
)
# Where a process finds things is its own affair; what it finds there is compared by hash.
_PLACES = ("data.tokens", "data.validation_tokens", "train.run_folder", "train.device")
# These say where and how, and change nothing that is worth a line when a run goes on with others.
_FREE = (*_PLACES, "train.log_every", "train.tune", "train.tensorboard", "train.tracker", "train.profile")

# An option that the version of a checkpoint did not have yet was at what is now its default.
_DEFAULTS = {
    f"{table.name}.{field.name}": field.default
    for table in dataclasses.fields(TrainConfig)
    for field in dataclasses.fields(table.type)  # type: ignore[arg-type]
    if field.default is not dataclasses.MISSING
}


@dataclasses.dataclass(frozen=True)
class Run:
    """A run that is open: what every process has agreed on."""

    config: TrainConfig
    world: World
    data: Batches
    """What is trained and evaluated on."""
    precision: str
    """Of the computation: bf16, fp16 or fp32."""
    source: pathlib.Path | None
    """The checkpoint whose weights to start from; None: random ones."""
    resumed: bool
    """Whether `source` is this run's own, so that it goes on from there."""
    facts: dict[str, Any]
    """The facts of `source` where the run goes on; else what it started from."""

    @property
    def folder(self) -> pathlib.Path:
        """The run folder."""
        return self.config.train.run_folder

    def require_space(self, size: int) -> None:
        """UserError unless the disk has room for the checkpoints to come, of `size` bytes each; says what they will
        take.

        A checkpoint is written before an older one is deleted: room is needed for one more than `keep_last`.
        """
        settings, present = self.config.train, len(in_run(self.folder))
        step = self.facts["step"] if self.resumed else 0
        to_come = -(-settings.steps // settings.checkpoint_every) - step // settings.checkpoint_every
        needed = settings.keep_last + 1 - min(present, settings.keep_last)
        if not settings.checkpoint_minutes:
            needed = min(needed, to_come)
        kept = settings.steps // settings.keep_every - step // settings.keep_every if settings.keep_every else 0
        free = shutil.disk_usage(self.folder).free
        facts = (
            f"a checkpoint takes {_gigabytes(size)}, and room for {needed} more is needed (--keep-last "
            f"{settings.keep_last}, and one while it is written)"
        )
        if needed * size > free:
            raise UserError(
                f"{self.folder}: {facts}, but {_gigabytes(free)} are free; free space there, lower --keep-last, or "
                f"choose another --run-folder"
            )
        later = f"; --keep-every {settings.keep_every} keeps {kept} more in time" if kept else ""
        self.world.say(f"{facts}{later}; {_gigabytes(free)} are free")

    def save(self, step: int, write: Callable[[pathlib.Path], object]) -> None:
        """Has `write` make the checkpoint folder of `step`, points `last` at it, and deletes those not to be kept."""
        folder = self.folder / f"step-{step:06d}"
        if os.path.lexists(folder):  # not there when the run was opened
            self.world.say(f"{folder} is in the way of a checkpoint: set aside as {set_aside(folder)}")
        write(folder)
        settings = self.config.train
        publish(folder, keep_last=settings.keep_last, keep_every=settings.keep_every, say=self.world.say)


@contextlib.contextmanager
def opened(config: TrainConfig, world: World) -> Iterator[Run]:
    """Opens a run, for as long as the block lasts. All processes call it.

    UserError, the same line everywhere, if another training runs in the folder, data or checkpoints cannot be used, or
    the processes would not train the same.
    """
    with _claimed(config.train.run_folder, world):
        data = world.each(lambda: Batches(config, world))
        data.verify()
        setting = config.train.precision
        precision = native_precision(world.device) if setting == "auto" else setting
        source, facts, resumed = _source(config, world, data)
        facts_of_it: dict[str, object] = {"phi1": __version__, "precision": precision, "checkpoint": _identity(source)}
        for name, value in _flat(plain(config)).items():
            if name not in (*_PLACES, "train.init_from"):
                facts_of_it[name] = value
        for name, dataset in data.sets.items():
            facts_of_it[f"data.{name}"] = f"a set with hash {dataset.hash[:16]}"
        world.agree(facts_of_it)
        yield Run(config, world, data, precision, source, resumed, facts)


@contextlib.contextmanager
def mendable(config: TrainConfig, world: World) -> Iterator[None]:
    """Within the block, what the system, torch or a backend says and the user can mend becomes a UserError."""
    settings = config.train
    try:
        yield
    except OSError as error:
        if error.errno not in (errno.ENOSPC, errno.EDQUOT):
            inside = isinstance(error.filename, str) and settings.run_folder in pathlib.Path(error.filename).parents
            if not inside:
                raise
            raise UserError(f"{error.filename}: {error.strerror}; mend that and run the same command again") from error
        raise UserError(
            f"no space left in {settings.run_folder}: free space on that disk and run the same command again; "
            "the checkpoints there are whole"
        ) from error
    except kernels.BackendError as error:  # PHI1_KERNELS names one that cannot serve this model
        raise UserError(str(error)) from error
    except (MemoryError, RuntimeError) as error:
        # On a CPU torch has no class for it.
        out = isinstance(error, (MemoryError, torch.OutOfMemoryError)) or "DefaultCPUAllocator" in str(error)
        if not out:
            raise
        raise UserError(
            f"{world.device} is out of memory at --micro-batch {settings.micro_batch}: lower it "
            f"(the step stays {settings.sequences_per_step} sequences)"
        ) from error


def _source(config: TrainConfig, world: World, data: Batches) -> tuple[pathlib.Path | None, dict[str, Any], bool]:
    """What the run starts from, as rank 0 finds it: a checkpoint or None, its facts, and whether the run goes on there.

    Each process reads it from its own run folder, which on several machines must be the same, or a copy.
    """
    run = config.train.run_folder
    name, facts = world.first(lambda: _newest_whole(run, world.say) or (None, {}))
    if name is not None:
        world.first(lambda: _require_same_run(run / name, facts, config, data.training.hash, world.say))
        return run / name, facts, True
    if config.train.init_from is None:
        return None, {}, False
    origin = config.train.init_from

    def find() -> tuple[pathlib.Path, dict[str, Any]]:
        folder = checkpoint.resolve(origin)
        facts = checkpoint.verify(folder)
        checkpoint.require_shape(folder, config.model)
        if not Tokenizer.load(folder).same_ids(data.tokenizer):
            raise UserError(
                f"{folder}: has another tokenizer than {data.origin.folder}; tokenize with --tokenizer {folder}"
            )
        world.say(f"starting from {folder}")
        return folder, {"folder": str(folder), "step": facts.get("step"), "hash": checkpoint.digest(folder)}

    found, start = world.first(find)
    # Of a run folder, the same checkpoint of it on each machine.
    own = origin / found.name
    return own if own.is_dir() else origin, {"init_from": start}, False


def _identity(source: pathlib.Path | None) -> str:
    """A checkpoint as the processes compare it: "none" where this one does not see it."""
    if source is None:
        return "none"
    if not (source / checkpoint.CHECKPOINT).exists():
        return f"none at {source.absolute()}"
    return f"{source.name} ({checkpoint.digest(source)[:16]})"


def _newest_whole(run: pathlib.Path, say: Callable[[str], None]) -> tuple[str, dict[str, Any]] | None:
    """Name and facts of the newest checkpoint in a run folder that is whole; None if there is no checkpoint.

    Newer ones are damaged: they are set aside, and each is said. UserError, and nothing is moved, if none is whole.
    """
    damaged: list[tuple[pathlib.Path, Damaged]] = []
    for folder in reversed(in_run(run)):
        try:
            facts = checkpoint.verify(folder)
        except Damaged as error:
            damaged.append((folder, error))
            continue
        for bad, why in damaged:
            say(f"{why}; set aside as {set_aside(bad)}")
        if damaged:
            _point_last(folder)
        return folder.name, facts
    if damaged:
        raise UserError(
            f"{damaged[0][1]}; none of the {len(damaged)} checkpoints in {run} is whole: restore one from a copy, or "
            "start anew in another --run-folder"
        )
    return None


def _require_same_run(
    folder: pathlib.Path, facts: dict[str, Any], config: TrainConfig, data_hash: str, say: Callable[[str], None]
) -> None:
    """UserError unless the run that wrote a checkpoint can go on as `config` says; says what changed."""
    run = config.train.run_folder
    checkpoint.require_shape(folder, config.model)
    if "recipe" not in facts:
        raise UserError(
            f"{folder}: written by no training (phi1 import?), so none can go on from it; use it as --init-from, with "
            "another --run-folder"
        )
    there, here = _DEFAULTS | _flat(facts["recipe"]), _flat(plain(config))
    changed = [name for name in here if there[name] != here[name] and name not in _FREE]
    fixed = [f"{name} = {there[name]} there, {here[name]} here" for name in changed if name in _FIXED]
    if facts["data_hash"] != data_hash:
        fixed.append("other token shards")
    if fixed:
        raise UserError(
            f"{run}: holds a run made otherwise ({'; '.join(fixed)}); choose another --run-folder, or delete this one"
        )
    if facts["step"] > config.train.steps:
        raise UserError(f"{folder}: past --steps {config.train.steps}; raise it, or choose another --run-folder")
    say(f"going on from {folder}")
    for name in changed:
        say(f"  changed since then: {name} = {there[name]} -> {here[name]}")


def publish(folder: pathlib.Path, *, keep_last: int, keep_every: int, say: Callable[[str], None] = print) -> None:
    """Points the run's `last` at `folder`, then deletes older checkpoints.

    Kept are the newest `keep_last` (at least one) and the multiples of `keep_every` (0: none); and one that cannot be
    deleted, which is said.
    """
    _point_last(folder)
    for older in in_run(folder.parent)[: -max(keep_last, 1)]:
        if older != folder and not (keep_every and step_of(older) % keep_every == 0):
            _delete(older, say)


def _point_last(folder: pathlib.Path) -> None:
    last = folder.with_name(LAST)
    if last.is_dir() and not last.is_symlink():  # a copy of the run that followed the link
        set_aside(last)
    link = folder.with_name(f"{LAST}.tmp-{os.getpid()}")
    link.unlink(missing_ok=True)
    link.symlink_to(folder.name)
    os.replace(link, last)


def _delete(path: pathlib.Path, say: Callable[[str], None]) -> None:
    """Deletes a checkpoint, or what is left of one. One that cannot be (a mount, a file of someone else's) is said and
    stays: training does not end for it.
    """
    try:
        if ".tmp-" not in path.name:  # renamed first, so that a half-deleted checkpoint is never taken for one
            path = path.rename(path.with_name(f"{path.name}.tmp-delete"))
        if path.is_dir() and not path.is_symlink():
            shutil.rmtree(path)
        else:
            path.unlink()
    except OSError as error:
        say(f"{path}: cannot be deleted ({error.strerror or error}); it stays: delete it by hand")


def remove_leftovers(run: pathlib.Path, say: Callable[[str], None] = print) -> None:
    """Deletes what an interrupted write or deletion left in a run folder (no other training may run there)."""
    for path in run.iterdir():
        if re.fullmatch(r"(step-[0-9]+|last|metrics\.jsonl)\.tmp-([0-9]+|delete)", path.name):
            _delete(path, say)


@contextlib.contextmanager
def _claimed(run_folder: pathlib.Path, world: World) -> Iterator[None]:
    """Keeps other trainings out of a run folder, and removes what an interrupted one left half-written there."""
    lock: list[IO[str]] = []

    def claim() -> None:
        if (run_folder / checkpoint.CHECKPOINT).exists():  # a run in it would go when that checkpoint is deleted
            raise UserError(
                f"{run_folder}: is a checkpoint, no run folder; name the run folder that it is in to go on there, or "
                "another, with this as --init-from"
            )
        lock.append(lock_folder(run_folder, "training", "--run-folder"))
        remove_leftovers(run_folder, world.say)

    try:
        world.first(claim)
        yield
    finally:
        for file in lock:
            file.close()


def plain(config: TrainConfig) -> dict[str, Any]:
    """The configuration as JSON-able values."""
    return json.loads(json.dumps(dataclasses.asdict(config), default=str))


def _flat(tables: dict[str, dict[str, Any]]) -> dict[str, Any]:
    return {f"{table}.{name}": value for table, values in tables.items() for name, value in values.items()}


def _gigabytes(size: int) -> str:
    return f"{size / 1e9:,.1f} GB" if size >= 1e8 else f"{size / 1e6:,.1f} MB"
