"""A training of seconds for the tests of the trainer, and what it wrote."""

import contextlib
import dataclasses
import faulthandler
import json
import multiprocessing
import os
import pathlib
import signal
import sys
import time

import pytest
import torch
import torch.distributed as dist

from phi1 import checkpoint
from phi1.cli import main
from phi1.config import ModelConfig
from phi1.distributed import StopSignals, World
from phi1.model import Phi1
from phi1.run import opened
from phi1.tokens import TokenWriter
from phi1.train import Trainer

ROOT = pathlib.Path(__file__).parents[2]
MODEL = ModelConfig(
    vocab_size=320,
    hidden_size=32,
    intermediate_size=64,
    num_layers=2,
    num_heads=2,
    num_kv_heads=2,
    head_dim=16,
    rotary_dim=8,
    max_positions=64,
)
TINY = {"sequence_length": 8, "sequences_per_step": 4, "micro_batch": 2}
"""For what is slow on a CPU: fp16, and whole processes."""
DROPOUT = {"attention_dropout": 0.1, "residual_dropout": 0.1}


def write(folder, tokenizer, texts, masked=False):
    writer = TokenWriter(folder, tokenizer, masked=masked, identity={})
    encoded = tokenizer.encode_batch(texts)
    # With a mask, every document counts a different share of its tokens, some nothing but the end token.
    masks = [[int(j >= len(ids) - i % 6) for j in range(len(ids))] if masked else None for i, ids in enumerate(encoded)]
    writer.write(0, zip(encoded, masks, strict=True))
    return writer.finish(1).folder


def change(config, **changes):
    """config with fields changed by their flat names, as on the command line."""
    for table in dataclasses.fields(config):
        mine = {f.name: changes.pop(f.name) for f in dataclasses.fields(table.type) if f.name in changes}
        config = dataclasses.replace(config, **{table.name: dataclasses.replace(getattr(config, table.name), **mine)})
    assert not changes, changes
    return config


@contextlib.contextmanager
def trainer_of(config):
    """A trainer that has not begun."""
    with World(config.train.device) as world, opened(config, world) as run:
        yield Trainer(run, StopSignals())


def records(run):
    return [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]


def losses(run):
    return [record["loss"] for record in records(run) if "loss" in record]


def same_run(one, other):
    """Two runs alike. Only the order of float32 additions differs; Adam turns that into 1e-6 of the parameters in a few
    steps.
    """
    assert losses(other) == pytest.approx(losses(one), rel=2e-6)
    norms = [[record.get("grad_norm", 0.0) for record in records(run) if "loss" in record] for run in (one, other)]
    assert norms[1] == pytest.approx(norms[0], rel=1e-5)  # Adam hides a gradient of the wrong size, this does not
    expected, found = (records(run)[-1]["validation_loss"] for run in (one, other))
    assert found == pytest.approx(expected, rel=2e-6)
    first, second = (checkpoint.load_model(run)[0].parameters() for run in (one, other))
    moved = max((a - b).abs().max().item() for a, b in zip(first, second, strict=True))
    assert moved < 1e-4  # a step moves each parameter by about lr = 3e-3


def content(folder):
    return {name: (folder / name).read_bytes() for name in ("model.safetensors", "optimizer.safetensors")}


def environment():
    return os.environ | {"OMP_NUM_THREADS": "1"}


def _signal_in(passes):
    """Has this process send itself SIGTERM in that forward pass of the model."""
    real, left = Phi1.forward, [passes]

    def forward(self, *arguments, **options):
        left[0] -= 1
        if left[0] == 0:
            signal.raise_signal(signal.SIGTERM)
        return real(self, *arguments, **options)

    Phi1.forward = forward


def _process(rank, size, port, arguments, output, passes):
    with open(output, "wb") as file:
        os.dup2(file.fileno(), 1), os.dup2(file.fileno(), 2)
    os.environ.update(
        RANK=str(rank),
        LOCAL_RANK=str(rank),
        WORLD_SIZE=str(size),
        MASTER_ADDR="127.0.0.1",
        MASTER_PORT=str(port),
        TORCHELASTIC_USE_AGENT_STORE="True",
    )
    torch.set_num_threads(1)
    faulthandler.dump_traceback_later(200, exit=True)  # says where, should it hang
    if passes:
        _signal_in(passes)
    sys.exit(main(["train", *map(str, arguments)]))


def processes(folder, *arguments, stopped=None):
    """Runs `phi1 train` in as many processes as there are lists of arguments, as torchrun would; each one's status and
    output.

    stopped: (a rank, its forward pass in which it gets SIGTERM).
    """
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["phi1.train"])  # imported once, not in each process
    store = dist.TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)
    outputs = [folder / f"output-{rank}-{time.monotonic_ns()}" for rank in range(len(arguments))]
    started = [
        context.Process(
            target=_process,
            args=(rank, len(arguments), store.port, words, output, stopped[1] if stopped and stopped[0] == rank else 0),
        )
        for rank, (words, output) in enumerate(zip(arguments, outputs, strict=True))
    ]
    for process in started:
        process.start()
    try:
        deadline = time.monotonic() + 240
        for process in started:
            process.join(max(0, deadline - time.monotonic()))
        return [(process.exitcode, output.read_text()) for process, output in zip(started, outputs, strict=True)]
    finally:
        for process in started:
            process.kill()


def write_recipe(folder, config):
    lines = []
    for table in dataclasses.fields(config):
        lines.append(f"[{table.name}]")
        for field in dataclasses.fields(table.type):
            value = getattr(getattr(config, table.name), field.name)
            if isinstance(value, dict):
                entries = (f"{json.dumps(name)} = {json.dumps(entry, default=str)}" for name, entry in value.items())
                lines.append(f"{field.name} = {{ {', '.join(entries)} }}")
            elif value is not None:
                lines.append(f"{field.name} = {json.dumps(value, default=str)}")
    path = folder / "recipe.toml"
    path.write_text("\n".join(lines))
    return path
