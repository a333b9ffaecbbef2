"""Processes that train together, devices, and the signals that stop them."""

import dataclasses
import errno
import json
import os
import pathlib
import re
import shutil
import signal
import socket
import subprocess
import sys
import time

import numpy as np
import pytest
import torch
from torch.distributed.run import get_args_parser
from training import (
    DROPOUT,
    ROOT,
    TINY,
    change,
    content,
    environment,
    losses,
    processes,
    records,
    same_run,
    write,
    write_recipe,
)

from phi1 import checkpoint
from phi1.config import TrainConfig
from phi1.distributed import StopSignals, World, native_precision
from phi1.errors import Interrupted, UserError
from phi1.files import sha256_file, write_json
from phi1.tokens import TokenDataset
from phi1.train import train

pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.mark.parametrize(("flags", "precision"), [("avx2 avx512f", "fp32"), ("avx512_bf16 avx2", "bf16")])
def test_automatic_precision_is_what_the_device_has_instructions_for(config, monkeypatch, capsys, flags, precision):
    monkeypatch.setattr(pathlib.Path, "read_text", lambda self, encoding: f"flags : fpu {flags}\n")
    assert native_precision(torch.device("cpu")) == precision
    monkeypatch.undo()
    monkeypatch.setattr("phi1.run.native_precision", lambda device: precision)
    train(change(config, steps=1, precision="auto"))
    assert f"{precision} on 1 x CPU" in capsys.readouterr().out
    assert native_precision(torch.device("cpu")) in ("bf16", "fp32")  # whatever this machine is


def test_torchrun_leaves_our_options_alone():
    """torchrun takes a prefix of one of its own options for that option, even behind the script's name."""
    theirs = get_args_parser()._option_string_actions
    for table in dataclasses.fields(TrainConfig):
        for field in dataclasses.fields(table.type):
            flag = f"--{field.name.replace('_', '-')}"
            assert not [option for option in theirs if option.startswith(flag)], flag


def test_any_number_of_processes_gives_the_same_losses(config, tmp_path, masked_tokens, tokens):
    """gloo: dropout included, two sets mixed, masks uneven; micro-batches of 2, 2, 2, 2 and 1, of which some process
    has one less. And a run goes on with another number of processes.
    """
    config = change(
        config,
        steps=6,
        sequences_per_step=9,
        micro_batch=2,
        tokens={"a": masked_tokens, "b": tokens},
        weights={"a": 2.5, "b": 1.0},
        validation_tokens=masked_tokens,
        evaluation_sequences=11,
        checkpoint_every=4,
        **DROPOUT,
    )
    train(config)
    recipe = write_recipe(tmp_path, config)
    for size in (2, 3):
        run = tmp_path / str(size)
        found = processes(tmp_path, *[[recipe, "--run-folder", run]] * size)
        assert [status for status, _ in found] == [0] * size, found
        same_run(config.train.run_folder, run)
        assert [said.count("step 6/6") for _, said in found] == [1] + [0] * (size - 1)  # one process speaks
    shutil.rmtree(run / "step-000006")
    assert [status for status, _ in processes(tmp_path, *[[recipe, "--run-folder", run]] * 2)] == [0, 0]
    same_run(config.train.run_folder, run)


@pytest.mark.parametrize("data_parallel", ["ddp", "fsdp2"])
def test_in_fp16_processes_overflow_where_one_does(config, tmp_path, data_parallel):
    """The loss scale falls by halves: were the scale that gradients see twice as large, one more step would be skipped."""
    config = change(config, precision="fp16", loss_scale=1e6, data_parallel=data_parallel, **TINY)
    train(config)
    recipe, run = write_recipe(tmp_path, config), tmp_path / "two"
    found = processes(tmp_path, *[[recipe, "--run-folder", run]] * 2)
    assert [status for status, _ in found] == [0, 0], found
    alone, two = records(config.train.run_folder), records(run)
    assert [r["skipped"] for r in two] == [r["skipped"] for r in alone]
    assert 0 < sum(r["skipped"] for r in alone) < 8
    assert [r["loss_scale"] for r in two] == [r["loss_scale"] for r in alone]
    norms = [[r["grad_norm"] for r in run if not r["skipped"]] for run in (alone, two)]
    assert norms[1] == pytest.approx(norms[0], rel=1e-2)  # fp16's rounding, in another order


