"""Values as messages between two processes that do not trust each other.

Plain data crosses by value: numbers, strings, containers, the standard library's value types, numpy's arrays, and
objects of classes that both sides have. Mutable containers that both sides hold are *shared*: each message carries
the contents of those that changed, so that a change in place is seen, and an object that comes back is the same
object. Everything else crosses by reference (`references.py`). The receiver builds values from its own types
only: nothing that arrives brings a method of the sender's. Messages are JSON after 4 bytes of length.

An atom is None, a bool, float, string or 64-bit integer as it is, else a list: [n] (node n of this message), ["s", id]
(shared), ["r", id, facts] (the sender's object), ["y", id] (the receiver's own object), or [tag, value] for the rest.
"""

import builtins
import collections
import enum
import json
import math
import operator
import os
import struct
import sys
import types
from collections.abc import Callable, Iterator
from typing import Any

MAX_MESSAGE = 16 << 20
"""Bytes of one message: the arguments or the result of a call."""


class Gone(BaseException):
    """The other process ended, or said what no peer says. Not an Exception: a test or program cannot catch it by that."""


class TooLarge(ValueError):
    """A value does not fit in a message."""


_to_json = json.JSONEncoder(separators=(",", ":"), check_circular=False).encode
_from_json = json.JSONDecoder().raw_decode


def send_frame(descriptor: int, message: Any) -> None:
    """Writes one message. Raises TooLarge."""
    data = _to_json(message).encode()
    if len(data) > MAX_MESSAGE:
        raise TooLarge(f"a value of {len(data):,} bytes; at most {MAX_MESSAGE:,} pass between program and test")
    data = struct.pack(">I", len(data)) + data
    written = os.write(descriptor, data)
    if written < len(data):
        view = memoryview(data)[written:]
        while view:
            view = view[os.write(descriptor, view) :]


class Frames:
    """The messages that arrive on a descriptor."""

    def __init__(self, descriptor: int) -> None:
        self.descriptor = descriptor
        self.rest = b""

    def next(self) -> Any:
        """Raises EOFError at the end of the stream, ValueError for what is no message."""
        data = self._at_least(self.rest, 4)
        (length,) = struct.unpack_from(">I", data)
        if length > MAX_MESSAGE:
            raise ValueError(f"a message of {length} bytes")
        data = self._at_least(data, 4 + length)
        self.rest = data[4 + length :]
        return _from_json(data[4 : 4 + length].decode())[0]

    def _at_least(self, data: bytes, count: int) -> bytes:
        if len(data) >= count:
            return data
        parts, held = [data], len(data)
        while held < count:
            part = os.read(self.descriptor, 1 << 16)
            if not part:
                raise EOFError
            parts.append(part)
            held += len(part)
        return b"".join(parts)


def read_all(descriptor: int) -> bytes:
    """A file's data from its beginning."""
    size = os.fstat(descriptor).st_size
    return b"".join(iter(lambda: os.read(descriptor, size), b"")) if size else b""


# ---------------------------------------------------------------- kinds of values

_SMALL = range(-(1 << 63), 1 << 63)
_ATOMIC = frozenset({type(None), bool, float, str})
# Builtin functions that are the same on both sides. None of them reaches beyond its arguments.
_PURE = {
    "builtins": ("abs", "all", "any", "bin", "chr", "divmod", "hash", "hex", "len", "max", "min", "oct", "ord", "pow",
                 "repr", "round", "sorted", "sum"),
    "math": tuple(name for name in vars(math) if not name.startswith("_")),
    "_operator": tuple(name for name in vars(operator) if not name.startswith("_")),
}  # fmt: skip
_TYPES = {name: kind for name, kind in vars(builtins).items() if isinstance(kind, type)}
_IMMUTABLE_BASES = (str, int, float, tuple, bytes, frozenset, complex)


def _fill_list(target: list[Any], items: list[Any]) -> None:
    list.__setitem__(target, slice(None), items)


def _fill_dict(target: dict[Any, Any], items: list[Any]) -> None:
    clear, put = (
        (collections.OrderedDict.clear, collections.OrderedDict.__setitem__)
        if isinstance(target, collections.OrderedDict)
        else (dict.clear, dict.__setitem__)
    )
    clear(target)  # type: ignore[arg-type]
    for key, value in zip(items[::2], items[1::2], strict=True):
        put(target, key, value)  # type: ignore[arg-type]


def _fill_set(target: set[Any], items: list[Any]) -> None:
    set.clear(target)
    set.update(target, items)


def _fill_bytearray(target: bytearray, items: list[Any]) -> None:
    bytearray.__setitem__(target, slice(None), items[0])


def _fill_deque(target: Any, items: list[Any]) -> None:
    collections.deque.clear(target)
    collections.deque.extend(target, items)


def _fill_object(target: Any, items: list[Any]) -> None:
    state = vars(target)
    state.clear()
    state.update(zip(items[::2], items[1::2], strict=True))


