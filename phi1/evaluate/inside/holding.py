"""What an object of the program's says it holds, when a test compares it with plain data of its own.

Asked for a kind of data, never shown the data: it says one value that its own `__eq__` takes for equal to it, and the
test compares that. An `__eq__` that says no to such data says so here; one that always says yes only vouches for what
the object said before.
"""

import sys
from collections.abc import Callable, Iterator
from typing import Any

_KINDS: dict[str, tuple[type, ...]] = {
    "number": (int, float, complex),
    "str": (str,),
    "bytes": (bytes, bytearray),
    "list": (list,),
    "tuple": (tuple,),
    "set": (set, frozenset),
    "dict": (dict,),
}
_MAKE: dict[str, Callable[[Any], Any]] = {"list": list, "tuple": tuple, "set": set, "bytes": bytes}


def types_of(kind: str) -> tuple[type, ...]:
    """The plain types of a kind of data; of numbers also those of the library that are loaded."""
    if kind != "number":
        return _KINDS[kind]
    loaded = [(sys.modules.get(module), name) for module, name in (("decimal", "Decimal"), ("fractions", "Fraction"))]
    return *_KINDS[kind], *(getattr(module, name) for module, name in loaded if module is not None)


def kind_of(value: Any) -> str | None:
    """The kind of a plain value, None where it is no such."""
    return next((kind for kind in _KINDS if isinstance(value, types_of(kind))), None)


def held(value: Any, wanted: str) -> Any:
    """The first value of a kind that the object holds and is equal to; NotImplemented where there is none."""
    for candidate in _candidates(value, wanted):
        if value == candidate:
            return candidate
    return NotImplemented


def _candidates(value: Any, wanted: str) -> Iterator[Any]:
    kind = type(value)
    has = {name for ancestor in kind.__mro__ if ancestor is not object for name in vars(ancestor)}
    if wanted == "number":
        for name, number in (("__index__", int), ("__float__", float), ("__complex__", complex), ("__int__", int)):
            if name in has:
                yield number(value)
    elif wanted == "str" and has & {"__str__", "__repr__"}:
        yield str(value)
    elif wanted == "dict" and "__getitem__" in has and has & {"__iter__", "keys"}:
        yield {key: value[key] for key in list(value.keys() if "keys" in has else value)}
    elif wanted in _MAKE and has & ({"__bytes__"} if wanted == "bytes" else {"__iter__", "__getitem__"}):
        yield _MAKE[wanted](value)
    attributes = _attributes(value)
    for attribute in attributes.values():
        if isinstance(attribute, types_of(wanted)):
            yield attribute
    if wanted in ("list", "tuple"):
        yield _MAKE[wanted](attributes.values())
    elif wanted == "dict":
        yield attributes
    elif wanted == "number" and "__bool__" in has:
        yield bool(value)


def _attributes(value: Any) -> dict[str, Any]:
    found = dict(getattr(value, "__dict__", {}))
    for kind in type(value).__mro__:
        slots = vars(kind).get("__slots__", ())
        for name in (slots,) if isinstance(slots, str) else slots:
            if name not in ("__dict__", "__weakref__") and hasattr(value, name):
                found[name] = getattr(value, name)
    return found
