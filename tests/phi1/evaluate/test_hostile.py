"""367 attacking programs (`hostile.py`, `hostile_more.py`) as root, as an ordinary user, and where the machine has no
namespaces; and programs that leave something for a later one.
"""

import json
import os
import pathlib
import subprocess
import sys
from collections.abc import Iterator
from typing import Any

import pytest

from phi1.evaluate import sandbox
from phi1.evaluate.sandbox import Job, Server

HERE = pathlib.Path(__file__).parent
ROOT = HERE.parents[2]
USER = 12345


def run(*arguments: str, user: int | None = None) -> dict[str, Any]:
    command = [sys.executable, str(HERE / "hostile.py"), *arguments]
    if user is not None:
        command = [sys.executable, str(HERE / "as_user.py"), str(user), *command]
    done = subprocess.run(command, env=os.environ | {"PYTHONPATH": str(ROOT)}, capture_output=True, text=True, cwd="/")
    assert done.returncode == 0, done.stderr
    found: dict[str, Any] = json.loads(done.stdout)
    print({key: found[key] for key in ("level", "uid", "count", "seconds")})
    return found


def holds(found: dict[str, Any], level: str) -> None:
    bad = {
        key: found[key]
        for key in ("escaped", "passed", "mislabelled", "slow", "lost", "changed", "left running", "left in files")
        if found[key]
    }
    assert bad == {} and found["count"] >= 367
    assert found["level"] == level, found["missing"]


def full() -> str:
    """The level of this machine: tests of what it has not got would say nothing."""
    return sandbox.strength().level


def test_as_whoever_runs_this() -> None:
    holds(run(), full())


@pytest.mark.skipif(os.geteuid() != 0, reason="only root becomes an ordinary user")
def test_as_an_ordinary_user() -> None:
    found = run(user=USER)
    assert found["uid"] == USER
    holds(found, full())


def test_without_namespaces() -> None:
    """As in a container without privileges."""
    holds(run("namespaces", **({"user": USER} if os.geteuid() == 0 else {})), "partial")


def test_the_programs_have_teeth() -> None:
    """Mutation: without the list of system calls many attacks succeed, and are seen to; a verdict is forged even so by
    none.
    """
    found = run("seccomp", **({"user": USER} if os.geteuid() == 0 else {}))
    kinds = {kind for kind, *_ in found["escaped"]}
    assert len(found["escaped"]) >= 20 and kinds >= {"signals", "processes", "ipc", "network"}, found["escaped"]
    assert found["level"] == "weak" and found["passed"] == []


# ---------------------------------------------------------------- from one job to the next

_CALLS = "import ctypes, os, sys\nlibc = ctypes.CDLL(None, use_errno=True)\n"
# name: what the first program leaves, and how a second would find it. The second prints FOUND.
LEFT = {
    "shared memory": ("libc.shmget(77, 4096, 0o1666)", "print('FOUND' if libc.shmget(77, 0, 0) >= 0 else '')"),
    "semaphores": ("libc.semget(77, 1, 0o1666)", "print('FOUND' if libc.semget(77, 0, 0) >= 0 else '')"),
    "queues": ("libc.msgget(77, 0o1666)", "print('FOUND' if libc.msgget(77, 0) >= 0 else '')"),
    "POSIX queues": (
        "libc.syscall(240, b'x', 0o102, 0o666, None)",
        "print('FOUND' if libc.syscall(240, b'x', 2, 0, None) >= 0 else '')",
    ),
    "keys": (
        "libc.syscall(248, b'user', b'x', b'left', 4, -4)",
        "print('FOUND' if libc.syscall(249, b'user', b'x', None, -4) >= 0 else '')",
    ),
    "files": ("open('left', 'w').write('x')", "print('FOUND' if os.listdir('.') else '')"),
    "files in /tmp and /dev/shm": (
        "import tempfile\nfor d in ('/tmp', '/dev/shm', tempfile.gettempdir()):\n    try:\n        open(d + '/left', "
        "'w').write('x')\n    except OSError:\n        pass",
        "import tempfile\nfor d in ('/tmp', '/dev/shm', tempfile.gettempdir(), '/job'):\n    if os.path.exists(d + "
        "'/left'):\n        print('FOUND', d)",
    ),
    "modules": (
        "sys.modules['left'] = sys\nimport math\nmath.left = 1\nsys.path.insert(0, 'left')",
        "import math\nprint('FOUND' if 'left' in sys.modules or hasattr(math, 'left') or 'left' in sys.path else '')",
    ),
    "the environment": (
        "os.environ['LEFT'] = '1'\nos.putenv('LEFT', '1')",
        "print('FOUND' if os.environ.get('LEFT') else '')",
    ),
    "a semaphore of the threading kind": (
        "import _multiprocessing\ntry:\n    _multiprocessing.SemLock(1, 1, 1, '/left', False)\nexcept OSError:\n    "
        "pass",
        "import _multiprocessing\ntry:\n    _multiprocessing.SemLock._rebuild(0, 1, 1, '/left')\n    "
        "print('FOUND')\nexcept OSError:\n    pass",
    ),
    # What a program printed, was, was tested by: sought in every readable page of a later one's memory.
    "memory": ("x = '-'.join(['left', 'behind'])\nprint(x * 10000)\nsys.stderr.write(x * 10)", None),
}
_SEARCH = """
sought = b'LEFT-BEHIND'  # in other letters, so as not to find itself
address = id(object()) & ~0xFFFFF
found = 0
read, write = os.pipe()
for page in range(address - (64 << 20), address + (64 << 20), 4096):
    try:
        if libc.write(write, ctypes.c_void_p(page), 4096) == 4096:
            found += os.read(read, 4096).swapcase().count(sought)
    except OSError:
        pass
print('FOUND' if found else 'searched')
"""


