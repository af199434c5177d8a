"""Save and load adapter files, and the specification of their format: one safetensors file, of one adapter or many.

**Format versions 1 and 2.** A safetensors file (described in :mod:`tnadapt.checkpoints.container`) with these tensors:

- the adapter's arrays, with the names and shapes of ``UpdatePlan(config, shapes, layers).param_shapes``, such as
  ``group0.split0.factor0``, all of one dtype: F64, F32, F16 or BF16. Of the arrays that are not ``trained``, up to 1024
  with up to 2**24 elements in total are omitted if they equal their initial values from :mod:`tnadapt.algebra.init`,
  rounded to that dtype;
- with ``apply`` "magnitude", the magnitudes, ``weight0.magnitude`` and so on, which ``param_shapes`` lists after the
  arrays; they are never omitted;
- the frozen arrays that the caller provided (``sources`` with ``given``), in F32, with the names and shapes of
  ``UpdatePlan(…).given_shapes``; and, if the writer chose so, those computed from the base weights (``from-base``),
  with those of ``base_shapes``;
- if ``start`` is not "zero", x_0, the initial values of the arrays, in F32, each named ``start.`` + the name in
  ``UpdatePlan(…).array_shapes``: with "given", of the arrays that the caller provided, while the others start as usual;
  with "pissa", "milora" and "olora", of all arrays if the writer chose so, and otherwise of none, as they are computed
  from the base weights;
- ``kept.`` + dotted path: parameters of the model that were trained alongside the adapter, such as a classifier head,
  of any shape; integers and BOOL are allowed as well.

No element is NaN or infinite. The header's ``__metadata__`` has a single entry, ``tnadapt``. Its text is a JSON object,
written with sorted keys and without spaces. It has the following keys and no others. A key whose description ends with
a default is omitted if it has that value.

``version``
    1 if the adapter has one config; 2 if it has several. The two versions differ only in the next key. A reader that
    knows version 1 alone refuses files of version 2 by this number.
``config``
    In version 1. Object: the fields of :class:`~tnadapt.Config` that differ from these defaults, which are part of the
    format: rank 4, order 2, splits 1, groups "weight", fold "stack", format "cp", combine "kronecker", split_size
    "balanced", leading "dense", terms 1, projection "identity", ratio 1.0, shared true, alpha null, seed 0. ``sources``
    is stored if it is not empty: an object of array names, each with an object of the source's registered name
    (``source``) and its fields. ``before`` and ``parameters`` are stored if the arrays are made from θ, and then
    ``scope`` unless it is "plan" and ``offset`` unless it is true. ``weight_shape`` is not stored: the targets have
    their shapes, and the updates do not depend on it. ``fold`` may be a list of sizes, of which some are names:
    "weights", "rows", "cols", or one of these, a slash and a divisor. ``axes`` is stored if it is set: a list of lists
    of positions in ``fold``, one for each mode. ``apply`` is stored unless it is "add", ``magnitude_axis`` unless it is
    "rows", and ``start`` unless it is "zero".
``parts``
    In version 2, in place of ``config``: a list of two or more lists ``[config, count]``, each for the next ``count``
    targets. The long vector is that of the first part, then that of the second, and so on. Each part is an adapter of
    version 1 on its own targets, with its own seed and its own numbers of groups and weights, from 0, in all that is
    drawn. In names, groups and weights are numbered through all parts: if the first part has two groups, ``group2`` is
    group 0 of the second. All parts have the same ``apply``, ``magnitude_axis`` and ``start``, and none has ``before``.
    In what follows, ``config`` is that of a target's part, and ``UpdatePlan(config, …)`` has all parts; of the initial
    arrays, ``draws`` has those of the groups whose F is nonlinear, unless ``start`` is not "zero".
``targets``
    List of the updated weights, in the order of the long vector. Each is a list ``[module, stored, role]``: the dotted
    path of the module; the shape of the parameter in the model; one of q, k, v, o, linear, conv, embedding, which if
    groups is "role" is equal for the weights of one group. Unless the target is an ordinary weight, an object follows,
    with
    ``parameter`` (its name in the module; default "weight"), ``rows`` (``[start, length, stride, count]``: in each of
    count blocks of stride output rows, the rows start to start + length - 1 are updated; or an object whose
    ``indices`` lists rows in increasing order; default all rows),
    ``transposed`` (whether it is stored as (in, out); default false), ``index`` (for a parameter of three axes that
    stacks matrices along the first one: which matrix it is; the rest describes that matrix; default none), ``tied``
    (list of other paths of the same parameter, whose modules are updated as well; default none) and, only if groups is
    "layer", ``layer`` (equal for the weights of one group; default ""). The shape of the update is (number of updated
    output rows, product of the other sizes). No two targets share a row of a matrix.
``model``
    Class name of the base model, for human readers. Default "".
``pretrained``
    Object of what :class:`~tnadapt.Pretrained` has, except the labels, by the names of its fields; a field that has
    its default is omitted. No value of it names code: the task and the library are from fixed lists. Default unknown.
``labels``
    List of at most 32,768 strings, only with ``pretrained``: the names of the model's outputs. Default none.
``ties``
    Object of the names of kept parameters, each with a list of the other names of the same tensor in the model: the
    parameter belongs to several modules; empty if it belongs to its own module alone. The name of a target that is not
    ``tied`` may be here with an empty list: the update is of its module alone, also where the model ties the weight to
    another. Default unknown.
``activation``
    LoDA's function between the two factors: relu, gelu, tanh or silu. Default none.
``base``
    Object of ``dtype``, ``sha256`` and ``sketch``: the fingerprint of the base model's weights at the targets, as
    defined in :mod:`tnadapt.checkpoints.fingerprint`. Default unknown.
``draws``
    64 hex digits: the digest of everything that the seed draws and the file does not store. It is the SHA-256 of the
    hex digits, as ASCII, of the ``digest`` of each distinct :class:`~tnadapt.Projection` of the groups, in their order
    (if there are more than 16, of the first and the last 8), and likewise those of the maps from θ; followed, if there
    are such maps with an offset, by the SHA-256 of the initial arrays as little-endian float32, in the order of
    ``array_shapes``, leaving out those that would bring their elements to more than 2**24 in total; else, if F is
    nonlinear or ``start`` is not "zero", by the initial arrays in the same form, in the order of ``array_shapes`` (both
    lists without the arrays whose start the caller provided or the base weights determine); followed by the arrays that
    ``sources`` freezes in the same form, in the order of ``frozen_shapes``, except those that the caller provided or
    that come from the base weights, and those that would bring their elements to more than 2**24 in total; followed by
    the omitted arrays in the same form, in float32 before rounding. Default none, if F is the identity and there is
    nothing of the above.
``trained``
    List of the names of the trained arrays, in the order of ``param_shapes``; the others are frozen. Default all.
``sha256``
    64 hex digits: the checksum of the file. It is the SHA-256 of the text of the entry ``tnadapt``, in UTF-8, with
    these 64 digits as zeros; then a zero byte; then every tensor, in the order of the UTF-8 bytes of their names: the
    name, a zero byte, the dtype as in the header, a zero byte, the shape as decimals joined by commas, a zero byte, and
    the tensor's bytes.

**Format version 3: populations.** A file of K adapters, its members, that differ in their arrays alone. It has the
tensors of versions 1 and 2 that all members share (frozen arrays, ``start.`` and ``kept.``), and behind them the tensor
``members``, dtype U8, shape [K, row bytes], K from 1 to 2**31. A row has, of one member,

- the elements of all arrays in ``param_shapes``, in that order, little-endian and without gaps, then zero bytes up to a
  multiple of 8;
- its name, of ``name_bytes`` bytes: printable text in UTF-8, then zero bytes; no name if there are zero bytes alone. No
  two members have the same name;
- the first 8 bytes of the SHA-256 of the rest of the row.

The header begins with the entry of ``members``, in which K and the end of ``data_offsets`` are followed by spaces, so
that each takes 20 bytes: both are in the first 512 bytes of the file. The object of ``tnadapt`` has either ``config``
or ``parts``, and one more key. Its ``sha256`` is that of a file without ``members``: the rows have their own checksums.

``population``
    Object of ``parameters``, the number of elements in a row; ``dtype``, that of the elements, F64, F32, F16 or BF16;
    and ``name_bytes``, the width of names: a multiple of 8, at most 256, 0 if no member has a name.

A file may be longer than its header says: the rows of an append that was not completed follow, and are ignored. A row
is replaced in place; meanwhile, its new content follows the last row: 8 bytes of 255 (no row begins so, as that is
NaN), the number of the row in 8 bytes, little-endian, the new row, and the first 8 bytes of the SHA-256 of these. If a
file ends with all of this, a reader uses this row in place of the other.

The library documents the long vector, and how the arrays determine it: see :class:`~tnadapt.UpdatePlan`. The bytes of a
file depend on its content alone, not on the release, the machine or the time.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
import os
import re
import shlex
from collections.abc import Collection, Iterable, Mapping, Sequence
from typing import Any, NamedTuple, overload

import numpy as np

from tnadapt.algebra.composite import CompositeConfig
from tnadapt.algebra.config import Config
from tnadapt.algebra.update_plan import UpdatePlan, share_maps
from tnadapt.argument_checks import checks_arguments
from tnadapt.backends import FLOAT_DTYPES
from tnadapt.errors import FileError, TnadaptError, pluralize, safe_repr, summarize
from tnadapt.targets.target import Target, check_distinct

from . import container
from .adapter_file import KEPT, MAX_IN_ROW, MAX_LEFT_OUT, AdapterFile, check_fit, drawn, fitting_file, own_targets
from .atomic_files import atomic_write, replace_file, write_all
from .fingerprint import Fingerprint
from .population_file import (
    MAX_MEMBERS,
    MAX_NAME,
    MEMBER_DTYPES,
    MemberRows,
    PopulationFile,
    RowLayout,
    numbers_of,
    population_of_rows,
    rows_of,
)
from .pretrained_model import Pretrained

# -- The metadata entry ``tnadapt``, written and parsed ----------------------------------------------------------------


#: Of a file with one config, of one with several, and of one with several members.
VERSION, COMPOSITE, POPULATION = 1, 2, 3
ENTRY = container.ADAPTER

# The defaults of format 1. A later release may change Config's defaults, and files must not change with them.
_DEFAULTS: dict[str, Any] = {
    "rank": 4, "order": 2, "splits": 1, "groups": "weight", "fold": "stack", "format": "cp", "combine": "kronecker",
    "split_size": "balanced", "leading": "dense", "terms": 1, "projection": "identity", "ratio": 1.0, "shared": True,
    "alpha": None, "seed": 0,
}  # fmt: skip

# The types of the entry's values; the lists are converted one value at a time.
_KINDS: dict[str, type] = {
    "version": int, "config": dict, "parts": list, "targets": list, "sha256": str, "activation": str, "base": dict,
    "draws": str, "labels": list, "model": str, "population": dict, "pretrained": dict, "ties": dict, "trained": list,
}  # fmt: skip
_JSON = {dict: "an object", list: "a list", str: "a string", int: "an integer"}
# The key with the config, or the configs, in each version: in the last one, either of them.
_CONFIGS = {VERSION: {"config"}, COMPOSITE: {"parts"}, POPULATION: {"config", "parts"}}
# Bytes that a config may have, and on top of that for each target: explicit groups list the targets' numbers.
_CONFIG, _CONFIG_OF_TARGET = container.MAX_VALUE, 16
# Maximum number of targets: a plan of this size takes minutes, and no model has as many weights to adapt.
_MAX_TARGETS = 1 << 17


def recipe_of(file: AdapterFile, draws: str | None) -> dict[str, Any]:
    """Return the entry's object for an adapter, without its checksum."""
    parts = [[_settings(config), len(targets)] for config, targets in file.config.split(file.targets)]
    recipe: dict[str, Any] = {
        "version": VERSION if len(parts) == 1 else COMPOSITE,
        "targets": [target.to_list() for target in file.targets],
        **({"config": parts[0][0]} if len(parts) == 1 else {"parts": parts}),
    }
    base = None if file.base is None else {**dataclasses.asdict(file.base), "sketch": list(file.base.sketch)}
    trained = None if file.trained is None else list(file.trained)
    ties = {name: list(others) for name, others in file.ties.items()}
    optional = {"model": file.model, "activation": file.activation, "base": base, "draws": draws, "ties": ties}
    recipe |= {key: value for key, value in {**optional, "trained": trained}.items() if value}
    if file.pretrained is not None:
        recipe["pretrained"] = about = file.pretrained.to_dict()
        if "labels" in about:
            recipe["labels"] = about.pop("labels")  # there are many, which are scanned one by one
    return recipe


