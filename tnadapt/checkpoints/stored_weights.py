"""Find and read the weights of an adapter's targets in a checkpoint, whether they are renamed, tied or stacked there.

:func:`resolve` finds the tensors of an adapter's targets for a merge, with the names that transformers changes on
loading (:class:`ModuleNames`) and the heads that are not stored (:func:`ties_head`). :func:`find_weights`
finds targets in two checkpoints of one model, and :func:`base_weights` those of an adapter in its base, which is
compared with its fingerprint; :class:`StoredWeights` reads either.
"""

from __future__ import annotations

import dataclasses
import functools
import importlib
import importlib.util
import os
import re
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np

from tnadapt.backends.stored_floats import widened
from tnadapt.errors import FileError, TargetError, TnadaptError, pluralize, safe_repr, summarize
from tnadapt.targets.checkpoint_experts import expert_tensors
from tnadapt.targets.checkpoint_targets import find_stored, is_transposed
from tnadapt.targets.fused_rows import LayoutError
from tnadapt.targets.prefixes import Prefix, found_prefix, near_names, paired, renamed_targets, stored_names
from tnadapt.targets.roles import are_roles
from tnadapt.targets.target import Target, check_distinct

from .adapter_file import AdapterFile
from .checkpoint import Checkpoint
from .container import DTYPES, FOREIGN, Entry, native
from .fingerprint import Fingerprint, compare, fingerprint

# -- Names that differ: a model's parameters and its checkpoint's, as transformers renames them ------------------------

# From version 5 on, transformers gives many architectures other module names than their checkpoints have, and saves
# under the names of the checkpoints: the queries of ViT are ``layers.0.attention.q_proj`` in memory, and
# ``encoder.layer.0.attention.attention.query`` on disk. Its own table says how, and is read if transformers is
# installed. No model is built: ``config.json`` tells whose entries apply, and a name counts only if a tensor has it.


# No model nests its modules this deep, and no config has as many parts.
_MAX_DEPTH, _MAX_PARTS = 64, 64


class ModuleNames:
    """The names that the parameters of a model may have in its checkpoint.

    Parameters
    ----------
    config : mapping, None or callable
        Its ``config.json``, or a function that returns it. It is read, and transformers imported, on the first name.

    Examples
    --------
    >>> ModuleNames(None).of("encoder.layer.0.fc.weight")
    ['encoder.layer.0.fc.weight']
    """

    def __init__(self, config: Mapping[str, Any] | Callable[[], Mapping[str, Any] | None] | None) -> None:
        self._config = config

    def of(self, name: str) -> list[str]:
        """Return the names that a parameter may have in the checkpoint; first its own."""
        parts, names = name.split("."), {name: None}
        if len(parts) > _MAX_DEPTH or not self._tables:
            return [name]
        # transformers renames a parameter within the innermost model that has it, and then within those around that.
        # Which modules are models is unknown here, so every part of the path is tried as one.
        for depth in range(len(parts) - 1, -1, -1):
            prefix = "".join(f"{part}." for part in parts[:depth])
            for known in [known for known in names if known.startswith(prefix)]:
                for table in self._tables:
                    names[prefix + _renamed(table, known.removeprefix(prefix))] = None
        return list(names)

    def inverse(self, names: Iterable[str]) -> dict[str, list[str]]:
        """Return for each name in a checkpoint those of the given parameters that may have it there."""
        parameters: dict[str, list[str]] = {}
        for name in names:
            for stored in self.of(name):
                parameters.setdefault(stored, []).append(name)
        return parameters

    @property
    def way_out(self) -> str:
        """The end of a message about a name that was not found; empty if transformers' table was read."""
        if not self._kinds or _installed():
            return ""
        return ". transformers may have renamed it on loading: install transformers, whose table of names is then read"

    @functools.cached_property
    def _kinds(self) -> dict[str, None]:
        return dict.fromkeys(_kinds(self._config() if callable(self._config) else self._config))

    @functools.cached_property
    def _tables(self) -> list[Sequence[Any]]:
        """For each type and class of the model and its parts, the transforms by which transformers saves it."""
        if not self._kinds or not _installed():
            return []
        return [table for type_name in _with_classes(self._kinds) for table in _saving(type_name)]


