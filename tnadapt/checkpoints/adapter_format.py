"""The adapter file: the parameters and their recipe in one safetensors file, readable with NumPy alone.

**Format version 1.** A safetensors file (:mod:`tnadapt.checkpoints.container` says what that is) of these tensors:

- the adapter's arrays, named and shaped as ``SuperLoRA(config, shapes, layers).param_shapes`` says, such as
  ``group0.split0.factor0``, all of one dtype: F64, F32, F16 or BF16. Of those that are not ``trained``, up to 1024 with
  up to 2**24 elements together are left out where they are the start of :mod:`tnadapt.algebra.init`, rounded to that
  dtype;
- ``kept.`` + dotted path: parameters of the model that were trained beside it, such as a classifier head, of any
  shape; integers and BOOL are allowed, too.

No element is NaN or infinite. The header's ``__metadata__`` has one entry, ``tnadapt``, and no other. Its text is a
JSON object, written with sorted keys and without spaces. These are its keys; there is no other. Those with a default,
given last, are left out where they have it.

``version``
    1.
``config``
    Object: the fields of :class:`~tnadapt.Config` that differ from these values, which belong to the format: rank 4,
    order 2, splits 1, groups "weight", fold "stack", format "cp", combine "kronecker", split_size "balanced",
    leading "dense", terms 1, projection "identity", ratio 1.0, shared true, alpha null, seed 0. ``weight_shape`` is
    not stored: the targets have their shapes, and the updates do not depend on it.
``targets``
    List of the weights that are updated, in the order of the long vector. Each is a list ``[module, stored, role]``:
    the dotted path of the module; the shape of the parameter in the model; one of q, k, v, o, linear, conv. Where
    it is not an ordinary weight, an object follows, with ``parameter`` (its name in the module; "weight"), ``rows``
    (``[start, length, stride, count]``: of each of count blocks of stride output rows, rows start to
    start + length - 1 are updated; all rows), ``transposed`` (whether it is stored as (in, out); false) and,
    only where groups is "layer", ``layer`` (equal in the weights of one group; ""). The update's shape is
    (output rows that are updated, the product of the other sizes). No two targets share a row of one parameter.
``model``
    Class name of the base model, for people. "".
``activation``
    LoDA's function between the two factors: relu, gelu, tanh or silu. None.
``base``
    Object of ``dtype``, ``sha256`` and ``sketch``: the fingerprint of the base model's weights at the targets
    (:mod:`tnadapt.checkpoints.fingerprint` says of what). Not known.
``draws``
    64 hex digits: what F draws. SHA-256 of the hex digits, as ASCII, of the ``digest`` of each distinct
    :class:`~tnadapt.Projection` of the groups, in their order (where there are more than 16, of the first and
    the last 8); and then, where F is nonlinear, of the starting arrays as little-endian float32, in the order of
    ``param_shapes``; and then of the arrays that are left out, likewise, in float32 before they are rounded. None
    where F is the identity and no array is left out.
``trained``
    List of the names of the arrays that are trained, in the order of ``param_shapes``; the others are frozen. All.
``sha256``
    64 hex digits that hold the file together. SHA-256 of the text of the entry ``tnadapt``, in UTF-8, with these 64
    digits as zeros; of a zero byte; and then of every tensor, in the order of the UTF-8 bytes of their names: the name,
    a zero byte, the dtype as in the header, a zero byte, the shape as decimals joined by commas, a zero byte, and
    the tensor's bytes.

What the long vector is, and what the arrays make of it, is the library's subject: :class:`~tnadapt.SuperLoRA`.
The bytes of a file are a function of its content alone: not of the release, the machine or the time.
"""

from __future__ import annotations

import hashlib
import os
import re
from collections.abc import Collection, Mapping
from typing import Any

import numpy as np

from tnadapt.algebra.config import Config
from tnadapt.errors import FileError, pluralize, safe_repr, summarize
from tnadapt.targets.target import Target

from ._adapter_fit import check_fit, drawn, plan_of
from ._adapter_recipe import ENTRY, parse_recipe, recipe_of, recipe_text
from ._header import read_header
from .adapter_file import KEPT, AdapterFile
from .atomic_files import replace_file
from .container import (
    DTYPES,
    MAX_HEADER,
    Container,
    Entry,
    file_error_context,
    opened,
    path_of,
    raw_bytes,
    raw_dtype,
    serialized,
)

__all__ = ["ENTRY", "AdapterFile", "content_of", "likeness", "load", "read", "save"]

_TAGS = {name: tag for tag, name in DTYPES.items()}
# The first bytes of such a half in UTF-8, which has none.
_SURROGATE = re.compile(b"\xed[\xa0-\xbf]")


