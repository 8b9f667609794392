"""The two ways in which dualign stops on purpose, neither with a traceback, and the one fault that it rides out."""


class UserError(Exception):
    """Something the user can mend: says what is wrong, where (file, key, row) and what to do. Exit code 2."""

    exit_code = 2


class StopRun(Exception):
    """A run that stopped cleanly and can be resumed: what was done is kept. Exit code 3."""

    exit_code = 3


def out_of_memory(error: BaseException) -> bool:
    """Whether an accelerator's or the host's memory did not suffice."""
    return (
        isinstance(error, MemoryError)
        or type(error).__name__ == "OutOfMemoryError"
        or any(words in str(error) for words in ("not enough memory", "can't allocate memory", "out of memory"))
    )
