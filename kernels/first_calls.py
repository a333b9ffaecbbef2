"""First calls of versions on a GPU, in processes of their own, several at once, before `kernels.tune` measures.

A first call of a Triton kernel compiles its candidates, for seconds each; compilers may run side by side, timings may
not. What is compiled Triton keeps on disk, where the process that measures finds it. And a kernel that ends its
process, or leaves a CUDA context in which nothing runs any more, takes only such a process with it, and is named.
"""

import contextlib
import dataclasses
import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import IO

import torch

from kernels import registry
from kernels.tune_works import Shape, Work, candidates, failure, timer, works

Call = tuple[int, str]
"""(index of the work, version)."""

MOST_PROCESSES = 8
"""Each holds a work's tensors on the GPU."""


def calls(of: registry.Machine, todo: Sequence[Work]) -> dict[tuple[str, str], list[Call]]:
    """What has to be called, by (op, version): all but PyTorch's own."""
    found: dict[tuple[str, str], list[Call]] = {}
    for i, work in enumerate(todo):
        for version in candidates(of, work):
            if version != "torch":
                found.setdefault((work.cell.op, version), []).append((i, version))
    return found


def run(
    shape: Shape, device: torch.device, dtypes: Sequence[torch.dtype], groups: Iterable[Sequence[Call]], seconds: float
) -> dict[Call, str]:
    """Makes the calls, a process for each group, and returns why some failed, within about `seconds`.

    The calls number `works(…, device, shape, dtypes)`. What a process died of fails, and another goes on with the rest
    of its group; what was not called in the time fails too: it would use up the time for measuring.
    """
    model = {
        "shape": dataclasses.asdict(shape),
        "device": str(device),
        "dtypes": [str(x).split(".")[1] for x in dtypes],
    }
    deadline = time.monotonic() + seconds
    running: set[subprocess.Popen[str]] = set()

    def group(wanted: Sequence[Call]) -> dict[Call, str]:
        failed: dict[Call, str] = {}
        left = list(wanted)
        while left and time.monotonic() < deadline:
            with tempfile.TemporaryFile("w+") as trouble, _child({**model, "calls": left}, trouble) as child:
                running.add(child)
                assert child.stdout is not None
                for line in child.stdout:
                    i, version, why = json.loads(line)
                    left.remove((i, version))
                    if why is not None:
                        failed[i, version] = why
                status = child.wait()
                running.discard(child)
                if left and time.monotonic() < deadline:
                    trouble.seek(0)
                    last = (trouble.read().strip() or "no message").splitlines()[-1][:200]
                    failed[left.pop(0)] = f"its process ended with status {status}: {last}"
        late = f"not called in the {seconds:.0f} s for compiling"
        return failed | dict.fromkeys(left, late)

    pool = ThreadPoolExecutor(min(MOST_PROCESSES, os.cpu_count() or 1))
    futures = [pool.submit(group, wanted) for wanted in groups]
    try:
        while not all(future.done() for future in futures):
            if time.monotonic() >= deadline:
                _kill(running)
            time.sleep(0.1)
        return {call: why for future in futures for call, why in future.result().items()}
    finally:  # at an interruption too
        deadline = -1.0
        _kill(running)
        pool.shutdown(cancel_futures=True)


def _kill(running: set["subprocess.Popen[str]"]) -> None:
    for child in list(running):
        child.kill()


@contextlib.contextmanager
def _child(asked: dict[str, object], trouble: IO[str]) -> Iterator["subprocess.Popen[str]"]:
    here = str(Path(__file__).resolve().parents[1])
    path = os.pathsep.join(filter(None, (here, os.environ.get("PYTHONPATH"))))
    with tempfile.TemporaryFile("w+") as wanted:
        json.dump(asked, wanted)
        wanted.seek(0)
        child = subprocess.Popen(
            [sys.executable, "-m", "kernels.first_calls"],
            stdin=wanted,
            stdout=subprocess.PIPE,
            stderr=trouble,
            text=True,
            env={**os.environ, "PYTHONPATH": path},
            start_new_session=True,
        )
    with child:
        try:
            yield child
        finally:
            child.kill()


def main() -> None:
    """The child: a line of JSON for each call, when it was made: [index of the work, version, why it failed or
    null].
    """
    asked = json.load(sys.stdin)
    device = torch.device(asked["device"])
    of = registry.machine_of(device)
    dtypes = [getattr(torch, name) for name in asked["dtypes"]]
    if "triton" not in of.missing:
        from kernels.triton import trial

        trial.compile_only()
    todo = works(of, device, Shape(**asked["shape"]), dtypes)
    for i, version in asked["calls"]:
        why = None
        try:
            op, inputs = todo[i].make()
            timer(todo[i], version, device, op, inputs)()
        except torch.OutOfMemoryError:
            pass  # beside the others; alone it may fit, and is called again
        except Exception as error:  # a compiler's, a driver's
            why = failure(error)
        print(json.dumps([i, version, why]), flush=True)
        if device.type == "cuda":
            torch.cuda.synchronize(device)  # raises where no later call can run: what is left needs another process
            torch.cuda.empty_cache()


if __name__ == "__main__":
    main()
