"""Hints for callers who use TensorLy's keywords with our functions."""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable
from typing import ParamSpec, TypeVar

from tnadapt.errors import UnexpectedKeywordError

__all__ = ["hints_keywords"]

P = ParamSpec("P")
R = TypeVar("R")

# TensorLy's keyword -> what to write here. A keyword that the function has itself is never looked up.
_TENSORLY = {
    "n_iter_max": "'max_iterations' here",
    "fixed_modes": "'fixed' here",
    "fixed_factors": "'fixed' here",
    "return_errors": "the attribute 'history' of the result here",
    "normalize_factors": "not needed here, as factors of a CP are always normalized",
    "linesearch": "not needed here, as cp extrapolates where that helps",
    "non_negative": "'nonnegative' here",
    "verbose": "'callback=print' here",
    "modes": "not needed here: give every mode a rank, its size to those that stay as they are",
}


def hints_keywords(function: Callable[P, R]) -> Callable[P, R]:
    """Let a decomposition refuse TensorLy's keywords with an error that has our names for them.

    Examples
    --------
    >>> @hints_keywords
    ... def solve(tensor, *, max_iterations=10):
    ...     return tensor
    >>> solve(1, n_iter_max=5)
    Traceback (most recent call last):
        ...
    tnadapt.errors.UnexpectedKeywordError: solve() got an unexpected keyword argument 'n_iter_max': TensorLy's
    'n_iter_max' is 'max_iterations' here
    """
    own = frozenset(inspect.signature(function).parameters)

    @functools.wraps(function)
    def hinting(*args: P.args, **kwargs: P.kwargs) -> R:
        for name in kwargs:
            if name not in own and name in _TENSORLY:
                raise UnexpectedKeywordError(
                    f"{function.__name__}() got an unexpected keyword argument {name!r}: TensorLy's {name!r} is "
                    f"{_TENSORLY[name]}"
                )
        return function(*args, **kwargs)

    return hinting
