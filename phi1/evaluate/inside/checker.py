"""The process that holds the test: asks the program's process for what the test asks, and writes the verdict."""

import contextlib
import enum
import marshal
import signal
import sys
import types
from typing import Any

from phi1.evaluate.inside.candidate import line_of
from phi1.evaluate.inside.deriving import ClassPatterns, SuperOf
from phi1.evaluate.inside.exceptions import found, message_of
from phi1.evaluate.inside.frames import Gone, read_all, send_frame
from phi1.evaluate.inside.operations import NUMBERS, SCALARS
from phi1.evaluate.inside.peer import Peer
from phi1.evaluate.inside.places import Given
from phi1.evaluate.inside.remote import Entry, Remote, theirs
from phi1.evaluate.inside.texts import Texts, guard_pickles

CHANNEL, TEST, VERDICT = 3, 4, 5
"""Descriptors: the conversation with the program, the prepared test, and where the verdict goes."""
_FILE = "test.py"


class Test(Peer):
    """The test's end of the conversation."""

    def __init__(self) -> None:
        super().__init__(CHANNEL, careful=True)
        self.used = False  # whether the test has asked anything of the program's function, classes or values
        self.stops = False  # whether the test speaks of StopIteration
        self.own_outputs = {"stdout": sys.stdout, "stderr": sys.stderr}
        self.places = Given()

    def ask(self, operation: str, *values: Any) -> Any:
        self.used = self.used or operation not in ("global", "classes")
        try:
            answer = super().ask(operation, *values)
        except StopIteration as stop:
            # Out of a call it would end `all(map(...))` of the test, all true so far. As in a generator (PEP 479).
            if operation in ("__next__", "send", "throw") or self.stops:
                raise
            raise RuntimeError(f"{operation} raised StopIteration") from stop
        if self.told and operation in ("entry", *NUMBERS) and self._was_told(answer):
            raise self.refuse("what the program was handed by an operator of the test, and says again")
        return answer

    def _was_told(self, answer: Any) -> bool:
        items = answer if type(answer) in (list, tuple) and answer else (answer,)
        return all(type(item) in SCALARS and item in self.told for item in items)

    def line_of(self, error: BaseException) -> int:
        return line_of(error, _FILE)

    def type_of(self, value: Any) -> Any:
        """`type(value)` in the test: of an object that stands for one of the program's, that one's."""
        return self.ask("type", value) if theirs(value) else type(value)

    def super_of(self, kind: Any, value: Any) -> Any:
        """`super()` in a class of the test's, which may derive from one of the program's."""
        return SuperOf(self, kind, value) if theirs(kind) else super(kind, value)

    def beside(self) -> dict[str, Any]:
        """Which outputs the test listens to, and what it seeded."""
        more: dict[str, Any] = {}
        if listen := [name for name, own in self.own_outputs.items() if getattr(sys, name) is not own]:
            more["listen"] = listen
        if self.places.seeds:
            more["seed"], self.places.seeds = self.places.seeds, []
        return more

    def given(self) -> dict[str, Any]:
        return self.places.values()

    def take_beside(self, message: dict[str, Any]) -> None:
        if "heard" in message:
            for name, text in message["heard"].items():
                if name in self.own_outputs:
                    getattr(sys, name).write(str(text))


def run(peer: Test) -> None:
    """Judges, then waits to be ended: the program sees its test stop in the same way whatever the verdict."""
    preamble, test, names, entry_point, peer.stops, places, watched = marshal.loads(read_all(TEST))
    peer.places.watch(places, watched)
    status, detail, line = _judged(preamble, test, names, entry_point, peer)
    detail = detail.encode("utf-8", "backslashreplace").decode()
    send_frame(VERDICT, {"status": status, "detail": detail, "line": line})
    while True:
        signal.pause()


def _judged(preamble: Any, test: Any, names: list[str], entry_point: str, peer: Test) -> tuple[str, str, int]:
    """Status, detail, and the line of the test where it failed (0: none)."""
    try:
        peer.answer()  # the program is loaded without being asked to
    except Gone as gone:
        return "failed", f"while it was loaded, {gone}", 0
    except BaseException as raised:
        return "failed", _line(raised), 0
    try:
        space = _space(preamble, test, names, entry_point, peer)
        not_the_tests = space.get("check")  # the prompt's, or the program's: a function may be called so
        exec(test, space)
        check = space.get("check")
        if check is not not_the_tests and callable(check) and not theirs(check):
            check(space["candidate"])
        error = peer.failure
        if error is None:
            return ("passed", "", 0) if peer.used else ("error", "the test never calls the function", 0)
    except Gone as gone:
        return "failed", f"during a call, {gone}", 0
    except BaseException as raised:
        error = peer.failure or raised
        if isinstance(error, MemoryError) and not hasattr(error, "_phi1_facts"):
            return "error", "the test takes more memory than it may have", 0
    # What goes wrong before that is the test's own fault.
    return "failed" if peer.used else "error", _line(error), line_of(error, _FILE)


def _space(preamble: Any, test: Any, names: list[str], entry_point: str, peer: Test) -> dict[str, Any]:
    """The test's names: those of the preamble, the function, and what else it uses of the program's."""
    sys.modules["test"] = module = types.ModuleType("test")  # where dataclasses and annotations look for names
    space: dict[str, Any] = module.__dict__
    space |= {"exactly_equal": exactly_equal, "type_of": peer.type_of}
    space |= {"super_of": peer.super_of, "class_pattern": ClassPatterns(space)}
    guard_pickles(peer, "pickle" in peer.places.watched)
    Texts(peer, preamble, test).guard()
    exec(preamble, space)
    known = {name: kind for name, kind in space.items() if isinstance(kind, type) and kind.__module__ == "test"}
    known = {name: kind for name, kind in known.items() if name != entry_point and _by_attributes(kind)}
    if known:
        peer.ask("classes", *known)
        peer.classes |= known
    for name in names:
        if name not in space:
            with contextlib.suppress(NameError):  # the test's own, or it raises the NameError itself
                space[name] = value = peer.ask("global", name)
                peer.used = True
                if issubclass(type(value), Remote):
                    value._facts["name"] = name
    space["candidate"] = space[entry_point] = Entry(peer, entry_point)
    return space


def _by_attributes(kind: type) -> bool:
    """Whether objects of this class can cross as their attributes."""
    return issubclass(kind, enum.Enum) or (not issubclass(kind, BaseException) and kind.__new__ is object.__new__)


def _line(error: BaseException) -> str:
    """One line on an exception: the program's own, or one that arose in the test."""
    facts = getattr(error, "_phi1_facts", None)
    if facts is None:
        message = message_of(error)
        return f"{type(error).__name__}{': ' if message else ''}{message}"
    return found(facts)


def exactly_equal(left: Any, right: Any) -> bool:
    """`==` that tells 1 from True and from 1.0, within containers too."""
    if type(left) is not type(right):
        return False
    if isinstance(left, (list, tuple)):
        return len(left) == len(right) and all(map(exactly_equal, left, right))
    if isinstance(left, dict):
        return (
            len(left) == len(right)
            and all(key in right and exactly_equal(value, right[key]) for key, value in left.items())
            and exactly_equal(_by_type(left), _by_type(right))
        )
    if isinstance(left, (set, frozenset)):
        return bool(left == right) and _by_type(left) == _by_type(right)
    return bool(left == right)


def _by_type(values: Any) -> list[tuple[str, int]]:
    names = [type(value).__name__ for value in values]
    return sorted((name, names.count(name)) for name in set(names))
