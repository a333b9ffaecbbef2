"""What a training run says while it runs: metrics.jsonl, TensorBoard, the progress line, and MFU."""

import importlib
import json
import math
import os
import pathlib
import re
import resource
import time
from collections.abc import Callable
from typing import Any

import torch

from phi1.config import ModelConfig, TrainConfig
from phi1.errors import UserError
from phi1.files import atomic_write, set_aside
from phi1.model import Phi1

METRICS = "metrics.jsonl"
VALIDATION = "validation_loss"

# Peak dense bf16 (and fp16) FLOP/s with fp32 accumulation, from NVIDIA's data sheets: half of the figures that
# are given "with sparsity". The first pattern found in the device's name counts; a part of one (MIG) is not in it.
_PEAKS = {
    r"H100 PCIe": 756e12,
    r"H[12]00 NVL": 835e12,
    r"H100|H200": 989e12,
    r"\bB200": 2250e12,
    r"A100": 312e12,
    r"L40S": 362e12,
    r"L4\b": 121e12,
}


class Metrics:
    """One JSON object a line in <run>/metrics.jsonl and, if asked for, the same numbers in TensorBoard and a tracker.

    tracker: "trackio" or "wandb", which have the same interface; recipe: what they show as the run's configuration.

    step: the step that training goes on from. Later lines, of steps that will be done again, are dropped, and so is a
    last one that was cut off. Other lines that are no record are left out too, and said; the file that had them is
    kept.

    A step's line has its loss (left out if it is not finite), lr, grad_norm, counted_tokens, tokens, seconds, of these
    data_seconds waiting for data, checkpoint_seconds that training stood still before it for a checkpoint if there was
    one, memory (`peak_memory`), and mfu where the device's peak is known, all as rank 0 has them; where several sets
    are mixed "sequences/NAME", how many each gave; after trouble (phi1/trouble.py) also "trouble", in words,
    "sequences", the indices that `Mixture.batch` takes, and "skipped" if the step changed nothing. A validation loss
    has a line of its own, under the name that `validation_loss` gives; it is null if it is not finite.
    """

    def __init__(
        self,
        run: pathlib.Path,
        step: int,
        *,
        tensorboard: bool = False,
        tracker: str | None = None,
        recipe: dict[str, Any] | None = None,
    ) -> None:
        path = run / METRICS
        kept, damaged = [], []
        self.validated: dict[str, int] = {}
        """Of each validation loss the last step that has it."""
        lines = path.read_bytes().split(b"\n")[:-1] if path.exists() else []
        for number, line in enumerate(lines, 1):
            try:
                record = json.loads(line)
                its_step = int(record["step"])
            except (ValueError, KeyError, TypeError):
                damaged.append(number)
                continue
            if its_step <= step:
                kept.append(line + b"\n")
                self.validated |= {name: its_step for name in record if name.startswith(VALIDATION)}
        if damaged:
            which = (
                f"lines {', '.join(map(str, damaged))} are no records"
                if damaged[1:]
                else f"line {damaged[0]} is no record"
            )
            print(f"{path}: {which} and left out; the file as it was is {set_aside(path)}", flush=True)
        with atomic_write(path) as file:
            file.writelines(kept)
        self._file = open(path, "a", encoding="utf-8")  # noqa: SIM115, closed by close()
        self._board: Any = None
        if tensorboard:
            try:
                from torch.utils.tensorboard import SummaryWriter
            except ImportError as error:
                raise UserError("tensorboard is not installed: `pip install tensorboard`, or leave it off") from error
            self._board = SummaryWriter(str(run / "tensorboard"), purge_step=step + 1)
        self._tracker: Any = None
        if tracker is not None:
            # A run of theirs cannot take a step back, as one that goes on from a checkpoint does: each start is one.
            try:
                module = importlib.import_module(tracker)
                module.init(project="phi1", name=f"{run.name}-from-{step}", group=run.name, config=recipe)
            except ImportError as error:
                raise UserError(
                    f"{tracker} is not installed: `pip install {tracker}`, or leave --tracker out"
                ) from error
            except Exception as error:  # no account, no network, …: each has classes of its own
                raise UserError(f"--tracker {tracker} cannot start: {error}; mend that, or leave it out") from error
            self._tracker = module

    def record(self, step: int, **values: Any) -> None:
        """Appends {"step": step, **values}, null for a number that is not finite, which JSON does not have; numbers go
        to TensorBoard and the tracker too.
        """
        for name, value in values.items():
            if isinstance(value, float) and not math.isfinite(value):
                values[name] = None
        self._file.write(json.dumps({"step": step, **values}) + "\n")
        self._file.flush()
        numbers = {name: value for name, value in values.items() if isinstance(value, (int, float))}
        if self._board is not None:
            for name, value in numbers.items():
                self._board.add_scalar(name, value, step)
        if self._tracker is not None:
            self._tracker.log(numbers, step=step)

    def sync(self) -> None:
        """Makes what was recorded survive a crash of the machine (called with each checkpoint)."""
        os.fsync(self._file.fileno())

    def close(self) -> None:
        """Closes the files."""
        self._file.close()
        if self._board is not None:
            self._board.close()
        if self._tracker is not None:
            self._tracker.finish()


