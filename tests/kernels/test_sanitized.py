"""The module kernels._native under AddressSanitizer, on arguments that are not contiguous: nothing freed is read."""

import os
import pathlib
import shutil
import subprocess
import sys

import pytest

ROOT = pathlib.Path(__file__).resolve().parents[2]
SOURCES = ("bindings.cpp", "bindings_cpu.cpp", "cpu/amx.cpp", "cpu/dispatch.cpp", "cpu/kernels.cpp")
LOAD = """
import importlib.util, sys
spec = importlib.util.spec_from_file_location("kernels._native", sys.argv[1])
module = sys.modules["kernels._native"] = importlib.util.module_from_spec(spec)
spec.loader.exec_module(module)
sys.path[:0] = sys.argv[2:]
import kernels.native
assert kernels.native._native is module
"""
EVERY_LAYOUT = """
from calls import CALLS
from test_strides import DTYPE, layouts
count = 0
for call in CALLS:
    for name, x in call.tensors(DTYPE).items():
        for _, view in layouts(name, x):
            call.outputs_and_grads("cpu", {**call.tensors(DTYPE), name: view})
            count += 1
print("calls", count)
"""
FREED = """
import ctypes, torch
libc = ctypes.CDLL(None)
libc.malloc.restype, libc.free.argtypes = ctypes.c_void_p, (ctypes.c_void_p,)
memory = libc.malloc(256)
x = torch.frombuffer((ctypes.c_float * 64).from_address(memory), dtype=torch.float32)
libc.free(memory)
module.isas()[-1].exp2(x, torch.empty(64), 64, 0)
"""


@pytest.fixture(scope="module")
def sanitized(tmp_path_factory: pytest.TempPathFactory) -> pathlib.Path:
    if shutil.which("g++") is None:
        pytest.skip("no g++ (Debian: apt-get install g++)")
    module = tmp_path_factory.mktemp("sanitized") / "_native.so"
    include = subprocess.run(
        [sys.executable, "-m", "pybind11", "--includes"], capture_output=True, text=True, check=True
    )
    flags = ("-std=c++20", "-O0", "-fPIC", "-shared", "-fopenmp", "-w", "-fvisibility=hidden", "-fsanitize=address")
    sources = [ROOT / "csrc" / source for source in SOURCES]
    command = [
        "g++",
        *flags,
        *include.stdout.split(),
        f"-I{ROOT / 'csrc'}",
        "-DPHI1_ISA=portable",
        *sources,
        "-o",
        module,
    ]
    subprocess.run(command, check=True)
    return module


def _run(module: pathlib.Path, script: str) -> subprocess.CompletedProcess[str]:
    found = [
        subprocess.run(["g++", f"-print-file-name={lib}"], capture_output=True, text=True).stdout.strip()
        for lib in ("libasan.so", "libstdc++.so")
    ]
    # libstdc++ too: the sanitizer looks for __cxa_throw when it starts, and python has none.
    environment = {**os.environ, "LD_PRELOAD": " ".join(found), "ASAN_OPTIONS": "detect_leaks=0"}
    command = [sys.executable, "-c", LOAD + script, module, ROOT, ROOT / "tests" / "kernels"]
    return subprocess.run(command, capture_output=True, text=True, env=environment, cwd=ROOT)


def test_every_layout_of_every_argument(sanitized: pathlib.Path) -> None:
    done = _run(sanitized, EVERY_LAYOUT)
    assert done.returncode == 0 and int(done.stdout.rpartition("calls ")[2]) > 250, done.stdout + done.stderr[-3000:]


def test_the_sanitizer_sees_what_is_freed(sanitized: pathlib.Path) -> None:
    done = _run(sanitized, FREED)
    assert done.returncode != 0 and "heap-use-after-free" in done.stderr, done.stdout + done.stderr[-3000:]
