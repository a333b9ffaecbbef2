"""What a test puts in the place of something that the program uses: standard input, `input`, `time.sleep` and whatever
else it patches, `os.environ`, filters of warnings, seeds.

The test does it in its own process; while it lasts, the program's has the same. Nothing of the program's is put
anywhere in the test's process.
"""

import builtins
import importlib
import os
import sys
import warnings
from collections.abc import Callable
from typing import Any

_ABSENT = object()
_ENVIRONMENT, _WARNINGS = "os.environ", "warnings"


class Given:
    """In the test's process: what it has changed. places: names of modules and of what the test may replace in them,
    besides standard input. watched: which of "seed", "environ", "warnings" the test speaks of.
    """

    def __init__(self) -> None:
        self.own = {("sys", "stdin"): sys.stdin, ("builtins", "input"): builtins.input}
        self.watched: list[str] = []
        self.seeds: list[tuple[str, Any]] = []

    def watch(self, places: list[tuple[str, str]], watched: list[str]) -> None:
        for module, name in places:
            try:
                self.own[module, name] = getattr(importlib.import_module(module), name, _ABSENT)
            except ImportError:
                continue  # for the test to say
        self.watched = watched
        if "seed" in watched:
            for module in ("random", "numpy.random"):
                if module == "random" or "numpy" in sys.modules:
                    self._hear_seeds(module, importlib.import_module(module))
        self.environment = dict(os.environ)
        self.filters = warnings.filters, list(warnings.filters), warnings.showwarning

    def _hear_seeds(self, name: str, module: Any) -> None:
        seed = module.seed

        def heard(value: Any = None, *more: Any, **options: Any) -> None:
            seed(value, *more, **options)
            if isinstance(value, (int, float, str)):
                self.seeds.append((name, value))

        module.seed = heard

    def values(self) -> dict[str, Any]:
        found: dict[str, Any] = {}
        for (module, name), own in self.own.items():
            value = getattr(sys.modules[module], name, _ABSENT)
            if value is not own and value is not _ABSENT:
                found[f"{module}.{name}"] = value
        if "environ" in self.watched and (now := dict(os.environ)) != self.environment:
            names = sorted({*now, *self.environment})
            changed = [name for name in names if now.get(name) != self.environment.get(name)]
            found[_ENVIRONMENT] = tuple((name, now.get(name)) for name in changed)
        if "warn" in self.watched:
            filters, at_first, show = self.filters
            if warnings.filters is not filters or warnings.filters != at_first or warnings.showwarning is not show:
                found[_WARNINGS] = tuple(warnings.filters), _warned
        return found


def _warned(message: Any, filename: str, line: int) -> None:
    """In the test's process, for a warning in the program's that the filters let through."""
    warnings.warn_explicit(message, type(message), str(filename), int(line))


class Taken:
    """In the program's process: puts there what the test has put, and takes it away again."""

    def __init__(self) -> None:
        self.undo: dict[str, Callable[[], None]] = {}
        self.filters: Any = None

    def take(self, given: dict[str, Any]) -> None:
        for place in [place for place in self.undo if place not in given]:
            self.undo.pop(place)()
        for place, value in given.items():
            if place == _ENVIRONMENT:
                self._take_environment(value)
            elif place == _WARNINGS:
                self._take_warnings(*value)
            else:
                module_name, _, name = place.rpartition(".")
                module = importlib.import_module(module_name)
                if place not in self.undo:
                    self.undo[place] = _restoring(module, name)
                setattr(module, name, value)

    def _take_environment(self, changed: tuple[tuple[str, str | None], ...]) -> None:
        self.undo.pop(_ENVIRONMENT, lambda: None)()
        before = tuple((name, os.environ.get(name)) for name, _ in changed)
        _set_environment(changed)
        self.undo[_ENVIRONMENT] = lambda: _set_environment(before)

    def _take_warnings(self, filters: tuple[Any, ...], warned: Callable[..., None]) -> None:
        if _WARNINGS not in self.undo:
            caught = warnings.catch_warnings()
            caught.__enter__()
            self.filters, self.undo[_WARNINGS] = None, lambda: caught.__exit__(None, None, None)
        warnings.showwarning = lambda message, category, file, line, *more: warned(message, file, line)
        if filters != self.filters:  # setting them anew forgets which warnings were shown once
            self.filters = filters
            warnings.resetwarnings()
            warnings.filters[:] = filters  # type: ignore[index]


def seed(module: str, value: Any) -> None:
    importlib.import_module(module).seed(value)


def _restoring(module: Any, name: str) -> Callable[[], None]:
    own = getattr(module, name, _ABSENT)
    return lambda: delattr(module, name) if own is _ABSENT else setattr(module, name, own)


def _set_environment(values: tuple[tuple[str, str | None], ...]) -> None:
    for name, value in values:
        if value is None:
            os.environ.pop(name, None)
        else:
            os.environ[name] = value
