"""The server: sets up its namespaces once, then forks the two processes of each job on request.

It never holds a program, a test, or what a program prints: those go straight between the evaluator and the
children, so that no later child inherits them. Control messages are JSON packets on descriptor 0, with descriptors.
"""

import _socket
import ctypes
import gc
import importlib
import json
import os
import signal
import struct
import sys
from typing import Any

from phi1.evaluate.inside import candidate, checker, namespaces, visible
from phi1.evaluate.inside.cleaning import remove
from phi1.evaluate.inside.restrict import (
    TASKS,
    Fence,
    Limits,
    hide_this_process,
    keep_descriptors,
    landlock,
    landlock_version,
    restrict,
)

# What programs import most: loaded once. Every fork pays for `random` and `threading` (0.7 ms: they work after it in
# the child) and for modules with shared libraries of their own: none of those here, nor what imports them.
PRELOADED = ("collections", "copy", "functools", "itertools", "math", "re", "string", "typing")
FILE_BYTES = namespaces.JOB_BYTES
_PACKET = 1 << 17


class Server:
    """One server. setup: `filter` (BPF in hex, "" without), `packages`, `paths` (where packages are found), `folder`
    (an empty one, for jobs' files where there can be no file system for each) and `without`: kernel features that are
    left out, as on a machine that has not got them.
    """

    def __init__(self, setup: dict[str, Any]) -> None:
        without = setup["without"]
        for name in PRELOADED:
            importlib.import_module(name)
        sys.path += setup["paths"]
        for name in setup["packages"]:
            importlib.import_module(name)
        del sys.path[len(sys.path) - len(setup["paths"]) :]
        if len(os.listdir("/proc/self/task")) > 1:  # a package's: with threads no process enters namespaces
            namespaces.go_on_in_child()
        trees = visible.trees(tuple(setup["packages"]))
        self.spaces = namespaces.Namespaces() if "namespaces" in without else namespaces.enter(trees)
        self.folder = ""
        if "mount" in self.spaces.kinds:
            self.job_folder, writable = namespaces.JOB_FOLDER, os.path.dirname(namespaces.JOB_FOLDER)
        else:
            self.folder = writable = setup["folder"]
            os.chmod(self.folder, 0o711)
            self.job_folder = os.path.join(self.folder, "job")
        users = (self.spaces.candidate_id, self.spaces.checker_id)
        if not self.spaces.kinds and os.geteuid() == 0:
            users = self._other_users(trees)
        rulesets = [-1, -1]
        if "landlock" not in without:
            rulesets = [landlock(trees, writable), landlock(trees, None)]
        code = bytes.fromhex(setup["filter"])
        program = ctypes.create_string_buffer(code, len(code)) if code else None
        self.handle = os.pidfd_open(os.getpid())
        self.fences = [
            Fence(ruleset, program, user, self.handle) for ruleset, user in zip(rulesets, users, strict=True)
        ]
        self.own_count = "user" in self.spaces.kinds or users[0] is not None
        os.environ |= {"HOME": self.job_folder, "TMPDIR": self.job_folder}
        # Made here, before the forks, and used once in each child.
        warm_up()
        self.program, self.test = candidate.Program(), checker.Test()
        hide_this_process()
        self.pids: list[int] = []
        self.has_folder = False
        gc.freeze()

    def _other_users(self, trees: list[visible.Tree]) -> tuple[int | None, int | None]:
        """Two ids that nobody else has, if this process may take them and they can read what programs need."""
        first = namespaces.spare_id()
        if first is None:
            return None, None
        pid = os.fork()
        if pid == 0:
            try:
                os.setgroups([])
                os.setresgid(first, first, first)
                os.setresuid(first, first, first)
                for tree in trees:
                    os.stat(tree.path)
                    os.listdir(tree.path) if os.path.isdir(tree.path) else None
                os._exit(0)
            finally:
                os._exit(1)
        readable = os.waitpid(pid, 0)[1] == 0
        return (first, first + 1) if readable else (None, None)

    # ---- jobs

    def start(self, job: dict[str, Any], handles: list[int]) -> list[int]:
        """Forks the processes of a job; returns their ids, the candidate's first.

        handles: the program's text and where its output goes, then the test's text and where the verdict goes, or
        without a test where the report goes.
        """
        source, output, *rest = handles
        self._make_folder()
        nothing = os.open(os.devnull, os.O_RDWR)
        pids = []
        if job["test"]:
            test, verdict = rest
            ours, theirs = _socket.socketpair()
            pids.append(self._fork(self._checker, job, nothing, ours.fileno(), test, verdict))
            ours.close()
            channel = theirs.detach()
        else:
            channel = os.dup(rest[0])
        for handle in rest:
            os.close(handle)
        if "pid" in self.spaces.kinds:
            namespaces.new_process_namespace()
        pids.insert(0, self._fork(self._candidate, job, nothing, output, channel, source))
        if "pid" in self.spaces.kinds:
            namespaces.own_process_namespace(self.handle)
        for handle in (nothing, channel, source, output):
            os.close(handle)
        self.pids = pids
        return pids

    def _fork(self, work: Any, *arguments: Any) -> int:
        pid = os.fork()
        if pid:
            return pid
        try:
            gc.enable()
            work(*arguments)
            os._exit(0)
        except MemoryError:
            os._exit(98)
        finally:
            os._exit(97)

    def _limits(self, job: dict[str, Any], memory: int) -> Limits:
        return Limits(memory, job["cpu"], FILE_BYTES, TASKS if self.own_count else None)

    def _candidate(self, job: dict[str, Any], nothing: int, output: int, channel: int, source: int) -> None:
        fence = keep_descriptors(self.fences[0], nothing, output, output, channel, source)
        restrict(self._limits(job, job["memory"]), fence, self.job_folder)
        candidate.run(self.program, job["test"])

    def _checker(self, job: dict[str, Any], nothing: int, channel: int, test: int, verdict: int) -> None:
        fence = keep_descriptors(self.fences[1], nothing, nothing, nothing, channel, test, verdict)
        # Room for what it makes of the largest messages, so that a program cannot exhaust it.
        restrict(self._limits(job, job["memory"] + (1 << 30)), fence, "/")
        checker.run(self.test)

    def end(self) -> list[tuple[int, float]]:
        """Ends the job's processes and removes what they left; returns their exit codes and CPU seconds."""
        ended = []
        for pid in self.pids:
            os.kill(pid, signal.SIGKILL)
        for pid in self.pids:
            _, status, usage = os.wait4(pid, 0)
            ended.append((os.waitstatus_to_exitcode(status), usage.ru_utime + usage.ru_stime))
        self.pids = []
        if self.has_folder:
            self._remove_folder()
        return ended

    def _make_folder(self) -> None:
        self.has_folder = True
        owner = self.fences[0].user
        if not self.folder:
            namespaces.mount_job_folder(os.geteuid() if owner is None else owner)
            return
        os.mkdir(self.job_folder, 0o700)
        if owner is not None:
            os.chown(self.job_folder, owner, owner)

    def _remove_folder(self) -> None:
        self.has_folder = False
        if not self.folder:
            namespaces.unmount_job_folder()
        else:
            remove(self.job_folder)

    def close(self) -> None:
        self.end()

    # ---- what holds here

    def probe(self) -> dict[str, Any]:
        """What keeps a program in on this machine, tried in a child that tries to get out."""
        read, write = os.pipe()
        self._make_folder()
        nothing = os.open(os.devnull, os.O_RDWR)
        separate = "pid" in self.spaces.kinds
        if separate:
            namespaces.new_process_namespace()
        self.pids = [self._fork(self._probe, nothing, write)]
        if separate:
            namespaces.own_process_namespace(self.handle)
        os.close(write)
        os.close(nothing)
        with open(read) as file:
            said = file.read()
        ((status, _),) = self.end()
        if status or not said:
            raise RuntimeError(f"the sandbox cannot isolate a process here (status {status}; {said})")
        found: dict[str, Any] = json.loads(said)
        return found | {
            "namespaces": list(self.spaces.kinds),
            "landlock": landlock_version() if self.fences[0].ruleset >= 0 else 0,
            "own_user": self.fences[0].user is not None,
            "watch_folder": bool(self.folder),
        }

    def _probe(self, nothing: int, write: int) -> None:
        fence = keep_descriptors(self.fences[0], nothing, write)
        restrict(Limits(1 << 30, 5, FILE_BYTES, TASKS if self.own_count else None), fence, self.job_folder)
        os.write(1, json.dumps(attempts()).encode())


