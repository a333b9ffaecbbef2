"""The processes that train together, what they agree on, their devices, and the signals that tell them to stop."""

import contextlib
import gc
import importlib
import os
import pathlib
import pickle
import signal
import socket
import sys
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from typing import Any, NoReturn, TypeVar

import torch
import torch.distributed as dist
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.tensor import DTensor, distribute_tensor

from phi1.device import resolve
from phi1.errors import Interrupted, UserError

T = TypeVar("T")


class World:
    """The processes that train together: one, or those that torchrun started."""

    def __init__(self, device: str) -> None:
        self._mesh: DeviceMesh | None = None
        self.distributed = "RANK" in os.environ or "WORLD_SIZE" in os.environ
        self.rank, self.size, self.local_rank = _places() if self.distributed else (0, 1, 0)
        self.device = resolve(device, "train.device")
        if self.device.type == "cuda":
            index = self.device.index if self.device.index is not None else self.local_rank
            if index >= torch.cuda.device_count():
                raise UserError(
                    f"cuda:{index}: this machine has {torch.cuda.device_count()} GPUs; start fewer processes"
                )
            self.device = torch.device("cuda", index)
            torch.cuda.set_device(self.device)

    def __enter__(self) -> "World":
        if self.distributed:
            # DistributedDataParallel imports this module. Imported while there is a process group, it keeps it, as a
            # default argument, and gloo's threads would run on after destroy_process_group, into the interpreter's
            # exit.
            importlib.import_module("torch.distributed.nn.functional")
            dist.init_process_group("nccl" if self.device.type == "cuda" else "gloo")
        return self

    def __exit__(self, *error: object) -> None:
        if self.distributed:
            _settle()
            if self._mesh is not None:
                # Caches of DTensor keep it, cycles a sharded model, and both the process group.
                self._mesh._pg_registry.clear()
                gc.collect()
            dist.destroy_process_group()

    @property
    def mesh(self) -> DeviceMesh:
        """The processes, in one row, as DTensors want them."""
        if self._mesh is None:
            self._mesh = init_device_mesh(self.device.type, (self.size,))
        return self._mesh

    def sum(self, *values: float) -> list[float]:
        """Each value summed over the processes, in float64."""
        return self._reduce(values, dist.ReduceOp.SUM)

    def max(self, *values: float) -> list[float]:
        """The largest of each value over the processes."""
        return self._reduce(values, dist.ReduceOp.MAX)

    def _reduce(self, values: tuple[float, ...], operation: Any) -> list[float]:
        tensor = _kept(torch.tensor(values, dtype=torch.float64, device=self.device))
        if self.distributed:
            dist.all_reduce(tensor, op=operation)
        return tensor.tolist()

    def gather(self, value: T) -> list[T]:
        """Every process's value, which must be one that pickle takes, by rank."""
        if not self.distributed:
            return [value]
        message = bytearray(pickle.dumps(value))
        longest = int(self.max(len(message))[0])
        padded = bytearray(longest)  # pickle ignores what follows its end
        padded[: len(message)] = message
        mine = _kept(torch.frombuffer(padded, dtype=torch.uint8).to(self.device))
        everyones = [_kept(torch.empty_like(mine)) for _ in range(self.size)]
        dist.all_gather(everyones, mine)
        return [pickle.loads(tensor.cpu().numpy().tobytes()) for tensor in everyones]

    def first(self, action: Callable[[], T]) -> T:
        """What `action` returns on rank 0, which runs it while the others wait.

        Its UserError or OSError ends every process, and is said once.
        """
        result: Any = None
        error: Exception | None = None
        if self.rank == 0:
            try:
                result = action()
            except (UserError, OSError) as raised:
                error = raised
        result, failed = self.gather((result, error is not None))[0]
        if error is not None:
            raise error
        if failed:
            raise SystemExit(2)
        return result

    def each(self, action: Callable[[], T]) -> T:
        """What `action` returns, run by every process.

        A UserError or OSError of any ends every process, and is said once, with the rank whose it is unless all have
        the same.
        """
        error: Exception | None = None
        try:
            result = action()
        except (UserError, OSError) as raised:
            error = raised
        try:
            self.fail_any(None if error is None else str(error))
        except UserError:
            if isinstance(error, OSError):  # rank 0's own: what it is, is known to the caller
                raise error from None
            raise
        return result

    def fail_any(self, failure: str | None) -> None:
        """Ends every process if any of them has a `failure`; all of them must call this."""
        everywhere = self.gather((socket.gethostname(), failure))
        if failure is not None and {message for _, message in everywhere} == {failure}:
            self.fail(failure)
        for rank, (host, message) in enumerate(everywhere):
            if message is not None:
                self.fail(f"rank {rank} on {host}: {message}")

    def agree(self, facts: Mapping[str, object]) -> None:
        """Ends every process, with one line that says which differs and in what, unless all have the same `facts`."""
        everywhere = self.gather((socket.gethostname(), dict(facts)))
        (first_host, expected), differing = everywhere[0], []
        for rank, (host, theirs) in enumerate(everywhere):
            names = [name for name in {**expected, **theirs} if theirs.get(name) != expected.get(name)]
            if names:
                how = "; ".join(f"{name} = {theirs.get(name)} there, {expected.get(name)} here" for name in names)
                differing.append(f"rank {rank} on {host} is not as rank 0 on {first_host}: {how}")
        if differing:
            others = f" (and {len(differing) - 1} other ranks differ)" if len(differing) > 1 else ""
            self.fail(f"{differing[0]}{others}; start every process with the same recipe, data and run folder")

    def fail(self, message: str) -> NoReturn:
        """Ends every process with one message; all of them must call this."""
        if self.rank == 0:
            raise UserError(message)
        raise SystemExit(2)

    def say(self, line: str) -> None:
        """Prints a line, once. Training outlives whoever read it: a closed pipe, or a full disk under the log, is said
        on stderr, and nothing more.
        """
        if self.rank != 0:
            return
        try:
            print(line, flush=True)
        except OSError as error:
            os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
            what = (
                "nobody reads the progress lines any more"
                if isinstance(error, BrokenPipeError)
                else f"the progress lines cannot be written any more ({error.strerror})"
            )
            with contextlib.suppress(OSError):  # stderr may be the same file: then there is no one left to tell
                print(f"{what}; the run goes on, and metrics.jsonl has them", file=sys.stderr)


