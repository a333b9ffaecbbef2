"""Which kernels a training takes: measured first, recorded, and kept when it goes on."""

import pathlib

import pytest
import torch
from training import change, content, losses

import kernels.tune
from kernels import registry
from kernels.measured import Cell, Row
from kernels.tune import TuneError
from kernels.tune_works import Shape
from phi1 import checkpoint, tune
from phi1.config import PRESETS
from phi1.errors import UserError
from phi1.train import train

HERE = registry.machine_of(torch.device("cpu"))


@pytest.fixture(autouse=True)
def rows(monkeypatch):
    """Nothing is measured but what a test puts here."""
    found: dict[Cell, Row] = {}
    monkeypatch.setattr(registry, "_rows", found)
    monkeypatch.setattr(registry, "read_tables", registry._forget)
    registry._forget()
    yield found
    registry._forget()


def prefer(rows, *versions, work="training"):
    """Attention of the tests' model was measured so."""
    for size in ("few", "short"):
        cell = Cell("flash_attention", HERE.kind, torch.float32, 16, size, work)
        rows[cell] = Row({version: 1 / (1 + i) for i, version in enumerate(versions)}, ("here",))
    registry._forget()


def test_a_run_records_its_choice_and_keeps_it(config, rows, capfd):
    prefer(rows, "reference", "torch")
    train(change(config, steps=4, checkpoint_every=4, run_folder=config.train.run_folder.with_name("whole")))
    whole = config.train.run_folder.with_name("whole")
    train(change(config, steps=4, checkpoint_every=2, run_folder=config.train.run_folder, keep_last=9))
    run = config.train.run_folder
    facts = checkpoint.read_facts(run / "step-000004")["kernels"]
    assert facts["kind"] == HERE.kind and facts["forced"] is None
    assert facts["orders"]["flash_attention float32 16 short training"][:2] == ["reference", "torch"]
    assert (
        facts["orders"]["layer_norm float32 - short training"][0]
        == registry.fixed_order(HERE, Cell("layer_norm", HERE.kind, torch.float32, None, "short", "training"))[0]
    )

    (run / "last").unlink()
    for path in (run / "step-000004").iterdir():
        path.unlink()
    (run / "step-000004").rmdir()
    prefer(rows, "torch", "reference")  # what was measured since
    capfd.readouterr()
    train(change(config, steps=4, checkpoint_every=2, run_folder=run, keep_last=9))
    said = capfd.readouterr().out
    line = "  kept: flash_attention float32 16 short training on reference; a new run would take torch on this machine"
    assert line in said.splitlines()
    assert content(run / "step-000004") == content(whole / "step-000004")
    again = checkpoint.read_facts(run / "step-000004")["kernels"]
    assert again["orders"]["flash_attention float32 16 short training"][:2] == ["reference", "torch"]
    assert losses(run)[-1] == losses(whole)[-1]


def test_outside_of_its_loop_a_run_holds_nothing(config, rows):
    prefer(rows, "reference", "torch")
    train(change(config, steps=1))
    prefer(rows, "torch", "reference")
    call = {"dtype": torch.float32, "head_dim": 16, "size": "short", "training": True}
    assert registry.choose("flash_attention", torch.device("cpu"), None, **call) == "torch"


@pytest.fixture
def tuned(monkeypatch):
    """Calls of the measurement, in its place."""
    calls = []
    monkeypatch.setattr(kernels.tune, "tune", lambda *arguments, say: calls.append(arguments))
    return calls


def test_an_unmeasured_machine_is_measured_first(config, rows, tuned, capfd):
    train(change(config, steps=1, tune=True))
    said = f"nothing was measured on {HERE.kind}: phi1 tune runs first (--no-tune leaves it out)"
    assert said in capfd.readouterr().out.splitlines()
    model = config.model
    shape = Shape(4, 32, model.hidden_size, 2, 16, model.intermediate_size, model.vocab_size, kv_heads=2, rotary_dim=8)
    assert tuned == [(shape, torch.device("cpu"), (torch.float32,))]


def test_a_measured_machine_or_no_tune_is_not(config, rows, tuned):
    train(change(config, steps=1, tune=False))
    prefer(rows, "torch")
    train(change(config, steps=2, tune=True))
    assert not tuned


def test_a_measurement_that_cannot_be_kept_is_one_line_and_training_goes_on(config, rows, monkeypatch, capfd):
    def refuse(*arguments, say):
        raise TuneError("/cache: cannot be written")

    monkeypatch.setattr(kernels.tune, "tune", refuse)
    train(change(config, steps=1, tune=True))
    assert "/cache: cannot be written" in capfd.readouterr().out.splitlines()
    assert (config.train.run_folder / "step-000001").exists()


def test_the_command_measures_the_shape_of_a_model(monkeypatch):
    found = []
    monkeypatch.setattr(
        kernels.tune, "tune", lambda shape, device, seconds: found.append((shape, device.type, seconds))
    )
    tune.run(tune.Config(model="phi1", device="cpu", seconds=3.0))
    recipe = pathlib.Path(__file__).parents[2] / "recipes" / "quickstart-pretrain.toml"
    tune.run(tune.Config(model=str(recipe), device="cpu"))
    tune.run(tune.Config(shape="2x1024x512x8x64x2048x51200", device="cpu"))
    phi1 = PRESETS["phi1"]
    assert found[0] == (tune.shape_of(phi1, 8, 2048), "cpu", 3.0)
    assert str(found[0][0]) == "8x2048x2048x32x64x8192x51200" and found[0][0].rotary_dim == phi1.rotary_dim
    assert found[1][0].hidden == PRESETS["phi1-tiny"].hidden_size
    assert found[2][0] == Shape(2, 1024, 512, 8, 64, 2048, 51200)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"model": "phi2"}, "--model phi2: must be one of phi1, phi1-small, phi1-tiny, or the path of a recipe"),
        ({"shape": "1x2"}, "--shape = '1x2': must be batch x tokens x hidden"),
        ({"device": "gpu"}, "train.device = 'gpu': must be auto, cpu, cuda or cuda:N"),
    ],
)
def test_bad_options(options, message):
    with pytest.raises(UserError) as error:
        tune.run(tune.Config(**{"device": "cpu", **options}))
    assert str(error.value).startswith(message)


def test_a_table_that_cannot_be_written_is_an_error_of_the_command(monkeypatch, tmp_path):
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "file"))
    with pytest.raises(UserError, match=r"cannot be written .*set XDG_CACHE_HOME to a folder that can"):
        tune.run(tune.Config(model="phi1-tiny", device="cpu"))
