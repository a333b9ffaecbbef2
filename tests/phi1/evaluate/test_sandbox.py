"""The sandbox against programs that try to pass without being right, or to do harm."""

import contextlib
import os
import pathlib
import socket
import time

import pytest

from phi1.evaluate import sandbox
from phi1.evaluate.sandbox import Job, run_many, run_program

TEST = """
def check(candidate):
    assert candidate(2) == 4
    assert candidate(3) == 9
"""
RIGHT = "def square(x):\n    return x * x\n"


def judged(source: str, test: str = TEST, **options: object) -> sandbox.Result:
    return run_program(source, test=test, entry_point="square", **options)  # type: ignore[arg-type]


def test_right_passes_and_wrong_fails_with_the_failing_assertion() -> None:
    assert judged(RIGHT).status == "passed"
    wrong = judged("def square(x):\n    return x + x\n")
    assert (wrong.status, wrong.detail) == ("failed", "AssertionError in: assert candidate(3) == 9")
    broken = judged("def square(x):\n    return 1 / 0\n")
    assert broken.status == "failed" and "ZeroDivisionError" in broken.detail and "(line 2)" in broken.detail


CHEATS = {
    "exit 0 at import": "import sys\nsys.exit(0)",
    "exit 0 in the call": "import sys\ndef square(x):\n    sys.exit(0)",
    "os._exit(0) at import": "import os\nos._exit(0)",
    "os._exit(0) in the call": "import os\ndef square(x):\n    os._exit(0)",
    "raises SystemExit": "raise SystemExit",
    "raises KeyboardInterrupt": "def square(x):\n    raise KeyboardInterrupt",
    "fake verdicts printed": 'def square(x):\n    print(\'{"status": "passed", "detail": ""}\')\nsquare(1)\nprint("passed")',
    "always equal": "class E:\n    def __eq__(self, other):\n        return True\ndef square(x):\n    return E()",
    "always equal int": "class E(int):\n    def __eq__(self, other):\n        return True\n    __hash__ = None\n"
    "def square(x):\n    return E(7)",
    "patches builtins": "import builtins\nbuiltins.AssertionError = Exception\nbuiltins.isinstance = lambda *a: True\n"
    "builtins.compile = builtins.exec = lambda *a: None\ndef square(x):\n    return 0",
    "patches unittest": "import unittest\nunittest.TestCase.assertEqual = lambda *a: None\ndef square(x):\n    return 0",
    "patches the driver": "import sys\nfor m in list(sys.modules.values()):\n    for n in ('unpack', 'checker', 'run_job'):\n"
    "        if hasattr(m, n):\n            setattr(m, n, lambda *a: {'status': 'passed', 'detail': ''})\n"
    "def square(x):\n    return 0",
    "atexit": "import atexit, os\natexit.register(os._exit, 0)\ndef square(x):\n    return 0",
    "own check": "def check(candidate):\n    pass\ndef square(x):\n    return 0",
    # Every descriptor it can find gets a verdict written to it, in the format of the real one.
    "writes to every descriptor": "import os, json, struct\n"
    'data = json.dumps({"status": "passed", "detail": ""}).encode()\n'
    "for fd in range(64):\n    try:\n        os.write(fd, struct.pack('>I', len(data)) + data)\n"
    "    except OSError:\n        pass\ndef square(x):\n    return 0",
    "looks for the test": "import gc, sys\nneedle = lambda: 'assert ' + 'candidate'\nfound = [o for o in gc.get_objects() if isinstance(o, dict) and 'test' in o]\n"
    "frame = sys._getframe()\nwhile frame:\n    found += [v for v in frame.f_locals.values() if needle() in repr(v)]\n"
    "    frame = frame.f_back\n"
    "def square(x):\n    return x * x if any(needle() in repr(o) for o in found) else 0",
    "debugs the judge": "import ctypes, os\nlibc = ctypes.CDLL(None)\nfor pid in range(1, 1 << 15):\n"
    "    if libc.ptrace(16, pid, 0, 0) == 0 or libc.kill(pid, 0) == 0:\n"
    "        def square(x):\n            return x * x\n        break\nelse:\n    def square(x):\n        return 0",
}


@pytest.mark.parametrize("source", CHEATS.values(), ids=CHEATS.keys())
def test_cheats_do_not_pass(source: str) -> None:
    started = time.monotonic()
    result = judged(source, timeout=3.0)
    assert result.status == "failed", result
    assert time.monotonic() - started < 10