def _installed() -> bool:
    return importlib.util.find_spec("transformers") is not None


def _kinds(config: Any) -> Iterator[str]:
    """Yield the types and classes that a config names for a model and its parts."""
    parts = [config]
    for _ in range(_MAX_PARTS):
        if not parts:
            return
        part = parts.pop()
        if isinstance(part, Mapping):
            classes = part.get("architectures")
            for type_name in (part.get("model_type"), *(classes if isinstance(classes, list) else ())):
                if isinstance(type_name, str):
                    yield type_name
            parts += [value for value in part.values() if isinstance(value, Mapping)]


def _with_classes(kinds: Iterable[str]) -> list[str]:
    """Return types and classes of models, plus the classes that belong to the types."""
    classes = vars(importlib.import_module("transformers.models.auto.modeling_auto"))
    configs = importlib.import_module("transformers.models.auto.configuration_auto").CONFIG_MAPPING_NAMES
    names = dict[str, None]()
    for type_name in kinds:
        names[type_name] = None
        for table in [table for name, table in classes.items() if name.endswith("_MAPPING_NAMES")]:
            class_names = table.get(type_name, ())
            names |= dict.fromkeys((class_names,) if isinstance(class_names, str) else class_names)
        # Some parts of models, such as the text model of SigLIP, have classes that no table lists.
        if isinstance(config := configs.get(type_name), str):
            names[f"{config.removesuffix('Config')}Model"] = None
    return list(names)


def _saving(type_name: str) -> Iterator[Sequence[Any]]:
    """Yield the transforms by which transformers saves a type or class of models, or none if it renames nothing."""
    try:
        mapping = importlib.import_module("transformers.conversion_mapping")
    except ModuleNotFoundError:  # before 5.0, the names in checkpoints are those of the modules
        return
    loading = mapping.get_checkpoint_conversion_mapping(type_name) or ()
    saving = [transform.reverse_transform() for transform in reversed(loading)]
    # Saving adds a prefix only if loading has removed it, so that it may be missing.
    without = [transform for transform in saving if type(transform).__name__ != "PrefixChange"]
    yield from (table for table in (saving, without if len(without) < len(saving) else ()) if table)


def _renamed(saving: Sequence[Any], name: str) -> str:
    """Return the name under which a parameter is saved, or its own if saving changes the numbers as well."""
    renamed = name
    for transform in saving:
        if not hasattr(transform, "operations"):
            renamed = transform.rename_source_key(renamed)[0]
        elif transform.rename_source_key(name)[1] is not None:
            return name
    return renamed


# -- Output heads that are not stored, because they are tied to the token embedding ------------------------------------


# The ends of the names of transformers' classes that have a head with a row for each token.
_WITH_HEAD = (
    "ForCausalLM", "LMHeadModel", "ForMaskedLM", "ForPreTraining", "ForConditionalGeneration", "DoubleHeadsModel",
    "MarianMTModel",
)  # fmt: skip
# Token embeddings of transformers' language models by the ends of their paths, the modules that ``tie_word_embeddings``
# ties to them, with the head last, and a tensor that tells a checkpoint with these modules: the first match counts.
_TIED: tuple[tuple[str, tuple[str, ...], str], ...] = (
    ("shared", ("encoder.embed_tokens", "decoder.embed_tokens", "lm_head"), "shared.weight"),
    *((embedding, ("lm_head",), f"{embedding}.weight") for embedding in (
        "model.embed_tokens", "model.language_model.embed_tokens", "model.decoder.embed_tokens", "transformer.wte",
    )),
    ("embeddings.word_embeddings", ("cls.predictions.decoder",), "cls.predictions.transform.dense.weight"),
    ("embeddings.word_embeddings", ("lm_head.decoder",), "lm_head.dense.weight"),
    ("embeddings.word_embeddings", ("predictions.decoder",), "predictions.dense.weight"),
    ("embeddings.word_embeddings", ("generator_lm_head",), "generator_predictions.dense.weight"),
    ("embeddings.word_embeddings", ("vocab_projector",), "vocab_transform.weight"),
)  # fmt: skip
# Architectures that have these embeddings, and other heads.
_OTHER_HEADS = re.compile(
    "Whisper|Moonshine|Canary|CohereAsr|TrOCR|T5Gemma|Ultrabert|Blt|Blip|Csm|Udop|Kosmos2|Pop2Piano", re.IGNORECASE
)
# Last parts of the paths of the embeddings, and ends of those of heads.
_EMBEDDINGS = tuple({end.rpartition(".")[2] for end, _, _ in _TIED})
_HEADS = tuple({heads[-1] for _, heads, _ in _TIED} | {"embed_out", "output_projection"})


