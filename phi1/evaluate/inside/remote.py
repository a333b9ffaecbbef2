"""What stands for an object of the other process.

The test's side never hands one of its own values to an operator of the program's object: asked `x == 4`, such an
object would only have to say yes, and `abs(x - 4) < 0.1` is no harder. A `Remote` is compared with a plain value by
what it says it holds (a number, items, keys), which it must say without knowing what is expected. Two objects of the
other process are its own matter: its `__eq__` decides, as in one process.

Arithmetic with a number, a string, or a list or tuple of them (`vector * 3`) is the object's only where it is no number
itself. What comes back knows the operand: it may be compared with objects of its kind and printed, but it says no
number, and it is not taken apart where the operand had items.
"""

import copy
import functools
import importlib
import math
import operator
import os
import sys
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

from phi1.evaluate.inside.deriving import base_for, derive
from phi1.evaluate.inside.holding import KINDS, held, kind_of
from phi1.evaluate.inside.kinds import TYPES

if TYPE_CHECKING:
    from phi1.evaluate.inside.peer import Peer

# What a class may define, and the function that does it in the process that holds the object.
_UNARY: dict[str, Callable[..., Any]] = {
    "__len__": len,
    "__iter__": iter,
    "__next__": next,
    "__reversed__": reversed,
    "__int__": int,
    "__float__": float,
    "__complex__": complex,
    "__index__": operator.index,
    "__bool__": bool,
    "__abs__": abs,
    "__neg__": operator.neg,
    "__pos__": operator.pos,
    "__invert__": operator.invert,
    "__round__": round,
    "__trunc__": math.trunc,
    "__floor__": math.floor,
    "__ceil__": math.ceil,
    "__str__": str,
    "__repr__": repr,
    "__format__": format,
    "__bytes__": bytes,
    "__fspath__": os.fspath,
    "__getitem__": operator.getitem,
    "__setitem__": operator.setitem,
    "__delitem__": operator.delitem,
    "__missing__": lambda value, key: type(value).__missing__(value, key),
    "__enter__": lambda value: type(value).__enter__(value),
    "__exit__": lambda value, error: type(value).__exit__(value, *_thrown(error)),
    "__aenter__": lambda value: type(value).__aenter__(value),
    "__aexit__": lambda value, error: type(value).__aexit__(value, *_thrown(error)),
    "__aiter__": lambda value: type(value).__aiter__(value),
    "__anext__": lambda value: type(value).__anext__(value),
}
_EXITS = ("__exit__", "__aexit__")
_BINARY: dict[str, Callable[..., Any]] = {
    f"__{name}__": getattr(operator, f"{name}_" if name in ("and", "or") else name)
    for name in (
        "add",
        "sub",
        "mul",
        "truediv",
        "floordiv",
        "mod",
        "pow",
        "matmul",
        "lshift",
        "rshift",
        "and",
        "or",
        "xor",
        "lt",
        "le",
        "gt",
        "ge",
        "eq",
        "ne",
    )
} | {"__divmod__": divmod}
_COMPARISONS = ("__lt__", "__le__", "__gt__", "__ge__", "__eq__", "__ne__")
_IN_PLACE = {
    f"__i{name[2:]}": getattr(operator, f"i{name[2:-2]}")
    for name in _BINARY
    if name not in _COMPARISONS and name != "__divmod__"
}
# By these an object says a number: once, until something else is asked. Else it could say another each time it is
# asked.
NUMBERS = ("__int__", "__float__", "__complex__", "__index__")
ASKED_ONCE = (*NUMBERS, "held", "type")
_ANSWERS = (*NUMBERS, "__bool__", "__len__", "__abs__", "__round__", "__trunc__", "__floor__", "__ceil__", "__format__")
_ITEMS = ("__iter__", "__next__", "__reversed__", "__getitem__", "__call__", "__enter__", "__missing__")
SCALARS = (int, float, complex, bool, str)
_OF_NUMBERS = frozenset(name for kind in (int, float, complex) for name in dir(kind) if name[0] != "_")


_pickled_by: "list[Peer]" = []


def _pickle() -> Any:
    return importlib.import_module("pickle")


def _unpickled(data: bytes) -> Any:
    """An object of the other process again, for the `pickle` of this one."""
    return _pickled_by[0].ask("unpickle", data)


@functools.cache
def _loop() -> Any:
    """One for all that is awaited here: an asynchronous generator ends with its loop."""
    return importlib.import_module("asyncio").new_event_loop()


