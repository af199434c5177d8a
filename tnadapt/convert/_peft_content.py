"""The content of a PEFT folder, read strictly; and PeftMethod, the interface of methods with a structure of their own.

:class:`PeftContent` has the tensors, kept parameters and shapes of weights, whatever the method. Methods such as VeRA
read their folders through it.
"""

from __future__ import annotations

import hashlib
import itertools
import math
from collections.abc import Callable, Collection, Mapping, Sequence
from typing import Any, NamedTuple, NoReturn

import numpy as np

from tnadapt.algebra.config import Config
from tnadapt.algebra.group import Group
from tnadapt.algebra.presets import PRESETS
from tnadapt.algebra.update_plan import UpdatePlan
from tnadapt.checkpoints.adapter_file import AdapterFile
from tnadapt.checkpoints.container import DTYPES, Container, native, raw_bytes
from tnadapt.errors import ConfigError, FileError, safe_repr, summarize
from tnadapt.targets.checkpoint_targets import is_transposed
from tnadapt.targets.roles import natural
from tnadapt.targets.target import Target

from ._base_model import Base, target_of
from ._file_format import TO_PEFT_LORA, EncodedAdapter, ForeignAdapter
from ._files import recorded
from ._peft_settings import CommonSettings, common_config, common_settings, integer_of
from ._updates import Float, Module, ModuleUpdate, TargetUpdate, common_dtype, narrow, widen

# -- The content of a folder -------------------------------------------------------------------------------------------


PREFIX = "base_model.model."
CONFIG_NAME = "adapter_config.json"

#: Entries of a conversion's record: which weights are stored as (in, out), and the shapes (rows, cols) of the updates.
TRANSPOSED, SHAPES = "transposed", "shapes"

_MODEL_LEVEL = "base_model."

#: How a caller gets the shapes of a model's weights, in the order of its modules.
SHAPES_OF_MODEL = (
    "{name: tuple(module.weight.shape) for name, module in model.named_modules() if hasattr(module, 'weight')}"
)


