"""What stands for an object of the other process.

The test's side never hands one of its own values to an operator of the program's object: asked `x == 4`, such an
object would only have to say yes, and `abs(x - 4) < 0.1` is no harder. A `Remote` is compared with a plain value by
what it says it holds (`holding.py`), which it must say without knowing what is expected. Two objects of the other
process are its own matter: its `__eq__` decides, as in one process.

Arithmetic with a number, a string, or a list or tuple of them (`vector * 3`) is the object's only where it is no number
itself. What comes back knows the operand: it may be compared with objects of its kind and printed, but it says no
number, and it is not taken apart where the operand had items.
"""

import functools
import sys
import types
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

from phi1.evaluate.inside.deriving import base_for
from phi1.evaluate.inside.holding import kind_of, types_of
from phi1.evaluate.inside.kinds import TYPES
from phi1.evaluate.inside.operations import (
    ANSWERS,
    BINARY,
    COMPARISONS,
    EXITS,
    IN_PLACE,
    ITEMS,
    NUMBERS,
    OF_NUMBERS,
    SCALARS,
    UNARY,
    pickled_by,
    unpickled,
)

if TYPE_CHECKING:
    from phi1.evaluate.inside.peer import Peer


# By these a library in the test's process asks an object for an address, and reads the memory there: numpy, torch,
# arrow, ctypes. An address of the program's would be read in the wrong process.
_OF_MEMORY = (
    "__array_interface__",
    "__array_struct__",
    "__arrow_",
    "__buffer__",
    "__cuda_array_interface__",
    "__dataframe__",
    "__dlpack",
    "_as_parameter_",
)


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
        if name.startswith(_OF_MEMORY):
            raise AttributeError(name)
        if self._told == "items" or (self._told and (name in OF_NUMBERS or name == "__array__")):
            raise _untrusted(self, f".{name}")
        return self._peer.ask("getattr", self, name)

    def __setattr__(self, name: str, value: Any) -> None:
        operation = "set function" if type(value) is types.FunctionType else "setattr"
        self._peer.ask(operation, self, name, value)

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
        pickled_by[:] = [self._peer]
        return unpickled, (self._peer.ask("pickle", self),)

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
    return plain if isinstance(plain, types_of(wanted)) and not theirs(plain) else NotImplemented


# What Python's own arithmetic takes an object for a number by: `__int__` alone is for `int(x)`.
_READ_AS = {"__index__": int, "__float__": float, "__complex__": complex}


def _number(value: Any) -> Any:
    if not isinstance(value, Remote):
        return value
    if value._told:
        raise _untrusted(value, "a number")
    for name, kind in _READ_AS.items():
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
    if not any(number in self._facts["special"] for number in _READ_AS) and name not in COMPARISONS:
        handed = other if type(other) in (list, tuple) else (other,)
        if not all(type(item) in SCALARS for item in handed):
            return NotImplemented
        peer.told.update(handed)
        result = peer.ask(name, *operands)
        if not isinstance(result, Remote):
            raise _untrusted(self, f"{type(result).__name__} by {name}")
        object.__setattr__(result, "_told", "scalar" if type(other) in SCALARS else "items")
        # With every method by which a number could be had of it, so that the attempt is seen.
        _SET_CLASS(result, class_for((*result._facts["special"], *ANSWERS, *COMPARISONS)))
        return result
    plain = _number(self)
    if plain is NotImplemented and name in COMPARISONS and kind_of(other) == "number":
        plain = _held(self, other)
    return NotImplemented if plain is NotImplemented else operator(*((other, plain) if swapped else (plain, other)))


def _binary(name: str) -> Callable[[Any, Any], Any]:
    return lambda self, other: _operated(name, self, BINARY[name], False, other)


def _reflected(name: str) -> Callable[[Any, Any], Any]:
    return lambda self, other: _operated(name, self, BINARY[name], True, other)


def _in_place(name: str) -> Callable[[Any, Any], Any]:
    return lambda self, other: _operated(name, self, IN_PLACE[name], False, other)


def _unary(name: str) -> Callable[..., Any]:
    def method(self: Any, *arguments: Any) -> Any:
        told = getattr(self, "_told", "")
        if told and (name in ANSWERS or (told == "items" and name in ITEMS)):
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
_SIGNATURE = property(lambda self: self._peer.ask("signature", self))
_CLASS = property(lambda self: self._peer.ask("type", self))


def _exit(name: str) -> Callable[..., Any]:
    return lambda self, kind, error, trace: self._peer.ask(name, self, error)


def _call(self: Remote, *args: Any, **kwargs: Any) -> Any:
    return _made(self._facts.get("name", ""), self._peer.ask("call", self, kwargs or None, *args))


def _made(name: str, value: Any) -> Any:
    """What calling gave. name: by which the test called; a capital says that the test expects a class, whose object it
    then makes and may ask (`"ab" in Trie()`): of another's result it does not know what it is.
    """
    if name[:1].isupper() and issubclass(type(value), Remote):
        value._facts["made"] = True
    return value