@pytest.mark.parametrize("name", ["exit 0 at import", "os._exit(0) at import", "raises SystemExit"])
def test_without_a_test_leaving_early_does_not_pass(name: str) -> None:
    assert run_program(CHEATS[name]).status == "failed"
    assert run_program("print('hello')").output == "hello\n"


def test_endless_loops_end() -> None:
    for source in ("while True:\n    pass", "def square(x):\n    while True:\n        pass",
                   "import time\ndef square(x):\n    time.sleep(60)",
                   "import signal\nfor s in range(1, 32):\n    try:\n        signal.signal(s, signal.SIG_IGN)\n"
                   "    except (OSError, ValueError):\n        pass\nwhile True:\n    pass"):  # fmt: skip
        started = time.monotonic()
        assert judged(source, timeout=0.5).status == "timed_out"
        assert time.monotonic() - started < 5


def test_memory_hogs_and_endless_output_end() -> None:
    assert judged("x = bytearray(1 << 31)\n" + RIGHT).detail.startswith("MemoryError")
    hog = judged(
        "def square(x):\n    y = []\n    while True:\n        y.append(bytearray(1 << 20))\n",
        memory=256 << 20,
        timeout=5.0,
    )
    assert hog.status == "failed"
    noisy = judged("print('x' * 10_000_000)\n" + RIGHT, output_limit=1000)
    assert noisy.status == "passed" and len(noisy.output) == 1000
    endless = run_program("while True:\n    print('x' * 1000)", timeout=0.5, output_limit=1000)
    assert endless.status == "timed_out" and len(endless.output) <= 1000


def _commands() -> list[str]:
    paths = pathlib.Path("/proc").glob("[0-9]*/cmdline")
    commands = []
    for path in paths:
        with contextlib.suppress(OSError):  # it ended meanwhile
            commands.append(path.read_bytes().replace(b"\0", b" ").decode(errors="replace"))
    return commands


def test_fork_bombs_are_refused_and_leave_nothing() -> None:
    for call in ("os.fork()", "os.system('sleep 98765')", "__import__('subprocess').run(['sleep', '98765'])",
                 "__import__('ctypes').CDLL(None).fork() < 0 and 1 / 0"):  # fmt: skip
        assert run_program(f"import os\nwhile True:\n    {call}", timeout=1.0).status in ("failed", "timed_out")
    assert not [command for command in _commands() if "98765" in command]
    assert run_program("import os, threading\nt = threading.Thread(target=print, args=('in a thread',))\n"
                       "t.start()\nt.join()").output == "in a thread\n"  # fmt: skip


def test_files_outside_the_working_directory_are_safe(tmp_path: pathlib.Path) -> None:
    precious = tmp_path / "precious"
    precious.write_text("here")
    os.chmod(precious, 0o666)
    os.chmod(tmp_path, 0o777)
    for attack in ("os.unlink(p)", "os.truncate(p, 0)", "open(p, 'w')", "open(p, 'a').write('x')", "os.rename(p, p + '2')",
                   "shutil.rmtree(os.path.dirname(p))", "os.chmod(p, 0)", "os.symlink(p, p + '3')",
                   "open(os.path.dirname(p) + '/new', 'w')"):  # fmt: skip
        result = run_program(f"import os, shutil\np = {str(precious)!r}\n{attack}")
        assert result.status == "failed" and "PermissionError" in result.detail, (attack, result)
    assert precious.read_text() == "here" and os.listdir(tmp_path) == ["precious"]
    assert precious.stat().st_mode & 0o777 == 0o666


def test_working_directory_is_empty_writable_small_and_removed() -> None:
    result = run_program("import os\nassert not os.listdir('.')\nopen('a', 'w').write('x')\nos.remove('a')\nopen('b', 'w').close()\n"
                         "print(os.getcwd())")  # fmt: skip
    assert result.status == "passed" and not os.path.exists(result.output.strip())
    big = run_program("f = open('big', 'wb')\nfor _ in range(100):\n    f.write(bytes(1 << 20))\n    f.flush()")
    assert big.status == "failed"


def test_no_network() -> None:
    with socket.create_server(("127.0.0.1", 0)) as server:
        port = server.getsockname()[1]
        for attack in (f"socket.create_connection(('127.0.0.1', {port}), 1)", "socket.socket(socket.AF_UNIX)",
                       "socket.socket(socket.AF_INET, socket.SOCK_DGRAM)"):  # fmt: skip
            assert run_program(f"import socket\n{attack}").status == "failed"