class PeftContent:
    """The tensors and settings of an adapter in a folder of PEFT.

    Parameters
    ----------
    container : Container
        The open file of weights.
    config : mapping
        ``adapter_config.json``.
    base : Base, optional
    method : PeftMethod

    Attributes
    ----------
    modules : dict of str to dict of str to ndarray
        By path in natural order, then by name; floating-point numbers in float64, integers as int64.
    shared : dict of str to ndarray
        By name, without ``base_model.``.
    dtypes : set of str
        The dtypes of the floating-point tensors.
    others : OtherTensors
        What is there besides.

    Raises
    ------
    FileError
        If a tensor belongs to neither the method nor the parameters that were trained alongside.
    """

    def __init__(self, container: Container, config: Mapping[str, Any], base: Base | None, method: PeftMethod) -> None:
        self.config, self.base, self.method = config, base, method
        self.settings = common_settings(config, method.fields, method.may_transpose)
        self.metadata, self.shared = container.metadata, dict[str, Any]()
        self.dtypes = set[str]()
        self.parameters = 0
        modules, others = dict[str, dict[str, Any]](), list[str]()
        for name, entry in container.entries.items():
            path, last = _split_name(name, method.tensors)
            whole = name.removeprefix(_MODEL_LEVEL)
            if name.startswith(PREFIX) and path and last in method.tensors:
                array = container.array(name)
                modules.setdefault(path, {})[last] = self._number(name, entry.dtype, array, last in method.integers)
            elif name.startswith(PREFIX) and path and last in method.copies:
                self._check_copy(name, last, container)
            elif name != whole and any(whole == name or whole.startswith(f"{name}.") for name in method.shared):
                self.shared[whole] = self._number(name, entry.dtype, container.array(name))
            else:
                others.append(name)
        self.others = other_tensors(container, others, modules, self.settings, method.title, base)
        self.modules = {path: modules[path] for path in sorted(modules, key=natural)}
        self._transposed = recorded(container.metadata, TRANSPOSED, bool)
        self._shapes = recorded(container.metadata, SHAPES, list)

    def _check_copy(self, name: str, of: str, container: Container) -> None:
        original = _MODEL_LEVEL + of
        self.parameters += math.prod(container.entries[name].shape)
        if original not in container.entries or not np.array_equal(container.array(name), container.array(original)):
            raise FileError(f"{safe_repr(name)} differs from {original}, of which PEFT stores copies")

    def _number(self, name: str, tag: str, array: np.ndarray, integer: bool = False) -> Any:
        self.parameters += array.size
        if not integer:
            self.dtypes.add(DTYPES.get(tag, tag))
            return widen(name, tag, array)
        # PEFT on Windows stores integers as float32.
        whole = (
            array.astype(np.int64) if array.dtype.kind in "iuf" and tag != "BF16" and np.isfinite(array).all() else None
        )
        if whole is None or not np.array_equal(whole, array):
            raise FileError(f"{safe_repr(name)} must hold integers; it is {tag}")
        return whole

    def tensor(self, path: str, name: str, axes: int) -> Any:
        """Return a tensor of a module; raise FileError if it is missing or has another number of axes."""
        array = self.modules[path].get(name)
        if array is None:
            raise FileError(f"{safe_repr(path)} has {', '.join(self.modules[path])}, and lacks {name}")
        if array.ndim != axes or 0 in array.shape:
            raise self.misfit(path, f"{name} must have {axes} axes, none of them empty")
        return array

    def shared_tensor(self, name: str, axes: int, way_out: str = "") -> Float:
        """Return a tensor of the whole adapter; raise FileError if it is missing or has another number of axes."""
        if name not in self.shared:
            raise FileError(f"lacks {_MODEL_LEVEL}{name}, which a {self.method.title} adapter needs{way_out}")
        array: Float = self.shared[name]
        if array.ndim != axes or 0 in array.shape:
            raise FileError(
                f"{_MODEL_LEVEL}{name} must have {axes} axes, none of them empty; its shape is {array.shape}"
            )
        return array

    def rank(self, default: int) -> int:
        """Return the setting ``r``."""
        return integer_of("r", self.config.get("r", default))

    def seed(self, name: str, default: int) -> int:
        """Return a setting that is a seed of torch's; raise FileError if it is no integer."""
        value = self.config.get(name)
        if value is None:
            return default
        if isinstance(value, bool) or not isinstance(value, int) or not -(1 << 63) <= value < 1 << 64:
            raise FileError(f"{name} must be an integer that torch takes as a seed; got {safe_repr(value)}")
        return value

    def check_targets(self, targets: Sequence[Target]) -> None:
        """Raise FileError if ``fan_in_fan_out`` is wrong for some weights in base, and others rely on it."""
        if self.base is not None and self.method.may_transpose:
            trusted = [
                target
                for target in targets
                if target.role != "embedding" and target.index is None and target.module not in self._transposed
                and not is_conv1d(target.module, self.settings.model_type, self.base)
            ]  # fmt: skip
            check_transposed(trusted, self.settings.transposed)

    def misfit(self, path: str, why: str) -> FileError:
        """Return the error for tensors of a module that do not fit together."""
        shapes = ", ".join(f"{name} {array.shape}" for name, array in self.modules.get(path, {}).items())
        return FileError(f"the tensors of {safe_repr(path)} do not fit: {why}; they are {shapes}")

    def target(self, path: str, shape: tuple[int, ...]) -> Target:
        """Return the target of a module whose tensors give the shape ``(out, in, …)`` of the update."""
        transposed = len(shape) == 2 and self._is_transposed(path)
        return target_of(path, shape, self.base, transposed, self.method.may_transpose)

    def target_from_base(self, path: str, size: int, fits: Callable[[int, int, int], bool], why: str) -> Target:
        """Return the target of a module whose tensors do not give the shape of the update.

        Parameters
        ----------
        path : str
        size : int
            A size of the tensors.
        fits : callable
            Returns whether rows and columns agree with the size.
        why : str
            What the tensors require, for the error.

        Raises
        ------
        FileError, TargetError
            If neither the base nor the metadata of a folder that this library wrote gives the shape, or it does not
            fit.
        """
        known = self._shapes.get(path)
        if isinstance(known, list) and len(known) == 2 and all(type(side) is int and side > 0 for side in known):
            candidates = [(known[0], known[1])]
        else:
            candidates = self._candidates(path)
        for shape in candidates:
            if fits(*shape, size):
                return self.target(path, shape)
        raise self.misfit(path, f"{why}, and the weight is {candidates[0][0]} × {candidates[0][1]}")

    def _candidates(self, path: str) -> list[tuple[int, int]]:
        """Return the shapes that an update of the base's weight may have, with the one by the settings first."""
        if self.base is not None:
            self.base.check_module(path)
        stored = None if self.base is None else self.base.shapes[path]
        if stored is None:
            raise FileError(
                f"a {self.method.title} adapter of PEFT does not store the shapes of the weights, and "
                f"{safe_repr(path)} needs one: give base= (--base), a folder or safetensors file of the base model, or "
                f"{SHAPES_OF_MODEL}"
            )
        if len(stored) != 2:
            raise FileError(
                f"{safe_repr(path)} is a weight of {len(stored)} axes in base, and {self.method.title} adapts matrices"
            )
        here = (stored[1], stored[0]) if self._is_transposed(path) else (stored[0], stored[1])
        # PEFT has one setting for all weights; if it contradicts the tensors, the tensors decide.
        return [here, here[::-1]] if self.method.may_transpose else [here]

    def _is_transposed(self, path: str) -> bool:
        settings, may_transpose = self.settings, self.method.may_transpose
        says = settings.transposed or (may_transpose and is_conv1d(path, settings.model_type, self.base))
        return bool(self._transposed.get(path, says))


