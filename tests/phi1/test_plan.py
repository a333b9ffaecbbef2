"""What a training takes, as `phi1 plan` says it."""

import pathlib
import re

import pytest
import torch
from torch._C._profiler import _EventType
from torch.utils.flop_counter import FlopCounterMode
from training import change, trainer_of

from kernels import use_backend
from phi1 import plan
from phi1.cli import main
from phi1.config import PRESETS
from phi1.engine import Engine
from phi1.metrics import flops_per_token, parameter_count
from phi1.model import Phi1
from phi1.optimizer import make_optimizer
from phi1.recipe import load_recipe
from phi1.train import DTYPES

RECIPES = pathlib.Path(__file__).parents[2] / "recipes"


def peak_of(run):
    """The most bytes that torch held on the CPU at a time while `run` ran, of what it took there."""
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU], profile_memory=True) as profile:
        run()
    found, events = [], list(profile.profiler.kineto_results.experimental_event_tree())
    while events:
        event = events.pop()
        events += event.children
        if event.typed[0] == _EventType.Allocation:
            found.append((event.start_time_ns, event.typed[1].alloc_size))
    held = peak = 0
    for _, size in sorted(found, key=lambda pair: pair[0]):
        held += size
        peak = max(peak, held)
    return peak


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
@pytest.mark.parametrize(
    "changes",
    [
        {"micro_batch": 8},
        {"micro_batch": 8, "residual_dropout": 0.1, "attention_dropout": 0.1},
        {"micro_batch": 2, "vocab_size": 8192, "num_layers": 1},
        {"micro_batch": 4, "num_kv_heads": 1, "hidden_size": 64},
        {"micro_batch": 4, "algorithm": "muon"},
    ],
    ids=str,
)
def test_memory_is_that_of_a_real_run(config, one_thread, precision, changes):
    """Two steps of a small model, the second with all its state, against the sum of the parts: within 10%."""
    sizes = {
        "hidden_size": 128,
        "intermediate_size": 512,
        "num_layers": 3,
        "num_heads": 4,
        "num_kv_heads": 4,
        "head_dim": 32,
        "max_positions": 64,
        "vocab_size": 1024,
    }
    config = change(config, **sizes | {"sequence_length": 64, "precision": precision} | changes)

    def two_steps():
        with use_backend("cpu"), trainer_of(config) as trainer:
            trainer.update()
            trainer.update()

    parts = plan.memory(config, 1, "cpu")
    assert peak_of(two_steps) == pytest.approx(sum(parts.values()), rel=0.1), parts


@pytest.mark.parametrize(
    ("gpus", "precision", "rounds", "changes"),
    [
        (8, "bf16", 1, {"micro_batch": 8}),
        (8, "fp32", 3, {"micro_batch": 8}),
        (8, "bf16", 2, {"micro_batch": 8, "residual_dropout": 0.1, "attention_dropout": 0.1}),
        (512, "bf16", 2, {"micro_batch": 2, "vocab_size": 8192, "num_layers": 1}),
        (512, "fp32", 1, {"micro_batch": 2, "vocab_size": 8192, "num_layers": 1}),
    ],
    ids=str,
)
def test_memory_of_shards_is_that_of_a_real_step(config, one_thread, fake_world, gpus, precision, rounds, changes):
    """Two steps of one process of many, whose exchange is faked, its buffers are not: within 10%."""
    sizes = {
        "hidden_size": 128,
        "intermediate_size": 512,
        "num_layers": 3,
        "num_heads": 4,
        "num_kv_heads": 4,
        "head_dim": 32,
        "max_positions": 64,
        "vocab_size": 1024,
        "sequence_length": 64,
        "precision": precision,
    }
    sizes |= {"data_parallel": "fsdp2", "sequences_per_step": gpus * changes["micro_batch"] * rounds}
    config = change(config, **sizes | changes)
    model = Phi1(config.model, DTYPES[precision])
    engine, optimizer = Engine(model, fake_world(gpus), config.train), make_optimizer(model, config.optimizer)
    held = sum(2 * 4 * parameter.to_local().numel() for parameter in model.parameters())  # with gradients

    def two_steps():
        for _ in range(2):
            optimizer.zero_grad(set_to_none=False)
            batches = [torch.zeros(2, config.train.micro_batch, 64, dtype=torch.long) for _ in range(rounds)]
            for index, (tokens, targets) in enumerate(batches):
                with engine.exchanging(index + 1 == rounds):
                    engine.network(tokens, targets=targets).backward()
            engine.clip_gradient(1.0)
            optimizer.step()

    with use_backend("cpu"):
        peak = held + peak_of(two_steps)
    parts = plan.memory(config, gpus, "cpu")
    assert peak == pytest.approx(sum(parts.values()), rel=0.1), parts


