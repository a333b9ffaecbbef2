"""The benchmarks run as scripts, at tiny shapes, and say what they must: these tests say nothing about speed."""

import dataclasses
import importlib.util
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from bench import attn, block, generate, harness, huggingface, linear, suite
from kernels import machine, native

ROOT = Path(__file__).resolve().parents[2]
BOTH = {"forward", "forward + backward"}


def run(script: str, *arguments: str, **variables: str) -> subprocess.CompletedProcess:
    command = [sys.executable, str(ROOT / "bench" / script), *arguments]
    environment = {**os.environ, **variables}
    return subprocess.run(command, capture_output=True, text=True, timeout=240, cwd="/", env=environment)


@pytest.mark.parametrize(
    ("script", "shape", "works", "peers", "unit"),
    [
        ("attn.py", "1x32x2x32", {"forward", "backward", "both"}, {"SDPA", "SDPA math", "phi1 torch"}, "GFLOP/s"),
        ("rotary.py", "1x16x2x32", BOTH, {"PyTorch eager", "PyTorch compiled", "phi1 torch"}, "GB/s"),
        (
            "block.py",
            "1x16x64x2x32x48",
            BOTH,
            {"plain PyTorch", "plain PyTorch compiled", "Hugging Face", "Hugging Face compiled"},
            "GFLOP/s",
        ),
        ("norm.py", "2x32", BOTH, {"PyTorch eager", "PyTorch compiled", "phi1 torch"}, "GB/s"),
        ("loss.py", "16x8x300", BOTH, {"PyTorch eager", "PyTorch compiled", "phi1 torch"}, "GFLOP/s"),
    ],
)
def test_script_measures_ours_and_peers(script, shape, works, peers, unit, tmp_path):
    path = tmp_path / "rows.json"
    # rotary.py shows that compiled peers run; in the others torch.compile, half a minute of compilers, does nothing.
    variables = {} if script == "rotary.py" else {"TORCH_COMPILE_DISABLE": "1"}
    done = run(
        script,
        "--quick",
        "--device",
        "cpu",
        "--shapes",
        shape,
        "--dtypes",
        "fp32",
        "--json",
        str(path),
        "--threads",
        "1",
        **variables,
    )
    assert done.returncode == 0, done.stderr
    document = json.loads(path.read_text())
    assert document["unit"] == unit
    assert document["environment"]["threads"] == 1
    assert document["environment"]["torch"] == torch.__version__
    assert document["environment"]["kind"] == machine.cpu().kind
    assert len(document["environment"]["commit"]) == 40
    assert document["formula"] in done.stdout
    rows = document["rows"]
    assert {row["work"] for row in rows} == works
    for row in rows:
        assert (row["seconds"] is None) != (row["unavailable"] is None), row
        if row["seconds"] is not None:
            assert row["rounds"] >= 3 and row["rate"] > 0
    measured = {row["implementation"] for row in rows if row["seconds"] is not None}
    assert peers <= measured
    # the ratio is taken against the fastest peer of the same group
    for work in works:
        group = [r for r in rows if r["work"] == work and r["case"] == rows[0]["case"] and r["seconds"] is not None]
        best = min(r["seconds"] for r in group if not r["ours"])
        for row in group:
            assert row["ratio"] == pytest.approx(best / row["seconds"])
    # the fields that bench/choose.py reads
    for row in rows:
        assert row["case"].startswith("x".join(map(str, row["shape"])) + f" {row['dtype']}") and row["size"]
        named = row["implementation"] == f"phi1 {row['backend']}" or (
            row["implementation"] == "plain PyTorch" and row["backend"] == "torch"
        )
        assert named is (row["backend"] is not None)
    assert "phi1" in measured, "automatic choice"
    # what cannot run is listed with the reason
    for row in rows:
        if row["unavailable"]:
            assert f"Not measured: {row['implementation']}" in done.stdout and row["unavailable"] in done.stdout
    if script == "block.py":
        forms = ("pointers", "descriptors", "product")
        assert {f"phi1 triton/{form}" for form in forms} <= {row["implementation"] for row in rows}
        assert all(row["ours"] == row["implementation"].startswith("phi1") for row in rows)
    if script == "loss.py":
        assert all(row["peak_bytes"] is not None for row in rows if row["seconds"]) and "peak MiB" in done.stdout
    if script == "attn.py":
        reasons = {row["implementation"]: row["unavailable"] for row in rows if row["unavailable"]}
        assert "scaled_dot_product_attention cannot draw" in reasons["phi1 torch"]  # with dropout
        assert {"FlexAttention", "phi1 triton/descriptors", "phi1 triton/pointers"} <= set(reasons)
        few = {row["case"].split()[2]: row for row in rows if "after a cache" in row["case"]}
        assert set(few) == {"1", "4", "16"} and {row["size"] for row in few.values()} == {"few"}


