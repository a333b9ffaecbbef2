"""Something done in a thread while the caller goes on: a checkpoint's writing, while training does."""

import threading
from collections.abc import Callable


class Background:
    """One action at a time. What it raises is raised where the caller next looks: never lost, and once.

    The thread does not keep a process alive that is told to end at once; what it does must bear that, as a kill.
    """

    def __init__(self) -> None:
        self._thread: threading.Thread | None = None
        self._failure: BaseException | None = None
        self.failed = False
        """Whether the last action raised something."""

    def start(self, action: Callable[[], object]) -> None:
        """Has a thread do `action`, after the one before (`wait`)."""
        self.wait()
        self.failed = False

        def run() -> None:
            try:
                action()
            except BaseException as error:
                self.fail(error)

        self._thread = threading.Thread(target=run, name="checkpoint", daemon=True)
        self._thread.start()

    def fail(self, failure: BaseException) -> None:
        """Has `failure` raised as if the action had raised it."""
        self._failure, self.failed = failure, True

    def check(self) -> None:
        """Raises what the action has raised, if it has."""
        failure, self._failure = self._failure, None
        if failure is not None:
            raise failure

    def wait(self) -> None:
        """Waits until the action is done, and checks. A signal's handler runs meanwhile, and may raise."""
        if self._thread is not None:
            self._thread.join()
            self._thread = None
        self.check()
