"""How exceptions cross: what they are made of, and the classes that stand for the other side's."""

import builtins
import collections
import importlib
import sys
from collections.abc import Callable
from typing import Any

from phi1.evaluate.inside.frames import TooLarge
from phi1.evaluate.inside.wire import Codec

# What builtin exceptions hold besides their arguments: of an OSError, of a NameError or ImportError.
_NAMED = ("filename", "name")
_DEPTH = 8  # of causes and of exceptions within exceptions
# Modules of the standard library whose exceptions are the same class on both sides, where the test has imported them.
# Not all: one of unittest's would tell a test's runner to skip it.
_LIBRARY = frozenset(
    (
        "_csv",
        "_pickle",
        "_queue",
        "_struct",
        "binascii",
        "concurrent.futures._base",
        "configparser",
        "copy",
        "dataclasses",
        "decimal",
        "graphlib",
        "http.client",
        "ipaddress",
        "json.decoder",
        "locale",
        "pickle",
        "pyexpat",
        "queue",
        "re",
        "re._constants",
        "shutil",
        "sqlite3",
        "sre_constants",
        "statistics",
        "struct",
        "subprocess",
        "tarfile",
        "tomllib",
        "urllib.error",
        "xml.etree.ElementTree",
        "xml.parsers.expat",
        "zipfile",
        "zlib",
        "zoneinfo",
        "zoneinfo._common",
    )
)


class Exceptions(Codec):
    """The part of a conversation that is about exceptions."""

    exported: dict[int, Any]
    careful: bool

    def __init__(self, even: bool) -> None:
        super().__init__(even)
        self.exceptions: dict[int, type[BaseException]] = {}
        self.recent_errors: collections.deque[int] = collections.deque(maxlen=64)  # their attributes may be asked for
        self.depth = 0

    def ask(self, operation: str, *values: Any) -> Any:
        raise NotImplementedError

    def reference_number(self, value: Any) -> int:
        raise NotImplementedError

    def line_of(self, error: BaseException) -> int:
        """The line of the program or test that it came from, 0 if that is not known."""
        return 0

    def exception(self, error: BaseException, atom: Callable[[Any], Any]) -> dict[str, Any]:
        number = getattr(error, "_phi1_number", None)
        if number is not None:
            return {"yours": number}
        number = self.reference_number(error)
        if number not in self.recent_errors:
            if len(self.recent_errors) == self.recent_errors.maxlen:
                self.forget(self.recent_errors[0])
            self.recent_errors.append(number)
        text, message = text_of(error), message_of(error)
        cause, context = error.__cause__, error.__context__
        value, line = getattr(error, "value", None), self.line_of(error)
        if not self.careful:
            error.__traceback__ = None  # it holds the frames' memory, which may be why it was raised
        self.depth += 1
        try:
            inner = self.depth < _DEPTH
            return {
                "classes": self._lineage(error),
                "args": [atom(a) for a in self._arguments(error, inner)],
                "number": number,
                "type": type(error).__name__,
                "message": message,
                "line": line,
                "text": text if any("__str__" in vars(kind) for kind in _own_classes(type(error))) else None,
                "value": atom(value) if isinstance(error, StopIteration) else None,
                "cause": atom(cause) if cause is not None and inner else None,
                "context": atom(context) if context is not None and context is not cause and inner else None,
                "quiet": error.__suppress_context__,
                "notes": [str(note) for note in _notes(error)],
                "named": {} if self.careful else _named(error),
            }
        finally:
            self.depth -= 1

    def _arguments(self, error: BaseException, inner: bool) -> list[Any]:
        """Its arguments, its message where they are not for the other side or too much."""
        plain = all(isinstance(a, (str, int, float, bytes, type(None))) for a in error.args)
        if (plain or (inner and not self.careful)) and not any(isinstance(a, TooLarge) for a in error.args):
            exact = [_exact(a) for a in error.args]
            if not plain or len(repr(exact)) <= 10_000:
                return exact
        return [message_of(error)]

    def _lineage(self, error: BaseException) -> list[Any]:
        """Its classes, most general first: the names of builtin ones, [number, name, module] of others of this side,
        ["yours", number] of the other side's.
        """
        kind = type(error)
        lineage = self.classes_of(kind)
        if isinstance(lineage[-1], str) and not self.careful and getattr(error, "__dict__", None):
            lineage.append([self.reference_number(kind), kind.__name__, ""])  # it has attributes to ask for
        return lineage

    def classes_of(self, kind: type) -> list[Any]:
        lineage: list[Any] = []
        for ancestor in reversed(kind.__mro__):
            if not issubclass(ancestor, BaseException):
                continue
            if getattr(builtins, ancestor.__name__, None) is ancestor:
                lineage.append(ancestor.__name__)
            elif "_phi1_theirs" in vars(ancestor):
                lineage.append(["yours", vars(ancestor)["_phi1_theirs"]])
            else:
                lineage.append([self.reference_number(ancestor), ancestor.__name__, str(ancestor.__module__)])
        return lineage

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
            if entry[0] == "yours":
                bases = [self._own_class(entry[1])]
                continue
            number, name, module = entry
            if number not in self.exceptions:
                known = _of_library(module, name)
                bases = bases if known is None else [known]
                try:
                    made = type(str(name), tuple(bases), {"_phi1_theirs": number})
                except TypeError:  # builtin bases that do not go together here
                    made = type(str(name), (bases[-1],), {"_phi1_theirs": number})
                self.exceptions[number] = made
            bases = [self.exceptions[number]]
        return bases[-1]

    def _own_class(self, number: Any) -> type[BaseException]:
        kind = self.exported.get(number)
        if not (isinstance(kind, type) and issubclass(kind, BaseException)):
            raise ValueError("no such class of exceptions")
        return kind

    def class_here(self, lineage: list[Any]) -> type[BaseException]:
        """The class that a test names: the library's own where there is one, else what `exception_class` says."""
        last = lineage[-1]
        if isinstance(last, str) or last[0] == "yours":
            return self.exception_class(lineage)
        if last[2] in _LIBRARY:
            importlib.import_module(last[2])  # the test means the library's class, wherever it imports that
        known = _of_library(last[2], last[1])
        return known or self.exception_class(lineage)

    def raised(self, facts: dict[str, Any], value: Callable[[Any], Any]) -> BaseException:
        if "yours" in facts:
            error = self.exported.get(facts["yours"])
            if not isinstance(error, BaseException):
                raise ValueError("no such exception")
            return error
        kind, args = self.exception_class(facts["classes"]), [value(atom) for atom in facts["args"]]
        try:
            error = kind(*args)
        except Exception:  # it wants other arguments
            error = kind.__new__(kind)
            error.args = tuple(args)
        if isinstance(error, StopIteration):
            error.value = value(facts["value"])
        cause = value(facts["cause"])
        context = cause if facts["context"] is None else value(facts["context"])
        error.__cause__ = cause if isinstance(cause, BaseException) else None
        error.__context__ = context if isinstance(context, BaseException) else None
        error.__suppress_context__ = bool(facts["quiet"])
        if facts["notes"]:
            error.__notes__ = [str(note) for note in facts["notes"]]  # type: ignore[attr-defined]
        for name in _NAMED:
            if name in facts["named"] and getattr(error, name, "") is None:
                setattr(error, name, str(facts["named"][name]))
        error._phi1_number, error._phi1_facts = facts["number"], facts  # type: ignore[attr-defined]
        if not isinstance(facts["classes"][-1], str):
            if isinstance(facts["text"], str):
                kind.__str__ = lambda self: self._phi1_facts["text"]  # type: ignore[method-assign,attr-defined]
            if "__getattr__" not in vars(kind):
                kind.__getattr__ = lambda error, name: self._of_error(error, name)  # type: ignore[attr-defined]
        return error

    def _of_error(self, error: Any, name: str) -> Any:
        if name.startswith("_") or "_phi1_facts" not in error.__dict__:
            raise AttributeError(name)
        return self.ask("getattr", error, name)