def _settings(config: Config) -> dict[str, Any]:
    settings = config.replace(weight_shape=None).to_dict()
    return {key: value for key, value in settings.items() if key not in _DEFAULTS or value != _DEFAULTS[key]}


def recipe_text(recipe: Mapping[str, Any]) -> str:
    """Return the entry's text."""
    return json.dumps(recipe, sort_keys=True, separators=(",", ":"), ensure_ascii=False, allow_nan=False)


def parse_recipe(
    text: bytes, stored: int
) -> tuple[dict[str, Any], Config, list[Target], Fingerprint | None, list[str] | None]:
    """Parse the entry of a file with ``stored`` tensors; return its object, config, targets, base and trained names."""
    lazy = container.lazy_object(text, f"the {ENTRY} entry")
    _check_keys(lazy)
    recipe = {key: _of_kind(key, value) for key, value in lazy.items() if key != "config"}
    for key in recipe.keys() & {"sha256", "draws"}:
        if not re.fullmatch("[0-9a-f]{64}", recipe[key]):
            raise FileError(f"the {ENTRY} entry's {key} must be 64 lower-case hex digits; got {safe_repr(recipe[key])}")
    recipe["pretrained"] = _pretrained(recipe)
    if "population" in recipe:
        _check_population(recipe["population"])
        stored += min(recipe["population"]["parameters"], MAX_IN_ROW)
    base = _base(recipe["base"]) if "base" in recipe else None
    trained = _trained(recipe["trained"], stored + MAX_LEFT_OUT) if "trained" in recipe else None
    targets = _targets(recipe["targets"])
    if "parts" in recipe:
        return recipe, _composite(recipe["parts"], len(targets)), targets, base, trained
    # The targets bound the length of the config, whose objects take many times its bytes.
    config = _config(lazy["config"].value(_CONFIG + _CONFIG_OF_TARGET * len(targets)))
    return recipe, config, targets, base, trained


