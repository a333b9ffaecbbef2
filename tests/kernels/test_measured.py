"""The table of what was measured fastest."""

import dataclasses
import json
import platform
import sys
from pathlib import Path

import pytest
import torch

from kernels import machine, measured, native, registry
from kernels.machine import Machine
from kernels.measured import Cell, Row

ENTRY = {
    "op": "apply_rotary",
    "kind": "a CPU",
    "dtype": "float32",
    "head_dim": None,
    "size": "long",
    "work": "forward",
    "speed": {"cpu/avx2": 1.0, "torch": 0.5},
    "results": ["rotary.json 2026-01-01"],
}


def test_a_table_is_read(tmp_path):
    path = tmp_path / "measured.json"
    path.write_text(json.dumps([ENTRY, {**ENTRY, "head_dim": 64, "speed": {"torch": 1}}]))
    assert measured.read(path) == {
        Cell("apply_rotary", "a CPU", torch.float32, None, "long", "forward"): Row(
            ENTRY["speed"], ("rotary.json 2026-01-01",)
        ),
        Cell("apply_rotary", "a CPU", torch.float32, 64, "long", "forward"): Row(
            {"torch": 1}, ("rotary.json 2026-01-01",)
        ),
    }


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("[", "not JSON"),
        ("{}", "must be a list of rows"),
        ("[3]", "row 3: 'int' object is not iterable"),
        (
            [{k: v for k, v in ENTRY.items() if k != "results"}],
            "its fields must be dtype, head_dim, kind, op, results, size, speed, work",
        ),
        ([{**ENTRY, "why": ""}], "its fields must be"),
        ([{**ENTRY, "dtype": "fp32"}], "dtype must be one of float64, float32, bfloat16, float16"),
        ([{**ENTRY, "head_dim": "64"}], "head_dim must be a whole number or null"),
        ([{**ENTRY, "size": "huge"}], "size must be one of few, short, long"),
        ([{**ENTRY, "op": "product"}], "size must be one of 1-row, 2-3-rows, 4-8-rows, 9-16-rows, 1-row-small"),
        ([{**ENTRY, "work": "backward"}], "work must be one of forward, training"),
        ([{**ENTRY, "speed": {}}], "speed must name versions, of reference, torch, cpu, triton, cuda"),
        ([{**ENTRY, "speed": {"fast": 1.0}}], "speed must name versions"),
        ([{**ENTRY, "speed": {"cpu/avx2": 0.5, "torch": 0.4}}], "speed must fall, from 1"),
        ([{**ENTRY, "speed": {"cpu/avx2": 1.0, "torch": 0.5, "cuda": 0.6}}], "speed must fall, from 1"),
        ([{**ENTRY, "speed": ["cpu"]}], "'list' object has no attribute 'values'"),
        ([{**ENTRY, "results": []}], "results must name where it was measured"),
        ([ENTRY, ENTRY], "a second row for its cell"),
    ],
)
def test_a_malformed_table_is_a_clear_error(text, message, tmp_path):
    path = tmp_path / "measured.json"
    path.write_text(text if isinstance(text, str) else json.dumps(text))
    with pytest.raises(ValueError) as error:
        measured.read(path)
    assert str(error.value).startswith(str(path)) and message in str(error.value)
    assert str(error.value).endswith("; write it anew: python bench/choose.py bench/results/*.json")


def test_the_table_in_the_package_is_of_ops_and_versions_that_exist():
    table = measured.read()
    assert table
    for cell, row in table.items():
        assert set(row.speed) <= set(registry._IMPLEMENTATIONS[cell.op]), cell


@pytest.mark.parametrize(
    ("queries", "keys", "size"),
    [
        (1, 1, "few"),
        (16, 9000, "few"),
        (17, 17, "short"),
        (17, 512, "short"),
        (17, 513, "long"),
        (512, None, "short"),
        (513, None, "long"),
        (16, None, "few"),
    ],
)
def test_size_classes(queries, keys, size):
    assert measured.size_class(queries, keys) == size


@pytest.mark.parametrize(
    ("rows", "multiplications", "size"),
    [
        (1, 1, "1-row-small"),
        (1, 1 << 22, "1-row"),
        (2, 1 << 30, "2-3-rows"),
        (3, (1 << 22) - 1, "2-3-rows-small"),
        (4, 1 << 30, "4-8-rows"),
        (8, 1 << 30, "4-8-rows"),
        (9, 0, "9-16-rows-small"),
        (16, 1 << 30, "9-16-rows"),
    ],
)
def test_size_classes_of_a_product(rows, multiplications, size):
    assert measured.product_class(rows, multiplications) == size
    assert (size, "forward") in measured.calls("product")


def test_a_speed_is_the_worst_case_against_pytorch():
    cases = [{"cpu/avx2": 1.0, "torch": 2.0, "cpu/portable": 4.0}, {"cpu/avx2": 1.0, "torch": 0.9, "cpu/portable": 9.0}]
    assert measured.speeds(cases) == {"torch": 1.0, "cpu/avx2": 0.9, "cpu/portable": 0.1}
    assert measured.speeds(cases[:1]) == {"cpu/avx2": 1.0, "torch": 0.5, "cpu/portable": 0.25}
    assert measured.speeds([{"cpu/avx2": 2.0, "cpu/portable": 1.0}]) == {"cpu/portable": 1.0, "cpu/avx2": 0.5}


# ------------------------------------------------------------------------------------------- the user's own table

