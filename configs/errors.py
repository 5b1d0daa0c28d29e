"""The one exception whose message is written for the person at the keyboard."""


class UserError(Exception):
    """A mistake that its reader can mend: the message says what, where, and what to do.

    The command line prints it as one line and exits with status 1; anything else is a defect of ours
    and keeps its traceback.
    """


class Unreachable(UserError):
    """Something outside did not answer: the same may go well a little later."""