def _check_keys(lazy: Mapping[str, container.Later]) -> None:
    """Raise FileError for another version, and for unknown or missing keys."""
    version = lazy["version"].value() if "version" in lazy else None
    if type(version) is int and version > POPULATION:
        raise FileError(f"has format version {version}, and this tnadapt reads up to {POPULATION}: update tnadapt")
    if type(version) is not int or version not in _CONFIGS:
        raise FileError(
            f"the {ENTRY} entry has the format version {safe_repr(version)}; expected {VERSION}, {COMPOSITE} or "
            f"{POPULATION}"
        )
    configs = _CONFIGS[version]
    if len(configs) > 1:
        configs = {"parts" if "parts" in lazy else "config"}
    population = {"population"} if version == POPULATION else set[str]()
    unknown = lazy.keys() - (_KINDS.keys() - {"config", "parts", "population"} | configs | population)
    missing = {"targets", "sha256", *configs, *population} - lazy.keys()
    if unknown or missing:
        raise FileError(f"the {ENTRY} entry has unknown keys: {summarize(unknown)}; lacks: {summarize(missing)}")


def _of_kind(key: str, value: Any) -> Any:
    """Return a value of the type that its key requires, or raise a FileError; a list is not converted yet."""
    expected = _KINDS[key]
    if isinstance(value, container.Later):
        if expected is list and value.is_list:
            return value
        value = value.value()
    if not isinstance(value, expected):
        raise FileError(f"the {ENTRY} entry's {key} must be {_JSON[expected]}; got {safe_repr(value)}")
    return value