def test_zentorch_says_where_it_cannot_be_measured():
    """What it computes was compared by hand (LOG.md): it is no package of ours."""
    heads = (1, 32, 4, 64, 4)
    with pytest.raises(harness.Unavailable, match="CPU tensors only"):
        attn.zentorch("cuda", True, 0.0, heads)
    if importlib.util.find_spec("zentorch") is None:
        with pytest.raises(harness.Unavailable, match="cannot be imported"):
            attn.zentorch("cpu", True, 0.0, heads)
        return
    with pytest.raises(harness.Unavailable, match="as many kv_heads as heads"):
        attn.zentorch("cpu", True, 0.0, (1, 32, 4, 64, 2))
    q = torch.randn(1, 32, 4, 64)
    torch.testing.assert_close(
        attn.zentorch("cpu", True, 0.0, heads)(q, q, q), attn.sdpa(None, True, 0.0, heads)(q, q, q)
    )
    with pytest.raises(harness.Unavailable, match="no backward"):
        attn.zentorch("cpu", True, 0.0, heads)(q.requires_grad_(), q, q)


def test_the_peers_of_the_block_compute_the_same():
    shape = (2, 9, 64, 2, 32, 48)
    torch.manual_seed(0)
    parameters = block.make_parameters(shape, torch.float64, "cpu")
    with torch.no_grad():
        for parameter in parameters:
            parameter.normal_(std=0.3)
    x, grad = torch.randn(2, 2, 9, 64, dtype=torch.float64)
    theirs, own = block.hugging_face(shape, parameters)
    results = []
    for layer in (theirs, block.ours("torch", shape, parameters)[0]):
        leaf = x.clone().requires_grad_()
        y = layer(leaf)
        results.append((y.detach(), *torch.autograd.grad(y, leaf, grad)))
    for a, b in zip(*results, strict=True):
        torch.testing.assert_close(a, b)
    assert sum(p.numel() for p in own) == sum(p.numel() for p in parameters) + 64  # its second output bias
    with pytest.raises(harness.Unavailable, match="heads \\* head_dim = 64: PhiDecoderLayer takes hidden, 48"):
        block.hugging_face((1, 9, 48, 2, 32, 48), parameters)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--shapes", "1x2"], "--shapes 1x2: must be batch x seq x heads x head_dim"),
        (["--shapes", "1x2x3x4x5x6"], "must be batch x seq x heads x head_dim [x kv_heads]"),
        (["--shapes", "0x2x2x2"], "positive whole numbers"),
        (["--shapes", "1x2x3x4x2"], "--shapes 1x2x3x4x2: 2 kv_heads must divide 3 heads"),
        (["--dtypes", "fp8"], "--dtypes fp8: must be of fp32, bf16, fp16"),
        (["--threads", "0"], "--threads 0: must be at least 1"),
    ],
)
def test_bad_options(arguments, message, capsys):
    with pytest.raises(SystemExit) as stop:
        suite.main(attn.SUITE, ["--device", "cpu", *arguments])
    assert stop.value.code == 2
    assert message in capsys.readouterr().err


