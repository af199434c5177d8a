"""``tnadapt.info``: a description of an adapter file or a checkpoint as JSON-compatible values."""

from __future__ import annotations

import itertools
import os
import re
from collections.abc import Callable, Hashable, Iterable
from typing import Any, TypeVar

from tnadapt.argument_checks import checks_arguments
from tnadapt.errors import FileError, TnadaptError
from tnadapt.targets.checkpoint_targets import find_stored
from tnadapt.targets.roles import number
from tnadapt.targets.target import Target

from .adapter_file import KEPT
from .adapter_format import ENTRY, VERSION, likeness, mapped_rows, read
from .checkpoint import Checkpoint, open_checkpoint
from .container import file_error_context, opened
from .lora_export import lora_export

T = TypeVar("T")

# Members of a population that are read and listed.
_FIRST_MEMBERS = 8


@checks_arguments
def info(path: str | os.PathLike[str], every: bool = False) -> dict[str, Any]:
    """Describe a file or folder, without a framework and without its base model.

    Parameters
    ----------
    path : path-like
        An adapter file or a folder with one, a checkpoint, or an adapter of another library.
    every : bool
        Whether to list weights and tensors individually (key ``"every"``), in addition to the summary by kind.

    Returns
    -------
    dict
        ``"kind"`` is "adapter", "population", "checkpoint" or "other adapter", on which the other keys depend. All
        values are JSON-compatible.

    Raises
    ------
    FileError
        If the path does not exist or is damaged.

    Notes
    -----
    An adapter is read completely and checked like in :func:`tnadapt.load`, except that draws that differ from this
    machine's are reported and are no error. Of a population, the first members are read, and described is what all of
    them share. For a checkpoint, only the headers are read.

    Examples
    --------
    >>> import tempfile, tnadapt as tna
    >>> config, targets = tna.Config(rank=1), [tna.Target(f"layer.{i}.q", (4, 6), "q") for i in range(3)]
    >>> file = tna.AdapterFile(config, targets, tna.UpdatePlan(config, [(4, 6)] * 3).init())
    >>> with tempfile.TemporaryDirectory() as folder:
    ...     tna.save(folder + "/adapter.safetensors", file)
    ...     summary = info(folder + "/adapter.safetensors")
    >>> summary["kind"], summary["parameters"], summary["targets"]
    ('adapter', 30, [{'count': 3, 'role': 'q', 'name': 'layer.{0-2}.q.weight', 'stored': [4, 6], 'shape': [4, 6]}])
    """
    checkpoint = open_checkpoint(path)
    first = checkpoint.files[0]
    if ENTRY in checkpoint.metadata[first]:
        return _of_adapter(first, every)
    what = likeness(checkpoint.entries, checkpoint.metadata[first])
    if "adapter of" in what:
        size = sum(os.path.getsize(file) for file in checkpoint.files)
        return {"path": checkpoint.path, "kind": "other adapter", "what": what, "bytes": size}
    return _of_checkpoint(checkpoint, every)


def _of_adapter(path: str, every: bool) -> dict[str, Any]:
    with file_error_context(path), opened(path) as container:
        file, recipe, left_out, layout = read(container)
        rows = None if layout is None else mapped_rows(container, layout, path)
        first = None if rows is None else rows.selected(range(min(len(rows), _FIRST_MEMBERS)))
        draws = recipe.get("draws")
        draws_here = None if draws is None else file.draws_without(left_out) == draws
    summary: dict[str, Any] = {
        "path": path,
        "kind": "adapter" if rows is None else "population",
        "version": recipe.get("version", VERSION),
        "bytes": os.path.getsize(path),
        "model": file.model,
        "config": file.config.to_dict(),
        "activation": file.activation,
        "parameters": file.num_parameters,
        "arrays": len(file.arrays),
        "dtype": file.dtype,
        "groups": file.plan.num_groups,
        "updated": file.plan.size,
        "targets": _grouped(file.targets),
        "kept": [
            {"name": name, "shape": list(array.shape), "dtype": file.dtypes.get(KEPT + name, array.dtype.name)}
            for name, array in file.kept.items()
        ],
        "base": recipe.get("base"),
        "draws": draws,
        "draws_here": draws_here,
        "export": lora_export(file.plan, file.targets, file.activation).to_dict(),
        "sha256": recipe["sha256"],
    }
    if rows is not None and first is not None:
        summary["members"] = {"count": len(rows), "first": first.names(), "name_bytes": rows.layout.name_bytes}
    if file.pretrained is not None:
        summary["pretrained"] = file.pretrained.to_dict()
    if file.trained is not None:
        summary["frozen"] = sum(array.size for array in file.arrays.values()) - file.num_parameters
    if given_arrays := [array for name, array in file.given.items() if name not in file.plan.start_shapes]:
        summary["given"] = {"arrays": len(given_arrays), "elements": sum(array.size for array in given_arrays)}
    if file.plan.point.subtracts:
        stored = [name for name in file.given if name in file.plan.start_shapes]
        summary["start"] = {"name": file.config.start, "stored": len(stored)}
    if every:
        summary["every"] = [_target(target) for target in file.targets]
    return summary