def _split_name(name: str, tensors: Collection[str]) -> tuple[str, str]:
    """Return the path of a module, and the name of its tensor, which may contain a dot."""
    path, _, last = name.removeprefix(PREFIX).rpartition(".")
    module, _, middle = path.rpartition(".")
    return (module, f"{middle}.{last}") if f"{middle}.{last}" in tensors else (path, last)


def check_transposed(targets: Sequence[Target], says: bool) -> None:
    """Raise FileError if PEFT's global setting is wrong for some weights and the only information for others."""
    flat = [target for target in targets if len(target.stored) == 2]
    wrong = [target for target in flat if target.stored[0] != target.stored[1] and target.transposed != says]
    square = [target for target in flat if target.stored[0] == target.stored[1]]
    if wrong and square:
        raise FileError(
            f"fan_in_fan_out is {says} for all weights, which is wrong for {safe_repr(wrong[0].module)} in base, so it "
            f"is unknown how the square {safe_repr(square[0].module)} is stored. Give base= (--base), the folder of "
            "the model with its config.json, or save one adapter per kind of layer"
        )


def is_conv1d(path: str, model_type: str, base: Base | None) -> bool:
    """Return whether a module is known to be a Conv1D of transformers, whose weight is stored as (in, out).

    PEFT has one setting for all modules, which is that of the last one if there are also others, and which HiRA never
    sets.
    """
    if base is not None and base.is_transposed(path):
        return True
    return is_transposed(f"{path}.weight", (1, 1), {"model_type": model_type})


class OtherTensors(NamedTuple):
    """What a folder has besides the tensors of its method.

    Attributes
    ----------
    kept : dict of str to ndarray
        The trained parameters, by their names in the base.
    dtypes : dict of str to str
        "bfloat16" for those that are stored as such, by ``kept.NAME``.
    ties : dict of str to tuple of str
        For each kept matrix the other names of its tensor: PEFT trains a copy, which is tied to nothing unless it says
        so.
    bases : list of str
        The modules whose weights of the base are stored next to the update.
    notes : tuple of str
    """

    kept: dict[str, np.ndarray]
    dtypes: dict[str, str]
    ties: dict[str, tuple[str, ...]]
    bases: list[str]
    notes: tuple[str, ...] = ()