def save(path: str | os.PathLike[str], adapter_file: AdapterFile) -> None:
    """Write an adapter file; what was there before stays whole until the new one is.

    Parameters
    ----------
    path : str or PathLike
        Of the file, in a folder that exists; its usual ending is ``.safetensors``.
    adapter_file : AdapterFile
        What to write.

    Raises
    ------
    FileError
        If an array holds NaN or infinity, or the file cannot be written. Nothing has changed then.

    Notes
    -----
    The same content gives the same bytes. The file is written under another name in the same folder,
    synchronised, and renamed. A link is followed.

    Examples
    --------
    >>> import tempfile
    >>> import tnadapt as tna
    >>> config, targets = tna.Config(rank=1), [tna.Target("blocks.0.attn.query", (4, 6), "q")]
    >>> file = tna.AdapterFile(config, targets, tna.SuperLoRA(config, [(4, 6)]).init())
    >>> with tempfile.TemporaryDirectory() as folder:
    ...     tna.save(folder + "/adapter.safetensors", file)
    ...     found = tna.load(folder + "/adapter.safetensors")
    >>> found.config == config, found.targets == tuple(targets), found.deltas()[0].shape
    (True, True, (4, 6))
    """
    where = path_of(path)
    with file_error_context(where):
        if not isinstance(adapter_file, AdapterFile):
            raise FileError(f"an AdapterFile can be saved there; got {type(adapter_file).__name__}")
        replace_file(where, content_of(adapter_file))


def content_of(file: AdapterFile) -> bytes:
    """The bytes of an adapter's file."""
    file.check_finite()
    left_out = file.left_out
    stored = {
        name: _stored(array, file.dtypes.get(name, array.dtype.name))
        for name, array in file.tensors()
        if name not in left_out
    }
    recipe = recipe_of(file, file.draws_without(left_out))
    digest = _digest(recipe_text({**recipe, "sha256": "0" * 64}).encode(), stored)
    content = serialized(stored, {ENTRY: recipe_text({**recipe, "sha256": digest})})
    if int.from_bytes(content[:8], "little") > MAX_HEADER:
        raise FileError(f"{len(stored)} arrays need a header of more than {MAX_HEADER} bytes; use fewer groups")
    _check_readable(content[8 : 8 + int.from_bytes(content[:8], "little")])
    return content


def _check_readable(header: bytes) -> None:
    """A FileError if :func:`load` would refuse this header, for its limits above all."""
    try:
        entries, metadata = read_header(header, False)
        parse_recipe(metadata.raw[ENTRY], len(entries))
    except FileError as error:
        raise FileError(f"was not written, as load would refuse it: {error}") from error


def _stored(array: np.ndarray, dtype: str) -> tuple[str, np.ndarray]:
    """An array's dtype in the file, and its bytes as an array."""
    tag = _TAGS[dtype]
    if tag == "BF16":
        array = (array.view(np.uint32) >> np.uint32(16)).astype(np.uint16)
    # Not ascontiguousarray, which makes a vector of a number.
    return tag, np.asarray(array, raw_dtype(tag), order="C")


def _digest(text: bytes, stored: Mapping[str, tuple[str, np.ndarray]]) -> str:
    total = hashlib.sha256(text)
    total.update(b"\0")
    for name in sorted(stored):
        tag, array = stored[name]
        total.update(f"{name}\0{tag}\0{','.join(map(str, array.shape))}\0".encode())
        total.update(raw_bytes(array))
    return total.hexdigest()


# -- Loading -----------------------------------------------------------------------------------


def load(path: str | os.PathLike[str], check_draws: bool = True) -> AdapterFile:
    """Read an adapter file.

    Parameters
    ----------
    path : str or PathLike
        Of the file.
    check_draws : bool
        Whether to compare the digest of what F drew when the file was written with what it draws here.

    Returns
    -------
    AdapterFile
        Equal to the bit to the one that was saved.

    Raises
    ------
    FileError
        If there is no such file, or it is damaged, of another kind (a pickle is not opened), of a newer format, or
        its numbers do not fit together, or its draws are not this machine's. No other error, whatever is in the file.

    Notes
    -----
    Time and memory are those of the bytes that are there, whatever sizes the file claims; its arrays
    are read when all else is known to fit. The digest of the draws takes up to a tenth of a second for each
    different F, of which at most 16 are looked at.

    Examples
    --------
    >>> load("missing.safetensors")
    Traceback (most recent call last):
        ...
    tnadapt.errors.FileError: missing.safetensors: No such file or directory
    """
    where = path_of(path)
    with file_error_context(where):
        with opened(where) as container:
            found, recipe, left_out = read(container)
        draws = recipe.get("draws")
        # Not found.draws: another writer may store what this one leaves out.
        here = found.draws_without(left_out)
        if check_draws and draws != here:
            raise FileError(
                f"was trained with fixed draws of F whose digest is {draws}; on this machine it is {here}. The "
                "updates would be others; run tnadapt.verify to see why, or load it with check_draws=False"
            )
        return found


