"""Progress of long work on stderr: how much is done, how fast, how long it will take."""

import functools
import sys
import time
import weakref
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import rich.progress

_SECONDS = {"terminal": 0.1, "log": 15.0}
"""The least between two looks of the line on a terminal, and between two lines elsewhere."""


class Progress:
    """Work of `total` units, of which `advance` counts what is done: "label: done/total unit, rate, time left, note".

    On a terminal the line is alive, drawn by rich, below those of the work that this is a part of; in a log it is a
    line at most every 15 seconds, and one at the end.
    """

    def __init__(self, label: str, total: int, unit: str, *, quiet: bool = False) -> None:
        self._label, self._total, self._unit, self._quiet = label, total, unit, quiet
        self._done, self._note = 0, ""
        self._started = self._said = time.monotonic()
        self._shown: tuple[int, str] | None = None
        self._bar: _Bar | None = None
        if not quiet and sys.stderr.isatty():
            self._bar = _Bar(label, total, unit)

    def advance(self, count: int = 1, note: str = "") -> None:
        """Counts `count` more as done; `note` is shown behind the line."""
        self.report(self._done + count, self._total, note)

    def report(self, done: int, total: int, note: str = "") -> None:
        """Says that `done` of `total` are done in all."""
        self._done, self._total, self._note = done, total, note
        if time.monotonic() - self._said >= _SECONDS["terminal" if self._bar else "log"]:
            self._say()

    def close(self) -> None:
        """Says how it ended; what is printed next starts its own line."""
        self._say()
        if self._bar is not None:
            self._bar.close()

    def _say(self) -> None:
        self._said = time.monotonic()
        if self._bar is not None:
            self._bar.show(self._done, self._total, self._note)
        elif not self._quiet and (self._done, self._note) != self._shown:  # at its end it may be where it was
            rate = self._done / max(self._said - self._started, 1e-9)
            left = (self._total - self._done) / rate if rate > 0 else float("inf")
            line = f"{self._label}: {self._done:,}/{self._total:,} {self._unit}  {rate:,.1f}/s  ETA {left:,.0f} s"
            print(f"{line}  {self._note}" if self._note else line, file=sys.stderr, flush=True)
        self._shown = self._done, self._note


class _Bar:
    """A line of the terminal's display, which all of the process share: two displays would write over each other."""

    def __init__(self, label: str, total: int, unit: str) -> None:
        display = _display()
        self._task = display.add_task(label, total=total, unit=unit, note="")
        display.start()
        self.close = weakref.finalize(self, _remove, self._task)  # of an error too, which nobody closes after

    def show(self, done: int, total: int, note: str) -> None:
        _display().update(self._task, completed=done, total=total, note=note)
        _display().refresh()


@functools.cache
def _display() -> "rich.progress.Progress":
    from rich.console import Console
    from rich.progress import BarColumn, Progress, ProgressColumn, Task, TextColumn, TimeRemainingColumn
    from rich.text import Text

    class Rate(ProgressColumn):
        def render(self, task: Task) -> Text:
            return Text("" if not task.speed else f"{task.speed:,.1f}/s")

    count = TextColumn("{task.description}: {task.completed:,.0f}/{task.total:,.0f} {task.fields[unit]}")
    remaining = (TextColumn("ETA"), TimeRemainingColumn(), TextColumn("{task.fields[note]}"))
    # Drawn where it is told to, by no thread of its own: stages start processes.
    return Progress(count, BarColumn(20), Rate(), *remaining, console=Console(stderr=True), auto_refresh=False)


def _remove(task: "rich.progress.TaskID") -> None:
    """Ends a line. The last one stays to be read."""
    display = _display()
    last = len(display.task_ids) == 1
    if last:
        display.stop()
    display.remove_task(task)
