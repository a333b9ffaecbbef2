"""What a test evaluates or unpickles that may be the program's: it is not to run in the test's process.

Text that the test's source holds is the test's own and is evaluated as always; so is any other that computes with
literals, pure functions and the program's. Whatever else a text does, it does in the program's process, where the test
gives it names of its own (`exec(text, space)`); where it does not, it is refused. Pickles likewise: plain data is read
here, objects are made where they come from.
"""

import builtins
import functools
import importlib
import io
import sys
import types
from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

from phi1.evaluate.inside.kinds import PURE
from phi1.evaluate.inside.remote import theirs

if TYPE_CHECKING:
    from phi1.evaluate.inside.peer import Peer

# Kinds of syntax that reach nothing. By name: `ast` is not loaded for tests that evaluate no text.
_HARMLESS = (
    "Expression",
    "Constant",
    "UnaryOp",
    "BinOp",
    "BoolOp",
    "Compare",
    "IfExp",
    "List",
    "Tuple",
    "Set",
    "Dict",
    "Subscript",
    "Slice",
    "Starred",
    "Call",
    "keyword",
    "operator",
    "unaryop",
    "boolop",
    "cmpop",
    "expr_context",
)
# Modules of tests, and of the library where it evaluates text that may be the program's: annotations, docstrings.
_FOR_TESTS = ("test", "typing", "inspect", "doctest", "timeit", "annotationlib")
_TYPES = (bool, int, float, complex, str, bytes, list, tuple, set, frozenset, dict, range, enumerate, zip, reversed)
_PICKLED = {
    "builtins": ("set", "frozenset", "bytearray", "complex", "range", "slice", "object"),
    "collections": ("OrderedDict", "defaultdict", "deque"),
    "datetime": ("date", "datetime", "time", "timedelta", "timezone"),
    "decimal": ("Decimal",),
    __package__ + ".operations": ("unpickled",),
}


_eval, _exec, _compile = eval, exec, compile


class Texts:
    """`eval`, `exec` and `compile` in a test's process, for the test and for what evaluates for it (`_FOR_TESTS`).

    codes: the test's, whose strings are its own.
    """

    def __init__(self, peer: "Peer", *codes: types.CodeType) -> None:
        self.peer, self.codes = peer, codes
        self.sources: dict[types.CodeType, str] = {}  # of compiled text that is not the test's

    def guard(self) -> None:
        vars(builtins).update(eval=self.eval, exec=self.exec, compile=self.compile)

    @functools.cached_property
    def own(self) -> set[str]:
        return {text for code in self.codes for text in _strings(code)}

    def compile(self, source: Any, *arguments: Any, **options: Any) -> Any:
        code = _compile(source, *arguments, **options)
        if _is_guarded(sys._getframe(1)) and isinstance(source, str) and isinstance(code, types.CodeType):
            self.sources[code] = source
        return code

    def eval(self, text: Any, space: Any = None, names: Any = None, /) -> Any:
        frame, source = sys._getframe(1), self.sources.get(text, text) if isinstance(text, types.CodeType) else text
        if self._is_own(frame, source) or self._is_harmless(source, frame, space, names):
            return _eval(text, *_spaces(frame, space, names))
        return self._elsewhere("eval", source, space, names)

    def exec(self, text: Any, space: Any = None, names: Any = None, /, **options: Any) -> None:
        frame, source = sys._getframe(1), self.sources.get(text, text) if isinstance(text, types.CodeType) else text
        if self._is_own(frame, source):
            _exec(text, *_spaces(frame, space, names), **options)
        else:
            self._elsewhere("exec", source, space, names)

    def _is_own(self, frame: types.FrameType, source: Any) -> bool:
        """Code is: what was compiled of a text that is not the test's comes as that text."""
        return not _is_guarded(frame) or isinstance(source, types.CodeType) or source in self.own

    def _is_harmless(self, text: Any, frame: types.FrameType, space: Any, names: Any) -> bool:
        """Whether it is an expression of literals, of names that the test gives it, and of calls that reach nothing."""
        ast: Any = importlib.import_module("ast")
        harmless = tuple(getattr(ast, name) for name in _HARMLESS)
        tree = _compile(text.strip(), "<text>", "eval", ast.PyCF_ONLY_AST)
        given = {**(space or {}), **(names or {})}
        known = {**vars(builtins), **frame.f_globals, **frame.f_locals}
        called = {id(node.func) for node in ast.walk(tree) if isinstance(node, ast.Call)}
        for node in ast.walk(tree):
            if isinstance(node, (ast.Name, ast.Attribute)):
                if isinstance(node, ast.Name) and node.id in given and id(node) not in called:
                    continue
                if isinstance(node, ast.Name) and isinstance(known.get(node.id), types.ModuleType):
                    continue
                if not _is_pure(_found(node, known)):
                    return False
            elif not isinstance(node, harmless):
                return False
        return True

    def _elsewhere(self, operation: str, text: Any, space: Any, names: Any) -> Any:
        if not isinstance(text, str) or not isinstance(space, dict):
            raise self.peer.refuse("text that is not the test's own, evaluated by it without names of its own")
        return self.peer.ask(operation, text, space, names)


def _is_guarded(frame: types.FrameType) -> bool:
    return frame.f_globals.get("__name__") in _FOR_TESTS


def _spaces(frame: types.FrameType, space: Any, names: Any) -> tuple[Any, Any]:
    """Global and local names for a text, as the builtin functions take them."""
    if space is None:
        return frame.f_globals, frame.f_locals if names is None else names
    return space, space if names is None else names


def _found(node: Any, known: dict[str, Any]) -> Any:
    """What a name, or a name in a module, stands for; None for any other expression."""
    if hasattr(node, "id"):
        return known.get(node.id)
    module = known.get(getattr(node.value, "id", ""))
    return getattr(module, node.attr, None) if isinstance(module, types.ModuleType) else None


def _is_pure(value: Any) -> bool:
    if theirs(value) or value in _TYPES:
        return True
    if isinstance(value, float):  # of a module: math.pi
        return True
    return isinstance(value, types.BuiltinFunctionType) and value.__name__ in PURE.get(value.__module__ or "", ())


def _strings(code: types.CodeType) -> Iterator[str]:
    for constant in code.co_consts:
        if isinstance(constant, types.CodeType):
            yield from _strings(constant)
        for item in constant if isinstance(constant, (tuple, frozenset)) else (constant,):
            if isinstance(item, str):
                yield item


def guard_pickles(peer: "Peer") -> None:
    """From now on `pickle` in this process reads plain data, and what was pickled in it; other objects are made in the
    program's process.
    """
    pickle: Any = importlib.import_module("pickle")
    loads, dumps = pickle.loads, pickle.dumps
    made: list[bytes] = []

    class Unpickler(pickle.Unpickler):
        def find_class(self, module: str, name: str) -> Any:
            if name not in _PICKLED.get(module, ()):
                raise _NotPlain
            return super().find_class(module, name)

    def dumped(*arguments: Any, **options: Any) -> bytes:
        made.append(dumps(*arguments, **options))
        return made[-1]

    def loaded(data: Any, **options: Any) -> Any:
        data = bytes(data)
        if data in made:
            return loads(data, **options)
        try:
            return Unpickler(io.BytesIO(data), **options).load()
        except _NotPlain:
            return peer.ask("unpickle", data)

    pickle.dumps, pickle.loads, pickle.Unpickler = dumped, loaded, Unpickler
    pickle.load = lambda file, **options: loaded(file.read(), **options)


class _NotPlain(Exception):
    pass