def ties_head(checkpoint: Checkpoint) -> bool:
    """Return whether the token embedding of a model on disk is its output head as well, as one weight.

    ``config.json`` may say so. Often it lacks ``tie_word_embeddings``, as transformers 4 left out what is the default
    of the model's class. Then a model without a head of its own is tied, and so is one whose head equals the embedding.
    """
    says = (checkpoint.config or {}).get("tie_word_embeddings")
    if says is False:
        return False
    names = _architectures(checkpoint)
    if names is None:
        return bool(_heads(checkpoint)) or (says is True and bool(_ending(checkpoint.entries, _EMBEDDINGS)))
    return any(name.endswith(_WITH_HEAD) for name in names) and (says is True or not _has_own_head(checkpoint))


def tied_heads(checkpoint: Checkpoint) -> dict[str, str]:
    """Return the modules that a checkpoint does not store, as they are tied to an embedding, each with it.

    The result is empty also where a head is tied whose name is not known.
    """
    return _heads(checkpoint) if ties_head(checkpoint) else {}


def _architectures(checkpoint: Checkpoint) -> list[str] | None:
    """Return the names of the model's classes, or None if they are not known."""
    names = (checkpoint.config or {}).get("architectures")
    return [name for name in names if isinstance(name, str)] if isinstance(names, list) and names else None


def _heads(checkpoint: Checkpoint) -> dict[str, str]:
    kinds = _architectures(checkpoint) or [re.sub(r"\W|_", "", str((checkpoint.config or {}).get("model_type")))]
    if any(map(_OTHER_HEADS.match, kinds)):
        return {}
    stored = checkpoint.entries
    for end, heads, witness in _TIED:
        embeddings = _ending(stored, [end])
        if len(embeddings) == 1 and witness in stored and not any(f"{head}.weight" in stored for head in heads):
            return dict.fromkeys(heads, embeddings[0].removesuffix(".weight"))
    return {}


def _ending(stored: Iterable[str], ends: Iterable[str]) -> list[str]:
    """Return the names of the weights of modules whose paths end in any of these."""
    suffixes = tuple(f".{end}.weight" for end in ends)
    return [name for name in stored if f".{name}".endswith(suffixes)]


def _has_own_head(checkpoint: Checkpoint) -> bool:
    """Return whether a head is stored that differs from every embedding."""
    heads, embeddings = (_ending(checkpoint.entries, ends) for ends in (_HEADS, _EMBEDDINGS))
    return bool(heads) and not any(_equal(checkpoint, head, embedding) for head in heads for embedding in embeddings)


def _equal(checkpoint: Checkpoint, head: str, embedding: str) -> bool:
    """Return whether two matrices agree in a sample of rows from all over them."""
    first, second = checkpoint.entries[head], checkpoint.entries[embedding]
    if (first.dtype, first.shape) != (second.dtype, second.shape) or first.dtype in FOREIGN or len(first.shape) != 2:
        return False
    rows = sorted({int(row) for row in np.linspace(0, first.shape[0] - 1, 64)}) if first.shape[0] else []
    return all(np.array_equal(checkpoint.array(head, row), checkpoint.array(embedding, row)) for row in rows)


# -- An adapter's weights in a checkpoint, under whatever names --------------------------------------------------------


# dtypes to which an update can be added.
FLOATS = {"F64": "float64", "F32": "float32", "F16": "float16", "BF16": "bfloat16"}


