"""What stands for an object of the other process.

The test's side never hands one of its own values to an operator of the program's object: asked `x == 4`, such an
object would only have to say yes, and `abs(x - 4) < 0.1` is no harder. A `Remote` is compared with a plain value by
what it says it holds (a number, items, keys), which it must say without knowing what is expected.
"""

import copy
import importlib
import math
import operator
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from phi1.evaluate.inside.peer import Peer

# What a class may define, and the function that does it in the process that holds the object.
_UNARY: dict[str, Callable[..., Any]] = {
    "__len__": len, "__iter__": iter, "__next__": next, "__reversed__": reversed, "__int__": int, "__float__": float,
    "__complex__": complex, "__index__": operator.index, "__bool__": bool, "__abs__": abs, "__neg__": operator.neg,
    "__pos__": operator.pos, "__invert__": operator.invert, "__round__": round, "__trunc__": math.trunc,
    "__floor__": math.floor, "__ceil__": math.ceil, "__str__": str, "__repr__": repr, "__format__": format,
    "__bytes__": bytes, "__getitem__": operator.getitem, "__setitem__": operator.setitem,
    "__delitem__": operator.delitem, "__enter__": lambda value: type(value).__enter__(value),
    "__exit__": lambda value, *error: type(value).__exit__(value, *error),
}  # fmt: skip
_BINARY: dict[str, Callable[..., Any]] = {
    f"__{name}__": getattr(operator, f"{name}_" if name in ("and", "or") else name)
    for name in ("add", "sub", "mul", "truediv", "floordiv", "mod", "pow", "matmul", "lshift", "rshift", "and", "or",
                 "xor", "lt", "le", "gt", "ge", "eq", "ne")
} | {"__divmod__": divmod}  # fmt: skip
OPERATIONS = {
    **_UNARY, **_BINARY, "getattr": getattr, "setattr": setattr, "delattr": delattr, "isinstance": isinstance,
    "issubclass": issubclass, "call": lambda function, kwargs, *args: function(*args, **(kwargs or {})), "dir": dir,
    "copy": copy.copy, "deepcopy": copy.deepcopy, "send": lambda generator, value: generator.send(value),
    "throw": lambda generator, error: generator.throw(error), "close": lambda generator: generator.close(),
    "run": lambda coroutine: importlib.import_module("asyncio").run(coroutine),
}  # fmt: skip


class Remote:
    """Stands for an object of the other process. Subclasses, made as needed, have the special methods that its class has."""

    __slots__ = ("__weakref__", "_facts", "_number", "_peer")

    def __init__(self, peer: "Peer", number: int, facts: dict[str, Any]) -> None:
        for name, value in (("_peer", peer), ("_number", number), ("_facts", facts)):
            object.__setattr__(self, name, value)

    def __del__(self) -> None:
        self._peer.to_drop.append(self._number)

    def __getattr__(self, name: str) -> Any:
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
        return isinstance(value, Remote) and self._peer.ask("isinstance", value, self) is True

    def __subclasscheck__(self, value: Any) -> bool:
        return isinstance(value, Remote) and self._peer.ask("issubclass", value, self) is True

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
        if isinstance(other, Remote):
            return self._peer.ask("__eq__", self, other)
        plain = _as_kind_of(self, other)
        return NotImplemented if plain is NotImplemented else plain == other

    def __ne__(self, other: Any) -> Any:
        equal = self == other
        return NotImplemented if equal is NotImplemented else not equal


def _as_kind_of(value: Remote, other: Any) -> Any:
    """What the object says it holds, as plain data of the other's kind; NotImplemented where it is of no such kind."""
    special = value._facts["special"]
    items: Any = value
    if isinstance(other, (int, float, complex)):
        return _number(value)
    if isinstance(other, (list, tuple)) and "__iter__" in special:
        return type(other)(items) if type(other) in (list, tuple) else NotImplemented
    if isinstance(other, (set, frozenset)) and "__iter__" in special:
        return set(items)
    if isinstance(other, dict) and "__getitem__" in special and "__iter__" in special:
        return {key: items[key] for key in items}
    if isinstance(other, str) and "__str__" in special and "__len__" in special:
        return str(value)
    return NotImplemented


def _number(value: Any) -> Any:
    if not isinstance(value, Remote):
        return value
    for name, kind in (("__index__", int), ("__float__", float), ("__complex__", complex)):
        if name in value._facts["special"]:
            return kind(value)
    return NotImplemented


def _binary(name: str) -> Callable[[Any, Any], Any]:
    def method(self: Remote, other: Any) -> Any:
        if isinstance(other, Remote) or not self._peer.careful:
            return self._peer.ask(name, self, other)
        plain = _number(self)
        if plain is NotImplemented:
            return NotImplemented
        return _BINARY[name](plain, other)

    return method


def _reflected(name: str) -> Callable[[Any, Any], Any]:
    def method(self: Remote, other: Any) -> Any:
        if not self._peer.careful:
            return self._peer.ask(name, other, self)
        plain = _number(self)
        return NotImplemented if plain is NotImplemented else _BINARY[name](other, plain)

    return method


def _unary(name: str) -> Callable[..., Any]:
    def method(self: Remote, *arguments: Any) -> Any:
        return self._peer.ask(name, self, *arguments)

    return method


def _call(self: Remote, *args: Any, **kwargs: Any) -> Any:
    return self._peer.ask("call", self, kwargs or None, *args)


def _contains(self: Remote, item: Any) -> bool:
    """By its items, not by its own word."""
    return any(item is one or item == one for one in self)  # type: ignore[attr-defined]


_classes: dict[tuple[str, ...], type[Remote]] = {}


def class_for(special: tuple[str, ...]) -> type[Remote]:
    if special not in _classes:
        methods: dict[str, Any] = {"__slots__": (), "__hash__": Remote.__hash__}
        for name in special:
            if name in _UNARY and name not in ("__str__", "__repr__"):
                methods[name] = _unary(name)
            elif name in _BINARY and name not in ("__eq__", "__ne__"):
                methods[name] = _binary(name)
            elif name.startswith("__r") and f"__{name[3:]}" in _BINARY:
                methods[name] = _reflected(f"__{name[3:]}")
        if "__call__" in special:
            methods["__call__"] = _call
        if "__iter__" in special:
            methods["__contains__"] = _contains
        _classes[special] = type("Remote", (Remote,), methods)
    return _classes[special]


def special_methods(kind: type) -> list[str]:
    """The special methods that cross, of those that the class or its ancestors below `object` define."""
    defined = {name for ancestor in kind.__mro__ if ancestor is not object for name in vars(ancestor)}
    names = [*_UNARY, *_BINARY, "__call__"]
    names += [f"__r{name[2:]}" for name in _BINARY if f"__r{name[2:]}" in defined]
    return [name for name in names if name in defined]


def generator_of(remote: Any) -> Any:
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
                step = ("throw", peer.describe(error))

    return forward()


def coroutine_of(remote: Any) -> Any:
    async def forward() -> Any:
        return remote._peer.ask("run", remote)

    return forward()
