"""Builds tests/csrc/amx/emulator.cpp, which executes AMX's tile instructions on a CPU without them. A CPU that has them
executes the kernels' itself.
"""

import pathlib
import platform
import shutil
import subprocess

import pytest

SOURCES = pathlib.Path(__file__).resolve().parents[1] / "csrc" / "amx"


_FLAGS = pathlib.Path("/proc/cpuinfo").read_text() if platform.machine() == "x86_64" else ""
HAS_TILES = "amx_tile" in _FLAGS


def _missing(instructions: str) -> str | None:
    if shutil.which("g++") is None or instructions not in _FLAGS:
        return f"needs g++ and a CPU with {instructions}: the emulator executes tile instructions only"
    return None


needs_emulator = pytest.mark.skipif((missing := _missing("avx2")) is not None, reason=str(missing))
needs_tiles = pytest.mark.skipif((missing := _missing("avx512_bf16")) is not None, reason=str(missing))
"""What the kernels for tiles need beside the tiles."""
needs_no_tiles = pytest.mark.skipif(
    HAS_TILES, reason="needs a CPU without AMX: this one executes the kernels' LDTILECFG, tests/kernels run them on it"
)


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
