"""The two ways in which dualign stops on purpose. Neither shows a traceback."""


class UserError(Exception):
    """Something the user can mend: says what is wrong, where (file, key, row) and what to do. Exit code 2."""

    exit_code = 2


class StopRun(Exception):
    """A run that stopped cleanly and can be resumed: what was done is kept. Exit code 3."""

    exit_code = 3