class ResolvedTargets(NamedTuple):
    """An adapter's targets and kept parameters, under their names in a checkpoint.

    Attributes
    ----------
    tensors : tuple of tuple of Target
        For each of the adapter's targets the tensor that has it, or those whose rows are its rows, one after the other.
    kept : dict of str to str
        Maps each kept parameter that the checkpoint has to its name there.
    added : dict of str to str
        Maps each kept parameter that the checkpoint lacks to its new name.
    how : str
        How the names were matched, for human readers; empty if they are the adapter's own.
    also : tuple of (int, Target)
        Copies of tied weights that the checkpoint has under other names, with the indices of their targets.
    """

    tensors: tuple[tuple[Target, ...], ...]
    kept: dict[str, str]
    added: dict[str, str]
    how: str
    also: tuple[tuple[int, Target], ...] = ()

    @property
    def targets(self) -> tuple[Target, ...]:
        """The adapter's targets, as far as each is one tensor."""
        return tuple(tensors[0] for tensors in self.tensors)

    @property
    def places(self) -> list[tuple[int, Target]]:
        """Every tensor to change, with the index of its target."""
        return [*((index, part) for index, parts in enumerate(self.tensors) for part in parts), *self.also]


def resolve(checkpoint: Checkpoint, file: AdapterFile) -> ResolvedTargets:
    """Find all of an adapter's weights in a checkpoint.

    Weights are matched by name; otherwise by name after adding or removing one common prefix (``bert.``, ``model.``);
    experts also by the names of the tensors that checkpoints have for each of them; otherwise by the names that
    transformers' table gives, if it is installed; otherwise by role and shape, as modules are renamed between releases.

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
    >>> file = tna.AdapterFile(config, targets, tna.UpdatePlan(config, [(4, 6)]).init())
    >>> with tempfile.TemporaryDirectory() as folder:
    ...     save_file({"layer.0.query.weight": np.ones((4, 6), np.float32)}, folder + "/model.safetensors")
    ...     resolved = resolve(open_checkpoint(folder), file)
    >>> resolved.targets[0].name, resolved.how
    ('layer.0.query.weight', "names without 'bert.'")
    """
    _check_alone(checkpoint, file)
    entries = checkpoint.entries
    shapes = {name: entry.shape for name, entry in entries.items()}
    names = ModuleNames(lambda: checkpoint.config)
    try:
        named, shift, renamed = _named(file.targets, shapes, names)
    except TargetError as error:
        raise FileError(str(error)) from error
    also: list[tuple[int, Target]] = []
    if shift is None:
        tensors, how = _by_role(checkpoint, file, names), "weights of the same roles and shapes under other names"
    else:
        how = "weights under the names that transformers gives them on disk" if renamed else str(shift)
        tensors = [tuple(map(shift.target, parts)) for parts in named]
        tied = [(index, other) for index, parts in enumerate(named) for other in parts[0].tied_targets()]
        also = [(index, shift.target(other)) for index, other in tied if shift.of(other.name) in entries]
    resolved = ResolvedTargets(tuple(tensors), {}, {}, how, tuple(also))
    check_distinct([target for _, target in resolved.places])
    for _, target in resolved.places:
        _check_target(target, entries[target.name])
        _check_order(target, checkpoint)
    kept, added = _kept(entries, file, shift or Prefix(), names, renamed)
    if both := {target.name for _, target in resolved.places}.intersection(kept.values()):
        raise FileError(f"the adapter both updates and replaces {summarize(both)}")
    return resolved._replace(kept=kept, added=added)


def _named(
    targets: Sequence[Target], shapes: Mapping[str, tuple[int, ...]], names: ModuleNames, inverse: bool = False
) -> tuple[Sequence[tuple[Target, ...]], Prefix | None, bool]:
    """Return the tensors of each target, their prefix if they are stored, and whether they have other names."""
    # Names are tried in turn: those of the model, of single experts (several tensors per target), and on disk. With
    # ``inverse``, the targets may also have the names on disk, and the tensors those in memory.
    named, prefix = stored_names(targets, shapes)
    if prefix is not None:
        return [(target,) for target in named], prefix, False
    for several in expert_tensors(targets):
        prefix = found_prefix([part for parts in several for part in parts], shapes)
        if prefix is not None:
            return several, prefix, False
    renamed = renamed_targets(targets, shapes, names.of)
    if renamed is None and inverse:
        of_stored = names.inverse(shapes)
        renamed = renamed_targets(targets, shapes, lambda name: of_stored.get(name, []))
    if renamed is not None:
        return [(target,) for target in renamed[0]], renamed[1], True
    return [(target,) for target in targets], None, False