def test_device_cuda_without_a_gpu(capsys, monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(SystemExit):
        suite.main(attn.SUITE, ["--device", "cuda"])
    assert "use --device cpu" in capsys.readouterr().err


def test_linear_measures_every_version_beside_pytorch(tmp_path):
    path = tmp_path / "rows.json"
    done = run("linear.py", "--device", "cpu", "--quick", "--shapes", "2x16x48", "--json", str(path), "--threads", "1")
    assert done.returncode == 0, done.stderr
    rows = json.loads(path.read_text())["rows"]
    assert {r["implementation"] for r in rows if r["seconds"]} == {
        "PyTorch",
        "phi1",
        "phi1 torch",
        *(f"phi1 cpu/{isa.name}" for isa in native.ISAS if isa.missing is None),
    }
    assert {r["size"] for r in rows} == {"2-3-rows-small"}
    assert all(r["rate"] == pytest.approx(12 * 16 * 48 * 4 / r["seconds"] / 1e9) for r in rows if r["seconds"])
    assert run("linear.py", "--device", "cpu", "--shapes", "17x16x48").returncode == 2


def test_a_benchmark_of_the_cpu_alone_says_so(capsys, monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    with pytest.raises(SystemExit):
        suite.main(linear.SUITE, [])
    assert "--device cuda: this benchmark is for cpu" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("option", "message"),
    [
        (["--json", "/nowhere/at/all.json"], "--json /nowhere/at/all.json: there is no folder /nowhere/at; make it"),
        (["--skip", "["], "--skip [: must be a regular expression"),
    ],
)
def test_options_are_checked_before_anything_is_measured(option, message, capsys):
    with pytest.raises(SystemExit):
        suite.main(linear.SUITE, ["--device", "cpu", *option])
    assert message in capsys.readouterr().err


def test_save_writes_table_and_plot_with_the_device_in_the_name(tmp_path, monkeypatch):
    monkeypatch.setattr(harness, "ROOT", tmp_path)
    monkeypatch.setattr(harness, "RESULTS", tmp_path / "results")
    bench = harness.Benchmark("trial", "cpu", unit="calls/s", formula="one call", seconds=0.0, rounds=4)
    bench.group(
        "case",
        "work",
        1.0,
        [
            harness.Candidate("mine", True, lambda work: lambda: sum(range(10))),
            harness.Candidate("theirs", False, lambda work: lambda: sum(range(100000))),
            harness.Candidate("absent", False, lambda work: _unavailable("not installed")),
        ],
        peak=1.0,
    )
    bench.finish(suite.parse(suite.arguments("", ""), ["--save", "--device", "cpu"]))
    stems = {path.suffix: path for path in (tmp_path / "results").iterdir()}
    assert set(stems) == {".json", ".md", ".png"}
    assert stems[".png"].read_bytes()[:4] == b"\x89PNG"
    text = stems[".md"].read_text()
    assert "| case | work | **mine** |" in text and "Not measured: absent (everywhere): not installed" in text
    rows = {row["implementation"]: row for row in json.loads(stems[".json"].read_text())["rows"]}
    assert rows["mine"]["ratio"] > 1.0 and rows["theirs"]["ratio"] == 1.0
    assert rows["mine"]["rounds"] == 4 and rows["absent"]["unavailable"] == "not installed"


def _unavailable(reason):
    raise harness.Unavailable(reason)


@pytest.mark.parametrize(
    ("script", "shape", "ours", "peers"),
    [
        (huggingface, "2x16x1", "phi1", {"sdpa", "eager"}),
        (generate, "8x3x64x1x400", "phi1 generate", {"transformers.generate"}),
    ],
    ids=["huggingface", "generate"],
)
def test_models_in_transformers(script, shape, ours, peers, tmp_path, monkeypatch):
    monkeypatch.setattr(huggingface, "VOCABULARY", 128)
    monkeypatch.setattr(suite, "matrix_peak", lambda device, dtype: 1e9)  # a large product takes a while
    path, threads = tmp_path / "rows.json", torch.get_num_threads()
    try:
        suite.main(
            dataclasses.replace(script.SUITE, seconds=(0.0, 0.0), rounds={"cpu": 2, "cuda": 2}),
            [
                "--quick",
                "--device",
                "cpu",
                "--threads",
                "1",
                "--shapes",
                shape,
                "--dtypes",
                "fp32",
                "--json",
                str(path),
            ],
        )
    finally:
        torch.set_num_threads(threads)
    rows = json.loads(path.read_text())["rows"]
    assert {row["implementation"] for row in rows if row["ours"]} == {ours}
    assert {row["implementation"] for row in rows if not row["ours"]} == peers
    assert all(row["seconds"] and row["rate"] > 0 for row in rows), rows
    assert len({row["case"] for row in rows}) == 2
