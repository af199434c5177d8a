"""``convert``: read, choose, write down, and measure what was written."""

from __future__ import annotations

import dataclasses
import math
import os
from typing import Any

from ..adapter_file import AdapterFile
from ..container import path_of
from ..errors import ConfigError, integer, shown
from .choosing import Wish
from .conversion import Conversion, check_free
from .measuring import errors_of, is_rounding, low_rank_squares, squares_of
from .numbers import check_range, rounded
from .outward import to_foreign
from .reading import read
from .source import Source
from .taking_apart import Wide

__all__ = ["FORMS", "convert"]

FORMS = (
    "tnadapt", "peft-lora", "peft-lokr", "peft-loha", "lycoris-lora", "lycoris-lokr", "lycoris-loha", "lycoris-full",
)  # fmt: skip
_DTYPES = ("float32", "float16", "bfloat16", "float64")
_LIBRARIES = {"peft": "PEFT", "lycoris": "LyCORIS"}


def convert(
    source: str | os.PathLike[str] | AdapterFile,
    out: str | os.PathLike[str] | None = None,
    *,
    to: str = "tnadapt",
    rank: int | None = None,
    max_error: float | None = None,
    base: Any = None,
    part: str | None = None,
    dtype: str | None = None,
    without_kept: bool = False,
    overwrite: bool = False,
) -> Conversion:
    """Turn an adapter of this library, PEFT or LyCORIS into another of them: exactly, or with the error that it makes.

    Parameters
    ----------
    source : str, PathLike or AdapterFile
        A tnadapt file; a folder that PEFT saved (LoRA, LoKr, LoHa); or a safetensors file of LyCORIS or kohya (LoRA,
        LoKr, LoHa, full differences).
    out : str or PathLike, optional
        Where to write the result: a folder for PEFT, else a file. Nothing is written if None.
    to : str
        "tnadapt", "peft-lora", "peft-lokr", "peft-loha", "lycoris-lora", "lycoris-lokr", "lycoris-loha" or
        "lycoris-full".
    rank : int, optional
        The largest rank allowed. Without it an update keeps the rank that it has; LoRA also finds the smallest rank
        within ``max_error``.
    max_error : float, optional
        Relative Frobenius error of all updates together that is allowed. None allows rounding alone: a conversion that
        loses anything has to be asked for.
    base : optional
        The base model: a safetensors file, an index or a folder, of which only headers are read; a mapping of modules'
        paths to shapes; or a list of paths. LyCORIS' names need one, for they have lost their dots; else the adapter's
        names and shapes are checked against it.
    part : str, optional
        Which prefix of a kohya file to take, such as "lora_unet", where it has several models' adapters.
    dtype : str, optional
        Of the result's tensors. By default the source's, or float32 where that would round anything.
    without_kept : bool
        Whether parameters that were trained beside the adapter, such as a classifier head, may be left out.
    overwrite : bool
        Whether to replace what is at ``out``.

    Returns
    -------
    Conversion
        With the error, of all and of each weight, measured on the very bytes that are written.

    Raises
    ------
    ConfigError
        If the result would be off by more than ``max_error``, or the form cannot hold it: the message has the error and
        the ways out. Nothing is written.
    FileError, TargetError
        If the source is damaged or holds what cannot be converted, the base is another model, or ``out`` cannot be
        written.

    Notes
    -----
    Exact are: LoRA of order 2, a weight each, to LoRA; Kronecker products of whole sizes to LoKr, more than two folded
    to two; LoHa to LoHa; any update of low matrix rank to all three; everything to "lycoris-full". Else LoRA is the
    truncated SVD, and LoKr and LoHa are fitted by :func:`tnadapt.decompose`. All is computed in float64, one weight
    after another; a truncated SVD is one of the whole weight. The error is also in the metadata of the file, under
    "tnadapt.convert".

    Examples
    --------
    >>> import numpy as np, tnadapt as tna
    >>> plan = tna.SuperLoRA(tna.presets.lora(rank=2), [(8, 12)])
    >>> rng = np.random.default_rng(0)
    >>> arrays = {name: rng.normal(size=shape).astype("f4") for name, shape in plan.param_shapes.items()}
    >>> file = tna.AdapterFile(plan.config, [tna.Target("blocks.0.query", (8, 12), "q")], arrays)
    >>> found = tna.convert(file, to="peft-lora")
    >>> found.exact, found.config["r"], sorted(found.tensors)[0]
    (True, 2, 'base_model.model.blocks.0.query.lora_A.weight')
    >>> tna.convert(file, to="peft-lora", rank=1)
    Traceback (most recent call last):
        ...
    tnadapt.errors.ConfigError: the conversion to peft-lora would change the updates by a relative error of ...
    """
    wish = _checked(to, rank, max_error, dtype)
    if out is not None:
        check_free(path_of(out), to, overwrite)
    found = read(source, base, part)
    if without_kept:
        found = found._replace(file=_bare(found.file))
    found.file.check_finite()
    try:
        made = _own(found, dtype) if wish is None else to_foreign(found, wish, to, dtype)
    except MemoryError as error:
        rows, cols = max((target.shape for target in found.file.targets), key=math.prod)
        raise ConfigError(
            f"there is not enough memory for the largest update, {rows} × {cols}: is the adapter what it says?"
        ) from error
    _check_error(made, max_error)
    if out is not None:
        made.save(out, overwrite)
    return made


