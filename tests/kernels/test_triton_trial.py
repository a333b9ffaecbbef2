"""How Triton's candidates are timed."""

import math

import pytest
import triton

from kernels.triton import trial


@pytest.mark.parametrize(
    "error",
    [RuntimeError("PassManager::run failed\nand a page of it"), ValueError("Triton Error [CUDA]: launch"), KeyError()],
)
def test_a_candidate_that_fails_counts_as_slow_and_is_named(error, monkeypatch, caplog):
    config = triton.Config({"BLOCK_M": 64}, num_warps=8)

    def kernel_call():
        raise error if config else None

    def benchmarker(call, quantiles):
        call()

    monkeypatch.setattr(
        triton.runtime.driver, "_active", type("Driver", (), {"get_benchmarker": lambda self: benchmarker})()
    )
    assert trial.bench(kernel_call, quantiles=(0.5, 0.2, 0.8)) == [math.inf] * 3
    (record,) = caplog.records
    assert "BLOCK_M: 64" in record.getMessage() and "num_warps: 8" in record.getMessage()
    assert type(error).__name__ in record.getMessage() and "\n" not in record.getMessage()


def test_the_tuned_kernels_are_timed_so():
    from kernels.triton import attention, block

    kernels = [attention._forward, attention._dq, attention._dkv, block._project_in_kernel, block._project_out_kernel]
    assert all(kernel._do_bench is trial.bench for kernel in kernels)
