"""The process that holds the test: asks the program's process for what the test asks, and writes the verdict."""

import ast
import builtins
import enum
import json
import signal
import sys
from typing import Any

from phi1.evaluate.inside.candidate import line_of
from phi1.evaluate.inside.references import Peer, Refused, Remote, message_of
from phi1.evaluate.inside.wire import Gone, send_frame

CHANNEL, TEST, VERDICT = 3, 4, 5
"""Descriptors: the conversation with the program, the test's text, and where the verdict goes."""
_FILE = "test.py"


class _Test(Peer):
    """The test's end of the conversation."""

    def __init__(self, descriptor: int, entry_point: str) -> None:
        super().__init__(descriptor, careful=True)
        self.entry_point = entry_point
        self.calls = 0
        self.own_outputs = {"stdout": sys.stdout, "stderr": sys.stderr}

    def line_of(self, error: BaseException) -> int:
        return line_of(error, _FILE)

    def beside(self) -> dict[str, Any]:
        listen = [name for name, own in self.own_outputs.items() if getattr(sys, name) is not own]
        return {"listen": listen} if listen else {}

    def take_beside(self, message: dict[str, Any]) -> None:
        for name, text in message.get("heard", {}).items():
            if name in self.own_outputs:
                getattr(sys, name).write(str(text))


def run() -> None:
    """Judges, then waits to be ended: the program sees its test stop in the same way whatever the verdict."""
    with open(TEST, encoding="utf-8", errors="surrogatepass") as file:
        job = json.load(file)
    status, detail = _judged(job, _Test(CHANNEL, job["entry_point"]))
    send_frame(VERDICT, {"status": status, "detail": detail})
    while True:
        signal.pause()


def _judged(job: dict[str, Any], peer: _Test) -> tuple[str, str]:
    try:
        peer.ask("load")
    except Gone as gone:
        return "failed", f"while it was loaded, {gone}"
    except BaseException as error:
        return "failed", _line(error)
    space: dict[str, Any] = {"__name__": "test"}
    try:
        try:
            _prepare(job, peer, space)
        except Gone as gone:
            return "failed", str(gone)
        except BaseException as error:
            return "error", f"the test cannot be prepared: {type(error).__name__}: {message_of(error)}"
        _run(job, space)
        error = peer.failure
        if error is None:
            return ("passed", "") if peer.calls else ("error", "the test never calls the function")
    except Gone as gone:
        return "failed", f"during a call, {gone}"
    except MemoryError:
        return "error", "the test takes more memory than it may have"
    except BaseException as raised:
        error = peer.failure or raised
    place = line_of(error, _FILE)
    lines = job["test"].splitlines()
    where = lines[place - 1].strip()[:200] if 0 < place <= len(lines) else ""
    # What goes wrong before the first call is the test's own fault.
    status = "failed" if peer.calls else "error"
    return status, (f"{_line(error)} in: {where}" if where else _line(error)).encode("utf-8", "backslashreplace").decode()


def _prepare(job: dict[str, Any], peer: _Test, space: dict[str, Any]) -> None:
    """Gives the test its names: those of the preamble, the function, and what else it uses of the program's."""
    exec(compile(job["preamble"], "preamble.py", "exec"), space)
    entry_point = job["entry_point"]
    known = {name: kind for name, kind in space.items() if isinstance(kind, type) and kind.__module__ == "test"}
    known = {name: kind for name, kind in known.items() if name != entry_point and _by_attributes(kind)}
    if known:
        peer.ask("classes", *known)
        peer.classes |= known
    tree = ast.parse(job["test"], _FILE)
    if job["exact_types"]:
        tree = ast.fix_missing_locations(_ExactTypes().visit(tree))
        space[_EXACT] = _exactly_equal
    code = compile(tree, _FILE, "exec")
    loads = {node.id for node in ast.walk(tree) if isinstance(node, ast.Name) and isinstance(node.ctx, ast.Load)}
    stores = {node.id for node in ast.walk(tree) if isinstance(node, ast.Name) and isinstance(node.ctx, ast.Store)}
    missing = loads - stores - set(space) - set(vars(builtins)) - {"candidate", entry_point}
    for name in sorted(missing):
        try:
            space[name] = peer.ask("global", name)
        except NameError:
            pass  # the test's own functions, classes, imports; or it raises the NameError itself
    if entry_point:
        space["candidate"] = space[entry_point] = _counted(peer, entry_point)
    space["__code__"] = code


def _by_attributes(kind: type) -> bool:
    """Whether objects of this class can cross as their attributes."""
    return issubclass(kind, enum.Enum) or (not issubclass(kind, BaseException) and kind.__new__ is object.__new__)


def _counted(peer: _Test, name: str) -> Any:
    function: list[Any] = []

    def candidate(*args: Any, **kwargs: Any) -> Any:
        peer.calls += 1
        if not function:
            function.append(peer.ask("global", name))
        return function[0](*args, **kwargs)

    return candidate


def _run(job: dict[str, Any], space: dict[str, Any]) -> None:
    exec(space.pop("__code__"), space)
    check = space.get("check")
    if callable(check) and not isinstance(check, Remote):
        check(space["candidate"])


def _line(error: BaseException) -> str:
    """One line on an exception: the program's own, or one that arose in the test."""
    facts = getattr(error, "_phi1_facts", None)
    if facts is None:
        message = message_of(error)
        return f"{type(error).__name__}{': ' if message else ''}{message}"
    where = f" (line {facts['line']})" if facts["line"] else ""
    return f"{facts['type']}{': ' if facts['message'] else ''}{facts['message']}{where}"


# ---------------------------------------------------------------- exact types

_EXACT = "_phi1_exactly_equal"


class _ExactTypes(ast.NodeTransformer):
    """`a == b` in a test becomes a comparison of types as well: 1 is neither True nor 1.0."""

    def visit_Compare(self, node: ast.Compare) -> ast.AST:
        self.generic_visit(node)
        if not any(isinstance(operation, (ast.Eq, ast.NotEq)) for operation in node.ops):
            return node
        if len(node.ops) > 1:
            raise SyntaxError(f"line {node.lineno}: a chain of comparisons with == is not for exact types")
        call = ast.Call(ast.Name(_EXACT, ast.Load()), [node.left, node.comparators[0]], [])
        result = ast.UnaryOp(ast.Not(), call) if isinstance(node.ops[0], ast.NotEq) else call
        return ast.copy_location(result, node)


def _exactly_equal(left: Any, right: Any) -> bool:
    if type(left) is not type(right):
        return False
    if isinstance(left, (list, tuple)):
        return len(left) == len(right) and all(map(_exactly_equal, left, right))
    if isinstance(left, dict):
        return len(left) == len(right) and all(
            key in right and _exactly_equal(value, right[key]) for key, value in left.items()
        ) and _exactly_equal(_by_type(left), _by_type(right))  # fmt: skip
    if isinstance(left, (set, frozenset)):
        return bool(left == right) and _by_type(left) == _by_type(right)
    return bool(left == right)


def _by_type(values: Any) -> list[tuple[str, int]]:
    names = [type(value).__name__ for value in values]
    return sorted((name, names.count(name)) for name in set(names))