def _config(value: Any) -> Config:
    settings = _of_kind("config", value)
    if unknown := settings.keys() - {field.name for field in dataclasses.fields(Config)}:
        raise FileError(f"config has unknown fields: {summarize(unknown)}")
    try:
        return Config.from_dict({**_DEFAULTS, **settings})
    except TnadaptError as error:
        raise FileError(f"config: {error}") from error


def _composite(listed: Iterable[Any], targets: int) -> CompositeConfig:
    parts: list[tuple[Config, int]] = []
    for number, value in enumerate(listed):
        if number == targets:
            raise FileError(f"has more than {targets} parts, and each has a target")
        if not isinstance(value, list) or len(value) != 2:
            raise FileError(f"part {number} must be a list of a config and a number of targets; got {safe_repr(value)}")
        try:
            parts.append((_config(value[0]), value[1]))
        except FileError as error:
            raise FileError(f"part {number}: {error}") from error
    try:
        config = CompositeConfig(parts)
        config.split(range(targets))
    except TnadaptError as error:
        raise FileError(f"parts: {error}") from error
    return config


def _targets(listed: Iterable[Any]) -> list[Target]:
    targets: list[Target] = []
    for number, value in enumerate(listed):
        if number == _MAX_TARGETS:
            raise FileError(f"has more than {_MAX_TARGETS} targets, and no model has as many weights to adapt")
        try:
            targets.append(Target.from_list(value))
        except TnadaptError as error:
            raise FileError(f"target {number}: {error}") from error
    check_distinct(targets)
    return targets


def _trained(listed: Iterable[Any], most: int) -> list[str]:
    """Return the names, or raise FileError if there are more than ``most``, the arrays stored or possibly omitted."""
    names: list[str] = []
    for name in listed:
        if not isinstance(name, str):
            raise FileError(f"trained must be a list of names of arrays; got {safe_repr(name)} among them")
        if len(names) == most:
            raise FileError(f"trained names more than {most} arrays, more than the file can have")
        names.append(name)
    return names


def _pretrained(recipe: dict[str, Any]) -> Pretrained | None:
    if "pretrained" in recipe:
        if "labels" in recipe["pretrained"]:
            raise FileError("pretrained has unknown keys: 'labels'")
        return Pretrained.from_dict(recipe["pretrained"], recipe.get("labels", ()))
    if "labels" in recipe:
        raise FileError(f"the {ENTRY} entry has labels without pretrained, whose outputs they name")
    return None


