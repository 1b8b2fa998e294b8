"""The exceptions that mean: the user can fix this."""


class UserError(Exception):
    """A mistake in the input. The message is one sentence: what is wrong, where, and what to do. Exit code 2."""


class Diverged(UserError):
    """Training left the numbers."""
