"""The page of `kernels.backends()`."""

import os
import subprocess
import sys

import torch
from test_registry import BEST, H100, HERE

import kernels
from kernels import registry, summary
from kernels.measured import Cell, Row


def lines_of(page: str, op: str) -> list[str]:
    return [line for line in page.splitlines() if line.startswith(op)]


def test_the_page_says_what_each_op_takes_and_why(monkeypatch):
    cell = Cell("layer_norm", HERE.kind, torch.float32, None, "short", "training")
    monkeypatch.setattr(registry, "_rows", {cell: Row({"reference": 1.0, "torch": 0.5}, ("norm.json 2026-01-01",))})
    page = kernels.backends()
    assert page.splitlines()[0].startswith(f"CPU      {HERE.name} ({HERE.kind})")
    rows = [line.split(maxsplit=5) for line in lines_of(page, "layer_norm")]
    found = [row[2:] for row in rows if row[1] == "float32"]
    assert found == [
        ["forward,", "few/short/long", BEST, "fixed order: not measured on this kind of machine"],
        ["training,", "few/long", BEST, "fixed order: not measured on this kind of machine"],
        ["training,", "short", "reference", "norm.json 2026-01-01"],
    ]
    for op in registry.ops():
        assert lines_of(page, op), op


def test_the_page_names_what_is_missing_and_the_way_to_it():
    page = kernels.backends()
    for version in registry.versions():
        runs = any(registry.runs(op, version, HERE) for op in registry.ops())
        named = any(
            version in line.split(":")[0].replace(",", "").split() for line in page.partition("issing")[2].splitlines()
        )
        assert named is not runs, version
    code = "import kernels; print(kernels.backends())"
    variables = {**os.environ, "TRITON_INTERPRET": "0", "CUDA_VISIBLE_DEVICES": ""}
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, env=variables, check=True)
    assert "no usable GPU; TRITON_INTERPRET=1 in the environment runs Triton kernels on the CPU, slowly" in done.stdout


def test_a_forced_backend_is_on_the_page():
    with kernels.use_backend("torch"):
        assert "forced   every op runs on torch" in kernels.backends().splitlines()


def test_the_page_of_a_gpu(monkeypatch):
    """What it says of one, on a machine that has none."""
    lines = "\n".join(summary._choices(H100))
    assert "On NVIDIA H100 80GB HBM3, sm_90" in lines and "flash_attention" in lines
