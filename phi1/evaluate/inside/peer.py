"""The conversation of the two processes of a job: each asks for operations on the other's objects, and does those asked
of its own.
"""

import _thread
import sys
import types
import weakref
from typing import Any

from phi1.evaluate.inside.exceptions import Exceptions
from phi1.evaluate.inside.frames import Frames, Gone, send_frame
from phi1.evaluate.inside.kinds import VALUES, make_value
from phi1.evaluate.inside.operations import ASKED_ONCE, OPERATIONS
from phi1.evaluate.inside.remote import Entry, Remote, class_for, derived_class, special_methods, theirs

_NAMES = ("__name__", "__qualname__", "__module__", "__doc__")  # what functools.wraps copies
_FOR_USE = ("test", "_io", "unittest.mock", "queue", "_queue", "threading", "_thread", "random", "argparse")
_OF_MOCKS = (
    "attach_mock",
    "call_args",
    "call_args_list",
    "call_count",
    "called",
    "configure_mock",
    "method_calls",
    "mock_add_spec",
    "mock_calls",
    "reset_mock",
    "return_value",
    "side_effect",
)
_OF_NAMED_TUPLES = ("_replace", "_asdict", "_fields")


class Refused(TypeError):
    """An operation that is not carried out across the boundary."""


class Peer(Exceptions):
    """One side's conversation: asks for operations on the other's objects, carries out those asked of its own.

    careful: this side is the test's: its values are not handed to the other's operators, and of its objects the
    other may call functions, advance iterators, and use the public attributes of instances of the test's own classes,
    of its files in memory and of its mocks.
    """

    def __init__(self, descriptor: int, *, careful: bool) -> None:
        super().__init__(even=careful)
        self.descriptor, self.careful = descriptor, careful
        self.frames = Frames(descriptor)
        self.exported: dict[int, Any] = {}
        self.export_numbers: dict[int, int] = {}
        self.remotes: weakref.WeakValueDictionary[int, Any] = weakref.WeakValueDictionary()
        self.values: dict[int, Any] = {}  # immutable objects of the other side's classes, so that each is one here
        self.told: set[Any] = set()  # numbers and strings that operators of the other side's objects were handed
        self.said: dict[tuple[int, str], Any] = {}  # numbers that objects said since anything else was asked
        self.lock = _thread.RLock()
        self.failure: BaseException | None = None
        """What catching does not undo: the first failed assertion of the test within a call by the program, or
        `refuse`.
        """

    # ---- the conversation

    def ask(self, operation: str, *values: Any) -> Any:
        """Has the other side carry it out; raises what it raised there."""
        with self.lock:
            if operation not in ASKED_ONCE:
                self.said.clear()
            self._post(operation, list(values))
            return self.answer()

    def answer(self) -> Any:
        """Waits for what the other side returns or raises; meanwhile carries out what it asks."""
        while True:
            kind, answer = self._next()
            if kind == "return":
                return answer[0]
            if kind == "raise":
                raise (
                    answer[0]
                    if isinstance(answer[0], BaseException)
                    else Gone("its answer cannot be read (no exception)")
                )
            self._carry_out(kind, answer)

    def serve(self, first: str) -> None:
        """Carries out the first operation unasked, then what is asked, until the other side is gone."""
        try:
            self._carry_out(first, [])
            while True:
                self._carry_out(*self._next())
        except Gone:
            return

    def _carry_out(self, operation: str, values: list[Any]) -> None:
        """Does it, and sends what it returned or raised."""
        try:
            result = self.perform(operation, values)
            self._post("return", [result])
        except Gone:
            raise
        except BaseException as error:
            if self.careful and isinstance(error, AssertionError) and self.failure is None:
                self.failure = error
            self._post("raise", [error])

    def _post(self, kind: str, values: list[Any]) -> None:
        with self.lock:
            given = self.given()
            message = {"k": kind, **self.encode([*values, *given.values()]), **self.beside()}
            if given:
                message["given"] = list(given)
            self.prune()  # not before: what changed and was let go is still news to the other side
            if self.to_drop:
                message["d"], self.to_drop = self.to_drop, []
            try:
                send_frame(self.descriptor, message)
            except OSError as error:
                raise Gone("the program ended") from error

    def _next(self) -> tuple[str, list[Any]]:
        try:
            message = self.frames.next()
            self.take_beside(message)
            return message["k"], self.without_given(message, self.decode(message))
        except (EOFError, OSError) as error:
            raise Gone("the program ended") from error
        except MemoryError as error:
            raise Gone("its answer takes too much memory") from error
        except (ValueError, TypeError, KeyError, IndexError, AttributeError, RecursionError, OverflowError) as error:
            raise Gone(f"its answer cannot be read ({type(error).__name__})") from error

    def beside(self) -> dict[str, Any]:
        """What else a message carries."""
        return {}

    def take_beside(self, message: dict[str, Any]) -> None:
        """Takes that on the other side."""

    def given(self) -> dict[str, Any]:
        """By place: what a test has put in the place of something that the program uses."""
        return {}

    def without_given(self, message: dict[str, Any], values: list[Any]) -> list[Any]:
        """Puts that there on the other side; the other values."""
        return values

    def prune(self) -> None:
        """Gives up shared objects that nothing here holds any more."""
        if not self.objects:
            return
        for number in [n for n, value in self.objects.items() if sys.getrefcount(value) <= _UNHELD]:
            self.unshare(number)
            self.to_drop.append(number)

    def refuse(self, what: str) -> Exception:
        """The exception for an answer that does not count. It stays the test's verdict even where the test catches
        it.
        """
        error = TypeError(f"{what}, does not count; compare with another of its objects")
        self.failure = self.failure or error
        return error

    # ---- operations on this side's objects

    def perform(self, operation: str, values: list[Any]) -> Any:
        if operation not in OPERATIONS:
            raise Refused(f"no operation {operation}")
        if self.careful:
            self._permit(operation, values)
        perform: Any = OPERATIONS[operation]
        result = perform(*values)
        return _without_defaults(result) if self.careful and operation == "signature" else result

    def _permit(self, operation: str, values: list[Any]) -> None:
        target = values[0]
        if operation == "call":
            allowed = callable(target)
        elif operation in ("getattr", "setattr", "delattr"):
            name = str(values[1])
            if type(target).__module__ == "unittest.mock" and _is_of_mocks(name, *values[2:]):
                raise AttributeError(f"{name} of the test's mock is not for the program")
            if operation == "setattr" and callable(getattr(type(target), name, None)):
                raise AttributeError(f"{name} of the test's {type(target).__name__} is a method, and stays one")
            named = operation == "getattr" and name in _NAMES and isinstance(target, types.FunctionType)
            named = named or (isinstance(target, tuple) and name in _OF_NAMED_TUPLES)
            of_class = operation == "getattr" and isinstance(target, type) and target.__module__ == "test"
            if not named and (not (_is_for_use(target) or of_class) or name.startswith("_")):
                raise AttributeError(f"{name} of the test's {type(target).__name__} is not for the program")
            allowed = True
        elif operation in ("send", "throw", "close"):
            allowed = isinstance(target, types.GeneratorType)
        elif operation == "signature":
            allowed = isinstance(target, types.FunctionType)
        elif operation in ("__next__", "__iter__"):
            allowed = True
        elif operation in ("copy", "deepcopy"):
            allowed = type(target).__module__ == "test"
        else:
            allowed = operation in special_methods(type(target))
        if not allowed:
            raise Refused(f"{operation} on the test's {type(target).__name__} is not for the program")

    # ---- references

    def reference(self, value: Any) -> Any:
        if type(value) is Entry:  # not by isinstance, which asks the other side what a Remote's class is
            value = value.itself()
        other = value._number if issubclass(type(value), Remote) else getattr(value, "__dict__", {}).get("_phi1_number")
        if other is not None and not issubclass(type(value), type):
            return ["y", other]
        return ["r", self.reference_number(value), self.facts(value)]

    def facts(self, value: Any) -> dict[str, Any]:
        kind = type(value)
        try:
            hashed = hash(value)
        except Exception:
            hashed = None
        facts: dict[str, Any] = {"type": kind.__name__, "hash": hashed, "special": special_methods(kind)}
        if isinstance(value, types.GeneratorType):
            facts["is"] = "generator"
        elif isinstance(value, types.CoroutineType) or kind.__name__.startswith("async_generator_a"):
            facts["is"] = "coroutine"
        elif isinstance(value, types.FunctionType):
            facts["is"] = "function"
        elif hasattr(kind, "__dataclass_fields__"):
            facts["fields"] = list(kind.__dataclass_fields__)
        elif isinstance(value, type) and hasattr(value, "__class_getitem__"):
            facts["special"].append("__getitem__")
        elif isinstance(value, type) and issubclass(value, BaseException):
            facts["is"] = "exceptions"
            facts["classes"] = self.classes_of(value)
        elif known := [name for name, one in self.classes.items() if isinstance(value, one)]:
            facts["class"] = known[-1]
        return facts

    def own(self, number: int) -> Any:
        return self.exported[number]

    def forget(self, number: int) -> None:
        value = self.exported.pop(number, None)
        if value is not None:
            self.export_numbers.pop(id(value), None)

    def referenced(self, number: int, facts: dict[str, Any]) -> Any:
        known = self.remotes.get(number)
        if known is not None:
            if issubclass(type(known), Remote):
                known._facts["again"] = True
            return known
        if number in self.to_drop:  # let go, but the other side was not yet told
            self.to_drop.remove(number)
        if facts.get("is") == "exceptions":
            return self.class_here(facts["classes"])
        special = tuple(name for name in facts["special"] if isinstance(name, str))
        if facts["hash"] is not None and type(facts["hash"]) is not int:
            raise ValueError("a hash is an integer")
        fields = tuple(name for name in facts.get("fields", ()) if isinstance(name, str))
        kind: type | None = types.FunctionType if facts.get("is") == "function" else None
        if not self.careful:
            kind = self.classes.get(facts.get("class", ""), kind)
        remote = class_for(special, fields, kind)(self, number, facts)
        value: Any = remote
        if facts.get("is") == "generator":
            value = _generator_of(remote)
        elif facts.get("is") == "coroutine":
            value = _coroutine_of(remote)
        self.remotes[number] = value
        return value

    def derived(self, base: Any, number: int, facts: dict[str, Any]) -> Any:
        if number in self.values:
            return self.values[number]
        kind = derived_class(self, type(base), facts)
        if isinstance(base, (list, dict, set, bytearray)):
            value = kind()
        else:
            module, name = type(base).__module__, type(base).__name__
            parts = VALUES.get((module, name))
            value = self.values[number] = kind(base) if parts is None else make_value(module, name, parts(base), kind)
        value.__dict__["_phi1_number"] = number
        return value

    def reference_number(self, value: Any) -> int:
        if id(value) not in self.export_numbers:
            self.exported[self.next_id] = value
            self.export_numbers[id(value)] = self.next_id
            self.next_id += 2
        return self.export_numbers[id(value)]


