"""Functions whose results compilers treat as constants."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, TypeVar

__all__ = ["constant_result"]

_F = TypeVar("_F", bound=Callable[..., Any])


def constant_result(function: _F) -> _F:
    """Mark a function as :func:`torch.compiler.assume_constant_result` does.

    Parameters
    ----------
    function : callable
        Compiled programs contain its result as a constant.

    Returns
    -------
    callable
        The same function.

    Notes
    -----
    Torch's own function imports the compiler, which takes more than a second, and most processes compile nothing. A
    test compares the marks.
    """
    function._dynamo_marked_constant = True  # type: ignore[attr-defined]
    return function