OPERATIONS: dict[str, Callable[..., Any]] = {
    **_UNARY,
    **_BINARY,
    **_IN_PLACE,
    "__contains__": operator.contains,
    "type": type,
    "getattr": getattr,
    "setattr": setattr,
    "delattr": delattr,
    "isinstance": isinstance,
    "issubclass": issubclass,
    "call": lambda function, kwargs, *args: function(*args, **(kwargs or {})),
    "dir": dir,
    "copy": copy.copy,
    "deepcopy": copy.deepcopy,
    "send": lambda generator, value: generator.send(value),
    "throw": lambda generator, error: generator.throw(error),
    "close": lambda generator: generator.close(),
    "held": held,
    "derive": derive,
    "super": lambda kind, value, name: getattr(super(kind, value), name),
    "pickle": lambda value: _pickle().dumps(value),
    "unpickle": lambda data: _pickle().loads(data),
    "run": lambda awaitable: _loop().run_until_complete(_result_of(awaitable)),
}


async def _result_of(awaitable: Any) -> Any:
    return await awaitable


def _thrown(error: BaseException | None) -> tuple[Any, Any, Any]:
    return (None, None, None) if error is None else (type(error), error, error.__traceback__)


def theirs(value: Any) -> bool:
    """Whether it stands for an object of the other process."""
    return isinstance(value, (Remote, Entry)) or "_phi1_number" in getattr(value, "__dict__", ())


class Remote:
    """Stands for an object of the other process. Subclasses, made as needed, have the special methods that its class
    has.
    """

    __slots__ = ("__weakref__", "_facts", "_number", "_peer", "_told")

    def __init__(self, peer: "Peer", number: int, facts: dict[str, Any]) -> None:
        for name, value in (("_peer", peer), ("_number", number), ("_facts", facts), ("_told", "")):
            object.__setattr__(self, name, value)

    def __del__(self) -> None:
        self._peer.to_drop.append(self._number)

    def __getattr__(self, name: str) -> Any:
        if self._told == "items" or (self._told and name in _OF_NUMBERS):
            raise _untrusted(self, f".{name}")
        return self._peer.ask("getattr", self, name)

    def __setattr__(self, name: str, value: Any) -> None:
        self._peer.ask("setattr", self, name, value)

    def __delattr__(self, name: str) -> None:
        self._peer.ask("delattr", self, name)

    def __dir__(self) -> list[str]:
        return self._peer.ask("dir", self)

    def __hash__(self) -> int:
        if self._facts["hash"] is None:
            raise TypeError(f"unhashable type: {self._facts['type']!r}")
        return self._facts["hash"]

    def __instancecheck__(self, value: Any) -> bool:
        if theirs(value) or type(value).__module__ == "test":
            return self._peer.ask("isinstance", value, self) is True
        kind = type(value)
        return TYPES.get(kind.__name__) is kind and issubclass(kind, self)  # type: ignore[arg-type]

    def __subclasscheck__(self, value: Any) -> bool:
        return self._peer.ask("issubclass", value, self) is True

    def __mro_entries__(self, bases: Any) -> Any:
        return (base_for(self._peer),)

    def __reduce_ex__(self, protocol: Any) -> Any:
        _pickled_by[:] = [self._peer]
        return _unpickled, (self._peer.ask("pickle", self),)

    def __copy__(self) -> Any:
        return self._peer.ask("copy", self)

    def __deepcopy__(self, memo: Any) -> Any:
        return self._peer.ask("deepcopy", self)

    def __repr__(self) -> str:
        return str(self._peer.ask("__repr__", self))

    def __str__(self) -> str:
        return str(self._peer.ask("__str__", self))

    def __eq__(self, other: Any) -> Any:
        if self is other:
            return True
        if "__eq__" not in self._facts["special"]:
            return NotImplemented
        if theirs(other):
            return self._peer.ask("__eq__", self, other)
        plain = _held(self, other)
        return NotImplemented if plain is NotImplemented else plain == other

    def __ne__(self, other: Any) -> Any:
        equal = self == other
        return NotImplemented if equal is NotImplemented else not equal


def _held(value: Remote, other: Any) -> Any:
    """What the object says it holds, as plain data of the other's kind; NotImplemented where it holds no such."""
    wanted = kind_of(other)
    if wanted is None:
        return NotImplemented
    if value._told == "items" or (value._told and wanted == "number"):
        raise _untrusted(value, f"a {wanted}")
    said, key = value._peer.said, (value._number, wanted)
    if key not in said:
        said[key] = value._peer.ask("held", value, wanted)
    plain = said[key]
    return plain if isinstance(plain, KINDS[wanted]) and not theirs(plain) else NotImplemented


def _number(value: Any) -> Any:
    if not isinstance(value, Remote):
        return value
    if value._told:
        raise _untrusted(value, "a number")
    for name, kind in (("__index__", int), ("__float__", float), ("__complex__", complex)):
        if name in value._facts["special"]:
            return kind(value)
    return NotImplemented


