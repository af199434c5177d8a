"""What is read from outside, held against hostile bytes: see :mod:`fuzz.targets` and ``python -m fuzz --help``."""
