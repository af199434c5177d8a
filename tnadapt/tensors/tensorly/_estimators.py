"""Decompositions as objects with settings and ``fit_transform``, under TensorLy's names."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from typing import Any, Self

from tnadapt.errors import UnexpectedKeywordError

from ._parafac import non_negative_parafac, non_negative_parafac_hals, parafac
from ._train_and_ring import tensor_ring, tensor_ring_als, tensor_train, tensor_train_matrix
from ._tucker_calls import non_negative_tucker, non_negative_tucker_hals, tucker

__all__ = [
    "CP",
    "CP_NN",
    "CP_NN_HALS",
    "TensorRing",
    "TensorRingALS",
    "TensorTrain",
    "TensorTrainMatrix",
    "Tucker",
    "Tucker_NN",
    "Tucker_NN_HALS",
    "estimator",
]


class _Estimator:
    """The settings of a decomposition.

    Parameters
    ----------
    rank
        As for the function.
    **settings
        Its keywords, all kept as attributes.

    Attributes
    ----------
    decomposition_
        The last result.
    errors_ : list of float
        The errors of its iterations, where the function returns them.
    """

    _function: Callable[..., Any]

    def __init__(self, rank: Any = None, **settings: Any) -> None:
        allowed = _defaults(type(self)._function)
        unknown = sorted(set(settings) - set(allowed))
        if unknown:
            raise UnexpectedKeywordError(
                f"{type(self).__name__} has no {', '.join(unknown)}; expected {', '.join(allowed)}"
            )
        self.rank = rank
        for name, value in {**allowed, **settings}.items():
            setattr(self, name, value)

    def fit_transform(self, tensor: Any) -> Any:
        """Decompose a tensor; return the result."""
        function = type(self)._function
        words = {name: getattr(self, name) for name in _defaults(function)}
        errors = "return_errors" in words
        if errors:
            words["return_errors"] = True
        result = function(tensor, self.rank, **words)
        self.decomposition_, self.errors_ = result if errors else (result, [])
        return self.decomposition_

    def fit(self, tensor: Any) -> Self:
        """Decompose a tensor; return the object itself."""
        self.fit_transform(tensor)
        return self

    def __repr__(self) -> str:
        return f"{type(self).__name__}(rank={self.rank!r})"


def _defaults(function: Callable[..., Any]) -> dict[str, Any]:
    found = list(inspect.signature(function).parameters.values())[2:]
    return {parameter.name: parameter.default for parameter in found}


def estimator(name: str, function: Callable[..., Any]) -> type[_Estimator]:
    """Return the class of a function's settings.

    Parameters
    ----------
    name : str
        Of the class.
    function : callable
        Takes the tensor, the rank, and keywords with defaults.

    Examples
    --------
    >>> from tnadapt.tensors.tensorly import CP, random_cp
    >>> cp = CP(rank=2, tol=1e-9)
    >>> cp.fit_transform(random_cp((4, 5, 6), 2, full=True, random_state=0)).rank, cp.errors_[-1] < 1e-3
    (2, True)
    """
    text = (
        f"Settings of :func:`{function.__name__}`, and ``fit_transform(tensor)``.\n\n"
        "    The rank may be positional; everything else is a keyword of the function, with its default.\n"
    )
    return type(name, (_Estimator,), {"__doc__": text, "_function": staticmethod(function), "__module__": __name__})


CP = estimator("CP", parafac)
CP_NN = estimator("CP_NN", non_negative_parafac)
CP_NN_HALS = estimator("CP_NN_HALS", non_negative_parafac_hals)
Tucker = estimator("Tucker", tucker)
Tucker_NN = estimator("Tucker_NN", non_negative_tucker)
Tucker_NN_HALS = estimator("Tucker_NN_HALS", non_negative_tucker_hals)
TensorTrain = estimator("TensorTrain", tensor_train)
TensorTrainMatrix = estimator("TensorTrainMatrix", tensor_train_matrix)
TensorRing = estimator("TensorRing", tensor_ring)
TensorRingALS = estimator("TensorRingALS", tensor_ring_als)
