"""A progress line on stderr: done, rate, time left."""

import sys
import time


class Progress:
    """Says "label: done/total unit, rate, ETA" at most every `interval` seconds.

    On a terminal the line rewrites itself; in a log it is a new line each time, and then less often.
    """

    def __init__(self, label: str, total: int, unit: str, *, quiet: bool = False) -> None:
        self._label, self._total, self._unit, self._quiet = label, total, unit, quiet
        self._terminal = sys.stderr.isatty()
        self._interval = 0.5 if self._terminal else 15.0
        self._done = 0
        self._started = self._said = time.monotonic()
        self._open_line = False

    def advance(self, count: int = 1, note: str = "") -> None:
        """Counts `count` more as done; `note` is shown behind the line."""
        self._done += count
        now = time.monotonic()
        if self._quiet or now - self._said < self._interval:
            return
        self._said = now
        rate = self._done / max(now - self._started, 1e-9)
        left = (self._total - self._done) / rate if rate > 0 else float("inf")
        line = f"{self._label}: {self._done:,}/{self._total:,} {self._unit}  {rate:,.1f}/s  ETA {left:,.0f} s"
        line += f"  {note}" if note else ""
        print(f"\r\033[K{line}" if self._terminal else line, end="" if self._terminal else "\n", file=sys.stderr)
        sys.stderr.flush()
        self._open_line = self._terminal

    def close(self) -> None:
        """Ends the terminal's line, so that what is printed next starts its own."""
        if self._open_line:
            print(file=sys.stderr, flush=True)
            self._open_line = False
