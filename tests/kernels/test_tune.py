"""What is measured on the machine at hand, and the table that is kept of it."""

import dataclasses
import json
import os
import pathlib
import signal
import subprocess
import sys
import time

import pytest
import torch

from kernels import machine, measured, registry, tune, tune_works
from kernels.measured import Cell
from kernels.tune_works import Shape

CPU = torch.device("cpu")
HERE = machine.cpu()
SHAPE = Shape(1, 32, 32, 1, 32, 64, 64)


@pytest.fixture(autouse=True)
def cache(tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    registry.read_tables()
    yield tmp_path / "cache"
    monkeypatch.undo()
    registry.read_tables()


def of_op(op):
    """Only this op's works."""
    return [work for work in tune.works(HERE, CPU, SHAPE, [torch.float32]) if work.cell.op == op]


def run(lines, seconds=6.0):
    return tune.tune(SHAPE, CPU, [torch.float32], say=lines.append, seconds=seconds)


def test_the_works_are_the_cells_that_a_model_meets():
    shape = Shape(4, 2048, 64, 2, 32, 128, 512)
    names = [work.cell.name for work in tune.works(HERE, CPU, shape, [torch.bfloat16])]
    assert len(set(names)) == len(names)
    for op, head_dim, few, sizes in (
        ("flash_attention", "32", True, ("short", "long")),
        ("parallel_block", "32", True, ("short", "long")),
        ("layer_norm", "-", True, ("short", "long")),
        ("apply_rotary", "-", True, ("short", "long")),
        ("linear_cross_entropy", "-", False, ("long",)),
    ):
        expected = {f"{op} bfloat16 {head_dim} {size} {work}" for size in sizes for work in ("training", "forward")}
        expected |= {f"{op} bfloat16 {head_dim} few forward"} if few else set()
        assert {name for name in names if name.startswith(op)} == expected
    rows = ("1-row", "2-3-rows", "4-8-rows", "9-16-rows")  # and of so small a model the products are
    assert {name for name in names if name.startswith("product")} == {
        f"product bfloat16 - {size}-small forward" for size in rows
    }
    shape = Shape(1, 64, 2048, 32, 64, 8192, 51200)
    assert [work.cell.size for work in tune.works(HERE, CPU, shape, [torch.bfloat16]) if work.cell.op == "product"] == [
        *rows
    ]


def test_every_work_runs_on_every_candidate():
    for work in tune.works(HERE, CPU, SHAPE, [torch.float32, torch.bfloat16]):
        op, inputs = work.make()
        versions = tune.candidates(HERE, work)
        assert "torch" in versions and "reference" not in versions
        for version in [version for version in versions if not version.startswith("triton")]:
            assert tune_works.timer(work, version, CPU, op, inputs)() > 0, (work.cell, version)


def test_the_choice_follows_what_was_measured(monkeypatch):
    works = of_op("apply_rotary")
    monkeypatch.setattr(tune, "works", lambda *arguments: works)
    lines = []
    path = run(lines)
    assert path == measured.own_path(HERE.kind)
    document = json.loads(path.read_text())
    assert document["kind"] == HERE.kind and document["shape"] == str(SHAPE) == "1x32x32x1x32x64x64"
    assert document["conditions"]["torch"] == torch.__version__ and document["threads"] == torch.get_num_threads()
    assert any("/3] apply_rotary float32 - short training: " in line for line in lines), lines
    cell = Cell("apply_rotary", HERE.kind, torch.float32, None, "short", "training")
    order, why = registry.order(registry.machine_of(CPU), cell)
    assert why.startswith("measured here 20") and order[0] == next(iter(registry._rows[cell].speed)), (order, why)
    document["rows"] = [{**row, "speed": {"reference": 1.0}} for row in document["rows"]]
    path.write_text(json.dumps(document))
    registry.read_tables()
    call = {"dtype": torch.float32, "size": "short", "training": True}
    assert registry.choose("apply_rotary", CPU, None, **call) == "reference"


def test_the_faster_is_first_and_what_fails_is_slow_and_named(monkeypatch):
    (work,) = (work for work in of_op("layer_norm") if work.cell.work == "training")
    best = tune.candidates(HERE, work)[-1]

    def op(x, weight, bias, *, backend):
        if backend == "torch":
            raise RuntimeError("no such kernel\nand a long trace")
        time.sleep(0.001 if backend == best else 0.004)
        return x * weight + bias

    monkeypatch.setattr(tune, "candidates", lambda *arguments: ["torch", "cpu/one", best])
    work = dataclasses.replace(work, make=lambda: (op, [torch.ones(3, 4), torch.ones(4), torch.ones(4)]))
    row = tune.measure(HERE, work, CPU, 0.1)
    assert list(row.speed) == [best, "cpu/one"] and row.speed["cpu/one"] < 0.6
    assert row.failed == {"torch": "RuntimeError: no such kernel"}
    assert tune._in_words(row).endswith("torch failed (RuntimeError: no such kernel)")


def test_a_cell_that_cannot_be_measured_does_not_end_the_rest(monkeypatch):
    work, *others = of_op("layer_norm")

    def refuses(*tensors, backend):
        raise RuntimeError("none serves this")

    def too_large():
        return torch.empty(2**60)

    works = [
        dataclasses.replace(work, make=lambda: (refuses, [torch.ones(3, 4)])),
        dataclasses.replace(others[0], make=too_large),
        others[1],
    ]
    monkeypatch.setattr(tune, "works", lambda *arguments: works)
    lines = []
    run(lines)
    assert set(measured.read_own(HERE)) == {others[1].cell}
    assert any(f"[2/3] {others[0].cell.name}: not measured (RuntimeError: " in line for line in lines), lines


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["1x2"], "shape = '1x2': must be batch x tokens"),
        (["1x16x8x1x1x8x10"], "head_dim must be at least 2, of which rotary turns half"),
        ([str(SHAPE), "--device", "meta"], "--device meta: must be of cpu, cuda"),
        ([str(SHAPE), "--seconds", "-1"], "--seconds -1.0: must be a number, at least 0"),
        ([str(SHAPE), "--seconds", "nan"], "--seconds nan: must be a number, at least 0"),
    ],
)
def test_a_wrong_command_line_is_named(arguments, message, capsys):
    with pytest.raises(SystemExit):
        tune.main(arguments)
    assert message in capsys.readouterr().err


