"""How many requests a server can take: additive increase, multiplicative decrease, and the waits it asks for."""

import contextlib
import sys
import threading
import time
from collections.abc import Iterator

from data_tools.ledger import Closed

_SAID_FROM = 5.0  # seconds: a shorter wait is not worth a line


class AdaptiveLimit:
    """How many requests may be in flight: half after a failure, and one more per round of successes; twice as many per
    round before the first failure (TCP's slow start). Thread-safe.

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
            self._limit = min(self.maximum, self._limit + (1 / self._limit if self._decreased else 1))
            self._changed.notify()

    def failed(self, sent: float, after: float | None, reason: str = "") -> None:
        """Counts a failure. sent: when that attempt was sent (time.monotonic()). after: seconds in which nobody shall
        send; a wait of seconds is said, with its reason."""
        with self._changed:
            if sent > self._decreased:  # one decrease per round: the rest were sent before it took effect
                self._limit = max(1.0, self._limit / 2)
                self._decreased = time.monotonic()
            if after:
                until = time.monotonic() + after
                if until > self._not_before + 1 and after > _SAID_FROM:
                    line = f"waiting {after:,.0f} s as the server asks ({reason}); nothing is lost meanwhile"
                    print(f"\n{line}", file=sys.stderr, flush=True)
                self._not_before = max(self._not_before, until)