def _places() -> tuple[int, int, int]:
    """Rank, number of processes and rank on this machine, from the environment. UserError if it is half set: such a
    process would train alone without a word, or wait for others for ever.
    """
    missing = [name for name in ("RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT") if not os.environ.get(name)]
    if missing:
        raise UserError(
            f"{', '.join(missing)}: not in the environment, which has others of RANK, WORLD_SIZE, MASTER_ADDR and "
            "MASTER_PORT; start with torchrun, which sets all, or unset RANK and WORLD_SIZE to train in one process"
        )

    def integer(name: str, last: int, first: int = 0) -> int:
        text = os.environ.get(name, "0")
        if not (text.isascii() and text.isdigit() and first <= int(text) <= last):
            raise UserError(
                f"{name} = {text!r} in the environment: must be an integer from {first} to {last}; start with torchrun "
                "(which sets it), or unset RANK and WORLD_SIZE to train in one process"
            )
        return int(text)

    integer("MASTER_PORT", 65535)
    size = integer("WORLD_SIZE", 1 << 20, 1)
    return integer("RANK", size - 1), size, integer("LOCAL_RANK", size - 1)


def whole(tensor: torch.Tensor) -> torch.Tensor:
    """A tensor of which each process holds a shard, put together in every process, all of which must call this; any
    other tensor as it is.
    """
    return tensor.full_tensor() if isinstance(tensor, DTensor) else tensor


def sharded_like(tensor: torch.Tensor, like: torch.Tensor) -> torch.Tensor:
    """This process's shard of a tensor that every process has whole, cut and placed as `like` of the same shape is; as
    it is if `like` is not sharded, or if it has another shape (an optimizer's count of steps).
    """
    if not isinstance(like, DTensor) or tensor.shape != like.shape:
        return tensor
    return distribute_tensor(tensor.to(like.device), like.device_mesh, like.placements, src_data_rank=None)


_recent: list[torch.Tensor] = []


def _kept(tensor: torch.Tensor) -> torch.Tensor:
    """The tensor of a collective, noted for `_settle`."""
    _recent.append(tensor)
    del _recent[:-256]
    return tensor


def _settle() -> None:
    """Waits until gloo's threads have let go of the tensors of the last collectives, at most a second.

    They do so a little after a collective is done, for which they need Python's lock. The destructor of the process
    group waits for them with the lock held, for ever if it comes before: so hung one of four runs that failed right
    after a collective (torch 2.13, gdb's stacks). That they hold a tensor shows in its count of references.
    """
    deadline = time.monotonic() + 1.0
    for tensor in _recent:
        while sys.getrefcount(tensor) > 3 and time.monotonic() < deadline:  # the list's, this name's and the call's
            time.sleep(0.001)
    _recent.clear()
    time.sleep(0.1)  # and for tensors that are not noted here: DDP's, torch's own


def native_precision(device: torch.device) -> str:
    """The fastest precision that a device has instructions for: bf16, or without it fp16 (GPU) or fp32 (CPU)."""
    if device.type == "cuda":
        return "bf16" if torch.cuda.is_bf16_supported(including_emulation=False) else "fp16"
    cpuinfo = pathlib.Path("/proc/cpuinfo")  # the flags' names on x86 and, the last one, on Arm
    flags = cpuinfo.read_text(encoding="utf-8").split() if cpuinfo.exists() else []
    return "bf16" if {"avx512_bf16", "amx_bf16", "bf16"} & set(flags) else "fp32"


class StopSignals:
    """Within the block SIGINT (Ctrl-C), SIGTERM, SIGHUP and SIGUSR1 (Slurm's warning) raise Interrupted.

    While they are `held`, the last one is only noted in `received` (0: none), for the loop to act on; a second Ctrl-C
    still stops at once. One that the process was started to ignore (nohup) stays ignored.

    loud: say that one was received.
    """

    def __init__(self, *, loud: bool = True) -> None:
        self.received = 0
        self._loud, self._held = loud, False
        self._before: dict[int, Any] = {}

    def __enter__(self) -> "StopSignals":
        if threading.current_thread() is threading.main_thread():  # only there may handlers be set
            for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP, signal.SIGUSR1):
                if signal.getsignal(number) is not signal.SIG_IGN:
                    self._before[number] = signal.signal(number, self._handle)
        return self

    def __exit__(self, *error: object) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)

    @contextlib.contextmanager
    def held(self) -> Iterator[None]:
        """Within the block a signal is only noted."""
        self._held = True
        try:
            yield
        finally:
            self._held = False

    def _handle(self, number: int, frame: object) -> None:
        if not self._held:
            raise Interrupted(number)
        if self.received and number == signal.SIGINT:
            raise KeyboardInterrupt
        if self._loud and not self.received:
            with contextlib.suppress(OSError):  # a full disk under the log is no reason not to stop well
                os.write(2, b"\nstopping after this micro-batch, with a checkpoint (Ctrl-C again: at once)\n")
        self.received = number
