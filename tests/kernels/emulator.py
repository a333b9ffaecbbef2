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

import pytest

from kernels import cuda, registry

ROOT = pathlib.Path(__file__).resolve().parents[2]
BUILD = ROOT / "build" / f"emulator-{sys.implementation.cache_tag}"
OPS = ("apply_rotary", "flash_attention")


def load(path: pathlib.Path) -> ModuleType:
    """The extension module _emulator from `path`; several builds can be loaded side by side."""
    spec = importlib.util.spec_from_file_location("_emulator", path)
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
            "cmake", "-S", str(ROOT / "csrc" / "emulator"), "-B", str(BUILD), "-G", "Ninja",
            f"-DPython_EXECUTABLE={sys.executable}", f"-Dpybind11_DIR={pybind11.get_cmake_dir()}",
        ]  # fmt: skip
        for command in (configure, ["cmake", "--build", str(BUILD)]):
            done = subprocess.run(command, capture_output=True, text=True)
            assert done.returncode == 0, f"{' '.join(command)}\n{done.stdout}{done.stderr}"
    return next(BUILD.glob("_emulator*.so"))


@contextlib.contextmanager
def as_cuda_backend(module: ModuleType) -> Iterator[None]:
    """Within the block `backend="cuda"` runs `module` (a build of the emulator) on CPU tensors."""
    before = {op: registry._IMPLEMENTATIONS[op].get("cuda") for op in OPS}
    cuda.register_kernels(module, devices=("cpu",))
    try:
        yield
    finally:
        for op, implementation in before.items():
            assert implementation is not None
            registry._IMPLEMENTATIONS[op]["cuda"] = implementation


@pytest.fixture(scope="session")
def emulator_module() -> ModuleType:
    return load(build())


@pytest.fixture
def emulator(emulator_module: ModuleType) -> Iterator[ModuleType]:
    """The emulator, standing in for the GPU: `backend="cuda"` takes CPU tensors."""
    emulator_module.set_seed(0)
    emulator_module.reset_counters()
    with as_cuda_backend(emulator_module):
        yield emulator_module
