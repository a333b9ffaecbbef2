"""The recipes in recipes/, and what a wrong one says."""

import dataclasses
import pathlib
import subprocess
import sys
import typing
from typing import Literal

import pytest
import torch

from phi1.cli import main
from phi1.config import TrainConfig
from phi1.errors import UserError
from phi1.model import Phi1
from phi1.recipe import _typed, load_recipe, parse

ROOT = pathlib.Path(__file__).parents[2]
RECIPES = ROOT / "recipes"
GOOD = """
[model]
preset = "phi1-tiny"
[data]
tokens = "tokens"
sequence_length = 512
[train]
run_folder = "run"
[optimizer]
lr = 1
"""
SEVERAL = """
weights = { code = 4, books = 0.5 }
validation_tokens = { code = "held-out" }
[data.tokens]
code = "c"
books = "b"
[train]"""

# "Textbooks Are All You Need", section 2.3.
PAPER = {
    "pretrain": {
        "train": {"steps": 36_000, "sequences_per_step": 1024, "checkpoint_every": 1000},
        "optimizer": {"lr": 1e-3, "warmup_steps": 750, "weight_decay": 0.1},
    },
    "finetune": {
        "train": {"steps": 6_000, "sequences_per_step": 256, "checkpoint_every": 1000},
        "optimizer": {"lr": 1e-4, "warmup_steps": 50, "weight_decay": 0.01},
    },
}
PARAMETERS = {"phi1": 1_418_270_720, "phi1-small": 356_794_368}


@pytest.mark.parametrize(
    "path",
    sorted({*RECIPES.glob("*.toml")} - {RECIPES / "synthesize.toml", RECIPES / "prices.toml"}),
    ids=lambda path: path.stem,
)
def test_every_recipe_is_valid(path):
    config = load_recipe(path)
    with torch.device("meta"):
        Phi1(config.model)


@pytest.mark.parametrize("size", PARAMETERS)
@pytest.mark.parametrize("stage", PAPER)
def test_the_papers_numbers(stage, size):
    config = load_recipe(RECIPES / f"{stage}-{size}.toml")
    for table, values in PAPER[stage].items():
        assert {name: getattr(getattr(config, table), name) for name in values} == values
    assert config.data.sequence_length == 2048
    assert config.model.attention_dropout == config.model.residual_dropout == 0.1
    assert not config.data.document_masking
    with torch.device("meta"):
        model = Phi1(config.model)
    assert sum(parameter.numel() for parameter in model.parameters()) == PARAMETERS[size]


def test_finetuning_starts_from_the_checkpoint_that_pretraining_keeps():
    for suffix in ("phi1", "phi1-small"):
        pretrain = load_recipe(RECIPES / f"pretrain-{suffix}.toml").train
        start = load_recipe(RECIPES / f"finetune-{suffix}.toml").train.init_from
        assert start == pretrain.run_folder / "step-024000"
        assert 24_000 % pretrain.checkpoint_every == 0 and 24_000 % pretrain.keep_every == 0


def recipe(tmp_path, text):
    path = tmp_path / "r.toml"
    path.write_text(text)
    return path


def test_defaults_presets_and_conversions(tmp_path):
    config = load_recipe(recipe(tmp_path, GOOD))
    assert config.model.hidden_size == 256
    assert config.optimizer.lr == 1.0 and isinstance(config.optimizer.lr, float)
    assert config.data.tokens == pathlib.Path("tokens")
    assert config.data.validation_tokens is None


def test_several_sets(tmp_path):
    """Tables or lines of a table; on the command line names and values in turn."""
    path = recipe(tmp_path, GOOD.replace('tokens = "tokens"\n', "").replace("[train]", SEVERAL))
    config = load_recipe(path).data
    assert config.tokens == {"code": pathlib.Path("c"), "books": pathlib.Path("b")}
    assert config.weights == {"code": 4.0, "books": 0.5} and isinstance(config.weights["code"], float)
    assert config.validation_tokens == {"code": pathlib.Path("held-out")}
    changed = parse(
        [str(path), "--tokens", "x", "X", "--weights", "x", "3", "--validation-tokens", "a", "A", "b", "B"]
    ).data
    assert (changed.tokens, changed.weights) == ({"x": pathlib.Path("X")}, {"x": 3.0})
    assert changed.validation_tokens == {"a": pathlib.Path("A"), "b": pathlib.Path("B")}
    one = parse([str(path), "--tokens", "X", "--weights", "None"]).data
    assert one.tokens == pathlib.Path("X") and one.weights is None