def _is_of_mocks(name: str, *value: Any) -> bool:
    """Whether by this a program would write or read what a mock notes, instead of calling it."""
    return name in _OF_MOCKS or name.startswith("assert") or any(map(theirs, value))


def _is_for_use(value: Any) -> bool:
    """An instance of a class that the test wrote, a file in memory, a mock, a queue: what is made to be used through
    attributes.
    """
    return type(value).__module__ in _FOR_USE and not isinstance(value, type)


def _without_defaults(signature: Any) -> Any:
    """Of a test's function: a default may be what the test expects (`lambda x, expected=expected: …`)."""
    empty = signature.empty
    return signature.replace(
        parameters=[p if p.default is empty else p.replace(default=...) for p in signature.parameters.values()]
    )


def _unheld() -> int:
    """What sys.getrefcount says of an object that only Peer.objects holds, counted as `prune` counts."""
    objects: dict[int, Any] = {1: []}
    return max([sys.getrefcount(value) for _, value in objects.items()])


_UNHELD = _unheld()


def _generator_of(remote: Any) -> Any:
    peer = remote._peer

    def forward() -> Any:
        step: tuple[Any, ...] = ("__next__",)
        while True:
            try:
                item = peer.ask(step[0], remote, *step[1:])
            except StopIteration as stop:
                return stop.value
            try:
                sent = yield item
                step = ("__next__",) if sent is None else ("send", sent)
            except GeneratorExit:
                peer.ask("close", remote)
                raise
            except BaseException as error:
                step = ("throw", error)

    return forward()


def _coroutine_of(remote: Any) -> Any:
    async def forward() -> Any:
        return remote._peer.ask("run", remote)

    return forward()
