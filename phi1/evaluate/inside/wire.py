"""Values as messages between two processes that do not trust each other.

Plain data crosses by value: numbers, strings, containers, the standard library's value types, numpy's arrays, and
objects of classes that both sides have. Mutable containers that both sides hold are *shared*: each message carries
the contents of those that changed, so that a change in place is seen, and an object that comes back is the same
object. Everything else crosses by reference (`peer.py`). The receiver builds values from its own types
only: nothing that arrives brings a method of the sender's.

An atom is None, a bool, float, string or 64-bit integer as it is, else a list: [n] (node n of this message), ["s", id]
(shared), ["r", id, facts] (the sender's object), ["y", id] (the receiver's own object), ["x", facts] (an exception), or
[tag, value] for the rest.
"""

import collections
import enum
import sys
import types
from collections.abc import Callable, Iterator
from typing import Any

from phi1.evaluate.inside.kinds import (
    ARRAY,
    ATOMIC,
    BASE_VALUE,
    MODULES_OF_VALUES,
    MUTABLE,
    OBJECT,
    PLAIN,
    PURE,
    SMALL,
    TYPES,
    VALUES,
    global_value,
    make_value,
)
from phi1.evaluate.inside.remote import overridden

TEXT = 6
"""Characters of the shortest string that is looked upon as a text: a shorter one calls nothing."""


class Codec:
    """One side's end of the shared values.

    even: this side numbers its objects 2, 4, …, the other 1, 3, …; `classes`: by name, those that both sides have
    (an object of one crosses as its attributes). Subclasses say how objects cross by reference.
    """

    def __init__(self, even: bool) -> None:
        self.next_id = 2 if even else 1
        self.classes: dict[str, type] = {
            kind.__name__: kind
            for kind in (collections.UserList, collections.UserDict, collections.UserString, types.SimpleNamespace)
        }
        self.shared: dict[int, tuple[str, list[Any]]] = {}  # id -> kind, contents when last sent or received
        self.objects: dict[int, Any] = {}  # id -> the shared object
        self.numbers: dict[int, int] = {}  # id() of a shared object -> id
        self.to_drop: list[int] = []
        self.texts: set[int] = set()  # hashes of the strings that arrived

    # ---- by reference: for the subclass

    def reference(self, value: Any) -> Any:
        """The atom of a value that crosses by reference."""
        raise NotImplementedError

    def referenced(self, number: int, facts: dict[str, Any]) -> Any:
        """What stands for the other side's object here."""
        raise NotImplementedError

    def own(self, number: int) -> Any:
        """This side's object of a number."""
        raise NotImplementedError

    def derived(self, base: Any, number: int, facts: dict[str, Any]) -> Any:
        """What stands for an object of the other side's class that derives from a plain type; base: its plain value."""
        return base

    def exception(self, error: BaseException, atom: Callable[[Any], Any]) -> dict[str, Any]:
        """What an exception is made of. atom: of what it holds."""
        raise NotImplementedError

    def raised(self, facts: dict[str, Any], value: Callable[[Any], Any]) -> BaseException:
        """The exception here for one of the other side. value: of an atom that it holds."""
        raise NotImplementedError

    def forget(self, number: int) -> None:
        """The other side has no reference to this side's object any more."""

    # ---- sending

    def encode(self, values: list[Any]) -> dict[str, Any]:
        """A message with these values and the shared objects that changed."""
        if not self.shared and all(map(_is_flat, values)):
            return {"v": values}
        message = _Message(self)
        shared_before = list(self.shared.items())
        atoms = [message.atom(value) for value in values]
        changed = []
        for number, (kind, before) in shared_before:
            now = self._contents(kind, self.objects[number])
            if len(now) != len(before) or not all(map(_same, now, before)):
                self.shared[number] = (kind, now)
                changed.append([number, [message.atom(item) for item in now]])
        message.finish()
        return {"v": atoms, "n": message.nodes, "c": changed}

    def _contents(self, kind: str, value: Any) -> list[Any]:
        if kind in MUTABLE:
            return MUTABLE[kind][1](value)
        return (ARRAY if kind == "ndarray" else OBJECT)[0](value)

    def share(self, number: int, kind: str, value: Any, contents: list[Any]) -> None:
        self.shared[number] = (kind, contents)
        self.objects[number] = value
        self.numbers[id(value)] = number

    def unshare(self, number: int) -> None:
        if number in self.shared:
            del self.shared[number]
            del self.numbers[id(self.objects.pop(number))]

    # ---- receiving

    def decode(self, message: dict[str, Any]) -> list[Any]:
        """The values. Raises ValueError, TypeError, KeyError or IndexError for what no peer sends."""
        if "n" in message:
            values = _Building(self, message).values()
        else:
            values = message["v"]
            if not all(map(_is_flat, values)):
                raise ValueError("a list is no plain value")
            self.texts.update(hash(value) for value in values if type(value) is str and len(value) >= TEXT)
        for number in message.get("d", ()):
            self.unshare(number)
            self.forget(number)
        return values


