"""What the command line says when it can't do what was asked."""


class UsageError(Exception):
    """Something the user can set right; its text is the whole message."""
