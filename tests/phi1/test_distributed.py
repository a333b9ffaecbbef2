"""Processes that train together, devices, and the signals that stop them."""

import dataclasses
import os
import pathlib
import signal
import subprocess
import sys
import time

import pytest
import torch
from torch.distributed.run import get_args_parser
from training import DROPOUT, ROOT, change, environment, losses, records, write_recipe

from phi1 import checkpoint
from phi1.config import TrainConfig
from phi1.distributed import StopSignals, native_precision
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


def test_two_processes_give_the_same_losses(config, tmp_path, masked_tokens):
    """torchrun with gloo: the same micro-batches in two processes, dropout included, masks uneven."""
    config = change(config, steps=6, micro_batch=2, tokens=masked_tokens, validation_tokens=masked_tokens,
                    evaluation_sequences=11, checkpoint_every=4, **DROPOUT)  # fmt: skip
    one = train(config)
    recipe = write_recipe(tmp_path, config)
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2",
               ROOT / "phi1" / "train.py", recipe, "--run-folder", tmp_path / "two"]  # fmt: skip
    result = subprocess.run(command, cwd=tmp_path, env=environment(), capture_output=True, text=True)
    assert result.returncode == 0, result.stdout + result.stderr
    two = tmp_path / "two" / "step-000006"
    # Only the order of float32 additions differs; Adam turns that into 1e-6 of the parameters in a few steps.
    assert losses(tmp_path / "two") == pytest.approx(losses(config.train.run_folder), rel=2e-6)
    expected, found = (records(run)[-1]["validation_loss"] for run in (config.train.run_folder, tmp_path / "two"))
    assert found == pytest.approx(expected, rel=2e-6)
    (first, _), (second, _) = checkpoint.load_model(one), checkpoint.load_model(two)
    moved = max((a - b).abs().max().item() for a, b in zip(first.parameters(), second.parameters(), strict=True))
    assert moved < 1e-4  # a step moves each parameter by about lr = 3e-3
    assert result.stdout.count("step 6/6") == 1  # one process speaks


def test_no_thread_outlives_the_process_group(tmp_path):
    """One that runs on into the interpreter's exit may find it half gone: "terminate called without an active exception"."""
    script = tmp_path / "script.py"
    script.write_text(
        "import pathlib, torch\n"
        "from phi1.distributed import World\n"
        "def threads():\n"
        "    names = [path.read_text() for path in pathlib.Path('/proc/self/task').glob('*/comm')]\n"
        "    return sum('gloo' in name for name in names)\n"
        "def run():\n"
        "    with World('cpu'):\n"
        "        torch.nn.parallel.DistributedDataParallel(torch.nn.Linear(2, 2))\n"
        "        print('within', threads())\n"
        "run()\n"
        "print('after', threads())\n"
    )
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "1", script]
    result = subprocess.run(command, cwd=ROOT, env=environment(), capture_output=True, text=True)
    words = result.stdout.split()
    assert words[0] == "within" and int(words[1]) > 0, result.stderr
    assert words[2:] == ["after", "0"]


def test_stop_signals():
    before = signal.getsignal(signal.SIGTERM)
    with StopSignals() as signals:
        os.kill(os.getpid(), signal.SIGTERM)
        assert signals.received
        os.kill(os.getpid(), signal.SIGTERM)  # again, as torchrun may: nothing more
        with pytest.raises(KeyboardInterrupt):
            os.kill(os.getpid(), signal.SIGINT)
            time.sleep(1)
    assert signal.getsignal(signal.SIGTERM) is before