def test_every_key_of_a_recipe_can_be_set(tmp_path):
    """To its default or to one of its values; and a value of another kind is named."""
    for table in dataclasses.fields(TrainConfig):
        for field in dataclasses.fields(table.type):
            key, kinds = f"{table.name}.{field.name}", [field.type, *typing.get_args(field.type)]
            literals = [
                value for kind in kinds if typing.get_origin(kind) is Literal for value in typing.get_args(kind)
            ]
            default = [] if field.default in (None, dataclasses.MISSING) else [field.default]
            for value in [*literals, *default] or [{"a": 1.0} if field.name == "weights" else "folder"]:
                found = _typed(tmp_path, key, value, field.type)
                assert found == (pathlib.Path(value) if value == "folder" else value)
            with pytest.raises(UserError, match=rf"{key} = \[1\]: must be "):
                _typed(tmp_path, key, [1], field.type)
    for tracker in ("trackio", "wandb"):
        text = GOOD.replace("[train]", f'[train]\ntracker = "{tracker}"')
        assert load_recipe(recipe(tmp_path, text)).train.tracker == tracker


@pytest.mark.parametrize(
    ("before", "after", "message"),
    [
        ("lr = 1", "lrr = 1", r"unknown key 'lrr' in \[optimizer\]; did you mean 'lr'\?"),
        ("[train]", "[train]\nstep = 9", r"unknown key 'step' in \[train\]; did you mean 'steps'\?"),
        ("preset =", "presett =", r"unknown key 'presett' in \[model\]; did you mean 'preset'\?"),
        ("[optimizer]", "[optimiser]", r"unknown table \[optimiser\]; did you mean 'optimizer'\?"),
        ("phi1-tiny", "phi2", r"model\.preset = 'phi2': must be one of phi1, phi1-small, phi1-tiny"),
        ('"phi1-tiny"', '["phi1"]', r"model\.preset = \['phi1'\]: must be one of phi1, phi1-small, phi1-tiny"),
        ("[train]", '[train]\ntracker = "wandb2"', r"train\.tracker = 'wandb2': must be one of 'trackio', 'wandb'"),
        ("lr = 1", 'lr = "fast"', r"optimizer\.lr = 'fast': must be a number"),
        ("lr = 1", "warmup_steps = 1.5", r"optimizer\.warmup_steps = 1\.5: must be an integer"),
        ("lr = 1", "warmup_steps = true", r"optimizer\.warmup_steps = True: must be an integer"),
        ('run_folder = "run"', 'run_folder = "run"\ncompile = 1', r"train\.compile = 1: must be true or false"),
        ('run_folder = "run"', "run_folder = 3", r"train\.run_folder = 3: must be a path"),
        (
            'run_folder = "run"',
            'run_folder = "r"\nprecision = "fp8"',
            r"train\.precision = 'fp8': must be one of 'auto', 'bf16', 'fp16'",
        ),
        ('run_folder = "run"', "steps = 5", r"\[train\] needs 'run_folder'"),
        ("sequence_length = 512", "sequence_length = 513", r"data\.sequence_length = 513: must be at most"),
        ("lr = 1", "lr = -1", r"optimizer\.lr = -1\.0: must be above 0"),
        ("lr = 1", "lr = 1\ndecay_steps = 35251", r"optimizer\.decay_steps = 35251: with 750 of warmup more than"),
        ("[data]", "[data", r"not valid TOML"),
        ('"tokens"', '{ a = "t", b = 3 }', r"data\.tokens\.b = 3: must be a path"),
        ('"tokens"', "{}", r"data\.tokens = \{\}: must be a folder, or name = folder for each"),
        ('"tokens"', '{ "" = "t" }', r"data\.tokens = .*: must be a folder, or name = folder for each"),
        (
            '"tokens"',
            '"t"\nvalidation_tokens = {}',
            r"data\.validation_tokens = \{\}: must be a folder, or name = folder",
        ),
        ('"tokens"', '{ a = "t", b = "u" }', r"data\.weights is missing: data\.tokens names 2 sets \(a, b\)"),
        (
            '"tokens"',
            '"t"\nweights = { a = 1 }',
            r"data\.weights, of a: must be left out, for data\.tokens is one folder",
        ),
        ('"tokens"', '{ a = "t" }\nweights = 3', r"data\.weights = 3: must be a table"),
        ('"tokens"', '{ a = "t" }\nweights = { a = "3" }', r"data\.weights\.a = '3': must be a number"),
        (
            '"tokens"',
            '{ a = "t", b = "u" }\nweights = { a = 1, c = 2 }',
            r"data\.weights, of a, c: must be exactly those of data\.tokens \(a, b\)",
        ),
        *(
            (
                '"tokens"',
                f'{{ a = "t", b = "u" }}\nweights = {{ a = 1, b = {weight} }}',
                rf"data\.weights\.b = {weight}.*: must be above 0",
            )
            for weight in ("0", "-1", "nan", "inf")
        ),
    ],
)
def test_a_bad_recipe_is_named_with_what_would_be_right(tmp_path, before, after, message):
    assert before in GOOD
    path = recipe(tmp_path, GOOD.replace(before, after))
    with pytest.raises(UserError, match=message) as caught:
        load_recipe(path)
    assert str(caught.value).startswith(f"{path}: ")
    assert str(caught.value).count(str(path)) == 1


