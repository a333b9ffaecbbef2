"""Measures which kernels are fastest on this machine, on the shapes of a model, and keeps the table for this user.

    phi1 tune --model phi1-small
    phi1 tune --model recipes/pretrain-phi1.toml

At most a minute on a CPU and one and a half on a GPU. What is measured is what automatic choice then follows, until the
machine, its driver, torch, triton or phi1 change; `phi1 doctor` shows it. Ctrl-C keeps what was measured until then.
"""

import dataclasses
import math
import pathlib
from typing import TYPE_CHECKING, Any

from phi1.config import PRESETS, ModelConfig, TrainConfig
from phi1.errors import UserError
from phi1.recipe import load_recipe

if TYPE_CHECKING:  # torch and the kernels take seconds to import, which --help need not
    import torch

    from kernels.tune_works import Shape
    from phi1.distributed import World


@dataclasses.dataclass(frozen=True, kw_only=True)
class Config:
    """Options of `phi1 tune`."""

    model: str = "phi1-small"
    """Whose shapes to measure: phi1, phi1-small, phi1-tiny, or the path of a recipe."""
    shape: str | None = None
    """In its place an explicit one: batch x tokens x hidden x heads x head_dim x inner x columns."""
    device: str = "auto"
    """auto: a GPU where there is one, else the CPU. Or cpu, cuda, cuda:1."""
    seconds: float | None = None
    """At most so long; default 60 on a CPU, 90 on a GPU."""


def run(config: Config) -> pathlib.Path:
    """`phi1 tune`; returns the table's path. UserError if it cannot be kept."""
    import kernels.tune
    from phi1.distributed import World

    if config.seconds is not None and not 0 <= config.seconds < math.inf:
        raise UserError(f"--seconds {config.seconds}: must be a number, at least 0")
    device = World(config.device).device
    try:
        return kernels.tune.tune(_shape(config), device, seconds=config.seconds)
    except kernels.tune.TuneError as error:
        raise UserError(str(error)) from error


def shape_of(model: ModelConfig, batch: int, tokens: int) -> "Shape":
    """What `kernels.tune` measures for a model."""
    from kernels.tune_works import Shape

    return Shape(
        batch,
        tokens,
        model.hidden_size,
        model.num_heads,
        model.head_dim,
        model.intermediate_size,
        model.vocab_size,
        kv_heads=model.num_kv_heads,
        rotary_dim=model.rotary_dim,
    )


def _shape(config: Config) -> "Shape":
    from kernels.tune_works import Shape

    if config.shape is not None:
        try:
            return Shape.parse(config.shape)
        except ValueError as error:
            raise UserError(f"--{error}") from error
    if config.model in PRESETS:
        return shape_of(PRESETS[config.model], 8, 2048)
    if not pathlib.Path(config.model).is_file():
        raise UserError(f"--model {config.model}: must be one of {', '.join(PRESETS)}, or the path of a recipe")
    recipe = load_recipe(pathlib.Path(config.model))
    return shape_of(recipe.model, recipe.train.micro_batch, recipe.data.sequence_length)


def tune_first(config: TrainConfig, world: "World", dtype: "torch.dtype") -> None:
    """Before a training: measures a machine of whose kind there is no measurement, and says so."""
    import kernels.tune
    from kernels import registry

    machine = registry.machine_of(world.device)
    if not config.train.tune:
        return

    def tune() -> None:  # rank 0 decides: what others have measured may differ
        if registry.measured_here(machine):
            return
        world.say(f"nothing was measured on {machine.kind}: phi1 tune runs first (--no-tune leaves it out)")
        shape = shape_of(config.model, config.train.micro_batch, config.data.sequence_length)
        try:
            kernels.tune.tune(shape, world.device, (dtype,), say=world.say)
        except kernels.tune.TuneError as error:
            world.say(str(error))

    world.first(tune)
    registry.read_tables()


def choose_kernels(
    model: ModelConfig, world: "World", dtype: "torch.dtype", before: dict[str, Any] | None
) -> dict[str, Any]:
    """The machine's kind, the backend that is asked for, and the orders of `kernels.registry`: what a checkpoint keeps.

    before: what the run that is gone on with had. Its orders are kept, so that its numbers stay the same; what this
    machine would choose otherwise is said.
    """
    from kernels import registry

    machine = registry.machine_of(world.device)
    now = registry.orders(machine, dtype, model.head_dim)
    chosen: dict[str, Any] = {"kind": machine.kind, "forced": registry.forced_backend(None), "orders": now}
    before = before or chosen
    for name in ("kind", "forced"):
        if before[name] != chosen[name]:
            world.say(f"  changed since then: kernels, {name} = {before[name]} -> {chosen[name]}")
    for name, order in now.items():
        # Of another kind of machine some may not run here: this one's order stands behind what is kept.
        kept = tuple(version for version in before["orders"].get(name, ()) if version in order)
        if kept and kept[0] != order[0]:
            world.say(f"  kept: {name} on {kept[0]}; a new run would take {order[0]} on this machine")
        now[name] = (*kept, *(version for version in order if version not in kept))
    return chosen
