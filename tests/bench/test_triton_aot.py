"""Triton's kernels compile for sm_80 and sm_90 without a GPU, use tensor cores and TMA, and do not spill."""

import importlib.util
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]


@pytest.mark.skipif(importlib.util.find_spec("triton") is None, reason="no triton (pip install triton)")
def test_phi1_kernels_do_not_spill():
    command = [sys.executable, str(ROOT / "bench" / "triton_aot.py"), "--quick"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=550)
    assert done.returncode == 0, done.stdout + done.stderr
    rows = [
        [cell.strip() for cell in line.split("|")[1:-1]] for line in done.stdout.splitlines() if line.startswith("|")
    ]
    names, rows = rows[0], [dict(zip(rows[0], row, strict=True)) for row in rows[2:]]
    assert names[:3] == ["kernel", "arch", "dtype"]
    products = {"forward_kernel", "dq_kernel", "dkv_kernel", "project_in_kernel", "project_out_kernel"}
    after = {f"after_{where}{what}_kernel" for where in ("in", "out") for what in ("", "_backward")}
    after.add("residual_factor_kernel")
    norm = {"layer_norm_forward_kernel", "layer_norm_backward_kernel"}
    others = {"rotary_kernel", "column_sums_kernel", "cross_entropy_kernel"}
    assert {row["kernel"] for row in rows} == products | after | norm | others
    for row in rows:
        assert row["spilled B"] == "0" and 0 < int(row["registers"]) <= 255, row
        if row["kernel"] in products:
            # dk/dv's 32 x 32 tiles are too small for wgmma, which takes 64 rows.
            wide = row["arch"] == "sm_90" and row["kernel"] != "dkv_kernel"
            assert int(row["wgmma"]) > 0 if wide else int(row["wgmma"]) + int(row["mma.sync"]) > 0, row
        tma, loads, assembled = ("tma" in row["constants"].split(), *(int(row[name]) for name in ("TMA", "UTMALDG")))
        assert (loads > 0, assembled > 0) == (tma, tma) and (int(row["wgmma"]) > 0) == (int(row["HGMMA"]) > 0), row
        if tma:
            assert row["arch"] == "sm_90" and int(row["HGMMA"]) > 0, row
    assert {row["kernel"] for row in rows if "tma" in row["constants"].split()} == products
    # Specialised warps: one group loads, two multiply.
    specialised = [row for row in rows if "warp_specialize" in row["constants"]]
    assert [(row["kernel"], row["warps"]) for row in specialised] == [("project_out_kernel", "12")]
