"""Prints what makes a shell complete `phi1`'s commands and options.

    source <(phi1 completion bash)                              # in ~/.bashrc
    phi1 completion zsh > "${fpath[1]}/_phi1"                   # then start a new shell
    phi1 completion fish > ~/.config/fish/completions/phi1.fish

The script holds all options as they are now; make it again after an update.
"""

import contextlib
import dataclasses
import importlib
from typing import Annotated, Any, Literal, Union

import tyro

from phi1.commands import COMMANDS
from phi1.config import TrainConfig


@dataclasses.dataclass(frozen=True, kw_only=True)
class Config:
    """Options of `phi1 completion`."""

    shell: tyro.conf.Positional[Literal["bash", "zsh", "fish"]]
    """Whose script to print."""


def run(config: Config) -> None:
    """`phi1 completion`: tyro's script for all commands as one parser of nested sub-commands."""
    with contextlib.suppress(SystemExit):  # how tyro ends after printing
        tyro.cli(
            _commands(""),
            prog="phi1",
            args=["--tyro-print-completion", config.shell],
            config=(tyro.conf.OmitArgPrefixes, tyro.conf.OmitSubcommandPrefixes),
        )
    if config.shell == "bash":  # files, where tyro knows no candidate: a recipe's path
        print("eval \"$(complete -p phi1 | sed 's/^complete /complete -o default /')\"")


def _commands(prefix: str) -> Any:
    """The union of the options of all commands that begin with `prefix`, named by their last word."""
    found: dict[str, Any] = {}
    for name, (module, _) in COMMANDS.items():
        word, _, more = name.removeprefix(prefix).partition(" ")
        if not name.startswith(prefix) or word in found:
            continue
        if more:  # `data ingest`: a command of commands
            options: Any = dataclasses.make_dataclass(word.capitalize(), [("command", _commands(f"{prefix}{word} "))])
        else:
            options = getattr(importlib.import_module(module), "Config", TrainConfig)  # train: the recipe's
        found[word] = Annotated[options, tyro.conf.subcommand(word)]
    return Union[tuple(found.values())]  # noqa: UP007