def other_tensors(
    container: Container,
    names: Sequence[str],
    adapted: Collection[str],
    settings: CommonSettings,
    title: str,
    base: Base | None,
) -> OtherTensors:
    """Read the tensors that are not those of a method.

    Parameters
    ----------
    container : Container
    names : sequence of str
        The tensors to read.
    adapted : collection of str
        Paths of the modules with an update.
    settings : CommonSettings
    title : str
        The method's name, for messages.
    base : Base, optional

    Raises
    ------
    FileError
        If one is none of what PEFT stores there; if two copies of a parameter differ; or if the stored weight of the
        base is another one than that of ``base``.
    """
    trained, others, layers = dict[str, list[str]](), list[str](), list[str]()
    every = set(names)
    for name in names:
        path = name.removeprefix(PREFIX)
        module, _, parameter = path.partition(".base_layer.")
        untrained = ("weight", "bias") if settings.bias == "none" else ("weight",)
        if module in adapted and parameter in untrained:
            layers.append(name)
        elif (kept := _kept_name(path, every, settings.saved, settings.bias)) is None:
            others.append(name)
        elif kept:
            trained.setdefault(kept, []).append(name)
    rest = OtherTensors({}, {}, {}, [])
    for kept, stored in trained.items():
        rest.kept[kept], dtype = _kept_array(container, stored)
        rest.dtypes.update({f"kept.{kept}": dtype} if dtype else {})
        if rest.kept[kept].ndim == 2 and is_saved(kept, settings.saved):
            rest.ties[kept] = ()
    if settings.ties:
        others = _join_ties(container, rest, trained, others)
    if others:
        raise FileError(f"has tensors that do not belong to a {title} adapter: {summarize(others)}")
    for name in layers:
        module, _, parameter = name.removeprefix(PREFIX).partition(".base_layer.")
        if base is not None:
            base.check_stored(f"{module}.{parameter}", container.entries[name], container.array(name))
        rest.bases.append(module)
    if not layers:
        return rest
    note = f"left out {summarize(layers)}: PEFT saves the base's own weight next to the update of an embedding or head"
    return rest._replace(notes=(note,))


def _join_ties(
    container: Container, found: OtherTensors, trained: Mapping[str, Sequence[str]], others: Sequence[str]
) -> list[str]:
    """Record PEFT's copies of a kept matrix, one per tied module, and return the tensors that are no such copies."""
    stored = {kept: trained[kept][0] for kept in found.ties} | {name.removeprefix(PREFIX): name for name in others}
    firsts, joined = dict[tuple[Any, ...], str](), set[str]()
    for name in [name for name in stored if name.endswith(".weight")]:
        entry = container.entries[stored[name]]
        content = raw_bytes(np.ascontiguousarray(container.array(stored[name])))
        first = firsts.setdefault((entry.dtype, entry.shape, hashlib.sha256(content).digest()), name)
        if first != name and first in found.ties:
            found.ties[first] += (name,)
            joined.add(stored[name])
            found.kept.pop(name, None)
            found.ties.pop(name, None)
            found.dtypes.pop(f"kept.{name}", None)
    return [name for name in others if name not in joined]


def _kept_name(path: str, names: Collection[str], saved: Sequence[str], bias: str) -> str | None:
    """Return the parameter that a tensor is a trained copy of, "" for an untrained copy, or None for other tensors."""
    module, wrapper, rest = path.partition(".modules_to_save.")
    if wrapper and is_saved(f"{module}.{rest}", saved):
        # Below a saved module, PEFT leaves the adapter's name in the names of biases.
        return next(
            (path for path in (f"{module}.{rest}", f"{module}.{rest.partition('.')[2]}") if PREFIX + path in names),
            f"{module}.{rest}",
        )
    if ".original_module." in path and bias != "none" and is_saved(path, saved):
        return ""
    if is_saved(path, saved):
        return path
    if bias != "none" and path.rpartition(".")[2] == "bias":
        return path.replace(".base_layer.", ".")
    return None


# All names of the heads that transformers ties to embeddings.
_HEADS = (
    "decoder", "embed_out", "generator_lm_head", "head", "lm_head", "lm_loss", "out_proj", "output",
    "output_projection", "proj", "proj_out", "vocab_projector",
)  # fmt: skip


def is_head(path: str) -> bool:
    """Return whether a module is an output head, by its name outside of all numbered layers."""
    *outer, last = path.split(".")
    return last in _HEADS and not any(map(str.isdecimal, outer))


def is_saved(path: str, saved: Sequence[str]) -> bool:
    """Return whether PEFT's ``modules_to_save`` name a module that has the parameter: by the end of its path."""
    modules = itertools.accumulate(path.split(".")[:-1], "{}.{}".format)
    return any(module.endswith(name) for module in modules for name in saved)


