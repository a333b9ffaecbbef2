"""Recipes: TOML files that map onto `TrainConfig`, and the command line's changes to them.

    phi1 train RECIPE [--option value]        RECIPE comes first; --steps 100 overrides [train] steps
    torchrun --nproc-per-node 8 --shutdown-timeout 300 -m phi1 train RECIPE [--option value]

A recipe has the tables [model], [data], [train] and [optimizer]; keys are the dataclasses' field names
(`phi1 train --help` lists them), and [model] may start from a `preset`. Relative paths are relative to
the folder that the command is run in.
"""

import dataclasses
import difflib
import itertools
import pathlib
import types
import typing
from collections.abc import Sequence
from typing import Any

from phi1.config import PRESETS, ModelConfig, TrainConfig
from phi1.errors import UserError
from phi1.files import read_toml


def load_recipe(path: pathlib.Path) -> TrainConfig:
    """Reads a recipe. UserError names the file, the key and what would be right."""
    if not path.is_file():
        raise UserError(f"{path}: no such recipe; {_recipes()}")
    try:
        tables = read_toml(path)
    except ValueError as error:
        raise UserError(f"{path}: not valid TOML: {error}") from error

    fields = {field.name: field.type for field in dataclasses.fields(TrainConfig)}
    for name, table in tables.items():
        if name not in fields:
            raise UserError(f"{path}: unknown table [{name}]{_closest(name, fields)}")
        if not isinstance(table, dict):
            raise UserError(f"{path}: {name} = {table!r}: must be a table, [{name}]")
    model = dict(tables.get("model", {}))
    preset = model.pop("preset", None)
    if preset is not None and (not isinstance(preset, str) or preset not in PRESETS):
        raise UserError(f"{path}: model.preset = {preset!r}: must be one of {', '.join(PRESETS)}")
    base = dataclasses.asdict(PRESETS[preset]) if preset else {}
    try:
        return TrainConfig(
            model=_build(path, "model", ModelConfig, base | model, extra=("preset",)),
            **{name: _build(path, name, fields[name], tables.get(name, {})) for name in fields if name != "model"},
        )
    except UserError as error:  # from the dataclasses' own checks, which do not know the file
        raise error if str(error).startswith(str(path)) else UserError(f"{path}: {error}") from error


def parse(arguments: Sequence[str]) -> TrainConfig:
    """The configuration that a command line asks for: RECIPE, then options that change it.

    Exits like any command line parser on --help and on an unknown option.
    """
    import tyro

    from phi1 import options

    recipe = arguments[0] if arguments and not arguments[0].startswith("-") else None
    default: dict[str, Any] = {}  # without one, --help shows the dataclasses' own
    if recipe is not None:
        default["default"] = load_recipe(pathlib.Path(recipe))
    elif not {"-h", "--help"} & set(arguments):
        raise UserError(f"RECIPE is missing: phi1 train RECIPE [--option value]; {_recipes()}")
    _require_names_once(arguments)
    return options.parse(
        TrainConfig,
        "phi1 train RECIPE",
        arguments[recipe is not None :],
        __doc__,
        config=(tyro.conf.OmitArgPrefixes,),
        **default,
    )


def _require_names_once(arguments: Sequence[str]) -> None:
    """UserError if an option of names and values has a name twice: of two, tyro would take the last without a word."""
    for index, word in enumerate(arguments):
        if word.replace("_", "-") in ("--tokens", "--weights", "--validation-tokens"):
            values = itertools.takewhile(lambda value: not value.startswith("--"), arguments[index + 1 :])
            names = list(values)[::2]
            for name in names:
                if names.count(name) > 1:
                    raise UserError(f"{word} names {name!r} twice; give each set a name of its own")


def run(config: TrainConfig) -> None:
    """`phi1 train`."""
    from phi1.train import train

    train(config)


def _recipes() -> str:
    """Says which recipes there are."""
    for folder in (pathlib.Path("recipes"), pathlib.Path(__file__).parents[1] / "recipes"):
        if found := sorted(path for path in folder.glob("*.toml") if "[train]" in path.read_text(encoding="utf-8")):
            return f"there are {', '.join(map(str, found))}"
    return "the recipes that come with phi1 are in recipes/ of its repository"


def _build(path: pathlib.Path, table: str, kind: Any, values: dict[str, Any], extra: Sequence[str] = ()) -> Any:
    """The dataclass `kind` from a TOML table, every key and type checked."""
    fields = {field.name: field for field in dataclasses.fields(kind)}
    for key in values:
        if key not in fields:
            raise UserError(f"{path}: unknown key {key!r} in [{table}]{_closest(key, [*fields, *extra])}")
    for name, field in fields.items():
        if name not in values and field.default is dataclasses.MISSING:
            raise UserError(f"{path}: [{table}] needs {name!r}")
    return kind(**{key: _typed(path, f"{table}.{key}", value, fields[key].type) for key, value in values.items()})


def _typed(path: pathlib.Path, key: str, value: Any, kind: Any) -> Any:
    # A value, or a table of them, or None, which TOML does not have. A union with Literal in it is typing's.
    if typing.get_origin(kind) in (typing.Union, types.UnionType):
        kinds = typing.get_args(kind)
        kind = next((k for k in kinds if typing.get_origin(k) is dict and isinstance(value, dict)), kinds[0])
    if typing.get_origin(kind) is dict:
        if not isinstance(value, dict):
            raise UserError(f"{path}: {key} = {value!r}: must be a table, name = value for each set")
        return {name: _typed(path, f"{key}.{name}", entry, typing.get_args(kind)[1]) for name, entry in value.items()}
    if typing.get_origin(kind) is typing.Literal:
        if value in typing.get_args(kind):
            return value
        raise UserError(f"{path}: {key} = {value!r}: must be one of {', '.join(map(repr, typing.get_args(kind)))}")
    if kind is pathlib.Path and isinstance(value, str):
        return pathlib.Path(value)
    if kind is float and type(value) is int:
        return float(value)
    if type(value) is not kind:
        names = {int: "an integer", float: "a number", bool: "true or false", str: "a string", pathlib.Path: "a path"}
        raise UserError(f"{path}: {key} = {value!r}: must be {names[kind]}")
    return value


def _closest(name: str, valid: Any) -> str:
    match = difflib.get_close_matches(name, list(valid), n=1, cutoff=0.0)
    return f"; did you mean {match[0]!r}?" if match else ""