def test_a_bad_recipe_ends_the_command_with_one_line(tmp_path, capsys):
    path = recipe(tmp_path, GOOD.replace("lr = 1", "lrr = 1"))
    assert main(["train", str(path)]) == 2
    assert capsys.readouterr().err == (f"phi1: error: {path}: unknown key 'lrr' in [optimizer]; did you mean 'lr'?\n")


def test_a_missing_recipe(tmp_path, monkeypatch):
    """Those that there are, are listed: of the folder that the command is run in, else of the repository."""
    with pytest.raises(UserError, match=r"none\.toml: no such recipe; there are .*recipes/finetune-phi1-small\.toml, "):
        parse([str(tmp_path / "none.toml")])
    for arguments in ([], ["--steps", "100"]):
        with pytest.raises(
            UserError, match=r"RECIPE is missing: phi1 train RECIPE .*; there are .*pretrain-phi1\.toml, "
        ):
            parse(arguments)
    (tmp_path / "recipes").mkdir()
    (tmp_path / "recipes" / "mine.toml").write_text(GOOD)
    monkeypatch.chdir(tmp_path)
    with pytest.raises(UserError, match=r"there are recipes/mine\.toml$"):
        parse([])


def test_options_override_the_recipe(tmp_path):
    path = recipe(tmp_path, GOOD)
    config = parse(
        [
            str(path),
            "--steps",
            "100",
            "--precision",
            "fp16",
            "--document-masking",
            "--hidden-size",
            "64",
            "--validation-tokens",
            "held-out",
            "--lr",
            "2e-3",
        ]
    )
    assert (config.train.steps, config.train.precision, config.model.hidden_size) == (100, "fp16", 64)
    assert config.data.document_masking and config.data.validation_tokens == pathlib.Path("held-out")
    assert (config.optimizer.lr, config.data.sequence_length) == (2e-3, 512)
    with pytest.raises(UserError, match=r"train\.steps = 0"):
        parse([str(path), "--steps", "0"])
    with pytest.raises(SystemExit) as caught:
        parse([str(path), "--stepz", "1"])
    assert caught.value.code == 2


@pytest.mark.parametrize(
    ("words", "named"),
    [
        ("--tokens a x a y --weights a 1", "--tokens names 'a' twice; give each set a name of its own"),
        ("--tokens a x b y --weights a 1 b 2 a 3 --steps 9", "--weights names 'a' twice"),
        ("--steps 9 --validation_tokens b x a x b y", "--validation_tokens names 'b' twice"),
    ],
)
def test_a_set_named_twice_on_the_command_line(tmp_path, words, named):
    with pytest.raises(UserError, match=named):
        parse([str(recipe(tmp_path, GOOD)), *words.split()])


@pytest.mark.parametrize("before", [[], [str(RECIPES / "pretrain-phi1.toml")]])
def test_help(before, capsys):
    with pytest.raises(SystemExit) as caught:
        parse([*before, "--help"])
    assert caught.value.code == 0
    text = capsys.readouterr().out
    assert "phi1 train RECIPE" in text and "--sequences-per-step INT" in text and "Optimizer steps" in text
    # Without a recipe two options have no value yet; the others show theirs.
    assert text.count("(required)") == (0 if before else 2)
    assert "(default: 36000)" in text and "room for one more" in " ".join(text.replace("│", " ").split())


def test_help_and_errors_do_not_wait_for_torch():
    code = "import sys; from phi1.recipe import parse\ntry: parse(['--help'])\nexcept SystemExit: assert 'torch' not in sys.modules"
    subprocess.run([sys.executable, "-c", code], check=True, cwd=ROOT, stdout=subprocess.DEVNULL)