def _kept_array(container: Container, names: Sequence[str]) -> tuple[np.ndarray, str]:
    """Return a kept parameter, whose copies must be equal, and "bfloat16" if it is stored as such, else ""."""
    name, array = names[0], container.array(names[0])
    tag = container.entries[name].dtype
    for copy in names[1:]:
        if container.entries[copy].dtype != tag or not np.array_equal(array, container.array(copy)):
            raise FileError(
                f"{safe_repr(name)} and {safe_repr(copy)} are copies of one trained parameter, and differ: save the "
                "adapter again with PEFT"
            )
    array = native(tag, array)
    if array.dtype.kind == "f" and not np.isfinite(array).all():
        raise FileError(f"{safe_repr(name)} holds NaN or infinity")
    return array, "bfloat16" if tag == "BF16" else ""


# -- The interface of methods with a structure of their own, such as VeRA ----------------------------------------------

# A method reads the tensors of a folder as an adapter file of the same structure, with the same numbers, and writes
# such a file. An update that no config can describe is read exactly, as LoRA or dense, with a note.


class OwnStructure(NamedTuple):
    """What a method reads: an adapter in its own structure, or the updates alone.

    Attributes
    ----------
    targets : sequence of Target
    config : Config or None
        None if there is no such config.
    arrays : mapping of str to ndarray
        The trained arrays in float64.
    given : mapping of str to ndarray
        The frozen ones.
    updates : sequence of ModuleUpdate
        The update of each target, from the stored tensors. Required without a config.
    notes : tuple of str
    alone : sequence of str
        The names of targets that are updated alone, also where the model ties them.
    apply, magnitudes
        As in :class:`ForeignAdapter`.
    """

    targets: Sequence[Target]
    config: Config | None = None
    arrays: Mapping[str, Float] = {}
    given: Mapping[str, Float] = {}
    updates: Sequence[ModuleUpdate] = ()
    notes: tuple[str, ...] = ()
    alone: Sequence[str] = ()
    apply: str = "add"
    magnitudes: Mapping[str, Float] = {}


def dense_updates(
    targets: Sequence[Target], deltas: Sequence[Float], why: str, notes: tuple[str, ...] = ()
) -> OwnStructure:
    """Return the updates themselves, exact but large, with a note."""
    updates = [ModuleUpdate("dense", target.shape, (delta,)) for target, delta in zip(targets, deltas, strict=True)]
    return OwnStructure(targets, updates=updates, notes=(f"stored dense: {why}", *notes))


