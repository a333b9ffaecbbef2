"""The processes that train together, their devices, and the signals that tell them to stop."""

import importlib
import os
import pathlib
import signal
import threading
from collections.abc import Callable
from typing import Any

import torch
import torch.distributed as dist

from phi1.errors import UserError


class World:
    """The processes that train together: one, or those that torchrun started."""

    def __init__(self, device: str) -> None:
        self.distributed = "RANK" in os.environ and "WORLD_SIZE" in os.environ
        self.rank = int(os.environ["RANK"]) if self.distributed else 0
        self.size = int(os.environ["WORLD_SIZE"]) if self.distributed else 1
        if device == "auto":
            device = "cuda" if torch.cuda.is_available() else "cpu"
        try:
            self.device = torch.device(device)
        except RuntimeError as error:
            raise UserError(f"train.device = {device!r}: must be auto, cpu, cuda or cuda:N") from error
        if self.device.type not in ("cpu", "cuda"):
            raise UserError(f"train.device = {device!r}: must be auto, cpu, cuda or cuda:N")
        if self.device.type == "cuda":
            if not torch.cuda.is_available():
                raise UserError(f"train.device = {device!r}: no GPU that torch can use here; choose auto or cpu")
            index = self.device.index if self.device.index is not None else int(os.environ.get("LOCAL_RANK", 0))
            if index >= torch.cuda.device_count():
                raise UserError(
                    f"cuda:{index}: this machine has {torch.cuda.device_count()} GPUs; start fewer processes"
                )
            self.device = torch.device("cuda", index)
            torch.cuda.set_device(self.device)

    def __enter__(self) -> "World":
        if self.distributed:
            # DistributedDataParallel imports this module. Imported while there is a process group, it keeps it, as a default
            # argument, and gloo's threads would run on after destroy_process_group, into the interpreter's exit.
            importlib.import_module("torch.distributed.nn.functional")
            dist.init_process_group("nccl" if self.device.type == "cuda" else "gloo")
        return self

    def __exit__(self, *error: object) -> None:
        if self.distributed:
            dist.destroy_process_group()

    def sum(self, *values: float) -> list[float]:
        """Each value summed over the processes, in float64."""
        tensor = torch.tensor(values, dtype=torch.float64, device=self.device)
        if self.distributed:
            dist.all_reduce(tensor)
        return tensor.tolist()

    def on_first(self, action: Callable[[], Any]) -> None:
        """Runs `action` on rank 0 while the others wait. Its UserError ends every process, and is said once."""
        failure: list[UserError | None] = [None]
        if self.rank == 0:
            try:
                action()
            except UserError as error:
                failure = [error]
        if self.distributed:
            dist.broadcast_object_list(failure, src=0, device=self.device)
        if failure[0] is not None:
            self.fail(str(failure[0]))

    def fail(self, message: str) -> None:
        """Ends every process with one message; all of them must call this."""
        if self.rank == 0:
            raise UserError(message)
        raise SystemExit(2)

    def say(self, line: str) -> None:
        """Prints a line, once."""
        if self.rank == 0:
            print(line, flush=True)


def native_precision(device: torch.device) -> str:
    """The fastest precision that a device has instructions for: bf16, or without it fp16 (GPU) or fp32 (CPU)."""
    if device.type == "cuda":
        return "bf16" if torch.cuda.is_bf16_supported(including_emulation=False) else "fp16"
    cpuinfo = pathlib.Path("/proc/cpuinfo")  # the flags' names on x86 and, the last one, on Arm
    flags = cpuinfo.read_text(encoding="utf-8").split() if cpuinfo.exists() else []
    return "bf16" if {"avx512_bf16", "amx_bf16", "bf16"} & set(flags) else "fp32"


class StopSignals:
    """Within the block, Ctrl-C and SIGTERM are noted in `received`; a second Ctrl-C stops at once."""

    def __init__(self) -> None:
        self.received = False
        self._before: dict[int, Any] = {}

    def __enter__(self) -> "StopSignals":
        if threading.current_thread() is threading.main_thread():  # only there may handlers be set
            for number in (signal.SIGINT, signal.SIGTERM):
                self._before[number] = signal.signal(number, self._handle)
        return self

    def __exit__(self, *error: object) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)

    def _handle(self, number: int, frame: object) -> None:
        if self.received and number == signal.SIGINT:
            raise KeyboardInterrupt
        self.received = True
        os.write(2, b"\nstopping after this step and its checkpoint (Ctrl-C again: at once)\n")
