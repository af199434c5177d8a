"""Facts about a result that take longer to compute than the result, and are computed when they are first read."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any, Self

__all__ = ["KnownLater", "LazyNumber", "LazyProof", "all_of"]


class LazyProof:
    """A claim whose truth value is computed when it is first needed.

    Parameters
    ----------
    prove : callable
        Returns whether the claim could be proved. It is released after the call.
    """

    def __init__(self, prove: Callable[[], bool]) -> None:
        self._prove: Callable[[], bool] | None = prove
        self._proved = False

    def __bool__(self) -> bool:
        if self._prove is not None:
            self._proved, self._prove = bool(self._prove()), None
        return self._proved

    def __repr__(self) -> str:
        return f"LazyProof({'not asked yet' if self._prove is not None else self._proved})"


def all_of(claims: Iterable[bool | LazyProof]) -> bool | LazyProof:
    """Return whether all claims hold: at once if no proof is needed, otherwise as another proof."""
    claims = list(claims)
    if any(claim is False for claim in claims):
        return False
    proofs = [claim for claim in claims if isinstance(claim, LazyProof)]
    return LazyProof(lambda: all(proofs)) if proofs else all(claims)


class LazyNumber:
    """A number that is computed when it is first needed.

    Parameters
    ----------
    find : callable
        Returns the number. It is released after the call.
    """

    def __init__(self, find: Callable[[], float]) -> None:
        self._find: Callable[[], float] | None = find
        self._found = 0.0

    def __float__(self) -> float:
        if self._find is not None:
            self._found, self._find = float(self._find()), None
        return self._found


class KnownLater:
    """Base of a frozen dataclass whose ``error``, ``bound`` and ``certified`` may be computed when they are read.

    The bound and the certificate are computed together.
    """

    @classmethod
    def later(cls, find: Callable[[], tuple[float, bool]], error: float | LazyNumber, **known: Any) -> Self:
        """Make one of all other fields, and a function that returns the bound, and whether it is certified."""
        made = object.__new__(cls)
        vars(made).update(known, _find=find, **{"_error" if isinstance(error, LazyNumber) else "error": error})
        return made

    def __getattr__(self, name: str) -> Any:
        # Called only for what is not there.
        if name == "error" and "_error" in vars(self):
            vars(self)["error"] = float(vars(self)["_error"])
            vars(self).pop("_error", None)
            return vars(self)["error"]
        find = vars(self).get("_find") if name in ("bound", "certified") else None
        if find is None:
            raise AttributeError(f"{type(self).__name__!r} object has no attribute {name!r}")
        bound, certified = find()
        vars(self).update(bound=bound, certified=certified)
        vars(self).pop("_find", None)
        return vars(self)[name]

    def __getstate__(self) -> dict[str, Any]:
        getattr(self, "error", None)  # computed before it is copied or pickled
        getattr(self, "bound", None)
        return vars(self)
