"""What is written in plain English: pages, the README and docstrings, checked by ``python -m tests.prose``."""
