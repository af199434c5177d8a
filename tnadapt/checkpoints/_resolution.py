"""Find the weights of an adapter in a checkpoint, where they may have other names than in the model."""

from __future__ import annotations

import dataclasses
import difflib
import os
from collections.abc import Mapping, Sequence
from typing import NamedTuple

from tnadapt.errors import FileError, TargetError, pluralize, safe_repr, summarize
from tnadapt.targets.checkpoint_experts import expert_tensors
from tnadapt.targets.checkpoint_targets import find_stored, is_transposed
from tnadapt.targets.fused_rows import LayoutError
from tnadapt.targets.prefixes import Prefix, found_prefix, paired, renamed_targets, stored_names
from tnadapt.targets.target import Target, check_distinct

from .adapter_file import AdapterFile
from .checkpoint import Checkpoint
from .container import DTYPES, Entry
from .module_names import ModuleNames
from .tied_heads import ties_head

__all__ = ["FLOATS", "ResolvedTargets", "resolve"]

# dtypes to which an update can be added.
FLOATS = {"F64": "float64", "F32": "float32", "F16": "float16", "BF16": "bfloat16"}


class ResolvedTargets(NamedTuple):
    """An adapter's targets and kept parameters, under their names in a checkpoint.

    Attributes
    ----------
    targets : tuple of Target
        In the order of the adapter's targets.
    kept : dict of str to str
        Maps each kept parameter that the checkpoint has to its name there.
    added : dict of str to str
        Maps each kept parameter that the checkpoint lacks to its new name.
    how : str
        How the names were matched, for human readers; empty if they are the adapter's own.
    also : tuple of (int, Target)
        Copies of tied weights that the checkpoint has under other names, with the indices of their targets.
    parts : dict of int to tuple of Target
        For targets that the checkpoint stores as several tensors, one after the other by rows: all of them.
    """

    targets: tuple[Target, ...]
    kept: dict[str, str]
    added: dict[str, str]
    how: str
    also: tuple[tuple[int, Target], ...] = ()
    parts: Mapping[int, tuple[Target, ...]] = {}

    @property
    def places(self) -> list[tuple[int, Target]]:
        """Every tensor to change, with the index of its target."""
        first = [place for place in enumerate(self.targets) if place[0] not in self.parts]
        return [*first, *((index, part) for index, parts in self.parts.items() for part in parts), *self.also]


def resolve(checkpoint: Checkpoint, file: AdapterFile) -> ResolvedTargets:
    """Find all of an adapter's weights in a checkpoint.

    Weights are matched by name; otherwise by name after adding or removing one common prefix (``bert.``, ``model.``);
    experts also by the names of the tensors that checkpoints have for each of them; otherwise by the names that
    transformers' table gives, if it is installed; otherwise by role and shape, as modules are renamed between releases.

    Parameters
    ----------
    checkpoint : Checkpoint
    file : AdapterFile

    Returns
    -------
    ResolvedTargets

    Raises
    ------
    FileError
        If a weight is missing, or has another shape or a dtype to which nothing can be added; or if a kept parameter
        does not fit, or has another name in the checkpoint's module.

    Examples
    --------
    >>> import tempfile, numpy as np, tnadapt as tna
    >>> from safetensors.numpy import save_file
    >>> from tnadapt.checkpoints.checkpoint import open_checkpoint
    >>> config, targets = tna.Config(rank=1), [tna.Target("bert.layer.0.query", (4, 6), "q")]
    >>> file = tna.AdapterFile(config, targets, tna.SuperLoRA(config, [(4, 6)]).init())
    >>> with tempfile.TemporaryDirectory() as folder:
    ...     save_file({"layer.0.query.weight": np.ones((4, 6), np.float32)}, folder + "/model.safetensors")
    ...     found = resolve(open_checkpoint(folder), file)
    >>> found.targets[0].name, found.how
    ('layer.0.query.weight', "names without 'bert.'")
    """
    _check_alone(checkpoint, file)
    entries = checkpoint.entries
    shapes = {name: entry.shape for name, entry in entries.items()}
    also: tuple[tuple[int, Target], ...] = ()
    parts: dict[int, tuple[Target, ...]] = {}
    names = ModuleNames(lambda: checkpoint.config)
    try:
        named, shift = stored_names(file.targets, shapes)
        if shift is None:
            named, shift, parts = _experts(file.targets, shapes)
    except TargetError as error:
        raise FileError(str(error)) from error
    how = str(shift or "")
    renamed = renamed_targets(file.targets, shapes, names.of) if shift is None else None
    if renamed is not None:
        (named, shift), how = renamed, "weights under the names that transformers gives them on disk"
    if shift is not None:
        targets = tuple(shift.target(target) for target in named)
        also = tuple(
            (index, shift.target(other))
            for index, target in enumerate(named)
            for other in target.tied_targets()
            if shift.of(other.name) in entries
        )
    else:
        targets, how = _by_role(checkpoint, file, names), "weights of the same roles and shapes under other names"
    found = ResolvedTargets(targets, {}, {}, how, also, parts)
    check_distinct([target for _, target in found.places])
    for _, target in found.places:
        _check_target(target, entries[target.name])
        _check_order(target, checkpoint)
    kept, added = _kept(entries, file, shift or Prefix(), names, renamed is not None)
    both = {target.name for _, target in found.places}.intersection(kept.values())
    if both:
        raise FileError(f"the adapter both updates and replaces {summarize(both)}")
    return found._replace(kept=kept, added=added)


