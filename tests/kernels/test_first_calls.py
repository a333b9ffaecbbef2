"""First calls in processes of their own: on a CPU, whose versions they call just as well."""

import os
import time

import pytest
import torch

from kernels import first_calls, machine, tune_works
from kernels.tune_works import Shape

CPU = torch.device("cpu")
SHAPE = Shape(1, 32, 32, 1, 32, 64, 64)
WORKS = tune_works.works(machine.cpu(), CPU, SHAPE, [torch.float32])


def of_norm():
    """(its group of calls, that group's version)."""
    groups = first_calls.calls(machine.cpu(), WORKS)
    return next((group, version) for (op, version), group in groups.items() if op == "layer_norm")


def test_every_version_but_pytorchs_is_called_of_every_work():
    groups = first_calls.calls(machine.cpu(), WORKS)
    assert all(version != "torch" for _, version in groups)
    assert {call for group in groups.values() for call in group} == {
        (i, version)
        for i, work in enumerate(WORKS)
        for version in tune_works.candidates(machine.cpu(), work)
        if version != "torch"
    }
    for (op, version), group in groups.items():
        assert {WORKS[i].cell.op for i, _ in group} == {op} and {found for _, found in group} == {version}


def test_what_fails_and_what_ends_its_process_are_named_and_the_rest_goes_on(tmp_path, monkeypatch):
    group, version = of_norm()
    assert len(group) >= 3
    (tmp_path / "sitecustomize.py").write_text(f"""
import dataclasses, os, sys
if "kernels.first_calls" in sys.orig_argv:
    from kernels import norm, registry
    made = registry._IMPLEMENTATIONS["layer_norm"]["{version}"]
    def forward(x, *rest):
        if x.shape[0] == {WORKS[group[0][0]].make()[1][0].shape[0]}:
            raise RuntimeError("no such kernel\\nand a page of it")
        print("illegal memory access", file=sys.stderr, flush=True)
        os.abort()
    registry._IMPLEMENTATIONS["layer_norm"]["{version}"] = dataclasses.replace(made, forward=forward)
""")
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))
    failed = first_calls.run(SHAPE, CPU, [torch.float32], [group], 300)
    assert set(failed) == set(group)
    assert failed[group[0]] == "RuntimeError: no such kernel"
    aborted = {why for why in failed.values() if "RuntimeError" not in why}
    assert aborted == {"its process ended with status -6: illegal memory access"}


def test_what_works_does_not_fail_and_time_ends_the_processes():
    group, _ = of_norm()
    assert first_calls.run(SHAPE, CPU, [torch.float32], [group, group], 300) == {}
    start = time.monotonic()
    failed = first_calls.run(SHAPE, CPU, [torch.float32], [group], 0.3)
    assert failed == dict.fromkeys(group, "not called in the 0 s for compiling") and time.monotonic() - start < 60


def test_an_interruption_leaves_no_process(monkeypatch):
    group, _ = of_norm()
    started = []
    popen = first_calls.subprocess.Popen

    def remembered(*arguments, **options):
        started.append(popen(*arguments, **options))
        return started[-1]

    def interrupted(_):
        if started:
            raise KeyboardInterrupt

    monkeypatch.setattr(first_calls.subprocess, "Popen", remembered)
    monkeypatch.setattr(first_calls.time, "sleep", interrupted)
    with pytest.raises(KeyboardInterrupt):
        first_calls.run(SHAPE, CPU, [torch.float32], [group], 300)
    assert started and all(child.poll() is not None for child in started)
    assert not any(os.path.exists(f"/proc/{child.pid}") for child in started)