HERE = Machine("cpu", "AuthenticAMD family 25, avx2", "a CPU", vendor="AuthenticAMD")
CELL = Cell("apply_rotary", HERE.kind, torch.float32, None, "long", "forward")
ROW = Row({"torch": 1.0, "cpu/avx2": 0.5}, ("measured here 2026-01-01",), {"cpu/portable": "a fault"})


@pytest.fixture
def cache(tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    return tmp_path


def write(text):
    path = measured.own_path(HERE.kind)
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text)


def test_an_own_table_is_read_again(cache, caplog):
    assert measured.read_own(HERE) == {}
    write(measured.document(HERE, "2026-01-01", {"shape": "x"}, {CELL: ROW}))
    assert measured.read_own(HERE) == {CELL: ROW}
    assert measured.own_path(HERE.kind) == cache / "phi1" / "tuned" / "authenticamd-family-25-avx2.json"
    assert not caplog.records


def test_an_own_table_of_another_kind_is_not_read(cache, caplog):
    write(measured.document(HERE, "2026-01-01", {}, {CELL: ROW}))
    other = dataclasses.replace(HERE, kind="AuthenticAMD family 25, avx512_bf16")
    assert measured.read_own(other) == {}
    assert not caplog.records
    measured.own_path(HERE.kind).rename(measured.own_path(other.kind))
    assert measured.read_own(other) == {}
    assert "it is of AuthenticAMD family 25, avx2" in caplog.text


@pytest.mark.parametrize(
    "damaged",
    [b"\xff\xfe\x00", b"", b"null", json.dumps({"kind": HERE.kind, "conditions": None, "rows": []}).encode()],
)
def test_a_damaged_table_is_said_in_one_line_and_not_read(damaged, cache, caplog):
    write("")
    measured.own_path(HERE.kind).write_bytes(damaged)
    assert measured.read_own(HERE) == {}
    (record,) = caplog.records
    assert "is not used: it is not a table of `phi1 tune` (" in record.getMessage()
    assert record.getMessage().endswith("measure again with `phi1 tune`")


@pytest.mark.parametrize("field", ["name", "torch", "phi1"])
def test_a_stale_table_is_said_in_one_line_and_not_read(field, cache, caplog):
    document = json.loads(measured.document(HERE, "2026-01-01", {}, {CELL: ROW}))
    now, document["conditions"][field] = document["conditions"][field], "0.0"
    write(json.dumps(document))
    assert measured.read_own(HERE) == {}
    (record,) = caplog.records
    path = measured.own_path(HERE.kind)
    assert record.getMessage() == (f"{path} is not used: {field} was 0.0, is {now}; measure again with `phi1 tune`")


def test_a_gpus_table_is_stale_with_another_driver_or_triton(cache, monkeypatch):
    gpu = Machine("cuda", "NVIDIA H100, sm_90", "NVIDIA H100", capability=(9, 0))
    before = measured.conditions(gpu)
    assert {"name", "driver", "torch", "triton", "phi1"} == set(before)
    monkeypatch.setattr(measured.machine, "driver", lambda: "999.1")
    assert measured.stale(gpu, before) == f"driver was {before['driver']}, is 999.1"


@pytest.mark.parametrize("text", ["", "[", "[]", "{}", '{"kind": 3}', '{"kind": "x", "conditions": {}, "rows": [3]}'])
def test_what_is_no_table_is_said_in_one_line_and_not_read(text, cache, caplog):
    write(text)
    assert measured.read_own(HERE) == {}
    (record,) = caplog.records
    assert "is not used: it is not a table of `phi1 tune`" in record.getMessage() and "\n" not in record.getMessage()


# ------------------------------------------------------------------------------------------------------ machines


@pytest.mark.skipif(native.MISSING is not None, reason=str(native.MISSING))
def test_what_this_cpu_is():
    here = machine.cpu()
    best = next(name for name in native.ISA_NAMES if f"cpu/{name}" not in here.missing)
    assert here.kind.endswith(f", {best}") and here.device == "cpu"
    if sys.platform == "linux" and platform.machine() == "x86_64":
        assert here.vendor in here.kind and "family" in here.kind
    flags = Path("/proc/cpuinfo").read_text().split() if Path("/proc/cpuinfo").exists() else []
    for name in ("avx2", "avx512_bf16"):
        if flags and platform.machine() == "x86_64":
            assert (name in flags) is (f"cpu/{name}" not in here.missing), name


@pytest.fixture
def gpu(monkeypatch):
    """A GPU of compute capability 9.0: torch's query of it, replaced where torch asks the driver."""
    properties = type("Properties", (), {"name": "NVIDIA H100", "major": 9, "minor": 0})()
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: properties.name)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (9, 0))
    monkeypatch.setattr(registry, "_machines", {})
    registry._forget()
    yield
    registry._forget()


def test_a_gpu_follows_its_own_rows(gpu, cache, monkeypatch):
    device, options = torch.device("cuda", 0), {"dtype": torch.float32}
    for kind, chosen in (
        ("NVIDIA A100, sm_80", "torch"),
        (machine.cpu().kind, "torch"),
        ("NVIDIA H100, sm_90", "reference"),
    ):
        table = {Cell("apply_rotary", kind, torch.float32, None, "long", "forward"): Row({"reference": 1.0}, ("here",))}
        monkeypatch.setattr(registry, "_rows", table)
        registry._forget()
        assert registry.choose("apply_rotary", device, None, **options) == chosen

    @torch.compile(fullgraph=True, backend="eager")
    def compiled(x):
        return registry.choose("apply_rotary", torch.device("cuda", 0), None, **options), x + 1

    assert compiled(torch.ones(1))[0] == "reference"
