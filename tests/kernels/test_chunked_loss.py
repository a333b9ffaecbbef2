"""The loop of kernels/chunked_loss.py, and small mistakes made in it, on every backend."""

import dataclasses
import functools
import importlib
import importlib.util
import pathlib
from collections.abc import Iterator
from types import ModuleType

import pytest
import torch
from cpu_isa import CPU_BACKENDS
from error_rule import check
from test_loss import make, plain, with_grads

from kernels import chunked_loss, linear_cross_entropy, registry

RESULTS = ("loss", "dhidden", "dweight", "dbias")


@pytest.fixture(params=["torch", *CPU_BACKENDS, "cuda", "triton"])
def backend(request: pytest.FixtureRequest) -> Iterator[tuple[str, str]]:
    """A backend's name and the device of its tensors; `cuda` is the emulator."""
    if request.param == "cuda":
        request.getfixturevalue("emulator")
    device = "cuda" if request.param == "triton" and torch.cuda.is_available() else "cpu"
    yield request.param, device


def _check(module: ModuleType, name: str, device: str, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch) -> None:
    """The error rule with `module` for the loop: chunks of 7, 7 and 2 rows, runs of 200, 200 and 120 columns."""
    found = registry.implementation("linear_cross_entropy", name)
    pieces = found.forward.args[0]
    changed = dataclasses.replace(found, forward=functools.partial(module.linear_cross_entropy, pieces))
    monkeypatch.setitem(registry._IMPLEMENTATIONS["linear_cross_entropy"], name, changed)
    monkeypatch.setattr(importlib.import_module("kernels.loss"), "chunked_loss", module)
    monkeypatch.setattr(module, "_CHUNK_LOGITS", dict.fromkeys(("cpu", "cuda"), 7 * 520))
    monkeypatch.setattr(module, "_WEIGHT_COLUMNS", 200)
    inputs, targets = make(16, 16, 520, dtype)
    truth, low = (with_grads(lambda *a: plain(*a, targets), inputs, kind) for kind in (torch.float64, dtype))
    call = lambda *a: linear_cross_entropy(*a, targets.to(device), backend=name)
    found = with_grads(call, [x.to(device) for x in inputs], dtype)
    for what, a, b, c in zip(RESULTS, (x.cpu() for x in found), low, truth, strict=True):
        check(what, a.to(dtype) if what == "loss" else a, b, c, dtype)
    if pieces.scratch != torch.float32:
        plain_sums = pieces._replace(add_product=chunked_loss.add_in_float32, scratch=torch.float32)
        runs = [module.linear_cross_entropy(p, *inputs, targets, -100, 0.0, True) for p in (pieces, plain_sums)]
        assert all(map(torch.equal, *runs)), "error: not the bits of float32 sums"


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32], ids=str)
def test_the_loop_obeys_the_error_rule(backend, dtype, monkeypatch):
    _check(chunked_loss, *backend, dtype, monkeypatch)


@pytest.mark.parametrize(
    ("dtype", "old", "new"),
    [
        (torch.bfloat16, "part = torch.mm(d[:, run].T", "part = torch.mm(d[:, : grad.shape[0]].T"),
        (torch.float16, "(grad, d[:, run].T, h, first)", "(grad, d[:, run].T, h, True)"),
        (torch.float16, "weight[run], first_column == 0", "weight[run], True"),
        (torch.bfloat16, "scratch[run], part", "scratch[: grad.shape[0]], part"),
        (torch.bfloat16, "part, first, last", "part, True, last"),
        (torch.float32, "beta=int(not first)", "beta=0"),
        (torch.bfloat16, "targets[block]", "targets[: h.shape[0]]"),
        (torch.float32, "h = hidden[block]", "h = hidden[: len(hidden[block])]"),
    ],
)
def test_mutations_fail(backend, dtype, old, new, monkeypatch, tmp_path):
    text = pathlib.Path(chunked_loss.__file__).read_text()
    assert text.count(old) == 1, f"{old!r} occurs {text.count(old)} times"
    path = tmp_path / "chunked_loss.py"
    path.write_text(text.replace(old, new))
    spec = importlib.util.spec_from_file_location("mutated_chunked_loss", path)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    with pytest.raises(AssertionError, match="error"):
        _check(module, *backend, dtype, monkeypatch)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("name", CPU_BACKENDS)
def test_sums_in_halves_have_the_bits_of_sums_in_float32(name, dtype):
    """Numbers of many sizes, subnormal, too great for the dtype, infinite; grad and scratch hold garbage at first."""
    generator = torch.Generator().manual_seed(3)
    products = torch.randn(6, 91, 53, generator=generator) * 10.0 ** torch.randint(
        -9, 5, (6, 91, 53), generator=generator
    )
    products[:, 0], products[2, 1] = 60000.0, torch.inf
    results = []
    own = registry.implementation("linear_cross_entropy", name).forward.args[0]
    for pieces in (own, chunked_loss.Pieces(lambda *a: None)):
        grad = torch.full((91, 53), torch.nan, dtype=dtype)
        scratch = torch.full((91, 53), 7, dtype=pieces.scratch)
        for i, product in enumerate(products.to(dtype)):
            pieces.add_product(grad, scratch, product, i == 0, i == 5)
        results.append(grad)
    assert torch.equal(*results) and results[0].isfinite().any() and results[0].isinf().any()