def test_the_time_is_kept(monkeypatch):
    lines = []
    start = time.monotonic()
    run(lines, seconds=0.0)
    assert time.monotonic() - start < 20 and not measured.own_path(HERE.kind).exists()
    assert any("time is over: " in line and "stay unmeasured" in line for line in lines), lines


def test_an_interruption_keeps_what_was_measured(monkeypatch):
    works = of_op("apply_rotary")
    measure = tune.measure

    def interrupted(of, work, *rest):
        if work is works[1]:
            raise KeyboardInterrupt
        return measure(of, work, *rest)

    monkeypatch.setattr(tune, "works", lambda *arguments: works)
    monkeypatch.setattr(tune, "measure", interrupted)
    with pytest.raises(KeyboardInterrupt):
        run([])
    assert set(measured.read_own(HERE)) == {works[0].cell}


def test_a_folder_that_cannot_be_written_is_one_line_and_nothing_is_measured(cache, monkeypatch, capsys):
    monkeypatch.setattr(tune, "works", lambda *arguments: pytest.fail("measured"))
    cache.write_text("a file where the folder should be")
    with pytest.raises(tune.TuneError) as error:
        run([])
    folder = measured.own_folder()
    assert str(error.value).startswith(f"{folder}: cannot be written (") and "\n" not in str(error.value)
    assert "nothing is measured and the fixed order decides; set XDG_CACHE_HOME" in str(error.value)
    assert tune.main([str(SHAPE), "--device", "cpu"]) == 2
    assert capsys.readouterr().err == f"python -m kernels.tune: error: {error.value}\n"
    assert registry.order(HERE, Cell("layer_norm", HERE.kind, torch.float64, None, "few", "forward"))[1].startswith(
        "fixed"
    )


COMMAND = [sys.executable, "-m", "kernels.tune", str(SHAPE), "--device", "cpu", "--seconds"]


def environment(cache):
    root = pathlib.Path(tune.__file__).resolve().parents[1]
    return {
        **os.environ,
        "XDG_CACHE_HOME": str(cache),
        "OMP_NUM_THREADS": "1",
        "PYTHONPATH": str(root),
        "TRITON_INTERPRET": "0",
    }


def test_two_at_once_leave_one_whole_table(cache):
    processes = [
        subprocess.Popen([*COMMAND, "4"], env=environment(cache), stderr=subprocess.PIPE, text=True) for _ in range(2)
    ]
    said = [process.communicate(timeout=300)[1] for process in processes]
    assert [process.returncode for process in processes] == [0, 0], said
    assert len(measured.read_own(HERE)) >= 1
    assert sorted(path.suffix for path in measured.own_folder().iterdir()) == [".json", ".lock"]
    waited = [text for text in said if "another process measures this machine: waiting for it" in text]
    for text in waited:  # those that came in time to wait took the other's table
        assert "taken: " in text and "measuring" not in text


def test_ctrl_c_of_the_command(cache):
    process = subprocess.Popen([*COMMAND, "60"], env=environment(cache), stderr=subprocess.PIPE, text=True)
    assert process.stderr is not None
    for line in process.stderr:
        if line.startswith("[2/"):
            break
    process.send_signal(signal.SIGINT)
    rest = process.stderr.read()
    assert process.wait(60) == 130, rest
    assert "Traceback" not in rest and "wrote" in rest
    assert measured.read_own(HERE)


@pytest.mark.parametrize("text", ["", "1x2", "1x2x3x4x5x6x", "0x1x1x1x1x1x1", "axbxcxdxexfxg"])
def test_a_shape_that_is_none(text):
    with pytest.raises(ValueError, match="must be batch x tokens x hidden x heads x head_dim x inner x columns"):
        Shape.parse(text)


def test_importing_measures_nothing():
    code = "import sys, kernels; print('kernels.tune' in sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "False"
