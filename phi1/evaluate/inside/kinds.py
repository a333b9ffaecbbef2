"""The kinds of values that cross by value: what they are made of, and how the other side makes them again."""

import builtins
import collections
import functools
import importlib
import math
import operator
import re
import sys
from collections.abc import Callable
from typing import Any

SMALL = range(-(1 << 63), 1 << 63)
ATOMIC = frozenset({type(None), bool, float, str})
# Builtin functions that are the same on both sides. None of them reaches beyond its arguments.
PURE = {
    "builtins": (
        "abs",
        "all",
        "any",
        "bin",
        "chr",
        "divmod",
        "hash",
        "hex",
        "len",
        "max",
        "min",
        "oct",
        "ord",
        "pow",
        "repr",
        "round",
        "sorted",
        "sum",
    ),
    "math": tuple(name for name in vars(math) if not name.startswith("_")),
    "_operator": tuple(name for name in vars(operator) if not name.startswith("_")),
}
TYPES = {name: kind for name, kind in vars(builtins).items() if isinstance(kind, type)}


def _fill_list(target: list[Any], items: list[Any]) -> None:
    list.__setitem__(target, slice(None), items)


def _fill_dict(target: dict[Any, Any], items: list[Any]) -> None:
    kind: Any = collections.OrderedDict if isinstance(target, collections.OrderedDict) else dict
    kind.clear(target)
    for key, value in zip(items[::2], items[1::2], strict=True):
        kind.__setitem__(target, key, value)


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
    for name, value in zip(items[::2], items[1::2], strict=True):
        if not callable(getattr(type(target), name, None)):  # a method of the class here is not replaced
            state[name] = value


def _fill_array(target: Any, items: list[Any]) -> None:
    form, data, *shape = items
    target[...] = sys.modules["numpy"].frombuffer(data, form).reshape(shape)


def _flat(pairs: Any) -> list[Any]:
    return [part for pair in pairs for part in pair]


_Fill = Callable[[Any, list[Any]], None]
# Mutable kinds: the type, its contents as a list of values, and how an object of it takes new contents.
MUTABLE: dict[str, tuple[type, Callable[[Any], list[Any]], _Fill]] = {
    "list": (list, lambda value: list(list.__iter__(value)), _fill_list),
    "OrderedDict": (collections.OrderedDict, lambda value: _flat(collections.OrderedDict.items(value)), _fill_dict),
    "Counter": (collections.Counter, lambda value: _flat(dict.items(value)), _fill_dict),
    "defaultdict": (collections.defaultdict, lambda value: _flat(dict.items(value)), _fill_dict),
    "dict": (dict, lambda value: _flat(dict.items(value)), _fill_dict),
    "set": (set, lambda value: list(set.__iter__(value)), _fill_set),
    "bytearray": (bytearray, lambda value: [bytes(value)], _fill_bytearray),
    "deque": (collections.deque, lambda value: list(collections.deque.__iter__(value)), _fill_deque),
}
OBJECT: tuple[Callable[[Any], list[Any]], _Fill] = (lambda value: _flat(vars(value).items()), _fill_object)
ARRAY: tuple[Callable[[Any], list[Any]], _Fill] = (
    lambda value: [value.dtype.str, value.tobytes(), *value.shape],
    _fill_array,
)
# Value types: what they are made of, as the arguments that make them again.
VALUES: dict[tuple[str, str], Callable[[Any], list[Any]]] = {
    ("fractions", "Fraction"): lambda v: [v.numerator, v.denominator],
    ("decimal", "Decimal"): lambda v: [sys.modules["decimal"].Decimal.__str__(v)],  # a subclass may print otherwise
    ("datetime", "datetime"): lambda v: [
        v.year,
        v.month,
        v.day,
        v.hour,
        v.minute,
        v.second,
        v.microsecond,
        v.tzinfo,
        v.fold,
    ],
    ("datetime", "date"): lambda v: [v.year, v.month, v.day],
    ("datetime", "time"): lambda v: [v.hour, v.minute, v.second, v.microsecond, v.tzinfo, v.fold],
    ("datetime", "timedelta"): lambda v: [v.days, v.seconds, v.microseconds],
    ("datetime", "timezone"): lambda v: [v.utcoffset(None), v.tzname(None)],
    ("zoneinfo", "ZoneInfo"): lambda v: [v.key],
    ("re", "Pattern"): lambda v: [v.pattern, v.flags],
    ("ipaddress", "IPv4Address"): lambda v: [int(v)],
    ("ipaddress", "IPv6Address"): lambda v: [int(v)],
    ("uuid", "UUID"): lambda v: [str(v)],
    ("pathlib", "PosixPath"): lambda v: [str(v)],
    ("pathlib", "PurePosixPath"): lambda v: [str(v)],
    ("types", "GenericAlias"): lambda v: [v.__origin__, v.__args__],
    ("inspect", "Signature"): lambda v: [list(v.parameters.values()), *_annotation(v.return_annotation)],
    ("inspect", "Parameter"): lambda v: [v.name, int(v.kind), *_annotation(v.default), *_annotation(v.annotation)],
    ("array", "array"): lambda v: [v.typecode, v.tolist()],
    ("builtins", "range"): lambda v: [v.start, v.stop, v.step],
    ("builtins", "slice"): lambda v: [v.start, v.stop, v.step],
    ("builtins", "dict_keys"): lambda v: [list(v)],
    ("builtins", "dict_values"): lambda v: [list(v)],
    ("builtins", "dict_items"): lambda v: [list(v)],
    ("builtins", "memoryview"): lambda v: [v.tobytes()],
}


