"""The errors this library raises for a caller's mistake.

All derive from :class:`TnadaptError`, which is a ``ValueError``: code that does not know this library
still catches them. A message says what was given, what was expected, and the way out.
"""


class TnadaptError(ValueError):
    """Anything a caller of tnadapt did that cannot be carried out."""


class ConfigError(TnadaptError):
    """A setting that is unknown, of the wrong type, impossible, or at odds with another one."""


class ShapeError(TnadaptError):
    """An array, or a list of weight shapes, whose sizes do not fit what was asked."""


class BackendError(TnadaptError):
    """An array library, dtype or device that is not known, not available, or mixed with another."""