def _named(error: BaseException) -> dict[str, str]:
    return {name: getattr(error, name) for name in _NAMED if type(getattr(error, name, None)) is str}


def _notes(error: BaseException) -> list[Any]:
    notes = getattr(error, "__notes__", [])
    return notes if isinstance(notes, list) else []


def _own_classes(kind: type) -> list[type]:
    return [k for k in kind.__mro__ if issubclass(k, BaseException) and getattr(builtins, k.__name__, None) is not k]


def _of_library(module: Any, name: Any) -> type[BaseException] | None:
    """An exception of the standard library that is loaded here."""
    if module not in _LIBRARY:
        return None
    kind = getattr(sys.modules.get(module), str(name), None)
    return kind if isinstance(kind, type) and issubclass(kind, BaseException) and kind.__module__ == module else None


def _exact(value: Any) -> Any:
    """The plain value of an argument whose class may derive from a plain type."""
    kind: Any
    for kind in (bool, int, float, str, bytes):
        if isinstance(value, kind):
            return kind(value)
    return value


def text_of(error: BaseException) -> str:
    try:
        return str(error)[:10_000]
    except BaseException as broken:  # the program's `__str__`, which may end the program as well
        return f"its message cannot be had ({type(broken).__name__})"


def message_of(error: BaseException) -> str:
    """The first line of an exception's message, without what no report can hold."""
    first = next(iter(text_of(error).splitlines()), "")[:200]
    return first.encode("utf-8", "backslashreplace").decode()


def found(facts: dict[str, Any]) -> str:
    """Of `_phi1_facts`: the exception's class, message and line."""
    where = f" (line {facts['line']})" if facts["line"] else ""
    return f"{facts['type']}{': ' if facts['message'] else ''}{facts['message']}{where}"