def _contains(self: Remote, item: Any) -> bool:
    """By its items, not by its own word, unless the item is of the program as well, or the test made the object and it
    does not tell its items.
    """
    if "__contains__" in self._facts["special"]:
        # Not where another call gave it, too: `"ab" in trie.words()` is not for a trie to say.
        of_its_own = "made" in self._facts and "again" not in self._facts and "__iter__" not in self._facts["special"]
        if theirs(item) or of_its_own or not self._peer.careful:
            return bool(self._peer.ask("__contains__", self, item))
    return any(item is one or item == one for one in self)  # type: ignore[attr-defined]


@functools.cache
def class_for(special: tuple[str, ...], fields: tuple[str, ...] = (), kind: type | None = None) -> type[Remote]:
    """fields: of a dataclass, for what the test's `dataclasses` does with it. kind: what `isinstance` takes it for."""
    methods: dict[str, Any] = {"__slots__": (), "__hash__": Remote.__hash__, "__doc__": _DOC}
    if fields and "dataclasses" in sys.modules:
        methods["__class__"] = _CLASS  # dataclasses.replace makes another of it
        methods["__dataclass_fields__"] = vars(sys.modules["dataclasses"].make_dataclass("_", fields))[
            "__dataclass_fields__"
        ]
    for name in special:
        if name in EXITS:
            methods[name] = _exit(name)
        elif name in NUMBERS:
            methods[name] = _says_number(name)
        elif name in UNARY and name not in ("__str__", "__repr__"):
            methods[name] = _unary(name)
        elif name in BINARY and name not in ("__eq__", "__ne__"):
            methods[name] = _binary(name)
        elif name in IN_PLACE:
            methods[name] = _in_place(name)
        elif name.startswith("__r") and f"__{name[3:]}" in BINARY:
            methods[name] = _reflected(f"__{name[3:]}")
    if "__call__" in special:
        methods["__call__"], methods["__signature__"] = _call, _SIGNATURE
    if kind is not None:
        methods["__class__"] = kind
    if "__iter__" in special or "__contains__" in special:
        methods["__contains__"] = _contains
    return type("Remote", (Remote,), methods)


_REFLECTED = tuple(f"__r{name[2:]}" for name in BINARY if name not in COMPARISONS)
_SPECIAL = (*UNARY, *BINARY, *IN_PLACE, *_REFLECTED, "__contains__", "__call__")


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
    return [name for name in (*_OWN, *BINARY, *_REFLECTED) if name in defined]


def derived_class(peer: "Peer", plain: type, facts: dict[str, Any]) -> Any:
    """A class for objects that are a plain value here and have the attributes of the other side's object."""

    def attribute(self: Any, name: str) -> Any:
        if name.startswith(("__", *_OF_MEMORY)):
            raise AttributeError(name)
        return peer.ask("getattr", self, name)

    methods: dict[str, Any] = {"__getattr__": attribute, "_peer": peer}
    for name in facts.get("over", ()):
        if name in EXITS:
            methods[name] = _exit(name)
        elif name == "__call__":
            methods[name] = _call
        elif name in UNARY:
            methods[name] = _unary(name)
        elif name in BINARY or name in _REFLECTED:
            methods[name] = _of_two(name, plain)
        elif name in _OWN:
            methods[name] = property(functools.partial(attribute, name=name))
    if "__eq__" in methods:
        methods["__hash__"] = None if facts["hash"] is None else lambda self: facts["hash"]
    return type(str(facts["type"]), (plain,), methods)


def _of_two(name: str, plain: type) -> Callable[[Any, Any], Any]:
    """An operator: the program's between its own objects, the plain type's with a value of the test's."""
    by_value = getattr(plain, name, lambda self, other: NotImplemented)
    asked = name if name in BINARY else f"__{name[3:]}"

    def method(self: Any, other: Any) -> Any:
        if theirs(other) or not self._peer.careful:
            return self._peer.ask(asked, *((self, other) if name in BINARY else (other, self)))
        return by_value(self, other)

    return method


class Entry:
    # No docstring: it would stand for the function's. The program's function (or class), by its name: called so, and
    # looked at as the object that the name stands for.
    __slots__ = ("_name", "_peer", "_remote")

    def __init__(self, peer: Any, name: str) -> None:
        self._peer, self._name, self._remote = peer, name, None

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        return _made(self._name, self._peer.ask("entry", self._name, kwargs or None, *args))

    def itself(self) -> Any:
        if self._remote is None:
            self._peer.used = True
            self._remote = self._peer.ask("global", self._name)
        return self._remote

    def __getattr__(self, name: str) -> Any:
        return getattr(self.itself(), name)

    def __setattr__(self, name: str, value: Any) -> None:
        if name in Entry.__slots__:
            object.__setattr__(self, name, value)
        else:
            setattr(self.itself(), name, value)

    __class__ = property(lambda self: self.itself().__class__)
    __doc__ = property(lambda self: self.itself().__doc__)

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