@pytest.mark.parametrize("name", PRESETS)
def test_parameters_are_the_models(name):
    with torch.device("meta"):
        assert sum(plan.parameters(PRESETS[name]).values()) == parameter_count(Phi1(PRESETS[name]))
    grouped = PRESETS[name].__class__(num_layers=2, num_kv_heads=4, head_dim=32)
    with torch.device("meta"):
        assert sum(plan.parameters(grouped).values()) == parameter_count(Phi1(grouped))


def test_flops_are_those_that_mfu_counts():
    config = load_recipe(RECIPES / "pretrain-phi1.toml")
    count, tokens = plan.parameters(config.model), 1024 * 2048
    for gpus in (1, 3, 8):
        flop = {part.name: part.flop * gpus for part in plan.work(config, gpus)}
        strict = flops_per_token(config.model, sum(count.values()), 2048) * tokens
        attention = strict - 6 * (sum(count.values()) - count["embedding"]) * tokens
        # Products alike; of attention a causal half, and of 2 + 5 products where MFU counts 2 + 4. Biases are not
        # products.
        found = flop["block matrices"] + flop["lm_head and loss"] + flop["attention"] * 12 / 7
        assert found == pytest.approx(strict, rel=1e-3) and flop["attention"] == pytest.approx(attention * 7 / 12)


def test_muons_flop_are_those_that_torch_counts(config):
    for changes in ({}, {"hidden_size": 64, "intermediate_size": 8}):  # the second with a w_out higher than wide
        config = change(config, algorithm="muon", **changes)
        model = Phi1(config.model)
        optimizer = make_optimizer(model, config.optimizer)
        for parameter in model.parameters():
            parameter.grad = torch.ones_like(parameter)
        with FlopCounterMode(display=False) as counter:
            optimizer.step()
        flop = {part.name: part.flop for part in plan.work(config, 2)}
        assert flop["Muon"] == counter.get_total_flops() > 0


def test_the_papers_run(capsys, tmp_path):
    recipe = str(RECIPES / "pretrain-phi1.toml")
    assert main(["plan", recipe, "--gpus", "8", "--device", "a100"]) == 0
    text = capsys.readouterr().out
    assert "1,418,270,720 parameters" in text and "75.5 billion in all" in text
    assert re.search(r"together +4\d\.\d+   of 80\n", text)
    days = float(re.search(r"at least ([\d.]+) days", text)[1])
    assert days > 36_000 * 1024 * 2048 * 8.8e9 / 8 / 312e12 / 86_400  # every product at the peak
    muon = tmp_path / "muon.toml"
    muon.write_text(pathlib.Path(recipe).read_text().replace("[optimizer]", '[optimizer]\nalgorithm = "muon"'))
    assert main(["plan", str(muon)]) == 0
    moments = (
        r"AdamW's moments, float32 +1\.68\n +Muon's momentum, float32 +4\.83\n"  # 8 x 210 million, 4 x 1,208 million
    )
    assert re.search(moments, capsys.readouterr().out) and "Muon" not in text
    assert main(["plan", recipe, "--device", "L4"]) == 0
    message = 'of 24: does not fit; lower --micro-batch, or set data_parallel = "fsdp2"'
    assert message in capsys.readouterr().out
    assert main(["plan", recipe, "--device", "L4", "--gpus", "1"]) == 0
    assert "of 24: does not fit; lower --micro-batch\n" in capsys.readouterr().out
    assert main(["plan", recipe, "--device", "mi300"]) == 0
    text = capsys.readouterr().out
    assert (
        "mi300: no data sheet here, so no days (known: a100, " in text and "seconds" not in text and "fit" not in text
    )
    sharded = tmp_path / "fsdp2.toml"
    sharded.write_text(pathlib.Path(recipe).read_text().replace("[train]", '[train]\ndata_parallel = "fsdp2"'))
    assert main(["plan", str(sharded), "--device", "L4"]) == 0
    text = capsys.readouterr().out
    # Of 1.4 billion parameters an eighth of each; and weights of 16 micro-batches' passes in bf16, gradients once, in
    # GB.
    assert re.search(r"shards of AdamW's moments, float32 +1\.42\n", text) and "lower --micro-batch\n" in text
    passes = 16 * (2 * 2 * 1_207_959_552 + 4 * (1_418_270_720 - 1_207_959_552)) + 4 * 1_418_270_720
    assert re.search(rf"weights from, gradients to the other GPUs +{passes * 7 / 8 / 1e9:.1f}\n", text)
    for words, why in ((["--gpus", "0"], "must be at least 1"), (["--gpus", "129"], "has 128 micro-batches only")):
        assert main(["plan", recipe, *words]) == 2
        assert why in capsys.readouterr().err