def _fill_array(target: Any, items: list[Any]) -> None:
    form, data, *shape = items
    target[...] = sys.modules["numpy"].frombuffer(data, form).reshape(shape)


def _flat(pairs: Any) -> list[Any]:
    return [part for pair in pairs for part in pair]


_Fill = Callable[[Any, list[Any]], None]
# Mutable kinds: the type, its contents as a list of values, and how an object of it takes new contents.
_MUTABLE: dict[str, tuple[type, Callable[[Any], list[Any]], _Fill]] = {
    "list": (list, lambda value: list(list.__iter__(value)), _fill_list),
    "OrderedDict": (collections.OrderedDict, lambda value: _flat(collections.OrderedDict.items(value)), _fill_dict),
    "Counter": (collections.Counter, lambda value: _flat(dict.items(value)), _fill_dict),
    "defaultdict": (collections.defaultdict, lambda value: _flat(dict.items(value)), _fill_dict),
    "dict": (dict, lambda value: _flat(dict.items(value)), _fill_dict),
    "set": (set, lambda value: list(set.__iter__(value)), _fill_set),
    "bytearray": (bytearray, lambda value: [bytes(value)], _fill_bytearray),
    "deque": (collections.deque, lambda value: list(collections.deque.__iter__(value)), _fill_deque),
}
_OBJECT: tuple[Callable[[Any], list[Any]], _Fill] = (lambda value: _flat(vars(value).items()), _fill_object)
_ARRAY: tuple[Callable[[Any], list[Any]], _Fill] = (
    lambda value: [value.dtype.str, value.tobytes(), *value.shape],
    _fill_array,
)
# Value types: what they are made of, as the arguments that make them again.
_VALUES: dict[tuple[str, str], Callable[[Any], list[Any]]] = {
    ("fractions", "Fraction"): lambda v: [v.numerator, v.denominator],
    ("decimal", "Decimal"): lambda v: [str(v)],
    ("datetime", "datetime"): lambda v: [
        v.year, v.month, v.day, v.hour, v.minute, v.second, v.microsecond, v.tzinfo, v.fold],
    ("datetime", "date"): lambda v: [v.year, v.month, v.day],
    ("datetime", "time"): lambda v: [v.hour, v.minute, v.second, v.microsecond, v.tzinfo, v.fold],
    ("datetime", "timedelta"): lambda v: [v.days, v.seconds, v.microseconds],
    ("datetime", "timezone"): lambda v: [v.utcoffset(None), v.tzname(None)],
    ("zoneinfo", "ZoneInfo"): lambda v: [v.key],
    ("uuid", "UUID"): lambda v: [str(v)],
    ("pathlib", "PosixPath"): lambda v: [str(v)],
    ("pathlib", "PurePosixPath"): lambda v: [str(v)],
    ("array", "array"): lambda v: [v.typecode, v.tolist()],
    ("builtins", "range"): lambda v: [v.start, v.stop, v.step],
    ("builtins", "slice"): lambda v: [v.start, v.stop, v.step],
    ("builtins", "dict_keys"): lambda v: [list(v)],
    ("builtins", "dict_values"): lambda v: [list(v)],
    ("builtins", "dict_items"): lambda v: [list(v)],
    ("builtins", "memoryview"): lambda v: [v.tobytes()],
}  # fmt: skip


def _make_value(module: str, name: str, arguments: list[Any]) -> Any:
    if (module, name) not in _VALUES:
        raise ValueError(f"no value type {module}.{name}")
    if name.startswith("dict_"):
        items = arguments[0]
        pairs = items if name == "dict_items" else [(i, i) for i in items] if name == "dict_keys" else enumerate(items)
        return getattr(dict(pairs), name[5:])()
    if module == "datetime" and name in ("datetime", "time"):
        *parts, fold = arguments
        return getattr(__import__(module), name)(*parts, fold=fold)
    if module == "pathlib":
        module = module if module in sys.modules else "pathlib"
    kind = getattr(__import__(module), name)
    return kind(*arguments)


class Codec:
    """One side's end of the shared values.

    even: this side numbers its objects 2, 4, …, the other 1, 3, …; `classes`: by name, those that both sides have
    (an object of one crosses as its attributes). Subclasses say how objects cross by reference.
    """

    def __init__(self, even: bool) -> None:
        self.next_id = 2 if even else 1
        self.classes: dict[str, type] = {
            kind.__name__: kind for kind in (collections.UserList, collections.UserDict, collections.UserString,
                                            types.SimpleNamespace)
        }  # fmt: skip
        self.shared: dict[int, tuple[str, list[Any]]] = {}  # id -> kind, contents when last sent or received
        self.objects: dict[int, Any] = {}  # id -> the shared object
        self.numbers: dict[int, int] = {}  # id() of a shared object -> id
        self.to_drop: list[int] = []

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
        if kind in _MUTABLE:
            return _MUTABLE[kind][1](value)
        return (_ARRAY if kind == "ndarray" else _OBJECT)[0](value)

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
        for number in message.get("d", ()):
            self.unshare(number)
            self.forget(number)
        return values


