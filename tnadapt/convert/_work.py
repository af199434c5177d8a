"""What ``convert`` does: read, choose, write down, and measure what was written."""

from __future__ import annotations

import dataclasses
import math
import os
from collections.abc import Sequence
from typing import Any

from tnadapt.checkpoints.adapter_file import AdapterFile
from tnadapt.checkpoints.container import path_of
from tnadapt.errors import ConfigError, integer, shown

from ._choosing import Wish
from ._conversion import Conversion, check_free
from ._measuring import errors_of, is_rounding, low_rank_norms, norms_of
from ._numbers import check_range, rounded
from ._outward import to_foreign
from ._reading import read
from ._source import Source
from ._taking_apart import Wide

__all__ = ["converted"]

_DTYPES = ("float32", "float16", "bfloat16", "float64")
_LIBRARIES = {"peft": "PEFT", "lycoris": "LyCORIS"}


def converted(
    source: str | os.PathLike[str] | AdapterFile,
    out: str | os.PathLike[str] | None,
    to: str,
    forms: Sequence[str],
    rank: int | None,
    max_error: float | None,
    *,
    base: Any,
    part: str | None,
    dtype: str | None,
    without_kept: bool,
    overwrite: bool,
) -> Conversion:
    """:func:`tnadapt.convert`; ``forms`` are those that ``to`` may be."""
    wish = _checked(to, forms, rank, max_error, dtype)
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


def _checked(to: Any, forms: Sequence[str], rank: Any, max_error: Any, dtype: Any) -> Wish | None:
    if to not in forms:
        raise ConfigError(f"to must be one of {', '.join(forms)}; got {shown(to)}")
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
    before, after, norms = Wide(found.file, found.updates), Wide(file), {}
    for number, target in enumerate(file.targets):
        pair = low_rank_norms(before.form(number), after.form(number))
        place = "" if target.rows is None else f"[{target.rows.start}:{target.rows.start + target.rows.length}]"
        norms[f"{target.name}{place}"] = pair or norms_of(before.delta(number), after.delta(number))
    error, errors = errors_of(norms)
    sizes = found.parameters, file.num_parameters
    exact = all(is_rounding(one, file.dtype, True) for one in (error, *errors.values()))
    return Conversion("tnadapt", found.kind, exact, error, errors, sizes, found.notes, file)
