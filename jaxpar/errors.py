"""The errors that a user can mend: one sentence that names the thing, the numbers and the fix."""


class UserError(ValueError):
    """Bad input. The command line prints its sentence without a traceback and ends with exit code 2."""
