"""Runs untrusted programs in child processes and judges them where they cannot reach the judge.

    result = run_program(source, test=test, entry_point="f", timeout=3.0, memory=512 << 20)

Two ways to pass:

- **With a test**, the program runs in one process and the test in another (`inside/`). The test works the program's
  function and objects through a socket, and the verdict is written by the test's process alone. What the
  program prints, patches, raises or exits with, and objects that equal everything, cannot make it pass: it must give
  the right values. The program's process has never held the test's text.
- **Without a test**, a program passes when it runs to its end: an exception, `sys.exit(0)` or `os._exit(0)`
  does not count as that. Here the report comes from the program's own process, so a program written to
  attack this sandbox can forge it; use it for programs of our own.

What is kept from a program, by what, and what each missing kernel feature costs: docs/sandbox.md. `strength` probes it.
"""

import atexit
import contextlib
import importlib.machinery
import os
import sys
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor, as_completed
from typing import Any

from phi1.errors import UserError
from phi1.evaluate.sandbox_server import (
    MEMORY,
    TIMEOUT,
    Feature,
    Job,
    Lost,
    Result,
    Server,
    Status,
    Strength,
    package_paths,
)

__all__ = [
    "MEMORY",
    "TIMEOUT",
    "Feature",
    "Job",
    "Result",
    "Server",
    "Status",
    "Strength",
    "close_idle",
    "run_each",
    "run_job",
    "run_many",
    "run_program",
    "strength",
]

_idle: list[Server] = []
_owner = 0
_lock = threading.Lock()


@contextlib.contextmanager
def _server(packages: tuple[str, ...]) -> Iterator[Server]:
    """Lends a running server; starts one if none is idle. One that was lost is not lent again."""
    global _owner
    with _lock:
        if _owner != os.getpid():  # a fork's copy of the list belongs to the parent
            _idle.clear()
            _owner = os.getpid()
        fitting = [server for server in _idle if server.packages == packages]
        if fitting:
            _idle.remove(fitting[0])
    server = fitting[0] if fitting else Server(packages)
    try:
        yield server
    except BaseException:
        server.close()
        raise
    with _lock:
        _idle.append(server)


@atexit.register
def close_idle() -> None:
    """Ends the servers that wait for work; the next job starts a new one, with another hash seed."""
    while _owner == os.getpid() and _idle:
        _idle.pop().close()


def run_job(job: Job) -> Result:
    """Runs one job. A server that is lost meanwhile is replaced and the job run again: lost twice, it is its
    failure. Packages that cannot be imported are an error of this job, not of others.
    """
    started = time.monotonic()
    absent = [name for name in job.packages if not _is_installed(name)]
    if absent:
        return Result("error", f"the test needs packages that are not installed: {', '.join(absent)}", "", 0.0)
    for _ in range(2):
        try:
            with _server(job.packages) as server:
                return server.run(job)
        except Lost as error:
            lost = error
            close_idle()  # what was idle may be lost as well: the second try is in a fresh one
        except UserError as error:
            if not job.packages:
                raise
            strength()  # raises it where the sandbox does not start without them either
            detail = f"the test needs {', '.join(job.packages)}, and with that {error}"
            return Result("error", detail, "", time.monotonic() - started)
    return Result("failed", f"{lost}, twice, while the program ran", "", time.monotonic() - started)


def _is_installed(name: str) -> bool:
    """Whether a server finds it: not in the current folder, and not by a hook of this process."""
    top = name.partition(".")[0]
    return top in sys.stdlib_module_names or importlib.machinery.PathFinder.find_spec(top, package_paths()) is not None


def run_program(source: str, **options: Any) -> Result:
    """Runs one program; the options are `Job`'s."""
    return run_job(Job(source, **options))


def run_each(jobs: Sequence[Job], *, workers: int = 2) -> Iterator[tuple[int, Result]]:
    """Runs jobs, `workers` at a time; yields (place in jobs, result) as they come."""
    with ThreadPoolExecutor(workers) as pool:
        try:
            places = {pool.submit(run_job, job): place for place, job in enumerate(jobs)}
            for future in as_completed(places):
                yield places[future], future.result()
        except BaseException:
            pool.shutdown(wait=False, cancel_futures=True)
            raise


def run_many(
    jobs: Sequence[Job], *, workers: int = 2, progress: Callable[[int, int], None] | None = None
) -> list[Result]:
    """Runs jobs, `workers` at a time; results in the jobs' order. progress: called with (done, all)."""
    results: dict[int, Result] = {}
    for place, result in run_each(jobs, workers=workers):
        results[place] = result
        if progress is not None:
            progress(len(results), len(jobs))
    return [results[place] for place in range(len(jobs))]


def strength() -> Strength:
    """What keeps a program in on this machine, as a server found it by trying."""
    with _server(()) as server:
        return server.strength
