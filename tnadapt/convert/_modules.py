"""The modules that an adapter updates: PEFT and LyCORIS adapt whole ones, and a target here may be some rows of one."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np

from tnadapt.checkpoints.adapter_file import AdapterFile
from tnadapt.errors import ConfigError, shown
from tnadapt.targets.roles import natural
from tnadapt.targets.target import Target

from ._taking_apart import Wide
from ._updates import Float, Pair, Update, scaled

__all__ = ["Module", "flat_name", "modules_of"]


class Module(NamedTuple):
    """A weight of the base, and the targets that are in it.

    Attributes
    ----------
    path : str
        Of the module; its ``weight`` is updated.
    stored : tuple of int
        Shape of the weight as the model keeps it.
    transposed : bool
        Whether that is ``(in, out)``.
    targets : tuple of (int, Target)
        Their places in the file.
    """

    path: str
    stored: tuple[int, ...]
    transposed: bool
    targets: tuple[tuple[int, Target], ...]

    @property
    def shape(self) -> tuple[int, int]:
        """``(rows, cols)`` of the whole update."""
        first = self.targets[0][1]
        return Target(self.path, self.stored, first.role, transposed=self.transposed).shape

    @property
    def name(self) -> str:
        """Of the weight in a state dict."""
        return self.targets[0][1].name

    def delta(self, wide: Wide) -> Float:
        """The update of the whole weight; zero in the rows of no target, the sum where targets share rows."""
        total = np.zeros(self.shape)
        for number, target in self.targets:
            # Rows of the matrix (out, in), however the weight itself is stored.
            total[_rows(target)] += wide.delta(number)
        return total

    def form(self, wide: Wide) -> Update | None:
        """The same as matrices that multiply to it exactly, or None where it is nothing like that."""
        forms = [wide.form(number) for number, _ in self.targets]
        found = [form for form in forms if form is not None]
        if len(self.targets) == 1 and self.targets[0][1].rows is None:
            return forms[0]
        if len(found) < len(forms) or any(form.kind != "lora" for form in found):
            return None
        return self._stacked(found)

    def _stacked(self, forms: Sequence[Update]) -> Update:
        """Low-rank updates of some rows each as one of the whole weight: its rank is the sum of theirs."""
        scales = {form.scale for form in forms}
        scale = scales.pop() if len(scales) == 1 else 1.0
        whole = [form if scale == form.scale else scaled(form) for form in forms]
        tall, wide = [], []
        for form, (_, target) in zip(whole, self.targets, strict=True):
            (pair,) = form.parts
            assert isinstance(pair, Pair)
            b = np.zeros((self.shape[0], pair.rank))
            b[_rows(target)] = pair.b
            tall.append(b)
            wide.append(pair.a)
        return Update("lora", self.shape, (Pair(np.concatenate(tall, 1), np.concatenate(wide, 1)),), scale)


def _rows(target: Target) -> slice | list[int]:
    return slice(None) if target.rows is None else target.rows.indices()


def flat_name(path: str) -> str:
    """The name of a module in LyCORIS, whose dots are underscores."""
    return f"lycoris_{path.replace('.', '_')}"


def modules_of(file: AdapterFile, library: str, kind: str) -> list[Module]:
    """The modules of an adapter file, layer by layer.

    Raises
    ------
    ConfigError
        If the library has no adapter of that kind for one of them.
    """
    places: dict[str, list[tuple[int, Target]]] = {}
    for number, target in enumerate(file.targets):
        _check_parameter(target, library)
        places.setdefault(target.module, []).append((number, target))
    found = []
    for path in sorted(places, key=natural):
        first = places[path][0][1]  # how it is stored, an adapter file's targets agree on
        found.append(Module(path, first.stored, first.transposed, tuple(places[path])))
        _check_layer(found[-1], library, kind)
    if library == "LyCORIS":
        _check_names(found)
    return found


def _check_parameter(target: Target, library: str) -> None:
    if target.parameter == "in_proj_weight":
        why = (
            "its LoRA layer of nn.MultiheadAttention adds the update of the output projection twice"
            if library == "PEFT"
            else "it has no module for nn.MultiheadAttention"
        )
        raise ConfigError(
            f"{target.name} cannot be converted to {library}: {why}; merge the adapter into the model, or keep it a "
            "tnadapt file"
        )
    if target.parameter != "weight" or not target.module:
        raise ConfigError(
            f"{target.name} cannot be converted: {library} adapts the weight of a layer in the model, and this is "
            "another parameter"
        )


def _check_layer(module: Module, library: str, kind: str) -> None:
    lora = library == "PEFT" and kind == "lora"
    if module.transposed and not lora:
        what = "adapts no such layer" if library == "LyCORIS" else f"has no {kind} for such a layer"
        raise ConfigError(f"{shown(module.path)} is stored as (in, out), and {library} {what}; convert to 'peft-lora'")
    axes = len(module.stored) - 2
    most = 2 if library == "PEFT" and not lora else 3
    if axes > most:
        raise ConfigError(
            f"{shown(module.path)} has a kernel of {axes} dimensions, and {library} has {kind} for up to {most}"
        )


def _check_names(modules: Sequence[Module]) -> None:
    names = dict[str, str]()
    for module in modules:
        name = flat_name(module.path)
        if name in names:
            raise ConfigError(
                f"LyCORIS writes dots as underscores, and {shown(names[name])} and {shown(module.path)} would have one "
                "name: it cannot adapt both"
            )
        names[name] = module.path
