"""The table of automatic choice, made from results."""

import json
from pathlib import Path

import pytest

import kernels.triton
from bench import choose
from kernels import measured

RESULTS = Path(choose.__file__).parent / "results"


def result(path, *rows, benchmark="attn", **environment):
    """A benchmark's file. rows: (case, work, implementation, seconds)."""
    names = ("case", "work", "implementation", "seconds")
    document = {
        "benchmark": benchmark, "environment": {"time": "2026-01-02T03:04:05+00:00", **environment},
        "rows": [dict(zip(names, row, strict=True)) for row in rows],
    }  # fmt: skip
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
        for cells in (line.strip("|\n").split("|") for line in (RESULTS / "loss-amd-epyc.md").open())
        if len(cells) > 3 and "fp32" in cells[0] and cells[1].strip() == "forward + backward"
    }
    expected = milliseconds["phi1 cpu"] / milliseconds["phi1 torch"]
    loss = next(r for r in rows if (r["op"], r["dtype"]) == ("linear_cross_entropy", "float32"))
    assert loss["speed"] == {"cpu": 1.0, "torch": pytest.approx(expected, abs=1e-3)}


def test_a_cell_is_the_geometric_mean_of_its_training_cases(tmp_path):
    case = "1x8x2x{} fp32 {}"
    path = result(
        tmp_path / "a.json",
        (case.format(64, "causal"), "both", "phi1 cpu", 1.0),
        (case.format(64, "causal"), "both", "phi1 torch", 4.0),
        (case.format(64, "full"), "both", "phi1 cpu", 18.0),
        (case.format(64, "full"), "both", "phi1 torch", 2.0),  # means: cpu 4.24, torch 2.83; sums: 19, 6
        (case.format(64, "full"), "both", "SDPA", 0.1),  # a peer
        (case.format(64, "causal"), "forward", "phi1 cpu", 0.001),  # not training
        (case.format(64, "causal"), "forward", "phi1 torch", 9.0),
        (case.format(64, "causal"), "forward", "phi1 triton", 0.001),  # its backward could not run
        (case.format(64, "causal dropout 0.1"), "both", "phi1 cpu", 0.001),  # torch cannot serve it
        (case.format(64, "causal dropout 0.1"), "both", "phi1 torch", None),
        (case.format(32, "causal"), "forward", "phi1 cpu", 1.0),  # another cell, and all that it has
        (case.format(32, "causal"), "forward", "phi1 torch", 2.0),
    )
    assert table(tmp_path, path) == [
        {
            "op": "flash_attention", "device": "cpu", "dtype": "float32", "head_dim": head_dim,
            "speed": speed, "results": ["a.json 2026-01-02"],
        }
        for head_dim, speed in ((32, {"cpu": 1.0, "torch": 0.5}), (64, {"torch": 1.0, "cpu": 0.667}))
    ]  # fmt: skip
    assert list(measured.read(tmp_path / "measured.json").values())[1].speed == {"torch": 1.0, "cpu": 0.667}
    assert next(iter(list(measured.read(tmp_path / "measured.json").values())[1].speed)) == "torch"


def test_a_gpu_has_its_own_rows_and_files_join(tmp_path):
    case, work = "1x8x2x64 bf16", "forward + backward"
    rows = [(case, work, "phi1 torch", 3.0), (case, work, "phi1 cuda", 2.0)]
    files = [
        result(tmp_path / "a.json", *rows, benchmark="rotary", kind="sm_90"),
        result(tmp_path / "b.json", rows[0], (case, work, "phi1 cuda", 12.0), benchmark="rotary", kind="sm_90"),
        result(tmp_path / "c.json", rows[0], benchmark="rotary"),
        result(tmp_path / "d.json", ("2x8", "step", "phi1", 1.0), benchmark="train"),
    ]
    cpu, gpu = table(tmp_path, *files)
    assert (cpu["device"], cpu["head_dim"], cpu["speed"]) == ("cpu", None, {"torch": 1.0})
    # sqrt(3 * 3) against sqrt(2 * 12)
    assert (gpu["device"], gpu["speed"]) == ("sm_90", {"torch": 1.0, "cuda": 0.612})
    assert gpu["results"] == ["a.json 2026-01-02", "b.json 2026-01-02"]


def test_the_block_counts_the_form_that_would_run(tmp_path, monkeypatch):
    case, work = "1x8x64x2x32x128 bf16", "forward + backward"
    path = result(
        tmp_path / "a.json",
        (case, work, "plain PyTorch", 4.0),  # the torch backend
        (case, work, "plain PyTorch compiled", 0.5),
        (case, work, "phi1 triton, vendor product", 2.0),
        (case, work, "phi1 triton, triton product", 1.0),
        benchmark="block", kind="sm_90",
    )  # fmt: skip
    (row,) = table(tmp_path, path)
    assert (row["op"], row["head_dim"], row["speed"]) == ("parallel_block", 32, {"triton": 1.0, "torch": 0.5})
    monkeypatch.setitem(kernels.triton.CHOICES, "block_product", "triton")
    assert table(tmp_path, path)[0]["speed"] == {"triton": 1.0, "torch": 0.25}


def test_backends_that_share_no_case_are_an_error(tmp_path):
    work = "both"
    path = result(
        tmp_path / "a.json",
        ("1x8x2x64 fp32 full", work, "phi1 cpu", 1.0),
        ("1x8x2x64 fp32 causal", work, "phi1 torch", 1.0),
    )
    with pytest.raises(SystemExit, match="no case measures all of cpu, torch: measure one"):
        table(tmp_path, path)
