"""How many requests a server can take: additive increase, multiplicative decrease, and its own `Retry-After`."""

import contextlib
import email.utils
import sys
import threading
import time
from collections.abc import Iterator
from typing import Any

from data_tools.ledger import Closed


class AdaptiveLimit:
    """How many requests may be in flight: one more per round of successes, half after a failure. Thread-safe.

    maximum: never more than this. Starts at 4, or the maximum if that is less.
    """

    def __init__(self, maximum: int) -> None:
        self.maximum = max(1, maximum)
        self._limit = float(min(4, self.maximum))
        self._in_flight = 0
        self._not_before = 0.0
        self._decreased = 0.0
        self._changed = threading.Condition()

    @property
    def value(self) -> int:
        """The limit now."""
        return int(self._limit)

    @contextlib.contextmanager
    def slot(self, closed: threading.Event) -> Iterator[None]:
        """A place in flight while the block runs; waits for one. Raises Closed if `closed` is set meanwhile."""
        with self._changed:
            while True:
                if closed.is_set():
                    raise Closed
                wait = self._not_before - time.monotonic()
                if wait <= 0 and self._in_flight < int(self._limit):
                    break
                self._changed.wait(min(wait, 0.2) if wait > 0 else 0.2)
            self._in_flight += 1
        try:
            yield
        finally:
            with self._changed:
                self._in_flight -= 1
                self._changed.notify()

    def succeeded(self) -> None:
        """Counts a success."""
        with self._changed:
            self._limit = min(self.maximum, self._limit + 1 / self._limit)
            self._changed.notify()

    def failed(self, sent: float, after: float | None) -> None:
        """Counts a failure. sent: when that attempt was sent (time.monotonic()). after: seconds the server asked to wait."""
        with self._changed:
            if sent > self._decreased:  # one decrease per round: the rest were sent before it took effect
                self._limit = max(1.0, self._limit / 2)
                self._decreased = time.monotonic()
            if after:
                until = time.monotonic() + after
                if until > self._not_before and after > 5:
                    print(f"\nthe server asks to wait {after:,.0f} s", file=sys.stderr, flush=True)
                self._not_before = max(self._not_before, until)


def retry_after(headers: Any) -> float | None:
    """The header `Retry-After` in seconds (given as seconds or as an HTTP date, RFC 9110 10.2.3)."""
    value = headers.get("retry-after")
    if value is None:
        return None
    try:
        return max(0.0, float(value))
    except ValueError:
        pass
    try:
        return max(0.0, email.utils.parsedate_to_datetime(value).timestamp() - time.time())
    except ValueError:
        return None