def _is_flat(value: Any) -> bool:
    kind = type(value)
    return kind in _ATOMIC or (kind is int and value in _SMALL)


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
        if kind in _ATOMIC:
            return value
        if kind is int:
            return value if value in _SMALL else ["i", hex(value)]
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
        for name, (exact, contents, _) in _MUTABLE.items():
            if kind is exact:
                extra = {"defaultdict": lambda: [value.default_factory], "deque": lambda: [value.maxlen]}.get(name)
                return self._share(value, name, contents(value), extra() if extra else [])
        if kind.__module__ == "numpy" and hasattr(value, "dtype") and not value.dtype.hasobject and value.dtype.names is None:
            if hasattr(value, "flags") and kind.__name__ == "ndarray":
                contents = _ARRAY[0](value)
                return self._share(value, "ndarray", contents, [])
            return self._add(value, "scalar", None, [value.dtype.str, value.tobytes()])
        if kind.__module__ in _MODULES_OF_VALUES:
            for ancestor in kind.__mro__:
                parts = _VALUES.get((ancestor.__module__.removesuffix("._local"), ancestor.__name__))
                if parts is not None and kind.__module__ == ancestor.__module__:
                    return self._add(value, "value", None, [ancestor.__module__.split(".")[0], ancestor.__name__, *parts(value)])
        if value is Ellipsis or value is NotImplemented:
            return ["g", "builtins", str(value)]
        if kind is type and _TYPES.get(value.__name__) is value:
            return ["g", "builtins", value.__name__]
        if kind is types.BuiltinFunctionType and value.__name__ in _PURE.get(value.__module__ or "", ()):
            return ["g", value.__module__, value.__name__]
        name = kind.__name__
        if codec.classes.get(name) is kind and isinstance(value, enum.Enum):
            return ["e", name, value.name]
        if codec.classes.get(name) is kind and hasattr(value, "__dict__") and not isinstance(value, BaseException):
            return self._share(value, f"object {name}", _OBJECT[0](value), [])
        return self._derived(value, kind)

    def _derived(self, value: Any, kind: type) -> Any:
        """An object of a class that derives from a plain type; any other crosses by reference."""
        atom = self.codec.reference(value)
        if atom[0] != "r":
            return atom
        for ancestor in kind.__mro__[1:-1]:
            if ancestor in _IMMUTABLE_BASES:
                made = {tuple: tuple.__iter__, frozenset: frozenset.__iter__}.get(ancestor)  # type: ignore[attr-defined]
                plain = ancestor(made(value)) if made else _BASE_VALUE[ancestor](value)
                return ["d", self.atom(plain), *atom[1:]]
            for name, (exact, contents, _) in _MUTABLE.items():
                if ancestor is exact and name in ("list", "dict", "set", "bytearray"):
                    return self._share(value, name, contents(value), [], atom[1:])
            parts = _VALUES.get((ancestor.__module__, ancestor.__name__))
            if parts is not None:
                plain = _make_value(ancestor.__module__, ancestor.__name__, parts(value))
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


_BASE_VALUE: dict[type, Callable[[Any], Any]] = {
    str: lambda value: str.__str__(value)[:], int: lambda value: int.__int__(value), float: lambda value: float.__float__(value),
    bytes: lambda value: bytes.__getitem__(value, slice(None)), complex: lambda value: complex.__complex__(value),
}  # fmt: skip
_MODULES_OF_VALUES = frozenset({module for module, _ in _VALUES} | {"pathlib._local"})


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
            value = object.__new__(self.codec.classes[kind[7:]])
        elif kind == "deque":
            value = collections.deque(maxlen=self.value(extra[0]))
        elif kind == "defaultdict":
            value = collections.defaultdict(self.value(extra[0]))
        else:
            value = _MUTABLE[kind][0]()
            if derived:
                value = self.codec.derived(value, *derived[0])
        self.codec.share(number, kind, value, [])
        return value

    def _fill(self, number: int, kind: str, target: Any, atoms: list[Any]) -> None:
        items = [self.value(atom) for atom in atoms]
        fill = _MUTABLE[kind][2] if kind in _MUTABLE else (_ARRAY if kind == "ndarray" else _OBJECT)[1]
        fill(target, items)
        self.codec.shared[number] = (kind, self.codec._contents(kind, target))

    def value(self, atom: Any) -> Any:
        if not isinstance(atom, list):
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
        if first == "g":
            return _global(atom[1], atom[2])
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
            return _make_value(module, name, arguments)
        raise ValueError(f"no value of kind {kind!r}")


def _global(module: str, name: str) -> Any:
    if module == "builtins" and name in _TYPES:
        return _TYPES[name]
    if name in ("Ellipsis", "NotImplemented"):
        return getattr(builtins, name)
    if name in _PURE.get(module, ()):
        return getattr({"builtins": builtins, "math": math, "_operator": operator}[module], name)
    raise ValueError(f"no {module}.{name}")
