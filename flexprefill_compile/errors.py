"""The error for a mistake of the user's, such as a wrong path on the command line."""


class UsageError(Exception):
    """A mistake that the user can mend; its text is the whole message."""
