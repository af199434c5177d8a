"""Fuzzing of everything that reads outside input: see :mod:`fuzz.targets` and ``python -m fuzz --help``."""
