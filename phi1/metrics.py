"""What a training run says while it runs: metrics.jsonl, TensorBoard, the progress line, and MFU."""

import json
import os
import pathlib
import re
import time
from typing import Any

import torch

from phi1.config import ModelConfig
from phi1.errors import UserError
from phi1.files import atomic_write
from phi1.model import Phi1

METRICS = "metrics.jsonl"

# Peak dense bf16 (and fp16) FLOP/s with fp32 accumulation, from NVIDIA's data sheets: half of the figures that
# are given "with sparsity". The first pattern found in the device's name counts.
_PEAKS = {
    r"H100 PCIe": 756e12,
    r"H100 NVL": 835e12,
    r"H100|H200|GH200": 989e12,
    r"B200": 2250e12,
    r"A100": 312e12,
    r"L40S": 362e12,
    r"L4\b": 121e12,
}


class Metrics:
    """One JSON object a line in <run>/metrics.jsonl and, if asked for, the same numbers in TensorBoard.

    step: the step that training goes on from. Later lines, of steps that will be done again, are dropped.
    """

    def __init__(self, run: pathlib.Path, step: int, tensorboard: bool) -> None:
        path = run / METRICS
        lines = path.read_text(encoding="utf-8").splitlines(keepends=True) if path.exists() else []
        kept = [line for line in lines if line.endswith("\n") and json.loads(line)["step"] <= step]
        with atomic_write(path, "w") as file:
            file.writelines(kept)
        self._file = open(path, "a", encoding="utf-8")  # noqa: SIM115, closed by close()
        self._board: Any = None
        if tensorboard:
            try:
                from torch.utils.tensorboard import SummaryWriter
            except ImportError as error:
                raise UserError("tensorboard is not installed: `pip install tensorboard`, or leave it off") from error
            self._board = SummaryWriter(str(run / "tensorboard"), purge_step=step + 1)

    def record(self, step: int, **values: Any) -> None:
        """Appends {"step": step, **values}; numbers go to TensorBoard too (None, a number that is not finite, does not)."""
        self._file.write(json.dumps({"step": step, **values}) + "\n")
        self._file.flush()
        if self._board is not None:
            for name, value in values.items():
                if value is not None:
                    self._board.add_scalar(name, value, step)

    def sync(self) -> None:
        """Makes what was recorded survive a crash of the machine (called with each checkpoint)."""
        os.fsync(self._file.fileno())

    def close(self) -> None:
        """Closes the files."""
        self._file.close()
        if self._board is not None:
            self._board.close()


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


def peak_flops(device: torch.device, dtype: torch.dtype) -> tuple[float, str]:
    """A device's peak FLOP/s in `dtype` and where the figure is from.

    Data sheets for known GPUs in bf16 and fp16; otherwise the best of a few matrix products, timed here.
    """
    if device.type == "cuda" and dtype != torch.float32:
        name = torch.cuda.get_device_name(device)
        for pattern, peak in _PEAKS.items():
            if re.search(pattern, name):
                return peak, f"data sheet of {name}, dense {str(dtype).removeprefix('torch.')}"
    size = 1024 if device.type == "cpu" else 8192
    a = torch.randn(size, size, device=device).to(dtype)
    best, started = float("inf"), time.perf_counter()
    for _ in range(50):
        begun = time.perf_counter()
        (a @ a.T)[0, 0].item()  # .item() waits for the device; transposed as in a linear layer
        best = min(best, time.perf_counter() - begun)
        if time.perf_counter() - started > 0.5:
            break
    return 2 * size**3 / best, f"measured: {size} x {size} matrix product in {str(dtype).removeprefix('torch.')}"


def duration(seconds: float) -> str:
    """90061 -> "25 h 01 m", 61 -> "1 m 01 s"."""
    minutes, seconds_left = divmod(int(seconds), 60)
    hours, minutes_left = divmod(minutes, 60)
    if hours:
        return f"{hours} h {minutes_left:02d} m"
    return f"{minutes_left} m {seconds_left:02d} s"