def read(container: Container) -> tuple[AdapterFile, dict[str, Any], tuple[str, ...]]:
    """The adapter of an open file, what its entry says beside the targets, and the arrays that were drawn, not read."""
    text = _entry_text(container)
    entries = container.entries
    recipe, config, targets, base, trained = parse_recipe(text, len(entries))
    own = {name: entry for name, entry in entries.items() if not name.startswith(KEPT)}
    check_fit(config, targets, {name: entry.shape for name, entry in own.items()}, trained)
    # They are in the order of their bytes, so that the file is read from one end to the other.
    stored = {name: (entry.dtype, container.array(name)) for name, entry in entries.items()}
    digest = recipe["sha256"]
    before, _, after = text.partition(digest.encode())
    if text.count(digest.encode()) != 1 or _digest(before + b"0" * 64 + after, stored) != digest:
        raise FileError("is damaged: its bytes do not have the SHA-256 that it says they have")
    arrays = {name: _loaded(*tensor) for name, tensor in stored.items()}
    dtypes = {name: "bfloat16" for name, (tag, _) in stored.items() if tag == "BF16"}
    left_out = _draw_missing(config, targets, trained, own, arrays, dtypes)
    found = AdapterFile(
        config,
        targets,
        {name: array for name, array in arrays.items() if not name.startswith(KEPT)},
        kept={name.removeprefix(KEPT): array for name, array in arrays.items() if name.startswith(KEPT)},
        dtypes=dtypes,
        base=base,
        activation=recipe.get("activation"),
        model=recipe.get("model", ""),
        trained=trained,
    )
    found.check_finite()
    return found, recipe, left_out


def _draw_missing(
    config: Config,
    targets: list[Target],
    trained: list[str] | None,
    own: Mapping[str, Entry],
    arrays: dict[str, np.ndarray],
    dtypes: dict[str, str],
) -> tuple[str, ...]:
    """Draw the frozen arrays that the file leaves out, and name them."""
    if trained is None:
        return ()
    kind = DTYPES[next(iter(own.values())).dtype]
    if kind not in ("float64", "float32", "float16", "bfloat16"):
        return ()  # what is wrong with it is said when all is there
    missing = {name: make for name, make in drawn(plan_of(config, targets), trained, kind).items() if name not in own}
    for name, make in missing.items():
        arrays[name] = make()
        if kind == "bfloat16":
            dtypes[name] = kind
    return tuple(missing)


def _entry_text(container: Container) -> bytes:
    metadata = container.metadata
    if ENTRY not in metadata:
        what = likeness(container.entries, metadata)
        raise FileError(
            f"is no tnadapt adapter: its metadata has no entry '{ENTRY}'. It looks like {what}"
            + ("; tnadapt convert makes it one" if "adapter of" in what else "")
        )
    if len(metadata) > 1:
        others = summarize(metadata.keys() - {ENTRY})
        raise FileError(f"must have '{ENTRY}' as its only entry of metadata; it also has {others}")
    text = metadata.raw[ENTRY]
    if _SURROGATE.search(text):
        raise FileError(f"the {ENTRY} entry has half a surrogate pair")
    return text


def likeness(names: Collection[str], metadata: Mapping[str, str]) -> str:
    """What a safetensors file of somebody else seems to be, by the names of its tensors and its metadata."""
    hint = "; tnadapt.convert makes it one"
    if any(name.startswith("base_model.model.") for name in names):
        what = "an adapter of PEFT"
    elif any(name.startswith(("lycoris_", "lora_unet_", "lora_te")) for name in names):
        what = "an adapter of LyCORIS or kohya"
    else:
        torch, hint = metadata.get("format") == "pt", ""
        what = "weights that torch saved" if torch else "a file of another library"
    return f"{what}: {pluralize(len(names), 'tensor')}" + (f" such as {safe_repr(min(names))}" if names else "") + hint


def _loaded(tag: str, array: np.ndarray) -> np.ndarray:
    """An array of the file as NumPy computes with it."""
    if tag == "BF16":
        return (array.astype(np.uint32) << np.uint32(16)).view(np.float32)
    return array.astype(array.dtype.newbyteorder("="), copy=False)
