"""The program's classes in a test's hands: deriving from them, `super()`, and patterns of `match`.

A class that a test derives from one of the program's is made in the program's process, where its objects live. What the
test defines in it stays in the test's process: each method is a callback, which gets the program's object as `self`.
"""

import functools
import types
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from phi1.evaluate.inside.peer import Peer

_LEFT_OUT = ("__classcell__", "__orig_bases__", "__module__", "__static_attributes__", "__firstlineno__")


class _Deriving(type):
    """Stands in for the metaclass while a test's class statement runs; what that binds is the program's class."""

    peer: "Peer"

    def __new__(cls, name: str, bases: tuple[Any, ...], space: dict[str, Any], **keywords: Any) -> Any:
        members = [_taken_apart(key, value) for key, value in space.items() if key not in _LEFT_OUT]
        made = bases[0].peer.ask("derive", name, tuple(space["__orig_bases__"]), keywords, *members)
        if "__classcell__" in space:
            space["__classcell__"].cell_contents = made
        return made


def base_for(peer: "Peer") -> Any:
    """What takes the place of a class of the program's among the bases of one that the test derives."""
    return type.__new__(_Deriving, "base", (), {"peer": peer})


def _taken_apart(key: str, value: Any) -> tuple[Any, ...]:
    """A member of a class as what crosses: its name, its kind, and functions or a value."""
    if isinstance(value, types.FunctionType):
        return key, "method", value
    if isinstance(value, (staticmethod, classmethod)):
        return key, type(value).__name__, value.__func__
    if isinstance(value, property):
        return key, "property", value.fget, value.fset, value.fdel
    if isinstance(value, functools.cached_property):
        return key, "cached_property", value.func
    return key, "value", value


def derive(name: str, bases: tuple[Any, ...], keywords: dict[str, Any], *members: tuple[Any, ...]) -> type:
    """In the program's process: the class that a test derives there."""
    space = {key: _put_together(key, *parts) for key, *parts in members}
    return types.new_class(name, bases, keywords, lambda body: body.update(space))


def _put_together(key: str, kind: str, *parts: Any) -> Any:
    if kind == "value":
        return parts[0]
    functions = [function_for(key, part) for part in parts]
    if kind == "method":
        return functions[0]
    if kind == "cached_property":
        return functools.cached_property(functions[0])
    return {"staticmethod": staticmethod, "classmethod": classmethod, "property": property}[kind](*functions)


def function_for(name: str, callback: Any) -> Any:
    """A function, which binds `self`, for a callback, which does not."""
    if callback is None:
        return None

    def method(*arguments: Any, **keywords: Any) -> Any:
        return callback(*arguments, **keywords)

    method.__name__ = name
    return method


class SuperOf:
    """`super()` in a method of such a class: looks in the program's process."""

    def __init__(self, peer: "Peer", kind: Any, value: Any) -> None:
        object.__setattr__(self, "found", functools.partial(peer.ask, "super", kind, value))

    def __getattribute__(self, name: str) -> Any:
        return object.__getattribute__(self, "found")(name)


class ClassPatterns:
    """`case Point(x=0)` wants a type: one that asks the program's class of that name. space: the test's names."""

    def __init__(self, space: dict[str, Any]) -> None:
        self._space, self._types = space, dict[int, tuple[Any, type]]()

    def __getattr__(self, name: str) -> Any:
        kind = self._space[name]
        if isinstance(kind, type):
            return kind
        if id(kind) not in self._types:
            names = tuple(getattr(kind, "__match_args__", ()))
            self._types[id(kind)] = kind, _Pattern(name, (), {"asked": kind, "__match_args__": names})
        return self._types[id(kind)][1]


class _Pattern(type):
    asked: Any

    def __instancecheck__(cls, value: Any) -> bool:
        return isinstance(value, cls.asked)
