"""What a test puts in the place of something that the program uses: standard input, `input`, `time.sleep` and whatever
else it patches, `os.environ`, filters of warnings, loggers, seeds.

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

from phi1.evaluate.inside.kinds import VALUES, value_type

_ABSENT = object()
_ENVIRONMENT, _WARNINGS, _LOGGING = "os.environ", "warnings", "logging"
_OF_RECORDS = ("name", "msg", "args", "levelname", "levelno", "pathname", "filename", "module", "lineno", "funcName")


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
                _keep(module, name)
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
        if "log" in self.watched and "logging" in sys.modules:
            found |= _loggers()
        return found


def _loggers() -> dict[str, Any]:
    """Levels of the test's loggers, and what its handlers are given, where it has any."""
    logging = sys.modules["logging"]
    named = [one for one in logging.root.manager.loggerDict.values() if isinstance(one, logging.Logger)]
    loggers = [logging.root, *named]
    if (
        logging.root.level == logging.WARNING
        and not any(one.handlers for one in loggers)
        and not any(one.level for one in named)
    ):
        return {}
    return {_LOGGING: (tuple((one.name, one.level) for one in loggers), _logged)}


def _logged(facts: dict[str, Any]) -> None:
    """In the test's process, for a record of the program's loggers."""
    record = sys.modules["logging"].makeLogRecord(facts)
    sys.modules["logging"].getLogger(record.name).handle(record)


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
            elif place == _LOGGING:
                self.undo.pop(_LOGGING, lambda: None)()
                self.undo[_LOGGING] = _take_loggers(*value)
            else:
                module_name, _, name = place.rpartition(".")
                module = importlib.import_module(module_name)
                if place not in self.undo:
                    _keep(module_name, name)
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


def _take_loggers(levels: tuple[tuple[str, int], ...], logged: Callable[..., None]) -> Callable[[], None]:
    logging: Any = importlib.import_module("logging")

    class Forward(logging.Handler):
        def emit(self, record: Any) -> None:
            logged({name: getattr(record, name) for name in _OF_RECORDS})

    loggers = [(logging.getLogger("" if name == "root" else name), level) for name, level in levels]
    before = [(logger, logger.level) for logger, _ in loggers]
    handler = Forward()
    logging.root.addHandler(handler)
    for logger, level in loggers:
        logger.setLevel(level)

    def undo() -> None:
        logging.root.removeHandler(handler)
        for logger, level in before:
            logger.setLevel(level)

    return undo


def seed(module: str, value: Any) -> None:
    importlib.import_module(module).seed(value)


def _keep(module: str, name: str) -> None:
    if (module, name) in VALUES:
        value_type(module, name)


def _restoring(module: Any, name: str) -> Callable[[], None]:
    own = getattr(module, name, _ABSENT)
    return lambda: delattr(module, name) if own is _ABSENT else setattr(module, name, own)


def _set_environment(values: tuple[tuple[str, str | None], ...]) -> None:
    for name, value in values:
        if value is None:
            os.environ.pop(name, None)
        else:
            os.environ[name] = value