def _by_role(checkpoint: Checkpoint, file: AdapterFile, names: ModuleNames) -> list[tuple[Target, ...]]:
    missing = [target.name for target in file.targets if target.name not in checkpoint.entries]
    roles = "".join(dict.fromkeys(target.role for target in file.targets))
    candidates: list[Target] = []
    if are_roles(roles):
        shapes = {name: entry.shape for name, entry in checkpoint.entries.items()}
        try:
            candidates = find_stored(shapes, roles, checkpoint.config)
        except LayoutError as error:
            raise FileError(
                f"the checkpoint lacks {_how_many(missing, len(file.targets))}, such as {safe_repr(missing[0])}, under "
                f"any prefix, and weights of the same roles cannot be identified: {error}"
            ) from error
        except TargetError:
            candidates = []
    partners = paired(file.targets, candidates)
    if partners is None:
        alike = sorted((t.role, t.shape) for t in candidates) == sorted((t.role, t.shape) for t in file.targets)
        raise _missing(checkpoint, missing, len(file.targets), alike, names)
    return [(dataclasses.replace(new, layer=old.layer),) for new, old in zip(partners, file.targets, strict=True)]


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
        near = near_names(name, entries) or f"it has {summarize(entries)}"
    way = ""
    if checkpoint.index is None and "-of-" in os.path.basename(checkpoint.files[0]):
        way = ". This file looks like one of several: give the folder, or the index"
    others = "weights of the same roles and shapes"
    why = f"its {others} cannot be told apart" if alike else f"has no {others}"
    return FileError(
        f"the checkpoint lacks {what}, such as {safe_repr(name)}, under any prefix, and {why}; "
        f"{near}{way}{names.way_out}"
    )


def _check_target(target: Target, entry: Entry) -> None:
    if entry.dtype not in FLOATS:
        form = "no weight" if entry.dtype in ("BOOL", "C64") else "quantized or packed"
        raise FileError(
            f"{safe_repr(target.name)} is {entry.dtype}, {form}: an update cannot be added to it. Merge into a "
            "checkpoint of the model in bfloat16, float16 or float32, and quantize the result"
        )
    if entry.shape != target.stored:
        raise FileError(
            f"{safe_repr(target.name)} has shape {entry.shape} in the checkpoint, and the adapter was trained on one "
            f"of {target.stored}"
        )


def _check_alone(checkpoint: Checkpoint, file: AdapterFile) -> None:
    """Raise FileError if the adapter changes only one of an embedding and a head that the checkpoint ties."""
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
    # config.json is read only for the names of such layers.
    name, shape = target.name, target.stored
    if is_transposed(name, shape, {"model_type": "gpt2"}) and is_transposed(name, shape, checkpoint.config):
        raise FileError(
            f"{safe_repr(name)} is stored as (in, out), and the adapter's update is one of (out, in): it was "
            "made for another model, or converted from a file that does not say it. Convert that with base= (--base)"
        )


def _kept(
    entries: Mapping[str, Entry], file: AdapterFile, shift: Prefix, names: ModuleNames, renamed: bool
) -> tuple[dict[str, str], dict[str, str]]:
    kept: dict[str, str] = {}
    added: dict[str, str] = {}
    # Top-level modules of the checkpoint, below the added prefix if there is one.
    tops = {name.removeprefix(shift.given).partition(".")[0] for name in entries if name.startswith(shift.given)}
    for name, array in file.kept.items():
        shifted = shift.of(name) or name
        places = [place for alias in (name, *file.ties.get(name, ())) for place in (shift.of(alias) or alias, alias)]
        stored = list(dict.fromkeys(place for place in places if place in entries))
        stored_name = stored[0] if stored else None
        if len(stored) > 1 and file.ties.get(name):
            raise FileError(
                f"the adapter keeps {safe_repr(name)}, which is tied to {', '.join(map(safe_repr, file.ties[name]))}, "
                f"and the checkpoint stores {' and '.join(map(safe_repr, stored))}: give one of the tied model"
            )
        of_model = shifted.removeprefix(shift.given).partition(".")[0] in tops
        if stored_name is None and (of_model or renamed):
            stored_name = next(
                (place for other in names.of(name) if (place := shift.of(other) or other) in entries), None
            )
        if stored_name is None:
            if of_model:
                raise FileError(
                    f"the adapter keeps {safe_repr(name)}, which the checkpoint does not have, though it has others of "
                    f"that module; {near_names(shifted, entries) or 'nearest: none'}"
                )
            _need_free(added, name, shifted)
            added[name] = shifted
            continue
        entry, theirs = entries[stored_name], file.dtypes.get(f"kept.{name}", array.dtype.name)
        if entry.shape != array.shape:
            raise FileError(
                f"the adapter keeps {safe_repr(name)} of shape {array.shape}, and the checkpoint's is {entry.shape}: "
                "give a checkpoint with the head that it was trained with, or without any"
            )
        if DTYPES.get(entry.dtype) != theirs and not (entry.dtype in FLOATS and theirs in FLOATS.values()):
            raise FileError(f"the adapter keeps {safe_repr(name)} as {theirs}, and the checkpoint's is {entry.dtype}")
        _need_free(kept, name, stored_name)
        kept[name] = stored_name
    return kept, added


