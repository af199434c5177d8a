"""TensorLy's keywords: what each means here, and the decompositions that its own functions compute."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np

from tnadapt.backends import Backend, load_backend
from tnadapt.backends.backend import Array
from tnadapt.decomposition.tensorly_calls import call, library_for
from tnadapt.errors import ConfigError, safe_repr

from .._checks import as_tensor
from .._cp_tensor import CPTensor
from .._decomposed import Decomposed
from .._requests import Observer, Request, requested
from .._tucker_tensor import TuckerTensor

__all__ = [
    "Sweeps",
    "check_criterion",
    "errors_of",
    "filled_start",
    "needed_mask",
    "own_arrays",
    "ranks_by_share",
    "svd_method",
    "tolerance",
]

# TensorLy's ways to compute singular vectors -> ours.
_SVD = {"truncated_svd": "auto", "symeig_svd": "auto", "randomized_svd": "randomized"}


def svd_method(svd: Any) -> str:
    """Return our name of a way to compute singular vectors; raise a ConfigError if there is none."""
    if not isinstance(svd, str) or svd not in _SVD:
        raise ConfigError(
            f"svd must be one of {', '.join(map(repr, _SVD))}; got {safe_repr(svd)}. Functions of your own are not "
            "called: use tensorly.decomposition for those"
        )
    return _SVD[svd]


def check_criterion(cvg_criterion: Any) -> None:
    """Raise a ConfigError for an unknown criterion. The two are the same where no iteration increases the error."""
    if cvg_criterion not in ("abs_rec_error", "rec_error"):
        raise ConfigError(f"cvg_criterion must be 'abs_rec_error' or 'rec_error'; got {safe_repr(cvg_criterion)}")


def tolerance(tol: Any) -> Any:
    """Return a tolerance; None and False stand for 0, by which the iteration stops if it improves nothing."""
    return 0.0 if tol is None or tol is False else tol


def ranks_by_share(function: str, shape: Sequence[int], rank: Any) -> Any:
    """Return the ranks that TensorLy chooses for a share of the parameters; others as they are."""
    if isinstance(rank, float) or (isinstance(rank, str) and rank == "same"):
        return call(load_backend("numpy"), function, tuple(shape), rank)
    if isinstance(rank, str):
        raise ConfigError(f"rank must be numbers, a share of the parameters or 'same'; got {safe_repr(rank)}")
    return rank


def errors_of(found: Decomposed) -> list[float]:
    """Return the errors of the iterations, or the only one."""
    return list(found.history) or ([] if found.error is None else [found.error])


def needed_mask(tensor: Any, mask: Any) -> Any:
    """Return a mask, checked; None if all elements are known."""
    if mask is None:
        return None
    return None if requested(tensor, 1, None, mask=mask).observed is None else mask


def alike(arrays: Sequence[Any], what: str, like: Array = None) -> list[Array]:
    """Return arrays in the widest of their dtypes and that of ``like``.

    TensorLy's results may have real weights and complex factors.
    """
    found = [as_tensor(array, what) for array in arrays]
    kinds = [backend.dtype_name(array) for backend, array in found]
    widest = np.result_type(*kinds, *([] if like is None else [found[0][0].dtype_name(like)])).name
    return [array if backend.dtype_name(array) == widest else backend.astype(array, widest) for backend, array in found]


def as_cp(given: Any, like: Array = None) -> CPTensor:
    """Return a CP tensor, from one or from (weights, factors); of the dtype of ``like`` if it is wider."""
    if isinstance(given, CPTensor) and like is None:
        return given
    weights, factors = given
    listed = list(factors)
    arrays = alike(listed if weights is None else [*listed, weights], "a part of the CP tensor", like)
    return CPTensor(None if weights is None else arrays.pop(), arrays)


def as_tucker(given: Any, like: Array = None) -> TuckerTensor:
    """Return a Tucker tensor, from one or from (core, factors); of the dtype of ``like`` if it is wider."""
    if isinstance(given, TuckerTensor) and like is None:
        return given
    core, factors = given
    core, *arrays = alike([core, *factors], "a part of the Tucker tensor", like)
    return TuckerTensor(core, arrays)


class Sweeps:
    """What a user sees of the iterations: lines if verbose, and calls of a callback with the result so far.

    Parameters
    ----------
    callback : callable, optional
        Called with the result and the relative error; stops the iteration if it returns True.
    verbose : bool or int
    form : callable
        Makes the result of its arrays.
    """

    def __init__(self, callback: Any, verbose: Any, form: Callable[[Sequence[Array]], Decomposed]) -> None:
        if callback is not None and not callable(callback):
            raise ConfigError(f"callback must be callable; got {safe_repr(callback)}")
        self.callback, self.verbose, self.form = callback, verbose, form
        self.count = 0

    @property
    def observer(self) -> Observer | None:
        """What our functions call; None if there is nothing to show."""
        return None if self.callback is None and not self.verbose else Observer(self._see)

    def _see(self, iteration: int, error: float, arrays: Sequence[Array]) -> Any:
        return self._shown(iteration, error, self.form(arrays) if self.callback is not None else None)

    def _shown(self, iteration: int, error: float, found: Decomposed | None) -> Any:
        self.count += 1
        if self.verbose:
            print(f"iteration {iteration}, reconstruction error: {error}")
        return None if self.callback is None else self.callback(found, error)

    def finish(self, found: Decomposed) -> None:
        """Show the result if there was no iteration."""
        if not self.count and self.observer is not None and found.error is not None:
            self._shown(0, found.error, found)


def own_arrays(
    function: str,
    form: type[CPTensor] | type[TuckerTensor],
    tensor: Any,
    rank: Any,
    mask: Any = None,
    init: Any = "svd",
    random_state: Any = None,
    n_iter_max: int = 100,
    host: bool = False,
    **words: Any,
) -> tuple[Any, list[float], Request]:
    """Let TensorLy compute a decomposition.

    Parameters
    ----------
    function : str
        Name of the function, which accepts ``return_errors``.
    form : type
        CPTensor or TuckerTensor.
    tensor, rank, mask, init, random_state, n_iter_max
        As for the function.
    host : bool
        Whether NumPy computes: for iterations of many small operations.
    **words
        Other keywords.

    Returns
    -------
    found : CPTensor or TuckerTensor, or (found, sparse part)
        With its outcome, in the library, dtype and device of the tensor.
    errors : list of float
    request : Request
    """
    request = requested(tensor, rank, None, mask=mask, random_state=random_state)
    library = load_backend("numpy") if host else library_for(request.backend)
    sent = _Sent(request.backend, library)
    if mask is not None:
        words["mask"] = _sent_mask(request, library, mask)
    if not isinstance(init, str):
        parts = [None if part is None else sent.all(part) for part in init]
        init = tuple(parts) if form is CPTensor or isinstance(init, tuple) else parts
    result, errors = call(
        library, f"decomposition.{function}", sent(request.tensor), rank, init=init, n_iter_max=n_iter_max,
        random_state=request.seed % (1 << 32), return_errors=True, **words,
    )  # fmt: skip
    listed = [float(error if isinstance(error, float) else library.to_numpy(error)) for error in errors]
    sparse = None
    if words.get("sparsity"):
        result, sparse = result
    first, factors = result
    back = _Sent(library, request.backend, like=request.tensor)
    made = as_cp if form is CPTensor else as_tucker
    found: Any = made((None if first is None else back(first), back.all(list(factors))))
    request.finished(found, f"TensorLy, {function}", converged=len(listed) < n_iter_max, history=listed)
    return (found if sparse is None else (found, back(sparse))), listed, request


def filled_start(tensor: Any, rank: int, mask: Any, random_state: Any, svd: str, repeats: int) -> CPTensor:
    """Return what TensorLy starts from if elements are missing: singular vectors of a tensor that they are filled in.

    Parameters
    ----------
    tensor, rank, mask, random_state, svd
        As for TensorLy's ``parafac``.
    repeats : int
        How often the missing elements are filled in.
    """
    request = requested(tensor, rank, None, mask=mask, random_state=random_state)
    library = library_for(request.backend)
    sent, back = _Sent(request.backend, library), _Sent(library, request.backend, like=request.tensor)
    weights, factors = call(
        library, "decomposition._cp.initialize_cp", sent(request.tensor), rank, init="svd", svd=svd,
        random_state=request.seed % (1 << 32), mask=_sent_mask(request, library, mask), svd_mask_repeats=repeats,
    )  # fmt: skip
    return as_cp((back(weights), back.all(list(factors))))


def _sent_mask(request: Request, library: Backend, mask: Any) -> Array:
    known = np.asarray(mask) if isinstance(mask, (list, tuple, np.ndarray)) else request.backend.to_numpy(mask)
    kind, device = request.backend.dtype_name(request.tensor), request.backend.device(request.tensor)
    return library.asarray(known.astype(np.float64), kind, device if library is request.backend else None)


class _Sent:
    """Sends arrays from one library to another; to the dtype and device of ``like``."""

    def __init__(self, source: Backend, target: Backend, like: Array = None) -> None:
        self.source, self.target, self.like = source, target, like

    def __call__(self, array: Array) -> Array:
        if self.source is self.target:
            return array
        if self.like is None:
            return self.target.asarray(self.source.to_numpy(array))
        kind, device = self.target.dtype_name(self.like), self.target.device(self.like)
        return self.target.asarray(self.source.to_numpy(array), kind, device)

    def all(self, arrays: Any) -> Any:
        """Send an array, or a list of them."""
        return [self(array) for array in arrays] if isinstance(arrays, (list, tuple)) else self(arrays)