def _untrusted(value: Remote, wanted: str) -> Exception:
    return value._peer.refuse(
        f"{wanted} of the program's {value._facts['type']}, made by an operator that was handed the test's plain data"
    )


def _operated(name: str, self: Remote, operator: Callable[[Any, Any], Any], swapped: bool, other: Any) -> Any:
    peer = self._peer
    operands = (other, self) if swapped else (self, other)
    if theirs(other) or not peer.careful:
        return peer.ask(name, *operands)
    if not any(number in self._facts["special"] for number in NUMBERS) and name not in _COMPARISONS:
        handed = other if type(other) in (list, tuple) else (other,)
        if not all(type(item) in SCALARS for item in handed):
            return NotImplemented
        peer.told.update(handed)
        result = peer.ask(name, *operands)
        if not isinstance(result, Remote):
            raise _untrusted(self, f"{type(result).__name__} by {name}")
        object.__setattr__(result, "_told", "scalar" if type(other) in SCALARS else "items")
        # With every method by which a number could be had of it, so that the attempt is seen.
        _SET_CLASS(result, class_for((*result._facts["special"], *_ANSWERS, *_COMPARISONS)))
        return result
    plain = _number(self)
    if plain is NotImplemented and name in _COMPARISONS and kind_of(other) == "number":
        plain = _held(self, other)
    return NotImplemented if plain is NotImplemented else operator(*((other, plain) if swapped else (plain, other)))


def _binary(name: str) -> Callable[[Any, Any], Any]:
    return lambda self, other: _operated(name, self, _BINARY[name], False, other)


def _reflected(name: str) -> Callable[[Any, Any], Any]:
    return lambda self, other: _operated(name, self, _BINARY[name], True, other)


def _in_place(name: str) -> Callable[[Any, Any], Any]:
    return lambda self, other: _operated(name, self, _IN_PLACE[name], False, other)


def _unary(name: str) -> Callable[..., Any]:
    def method(self: Any, *arguments: Any) -> Any:
        told = getattr(self, "_told", "")
        if told and (name in _ANSWERS or (told == "items" and name in _ITEMS)):
            raise _untrusted(self, name)
        return self._peer.ask(name, self, *arguments)

    return method


def _says_number(name: str) -> Callable[[Any], Any]:
    def method(self: Remote) -> Any:
        if self._told:
            raise _untrusted(self, name)
        said = self._peer.said
        if (self._number, name) not in said:
            answer = self._peer.ask(name, self)
            said[self._number, name] = answer
        return said[self._number, name]

    return method


_DOC = property(lambda self: self._peer.ask("getattr", self, "__doc__"))  # else it would be the docstring of Remote


_SET_CLASS = vars(object)["__class__"].__set__
_CLASS = property(lambda self: self._peer.ask("type", self))


def _exit(name: str) -> Callable[..., Any]:
    return lambda self, kind, error, trace: self._peer.ask(name, self, error)


def _call(self: Remote, *args: Any, **kwargs: Any) -> Any:
    return self._peer.ask("call", self, kwargs or None, *args)


def _contains(self: Remote, item: Any) -> bool:
    """By its items, not by its own word, unless the item is of the program as well."""
    if theirs(item) and "__contains__" in self._facts["special"]:
        return bool(self._peer.ask("__contains__", self, item))
    return any(item is one or item == one for one in self)  # type: ignore[attr-defined]


@functools.cache
def class_for(special: tuple[str, ...], fields: tuple[str, ...] = ()) -> type[Remote]:
    """fields: of a dataclass, for what the test's `dataclasses` does with it."""
    methods: dict[str, Any] = {"__slots__": (), "__hash__": Remote.__hash__, "__doc__": _DOC}
    if fields and "dataclasses" in sys.modules:
        methods["__class__"] = _CLASS  # dataclasses.replace makes another of it
        methods["__dataclass_fields__"] = vars(sys.modules["dataclasses"].make_dataclass("_", fields))[
            "__dataclass_fields__"
        ]
    for name in special:
        if name in _EXITS:
            methods[name] = _exit(name)
        elif name in NUMBERS:
            methods[name] = _says_number(name)
        elif name in _UNARY and name not in ("__str__", "__repr__"):
            methods[name] = _unary(name)
        elif name in _BINARY and name not in ("__eq__", "__ne__"):
            methods[name] = _binary(name)
        elif name in _IN_PLACE:
            methods[name] = _in_place(name)
        elif name.startswith("__r") and f"__{name[3:]}" in _BINARY:
            methods[name] = _reflected(f"__{name[3:]}")
    if "__call__" in special:
        methods["__call__"] = _call
    if "__iter__" in special:
        methods["__contains__"] = _contains
    return type("Remote", (Remote,), methods)


