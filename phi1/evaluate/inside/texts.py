"""What a test evaluates or unpickles that may be the program's: it is not to run in the test's process.

Text that the test's source holds is the test's own and is evaluated as always; so is any other that computes with
literals, pure functions and the program's. Whatever else a text does, it does in the program's process, where the test
gives it names of its own (`exec(text, space)`); where it does not, it is refused. Pickles likewise: plain data is read
here, objects are made where they come from.

A library that evaluates text evaluates the program's where a string of the program's was handed to it: it computes with
literals, pure functions and what the library itself defines (`sympy.sympify`), else it is refused.
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
from phi1.evaluate.inside.wire import TEXT

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
# Of the library, what evaluates text of its own making whatever it is handed: names in it are checked.
_MAKE_TEXTS = ("collections", "dataclasses", "unittest", "importlib", "_frozen_importlib", "_frozen_importlib_external")
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
    """`eval`, `exec` and `compile` in a test's process.

    codes: the test's, whose strings are its own.
    """

    def __init__(self, peer: "Peer", *codes: types.CodeType) -> None:
        self.peer, self.codes = peer, codes
        self.sources: dict[types.CodeType, str] = {}  # of compiled text that is not the test's
        self.singles: set[types.CodeType] = set()  # of those, what prints what it finds, as at a prompt

    def guard(self) -> None:
        vars(builtins).update(eval=self.eval, exec=self.exec, compile=self.compile)

    @functools.cached_property
    def own(self) -> set[str]:
        return {text for code in self.codes for text in _strings(code)}

    def compile(self, source: Any, *arguments: Any, **options: Any) -> Any:
        code, frame = _compile(source, *arguments, **options), sys._getframe(1)
        if isinstance(code, types.CodeType):
            if _is_guarded(frame) and isinstance(source, str):
                self.sources[code] = source
                if "single" in (*arguments, *options.values()):
                    self.singles.add(code)
            elif not _is_guarded(frame) and self._was_handed(frame):
                self.sources[code] = (
                    source if isinstance(source, str) else importlib.import_module("ast").unparse(source)
                )
        return code

    def eval(self, text: Any, space: Any = None, names: Any = None, /) -> Any:
        frame, source = sys._getframe(1), self.sources.get(text, text) if isinstance(text, types.CodeType) else text
        if self._is_own(frame, source) or self._is_harmless(source, frame, space, names):
            return _eval(text, *_spaces(frame, space, names))
        return self._elsewhere("eval", source, frame, space, names)

    def exec(self, text: Any, space: Any = None, names: Any = None, /, **options: Any) -> None:
        frame, source = sys._getframe(1), self.sources.get(text, text) if isinstance(text, types.CodeType) else text
        if self._is_own(frame, source):
            _exec(text, *_spaces(frame, space, names), **options)
        else:
            single = isinstance(text, types.CodeType) and text in self.singles
            self._elsewhere("single" if single else "exec", source, frame, space, names)

    def _is_own(self, frame: types.FrameType, source: Any) -> bool:
        """Code is: what was compiled of a text that is not the test's comes as that text."""
        if isinstance(source, types.CodeType) or source in self.own:
            return True
        if _is_guarded(frame):
            return False
        return not self._was_handed(frame) or source in _strings(frame.f_code)

    def _was_handed(self, frame: types.FrameType | None) -> bool:
        """Whether a library, up to where the test called it, was handed a string of the program's."""
        if frame is not None and _module(frame).partition(".")[0] in _MAKE_TEXTS:
            return False
        while frame is not None and _module(frame) != "test" and not _module(frame).startswith(__package__):
            for value in frame.f_locals.values():
                # By type: of an object of the program's `isinstance` asks the program.
                if (
                    issubclass(type(value), str)
                    and str.__len__(value) >= TEXT
                    and str.__hash__(value) in self.peer.texts
                ):
                    return True
            frame = frame.f_back
        return False

    def _is_harmless(self, text: Any, frame: types.FrameType, space: Any, names: Any) -> bool:
        """Whether it is an expression of literals, of names that the test gives it, and of calls that reach nothing."""
        ast: Any = importlib.import_module("ast")
        harmless = tuple(getattr(ast, name) for name in _HARMLESS)
        tree = _compile(text.strip(), "<text>", "eval", ast.PyCF_ONLY_AST)
        given = {**(space or {}), **(names or {})}
        known = {**vars(builtins), **frame.f_globals, **frame.f_locals}
        library = None if _is_guarded(frame) else _module(frame).partition(".")[0]
        called = {id(node.func) for node in ast.walk(tree) if isinstance(node, ast.Call)}
        for node in ast.walk(tree):
            if isinstance(node, ast.Call) and not isinstance(node.func, (ast.Name, ast.Attribute)):
                return False
            if isinstance(node, (ast.Name, ast.Attribute)):
                if getattr(node, "id", "").startswith("__"):  # __builtins__, which evaluating puts among the names
                    return False
                if isinstance(node, ast.Name) and node.id in given and id(node) not in called:
                    continue
                if isinstance(node, ast.Name) and isinstance(known.get(node.id), types.ModuleType):
                    continue
                value = _found(node, {**known, **given})
                if not _is_pure(value) and (library is None or _package(value) != library):
                    return False
            elif not isinstance(node, harmless):
                return False
        return True

    def _elsewhere(self, operation: str, text: Any, frame: types.FrameType, space: Any, names: Any) -> Any:
        if not _is_guarded(frame):
            raise self.peer.refuse(f"text of the program's, evaluated in the test's process by {_module(frame)}")
        if not isinstance(text, str) or not isinstance(space, dict):
            raise self.peer.refuse("text that is not the test's own, evaluated by it without names of its own")
        if space.get("__builtins__") is vars(builtins):  # put there by evaluating: these are not for the program
            del space["__builtins__"]
        return self.peer.ask(operation, text, space, names)


