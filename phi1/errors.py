"""What a user is meant to read, and how a run that was told to stop ends."""

import signal


class UserError(Exception):
    """Bad input, a missing server, a corrupt file: anything the user can mend.

    The message is one line that names the thing, its value and the way out. The command line
    prints it without a traceback and exits with status 2; library callers catch it by type.
    """


class Interrupted(KeyboardInterrupt):
    """A signal told a run to stop, and what was finished is kept: the same command goes on from there.

    signal: which one. status: the exit status, 130 after Ctrl-C, and 75 (EX_TEMPFAIL of sysexits.h: try again) after a
    signal that a scheduler sends.
    """

    def __init__(self, number: int) -> None:
        super().__init__(number)
        self.signal = signal.Signals(number)
        self.status = 130 if self.signal is signal.SIGINT else 75
