"""Runs the Triton kernels from a changed source: a small mistake, made on purpose, that the tests must notice."""

import importlib.util
import pathlib
import sys

import pytest

import kernels.triton

SOURCE = pathlib.Path(kernels.triton.__file__).parent
# A module after those that it imports.
MODULES = (
    "numeric",
    "column_sums",
    "norm",
    "block_elementwise",
    "block_product",
    "block",
    "loss",
    "attention_tiles",
    "attention_forward",
    "attention_backward",
    "attention_tuning",
    "attention",
)


def mutate(monkeypatch: pytest.MonkeyPatch, folder: pathlib.Path, module: str, old: str, new: str) -> None:
    """Until the test ends the backend runs on a copy of its modules in which `old`, found once in `module`, is
    `new`.
    """
    text = (SOURCE / f"{module}.py").read_text()
    assert text.count(old) == 1, f"{old!r} occurs {text.count(old)} times in {module}.py"
    changed = folder / f"{module}.py"
    changed.write_text(text.replace(old, new))
    for name in MODULES[MODULES.index(module) :]:
        path = changed if name == module else SOURCE / f"{name}.py"
        spec = importlib.util.spec_from_file_location(f"kernels.triton.{name}", path)
        assert spec is not None and spec.loader is not None
        copy = importlib.util.module_from_spec(spec)
        monkeypatch.setitem(sys.modules, spec.name, copy)  # before it runs: Triton looks its module up
        spec.loader.exec_module(copy)
