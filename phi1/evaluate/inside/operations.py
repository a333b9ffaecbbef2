"""What each process of a job does with its objects when the other asks for it."""

import copy
import functools
import importlib
import math
import operator
import os
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

from phi1.evaluate.inside.deriving import derive, function_for
from phi1.evaluate.inside.holding import held

if TYPE_CHECKING:
    from phi1.evaluate.inside.peer import Peer

# What a class may define, and the function that does it in the process that holds the object.
UNARY: dict[str, Callable[..., Any]] = {
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
EXITS = ("__exit__", "__aexit__")
BINARY: dict[str, Callable[..., Any]] = {
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
COMPARISONS = ("__lt__", "__le__", "__gt__", "__ge__", "__eq__", "__ne__")
IN_PLACE = {
    f"__i{name[2:]}": getattr(operator, f"i{name[2:-2]}")
    for name in BINARY
    if name not in COMPARISONS and name != "__divmod__"
}
# By these an object says a number: once, until something else is asked. Else it could say another each time it is
# asked.
NUMBERS = ("__int__", "__float__", "__complex__", "__index__")
ASKED_ONCE = (*NUMBERS, "held", "type")
ANSWERS = (*NUMBERS, "__bool__", "__len__", "__abs__", "__round__", "__trunc__", "__floor__", "__ceil__", "__format__")
ITEMS = ("__iter__", "__next__", "__reversed__", "__getitem__", "__call__", "__enter__", "__missing__")
SCALARS = (int, float, complex, bool, str)
OF_NUMBERS = frozenset(name for kind in (int, float, complex) for name in dir(kind) if name[0] != "_")


pickled_by: "list[Peer]" = []


def _pickle() -> Any:
    return importlib.import_module("pickle")


def unpickled(data: bytes) -> Any:
    """An object of the other process again, for the `pickle` of this one."""
    return pickled_by[0].ask("unpickle", data)


@functools.cache
def _loop() -> Any:
    """One for all that is awaited here: an asynchronous generator ends with its loop."""
    return importlib.import_module("asyncio").new_event_loop()


OPERATIONS: dict[str, Callable[..., Any]] = {
    **UNARY,
    **BINARY,
    **IN_PLACE,
    "__contains__": operator.contains,
    "type": type,
    "getattr": getattr,
    "setattr": setattr,
    "set function": lambda target, name, function: _set_function(target, name, function),
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
    "eval": lambda text, space, names: eval(text, {**space, **(names or {})}),
    "exec": lambda text, space, names: _execute(text, "exec", space, names),
    "single": lambda text, space, names: _execute(text, "single", space, names),
    "signature": lambda function: importlib.import_module("inspect").signature(function),
    "run": lambda awaitable: _loop().run_until_complete(_result_of(awaitable)),
}


def _execute(text: str, mode: str, space: dict[str, Any], names: dict[str, Any] | None) -> None:
    """mode: as of `compile`. What the text defines is found in the innermost of the spaces, as with `exec`."""
    made = {**space, **(names or {})}
    exec(compile(text, "<string>", mode), made)
    del made["__builtins__"]
    (space if names is None else names).update(made)


def _set_function(target: Any, name: str, function: Any) -> None:
    """A test's function that becomes a method of the program's class gets `self`, as a function does."""
    setattr(target, name, function_for(name, function) if isinstance(target, type) else function)


async def _result_of(awaitable: Any) -> Any:
    return await awaitable


def _thrown(error: BaseException | None) -> tuple[Any, Any, Any]:
    return (None, None, None) if error is None else (type(error), error, error.__traceback__)
