"""The checks that configurations make on themselves."""

import dataclasses
import pathlib

import pytest

from phi1.config import PRESETS, DataConfig, LoopConfig, ModelConfig, OptimizerConfig, TrainConfig
from phi1.errors import UserError


def config(**changes):
    tables = {
        "model": PRESETS["phi1-tiny"],
        "data": DataConfig(pathlib.Path("tokens"), sequence_length=128),
        "train": LoopConfig(pathlib.Path("run")),
        "optimizer": OptimizerConfig(),
    }
    return TrainConfig(**tables | changes)


@pytest.mark.parametrize(
    ("kind", "changes", "message"),
    [
        (LoopConfig, {"steps": 0}, r"train\.steps = 0: must be at least 1"),
        (LoopConfig, {"micro_batch": -1}, r"train\.micro_batch = -1: must be at least 1"),
        (LoopConfig, {"keep_last": 0}, r"train\.keep_last = 0"),
        (LoopConfig, {"seed": -1}, r"train\.seed = -1: must be at least 0"),
        (LoopConfig, {"seed": 1 << 63}, r"train\.seed = 9223372036854775808: must be below 2\*\*63"),
        (LoopConfig, {"run_folder": pathlib.Path("~/runs/x")}, r"train\.run_folder = ~/runs/x: .*; write the path out"),
        (OptimizerConfig, {"lr": 0.0}, r"optimizer\.lr = 0\.0: must be above 0"),
        (OptimizerConfig, {"lr": float("nan")}, r"optimizer\.lr = nan"),
        (OptimizerConfig, {"lr_floor": 1.0}, r"optimizer\.lr_floor = 1\.0: must be at most lr = 0\.001"),
        (OptimizerConfig, {"beta2": 1.0}, r"optimizer\.beta2 = 1\.0: must be below 1"),
        (OptimizerConfig, {"weight_decay": -0.1}, r"optimizer\.weight_decay = -0\.1"),
        (DataConfig, {"sequence_length": 0}, r"data\.sequence_length = 0"),
        (ModelConfig, {"num_kv_heads": 3}, r"model\.num_kv_heads = 3: must divide num_heads = 32"),
        (ModelConfig, {"num_layers": 0}, r"model\.num_layers = 0: must be at least 1"),
        (ModelConfig, {"num_layers": 2.0}, r"model\.num_layers = 2\.0: must be an integer"),
        (ModelConfig, {"num_layers": True}, r"model\.num_layers = True: must be an integer"),
        (ModelConfig, {"initializer_range": -0.02}, r"model\.initializer_range = -0\.02: must be at least 0"),
        (ModelConfig, {"rotary_base": 0.0}, r"model\.rotary_base = 0\.0: must be above 0"),
        (ModelConfig, {"layer_norm_eps": -1.0}, r"model\.layer_norm_eps = -1\.0: must be above 0"),
        (ModelConfig, {"rotary_dim": 66}, r"model\.rotary_dim = 66"),
        (ModelConfig, {"activation": "gelu"}, "model.activation = 'gelu': must be one of gelu_new, relu2"),
        (ModelConfig, {"residual_dropout": 1.0}, r"model\.residual_dropout = 1\.0: must be in \[0, 1\)"),
    ],
)
def test_values_out_of_range(kind, changes, message):
    required = {LoopConfig: {"run_folder": pathlib.Path("r")}, DataConfig: {"tokens": pathlib.Path("t")}}.get(kind, {})
    with pytest.raises(UserError, match=message):
        kind(**required | changes)


@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf"), None, "0.1"])
@pytest.mark.parametrize("kind", [ModelConfig, LoopConfig, OptimizerConfig])
def test_every_number_is_one(kind, value):
    """NaN is neither above nor below a bound."""
    required = {"run_folder": pathlib.Path("r")} if kind is LoopConfig else {}
    numbers = {field.name: field.type for field in dataclasses.fields(kind) if field.type in (int, float)}
    assert float in numbers.values()
    for name, its_type in numbers.items():
        what = "an integer" if its_type is int else "a finite number"
        with pytest.raises(UserError, match=rf"\.{name} = .*: must be {what}"):
            kind(**required, **{name: value})


def test_sequences_fit_the_model():
    long = dataclasses.replace(config().data, sequence_length=513)
    with pytest.raises(UserError, match=r"data\.sequence_length = 513: must be at most model\.max_positions = 512"):
        config(data=long)


def test_every_option_has_its_own_flat_name():
    # `--steps 100` names a field without its table, so no two tables may share one.
    names = [field.name for table in dataclasses.fields(TrainConfig) for field in dataclasses.fields(table.type)]
    assert len(names) == len(set(names))


def test_muon_on_shards_is_refused():
    loop = LoopConfig(pathlib.Path("run"), data_parallel="fsdp2")
    with pytest.raises(UserError, match=r"train\.data_parallel = 'fsdp2': Muon moves whole matrices.*take ddp"):
        config(train=loop, optimizer=OptimizerConfig(algorithm="muon"))