def _check_population(value: dict[str, Any]) -> None:
    if value.keys() != {"parameters", "dtype", "name_bytes"}:
        raise FileError(f"population must have parameters, dtype and name_bytes; got {safe_repr(value)}")
    parameters, dtype, width = value["parameters"], value["dtype"], value["name_bytes"]
    if type(parameters) is not int or parameters < 1:
        raise FileError(f"population's parameters must be a positive integer; got {safe_repr(parameters)}")
    if dtype not in MEMBER_DTYPES:
        raise FileError(f"population's dtype must be one of {', '.join(MEMBER_DTYPES)}; got {safe_repr(dtype)}")
    if type(width) is not int or not 0 <= width <= MAX_NAME or width % 8:
        raise FileError(f"population's name_bytes must be a multiple of 8 from 0 to {MAX_NAME}; got {safe_repr(width)}")


def _base(value: dict[str, Any]) -> Fingerprint:
    if value.keys() != {"sha256", "dtype", "sketch"}:
        raise FileError(f"base must have dtype, sha256 and sketch; got {safe_repr(value)}")
    return Fingerprint(**value)


# -- Save and load adapter files, and the specification of their format: one safetensors file --------------------------


# A lone surrogate as it would be encoded, which valid UTF-8 never contains.
_SURROGATE = re.compile(b"\xed[\xa0-\xbf]")


# Tensors are in the order of safetensors' own writer: by dtype, and then by name.
_ORDER = ("U64", "I64", "F64", "F32", "U32", "I32", "BF16", "F16", "U16", "I16", "I8", "U8", "BOOL")


def save(path: str | os.PathLike[str], adapter_file: AdapterFile | PopulationFile) -> None:
    """Write an adapter file, or the file of a population; an existing file stays intact until the new one is complete.

    Parameters
    ----------
    path : str or PathLike
        Path of the file, in an existing folder. The usual suffix is ``.safetensors``.
    adapter_file : AdapterFile or PopulationFile
        The content to write.

    Raises
    ------
    FileError
        If an array contains NaN or infinity, or the file cannot be written. Nothing has changed then.

    Notes
    -----
    The same content gives the same bytes. The file is written under a temporary name in the same folder,
    synchronized, and renamed. Symbolic links are followed.

    Examples
    --------
    >>> import tempfile
    >>> import tnadapt as tna
    >>> config, targets = tna.Config(rank=1), [tna.Target("blocks.0.attn.query", (4, 6), "q")]
    >>> file = tna.AdapterFile(config, targets, tna.UpdatePlan(config, [(4, 6)]).init())
    >>> with tempfile.TemporaryDirectory() as folder:
    ...     tna.save(folder + "/adapter.safetensors", file)
    ...     loaded = tna.load(folder + "/adapter.safetensors")
    >>> loaded.config == config, loaded.targets == tuple(targets), loaded.deltas()[0].shape
    (True, True, (4, 6))
    """
    if isinstance(path, (AdapterFile, PopulationFile)):
        raise FileError(f"path must be that of a file; got {path!r}; path and adapter_file may be swapped")
    where = container.path_of(path)
    with container.file_error_context(where):
        if isinstance(adapter_file, PopulationFile):
            save_population(where, adapter_file)
        elif isinstance(adapter_file, AdapterFile):
            replace_file(where, content_of(adapter_file))
        else:
            raise FileError(f"expected an AdapterFile or a PopulationFile to save; got {type(adapter_file).__name__}")


def content_of(file: AdapterFile) -> bytes:
    """Return the bytes of an adapter file."""
    file.check_finite()
    left_out = file.left_out
    tensors, recipe = _signed(file, file.draws_without(left_out), left_out)
    content = container.serialized(tensors, {ENTRY: recipe_text(recipe)})
    _check_readable(content, len(tensors))
    return content


def save_population(path: str, population: PopulationFile) -> None:
    """Write the file of a population."""
    rows = rows_of(population)
    with atomic_write(path) as file:
        write_all(file, _before_rows(population))
        for piece in rows.pieces():
            write_all(file, container.raw_bytes(piece))


def _before_rows(population: PopulationFile) -> bytes:
    """Return the bytes of a population's file without its rows."""
    shared, layout = population.shared, rows_of(population).layout
    shared.check_finite()
    tensors, recipe = _signed(shared, shared.draws_without(()), shared.arrays, layout)
    entries = container.appended({}, tensors)
    head = container.growing_head(entries, {ENTRY: recipe_text(recipe)}, len(population), layout.row_bytes)
    _check_readable(head, len(tensors))
    return b"".join([head, *(container.raw_bytes(array) for _, array in tensors.values() if array.size)])