def _of_checkpoint(checkpoint: Checkpoint, every: bool) -> dict[str, Any]:
    entries = checkpoint.entries
    dtypes: dict[str, dict[str, int]] = {}
    for entry in entries.values():
        totals = dtypes.setdefault(entry.dtype, {"tensors": 0, "bytes": 0})
        totals["tensors"] += 1
        totals["bytes"] += entry.stop - entry.start
    try:
        config, no_config = checkpoint.config or {}, None
    except FileError as error:
        config, no_config = {}, str(error)
    summary: dict[str, Any] = {
        "path": checkpoint.path,
        "kind": "checkpoint",
        "model_type": model_type if isinstance(model_type := config.get("model_type"), str) else None,
        "architectures": _strings(config.get("architectures")),
        "no_config": no_config,
        "files": [
            {"name": os.path.basename(file), "bytes": os.path.getsize(file), "tensors": len(checkpoint.of_file(file))}
            for file in checkpoint.files
        ],
        "tensors": len(entries),
        "bytes": checkpoint.nbytes,
        "dtypes": dtypes,
        "targets": [],
        "no_targets": None,
    }
    try:
        summary["targets"] = _grouped(find_stored({n: e.shape for n, e in entries.items()}, "qv", config))
    except TnadaptError as error:
        summary["no_targets"] = str(error)
    if every:
        summary["every"] = [
            {"name": name, "dtype": entry.dtype, "shape": list(entry.shape), "bytes": entry.stop - entry.start}
            for name, entry in entries.items()
        ]
    return summary


def _strings(value: Any) -> list[str] | None:
    return value if isinstance(value, list) and all(isinstance(item, str) for item in value) else None


def _target(target: Target) -> dict[str, Any]:
    _, stored, role, *settings = target.to_list()
    fields = {"role": role, "name": target.name, "stored": stored, "shape": list(target.shape)}
    rest = dict(*settings).items()
    return fields | {name: value for name, value in rest if name not in ("parameter", "layer")}


def _grouped(targets: Iterable[Target]) -> list[dict[str, Any]]:
    """Group targets that differ only in the numbers of their paths."""

    def view(target: Target) -> Hashable:
        index = target.index is None
        return target.role, target.stored, target.rows, target.transposed, index, target.tied, target.groups

    return [_summary(group) for group in alike_but_for_layers(targets, lambda target: target.name, view)]


def alike_but_for_layers(items: Iterable[T], name: Callable[[T], str], key: Callable[[T], Hashable]) -> list[list[T]]:
    """Group items with one key whose names differ only in the numbers of their paths.

    Examples
    --------
    >>> alike_but_for_layers(["h.0.q", "h.0.v", "h.1.q", "h.1.v"], str, len)
    [['h.0.q', 'h.1.q'], ['h.0.v', 'h.1.v']]
    """
    alike: dict[Hashable, list[T]] = {}
    for item in items:
        pattern = re.sub(r"(?<=\.)\d+(?=\.)|^\d+(?=\.)", "*", name(item))
        alike.setdefault((pattern, key(item)), []).append(item)
    return list(alike.values())


def _summary(targets: list[Target]) -> dict[str, Any]:
    """Describe targets of one kind, such as all matrices of the stacks of several layers."""
    name = common_pattern(list(dict.fromkeys(target.name for target in targets)))
    summary = {"count": len(targets), **_target(targets[0]), "name": name}
    several = {str(target.index) for target in targets}
    return summary | {"index": _ranges(several)} if len(several) > 1 else summary


def common_pattern(names: list[str]) -> str:
    """Return the common pattern of names.

    Examples
    --------
    >>> common_pattern([f"layer.{number}.q" for number in (0, 1, 2, 5)])
    'layer.{0-2,5}.q'
    """
    columns = list(zip(*(name.split(".") for name in names), strict=True))
    return ".".join(parts[0] if len(set(parts)) == 1 else f"{{{_ranges(parts)}}}" for parts in columns)


def consecutive(numbers: Iterable[int]) -> list[tuple[int, int]]:
    """Return the first and the last of each run of consecutive numbers."""
    # Within a run, numbers are as far apart as their positions.
    runs = itertools.groupby(enumerate(sorted(numbers)), lambda placed: placed[1] - placed[0])
    members = ([number for _, number in run] for _, run in runs)
    return [(run[0], run[-1]) for run in members]


def _ranges(parts: Iterable[str]) -> str:
    values = {part: number(part) for part in parts}
    runs = consecutive({value for value in values.values() if value is not None})
    words = sorted(part for part, value in values.items() if value is None)
    return ",".join([*(f"{a}" if a == b else f"{a}-{b}" for a, b in runs), *words])