class PeftMethod:
    """Base class of the methods.

    Attributes
    ----------
    preset : str
        Name of the preset whose record has the title and PEFT's name; a method without one defines these itself.
    names_modules : bool
        Whether each module has tensors in every file.
    title : str
        Name in messages.
    peft_type : str
        PEFT's name.
    tensors, shared, integers, copies : tuple of str
        Names of its tensors in a module, of those of the whole adapter, of those of both that hold integers, and of
        those of the whole adapter that PEFT stores for each module once more.
    fields : tuple of str
        Settings that it reads, or that do not affect the update of the stored tensors.
    may_transpose : bool
        Whether PEFT applies it to weights that are stored as (in, out).
    """

    preset = ""
    tensors: tuple[str, ...] = ()
    shared: tuple[str, ...] = ()
    integers: tuple[str, ...] = ()
    copies: tuple[str, ...] = ()
    fields: tuple[str, ...] = ()
    may_transpose = False
    names_modules = True

    @property
    def title(self) -> str:
        return PRESETS[self.preset].title

    @property
    def peft_type(self) -> str:
        return PRESETS[self.preset].peers["PEFT"]

    @property
    def kind(self) -> str:
        """The last part of the form's name: "vera"."""
        return self.peft_type.lower()

    # -- Reading -------------------------------------------------------------------------------

    def load(self, container: Container, config: Mapping[str, Any], base: Base | None) -> ForeignAdapter:
        """Read the adapter of an open file of weights."""
        content = PeftContent(container, config, base, self)
        if self.names_modules and not content.modules:
            raise FileError("has no adapted weight")
        structure = self.read(content)
        content.check_targets(structure.targets)
        dtype, others, model = common_dtype(content.dtypes), content.others, content.settings.model
        updates = [TargetUpdate(*pair) for pair in zip(structure.targets, structure.updates, strict=False)]
        modules = {target.module: target.name for target in structure.targets}
        heads = [name for module, name in modules.items() if module in others.bases or is_head(module)]
        tied = {target.name for target in structure.targets if target.tied}
        ties = others.ties | {name: () for name in (*structure.alone, *heads) if name not in tied}
        file = None
        if structure.config is not None:
            stored, kinds = narrow(structure.arrays, dtype)
            given = {name: array.astype(np.float32) for name, array in structure.given.items()}
            file = AdapterFile(
                structure.config, structure.targets, stored, kept=others.kept, dtypes={**others.dtypes, **kinds},
                ties=ties, given=given, model=model,
            )  # fmt: skip
        return ForeignAdapter(
            "dora" if structure.magnitudes else self.kind, updates, dtype, others.kept, others.dtypes, model, file,
            (*structure.notes, *others.notes), content.parameters, structure.apply, structure.magnitudes, ties=ties,
        )  # fmt: skip

    def read(self, content: PeftContent) -> OwnStructure:
        """Read the tensors; raise FileError or TargetError if they do not fit together, the settings or the base."""
        raise NotImplementedError

    # -- Writing -------------------------------------------------------------------------------

    def check_module(self, module: Module) -> None:
        """Raise ConfigError unless PEFT has the method for the module, and the adapter updates all of its rows."""
        if len(module.stored) != 2 or (module.transposed and not self.may_transpose):
            what = "as (in, out)" if module.transposed else f"in {len(module.stored)} axes"
            raise ConfigError(
                f"{safe_repr(module.path)} is stored {what}, and PEFT has {self.title} for matrices (out, in)"
                f"{' and (in, out)' * self.may_transpose} alone; {TO_PEFT_LORA}"
            )
        if len(module.targets) > 1 or module.targets[0][1].rows is not None:
            raise ConfigError(
                f"{safe_repr(module.path)} is updated in some of its rows, and PEFT has {self.title} for whole modules "
                f"only; {TO_PEFT_LORA}"
            )

    def encoded(self, modules: Sequence[Module], file: AdapterFile) -> EncodedAdapter:
        """Encode an adapter file of the method's structure; raise ConfigError if it has another one."""
        adapter = self.write(modules, file)
        transposed = {module.path: module.transposed for module in modules}
        common = common_config(self.kind, list(transposed))
        if self.may_transpose:
            common["fan_in_fan_out"] = all(transposed.values())
        record = {TRANSPOSED: transposed, SHAPES: {module.path: list(module.shape) for module in modules}}
        return adapter._replace(config={**common, **(adapter.config or {})}, record=record)

    def write(self, modules: Sequence[Module], file: AdapterFile) -> EncodedAdapter:
        """Encode the tensors, and the settings of the method."""
        raise NotImplementedError

    def refuse(self, why: str) -> NoReturn:
        """Raise the ConfigError for a config of another structure."""
        raise ConfigError(
            f"the adapter cannot be written as PEFT's {self.title}: {why}; {TO_PEFT_LORA}, which is exact for updates "
            "of low rank, or to 'lycoris-full' (--to lycoris-full), which holds every update"
        )

    def name_of(self, module: Module, tensor: str) -> str:
        """Return the name of a module's tensor in the file."""
        return f"{PREFIX}{module.path}.{tensor}"

    def require_one_weight_per_group(self, file: AdapterFile) -> None:
        """Raise ConfigError unless every weight is a group, with arrays that are trained and stored themselves."""
        if file.config.before is not None:
            self.refuse(f"its arrays are made from θ by before={safe_repr(file.config.before)}")
        if any(len(group.pieces) > 1 for group in file.plan.groups) or len(file.plan.groups) != len(file.targets):
            self.refuse("several weights are one group, or one weight is several, and PEFT adapts weights one by one")


def group_of(plan: UpdatePlan, module: Module) -> Group:
    """Return the first group of the only target of a module."""
    return plan.groups[plan.layout.of_weight(module.targets[0][0])[0].group]