def test_under_torchrun(config, tmp_path):
    """As a module; and what torchrun does with a signal: it passes it on, waits, and ends with 1."""
    config = change(config, steps=100_000, checkpoint_every=100_000, **TINY)
    recipe, run = write_recipe(tmp_path, config), config.train.run_folder
    command = [
        sys.executable,
        "-m",
        "torch.distributed.run",
        "--standalone",
        "--nproc-per-node",
        "2",
        "--signals-to-handle",
        "SIGTERM,SIGUSR1",
        "--shutdown-timeout",
        "300",
        "-m",
        "phi1",
        "train",
        recipe,
    ]
    environ = environment() | {"PYTHONPATH": str(ROOT)}
    process = subprocess.Popen(
        command, cwd=tmp_path, env=environ, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
    )
    until(
        lambda: (run / "metrics.jsonl").exists() and len((run / "metrics.jsonl").read_bytes().splitlines()) > 3, process
    )
    process.send_signal(signal.SIGUSR1)
    said, _ = process.communicate(timeout=300)
    assert process.returncode == 1
    step = checkpoint.read_facts(checkpoint.resolve(run))["step"]
    assert f"stopped by SIGUSR1 at step {step:,}" in said and len(losses(run)) == step > 3


WHOLE = {"RANK": "1", "WORLD_SIZE": "2", "LOCAL_RANK": "1", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "29500"}


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"WORLD_SIZE": None}, "WORLD_SIZE: not in the environment, which has others of RANK"),
        ({"RANK": None}, "RANK: not in the environment"),
        ({"RANK": ""}, "RANK: not in the environment"),
        ({"MASTER_ADDR": None, "MASTER_PORT": None}, "MASTER_ADDR, MASTER_PORT: not in the environment"),
        ({"MASTER_PORT": "abc"}, "MASTER_PORT = 'abc' in the environment: must be an integer from 0 to 65535"),
        ({"RANK": "3"}, "RANK = '3' in the environment: must be an integer from 0 to 1"),
        ({"RANK": "-1"}, "RANK = '-1' in the environment: must be"),
        ({"WORLD_SIZE": "0"}, "WORLD_SIZE = '0' in the environment: must be an integer from 1 to"),
        (
            {"LOCAL_RANK": "x"},
            "LOCAL_RANK = 'x' in the environment: must be an integer from 0 to 1; start with torch",
        ),
    ],
)
def test_an_environment_that_is_half_set_is_named(monkeypatch, changes, message):
    for name, value in (WHOLE | changes).items():
        monkeypatch.delenv(name, raising=False) if value is None else monkeypatch.setenv(name, value)
    with pytest.raises(UserError, match=message):
        World("cpu")
    for name, value in WHOLE.items():
        monkeypatch.setenv(name, value)
    world = World("cpu")
    assert (world.distributed, world.rank, world.size, world.local_rank) == (True, 1, 2, 1)


def until(done, process):
    deadline = time.monotonic() + 300
    while not done():
        assert process.poll() is None and time.monotonic() < deadline
        time.sleep(0.01)


def refused(config, tmp_path, *options):
    """What two processes say that were started with the recipe and these options, and do not train."""
    recipe = write_recipe(tmp_path, config)
    found = processes(tmp_path, *[[recipe, *words] for words in options])
    assert [status for status, _ in found] == [2] * len(options), found
    lines = [line for _, said in found for line in said.splitlines() if "error" in line]
    assert len(lines) == 1 and not any("Traceback" in said for _, said in found)
    return lines[0]


