"""Files of tensors: the result of a decomposition as one safetensors file.

The header's metadata has one entry, ``tensor``: a JSON object of ``version``, 1; ``kind``, the name of the class; and
``dtype``, that of all arrays: float64, float32, complex128 or complex64. The arrays have the names of their places:
``weights`` and ``factors.0``, ``factors.1``, … of a CPTensor; ``core`` and ``factors.0``, … of a TuckerTensor;
``cores.0``, … of the chains; ``weights`` and ``terms.0.1`` (term, factor) of a KroneckerTensor; ``parts.0.weights`` and
``parts.0.factors.0``, … of a HadamardTensor; ``weights``, ``factors.0`` to ``factors.2`` and ``projections.0``, … of a
Parafac2Tensor. Weights that are None are left out. Complex arrays have one more axis, of
two elements: the real and the imaginary part.
"""

from __future__ import annotations

import json
import os
import re
from collections.abc import Iterator
from typing import Any

import numpy as np

from tnadapt.argument_checks import checks_arguments
from tnadapt.checkpoints import container
from tnadapt.checkpoints.atomic_files import replace_file
from tnadapt.errors import FileError, safe_repr
from tnadapt.lazy_names import lazy_name

_ENTRY, _VERSION = "tensor", 1
# The fields of each class, the names of its arrays, and its module, which imports this one.
_FORMS = {
    "CPTensor": (("weights", "factors"), r"weights|factors\.N", "_decomposed"),
    "TuckerTensor": (("core", "factors"), r"core|factors\.N", "_decomposed"),
    "TTTensor": (("cores",), r"cores\.N", "_tensor_chains"),
    "TRTensor": (("cores",), r"cores\.N", "_tensor_chains"),
    "TTMatrix": (("cores",), r"cores\.N", "_tensor_chains"),
    "KroneckerTensor": (("weights", "terms"), r"weights|terms\.N\.N", "_kronecker"),
    "Parafac2Tensor": (("weights", "factors", "projections"), r"weights|(?:factors|projections)\.N", "_parafac2"),
    "HadamardTensor": (("parts",), r"parts\.N\.(?:weights|factors\.N)", "_kronecker"),
}
_NUMBER = "(?:0|[1-9][0-9]{0,8})"
# The dtypes of a tensor, and of its numbers in the file.
_REAL = {"float64": "float64", "float32": "float32", "complex128": "float64", "complex64": "float32"}


def write(path: str | os.PathLike[str], tensor: Any) -> None:
    """Write the file of a tensor, which replaces another one at once and whole."""
    where = container.path_of(path)
    with container.file_error_context(where):
        form, backend = type(tensor).__name__, tensor.backend
        if form not in _FORMS:
            raise FileError(f"a {form} has no file; expected one of {', '.join(_FORMS)}")
        dtype = backend.dtype_name(tensor.arrays[0])
        arrays = {name: np.asarray(backend.to_numpy(array), order="C") for name, array in _named(form, tensor)}
        if dtype != _REAL[dtype]:
            arrays = {name: array[..., None].view(_REAL[dtype]) for name, array in arrays.items()}
        recipe = json.dumps({"dtype": dtype, "kind": form, "version": _VERSION}, separators=(",", ":"))
        stored = {name: container.to_stored(array, _REAL[dtype]) for name, array in arrays.items()}
        replace_file(where, container.serialized(stored, {_ENTRY: recipe}))


def _named(form: str, tensor: Any) -> Iterator[tuple[str, Any]]:
    """Yield the names and arrays of a tensor."""
    fields = _FORMS[form][0]
    pending = list(zip(fields, tensor if len(fields) > 1 or form == "HadamardTensor" else [list(tensor)], strict=True))
    while pending:
        name, part = pending.pop(0)
        if type(part).__name__ in _FORMS:
            yield from ((f"{name}.{below}", array) for below, array in _named(type(part).__name__, part))
        elif isinstance(part, list):
            pending = [(f"{name}.{number}", item) for number, item in enumerate(part)] + pending
        elif part is not None:
            yield name, part


