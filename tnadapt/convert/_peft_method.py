"""The interface of PEFT's methods with a structure of their own, such as VeRA: one class and one file for each.

A method reads the tensors of a folder as an adapter file of the same structure, with the same numbers, and writes such
a file. What no config can describe is read as LoRA or dense, exactly, and a note says so.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NoReturn

import numpy as np

from tnadapt.algebra.config import MAX_ALPHA, MIN_ALPHA, Config
from tnadapt.checkpoints.adapter_file import AdapterFile
from tnadapt.checkpoints.container import Container
from tnadapt.errors import ConfigError, FileError, safe_repr
from tnadapt.targets.target import Target

from ._base_model import Base
from ._file_format import EncodedAdapter, ForeignAdapter
from ._peft_content import PREFIX, SHAPES, TRANSPOSED, PeftContent
from ._peft_embeddings import is_head
from ._peft_settings import common_config, common_settings, integer_of
from ._unpack import Module, TargetUpdate
from ._updates import Float, ModuleUpdate, narrow

__all__ = ["DRAWN", "OwnStructure", "PeftMethod", "rank_of", "scaled_config", "seed_of"]

#: The end of a note.
DRAWN = "regenerated as torch draws on a CPU, which PEFT does not promise for every system, and stored here"


@dataclasses.dataclass(frozen=True)
class OwnStructure:
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
    trained : sequence of str, optional
        As in :class:`~tnadapt.AdapterFile`.
    notes : tuple of str
    alone : sequence of str
        The names of targets that are updated alone, also where the model ties them.
    """

    targets: Sequence[Target]
    config: Config | None = None
    arrays: Mapping[str, Float] = dataclasses.field(default_factory=dict)
    given: Mapping[str, Float] = dataclasses.field(default_factory=dict)
    updates: Sequence[ModuleUpdate] = ()
    trained: Sequence[str] | None = None
    notes: tuple[str, ...] = ()
    alone: Sequence[str] = ()


class PeftMethod:
    """Base class of the methods.

    Attributes
    ----------
    title : str
        Name in messages.
    tensors, shared, integers, copies : tuple of str
        Names of its tensors in a module, of those of the whole adapter, of those of both that hold integers, and of
        those of the whole adapter that PEFT stores for each module once more.
    fields : tuple of str
        Settings that it reads, or that do not affect the update of the stored tensors.
    refused : mapping of str to str
        Settings that cannot be converted, with the reason.
    may_transpose : bool
        Whether PEFT applies it to weights that are stored as (in, out).
    writable : bool
        Whether :meth:`write` is defined.
    """

    title = ""
    tensors: tuple[str, ...] = ()
    shared: tuple[str, ...] = ()
    integers: tuple[str, ...] = ()
    copies: tuple[str, ...] = ()
    fields: tuple[str, ...] = ()
    refused: Mapping[str, str] = {}
    may_transpose = False
    writable = True

    @property
    def kind(self) -> str:
        """The last part of the form's name: "vera"."""
        return self.title.lower()

    # -- Reading -------------------------------------------------------------------------------

    def load(self, container: Container, config: Mapping[str, Any], base: Base | None) -> ForeignAdapter:
        """Read the adapter of an open file of weights."""
        settings = common_settings(config, self.title, self.fields, self.refused, self.may_transpose)
        content = PeftContent(container, config, settings, base, self.tensors, self.shared, self.integers, self.copies)
        found = self.read(content)
        content.check_targets(found.targets)
        dtype = content.dtype
        updates = [TargetUpdate(target, update) for target, update in zip(found.targets, found.updates, strict=False)]
        file, others = None, content.others
        modules = {target.module: target.name for target in found.targets}
        heads = [name for module, name in modules.items() if module in others.bases or is_head(module)]
        tied = {target.name for target in found.targets if target.tied}
        ties = others.ties | {name: () for name in (*found.alone, *heads) if name not in tied}
        if found.config is not None:
            stored, kinds = narrow(found.arrays, dtype)
            file = AdapterFile(
                found.config,
                found.targets,
                stored,
                kept=others.kept,
                dtypes={**others.dtypes, **kinds},
                ties=ties,
                given={name: array.astype(np.float32) for name, array in found.given.items()},
                trained=found.trained,
                model=settings.model,
            )
        return ForeignAdapter(
            self.kind, updates, dtype, others.kept, others.dtypes, settings.model, file,
            (*found.notes, *others.notes), content.parameters, ties=ties,
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
                f"{' and (in, out)' * self.may_transpose} alone; convert to 'peft-lora' (--to peft-lora)"
            )
        if len(module.targets) > 1 or module.targets[0][1].rows is not None:
            raise ConfigError(
                f"{safe_repr(module.path)} is updated in some of its rows, and PEFT has {self.title} for whole modules "
                "only; convert to 'peft-lora' (--to peft-lora)"
            )

    def encoded(self, modules: Sequence[Module], file: AdapterFile) -> EncodedAdapter:
        """Encode an adapter file of the method's structure; raise ConfigError if it has another one."""
        found = self.write(modules, file)
        transposed = {module.path: module.transposed for module in modules}
        common = common_config(self.kind, list(transposed))
        if self.may_transpose:
            common["fan_in_fan_out"] = all(transposed.values())
        record = {TRANSPOSED: transposed, SHAPES: {module.path: list(module.shape) for module in modules}}
        return found._replace(config={**common, **(found.config or {})}, record=record)

    def write(self, modules: Sequence[Module], file: AdapterFile) -> EncodedAdapter:
        """Encode the tensors, and the settings of the method."""
        raise NotImplementedError

    def refuse(self, why: str, way_out: str = "") -> NoReturn:
        """Raise the ConfigError for a config of another structure."""
        raise ConfigError(f"the adapter cannot be written as PEFT's {self.title}: {why}; {way_out or _WAY_OUT}")

    def name_of(self, module: Module, tensor: str) -> str:
        """Return the name of a module's tensor in the file."""
        return f"{PREFIX}{module.path}.{tensor}"

    def require_one_weight_per_group(self, file: AdapterFile) -> None:
        """Raise ConfigError unless every weight is a group, with arrays that are trained and stored themselves."""
        if file.config.before is not None:
            self.refuse(f"its arrays are made from θ by before={safe_repr(file.config.before)}")
        if any(len(group.pieces) > 1 for group in file.plan.groups) or len(file.plan.groups) != len(file.targets):
            self.refuse("several weights are one group, or one weight is several, and PEFT adapts weights one by one")


_WAY_OUT = (
    "convert to 'peft-lora' (--to peft-lora), which is exact for updates of low rank, or to 'lycoris-full' "
    "(--to lycoris-full), which holds every update"
)


def scaled_config(scale: float, make: Callable[[float | None], Config]) -> tuple[Config, float]:
    """Return a config of rank 1 with ``alpha=scale``, and 1; or with no alpha, and the scale, if it cannot be alpha."""
    if MIN_ALPHA <= scale <= MAX_ALPHA:
        return make(scale), 1.0
    return make(None), scale


def seed_of(name: str, value: Any, default: int) -> int:
    """Return a seed of torch's, or the default for None; raise FileError if it is no integer."""
    if value is None:
        return default
    if isinstance(value, bool) or not isinstance(value, int) or not -(1 << 63) <= value < 1 << 64:
        raise FileError(f"{name} must be an integer that torch takes as a seed; got {safe_repr(value)}")
    return value


def rank_of(content: PeftContent, default: int) -> int:
    """Return the setting ``r``."""
    return integer_of("r", content.config.get("r", default))