def _checked(to: Any, rank: Any, max_error: Any, dtype: Any) -> Wish | None:
    if to not in FORMS:
        raise ConfigError(f"to must be one of {', '.join(FORMS)}; got {shown(to)}")
    if dtype is not None and dtype not in _DTYPES:
        raise ConfigError(f"dtype must be one of {', '.join(_DTYPES)}; got {shown(dtype)}")
    if max_error is not None and (
        isinstance(max_error, bool) or not isinstance(max_error, (int, float)) or not 0 <= max_error <= 1
    ):
        raise ConfigError(f"max_error must be a number from 0 to 1; got {shown(max_error)}")
    if rank is not None:
        rank = integer("rank", rank, 1, 1 << 40, ConfigError)
        if to in ("tnadapt", "lycoris-full"):
            raise ConfigError(f"rank={rank} belongs to LoRA, LoKr and LoHa; {to!r} keeps all there is")
    if to == "tnadapt":
        return None
    library, kind = to.split("-")
    return Wish(_LIBRARIES[library], kind, rank, max_error)


def _bare(file: AdapterFile) -> AdapterFile:
    dtypes = {name: dtype for name, dtype in file.dtypes.items() if name in file.arrays}
    return dataclasses.replace(file, kept={}, dtypes=dtypes)


def _check_error(made: Conversion, max_error: float | None) -> None:
    if made.error <= (max_error or 0.0) or (made.exact and max_error is None):
        return
    allowed = "nothing but rounding is allowed" if max_error is None else f"max_error={max_error:g} is allowed"
    ways = "a wider dtype" if made.kind in ("tnadapt", "lycoris-full") else "a larger rank or a wider dtype"
    full = "" if made.kind in ("tnadapt", "lycoris-full") else ", or to='lycoris-full', which holds every update"
    worst = max(made.errors, key=lambda name: made.errors[name])
    raise ConfigError(
        f"the conversion to {made.kind} would change the updates by a relative error of {made.error:.3g}, that of "
        f"{worst} by {made.errors[worst]:.3g}, and "
        f"{allowed}: give {ways}, a max_error of {_above(made.error):g} to accept it{full}"
    )


def _above(error: float) -> float:
    """A number of two digits that is no less."""
    unit = 10.0 ** (math.floor(math.log10(error)) - 1)
    return min(1.0, math.ceil(error / unit) * unit)


# -- To a file of this library -------------------------------------------------------------------


def _own(found: Source, dtype: str | None) -> Conversion:
    file = found.file
    if dtype is not None:
        arrays, kinds = rounded(Wide(file).arrays, dtype)
        check_range(arrays, dtype)
        kept = {name: kind for name, kind in file.dtypes.items() if name not in file.arrays}
        file = dataclasses.replace(file, arrays=arrays, dtypes={**kept, **kinds})
    if file.activation is not None:
        names = [target.name for target in file.targets]
        return Conversion("tnadapt", found.kind, True, 0.0, dict.fromkeys(names, 0.0),
                          (found.parameters, file.num_parameters), found.notes, file)  # fmt: skip
    before, after, squares = Wide(found.file, found.updates), Wide(file), {}
    for number, target in enumerate(file.targets):
        pair = low_rank_squares(before.form(number), after.form(number))
        place = "" if target.rows is None else f"[{target.rows.start}:{target.rows.start + target.rows.length}]"
        squares[f"{target.name}{place}"] = pair or squares_of(before.delta(number), after.delta(number))
    error, errors = errors_of(squares)
    sizes = found.parameters, file.num_parameters
    exact = all(is_rounding(one, file.dtype, True) for one in (error, *errors.values()))
    return Conversion("tnadapt", found.kind, exact, error, errors, sizes, found.notes, file)