def _is_flat(value: Any) -> bool:
    kind = type(value)
    return kind in ATOMIC or (kind is int and value in SMALL)


def _same(now: Any, before: Any) -> bool:
    return now is before or (type(now) in (bytes, int, str) and type(now) is type(before) and now == before)


class _Message:
    """One message under construction: its nodes, numbered as they are met."""

    def __init__(self, codec: Codec) -> None:
        self.codec = codec
        self.nodes: list[Any] = []
        self.places: dict[int, int] = {}  # id() of a value -> its node
        self.waiting: list[tuple[list[Any], list[Any]]] = []  # a node's list of atoms, and the values for it
        self.kept: list[Any] = []  # what id() was taken of must live until the message is sent

    def finish(self) -> None:
        while self.waiting:
            atoms, values = self.waiting.pop()
            atoms.extend(map(self.atom, values))

    def atom(self, value: Any) -> Any:
        kind = type(value)
        if kind in ATOMIC:
            return value
        if kind is int:
            return value if value in SMALL else ["i", hex(value)]
        if kind is bytes:
            return ["b", value.hex()]
        if kind is complex:
            return ["c", value.real, value.imag]
        number = self.codec.numbers.get(id(value))
        if number is not None:
            return ["s", number]
        place = self.places.get(id(value))
        return self._node(value, kind) if place is None else [place]

    def _node(self, value: Any, kind: type) -> Any:
        codec = self.codec
        if kind is tuple or kind is frozenset:
            return self._add(value, kind.__name__, None, list(value))
        for name, (exact, contents_of, _) in MUTABLE.items():
            if kind is exact:
                extra = [value.default_factory] if name == "defaultdict" else [value.maxlen] if name == "deque" else []
                return self._share(value, name, contents_of(value), extra)
        if kind.__module__ == "numpy" and _has_plain_items(value):
            if kind.__name__ == "ndarray":
                return self._share(value, "ndarray", ARRAY[0](value), [])
            if isinstance(value, sys.modules["numpy"].generic):
                return self._add(value, "scalar", None, [value.dtype.str, value.tobytes()])
        if kind.__module__ in MODULES_OF_VALUES:
            for ancestor in kind.__mro__:
                module = ancestor.__module__.split(".")[0]
                parts = VALUES.get((module, ancestor.__name__))
                if parts is not None and kind.__module__ == ancestor.__module__:
                    return self._add(value, "value", None, [module, ancestor.__name__, *parts(value)])
        if value is Ellipsis or value is NotImplemented:
            return ["g", "builtins", str(value)]
        name = kind.__name__
        if kind is type and TYPES.get(own_name := str(value.__name__)) is value:
            return ["g", "builtins", own_name]
        if kind is types.BuiltinFunctionType and value.__name__ in PURE.get(value.__module__ or "", ()):
            return ["g", value.__module__, value.__name__]
        if codec.classes.get(name) is kind and isinstance(value, enum.Enum):
            return ["e", name, value.name]
        if codec.classes.get(name) is kind and hasattr(value, "__dict__") and not isinstance(value, BaseException):
            return self._share(value, f"object {name}", OBJECT[0](value), [])
        return self._derived(value, kind)

    def _derived(self, value: Any, kind: type) -> Any:
        """An exception, or an object of a class that derives from a plain type; any other crosses by reference."""
        if issubclass(kind, BaseException):
            return ["x", self.codec.exception(value, self.atom)]
        atom = self.codec.reference(value)
        if atom[0] != "r":
            return atom
        for ancestor in kind.__mro__[1:-1]:
            if ancestor in PLAIN:
                atom[2]["over"] = overridden(kind, ancestor)
            if ancestor in BASE_VALUE:
                return ["d", self.atom(BASE_VALUE[ancestor](value)), *atom[1:]]
            for name, (exact, contents_of, _) in MUTABLE.items():
                if ancestor is exact and name in ("list", "dict", "set", "bytearray"):
                    return self._share(value, name, contents_of(value), [], atom[1:])
            parts = VALUES.get((ancestor.__module__, ancestor.__name__))
            if parts is not None:
                atom[2]["over"] = overridden(kind, ancestor)
                plain = make_value(ancestor.__module__, ancestor.__name__, parts(value))
                return ["d", self.atom(plain), *atom[1:]]
        return atom

    def _add(self, value: Any, kind: str, number: int | None, contents: list[Any], *more: Any) -> list[int]:
        place = len(self.nodes)
        atoms: list[Any] = []
        self.nodes.append([kind, number, atoms, *more])
        self.places[id(value)] = place
        self.kept.append(value)
        self.waiting.append((atoms, contents))
        return [place]

    def _share(
        self, value: Any, kind: str, contents: list[Any], extra: list[Any], derived: list[Any] | None = None
    ) -> list[int]:
        number = self.codec.next_id
        self.codec.next_id += 2
        self.codec.share(number, kind, value, contents)
        atoms = [self.atom(item) for item in extra]
        return self._add(value, kind, number, contents, atoms, *([derived] if derived else []))


