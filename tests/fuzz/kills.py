"""Kills a small training at random moments until it was killed so often: `python tests/fuzz/kills.py [kills]
[processes] [seed]`.

A run is started again and again in its folder, each time with SIGKILL to all of its processes after a random time,
until it is done; then the next run begins, in another folder. Each must end with the weights, the optimizer's state and
the curve of one that was left alone, to the bit. More than one process share the model by FSDP2. Saves are often and
steps short, so that many of the moments fall into the writing of a checkpoint. Prints a line a kill, and ends with
status 1 at the first difference.
"""

import collections
import dataclasses
import itertools
import multiprocessing
import os
import pathlib
import random
import sys
import tempfile
import time

ROOT = pathlib.Path(__file__).resolve().parents[2]
sys.path[:0] = [str(ROOT), str(ROOT / "tests" / "phi1")]
os.environ["PYTHONPATH"] = f"{ROOT}:{ROOT / 'tests' / 'phi1'}"  # the processes' too

import torch.distributed as dist  # noqa: E402
import training  # noqa: E402

from phi1 import checkpoint  # noqa: E402
from phi1.config import DataConfig, LoopConfig, OptimizerConfig, TrainConfig  # noqa: E402
from phi1.tokenizer import train_tokenizer  # noqa: E402

STEPS = 60


def start(recipe: pathlib.Path, folder: pathlib.Path, output: pathlib.Path, size: int) -> tuple[list, object]:
    """The processes of a training in `folder`, and the store by which they meet."""
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["training"])
    store = dist.TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)
    words = [recipe, "--run-folder", folder]
    found = [
        context.Process(target=training._process, args=(rank, size, store.port, words, f"{output}-{rank}", 0))
        for rank in range(size)
    ]
    for process in found:
        process.start()
    return found, store


def main(kills: int = 50, size: int = 1, seed: int | None = None) -> int:
    seed = random.randrange(1 << 32) if seed is None else seed
    draw, count, runs = random.Random(seed), 0, 0
    at: collections.Counter[str] = collections.Counter()
    print(f"seed {seed}", flush=True)
    with tempfile.TemporaryDirectory() as temporary:
        base = pathlib.Path(temporary)
        texts = [f"def f{i % 7}(x):\n    return x + {i % 10}\n" for i in range(300)]
        tokens = training.write(base / "tokens", train_tokenizer(texts, 320), texts)
        config = TrainConfig(
            dataclasses.replace(training.MODEL, **training.DROPOUT),
            DataConfig(tokens, sequence_length=32),
            LoopConfig(
                base / "whole",
                steps=STEPS,
                sequences_per_step=8,
                micro_batch=2,
                precision="fp32",
                device="cpu",
                tune=False,
                data_parallel="fsdp2",
                checkpoint_every=2,
                keep_last=3,
            ),
            OptimizerConfig(lr=3e-3, warmup_steps=2),
        )
        recipe = training.write_recipe(base, config)
        began = time.monotonic()
        processes, _ = start(recipe, base / "whole", base / "output", size)
        for process in processes:
            process.join()
            assert process.exitcode == 0, (base / "output-0").read_text()
        whole, seconds = base / "whole", time.monotonic() - began
        print(f"left alone: {seconds:.1f} s", flush=True)
        while count < kills:
            runs += 1
            run = base / f"run-{runs}"
            for life in itertools.count():
                processes, _store = start(recipe, run, base / f"output-{runs}-{life}", size)
                began = time.monotonic()
                deadline = began + (draw.uniform(0, seconds) if count < kills else 1e6)
                while time.monotonic() < deadline and any(process.is_alive() for process in processes):
                    time.sleep(0.002)
                killed = any(process.is_alive() for process in processes)
                for process in processes:
                    process.kill()
                for process in processes:
                    process.join()
                if not killed:
                    bad = [p.exitcode for p in processes if p.exitcode]
                    assert not bad, (base / f"output-{runs}-{life}-0").read_text()
                    if life == 0:
                        seconds = min(seconds, time.monotonic() - began)
                    break
                count += 1
                steps = [checkpoint.step_of(path) for path in checkpoint.in_run(run)] if run.exists() else []
                torn = len(list(run.glob("*.tmp*")))
                at["while a checkpoint was written" if torn else "in the start" if not steps else "else"] += 1
                print(
                    f"kill {count}: run {runs}, after step "
                    f"{max(steps, default=0)}{', a checkpoint was being written' * bool(torn)}",
                    flush=True,
                )
            same = training.content(run / f"step-{STEPS:06}") == training.content(whole / f"step-{STEPS:06}")
            numbers = [[(r["step"], r["loss"], r["grad_norm"]) for r in training.records(x)] for x in (run, whole)]
            print(f"run {runs}: {'the same bits' if same and numbers[0] == numbers[1] else 'DIFFERENT'}", flush=True)
            if not same or numbers[0] != numbers[1]:
                return 1
    print(f"{count} kills of {runs} runs of {size} process{'es' * (size > 1)}: {dict(at)}; the same bits in all")
    return 0


if __name__ == "__main__":
    sys.exit(main(*map(int, sys.argv[1:])))
