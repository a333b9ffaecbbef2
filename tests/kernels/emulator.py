"""Builds csrc/emulator and makes it the `cuda` backend for CPU tensors."""

import contextlib
import fcntl
import importlib.util
import pathlib
import shutil
import subprocess
import sys
from collections.abc import Iterator
from types import ModuleType

import attention_cases
import pytest
import torch

from kernels import cuda, machine, registry

ROOT = pathlib.Path(__file__).resolve().parents[2]
BUILD = ROOT / "build" / f"emulator-{sys.implementation.cache_tag}"
DEVICES = ("cpu",) if "cuda" in machine.cpu().missing else ("cpu", "cuda")
"""Where the kernels run in the tests: under the emulator, and on the GPU if there is one."""


def load(path: pathlib.Path) -> ModuleType:
    """The extension module _emulator from `path`; several builds can be loaded side by side."""
    # pybind11 makes one module a name: a package name of its own makes each file a module of its own.
    spec = importlib.util.spec_from_file_location(f"{path.parent.name}._emulator", path)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def build() -> pathlib.Path:
    """Builds what changed and returns the module's path. Fails, never skips, where there is a compiler."""
    if shutil.which("c++") is None:
        pytest.skip("no C++ compiler (c++): the emulator cannot be built")
    import pybind11

    BUILD.mkdir(parents=True, exist_ok=True)
    with (BUILD / "lock").open("w") as lock:  # pytest-xdist: one worker builds, the others wait
        fcntl.flock(lock, fcntl.LOCK_EX)
        configure = [
            "cmake",
            "-S",
            str(ROOT / "csrc" / "emulator"),
            "-B",
            str(BUILD),
            "-G",
            "Ninja",
            f"-DPython_EXECUTABLE={sys.executable}",
            f"-Dpybind11_DIR={pybind11.get_cmake_dir()}",
        ]
        for command in (configure, ["cmake", "--build", str(BUILD)]):
            done = subprocess.run(command, capture_output=True, text=True)
            assert done.returncode == 0, f"{' '.join(command)}\n{done.stdout}{done.stderr}"
    return next(BUILD.glob("_emulator*.so"))


@contextlib.contextmanager
def as_cuda_backend(module: ModuleType) -> Iterator[None]:
    """Within the block `backend="cuda"` runs `module` (a build of the emulator) on CPU tensors."""
    with registry.replacing("cuda"):
        cuda.register_kernels(module, devices=("cpu",), needs=lambda machine: None)
        yield


def check_attention(
    case: attention_cases.Case, dtype: torch.dtype, device: str = "cpu", version: str = "cuda", backward: bool = True
) -> None:
    """The rule of attention_cases, and more of lse: the rule lets it be as wrong as one in 16 bits.

    Products of 16-bit numbers are exact in float32, as their sums of 128 nearly are: what is left is float32's
    rounding. One key of a hundred too many or too few changes lse by 1e-2.
    """
    run = attention_cases.run_case if backward else attention_cases.run_forward
    results = run(case, dtype, version, device)
    attention_cases.check_results(results, case, dtype)
    truth = attention_cases.truth_and_bounds(case, dtype)[0]["lse"]
    seen = ~truth.isinf()
    error = (results["lse"].cpu().double() - truth)[seen].abs()
    bound = 1e-5 * (1 + truth[seen].abs())
    assert (error <= bound).all(), f"{case.name}, {dtype}: error of lse is {float((error / bound).max()):.3g} bounds"