def _need_free(taken: Mapping[str, str], name: str, place: str) -> None:
    """Raise FileError if two kept parameters map to one name in the checkpoint, such as with and without a prefix."""
    for other, other_place in taken.items():
        if other_place == place:
            raise FileError(
                f"the adapter keeps both {safe_repr(other)} and {safe_repr(name)}, which are both {safe_repr(place)} "
                "in the checkpoint: it can hold one of them"
            )


# -- Weights in a checkpoint, each a tensor, a part of one, or several -------------------------------------------------


def numbers(checkpoint: Checkpoint, name: str, index: int | None = None) -> np.ndarray:
    """Read a tensor, or one of the matrices that it stacks, in a dtype that NumPy supports: bfloat16 as float32."""
    return native(checkpoint.entries[name].dtype, checkpoint.array(name, index))


class StoredWeights:
    """The weights of targets in a checkpoint.

    Parameters
    ----------
    checkpoint : Checkpoint
    parts : sequence of sequence of Target
        For each target the tensor that has it, or those whose rows are its rows, one after the other.
    """

    def __init__(self, checkpoint: Checkpoint, parts: Sequence[Sequence[Target]]) -> None:
        self.checkpoint, self.parts = checkpoint, parts

    @property
    def names(self) -> set[str]:
        """The names of all tensors that have a target's rows."""
        return {part.name for parts in self.parts for part in parts}

    def of(self, index: int) -> np.ndarray:
        """Return a weight as a matrix, widened to float32 at least; to float64 if it is stored as several tensors."""
        rows = [
            widened(_selected(part, self.checkpoint.array(part.name, part.index)), self._dtype(part.name))
            for part in self.parts[index]
        ]
        return rows[0] if len(rows) == 1 else np.concatenate(rows, dtype=np.float64)

    def fingerprint(self) -> Fingerprint | None:
        """Return the fingerprint of the weights; None if they have several dtypes."""
        dtypes = list(set(map(self._dtype, self.names)))
        return fingerprint(self._stored(dtypes[0]), dtypes[0]) if len(dtypes) == 1 else None

    def difference(self, known: Fingerprint | None) -> str | None:
        """Describe how the weights differ from those with a fingerprint; None if they match, or none is known."""
        if known is None:
            return None
        dtypes = set(map(self._dtype, self.names))
        # For several dtypes, use one that represents all their values, as when the fingerprint was taken.
        dtype = dtypes.pop() if len(dtypes) == 1 else "float64" if "float64" in dtypes else "float32"
        return compare(known, self._stored(dtype), dtype)

    def _dtype(self, name: str) -> str:
        return FLOATS[self.checkpoint.entries[name].dtype]

    def _stored(self, dtype: str) -> Iterator[np.ndarray]:
        """Yield the weights in a dtype that represents their values, reading a tensor with several of them once."""
        place, stored = None, np.empty(0)
        for parts in self.parts:
            rows = list[np.ndarray]()
            for part in parts:
                if place != (part.name, part.index):
                    stored = np.empty(0)  # release the last tensor before the next is read
                    place, stored = (part.name, part.index), self.checkpoint.array(part.name, part.index)
                selected, stored_dtype = _selected(part, stored), self._dtype(part.name)
                rows.append(selected if stored_dtype == dtype else widened(selected, stored_dtype).astype(dtype))
            yield rows[0] if len(rows) == 1 else np.concatenate(rows)