def _signed(
    file: AdapterFile, draws: str | None, left_out: Collection[str], layout: RowLayout | None = None
) -> tuple[dict[str, tuple[str, np.ndarray]], dict[str, Any]]:
    """Return the tensors of a file in their order, without some arrays, and its entry with the checksum."""
    stored = {
        name: container.to_stored(array, file.dtypes.get(name, array.dtype.name))
        for name, array in file.tensors()
        if name not in left_out
    }
    recipe = recipe_of(file, draws)
    if layout is not None:
        about = {"parameters": layout.numbers, "dtype": layout.tag, "name_bytes": layout.name_bytes}
        recipe |= {"version": POPULATION, "population": about}
    digest = _digest(recipe_text({**recipe, "sha256": "0" * 64}).encode(), stored)
    ordered = {name: stored[name] for name in sorted(stored, key=lambda name: (_ORDER.index(stored[name][0]), name))}
    return ordered, {**recipe, "sha256": digest}


def _check_readable(content: bytes, arrays: int) -> None:
    """Raise FileError if :func:`load` would reject the header of a file, mainly because it exceeds a limit."""
    length, most = int.from_bytes(content[:8], "little"), container.MAX_HEADER
    if length > most:
        raise FileError(f"{arrays} arrays need a header of more than {most} bytes; use fewer groups")
    try:
        entries, metadata = container.read_header(content[8 : 8 + length], False)
        parse_recipe(metadata.data[ENTRY], len(entries))
    except FileError as error:
        raise FileError(f"was not written, as load would refuse it: {error}") from error


def _digest(text: bytes, stored: Mapping[str, tuple[str, np.ndarray]]) -> str:
    total = hashlib.sha256(text)
    total.update(b"\0")
    for name in sorted(stored):
        tag, array = stored[name]
        total.update(f"{name}\0{tag}\0{','.join(map(str, array.shape))}\0".encode())
        total.update(container.raw_bytes(array))
    return total.hexdigest()


# -- Loading -----------------------------------------------------------------------------------


@overload
def load(
    path: str | os.PathLike[str], check_draws: bool = ..., like: UpdatePlan | None = ..., members: None = ...
) -> AdapterFile | Any: ...  # Any: which of the two, the file says, and most callers know it
@overload
def load(
    path: str | os.PathLike[str],
    check_draws: bool = ...,
    like: UpdatePlan | None = ...,
    *,
    members: Sequence[int | str],
) -> PopulationFile: ...
@checks_arguments
def load(
    path: str | os.PathLike[str],
    check_draws: bool = True,
    like: UpdatePlan | None = None,
    members: Sequence[int | str] | None = None,
) -> AdapterFile | PopulationFile:
    """Read an adapter file, or the file of a population.

    Parameters
    ----------
    path : str or PathLike
        Path of the file.
    check_draws : bool
        Whether to check that this machine draws the same F, and the same omitted arrays, as the one that wrote the
        file, by comparing digests.
    like : UpdatePlan, optional
        A plan of which some F may be the file's: their draws are digested once, not for each file.
    members : sequence of int or str, optional
        Of a population, the numbers or names of the members to read, in the order of the result. The rest of the rows
        is not read, except the column of names if a name is among these.

    Returns
    -------
    AdapterFile or PopulationFile
        Bitwise equal to the one that was saved. Of a population, without ``members``, the rows stay in the file, and
        each is read when it is used.

    Raises
    ------
    FileError
        If there is no such file; if it is damaged, of another kind (pickles are never opened) or of a newer format; if
        its content is inconsistent; or if its draws differ from this machine's. No content of a file leads to another
        error. If members are given and the file is of one adapter, or they are not in the population, or one occurs
        twice.

    Notes
    -----
    Time and memory depend on the actual bytes of the file, not on the sizes that it claims; its arrays are read only
    after everything else has been checked. The digest of the draws takes up to a tenth of a second for each distinct F,
    of which at most 16 are examined. Of a population, it is computed at the first load in a process.

    A population can be read while another process appends or replaces members: those that are read are whole, each as
    it was before or after. A population's rows must not be overwritten or cut off otherwise while it is in use.

    Examples
    --------
    >>> load("missing.safetensors")
    Traceback (most recent call last):
        ...
    tnadapt.errors.FileError: missing.safetensors: No such file or directory
    """
    where = container.path_of(path)
    with container.file_error_context(where):
        content = _loaded(where, check_draws, like, members)
        if members is None:
            return content
        if isinstance(content, AdapterFile):
            raise FileError("has one adapter, and no members: leave out members=")
        return content.select(members)


def _loaded(
    path: str, check_draws: bool, like: UpdatePlan | None, members: Sequence[int | str] | None
) -> AdapterFile | PopulationFile:
    """Read an adapter file, or the file of a population, to use these members of it."""
    with container.opened(path) as file:
        content = read(file)
        sparsely = members is not None and not any(isinstance(which, str) for which in members)
        rows = None if content.layout is None else mapped_rows(file, content.layout, path, sparsely)
    _check_draws(content, check_draws, like)
    return content.adapter if rows is None else population_of_rows(content.adapter, rows)


NO_MEMBERS = "has one adapter, and no members: leave out member= (--member)"