_REFLECTED = tuple(f"__r{name[2:]}" for name in _BINARY if name not in _COMPARISONS)
_SPECIAL = (*_UNARY, *_BINARY, *_IN_PLACE, *_REFLECTED, "__contains__", "__call__")


def special_methods(kind: type) -> list[str]:
    """The special methods that cross, of those that the class or its ancestors below `object` define."""
    defined = {name for ancestor in kind.__mro__ if ancestor is not object for name in vars(ancestor)}
    return [name for name in _SPECIAL if name in defined]


# ---- objects of classes that derive from a plain type

# What such a class may say for itself: how it prints, what it adds, and how it changes. What it holds is its plain
# value.
_OWN = (
    "__repr__",
    "__str__",
    "__format__",
    "__missing__",
    "__enter__",
    "__exit__",
    "__call__",
    "__setitem__",
    "__delitem__",
    "append",
    "extend",
    "insert",
    "remove",
    "pop",
    "clear",
    "sort",
    "reverse",
    "popitem",
    "setdefault",
    "update",
    "add",
    "discard",
    "difference_update",
    "intersection_update",
    "symmetric_difference_update",
)


def overridden(kind: type, plain: type) -> list[str]:
    """Names that classes below the plain one define anew and that count on the other side, too."""
    below = kind.__mro__[: kind.__mro__.index(plain)]
    defined = {name for ancestor in below for name in vars(ancestor)}
    return [name for name in (*_OWN, *_BINARY, *_REFLECTED) if name in defined]


def derived_class(peer: "Peer", plain: type, facts: dict[str, Any]) -> Any:
    """A class for objects that are a plain value here and have the attributes of the other side's object."""

    def attribute(self: Any, name: str) -> Any:
        if name.startswith("__"):
            raise AttributeError(name)
        return peer.ask("getattr", self, name)

    methods: dict[str, Any] = {"__getattr__": attribute, "_peer": peer}
    for name in facts.get("over", ()):
        if name in _EXITS:
            methods[name] = _exit(name)
        elif name == "__call__":
            methods[name] = _call
        elif name in _UNARY:
            methods[name] = _unary(name)
        elif name in _BINARY or name in _REFLECTED:
            methods[name] = _of_two(name, plain)
        elif name in _OWN:
            methods[name] = property(functools.partial(attribute, name=name))
    if "__eq__" in methods:
        methods["__hash__"] = None if facts["hash"] is None else lambda self: facts["hash"]
    return type(str(facts["type"]), (plain,), methods)


def _of_two(name: str, plain: type) -> Callable[[Any, Any], Any]:
    """An operator: the program's between its own objects, the plain type's with a value of the test's."""
    by_value = getattr(plain, name, lambda self, other: NotImplemented)
    asked = name if name in _BINARY else f"__{name[3:]}"

    def method(self: Any, other: Any) -> Any:
        if theirs(other) or not self._peer.careful:
            return self._peer.ask(asked, *((self, other) if name in _BINARY else (other, self)))
        return by_value(self, other)

    return method


class Entry:
    # No docstring: it would stand for the function's. The program's function (or class), by its name: called so, and
    # looked at as the object that the name stands for.
    __slots__ = ("_name", "_peer", "_remote")

    def __init__(self, peer: Any, name: str) -> None:
        self._peer, self._name, self._remote = peer, name, None

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        self._peer.calls += 1
        return self._peer.ask("entry", self._name, kwargs or None, *args)

    def itself(self) -> Any:
        if self._remote is None:
            self._peer.calls += 1
            self._remote = self._peer.ask("global", self._name)
        return self._remote

    def __getattr__(self, name: str) -> Any:
        return getattr(self.itself(), name)

    def __setattr__(self, name: str, value: Any) -> None:
        if name in Entry.__slots__:
            object.__setattr__(self, name, value)
        else:
            setattr(self.itself(), name, value)

    @property
    def __doc__(self) -> Any:  # type: ignore[override]
        return self.itself().__doc__

    def __mro_entries__(self, bases: Any) -> Any:
        return self.itself().__mro_entries__(bases)

    def __instancecheck__(self, value: Any) -> bool:
        return isinstance(value, self.itself())

    def __subclasscheck__(self, value: Any) -> bool:
        return issubclass(value.itself() if isinstance(value, Entry) else value, self.itself())

    def __eq__(self, other: Any) -> bool:
        return self is other or bool(self.itself() == other)

    def __hash__(self) -> int:
        return hash(self.itself())

    def __repr__(self) -> str:
        return repr(self.itself())

    def __iter__(self) -> Any:
        return iter(self.itself())

    def __len__(self) -> int:
        return len(self.itself())

    def __bool__(self) -> bool:
        return True

    def __getitem__(self, key: Any) -> Any:
        return self.itself()[key]

    def __contains__(self, item: Any) -> bool:
        return item in self.itself()
