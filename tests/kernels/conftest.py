"""The emulator of the GPU, and the devices that tests of CUDA kernels run on."""

from collections.abc import Iterator
from types import ModuleType

import pytest
from emulator import DEVICES, as_cuda_backend, build, load


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


@pytest.fixture(params=DEVICES, ids=lambda device: {"cpu": "emulator", "cuda": "gpu"}[device])
def cuda_device(request: pytest.FixtureRequest) -> Iterator[str]:
    """The device of the tensors that `backend="cuda"` takes in this test: "cpu" (emulator), "cuda" (GPU)."""
    if request.param == "cpu":
        request.getfixturevalue("emulator")
    yield request.param
