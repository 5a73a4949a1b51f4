"""The error a kerasnorm user meets."""

from rewriters.errors import RewriteError


class KerasNormError(RewriteError):
    """What happened, with which values, what was expected, how to mend it."""
