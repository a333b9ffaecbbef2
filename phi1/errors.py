"""The one exception a user is meant to read."""


class UserError(Exception):
    """Bad input, a missing server, a corrupt file: anything the user can mend.

    The message is one line that names the thing, its value and the way out. The command line
    prints it without a traceback and exits with status 2; library callers catch it by type.
    """
