"""Builds a program of this folder against csrc/emulator."""

import pathlib
import shutil
import subprocess

CSRC = pathlib.Path(__file__).resolve().parents[3] / "csrc"
COMPILERS = [name for name in ("g++", "clang++") if shutil.which(name)]
EMULATOR = [CSRC / "emulator" / name for name in ("emulator.cpp", "hopper.cpp", "block.cpp")]


def build(compiler: str, source: str, folder: pathlib.Path, *arguments: str | pathlib.Path) -> pathlib.Path:
    """The program of `source`; `arguments`: more flags, then more sources."""
    path = folder / source.partition(".")[0]
    command = [
        compiler,
        "-std=c++20",
        "-O1",
        "-Wall",
        "-Wextra",
        "-Wno-unknown-pragmas",
        "-Werror",
        "-DPHI1_EMULATOR",
        f"-I{CSRC}",
        *EMULATOR,
        "-xc++",
        pathlib.Path(__file__).parent / source,
        *arguments,
        "-o",
        path,
    ]
    built = subprocess.run(command, capture_output=True, text=True)
    assert built.returncode == 0, built.stderr
    return path


def lines(program: pathlib.Path) -> dict[str, str]:
    """Name -> what happened, of each line that the program prints."""
    done = subprocess.run([program], capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stdout + done.stderr
    return dict(line.split(": ", 1) for line in done.stdout.splitlines())
