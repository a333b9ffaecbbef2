"""Which backend serves a call, and what is said when none can."""

import os
import subprocess
import sys

import pytest
import torch

import kernels
from kernels import BACKENDS, BackendError, apply_rotary, flash_attention, layer_norm, reference, registry, use_backend
from kernels.measured import Cell, Row

OPS = ("apply_rotary", "flash_attention", "layer_norm", "linear_cross_entropy", "parallel_block")


@pytest.fixture
def rotary_calls(monkeypatch):
    """Records which backend's apply_rotary runs."""
    calls = []
    for name in ("reference", "cpu"):
        found = registry._IMPLEMENTATIONS["apply_rotary"][name]

        def run(*arguments, name=name, found=found):
            calls.append(name)
            return found.run(*arguments)

        changed = registry.dataclasses.replace(found, run=run)
        monkeypatch.setitem(registry._IMPLEMENTATIONS["apply_rotary"], name, changed)
    monkeypatch.setattr(registry, "_overrides", [])
    monkeypatch.setattr(registry, "_MEASURED", {})
    return calls


def measure(monkeypatch, *backends, device="cpu", op="apply_rotary", dtype=torch.float32, head_dim=None):
    """For this test, a table of one row."""
    row = Row({backend: 1.0 / (1 + i) for i, backend in enumerate(backends)}, ("here 2026-01-01",))
    monkeypatch.setattr(registry, "_MEASURED", {Cell(op, device, dtype, head_dim): row})


def rotate(**options):
    q = torch.ones(1, 2, 1, 4)
    return apply_rotary(q, q, *reference.rotary_table(2, 4), **options)


def test_the_call_beats_the_block_beats_the_automatic_choice(rotary_calls):
    rotate()
    with use_backend("reference"):
        rotate()
        with use_backend("cpu"):
            rotate()
            rotate(backend="reference")
        rotate()
    rotate()
    assert rotary_calls == ["cpu", "reference", "cpu", "reference", "reference", "cpu"]


def test_the_automatic_choice_is_what_was_measured_fastest(rotary_calls, monkeypatch):
    measure(monkeypatch, "reference", "cpu")
    rotate()
    assert rotary_calls == ["reference"]
    with use_backend("cpu"):
        rotate()
        rotate(backend="reference")
    assert rotary_calls == ["reference", "cpu", "reference"]


@pytest.mark.parametrize(
    "other", [{"op": "layer_norm"}, {"device": "sm_90"}, {"dtype": torch.bfloat16}, {"head_dim": 4}], ids=str
)
def test_a_row_decides_its_own_cell_only(other, rotary_calls, monkeypatch):
    measure(monkeypatch, "reference", **other)
    rotate()
    assert rotary_calls == ["cpu"]  # the order of what is unmeasured


def test_a_fastest_backend_that_cannot_serve_the_call_is_passed_over(rotary_calls, monkeypatch):
    measure(monkeypatch, "cuda", "reference")  # it takes no tensors on a CPU
    rotate()
    found = registry._IMPLEMENTATIONS["apply_rotary"]["reference"]
    for change in ({"missing": "gone"}, {"refuses": lambda **options: "no"}):
        changed = registry.dataclasses.replace(found, **change)
        monkeypatch.setitem(registry._IMPLEMENTATIONS["apply_rotary"], "reference", changed)
        rotate()
    assert rotary_calls == ["reference", "cpu", "cpu"]


def test_dtype_and_head_dim_decide(monkeypatch):
    monkeypatch.setattr(registry, "_overrides", [])
    measure(monkeypatch, "reference", op="flash_attention", head_dim=64)

    def chosen(dtype, head_dim):
        return registry.choose("flash_attention", torch.device("cpu"), None, dtype=dtype, head_dim=head_dim)

    assert chosen(torch.float32, 64) == "reference"
    assert chosen(torch.float32, 32) == chosen(torch.bfloat16, 64) == "cpu"


def test_the_choice_needs_no_guess_under_compile(monkeypatch):
    monkeypatch.setattr(registry, "_overrides", [])
    for backends in (("reference", "cpu"), ("cpu", "reference")):
        measure(monkeypatch, *backends, op="flash_attention", head_dim=32)

        def chosen(q):
            flash_attention(q, q, q)
            return registry.choose("flash_attention", q.device, None, dtype=q.dtype, head_dim=q.shape[-1]), q + 1

        torch._dynamo.reset()
        compiled = torch.compile(chosen, fullgraph=True, backend="aot_eager")
        assert [compiled(torch.ones(1, n, 2, 32))[0] for n in (4, 5, 6)] == [backends[0]] * 3


def test_a_block_ends_with_an_error_too(rotary_calls):
    with pytest.raises(RuntimeError, match="inside"), use_backend("reference"):
        raise RuntimeError("inside")
    rotate()
    assert rotary_calls == ["cpu"]


def _python(code: str, **variables: str) -> subprocess.CompletedProcess:
    return subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, timeout=120, env={**os.environ, **variables}
    )  # fmt: skip


