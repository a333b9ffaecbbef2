"""The table of what was measured fastest."""

import json

import pytest
import torch

from kernels import measured, registry
from kernels.measured import Cell, Row

ENTRY = {
    "op": "apply_rotary", "device": "cpu", "dtype": "float32", "head_dim": None,
    "speed": {"cpu": 1.0, "torch": 0.5}, "results": ["rotary.json 2026-01-01"],
}  # fmt: skip


def test_a_table_is_read(tmp_path):
    path = tmp_path / "measured.json"
    path.write_text(json.dumps([ENTRY, {**ENTRY, "head_dim": 64, "speed": {"torch": 1}}]))
    assert measured.read(path) == {
        Cell("apply_rotary", "cpu", torch.float32, None): Row({"cpu": 1.0, "torch": 0.5}, ("rotary.json 2026-01-01",)),
        Cell("apply_rotary", "cpu", torch.float32, 64): Row({"torch": 1}, ("rotary.json 2026-01-01",)),
    }


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("[", "not JSON"),
        ("{}", "must be a list of rows"),
        ("[3]", "row 3: 'int' object is not iterable"),
        ([{k: v for k, v in ENTRY.items() if k != "results"}], "its fields must be device, dtype, head_dim, op, results, speed"),
        ([{**ENTRY, "why": ""}], "its fields must be"),
        ([{**ENTRY, "dtype": "fp32"}], "dtype must be one of float64, float32, bfloat16, float16"),
        ([{**ENTRY, "head_dim": "64"}], "head_dim must be a whole number or null"),
        ([{**ENTRY, "speed": {}}], "speed must name backends, of reference, torch, cpu, triton, cuda"),
        ([{**ENTRY, "speed": {"fast": 1.0}}], "speed must name backends"),
        ([{**ENTRY, "speed": {"cpu": 0.5, "torch": 0.4}}], "speed must fall, from 1"),
        ([{**ENTRY, "speed": {"cpu": 1.0, "torch": 0.5, "cuda": 0.6}}], "speed must fall, from 1"),
        ([{**ENTRY, "speed": ["cpu"]}], "'list' object has no attribute 'values'"),
        ([{**ENTRY, "results": []}], "results must name where it was measured"),
        ([ENTRY, ENTRY], "a second row for its cell"),
    ],
)  # fmt: skip
def test_a_malformed_table_is_a_clear_error(text, message, tmp_path):
    path = tmp_path / "measured.json"
    path.write_text(text if isinstance(text, str) else json.dumps(text))
    with pytest.raises(ValueError) as error:
        measured.read(path)
    assert str(error.value).startswith(str(path)) and message in str(error.value)
    assert str(error.value).endswith("; write it anew: python bench/choose.py bench/results/*.json")


def test_the_table_in_the_package_is_of_ops_and_backends_that_exist():
    for cell, row in measured.read().items():
        assert set(row.speed) <= set(registry._IMPLEMENTATIONS[cell.op]), cell
        assert cell.device == "cpu" or cell.device.startswith("sm_"), cell


@pytest.fixture
def gpu(monkeypatch):
    """A GPU of compute capability 9.0: torch's query of it, replaced where torch asks the driver."""
    properties = object.__new__(
        torch.cuda._CudaDeviceProperties
    )  # a stand-in in a build for CPUs, of the type that torch.compile knows
    properties.major, properties.minor = 9, 0
    monkeypatch.setattr(torch.cuda, "_lazy_init", lambda: None)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    monkeypatch.setattr(torch.cuda, "_get_device_properties", lambda index: properties, raising=False)


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU, which need not be of compute capability 9.0")
def test_the_kind_of_a_device_is_a_constant_of_the_graph(gpu):
    assert measured.device_kind(torch.device("cpu")) == "cpu"
    assert measured.device_kind(torch.device("cuda", 0)) == measured.device_kind(torch.device("cuda:0")) == "sm_90"

    @torch.compile(fullgraph=True, backend="eager")
    def kind(x):
        return measured.device_kind(torch.device("cuda", 0)), x + 1

    assert kind(torch.ones(1))[0] == "sm_90"


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU, whose row this would be")
def test_a_gpu_follows_its_own_rows(gpu, monkeypatch):
    monkeypatch.setattr(registry, "_overrides", [])
    device, options = torch.device("cuda", 0), {"dtype": torch.float32}
    for kind, chosen in (("sm_80", "torch"), ("cpu", "torch"), ("sm_90", "reference")):
        table = {Cell("apply_rotary", kind, torch.float32, None): Row({"reference": 1.0}, ("here",))}
        monkeypatch.setattr(registry, "_MEASURED", table)
        assert registry.choose("apply_rotary", device, None, **options) == chosen
