"""A trace of a few steps by torch.profiler, for ui.perfetto.dev or chrome://tracing."""

import contextlib
import os
import pathlib
from collections.abc import Callable, Iterator

import torch
from torch import profiler

FOLDER = "profile"
# Steps that are not like the others: kernels are loaded or compiled, buffers made; the last warms the profiler up.
_BEFORE = 3


@contextlib.contextmanager
def traced(run: pathlib.Path, first: int, steps: int, say: Callable[[str], None]) -> Iterator[Callable[[], None]]:
    """Yields what is to be called after each step done in the block.

    Traced are `steps` steps, after three, or those of them that there are; written to
    <run>/profile/step-000004-000008.json.gz, by the number of the first and the last. first: steps done before the
    block.
    """
    if not steps:
        yield lambda: None
        return
    done, written = 0, False

    def write(profile: profiler.profile) -> None:
        nonlocal written
        if done <= _BEFORE:  # the profiler has begun a step that was not done
            return
        last = first + done
        path = run / FOLDER / f"step-{first + _BEFORE + 1:06d}-{last:06d}.json.gz"
        path.parent.mkdir(exist_ok=True)
        temporary = path.with_name(f"tmp-{os.getpid()}-{path.name}")
        try:
            profile.export_chrome_trace(str(temporary))
            temporary.rename(path)
        finally:
            temporary.unlink(missing_ok=True)
        written = True
        say(f"a trace of steps {first + _BEFORE + 1:,} to {last:,} is {path}")

    kinds = [profiler.ProfilerActivity.CPU]
    if torch.cuda.is_available():
        kinds.append(profiler.ProfilerActivity.CUDA)
    schedule = profiler.schedule(wait=_BEFORE - 1, warmup=1, active=steps, repeat=1)
    with profiler.profile(activities=kinds, schedule=schedule, on_trace_ready=write) as profile:

        def step() -> None:
            nonlocal done
            done += 1
            profile.step()

        yield step
    if not written:
        say(f"no trace: only {done} steps were done, and the first {_BEFORE} are not traced")