def _has_plain_items(value: Any) -> bool:
    """Whether a value of numpy's is an array or a scalar of numbers."""
    form = getattr(value, "dtype", None)
    return form is not None and not form.hasobject and form.names is None


class _Building:
    """One received message turned into values. Shells of mutable objects come first, so that cycles close."""

    def __init__(self, codec: Codec, message: dict[str, Any]) -> None:
        self.codec, self.message, self.nodes = codec, message, message["n"]
        self.built: dict[int, Any] = {}

    def values(self) -> list[Any]:
        for place, node in enumerate(self.nodes):
            if node[1] is not None:
                self.built[place] = self._shell(node)
        # Children have higher numbers: filled first, so that what hashes by its attributes has them.
        for place in range(len(self.nodes) - 1, -1, -1):
            kind, number, atoms = self.nodes[place][:3]
            if number is not None:
                self._fill(number, kind, self.built[place], atoms)
        for number, atoms in self.message["c"]:
            kind, _ = self.codec.shared[number]
            self._fill(number, kind, self.codec.objects[number], atoms)
        return [self.value(atom) for atom in self.message["v"]]

    def _shell(self, node: list[Any]) -> Any:
        kind, number, _, extra, *derived = node
        value: Any
        if kind == "ndarray":
            value = sys.modules["numpy"].empty(node[2][2:], node[2][0])
        elif kind.startswith("object "):
            known = self.codec.classes[kind[7:]]
            value = (known if known is types.SimpleNamespace else object).__new__(known)
        elif kind == "deque":
            value = collections.deque(maxlen=self.value(extra[0]))
        elif kind == "defaultdict":
            value = collections.defaultdict(self.value(extra[0]))
        else:
            value = MUTABLE[kind][0]()
            if derived:
                value = self.codec.derived(value, *derived[0])
        self.codec.share(number, kind, value, [])
        return value

    def _fill(self, number: int, kind: str, target: Any, atoms: list[Any]) -> None:
        items = [self.value(atom) for atom in atoms]
        fill = MUTABLE[kind][2] if kind in MUTABLE else (ARRAY if kind == "ndarray" else OBJECT)[1]
        fill(target, items)
        self.codec.shared[number] = (kind, self.codec._contents(kind, target))

    def value(self, atom: Any) -> Any:
        if not isinstance(atom, list):
            if type(atom) is str and len(atom) >= TEXT:
                self.codec.texts.add(hash(atom))
            return atom
        first = atom[0]
        if isinstance(first, int):
            if first not in self.built:
                self.built[first] = self._immutable(*self.nodes[first][:3])
            return self.built[first]
        if first == "s":
            return self.codec.objects[atom[1]]
        if first == "i":
            return int(atom[1], 16)
        if first == "b":
            return bytes.fromhex(atom[1])
        if first == "c":
            return complex(atom[1], atom[2])
        if first == "r":
            return self.codec.referenced(atom[1], atom[2])
        if first == "y":
            return self.codec.own(atom[1])
        if first == "d":
            return self.codec.derived(self.value(atom[1]), atom[2], atom[3])
        if first == "x":
            return self.codec.raised(atom[1], self.value)
        if first == "g":
            return global_value(atom[1], atom[2])
        if first == "e":
            member: Any = self.codec.classes[atom[1]]
            return member[atom[2]]
        raise ValueError(f"no value begins with {first!r}")

    def _immutable(self, kind: str, _: None, atoms: list[Any]) -> Any:
        items: Iterator[Any] = (self.value(atom) for atom in atoms)
        if kind == "tuple":
            return tuple(items)
        if kind == "frozenset":
            return frozenset(items)
        if kind == "scalar":
            form, data = items
            return sys.modules["numpy"].frombuffer(data, form)[0]
        if kind == "value":
            module, name, *arguments = items
            return make_value(module, name, arguments)
        raise ValueError(f"no value of kind {kind!r}")
