"""Errors meant for people: what was wrong and where, then what to do about it.

The command line prints exactly one sentence for these and exits with `exit_code`; anything else is a bug and
shows a traceback.
"""


class FullarcError(ValueError):
    """A failure that the user can act on, most often by giving something else.

    Args:
        message: what was wrong and where (file, field, tensor).
        hint: what to do next; shown after the message.
    """

    exit_code = 3

    def __init__(self, message: str, hint: str = "") -> None:
        super().__init__(message)
        self.message = message
        self.hint = hint

    def __str__(self) -> str:
        return f"{self.message} {self.hint}".strip()


class UsageError(FullarcError):
    """The command line itself makes no sense."""

    exit_code = 2


class Interrupted(FullarcError):
    """The run stopped on request; everything finished so far is on disk and the run can be resumed."""

    exit_code = 4
