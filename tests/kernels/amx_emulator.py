"""Builds tests/csrc/amx/emulator.cpp, which executes AMX's tile instructions on a CPU without them. A CPU that has them
executes them itself.
"""

import pathlib
import platform
import shutil
import subprocess

import pytest

SOURCES = pathlib.Path(__file__).resolve().parents[1] / "csrc" / "amx"


HAS_TILES = platform.machine() == "x86_64" and "amx_tile" in pathlib.Path("/proc/cpuinfo").read_text()


def _missing() -> str | None:
    if platform.machine() != "x86_64" or shutil.which("g++") is None:
        return "needs g++ on x86-64"
    flags = pathlib.Path("/proc/cpuinfo").read_text()
    if HAS_TILES:
        return "this CPU has AMX, nothing is left to emulate: tests/kernels run the instruction set amx_bf16 on it"
    return None if "avx512_bf16" in flags else "only tile instructions are emulated: needs a CPU with AVX-512 BF16"


MISSING = _missing()
"""Why nothing can be emulated here, or None."""
needs_emulator = pytest.mark.skipif(MISSING is not None, reason=str(MISSING))
needs_tiles = pytest.mark.skipif(MISSING is not None and not HAS_TILES, reason=str(MISSING))


def build(to: pathlib.Path, *flags: str, compiler: str = "g++") -> pathlib.Path:
    """The emulator as `to`: an object file or, with "-shared", a library to preload."""
    if "-shared" not in flags:
        flags = (*flags, "-c")
    options = ("-std=c++20", "-O3", "-mavx2", "-mfma", "-fPIC", *flags)
    subprocess.run([compiler, *options, SOURCES / "emulator.cpp", "-o", to], check=True)
    return to


def build_if_needed(to: pathlib.Path, *flags: str, compiler: str = "g++") -> list[str]:
    """What a program with tile instructions is linked with: the emulator, or on a CPU that has them nothing."""
    return [] if HAS_TILES else [str(build(to, *flags, compiler=compiler))]