def load_single(
    path: str | os.PathLike[str],
    check_draws: bool = True,
    like: UpdatePlan | None = None,
    member: int | str | None = None,
) -> AdapterFile:
    """Read the file of one adapter, or a member of a population's file, as :func:`load` does."""
    where = container.path_of(path)
    with container.file_error_context(where):
        return chosen_member(_loaded(where, check_draws, like, None if member is None else [member]), member)


def chosen_member(adapter: AdapterFile | PopulationFile, member: int | str | None, subject: str = "") -> AdapterFile:
    """Return an adapter, or the member that is chosen of a population; raise FileError for one without the other."""
    if isinstance(adapter, PopulationFile):
        if member is None:
            raise FileError(
                f"{subject}is a population of {pluralize(len(adapter), 'member')}, and one adapter is expected: give "
                f"{example_of(rows_of(adapter))}"
            )
        (number,) = numbers_of(adapter, [member], "member")
        return adapter[number]
    if member is not None:
        raise FileError(subject + NO_MEMBERS)
    return adapter


def example_of(rows: MemberRows) -> str:
    """Return how to give one of the members."""
    first = rows.selected([0]).names()[0] or 0
    return f"one of them, such as member={first!r} (--member {shlex.quote(str(first))})"


def population_of(file: container.Container, path: str) -> PopulationFile:
    """Return the population in an open file of this path; raise FileError for the file of one adapter."""
    content = read(file)
    if content.layout is None:
        raise FileError(
            "has one adapter, not a population: save a population first, such as "
            "tnadapt.PopulationFile.from_members([adapter])"
        )
    return population_of_rows(content.adapter, mapped_rows(file, content.layout, path))


def mapped_rows(file: container.Container, layout: RowLayout, path: str, sparsely: bool = False) -> MemberRows:
    return MemberRows(layout, file.mapped(container.GROWING, sparsely), (path, *file.identity))


class FileContent(NamedTuple):
    """What an adapter file has, except for a population's rows.

    Attributes
    ----------
    adapter : AdapterFile
        Of a population, what its members share; the arrays are zeros.
    recipe : dict
        The object of the entry ``tnadapt``.
    left_out : tuple of str
        Names of the arrays that were drawn, not read.
    layout : RowLayout or None
        The layout of a population's rows.
    """

    adapter: AdapterFile
    recipe: dict[str, Any]
    left_out: tuple[str, ...]
    layout: RowLayout | None


def _check_draws(content: FileContent, check_draws: bool, like: UpdatePlan | None) -> None:
    adapter = content.adapter
    if like is not None:
        share_maps(adapter.plan, [like], digests=True)
    draws = content.recipe.get("draws")
    if check_draws and draws != (here := _draws_here(content)):
        raise FileError(
            f"was trained with fixed draws whose digest is {draws}; on this machine it is {here}. The updates "
            "would differ; run tnadapt.verify to see why, or load the file with check_draws=False"
        )


# By the checksum of what a population's members share: members are loaded one by one, each faster than its digest.
_POPULATION_DRAWS: dict[str, str | None] = {}
_MAX_DRAWS = 64


def _draws_here(content: FileContent) -> str | None:
    if content.layout is None:
        # Not adapter.draws: another writer may store arrays that this one omits.
        return content.adapter.draws_without(content.left_out)
    key = content.recipe["sha256"]
    if key not in _POPULATION_DRAWS:
        if len(_POPULATION_DRAWS) == _MAX_DRAWS:
            _POPULATION_DRAWS.clear()
        _POPULATION_DRAWS[key] = content.adapter.draws_without(())
    return _POPULATION_DRAWS[key]