def _selected(part: Target, stored: np.ndarray) -> np.ndarray:
    array: np.ndarray = (part if part.index is None else part.of_matrix()).select(stored)
    return array


def find_weights(checkpoint: Checkpoint, targets: Sequence[Target], which: str) -> tuple[StoredWeights, Prefix]:
    """Find the weights of targets in one of two checkpoints of a model.

    Parameters
    ----------
    checkpoint : Checkpoint
    targets : sequence of Target
    which : str
        What to call the checkpoint in messages.

    Returns
    -------
    weights : StoredWeights
    prefix : Prefix
        By which names differ from the targets' own.

    Raises
    ------
    TargetError
        If a target is missing, has another shape, or is not floating.
    """
    stored = {name: entry.shape for name, entry in checkpoint.entries.items()}
    # Of two checkpoints of a transformers model, one may have the names of the modules, and the other those on disk.
    named, prefix, _ = _named(targets, stored, ModuleNames(lambda: checkpoint.config), inverse=True)
    if prefix is None:
        missing = [target.name for target in targets if target.name not in stored]
        near = near_names(missing[0], stored)
        raise TargetError(
            f"the {which} checkpoint lacks {len(missing)} of {len(targets)} targets, such as {safe_repr(missing[0])}, "
            f"under any prefix{'; ' + near if near else ''}: give two checkpoints of the same model"
        )
    weights = StoredWeights(checkpoint, [tuple(map(prefix.target, tensors)) for tensors in named])
    for part in (part for parts in weights.parts for part in parts):
        entry = checkpoint.entries[part.name]
        if entry.dtype not in FLOATS:
            raise TargetError(
                f"{part.name} of the {which} checkpoint is {entry.dtype}; expected one of {', '.join(FLOATS)}: give an "
                "unquantized checkpoint"
            )
        if entry.shape != part.stored:
            raise TargetError(
                f"{part.name} has shape {entry.shape} in the {which} checkpoint and {part.stored} in the other: give "
                "two checkpoints of the same model"
            )
    return weights, prefix


# -- The base's weights at an adapter's targets, compared with its fingerprint -----------------------------------------


def located(file: AdapterFile, checkpoint: Checkpoint) -> Sequence[Target]:
    """Return an adapter's targets under their names in a checkpoint, as :func:`tnadapt.merge` finds them.

    A checkpoint may have other names than the model in memory: without the prefix of a model with a head, or those of
    an earlier release. If the weights are not found, the adapter's own targets are returned.
    """
    if all(target.name in checkpoint.entries for target in file.targets):
        return file.targets
    try:
        resolved = resolve(checkpoint, file)
    except TnadaptError:
        return file.targets
    return file.targets if any(len(tensors) > 1 for tensors in resolved.tensors) else resolved.targets


def base_weights(file: AdapterFile, checkpoint: Checkpoint) -> StoredWeights:
    """Return the weights of a model on disk at an adapter's targets.

    Parameters
    ----------
    file : AdapterFile
    checkpoint : Checkpoint

    Raises
    ------
    TargetError
        If the model lacks a weight, or it has another shape; or if the file knows its base, and this is another one.
    """
    targets = located(file, checkpoint)
    for target in targets:
        entry = checkpoint.entries.get(target.name)
        if entry is None or entry.dtype not in FLOATS or entry.shape != target.stored:
            what = "is missing" if entry is None else f"is {entry.dtype} of the shape {entry.shape}"
            raise TargetError(
                f"the adapter needs {safe_repr(target.name)} of the shape {target.stored}, and in base it {what}: "
                "is it the model that the adapter was made for?"
            )
    weights = StoredWeights(checkpoint, [(target,) for target in targets])
    difference = weights.difference(file.base)
    if difference is not None:
        raise TargetError(
            f"base is another model than the one that the adapter was trained on: for the adapted weights, "
            f"{difference}. Give that one"
        )
    return weights
