"""The one exception that a user is meant to see."""


class UserError(Exception):
    """Bad input. The message is one line that says what is wrong and how to mend it.

    The command line prints it without a stack trace and exits with code 2.
    """
