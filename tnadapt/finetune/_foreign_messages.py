"""Errors and messages of the libraries that load models."""

from __future__ import annotations

import contextlib
import re
from collections.abc import Iterator
from typing import Any

from tnadapt.errors import TnadaptError, safe_repr

from ._data_sources import first_line, quiet

__all__ = ["class_expected", "refused", "silent", "transformers_library"]


@contextlib.contextmanager
def refused(what: str, way: str = "") -> Iterator[None]:
    """Turn any error of a hub, proxy or loader into a one-line TnadaptError with a way out."""
    try:
        yield
    except TnadaptError:
        raise
    except Exception as error:
        raise TnadaptError(f"{what}: {first_line(error).rstrip('.') if way else first_line(error)}{way}") from None


@contextlib.contextmanager
def class_expected(name: str, auto: str, task: str) -> Iterator[None]:
    """Say it plainly if transformers has no class of a task for a model, such as a BERT for images."""
    try:
        yield
    except ValueError as error:
        found = re.search(r"Unrecognized configuration class <class '[\w.]*?(\w+)'>", str(error))
        if found is None:
            raise
        raise TnadaptError(
            f"{safe_repr(name)} has a {found[1]}, for which transformers has no {auto}; the task is {task}: give "
            "another --model, or other data"
        ) from None


@contextlib.contextmanager
def silent(transformers: Any) -> Iterator[None]:
    """Silence transformers' messages and progress bars inside ``with``."""
    logging = transformers.utils.logging
    level, bars = logging.get_verbosity(), logging.is_progress_bar_enabled()
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    try:
        with quiet("transformers", "huggingface_hub"):
            yield
    finally:
        logging.set_verbosity(level)
        if bars:
            logging.enable_progress_bar()


def transformers_library() -> Any:
    """Return transformers.

    Raises
    ------
    TnadaptError
        If it is not installed.
    """
    try:
        import transformers
    except ImportError:
        raise TnadaptError(
            "models are loaded with transformers, which is not installed: pip install 'tnadapt[hub]'"
        ) from None
    return transformers