def test_processes_that_would_not_train_the_same_are_refused(config, tmp_path, tokenizer, texts):
    """Run folders on disks that they do not share, other data, another recipe: one line, at once, and nothing is
    written.
    """
    config = change(config, steps=4, checkpoint_every=2, keep_last=1)
    first, second = tmp_path / "first", tmp_path / "second"
    for folder, steps in ((first, 4), (second, 2)):
        train(change(config, run_folder=folder, steps=steps))
    shutil.rmtree(tmp_path / "second" / "step-000002")
    before = (first / "metrics.jsonl").read_bytes()
    longer = change(config, steps=8)
    line = refused(longer, tmp_path, ["--run-folder", first], ["--run-folder", second])
    assert f"rank 1 on {socket.gethostname()} is not as rank 0" in line
    assert re.search(r"checkpoint = none at .*second/step-000004 there, step-000004 \([0-9a-f]{16}\) here", line)

    shutil.copytree(first / "step-000004", second / "step-000004")
    flip(second / "step-000004" / "checkpoint.json")
    line = refused(longer, tmp_path, ["--run-folder", first], ["--run-folder", second])
    assert re.search(r"checkpoint = step-000004 \(\w+\) there, step-000004 \(\w+\) here", line)

    shutil.rmtree(second / "step-000004")
    shutil.copytree(first / "step-000004", second / "step-000004")
    flip(second / "step-000004" / "optimizer.safetensors")  # which rank 1 does not hash
    line = refused(longer, tmp_path, ["--run-folder", first], ["--run-folder", second])
    assert "rank 1" in line and "what was loaded = bits that add up to" in line

    other = write(tmp_path / "other", tokenizer, texts[1:])
    line = refused(longer, tmp_path, ["--run-folder", first], ["--run-folder", first, "--tokens", other])
    assert re.search(r"rank 1 .*: data.tokens = a set with hash \w+ there, a set with hash \w+ here;", line)

    line = refused(longer, tmp_path, ["--run-folder", first], ["--run-folder", first, "--tokens", tmp_path / "none"])
    assert line.startswith(f"phi1: error: rank 1 on {socket.gethostname()}: {tmp_path / 'none'}: no token shards there")

    line = refused(longer, tmp_path, ["--run-folder", first], ["--run-folder", first, "--lr", "1", "--steps", "9"])
    assert "train.steps = 9 there, 8 here" in line and "optimizer.lr = 1.0 there, 0.003 here" in line
    assert (first / "metrics.jsonl").read_bytes() == before


def flip(path):
    content = bytearray(path.read_bytes())
    content[-9] ^= 1
    path.write_bytes(content)


def test_what_one_process_finds_wrong_ends_all_with_one_line(config, tmp_path, tokenizer, texts):
    """A shard with a token that is not in the vocabulary, read by one of two; on rank 0, a full disk."""
    folder = write(tmp_path / "tokens", tokenizer, texts)
    tokens = np.fromfile(folder / "00000.bin", "<u2")
    config = change(config, tokens=folder, sequences_per_step=2, micro_batch=1)
    order = TokenDataset(folder)
    tokens[order.start(5, 32, 0) + 3] = 999  # the second sequence of step 3, rank 1's
    tokens.tofile(folder / "00000.bin")
    manifest = json.loads((folder / "manifest.json").read_text())
    manifest["shards"][0]["sha256"] = sha256_file(folder / "00000.bin")
    write_json(folder / "manifest.json", manifest)
    line = refused(config, tmp_path, [], [])
    assert re.search(r"rank 1 on .*00000\.bin: corrupt shard \(token [\d,]+ is 999, of a vocabulary", line)
    assert len(losses(config.train.run_folder)) == 2
    assert checkpoint.verify(config.train.run_folder / "step-000002")["step"] == 2


def test_what_the_system_refuses_one_process_ends_all_with_one_line(config, tmp_path):
    """metrics.jsonl of rank 0 is a folder, a shard of rank 1 cannot be read: no process waits for another that is gone."""
    (config.train.run_folder / "metrics.jsonl").mkdir(parents=True)
    assert "metrics.jsonl: Is a directory; mend that" in refused(config, tmp_path, [], [])
    (config.train.run_folder / "metrics.jsonl").rmdir()
    tokens = tmp_path / "tokens"
    shutil.copytree(config.data.tokens, tokens)
    (tokens / "manifest.json").rename(tokens / "x")
    (tokens / "manifest.json").mkdir()
    line = refused(config, tmp_path, [], ["--tokens", tokens])
    assert re.search(r"rank 1 on .*Is a directory: .*tokens/manifest.json", line)


def test_a_signal_to_one_process_stops_all_after_the_micro_batch(config, tmp_path):
    """With status 75, after a checkpoint of the last whole step; going on gives the bits of a run that was not
    stopped.
    """
    config = change(config, steps=6, micro_batch=2, checkpoint_every=1000, **DROPOUT)
    recipe, run, whole = write_recipe(tmp_path, config), config.train.run_folder, tmp_path / "whole"
    found = processes(tmp_path, [recipe], [recipe], stopped=(1, 7))  # in the first of rank 1's two in step 4
    assert [status for status, _ in found] == [75, 75], found
    assert [path.name for path in checkpoint.in_run(run)] == ["step-000003"] and len(losses(run)) == 3
    assert "stopped by SIGTERM at step 3" in found[0][1]
    assert not any("Traceback" in said for _, said in found)
    for folder in (run, whole):
        assert [status for status, _ in processes(tmp_path, *[[recipe, "--run-folder", folder]] * 2)] == [0, 0]
    assert content(run / "step-000006") == content(whole / "step-000006")
    assert losses(run) == losses(whole)