class StepLine:
    """The line every `log_every` steps: means since the one before, in steps alone (no evaluation or checkpoint).

    first: the step that training goes on from. load: FLOPs of a token / peak FLOP/s of all devices, so that MFU is load
    * tokens/s; None: the peak is not known, and there is no MFU.
    """

    def __init__(self, config: TrainConfig, first: int, load: float | None, say: Callable[[str], None]) -> None:
        self._config, self._first, self._load, self._say = config.train, first, load, say
        self._tokens = config.train.sequences_per_step * config.data.sequence_length
        self._started = time.monotonic()
        self._losses: list[float] = []
        self._steps, self._seconds, self._waited = 0, 0.0, 0.0

    def mfu(self, steps: int, seconds: float) -> dict[str, float]:
        """{"mfu": …} of so many steps in so many seconds, or nothing."""
        return {} if self._load is None else {"mfu": self._load * steps * self._tokens / seconds}

    def add(self, step: int, facts: dict[str, Any]) -> None:
        """Takes what metrics.jsonl says of a step, and says a line if it is time; trouble is said at once."""
        self._steps, self._seconds = self._steps + 1, self._seconds + facts["seconds"]
        self._waited += facts["data_seconds"]
        self._losses += [facts["loss"]] if "loss" in facts else []
        if "trouble" in facts:
            self._say(f"step {step:,}  {facts['trouble']}{'; the step is skipped' if facts.get('skipped') else ''}")
        steps = self._config.steps
        if step != steps and step % self._config.log_every:
            return
        loss = sum(self._losses) / len(self._losses) if self._losses else math.nan
        rate = self._steps * self._tokens / self._seconds
        mfu = "".join(f"MFU {100 * value:.1f}%  " for value in self.mfu(self._steps, self._seconds).values())
        eta = (time.monotonic() - self._started) / (step - self._first) * (steps - step)
        self._say(
            f"step {step:,}/{steps:,}  loss {loss:.4f}  lr {facts['lr']:.2e}  "
            f"grad {facts.get('grad_norm', math.inf):.3f}  {rate:,.0f} tokens/s  "
            f"{mfu}data {self._waited / self._seconds:.1%}  ETA {duration(eta)}"
        )
        self._losses, self._steps, self._seconds, self._waited = [], 0, 0.0, 0.0


def validation_loss(name: str) -> str:
    """What the loss of a held-out set is called, with a set's name or without ("")."""
    return f"{VALIDATION}/{name}" if name else VALIDATION


def parameter_count(model: Phi1) -> int:
    """Elements of all parameters, as `PhiForCausalLM` has them."""
    return sum(parameter.numel() for parameter in model.parameters())


def flops_per_token(config: ModelConfig, parameters: int, length: int) -> int:
    """Strict training FLOPs per token, forward and backward.

    6 per parameter (2 forward, 4 backward) without the input embedding, which is a look-up; and for attention
    12 * layers * attention width * length: QK^T and PV over the full square (PaLM, appendix B).
    """
    products = 6 * (parameters - config.vocab_size * config.hidden_size)
    return products + 12 * config.num_layers * config.attention_width * length


def peak_flops(device: torch.device, dtype: torch.dtype) -> float | None:
    """A device's peak FLOP/s in bf16 or fp16 by its maker's data sheet; None where that is not known here."""
    if device.type == "cuda" and dtype != torch.float32:
        name = torch.cuda.get_device_name(device)
        return next((peak for pattern, peak in _PEAKS.items() if re.search(pattern, name) and "MIG" not in name), None)
    return None


def peak_memory(device: torch.device) -> int:
    """The most bytes that this process has held so far: of a GPU's memory in tensors, else of the machine's."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    return 1024 * resource.getrusage(resource.RUSAGE_SELF).ru_maxrss  # kB on Linux


def duration(seconds: float) -> str:
    """90061 -> "25 h 01 m", 61 -> "1 m 01 s"."""
    minutes, seconds_left = divmod(int(seconds), 60)
    hours, minutes_left = divmod(minutes, 60)
    if hours:
        return f"{hours} h {minutes_left:02d} m"
    return f"{minutes_left} m {seconds_left:02d} s"
