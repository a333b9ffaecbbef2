"""The table of automatic choice, made from results."""

import json
from pathlib import Path

import pytest

from bench import choose
from kernels import measured

RESULTS = Path(choose.__file__).parent / "results"


def result(path, *rows, benchmark="attn", **environment):
    """A benchmark's file. rows: (shape and dtype, what else names the case, work, version or None, seconds)."""

    def fields(case, more, work, backend, seconds):
        shape, dtype = case.split()
        sizes = [int(size) for size in shape.split("x")]
        return {
            "case": f"{case} {more}",
            "shape": sizes,
            "dtype": dtype,
            "size": "long",
            "work": work,
            "implementation": f"phi1 {backend}",
            "backend": backend,
            "seconds": seconds,
        }

    document = {
        "benchmark": benchmark,
        "environment": {"time": "2026-01-02T03:04:05+00:00", "kind": "a CPU", **environment},
        "rows": [fields(*row) for row in rows],
    }
    path.write_text(json.dumps(document))
    return str(path)


def table(tmp_path, *files):
    out = tmp_path / "measured.json"
    choose.main([*files, "--out", str(out)])
    return json.loads(out.read_text())


def test_the_committed_table_is_what_the_committed_results_say(tmp_path):
    out = tmp_path / "measured.json"
    choose.main([*map(str, sorted(RESULTS.glob("*.json"))), "--out", str(out)])
    assert out.read_text() == measured.PATH.read_text()
    rows = json.loads(out.read_text())
    # One figure from the table that people read: the fp32 loss, one case.
    milliseconds = {
        cells[2].strip(" *"): float(cells[3].split()[0])
        for cells in (
            line.strip("|\n").split("|") for line in (RESULTS / "loss-authenticamd-family-25-avx512-bf16.md").open()
        )
        if len(cells) > 3 and "fp32" in cells[0] and cells[1].strip() == "forward + backward"
    }
    expected = milliseconds["phi1 cpu/avx512_bf16"] / milliseconds["phi1 torch"]
    loss = next(r for r in rows if (r["op"], r["dtype"], r["work"]) == ("linear_cross_entropy", "float32", "training"))
    assert loss["kind"] == "AuthenticAMD family 25, avx512_bf16"
    assert loss["speed"] == {"cpu/avx512_bf16": 1.0, "torch": pytest.approx(expected, abs=1e-3)}


def test_a_version_counts_by_its_worst_case_against_pytorch(tmp_path):
    wide, narrow = "1x1024x2x64 fp32", "1x1024x2x32 fp32"
    path = result(
        tmp_path / "a.json",
        (wide, "causal", "both", "cpu/avx2", 1.0),
        (wide, "causal", "both", "torch", 4.0),
        (wide, "full", "both", "cpu/avx2", 2.5),
        (wide, "full", "both", "torch", 2.0),  # faster here, if slower by far there: PyTorch's comes first
        (wide, "full", "both", None, 0.1),  # a peer, or automatic choice
        (wide, "causal", "backward", "cpu/avx2", 0.001),  # no work of a cell
        (wide, "causal", "forward", "cpu/avx2", 3.0),
        (wide, "causal", "forward", "torch", 9.0),
        (wide, "causal dropout 0.1", "both", "cpu/avx2", 0.001),  # torch cannot serve it
        (wide, "causal dropout 0.1", "both", "torch", None),
        (narrow, "causal", "forward", "cpu/avx2", 1.0),
        (narrow, "causal", "forward", "torch", 2.0),
    )
    found = {(row["head_dim"], row["work"]): row for row in table(tmp_path, path)}
    assert found[64, "training"] == {
        "op": "flash_attention",
        "kind": "a CPU",
        "dtype": "float32",
        "head_dim": 64,
        "size": "long",
        "work": "training",
        "speed": {"torch": 1.0, "cpu/avx2": 0.8},
        "results": ["a.json 2026-01-02"],
    }
    assert next(iter(found[64, "training"]["speed"])) == "torch"
    assert found[64, "forward"]["speed"] == {"cpu/avx2": 1.0, "torch": 0.333}
    assert found[32, "forward"]["speed"] == {"cpu/avx2": 1.0, "torch": 0.5}
    assert len(found) == 3


def test_a_kind_has_its_own_rows_and_files_join(tmp_path):
    case, work = ("1x1024x2x64 bf16", ""), "forward + backward"
    rows = [(*case, work, "torch", 3.0), (*case, work, "cuda", 2.0)]
    h200 = {"benchmark": "rotary", "kind": "NVIDIA H200, sm_90"}
    files = [
        result(tmp_path / "a.json", *rows, **h200),
        result(tmp_path / "b.json", rows[0], (*case, work, "cuda", 12.0), **h200),
        result(tmp_path / "c.json", rows[0], benchmark="rotary"),
        result(tmp_path / "d.json", ("2x8 bf16", "", "step", None, 1.0), benchmark="train"),
    ]
    gpu, cpu = table(tmp_path, *files)
    assert (cpu["kind"], cpu["head_dim"], cpu["speed"]) == ("a CPU", None, {"torch": 1.0})
    assert (gpu["kind"], gpu["speed"]) == ("NVIDIA H200, sm_90", {"torch": 1.0, "cuda": 0.25})
    assert gpu["results"] == ["a.json 2026-01-02", "b.json 2026-01-02"]


def test_versions_that_share_no_case_are_an_error(tmp_path):
    work = "both"
    path = result(
        tmp_path / "a.json",
        ("1x1024x2x64 fp32", "full", work, "cpu/avx2", 1.0),
        ("1x1024x2x64 fp32", "causal", work, "torch", 1.0),
    )
    with pytest.raises(SystemExit, match="no case measures all of cpu/avx2, torch: measure one"):
        table(tmp_path, path)


def test_a_file_that_is_no_result_is_named(tmp_path):
    (tmp_path / "a.json").write_text("{}")
    for name in ("a.json", "missing.json"):
        with pytest.raises(SystemExit, match=f"{name}: not a benchmark's result"):
            table(tmp_path, str(tmp_path / name))


def test_a_result_without_versions_is_said(tmp_path, capsys):
    row = ("1x1024x2x64 fp32", "full", "both")
    files = [result(tmp_path / "a.json", (*row, None, 1.0)), result(tmp_path / "b.json", (*row, "torch", 1.0))]
    assert len(table(tmp_path, *files)) == 1
    assert "a.json: left out, no row of it names a version; measure again" in capsys.readouterr().out