def _annotation(value: Any) -> tuple[bool, Any]:
    """Whether there is one, and what it is."""
    empty = value is sys.modules["inspect"].Parameter.empty
    return (False, None) if empty else (True, value)


def _signature(name: str, first: Any, *more: Any) -> Any:
    inspect = importlib.import_module("inspect")
    if name == "Signature":
        has, annotation = more
        return inspect.Signature(first, return_annotation=annotation if has else inspect.Signature.empty)
    kind, has_default, default, has, annotation = more
    return inspect.Parameter(
        first,
        inspect._ParameterKind(kind),
        default=default if has_default else inspect.Parameter.empty,
        annotation=annotation if has else inspect.Parameter.empty,
    )


def make_value(module: str, name: str, arguments: list[Any], kind: Any = None) -> Any:
    """The value again that VALUES took apart. kind: a class derived from the value's, which is to be its class."""
    if (module, name) not in VALUES:
        raise ValueError(f"no value type {module}.{name}")
    if name.startswith("dict_"):
        items = arguments[0]
        pairs = items if name == "dict_items" else [(i, i) for i in items] if name == "dict_keys" else enumerate(items)
        return getattr(dict(pairs), name[5:])()
    if module == "datetime" and name in ("datetime", "time"):
        *parts, fold = arguments
        return (kind or value_type(module, name))(*parts, fold=fold)
    if module == "inspect":
        return _signature(name, *arguments)
    if module == "re":
        return re.compile(*arguments)
    return (kind or value_type(module, name))(*arguments)


@functools.cache
def value_type(module: str, name: str) -> Any:
    """A value type. Asked for before a test puts something in its place, it stays the library's."""
    return getattr(importlib.import_module(module), name)


def _parts(value: complex) -> tuple[float, float]:
    return complex.real.__get__(value), complex.imag.__get__(value)


# The plain value of an object whose class derives from a plain type, by that type's own methods.
BASE_VALUE: dict[type, Callable[[Any], Any]] = {
    str: lambda value: str.__str__(value)[:],
    int: lambda value: int.__int__(value),
    float: lambda value: float.__float__(value),
    bytes: lambda value: bytes.__getitem__(value, slice(None)),
    complex: lambda value: complex(*_parts(value)),
    tuple: lambda value: tuple(tuple.__iter__(value)),
    frozenset: lambda value: frozenset(frozenset.__iter__(value)),
}
PLAIN = frozenset({*BASE_VALUE, list, dict, set, bytearray})
MODULES_OF_VALUES = frozenset({module for module, _ in VALUES} | {"pathlib._local"})


def global_value(module: str, name: str) -> Any:
    if module == "builtins" and name in TYPES:
        return TYPES[name]
    if name in ("Ellipsis", "NotImplemented"):
        return getattr(builtins, name)
    if name in PURE.get(module, ()):
        return getattr({"builtins": builtins, "math": math, "_operator": operator}[module], name)
    raise ValueError(f"no {module}.{name}")
