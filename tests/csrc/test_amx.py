"""csrc/cpu's AMX kernels, on any CPU: tests/csrc/amx/emulator.cpp executes their tile instructions."""

import pathlib
import platform
import shutil
import subprocess

import pytest

ROOT = pathlib.Path(__file__).resolve().parents[2]
AMX = ROOT / "tests" / "csrc" / "amx"


def _why_not() -> str | None:
    if platform.machine() != "x86_64" or shutil.which("g++") is None:
        return "needs g++ on x86-64"
    flags = pathlib.Path("/proc/cpuinfo").read_text()
    if "amx_tile" in flags:
        return "this CPU has AMX, nothing is left to emulate: tests/kernels run the instruction set amx_bf16 on it"
    return None if "avx512_bf16" in flags else "emulated are the tile instructions only: needs a CPU with AVX-512 BF16"


pytestmark = pytest.mark.skipif(_why_not() is not None, reason=str(_why_not()))
COMPILERS = [
    "g++",
    pytest.param("clang++", marks=pytest.mark.skipif(shutil.which("clang++") is None, reason="no clang++ (Debian: apt-get install clang)")),
]  # fmt: skip


def _emulator(folder: pathlib.Path, *flags: str, compiler: str = "g++") -> pathlib.Path:
    """The emulator as an object file."""
    to = folder / "emulator.o"
    command = [compiler, "-std=c++20", "-O3", "-mavx2", "-mfma", "-fPIC", *flags, "-c", AMX / "emulator.cpp", "-o", to]
    subprocess.run(command, check=True)
    return to


@pytest.mark.parametrize("optimization", ["-O0", "-O2"])
@pytest.mark.parametrize("compiler", COMPILERS)
def test_emulator(compiler: str, optimization: str, tmp_path: pathlib.Path) -> None:
    """Each instruction against plain loops, in the machine code that the compilers emit; that faults are fatal."""
    program = tmp_path / "program"
    flags = ("-std=c++20", optimization, "-mfma", "-mamx-tile", "-mamx-bf16", "-pthread")
    emulator = _emulator(tmp_path, compiler=compiler)
    subprocess.run([compiler, *flags, AMX / "emulator_test.cpp", emulator, "-o", program], check=True)
    done = subprocess.run([program], capture_output=True, text=True)
    assert done.returncode == 0 and done.stdout == "ok\n", done.stdout + done.stderr
