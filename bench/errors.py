"""The user's mistakes."""


class BenchError(Exception):
    """A mistake of the user's, told in one line that says what exists."""