def _module(frame: types.FrameType) -> str:
    """The module of a frame: the test, where it is of evaluated text."""
    return str(frame.f_globals.get("__name__", "test"))


def _is_guarded(frame: types.FrameType) -> bool:
    """Whether it is the test that evaluates, what evaluates for it, or the program, to which it gave the function."""
    return _module(frame) in _FOR_TESTS or _module(frame).startswith(__package__)


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


def _package(value: Any) -> str | None:
    """The package that a class or function is of."""
    if not isinstance(value, (type, types.FunctionType)):
        return None
    return str(value.__module__).partition(".")[0]


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


def guard_pickles(peer: "Peer", watched: bool) -> None:
    """From now on whatever unpickles in this process reads plain data only, but for what `pickle` made here.

    watched: where the test speaks of `pickle`, that has other objects made in the program's process.
    """
    trusted: list[bytes] = []

    def audit(event: str, arguments: tuple[Any, ...]) -> None:
        if event == "pickle.find_class" and not trusted:
            module, name = arguments
            if name not in _PICKLED.get(module, ()):
                raise peer.refuse(f"a pickle with {module}.{name}, read in the test's process")

    sys.addaudithook(audit)
    if watched:
        _replace_pickle(peer, trusted)


def _replace_pickle(peer: "Peer", trusted: list[bytes]) -> None:
    """trusted: holds what is being read while that was made here."""
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
            trusted.append(data)
            try:
                return loads(data, **options)
            finally:
                trusted.pop()
        try:
            return Unpickler(io.BytesIO(data), **options).load()
        except _NotPlain:
            return peer.ask("unpickle", data)

    pickle.dumps, pickle.loads, pickle.Unpickler = dumped, loaded, Unpickler
    pickle.load = lambda file, **options: loaded(file.read(), **options)


class _NotPlain(Exception):
    pass