def test_no_thread_outlives_the_process_group(tmp_path):
    """One that runs on into the interpreter's exit may find it half gone: "terminate called without an active
    exception".
    """
    script = tmp_path / "script.py"
    script.write_text(
        "import pathlib, torch\n"
        "from phi1.config import LoopConfig, ModelConfig\n"
        "from phi1.distributed import World\nfrom phi1.engine import Engine\n"
        "from phi1.model import Phi1\ndef threads():\n"
        "    names = [path.read_text() for path in pathlib.Path('/proc/self/task').glob('*/comm')]\n"
        "    return sum('gloo' in name for name in names)\n"
        "def step(world, data_parallel):\n    model = Phi1(ModelConfig(9, 8, 8, 1, 1, 1, 8, 4), torch.float32)\n"
        "    engine = Engine(model, world, LoopConfig(pathlib.Path(), data_parallel=data_parallel))\n"
        "    tokens = torch.zeros(1, 4, dtype=torch.long)\n"
        "    engine.network(tokens, targets=tokens).backward()\n"
        "    engine.clip_gradient(1.0)\nfor data_parallel in ('ddp', 'fsdp2'):\n"
        "    with World('cpu') as world:\n        step(world, data_parallel)\n"
        "        print('within', threads())\n    print('after', threads())\n"
    )
    alone = {"RANK": "0", "WORLD_SIZE": "1", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "0", "PYTHONPATH": str(ROOT)}
    result = subprocess.run([sys.executable, script], env=environment() | alone, capture_output=True, text=True)
    words = result.stdout.split()
    assert words[::2] == ["within", "after"] * 2, result.stderr
    assert int(words[1]) > 0 and int(words[5]) > 0 and words[3] == words[7] == "0"


def test_stop_signals(capfd):
    before = signal.getsignal(signal.SIGTERM)
    ignored = signal.signal(signal.SIGHUP, signal.SIG_IGN)
    try:
        with StopSignals() as signals:
            for number in (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1):
                with pytest.raises(Interrupted) as caught:
                    raised(number)  # before the loop there is nothing to finish
                assert caught.value.status == (130 if number == signal.SIGINT else 75)
            with signals.held():
                raised(signal.SIGHUP)  # as after nohup
                assert not signals.received
                raised(signal.SIGTERM)
                assert signals.received == signal.SIGTERM
                raised(signal.SIGTERM)  # again, as torchrun may: nothing more
                assert capfd.readouterr().err.count("stopping after this micro-batch") == 1
                with pytest.raises(KeyboardInterrupt) as caught:
                    raised(signal.SIGINT)
                assert not isinstance(caught.value, Interrupted)  # which would write a checkpoint
        assert signal.getsignal(signal.SIGTERM) is before
    finally:
        signal.signal(signal.SIGHUP, ignored)


def raised(number):
    signal.raise_signal(number)
    time.sleep(0)


def test_nobody_reads_the_progress(monkeypatch, capsys):
    """A run goes on when its reader has gone."""
    reader, writer = os.pipe()
    os.close(reader)
    with os.fdopen(writer, "w") as stdout:
        monkeypatch.setattr(sys, "stdout", stdout)
        for _ in range(3):
            World("cpu").say("step 1")
    assert capsys.readouterr().err.count("nobody reads the progress lines any more") == 1


def test_a_full_disk_under_the_log(monkeypatch, capsys):
    """Ends no run, and neither does one under stderr too."""
    for full_errors in (False, True):
        with open("/dev/full", "w") as stdout, open("/dev/full", "w", buffering=1) as stderr:
            with monkeypatch.context() as patch:
                patch.setattr(sys, "stdout", stdout)
                if full_errors:
                    patch.setattr(sys, "stderr", stderr)
                for _ in range(3):
                    World("cpu").say("step 1")
            os.dup2(os.open(os.devnull, os.O_WRONLY), stderr.fileno())  # it still holds what it could not write
        said = "the progress lines cannot be written any more (No space left on device); the run goes on"
        assert capsys.readouterr().err.count(said) == (not full_errors)


def test_a_signal_is_noted_whatever_stderr_is(monkeypatch):
    def full(descriptor, data):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    with StopSignals() as signals, signals.held(), monkeypatch.context() as patch:
        patch.setattr(os, "write", full)
        raised(signal.SIGTERM)
        assert signals.received == signal.SIGTERM