def read(file: container.Container) -> FileContent:
    """Read an open file, except for a population's rows."""
    text = _entry_text(file)
    entries = dict(file.entries)
    recipe, config, targets, base, trained = parse_recipe(text, len(entries))
    about = recipe.get("population")
    rows = () if about is None else _take_rows(entries)
    plan_entries = {name: entry for name, entry in entries.items() if not name.startswith(KEPT)}
    shapes = {name: entry.shape for name, entry in plan_entries.items()}
    numbers = None if about is None else about["parameters"]
    plan = check_fit(config, own_targets(targets, config), shapes, trained, numbers)
    # Entries are in the order of their bytes, so the file is read sequentially.
    stored = {name: (entry.dtype, file.array(name)) for name, entry in entries.items()}
    digest = recipe["sha256"]
    before, _, after = text.partition(digest.encode())
    if text.count(digest.encode()) != 1 or _digest(before + b"0" * 64 + after, stored) != digest:
        raise FileError("is damaged: its bytes do not match its SHA-256")
    arrays = {name: container.native(*tensor) for name, tensor in stored.items()}
    dtypes = {name: "bfloat16" for name, (tag, _) in stored.items() if tag == "BF16"}
    params = plan.param_shapes
    layout, left_out = None, tuple[str, ...]()
    if about is not None:
        layout = RowLayout(about["dtype"], params, about["name_bytes"])
        if rows[1] != layout.row_bytes:
            raise FileError(f"its members have rows of {rows[1]} bytes; config and targets require {layout.row_bytes}")
        file.check_held()
        arrays |= layout.unpack(np.zeros(layout.row_bytes, np.uint8))
        dtypes |= dict.fromkeys(params, "bfloat16") if layout.tag == "BF16" else {}
    else:
        dtype = container.DTYPES[next(entry.dtype for name, entry in plan_entries.items() if name in params)]
        left_out = _draw_missing(plan, trained, dtype, arrays, dtypes)
    frozen = {name: array for name, array in arrays.items() if name not in params and not name.startswith(KEPT)}
    if any(stored[name][0] != "F32" for name in frozen):
        raise FileError("has frozen arrays of another dtype than float32")
    adapter = fitting_file(
        plan,
        config,
        targets,
        {name: array for name, array in arrays.items() if name in params},
        given=frozen,
        kept={name.removeprefix(KEPT): array for name, array in arrays.items() if name.startswith(KEPT)},
        dtypes=dtypes,
        base=base,
        activation=recipe.get("activation"),
        model=recipe.get("model", ""),
        trained=trained,
        pretrained=recipe["pretrained"],
        ties=recipe.get("ties", {}),
    )
    adapter.check_finite()
    return FileContent(adapter, recipe, left_out, layout)


def _take_rows(entries: dict[str, container.Entry]) -> tuple[int, ...]:
    """Take the rows out of a population's tensors, and return their shape."""
    last = next(reversed(entries), None)
    if last != container.GROWING:
        raise FileError(f"is a population, and its last tensor must be {container.GROWING!r}; got {safe_repr(last)}")
    rows = entries.pop(last)
    if rows.dtype != "U8" or len(rows.shape) != 2 or not 1 <= rows.shape[0] <= MAX_MEMBERS:
        raise FileError(
            f"{container.GROWING!r} must be U8 with the shape [members, bytes of a row], of 1 to {MAX_MEMBERS} "
            f"members; got {rows.dtype} {safe_repr(list(rows.shape))}"
        )
    return rows.shape


def _draw_missing(
    plan: UpdatePlan, trained: list[str] | None, dtype: str, arrays: dict[str, np.ndarray], dtypes: dict[str, str]
) -> tuple[str, ...]:
    """Draw the frozen arrays that the file omits, and return their names."""
    if trained is None:
        return ()
    if dtype not in FLOAT_DTYPES:
        return ()  # AdapterFile rejects the dtype later, with a better message
    missing = {name: make for name, make in drawn(plan, trained, dtype).items() if name not in arrays}
    for name, make in missing.items():
        arrays[name] = make()
        if dtype == "bfloat16":
            dtypes[name] = dtype
    return tuple(missing)


def _entry_text(file: container.Container) -> bytes:
    metadata = file.metadata
    if ENTRY not in metadata:
        what = likeness(file.entries, metadata)
        raise FileError(
            f"is not a tnadapt adapter: its metadata has no entry '{ENTRY}'. It looks like {what}" + _way_out(what)
        )
    if len(metadata) > 1:
        others = summarize(metadata.keys() - {ENTRY})
        raise FileError(f"must have '{ENTRY}' as its only entry of metadata; it also has {others}")
    text: bytes = metadata.data[ENTRY]
    if _SURROGATE.search(text):
        raise FileError(f"the {ENTRY} entry has half a surrogate pair")
    return text


def _way_out(what: str) -> str:
    if "adapter of" in what:
        return "; tnadapt.convert (tnadapt convert) converts it"
    if "weights that torch saved" in what:
        return "; tnadapt.extract (tnadapt extract) makes an adapter of a model that was fine-tuned, and its base"
    return ""


def likeness(names: Collection[str], metadata: Mapping[str, str]) -> str:
    """Describe a foreign safetensors file, judging by the names of its tensors and its metadata."""
    prefixes = ("lycoris_", "lora_unet_", "lora_te", "lora_transformer_", "lora_prior_")
    if any(name.startswith("base_model.model.") for name in names):
        what = "an adapter of PEFT"
    elif any(name.startswith(prefixes) for name in names):
        what = "an adapter of LyCORIS or kohya"
    elif any(name.endswith(".lora_A.weight") for name in names):
        what = "an adapter of diffusers"
    else:
        what = "weights that torch saved" if metadata.get("format") == "pt" else "a file of another library"
    return f"{what}: {pluralize(len(names), 'tensor')}" + (f" such as {safe_repr(min(names))}" if names else "")