def _experts(
    targets: Sequence[Target], shapes: Mapping[str, tuple[int, ...]]
) -> tuple[Sequence[Target], Prefix | None, dict[int, tuple[Target, ...]]]:
    """Find experts in tensors of their own; return the first tensor of each target, the prefix, and several tensors."""
    for several in expert_tensors(targets):
        shift = found_prefix([part for parts in several for part in parts], shapes)
        if shift is not None:
            moved = {index: tuple(map(shift.target, parts)) for index, parts in enumerate(several) if len(parts) > 1}
            return [parts[0] for parts in several], shift, moved
    return targets, None, {}


def _by_role(checkpoint: Checkpoint, file: AdapterFile, names: ModuleNames) -> tuple[Target, ...]:
    missing = [target.name for target in file.targets if target.name not in checkpoint.entries]
    roles = "".join(dict.fromkeys(target.role for target in file.targets))
    found: list[Target] = []
    if set(roles) <= set("qkvo"):
        shapes = {name: entry.shape for name, entry in checkpoint.entries.items()}
        try:
            found = find_stored(shapes, roles, checkpoint.config)
        except LayoutError as error:
            raise FileError(
                f"the checkpoint lacks {_how_many(missing, len(file.targets))}, such as "
                f"{safe_repr(missing[0])}, under any "
                f"prefix, and weights of the same roles cannot be identified: {error}"
            ) from error
        except TargetError:
            found = []
    partners = paired(file.targets, found)
    if partners is None:
        alike = sorted((t.role, t.shape) for t in found) == sorted((t.role, t.shape) for t in file.targets)
        raise _missing(checkpoint, missing, len(file.targets), alike, names)
    return tuple(dataclasses.replace(new, layer=old.layer) for new, old in zip(partners, file.targets, strict=True))


def _how_many(missing: list[str], targets: int) -> str:
    return f"{len(missing)} of the adapter's {pluralize(targets, 'weight')}" if targets > 1 else "the adapter's weight"


def _missing(checkpoint: Checkpoint, missing: list[str], targets: int, alike: bool, names: ModuleNames) -> FileError:
    name, entries = missing[0], checkpoint.entries
    what = _how_many(missing, targets)
    module = name.rpartition(".")[0]
    packed = [entry for entry in entries if entry.startswith(f"{module}.")] if module else []
    if packed:
        near = f"its module has {summarize(packed)}: is the checkpoint quantized?"
    else:
        close = difflib.get_close_matches(name, entries, 3, 0.5)
        near = f"nearest: {', '.join(map(safe_repr, close))}" if close else f"it has {summarize(entries)}"
    way = ""
    if checkpoint.index is None and "-of-" in os.path.basename(checkpoint.files[0]):
        way = ". This file looks like one of several: give the folder, or the index"
    return FileError(
        f"the checkpoint lacks {what}, such as {safe_repr(name)}, under any prefix, and "
        + (
            "its weights of the same roles and shapes cannot be told apart"
            if alike
            else "has no weights of the same roles and shapes"
        )
        + f"; {near}{way}{names.way_out}"
    )


def _check_target(target: Target, entry: Entry) -> None:
    if entry.dtype not in FLOATS:
        kind = "no weight" if entry.dtype in ("BOOL", "C64") else "quantized or packed"
        raise FileError(
            f"{safe_repr(target.name)} is {entry.dtype}, {kind}: an update cannot be added to it. Merge into a "
            "checkpoint "
            "of the model in bfloat16, float16 or float32, and quantize the result"
        )
    if entry.shape != target.stored:
        raise FileError(
            f"{safe_repr(target.name)} has shape {entry.shape} in the checkpoint, and the adapter was trained "
            "on one of "
            f"{target.stored}"
        )


