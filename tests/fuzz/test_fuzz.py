"""Every op by its fuzzer on every backend that runs here: the same examples each time, two minutes in all on two
cores.
"""

import contextlib

import pytest
from cpu_isa import CPU_BACKENDS
from emulator import as_cuda_backend, build, load
from fuzzers import FUZZERS
from hypothesis import HealthCheck, Phase, given, settings

EXAMPLES = {
    "flash_attention": 30,
    "decode": 25,
    "apply_rotary": 30,
    "layer_norm": 30,
    "linear_cross_entropy": 25,
    "parallel_block": 15,
}
SLOW_EXAMPLES = {
    "flash_attention": 4,
    "decode": 4,
    "apply_rotary": 5,
    "layer_norm": 5,
    "linear_cross_entropy": 5,
    "parallel_block": 2,
}
"""Emulated or interpreted."""


@pytest.fixture(scope="module")
def emulated():
    return load(build())


@pytest.mark.parametrize("backend", [*CPU_BACKENDS, "cuda", "triton"])
@pytest.mark.parametrize("op", FUZZERS)
def test_fuzz(op: str, backend: str, request: pytest.FixtureRequest) -> None:
    calls, check = FUZZERS[op]
    examples = (EXAMPLES if backend.startswith("cpu") else SLOW_EXAMPLES)[op]

    @settings(
        derandomize=True,
        max_examples=examples,
        deadline=None,
        database=None,
        phases=(Phase.generate, Phase.shrink),
        suppress_health_check=list(HealthCheck),
    )
    @given(call=calls(backend))
    def run(call: object) -> None:
        check(backend, call)

    with contextlib.ExitStack() as stack:
        if backend == "cuda":
            stack.enter_context(as_cuda_backend(request.getfixturevalue("emulated")))
        run()