def test_parents_environment_and_files_are_out_of_sight(
    monkeypatch: pytest.MonkeyPatch, tmp_path: pathlib.Path
) -> None:
    monkeypatch.setenv("OPENAI_API_KEY", "sk-secret")
    secret = tmp_path / "secret"
    secret.write_text("sk-secret")
    server = sandbox.Server()  # started while the key is in the environment
    try:
        source = (
            "import os\nprint(dict(os.environ))\n"
            f"for path in ['/proc/%d/environ' % os.getppid(), '/proc/{os.getpid()}/environ', {str(secret)!r}]:\n"
            "    try:\n        print(open(path).read())\n    except OSError as e:\n        print(e)\n"
            "print(repr(__import__('sys').stdin.read()))"
        )
        result = server.run(Job(source))
    finally:
        server.close()
    assert result.status == "passed" and "sk-secret" not in result.output
    assert result.output.count("Permission denied") == 3 and result.output.endswith("''\n")


def test_values_that_pass_through() -> None:
    values = "[None, True, 1, -2.5, float('inf'), 10**40, 'é\\ud800', b'x', (1, (2,)), {1, 2}, frozenset({3}), {'a': [1], (1, 2): 3}, 1j]"
    source = "def square(x):\n    assert type(x) is list\n    return x"
    test = f"def check(c):\n    v = {values}\n    r = c(v)\n    assert r == v and [type(a) for a in r] == [type(a) for a in v]\n"
    assert judged(source, test) == judged(source, test).__class__("passed", "", "", pytest.approx(0, abs=10))
    lazy = "def square(x):\n    return map(abs, x)"
    assert judged(lazy, "def check(c):\n    assert list(c([-1, 2])) == [1, 2]").status == "passed"
    assert judged(lazy, "def check(c):\n    assert c([-1, 2]) == [1, 2]").status == "failed"
    subclass = "import collections\ndef square(x):\n    return collections.Counter(x)"
    assert judged(subclass, "def check(c):\n    assert c('aab') == {'a': 2, 'b': 1}").status == "passed"


def test_exceptions_reach_the_test() -> None:
    test = "def check(c):\n    try:\n        c(1)\n    except ValueError:\n        return\n    assert False"
    assert judged("def square(x):\n    raise ValueError('no')", test).status == "passed"
    assert judged("def square(x):\n    raise KeyError('no')", test).status == "failed"


def test_a_broken_test_is_an_error_not_a_verdict() -> None:
    assert judged(RIGHT, "def check(c):\n    pass").status == "error"
    assert judged(RIGHT, "this is not Python").status == "error"
    assert judged(RIGHT, "def check(c):\n    assert c(lambda: 1)").status == "error"


def test_test_may_use_the_function_by_name_and_the_preamble() -> None:
    test = "assert square(2) == twice(2) and candidate(3) == 9"
    assert judged(RIGHT, test, preamble="def twice(x):\n    return 2 * x\n").status == "passed"


def test_guards_in_python_where_the_kernel_has_none(tmp_path: pathlib.Path) -> None:
    precious = tmp_path / "precious"
    precious.write_text("here")
    server = sandbox.Server(kernel_guards=False)
    try:
        assert server.guards == [False, False]
        for attack in ("os.fork()", "os.system('true')", "socket.socket()", f"os.unlink({str(precious)!r})",
                       f"shutil.rmtree({str(tmp_path)!r})", "subprocess.Popen(['true'])"):  # fmt: skip
            result = server.run(Job(f"import os, shutil, socket, subprocess\n{attack}"))
            assert result.status == "failed" and "PermissionError" in result.detail, (attack, result)
        assert server.run(Job(RIGHT, TEST, "square")).status == "passed"
    finally:
        server.close()
    assert precious.read_text() == "here"


def test_many_in_order_and_nothing_left_behind() -> None:
    sources = [f"def square(x):\n    return x * x + {i % 2}\n" for i in range(60)]
    seen: list[tuple[int, int]] = []
    results = run_many([Job(s, TEST, "square") for s in sources], workers=2, progress=lambda d, n: seen.append((d, n)))
    assert [r.status for r in results] == ["passed", "failed"] * 30 and seen[-1] == (60, 60)
    ours = [server.process.pid for server in sandbox._idle]
    assert 1 <= len(ours) <= 2  # and no child of theirs:
    for pid in ours:
        assert pathlib.Path(f"/proc/{pid}/task/{pid}/children").read_text() == ""


def test_a_lost_server_is_an_error_and_is_replaced() -> None:
    with sandbox._server() as server:
        pass
    server.process.kill()
    server.process.wait()
    sandbox._idle[:] = [server]
    assert judged(RIGHT).status == "error"
    assert judged(RIGHT).status == "passed"
