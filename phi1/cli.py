"""The console command `phi1`: names a module per sub-command and imports only the one asked for.

The commands and what their modules offer are in phi1/commands.py. This file is the roof of the house: it may name any
room, and no room imports it.
"""

import errno
import importlib
import os
import sys
from collections.abc import Sequence

from phi1.commands import COMMANDS
from phi1.errors import Interrupted, UserError


def _usage(prefix: str) -> str:
    rows = {name: line for name, (_, line) in COMMANDS.items() if name.startswith(prefix)}
    width = max(map(len, rows)) + 2
    lines = [f"usage: phi1 {prefix}COMMAND [options]      (phi1 {prefix}COMMAND --help lists them)", ""]
    return "\n".join(lines + [f"  phi1 {name:<{width}}{line}" for name, line in rows.items()])


def _kernels_error() -> tuple[type[Exception], ...]:
    """The error of a backend that was asked for and cannot serve; none before kernels is imported, which takes
    seconds.
    """
    registry = sys.modules.get("kernels.registry")
    return () if registry is None else (registry.BackendError,)


def _install(package: str) -> str:
    """The command that brings a package that is imported by this name."""
    import importlib.metadata
    import re

    wanted = {"sklearn": "scikit-learn"}.get(package, package).replace("_", "-")
    for requirement in importlib.metadata.requires("phi1") or ():
        name, _, extra = requirement.partition("; extra == ")
        if extra and re.split(r"[^A-Za-z0-9_.-]", name)[0].replace("_", "-") == wanted:
            return f"pip install -e '.[{extra.strip(chr(34) + chr(39))}]' in phi1's folder"
    return f"pip install {wanted}"


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs one sub-command; returns the exit status.

    0; 2 for a UserError, or a full disk; 130 for Ctrl-C; 75 for another signal that a training stopped for, to be run
    again; 141, as of a command that SIGPIPE ended, if whoever read the output (`| head`) has gone.
    """
    try:
        try:
            return _run(arguments)
        finally:
            sys.stdout.flush()  # here, where what goes wrong is understood, and not at the interpreter's exit
    except OSError as error:
        full = error.errno in (errno.ENOSPC, errno.EDQUOT)
        if not isinstance(error, BrokenPipeError) and not full:
            raise
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        if isinstance(error, BrokenPipeError):
            return 141
        print(
            f"phi1: error: {error.strerror}, of standard output or of a file that was being written: free space there "
            "and run the same command again",
            file=sys.stderr,
        )
        return 2


def _run(arguments: Sequence[str] | None) -> int:
    words = list(sys.argv[1:] if arguments is None else arguments)
    depth = 2 if words[:1] == ["data"] else 1
    name = " ".join(words[:depth])
    if name not in COMMANDS:
        if words == ["--version"]:
            from phi1 import __version__

            print(f"phi1 {__version__}")
            return 0
        prefix = "data " if words[:1] == ["data"] else ""
        asked_for_help = not words or words[depth - 1 :] in ([], ["-h"], ["--help"])
        print(_usage(prefix), file=sys.stdout if asked_for_help else sys.stderr)
        if not asked_for_help:
            print(f"\nphi1: error: no command {name!r}", file=sys.stderr)
        return 0 if asked_for_help else 2
    from phi1 import options  # tyro takes a while to import

    try:
        module = importlib.import_module(COMMANDS[name][0])
        if hasattr(module, "parse"):
            config = module.parse(words[depth:])
        else:
            config = options.parse(module.Config, f"phi1 {name}", words[depth:], module.__doc__)
        module.run(config)
    except (UserError, ValueError) as error:
        if not isinstance(error, (UserError, *_kernels_error())):
            raise
        print(f"phi1: error: {error}", file=sys.stderr)
        return 2
    except ModuleNotFoundError as error:
        package = (error.name or "").partition(".")[0]
        if package in ("", "phi1", "kernels", "data_tools"):
            raise
        print(f"phi1: error: the package {package} is not installed: {_install(package)}", file=sys.stderr)
        return 2
    except OSError as error:
        if isinstance(error, BrokenPipeError) or error.filename is None:
            raise
        # A folder where a file should be, a disk that is read-only or fails: what the system says, and of which file.
        print(f"phi1: error: {os.fsdecode(error.filename)}: {error.strerror}", file=sys.stderr)
        return 2
    except KeyboardInterrupt as error:
        print("\nphi1: interrupted; what was finished is kept, run the same command again to go on", file=sys.stderr)
        return error.status if isinstance(error, Interrupted) else 130
    return 0


if __name__ == "__main__":
    sys.exit(main())