def warm_up() -> None:
    """Runs what the children will run, until the interpreter has specialised its code: each child would write it anew.
    The first `compile` makes the hundred types of syntax trees, which takes a child 1 ms."""
    exec(compile("", "warm.py", "exec"), {})
    for _ in range(20):
        test, program = checker.Test(), candidate.Program()
        for values in ([(1, [2, "3"]), None], [warm_up, {"1": 1.5}], [None], ["name", None, 3]):
            program.decode(json.loads(json.dumps(test.encode(values))))
            test.decode(json.loads(json.dumps(program.encode(values))))
            test.prune()
            program.prune()


def attempts() -> dict[str, bool]:
    """What this process is refused: new processes and sockets; files outside; a listing of the machine's root."""

    def refused(call: Any, *arguments: Any) -> bool:
        try:
            call(*arguments)
        except OSError:
            return True
        return False

    def fork() -> None:
        if os.fork() == 0:
            os._exit(0)

    return {
        "calls_refused": refused(fork) and refused(_socket.socket),
        "files_hidden": refused(open, __file__) and refused(os.open, "/etc/passwd", os.O_RDONLY),
        "writes_refused": refused(os.open, "/tmp/../phi1-probe", os.O_WRONLY | os.O_CREAT),
    }


def serve(control: Any) -> None:
    """Answers until the evaluator closes the control socket, or ends: then what runs is ended, too."""
    setup, _ = _receive(control)
    server = Server(setup)
    try:
        control.send(json.dumps(server.probe()).encode())
        while True:
            request, handles = _receive(control)
            if request is None:
                return
            if "test" not in request:
                control.send(json.dumps(server.end()).encode())
                continue
            # By handle: the evaluator is in another process namespace, where the ids are others.
            started = [os.pidfd_open(pid) for pid in server.start(request, handles)]
            control.sendmsg(
                [b"{}"], [(_socket.SOL_SOCKET, _socket.SCM_RIGHTS, struct.pack(f"{len(started)}i", *started))]
            )
            for handle in started:
                os.close(handle)
    finally:
        server.close()


def _receive(control: Any) -> tuple[Any, list[int]]:
    data, beside, _, _ = control.recvmsg(_PACKET, _socket.CMSG_SPACE(8 * 4), _socket.MSG_CMSG_CLOEXEC)
    handles = [handle for _, _, packed in beside for (handle,) in struct.iter_unpack("i", packed)]
    return (json.loads(data) if data else None), handles


def main() -> None:
    gc.disable()  # so that no collection leaves holes, which every child would fill and so copy
    serve(_socket.socket(fileno=0))
