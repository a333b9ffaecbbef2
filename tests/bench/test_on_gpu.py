"""bench/on_gpu.py without a GPU: what first runs on the day it counts fails on that day."""

import json
import os
import pathlib
import subprocess
import sys
import tarfile

import pytest

from bench import on_gpu

ROOT = pathlib.Path(__file__).resolve().parents[2]


@pytest.mark.timeout(2500)
def test_the_rehearsal_runs_every_step_and_archives_it(tmp_path):
    command = [str(ROOT / "bench" / "on_gpu.sh"), "--rehearse", "--out", str(tmp_path), "--total", "2400"]
    environment = os.environ | {"PYTHON": sys.executable, "OMP_NUM_THREADS": "1"}
    done = subprocess.run(command, capture_output=True, text=True, env=environment)
    assert done.returncode == 0, done.stdout[-4000:] + done.stderr[-2000:]
    summary = (tmp_path / "summary.txt").read_text()
    for step in ("right", "attn", "train", "layer", "loss-chunks", "elementwise", "block", "rotary"):
        assert f"\n{step}: " in summary, step
    assert "exit status" not in summary and "no result" not in summary
    assert len(summary.splitlines()) <= 60
    with tarfile.open(tmp_path / "gpu.tgz") as archive:
        names = archive.getnames()
        assert {"gpu/attn.json", "gpu/errors.jsonl", "gpu/right-rotary.log"} <= set(names)
        file = archive.extractfile("gpu/attn.json")
        assert file is not None
        rows = json.load(file)["rows"]
    measured = {row["implementation"] for row in rows if row["seconds"] is not None}
    assert {"phi1 cuda/mma", "phi1 cuda/hopper"} <= measured


def test_an_unknown_step_is_refused(tmp_path):
    command = [
        sys.executable,
        str(ROOT / "bench" / "on_gpu.py"),
        "--rehearse",
        "--only",
        "rigth",
        "--out",
        str(tmp_path),
    ]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 2 and "--only rigth: the steps are right, attn," in done.stderr


def test_a_step_that_fails_is_a_line_and_does_not_stop_the_next(tmp_path):
    code = f"""
import pathlib, sys
sys.path.insert(0, {str(ROOT)!r})
from bench import on_gpu
out = pathlib.Path({str(tmp_path)!r}) / "out"
out.mkdir()
run = on_gpu.Run(out, out.parent / "back", 60)
run.step(on_gpu.Step("bad", 20, {{"bad": [sys.executable, "-c", "print('last words'); raise SystemExit(3)"]}}))
run.step(on_gpu.Step("slow", 5, {{"slow": [sys.executable, "-c", "import time; time.sleep(60)"]}}))
run.step(on_gpu.Step("good", 20, {{"good": [sys.executable, "-c", "print('RATE 1 TFLOP/s')"]}}, digest=on_gpu.digest_marked))
assert run.failed
"""
    subprocess.run([sys.executable, "-c", code], check=True, capture_output=True, text=True)
    summary = (tmp_path / "back" / "summary.txt").read_text().splitlines()
    assert summary[0].endswith("bad exit status 3") and summary[1] == "  | last words"
    assert summary[2].endswith("slow exit status 124")
    assert summary[-1] == "  1 TFLOP/s"


def test_tests_that_failed_are_named_even_if_the_run_was_stopped(tmp_path):
    (tmp_path / "tests-kernels.log").write_text(
        "[gw0] [  5%] FAILED tests/kernels/test_a.py::b[c]\n[gw1] PASSED tests/d\n"
    )
    (tmp_path / "tests-trainer.log").write_text("== 1 failed, 3 passed in 2s ==\nFAILED tests/phi1/test_e.py::f - no\n")
    assert on_gpu.digest_failed(tmp_path, tmp_path) == [
        "  kernels: did not end",
        "    failed: tests/kernels/test_a.py::b[c]",
        "  trainer: 1 failed, 3 passed in 2s",
        "    failed: tests/phi1/test_e.py::f",
    ]