@checks_arguments
def load(path: str | os.PathLike[str]) -> Any:
    """Read a tensor that the method ``save`` of a result has written.

    Parameters
    ----------
    path : str or PathLike

    Returns
    -------
    Decomposed or Parafac2Tensor
        Of the class that was saved, with the same arrays, of NumPy; its method ``to`` moves it.

    Raises
    ------
    FileError
        If there is no such file, or it is damaged, of another kind or of a newer format.

    Notes
    -----
    One safetensors file; nothing is unpickled. How a decomposition found the tensor is not in it.

    Examples
    --------
    >>> import tempfile
    >>> from tnadapt import tensors
    >>> train = tensors.random_tt((3, 4, 5), 2)
    >>> with tempfile.TemporaryDirectory() as folder:
    ...     train.save(folder + "/train.safetensors")
    ...     again = tensors.load(folder + "/train.safetensors")
    >>> again.rank, bool((again.to_tensor() == train.to_tensor()).all())
    ((1, 2, 2, 1), True)
    """
    where = container.path_of(path)
    with container.file_error_context(where), container.opened(where) as file:
        if _ENTRY not in file.metadata:
            raise FileError(
                f"is not the file of a tensor: its metadata have no entry {_ENTRY!r}. tnadapt.load reads adapters"
            )
        form, dtype = _recipe(file.metadata[_ENTRY])
        allowed = re.compile(_FORMS[form][1].replace("N", _NUMBER))
        tree: dict[str, Any] = {}
        for name, entry in file.entries.items():
            if allowed.fullmatch(name) is None:
                raise FileError(f"{safe_repr(name)} is no array of a {form}")
            if container.DTYPES[entry.dtype] != _REAL[dtype]:
                raise FileError(f"{safe_repr(name)} is {entry.dtype}; expected {container.TAG_OF[_REAL[dtype]]}")
            array = container.native(entry.dtype, file.array(name))
            if dtype != _REAL[dtype]:
                if array.ndim == 0 or array.shape[-1] != 2:
                    raise FileError(f"{safe_repr(name)} has shape {array.shape}; expected two numbers for each element")
                array = array.view(dtype)[..., 0]
            *path_, last = name.split(".")
            below = tree
            for step in path_:
                below = below.setdefault(step, {})
            below[last] = array
        return _assembled(form, tree)


def _recipe(text: str) -> tuple[str, str]:
    """Return the kind and the dtype that the metadata say."""
    recipe = container.strict_json(text, "the entry 'tensor'")
    version = recipe.get("version")
    if type(version) is int and version > _VERSION:
        raise FileError(
            f"has version {version} of the format of tensors; this release reads up to {_VERSION}: update it"
        )
    if recipe.keys() != {"dtype", "kind", "version"} or type(version) is not int or version != _VERSION:
        raise FileError(f"the entry 'tensor' must have version {_VERSION}, kind and dtype; got {safe_repr(recipe)}")
    for key, known in (("kind", _FORMS), ("dtype", _REAL)):
        if not isinstance(recipe[key], str) or recipe[key] not in known:
            raise FileError(f"has the {key} {safe_repr(recipe[key])}; expected one of {', '.join(known)}")
    return recipe["kind"], recipe["dtype"]


def _assembled(form: str, tree: dict[str, Any]) -> Any:
    """Make a tensor of its arrays, in dictionaries by the steps of their names."""
    fields, _, module = _FORMS[form]
    for field in fields:
        if field not in tree and field != "weights":
            raise FileError(f"has no {field} of a {form}")
    return lazy_name(__package__, {form: module}, form)(*(_listed(field, tree.get(field)) for field in fields))


def _listed(name: str, node: Any) -> Any:
    """Return the list that a dictionary with numbers as keys stands for."""
    if not isinstance(node, dict):
        return node
    if "factors" in node or "weights" in node:
        return _assembled("CPTensor", node)
    numbers = [str(number) for number in range(len(node))]
    if node.keys() != set(numbers):
        raise FileError(f"has {len(node)} of {name}, and no {next(number for number in numbers if number not in node)}")
    return [_listed(f"{name}.{number}", node[number]) for number in numbers]