def test_environment_variable():
    code = (
        "import torch, kernels\n"
        "from kernels import registry\n"
        "print(registry.choose('apply_rotary', torch.device('cpu'), None, dtype=torch.float32))\n"
        "with kernels.use_backend('torch'):\n"
        "    print(registry.choose('apply_rotary', torch.device('cpu'), None, dtype=torch.float32))\n"
    )
    done = _python(code, PHI1_KERNELS="reference")
    assert done.stdout.split() == ["reference", "torch"], done.stderr
    done = _python("import kernels", PHI1_KERNELS="fast")
    assert done.returncode != 0
    assert (
        "environment variable PHI1_KERNELS = 'fast': must be one of reference, torch, cpu, triton, cuda" in done.stderr
    )


def test_unknown_names():
    with pytest.raises(BackendError, match="backend = 'fast': must be one of reference, torch, cpu, triton, cuda"):
        rotate(backend="fast")
    with pytest.raises(BackendError, match=r"use_backend\(name\) = 'fast'"), use_backend("fast"):
        pass


def test_a_forced_backend_is_never_replaced(monkeypatch):
    q = torch.ones(1, 2, 1, 32)
    with pytest.raises(BackendError) as error:
        flash_attention(q, q, q, dropout_p=0.1, backend="torch")
    assert str(error.value).startswith(
        "flash_attention: backend 'torch' cannot serve this call: dropout_p = 0.1: scaled_dot_product_attention "
        "cannot draw the mask from dropout_seed; able: reference"
    )
    monkeypatch.delitem(registry._IMPLEMENTATIONS["layer_norm"], "cpu")
    with pytest.raises(BackendError, match="layer_norm has no cpu backend; able: reference, torch"), use_backend("cpu"):
        layer_norm(torch.ones(1, 4), torch.ones(4), torch.ones(4))
    assert flash_attention(q, q, q, dropout_p=0.1).shape == q.shape  # unforced, another takes it


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_cuda_backend_without_a_gpu_says_why():
    with pytest.raises(BackendError, match=r"backend 'cuda' cannot serve this call: (torch.cuda.is_available|kernels._native)"):  # fmt: skip
        rotate(backend="cuda")


def test_a_device_that_nothing_serves():
    q = torch.ones(1, 2, 1, 4)
    with pytest.raises(BackendError, match="it takes tensors on cpu or cuda, not on meta"):
        layer_norm(q.to("meta"), torch.ones(4, device="meta"), torch.ones(4, device="meta"), backend="torch")
    with pytest.raises(BackendError, match="layer_norm: no backend serves tensors on 'meta'; move them to cpu or cuda"):
        layer_norm(q.to("meta"), torch.ones(4, device="meta"), torch.ones(4, device="meta"))


def test_the_table_names_every_op_and_backend_with_the_reason():
    lines = kernels.backends().split("\n\n")[0].splitlines()
    assert lines[0].split()[:3] == ["op", "backend", "here"]
    rows = {tuple(line.split()[:2]): line for line in lines[1:]}
    assert set(rows) == {(op, backend) for op in OPS for backend in BACKENDS}
    assert len(rows) == len(lines) - 1
    for (op, backend), line in rows.items():
        here = line.split()[2]
        assert here in ("yes", "no") and len(line.split()) > 3, line
        if backend in ("reference", "torch"):
            assert here == "yes", line
        if op not in registry._IMPLEMENTATIONS or backend not in registry._IMPLEMENTATIONS[op]:
            assert here == "no" and f"{op} has no {backend} backend" in line
    assert rows["apply_rotary", "cpu"].split()[2:] == ["yes", "cpu"]


def test_the_table_says_what_automatic_choice_takes_and_whether_it_was_measured(monkeypatch):
    def choices():
        return [line.split(maxsplit=5) for line in kernels.backends().split("\n\n")[1].splitlines()]

    monkeypatch.setattr(registry, "_MEASURED", {})
    assert choices()[0] == ["op", "device", "dtype", "head_dim", "automatic", "why"]
    unmeasured = [row for row in choices() if row[1] == "cpu"]
    assert [row[0] for row in unmeasured] == list(registry._IMPLEMENTATIONS)
    assert all(
        row[2:] == ["other", "other", "cpu", "unmeasured: the first that can serve the call"] for row in unmeasured
    )
    measure(monkeypatch, "cuda", "torch", op="flash_attention", head_dim=64)
    found = [row for row in choices() if row[0] == "flash_attention" and row[1] == "cpu"]
    assert found[0][2:] == ["float32", "64", "torch", "measured: cuda 1.00, torch 0.50 (here 2026-01-01)"]
    assert found[1][2:4] == ["other", "other"]
    measure(monkeypatch, "torch", device="sm_00")
    assert [row for row in choices() if row[1] == "cpu"] == unmeasured


def test_without_a_gpu_or_the_interpreter_triton_says_so():
    code = "import kernels; print(kernels.backends())"
    line = next(x for x in _python(code, TRITON_INTERPRET="0", CUDA_VISIBLE_DEVICES="").stdout.splitlines() if x.startswith("apply_rotary          triton"))  # fmt: skip
    assert "no usable GPU; TRITON_INTERPRET=1 in the environment runs Triton kernels on the CPU, slowly" in line