@pytest.fixture(params=[(), ("namespaces",)], ids=["namespaces", "no namespaces"])
def server(request: pytest.FixtureRequest) -> Iterator[Server]:
    one = Server(without=request.param)
    yield one
    one.close()


def test_nothing_passes_from_one_job_to_the_next(server: Server) -> None:
    for name, (leave, find) in LEFT.items():
        secret = "left-" + "behind"
        server.run(Job(_CALLS + leave + f"\ny = {secret!r}", f"assert f() == {secret!r}", "f"))
        found = server.run(Job(_CALLS + (find or _SEARCH)))
        assert found.status == "passed" and "FOUND" not in found.output, (name, found)


def test_the_search_finds_what_is_there(server: Server) -> None:
    """The instrument of the test above: it sees a string that the same process holds."""
    here = (
        _CALLS
        + "kept = [('left-' + 'behind') * 10, bytearray(b'left-' + b'behind')]\nz = [str(i) + 'left-' + 'behind' for i in range(3000)]\n"
        + _SEARCH
    )
    assert "FOUND" in server.run(Job(here)).output


def test_the_end_of_a_test_looks_the_same_right_or_wrong(server: Server) -> None:
    """A program that watches its conversation sees no hang-up, and no more calls, whichever way it ends."""
    watch = """
import os, select, sys, threading, time
def watch():
    poll = select.poll()
    poll.register(3, select.POLLRDHUP | select.POLLHUP | select.POLLERR)
    while not poll.poll(1):
        pass
    os.write(1, b'HANGUP')
threading.Thread(target=watch, daemon=True).start()
def f(x):
    return x
"""
    for expected in (1, 2):
        for _ in range(5):
            result = server.run(Job(watch, f"def check(c):\n    assert c(1) == {expected}\n    c(0)", "f"))
            assert "HANGUP" not in result.output and result.status == ("passed" if expected == 1 else "failed")


def test_a_program_that_knows_nothing_learns_nothing(server: Server) -> None:
    """Guessing one value more each time it runs, by all means of remembering: it is at its first guess every time."""
    learner = (
        _CALLS
        + """
guess = 0
for path in ('guess', '/tmp/guess', '/dev/shm/guess'):
    try:
        guess = int(open(path).read())
    except OSError:
        pass
memory = libc.shmget(99, 4096, 0o1666)
if memory >= 0:
    libc.shmat.restype = ctypes.POINTER(ctypes.c_int)
    libc.shmat(memory, None, 0)[0] += 1
    guess = libc.shmat(memory, None, 0)[0]
def f():
    for path in ('guess', '/tmp/guess', '/dev/shm/guess'):
        try:
            open(path, 'w').write(str(guess + 1))
        except OSError:
            pass
    return guess
"""
    )
    assert {server.run(Job(learner, "assert f() == 3", "f")).status for _ in range(6)} == {"failed"}
