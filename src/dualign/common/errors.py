"""The two ways in which dualign stops on purpose, neither with a traceback, the one fault that it rides out, and
how text from outside is shown."""

import re

FOREIGN = (RuntimeError, ValueError, TypeError, LookupError, AttributeError, AssertionError)
"""What somebody else's model may raise where it is used in a way that it is not meant for."""

UNPRINTABLE = re.compile(r"[\x00-\x08\x0b-\x1f\x7f-\x9f\u202a-\u202e\u2066-\u2069]")


class UserError(Exception):
    """Something the user can fix: says what is wrong, where (file, key, row) and what to do. Exit code 2."""

    exit_code = 2


class RewardError(UserError):
    """A Python reward that raised, or returned no numbers. It may be fixed before the run is resumed."""


class StopRun(Exception):
    """A run that stopped cleanly and can be resumed: what was done is kept. Exit code 3."""

    exit_code = 3


class AbsentError(StopRun):
    """Too few labels. What gives them may be fixed before the run is resumed."""


def out_of_memory(error: BaseException) -> bool:
    """Whether an accelerator's or the host's memory did not suffice."""
    return (
        isinstance(error, MemoryError)
        or type(error).__name__ == "OutOfMemoryError"
        or any(words in str(error) for words in ("not enough memory", "can't allocate memory", "out of memory"))
    )


def first_line(error: BaseException) -> str:
    """What a library's error says, in one line."""
    return next((line.strip() for line in str(error).splitlines() if line.strip()), type(error).__name__)


def clean(text: str) -> str:
    """Text from outside, made inert: nothing that a terminal obeys, nothing that turns the reading direction."""
    return UNPRINTABLE.sub("�", text)