def _check_alone(checkpoint: Checkpoint, file: AdapterFile) -> None:
    """Raise FileError if the adapter changes an embedding or a head alone, and the checkpoint has them as one."""
    alone = {name for name, others in file.ties.items() if not others}
    if not alone or not ties_head(checkpoint):
        return
    tokens = (checkpoint.config or {}).get("vocab_size")
    shapes = {target.name: target.stored for target in file.targets}
    shapes |= {name: array.shape for name, array in file.kept.items()}
    for name in file.ties:
        if name in alone and len(shapes[name]) == 2 and tokens in (None, shapes[name][0]):
            raise FileError(
                f"the adapter has {safe_repr(name)} of that module alone, and the checkpoint ties it to another "
                "(tie_word_embeddings in config.json is not false), which would change as well: load it onto the model "
                "by tnadapt.torch.load(model, path, untie=True), bake() it, set model.config.tie_word_embeddings = "
                "False, and save the model"
            )


def _check_order(target: Target, checkpoint: Checkpoint) -> None:
    """Raise FileError if a square matrix is stored as (in, out), and the adapter was not made for that."""
    if target.transposed or len(target.stored) != 2 or len({*target.stored}) > 1:
        return
    # config.json is read for the names of such layers only.
    if is_transposed(target.name, target.stored, {"model_type": "gpt2"}) and is_transposed(
        target.name, target.stored, checkpoint.config
    ):
        raise FileError(
            f"{safe_repr(target.name)} is stored as (in, out), and the adapter's update is one of (out, in): it was "
            "made for another model, or converted from a file that does not say it. Convert that with base= (--base)"
        )


def _kept(
    entries: Mapping[str, Entry], file: AdapterFile, shift: Prefix, names: ModuleNames, renamed: bool
) -> tuple[dict[str, str], dict[str, str]]:
    kept: dict[str, str] = {}
    added: dict[str, str] = {}
    # Top-level modules of the checkpoint, below the added prefix if there is one.
    tops = {
        name.removeprefix(shift.given).partition(".")[0] for name in entries if name.startswith(shift.given)
    }  # fmt: skip
    for name, array in file.kept.items():
        moved = shift.of(name) or name
        places = [place for one in (name, *file.ties.get(name, ())) for place in (shift.of(one) or one, one)]
        stored = list(dict.fromkeys(place for place in places if place in entries))
        there = stored[0] if stored else None
        if len(stored) > 1 and file.ties.get(name):
            raise FileError(
                f"the adapter keeps {safe_repr(name)}, which is tied to {', '.join(map(safe_repr, file.ties[name]))}, "
                f"and the checkpoint stores {' and '.join(map(safe_repr, stored))}: give one of the tied model"
            )
        of_model = moved.removeprefix(shift.given).partition(".")[0] in tops
        if there is None and (of_model or renamed):
            there = next((one for other in names.of(name) if (one := shift.of(other) or other) in entries), None)
        if there is None:
            if of_model:
                close = difflib.get_close_matches(moved, entries, 3, 0.5)
                raise FileError(
                    f"the adapter keeps {safe_repr(name)}, which the checkpoint does not have, though it has others of "
                    f"that module; nearest: {', '.join(map(safe_repr, close)) or 'none'}"
                )
            _need_free(added, name, moved)
            added[name] = moved
            continue
        entry, theirs = entries[there], file.dtypes.get(f"kept.{name}", array.dtype.name)
        if entry.shape != array.shape:
            raise FileError(
                f"the adapter keeps {safe_repr(name)} of shape {array.shape}, and the checkpoint's is "
                f"{entry.shape}: give "
                "a checkpoint with the head that it was trained with, or without any"
            )
        if DTYPES.get(entry.dtype) != theirs and not (entry.dtype in FLOATS and theirs in FLOATS.values()):
            raise FileError(f"the adapter keeps {safe_repr(name)} as {theirs}, and the checkpoint's is {entry.dtype}")
        _need_free(kept, name, there)
        kept[name] = there
    return kept, added


def _need_free(taken: Mapping[str, str], name: str, place: str) -> None:
    """Raise FileError if two kept parameters map to one name in the checkpoint, as with and without a prefix."""
    for other, own in taken.items():
        if own == place:
            raise FileError(
                f"the adapter keeps both {safe_repr(other)} and {safe_repr(name)}, which are both "
                f"{safe_repr(place)} in the "
                "checkpoint: it can hold one of them"
            )
