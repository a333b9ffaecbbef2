"""The conversation of the two processes of a job: each asks for operations on the other's objects, and does those asked of its own."""

import _thread
import builtins
import collections
import sys
import types
import weakref
from typing import Any

from phi1.evaluate.inside.frames import Frames, Gone, TooLarge, send_frame
from phi1.evaluate.inside.remote import OPERATIONS, Remote, class_for, coroutine_of, generator_of, special_methods
from phi1.evaluate.inside.wire import Codec

_NAMES = ("__name__", "__qualname__", "__module__", "__doc__")  # what functools.wraps copies


class Refused(TypeError):
    """An operation that is not carried out across the boundary."""


class Peer(Codec):
    """One side's conversation: asks for operations on the other's objects, carries out those asked of its own.

    careful: this side is the test's: its values are not handed to the other's operators, and of its objects the
    other may call functions, advance iterators, and use the public attributes of instances of the test's own classes.
    """

    def __init__(self, descriptor: int, *, careful: bool) -> None:
        super().__init__(even=careful)
        self.descriptor, self.careful = descriptor, careful
        self.frames = Frames(descriptor)
        self.exported: dict[int, Any] = {}
        self.export_numbers: dict[int, int] = {}
        self.remotes: weakref.WeakValueDictionary[int, Any] = weakref.WeakValueDictionary()
        self.exceptions: dict[int, type[BaseException]] = {}
        self.recent_errors: collections.deque[int] = collections.deque(maxlen=64)  # their attributes may be asked for
        self.lock = _thread.RLock()
        self.failure: BaseException | None = None
        """The first failed assertion of the test within a call by the program: catching it there does not undo it."""

    # ---- the conversation

    def ask(self, operation: str, *values: Any) -> Any:
        """Has the other side carry it out; raises what it raised there."""
        with self.lock:
            self._post(operation, list(values))
            return self.answer()

    def answer(self) -> Any:
        """Waits for what the other side returns or raises; meanwhile carries out what it asks."""
        while True:
            kind, answer = self._next()
            if kind == "return":
                return answer[0]
            if kind == "raise":
                raise self.raised(answer[0])
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
            self._post("raise", [self.describe(error)])

    def _post(self, kind: str, values: list[Any]) -> None:
        with self.lock:
            message = {"k": kind, **self.encode(values), **self.beside()}
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
            return message["k"], self.decode(message)
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

    def prune(self) -> None:
        """Gives up shared objects that nothing here holds any more."""
        if not self.objects:
            return
        for number in [n for n, value in self.objects.items() if sys.getrefcount(value) <= _UNHELD]:
            self.unshare(number)
            self.to_drop.append(number)

    # ---- operations on this side's objects

    def perform(self, operation: str, values: list[Any]) -> Any:
        if operation not in OPERATIONS:
            raise Refused(f"no operation {operation}")
        if self.careful:
            self._permit(operation, values)
        if operation == "throw":
            values[1] = self.raised(values[1])
        perform: Any = OPERATIONS[operation]
        return perform(*values)

    def _permit(self, operation: str, values: list[Any]) -> None:
        target = values[0]
        if operation == "call":
            allowed = callable(target)
        elif operation in ("getattr", "setattr", "delattr"):
            name = str(values[1])
            named = operation == "getattr" and name in _NAMES and isinstance(target, types.FunctionType)
            if not named and (not _of_the_test(target) or name.startswith("_")):
                raise AttributeError(f"{name} of the test's {type(target).__name__} is not for the program")
            allowed = True
        elif operation in ("send", "throw", "close"):
            allowed = isinstance(target, types.GeneratorType)
        elif operation in ("__next__", "__iter__"):
            allowed = True
        else:
            allowed = operation in special_methods(type(target))
        if not allowed:
            raise Refused(f"{operation} on the test's {type(target).__name__} is not for the program")

    # ---- references

    def reference(self, value: Any) -> Any:
        other = getattr(value, "__dict__", {}).get("_phi1_number") if not isinstance(value, Remote) else value._number
        if other is not None and not isinstance(value, type):
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
        elif isinstance(value, types.CoroutineType):
            facts["is"] = "coroutine"
        elif isinstance(value, type) and issubclass(value, BaseException):
            facts["is"] = "exceptions"
            facts["classes"] = self._lineage(value)
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
            return known
        if number in self.to_drop:  # let go, but the other side was not yet told
            self.to_drop.remove(number)
        if facts.get("is") == "exceptions":
            return self.exception_class(facts["classes"])
        special = tuple(name for name in facts["special"] if isinstance(name, str))
        if facts["hash"] is not None and type(facts["hash"]) is not int:
            raise ValueError("a hash is an integer")
        remote = class_for(special)(self, number, facts)
        value: Any = remote
        if facts.get("is") == "generator":
            value = generator_of(remote)
        elif facts.get("is") == "coroutine":
            value = coroutine_of(remote)
        self.remotes[number] = value
        return value

    def derived(self, base: Any, number: int, facts: dict[str, Any]) -> Any:
        """An object of a class of its own that is a plain value, and has the attributes of the other side's object."""
        peer = self

        def attribute(self: Any, name: str) -> Any:
            if name.startswith("__"):
                raise AttributeError(name)
            return peer.ask("getattr", self, name)

        kind: Any = type(str(facts["type"]), (type(base),), {"__getattr__": attribute})
        value = kind(base) if not isinstance(base, (list, dict, set, bytearray)) else kind()
        value.__dict__["_phi1_number"] = number
        return value

    # ---- exceptions

    def describe(self, error: BaseException) -> dict[str, Any]:
        """An exception as plain data: its classes, what it was made of, where it came from."""
        if getattr(error, "_phi1_number", None) is not None and not isinstance(error, type):
            return {"yours": error._phi1_number}  # type: ignore[attr-defined]
        number = self.reference_number(error)
        if len(self.recent_errors) == self.recent_errors.maxlen:
            self.forget(self.recent_errors[0])
        self.recent_errors.append(number)
        args = [
            a for a in error.args if isinstance(a, (str, int, float, bytes, type(None))) and not isinstance(a, TooLarge)
        ]
        if len(args) < len(error.args) or len(repr(args)) > 10_000:
            args = [message_of(error)]
        value = error.value if isinstance(error, StopIteration) else None
        line = self.line_of(error)
        if not self.careful:
            error.__traceback__ = None  # it holds the frames' memory, which may be why it was raised
        return {
            "classes": self._lineage(type(error)), "args": [_exact(a) for a in args], "number": number,
            "type": type(error).__name__, "message": message_of(error), "value": value, "line": line,
        }  # fmt: skip

    def line_of(self, error: BaseException) -> int:
        """The line of the program or test that it came from, 0 if that is not known."""
        return 0

    def _lineage(self, kind: type) -> list[Any]:
        """The classes of an exception, most general first: the names of builtin ones, [number, name] of others."""
        lineage: list[Any] = []
        for ancestor in reversed(kind.__mro__):
            if not issubclass(ancestor, BaseException):
                continue
            if getattr(builtins, ancestor.__name__, None) is ancestor:
                lineage.append(ancestor.__name__)
            elif "_phi1_theirs" not in vars(ancestor):
                number = self.reference_number(ancestor)
                lineage.append([number, ancestor.__name__])
        return lineage

    def reference_number(self, value: Any) -> int:
        if id(value) not in self.export_numbers:
            self.exported[self.next_id] = value
            self.export_numbers[id(value)] = self.next_id
            self.next_id += 2
        return self.export_numbers[id(value)]

    def exception_class(self, lineage: list[Any]) -> type[BaseException]:
        """The class here that stands for the other side's: it derives from the same builtin exceptions."""
        bases: list[type[BaseException]] = []
        for entry in lineage:
            if isinstance(entry, str):
                kind = getattr(builtins, entry)
                if not (isinstance(kind, type) and issubclass(kind, BaseException)):
                    raise ValueError(f"{entry} is no exception")
                bases = [base for base in bases if not issubclass(kind, base)] + [kind]
                continue
            number, name = entry
            if number not in self.exceptions:
                try:
                    made = type(str(name), tuple(bases), {"_phi1_theirs": True})
                except TypeError:  # builtin bases that do not go together here
                    made = type(str(name), (bases[-1],), {"_phi1_theirs": True})
                self.exceptions[number] = made
            bases = [self.exceptions[number]]
        return bases[-1]

    def raised(self, facts: dict[str, Any]) -> BaseException:
        """The exception to raise here for one that the other side raised."""
        if "yours" in facts:
            error = self.exported.get(facts["yours"])
            if not isinstance(error, BaseException):
                raise Gone("its answer cannot be read (no such exception)")
            return error
        try:
            kind = self.exception_class(facts["classes"])
            try:
                error = kind(*facts["args"])
            except Exception:  # it wants other arguments
                error = RuntimeError(str(facts["message"]))
            if isinstance(error, StopIteration):
                error.value = facts["value"]
            peer, number = self, facts["number"]
            error._phi1_number, error._phi1_facts = number, facts  # type: ignore[attr-defined]
            if not isinstance(facts["classes"][-1], str) and "__getattr__" not in vars(type(error)):
                type(error).__getattr__ = lambda self, name: peer._of_error(self, name)  # type: ignore[attr-defined]
            return error
        except (KeyError, TypeError, ValueError, IndexError, AttributeError) as broken:
            raise Gone(f"its answer cannot be read ({type(broken).__name__})") from broken

    def _of_error(self, error: Any, name: str) -> Any:
        if name.startswith("_") or "_phi1_facts" not in error.__dict__:
            raise AttributeError(name)
        return self.ask("getattr", error, name)


def _exact(value: Any) -> Any:
    """The plain value of an argument whose class may derive from a plain type."""
    kind: Any
    for kind in (bool, int, float, str, bytes):
        if isinstance(value, kind):
            return kind(value)
    return value


def message_of(error: BaseException) -> str:
    """The first line of an exception's message, without what no report can hold."""
    try:
        text = str(error)
        first = text.splitlines()[0][:200] if text else ""
    except Exception as broken:
        first = f"its message cannot be had ({type(broken).__name__})"
    return first.encode("utf-8", "backslashreplace").decode()


def _of_the_test(value: Any) -> bool:
    """An instance of a class that the test wrote."""
    return type(value).__module__ == "test" and not isinstance(value, type)


def _unheld() -> int:
    """What sys.getrefcount says of an object that only Peer.objects holds, counted as `prune` counts."""
    objects: dict[int, Any] = {1: []}
    return max([sys.getrefcount(value) for _, value in objects.items()])


_UNHELD = _unheld()
