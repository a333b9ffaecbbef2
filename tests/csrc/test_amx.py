"""csrc/cpu's AMX kernels on any CPU: the emulator of the tile instructions, and attention's tests on it."""

import os
import pathlib
import re
import shutil
import subprocess
import sys

import amx_emulator
import pytest

from kernels import native

ROOT = pathlib.Path(__file__).resolve().parents[2]
clang = pytest.mark.skipif(shutil.which("clang++") is None, reason="no clang++ (Debian: apt-get install clang)")


@amx_emulator.needs_emulator
@pytest.mark.parametrize("optimization", ["-O0", "-O2"])
@pytest.mark.parametrize("compiler", ["g++", pytest.param("clang++", marks=clang)])
def test_emulator(compiler: str, optimization: str, tmp_path: pathlib.Path) -> None:
    """Each instruction against plain loops, in the machine code that the compilers emit; that faults are fatal."""
    program, assembly = tmp_path / "program", tmp_path / "program.s"
    flags = ("-std=c++20", optimization, "-mfma", "-mamx-tile", "-mamx-bf16")
    emulator = amx_emulator.build(tmp_path / "emulator.o", compiler=compiler)
    subprocess.run([compiler, *flags, "-S", amx_emulator.SOURCES / "emulator_test.cpp", "-o", assembly], check=True)
    # What a CPU with AMX does not trap on.
    trapping = re.sub(
        r"(?m)^\s+(ldtilecfg|sttilecfg|tilerelease)\b", r"\t.byte 0x0f, 0xb9, 0xc0\n\t\1", assembly.read_text()
    )
    assembly.write_text(trapping)
    subprocess.run([compiler, "-pthread", assembly, emulator, "-o", program], check=True)
    done = subprocess.run([program], capture_output=True, text=True)
    assert done.returncode == 0 and done.stdout == "ok\n", done.stdout + done.stderr


@pytest.fixture(scope="module")
def emulated(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    """The environment of a process in which kernels._native finds AMX."""
    if native.MISSING is not None:
        pytest.skip(native.MISSING)
    library = amx_emulator.build(tmp_path_factory.mktemp("amx") / "emulator.so", "-shared")
    return {**os.environ, "LD_PRELOAD": str(library)}


def _python(environment: dict[str, str], *arguments: str) -> str:
    command = [sys.executable, *arguments]
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


@amx_emulator.needs_tiles
@amx_emulator.needs_no_tiles
def test_kernels_on_amx(emulated: dict[str, str]) -> None:
    """What tests/kernels ask of every instruction set, in bf16: the others use no tiles."""
    options = ("-q", "-p", "no:cacheprovider", "-p", "no:faulthandler")  # faulthandler would take SIGILL
    chosen = ("-k", "amx_bf16 and not torch.float and not exp2 and not residual")
    files = ("tests/kernels/test_cpu_attention.py", "tests/kernels/test_linear.py")
    out = _python(emulated, "-m", "pytest", *options, *chosen, *files)
    assert int(out.rpartition(" passed")[0].split()[-1]) >= 40, out


COUNTED = """
import ctypes, sys, torch
from kernels import flash_attention
executed = ctypes.CDLL(None).amx_executed
executed.restype = ctypes.c_long
q, k, v = (torch.randn(2, length, 2, 64, dtype=torch.bfloat16, requires_grad=True) for length in (96, 128, 128))
out = flash_attention(q, k, v, causal=False, backend=f"cpu/{sys.argv[1]}")
print(executed(b"TDPBF16PS"))
torch.autograd.grad(out, (q, k, v), out)
print(executed(b"TDPBF16PS"))
"""


@amx_emulator.needs_tiles
@amx_emulator.needs_no_tiles
def test_every_product_is_made_in_tiles_and_only_where_asked_for(emulated: dict[str, str]) -> None:
    """A TDPBF16PS multiplies 16 x 16 x 32 numbers; the lengths fill whole tiles: two products forward, five
    backward.
    """
    product = 2 * 2 * 96 * 128 * 64 // (16 * 16 * 32)
    found = _python(emulated, "-c", COUNTED, "amx_bf16")
    assert [int(line) for line in found.split()] == [2 * product, 7 * product]
    assert _python(emulated, "-c", COUNTED, "avx512_bf16").split() == ["0", "0"]
