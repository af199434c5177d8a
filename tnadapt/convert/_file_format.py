"""The interface of file formats, and the conversion of what a format reads to an adapter file.

One class implements one format: it recognizes, reads, encodes and writes the files. The defaults of
:class:`FileFormat` reject everything that a format does not explicitly support.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Hashable, Iterable, Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np

from tnadapt.algebra.composite import CompositeConfig
from tnadapt.algebra.config import Config
from tnadapt.algebra.folding import kronecker_sizes
from tnadapt.checkpoints.adapter_file import AdapterFile
from tnadapt.errors import ConfigError, FileError, safe_repr, summarize
from tnadapt.targets.target import Target

from ._base_model import Base, target_of
from ._files import StoredFiles
from ._updates import Float, Module, ModuleUpdate, Pair, TargetUpdate, alpha_of, check_size, narrow

# -- Recommendations in messages ---------------------------------------------------------------------------------------


MERGE = "merge the adapter into the base with tnadapt.merge (tnadapt merge)"
TO_PEFT_LORA = "convert to 'peft-lora' (--to peft-lora)"
TO_FULL = "to='lycoris-full' (--to lycoris-full), which holds every update"
WITHOUT_KEPT = "by without_kept=True (--without-kept)"


def not_additive(apply: str, form: str) -> ConfigError:
    """Return the error of a form that holds nothing but added updates."""
    other = "" if form == "peft-lora" else ", or convert it to 'peft-lora' (--to peft-lora), which has DoRA and HiRA"
    return ConfigError(
        f"apply={apply!r} of this adapter does more than add ΔW to the weight, and {form} can only add: merge it into "
        f"the base with tnadapt.merge (tnadapt merge){other}"
    )


# -- The interface of file formats -------------------------------------------------------------------------------------


Json = Mapping[str, Any]

# Methods that an adapter can be written as; "full" is one dense update per module.
KINDS = ("lora", "lokr", "loha", "full")


class ForeignAdapter(NamedTuple):
    """An adapter as stored in a file of another library.

    Attributes
    ----------
    kind : str
        "lora", "lokr", "loha" or "full"; "" if the file mixes methods.
    updates : sequence of TargetUpdate
        At least one, unless there is a ``file``.
    dtype : str
        The dtype of the stored tensors; if there are several, one that represents all of their values.
    kept : mapping of str to ndarray
        Parameters trained alongside the adapter, by their names in the base.
    kept_dtypes : mapping of str to str
        "bfloat16" for the parameters in ``kept`` that are stored as such, by ``kept.NAME``.
    model : str
        Class name of the base model, or "".
    file : AdapterFile, optional
        The adapter in its own structure, such as VeRA, instead of one made of the updates. The updates, if there are
        any, are those of its targets, computed from the stored tensors, and the file is compared with them.
    notes : tuple of str
        Remarks for the user.
    parameters : int, optional
        Number of elements of the stored tensors; by default those of the updates.
    apply : str
        How the updates meet the weights, as in :class:`tnadapt.Config`.
    magnitudes : mapping of str to ndarray
        The magnitudes of rows by the paths of modules, as vectors, if ``apply`` is "magnitude".
    part : str
        The part that was read, if files of the format have parts.
    ties : mapping of str to sequence of str
        As in :class:`~tnadapt.AdapterFile`.
    """

    kind: str
    updates: Sequence[TargetUpdate]
    dtype: str
    kept: Mapping[str, np.ndarray] = {}
    kept_dtypes: Mapping[str, str] = {}
    model: str = ""
    file: AdapterFile | None = None
    notes: tuple[str, ...] = ()
    parameters: int | None = None
    apply: str = "add"
    magnitudes: Mapping[str, Float] = {}
    part: str = ""
    ties: Mapping[str, Sequence[str]] = {}

    @classmethod
    def of(
        cls, kind: str, updates: Mapping[str, ModuleUpdate], base: Base | None = None, dtype: str = "float32"
    ) -> ForeignAdapter:
        """Return an adapter with the given updates of linear layers, by path, checked against the base."""
        target_updates = [TargetUpdate(target_of(path, update.shape, base), update) for path, update in updates.items()]
        return cls(kind, target_updates, dtype)


class ExportChoice(NamedTuple):
    """The updates of all modules in the form to export.

    Attributes
    ----------
    updates : list of ModuleUpdate
        One per module: of kind "lora", "lokr" or "loha", or "dense" for "full".
    ranks : list of int
        The rank that the library assigns to each of them.
    exact : bool
        Whether the updates are exact up to rounding.
    settings : dict
        Further settings of the format, from :meth:`FileFormat.fit_kronecker`.
    """

    updates: list[ModuleUpdate]
    ranks: list[int]
    exact: bool
    settings: dict[str, Any]


class EncodedAdapter(NamedTuple):
    """An adapter as tensors with the names and shapes of another library.

    Attributes
    ----------
    tensors : dict of str to ndarray
        Tensors in float64, to be stored in the dtype of the conversion.
    scalars : mapping of str to ndarray
        Scalars such as alpha, stored in float32 and not counted as parameters.
    config : dict, optional
        Settings for a separate file.
    integers : mapping of str to ndarray
        Tensors of integers, such as positions, not counted as parameters.
    record : mapping
        Entries that the format adds to the record of the conversion in the file's metadata.
    kept_names : mapping of str to sequence of str
        For parameters trained alongside the adapter the names of the tensors that store them.
    """

    tensors: dict[str, Float]
    scalars: Mapping[str, Float] = {}
    config: dict[str, Any] | None = None
    record: Mapping[str, Any] = {}
    integers: Mapping[str, np.ndarray] = {}
    kept_names: Mapping[str, Sequence[str]] = {}


class FileFormat:
    """Base class of file formats of adapters; register a subclass with :func:`register_file_format`.

    A format defines :meth:`detect` and :meth:`read`; :meth:`encode` and :meth:`write` if ``kinds`` is not empty; and
    :meth:`fit_kronecker` if "lokr" is among them. The other methods have defaults.

    Attributes
    ----------
    name : str
        Set by the registration.
    library : str
        Name of the library in messages.
    kinds : tuple of str
        Methods that can be written: "lora", "lokr", "loha" and "full" define the forms ``NAME-lora`` and so on.
    structures : tuple of str
        Methods that can be written only from a config of that structure, by :meth:`encode_file`: "vera" defines the
        form ``NAME-vera``.
    embeddings, transposed : tuple of str
        Those of both that can be of an embedding, and of ``kinds`` that can be of a weight stored as (in, out).
    kernels : mapping of str to int
        The largest number of dimensions of a convolution's kernel, by those of ``kinds`` that can be of one.
    applies : tuple of str
        Values of ``apply`` of :class:`tnadapt.Config` besides "add" that LoRA can have, by :meth:`applied`.
    folder : tuple of str
        Names of the files if an adapter is a folder with several; the last one is moved into place last.
    parts_read : tuple of str
        What a caller's ``part`` may be when a file is read, if a file may hold the adapters of several models.
    parts_written : tuple of str
        What it may be when one is written, if a file says of which part of a model the adapter is.
    no_kronecker : str
        Message for the case that :meth:`fit_kronecker` finds nothing for the nearest Kronecker products.
    """

    name = ""
    library = ""
    kinds: tuple[str, ...] = ()
    structures: tuple[str, ...] = ()
    embeddings: tuple[str, ...] = ()
    transposed: tuple[str, ...] = ()
    kernels: Mapping[str, int] = {}
    applies: tuple[str, ...] = ()
    folder: tuple[str, ...] = ()
    parts_read: tuple[str, ...] = ()
    parts_written: tuple[str, ...] = ()
    no_kronecker = "no Kronecker product of this rank can be loaded there: give another rank"

    # -- Reading -------------------------------------------------------------------------------

    def detect(self, path: str) -> str | None:
        """Return the path of the adapter at a path, or None if there is none of this format.

        The path may name anything, or not exist.

        Raises
        ------
        FileError
            If the adapter is of this format but cannot be read.
        """
        raise self._lacks("detect")

    def read(self, files: StoredFiles, base: Base | None, part: str | None) -> ForeignAdapter:
        """Read an adapter.

        Parameters
        ----------
        files : StoredFiles
            Files at the path that :meth:`detect` returned, or in memory, to read back the result and measure its error.
        base : Base, optional
            The base model's modules, as given by the caller.
        part : str, optional
            The adapter to read from a file with several.

        Raises
        ------
        FileError, TargetError
            If the adapter is damaged or has content that an adapter file cannot represent.
        """
        raise self._lacks("read")

    # -- Writing -------------------------------------------------------------------------------

    def configure(self, base: Any) -> Any:
        """Take the base for an export, before the source is read; by default nothing.

        Parameters
        ----------
        base : optional
            The argument of :func:`tnadapt.convert`.

        Returns
        -------
        optional
            The base for reading and checking the source.
        """
        return base

    def choose_part(self, modules: Sequence[Module], part: str | None, source: str) -> None:
        """Choose the part of a model that the adapter is written as, if ``parts_written`` is not empty.

        Parameters
        ----------
        modules : sequence of Module
        part : str, optional
            One of ``parts_read`` of the source's format or of ``parts_written``, as the caller names it.
        source : str
            The part that was read; "" if the source has no parts.

        Raises
        ------
        ConfigError
            If it is not known.
        """

    def check_target(self, target: Target) -> None:
        """Raise ConfigError unless the library can adapt the target's parameter; by default, the weight of a module."""
        if target.tied:
            raise ConfigError(
                f"{target.name} cannot be converted: it is updated together with {', '.join(target.tied)}, to which it "
                f"is tied, and {self.library} updates one layer; {MERGE}"
            )
        if target.parameter != "weight" or not target.module:
            raise ConfigError(
                f"{target.name} cannot be converted: {self.library} adapts the weight of a layer in the model, and "
                "this is another parameter; merge the adapter into the model, or keep it a tnadapt file"
            )

    def check_module(self, module: Module, kind: str) -> None:
        """Raise ConfigError unless the library supports the method for the module, by its attributes."""
        kernel, most = len(module.stored) - 2, self.kernels.get(kind, 0)
        if module.transposed and kind not in self.transposed:
            raise ConfigError(
                f"{safe_repr(module.path)} is stored as (in, out), and {self.library} has no {kind} for such a layer; "
                f"{TO_PEFT_LORA}"
            )
        if kernel > most == 0:
            raise ConfigError(
                f"{safe_repr(module.path)} is a convolution, and {self.library} has no {kind} of convolutions: {MERGE}"
            )
        if kernel > most:
            raise ConfigError(
                f"{safe_repr(module.path)} has a kernel of {kernel} dimensions, and {self.library} has {kind} only for "
                f"up to {most}"
            )

    def applied(
        self, encoded: EncodedAdapter, modules: Sequence[Module], choice: ExportChoice, file: AdapterFile
    ) -> EncodedAdapter:
        """Return what :meth:`encode` returned, for updates of a file that are not just added."""
        raise self._lacks("applied")

    def check_adapter(self, modules: Sequence[Module], kept: Mapping[str, np.ndarray]) -> None:
        """Raise ConfigError unless the whole adapter can be represented; by default, without kept parameters."""
        if kept:
            raise ConfigError(
                f"{self.library} has no place for the parameters that were trained alongside the adapter: "
                f"{summarize(kept)}. Convert without them {WITHOUT_KEPT}, and add them to the model yourself"
            )

    def fit_kronecker(self, updates: Sequence[ModuleUpdate], stored: Sequence[tuple[int, ...]]) -> ExportChoice | None:
        """Return updates of kind "lokr" in the form that the library loads, or None if it cannot load them.

        Parameters
        ----------
        updates : sequence of ModuleUpdate
        stored : sequence of tuple of int
            Shapes of the weights.
        """
        raise self._lacks("fit_kronecker")

    def encode(self, kind: str, modules: Sequence[Module], choice: ExportChoice, kept: Sequence[str]) -> EncodedAdapter:
        """Encode the updates of all modules as tensors.

        Parameters
        ----------
        kind : str
            One of ``kinds``.
        modules : sequence of Module
        choice : ExportChoice
            An update for each of the modules.
        kept : sequence of str
            Names of the parameters trained alongside the adapter, which are stored as well.
        """
        raise self._lacks("encode")

    def encode_file(self, kind: str, modules: Sequence[Module], file: AdapterFile) -> EncodedAdapter:
        """Encode an adapter file as tensors, without a change of structure.

        Parameters
        ----------
        kind : str
            One of ``structures``.
        modules : sequence of Module
        file : AdapterFile

        Raises
        ------
        ConfigError
            If its config has another structure.
        """
        raise self._lacks("encode_file")

    def completed(
        self, encoded: EncodedAdapter, modules: Sequence[Module], file: AdapterFile, base: Base | None
    ) -> EncodedAdapter:
        """Add what is known of the base model, and of the parameters trained alongside; by default nothing.

        Parameters
        ----------
        encoded : EncodedAdapter
        modules : sequence of Module
        file : AdapterFile
            Its ``kept`` parameters, if :meth:`check_adapter` allows them, need ``kept_names``.
        base : Base, optional

        Raises
        ------
        ConfigError
            If the library could not load them.
        """
        return encoded

    def write(
        self,
        tensors: Mapping[str, np.ndarray],
        dtypes: Mapping[str, str],
        record: Mapping[str, Any],
        config: Mapping[str, Any] | None,
    ) -> dict[str, bytes]:
        """Serialize an adapter.

        Parameters
        ----------
        tensors : mapping of str to ndarray
            The tensors that :meth:`encode` returned, in the dtype to store.
        dtypes : mapping of str to str
            Float32 arrays with "bfloat16" values, to be stored as such.
        record : mapping of str to JSON values
            Record of the conversion, for the metadata of the file.
        config : mapping, optional
            The config that :meth:`encode` returned.

        Returns
        -------
        dict of str to bytes
            Contents by the names in ``folder``, in that order; the name of an adapter's only file is ``""``.
        """
        raise self._lacks("write")

    def _lacks(self, method: str) -> ConfigError:
        return ConfigError(f"the file format {self.name!r} lacks a method: define {type(self).__name__}.{method}")


class ConversionRequest(NamedTuple):
    """The arguments of a conversion, checked.

    Attributes
    ----------
    format : FileFormat
        Its format; :class:`FileFormat` itself for a file of this library.
    kind : str
        Its method, such as "lora"; "" if only the format was named.
    rank, max_error, base, part, dtype, without_kept
        Arguments of :func:`tnadapt.convert`.
    """

    format: FileFormat
    kind: str
    rank: int | None
    max_error: float | None
    base: Any
    part: str | None
    dtype: str | None
    without_kept: bool

    @property
    def form(self) -> str:
        """Name of the form, such as "peft-lora"."""
        return f"{self.format.name}-{self.kind}" if self.kind else self.format.name


# -- An adapter of another library as a file of this one ---------------------------------------------------------------

# Each weight keeps its own form, rank and scale: where they differ, the file has several configs.


# Trial divisions spent on factoring the sides evenly, for a shorter config; readers of the file reject twice as many.
_MAX_BALANCED = 1 << 17


def file_of(adapter: ForeignAdapter) -> tuple[AdapterFile, tuple[ModuleUpdate, ...]]:
    """Return an adapter of another library as a file of this one, exactly, and the update of each of its targets.

    Notes
    -----
    The file has a :class:`tnadapt.CompositeConfig` if the weights differ in form, rank or scale. A scale that is not
    ``alpha / rank`` for any alpha is multiplied into a factor.

    Raises
    ------
    FileError
        If an array overflows when its scale is multiplied in, or a magnitude is missing or has another length.
    """
    for entry in adapter.updates:
        check_size(entry.target.label, entry.update, adapter.dtype)
    if adapter.file is not None:
        return adapter.file, tuple(entry.update for entry in adapter.updates)
    parts = [
        group
        for part in _alike(adapter.updates, _key)
        for group in ([part] if _split_size(part) is not None else _alike(part, lambda update: update.parts[0].shape))
    ]
    configs, arrays = list[tuple[Config, int]](), dict[str, Float]()
    ordered = [entry for part in parts for entry in part]
    for part in parts:
        config, absorbs = _common(part)
        for number, (_, update) in enumerate(part, start=sum(count for _, count in configs)):
            stored_update = update.absorb_scale() if absorbs else update
            arrays |= {f"group{number}.{name}": array for name, array in stored_update.arrays().items()}
        configs.append((config, len(part)))
    config = configs[0][0] if len(configs) == 1 else CompositeConfig(configs)
    stored, dtypes = narrow(arrays | _magnitudes_of(ordered, adapter.magnitudes), adapter.dtype)
    for name in arrays:
        if not np.isfinite(stored[name]).all():
            target = ordered[int(name.partition(".")[0].removeprefix("group"))].target
            raise FileError(f"the scale of {safe_repr(target.label)} makes numbers that are too large for float32")
    file = AdapterFile(
        config.replace(apply=adapter.apply), [entry.target for entry in ordered], stored, kept=adapter.kept,
        dtypes={**adapter.kept_dtypes, **dtypes}, model=adapter.model, ties=adapter.ties,
    )  # fmt: skip
    return file, tuple(entry.update for entry in ordered)


def _magnitudes_of(updates: Sequence[TargetUpdate], by_module: Mapping[str, Float]) -> dict[str, Float]:
    """Return the arrays of an adapter file with the magnitudes of its targets."""
    magnitudes = dict[str, Float]()
    for number, (target, _) in enumerate(updates if by_module else ()):
        magnitude = by_module.get(target.module)
        if magnitude is None:
            raise FileError(f"{safe_repr(target.module)} has no magnitude, and other modules have one")
        if magnitude.shape != (target.shape[0],):
            raise FileError(
                f"the magnitude of {safe_repr(target.module)} has {magnitude.size} elements; expected "
                f"{target.shape[0]}, one for each output"
            )
        magnitudes[f"weight{number}.magnitude"] = magnitude
    return magnitudes


def _alike(updates: Iterable[TargetUpdate], key: Callable[[ModuleUpdate], Hashable]) -> Iterable[list[TargetUpdate]]:
    """Group the updates by key, in the order of first appearance."""
    parts: dict[Hashable, list[TargetUpdate]] = {}
    for entry in updates:
        parts.setdefault(key(entry.update), []).append(entry)
    return parts.values()


def _key(update: ModuleUpdate) -> Hashable:
    """Return the properties that updates of one config share, except LoKr's sizes."""
    return update.kind, update.scale, update.rank, tuple(isinstance(part, Pair) for part in update.parts)


def _common(part: Sequence[TargetUpdate]) -> tuple[Config, bool]:
    """Return the common config of updates, and whether a factor of each has to absorb the scale."""
    update, split_size = part[0].update, _split_size(part)
    assert split_size is not None  # of updates of one key and size
    config = update.config().replace(split_size=split_size)
    alpha = None if update.scale == 1.0 else alpha_of([update.scale], update.rank)
    return config.replace(alpha=alpha), alpha is None


def _split_size(part: Sequence[TargetUpdate]) -> str | int | tuple[int, ...] | None:
    """Return the shortest ``split_size`` that gives every update its sizes, or None."""
    updates = [entry.update for entry in part]
    if updates[0].kind != "lokr":
        return updates[0].config().split_size
    first = updates[0].parts[0].shape
    small = sum(math.isqrt(size) for size in {math.prod(update.shape) for update in updates}) <= _MAX_BALANCED
    candidates: list[str | int | tuple[int, ...]] = ["balanced"] if small else []
    candidates += [first[0]] if len(set(first)) == 1 else []
    candidates.append(first)
    for size in candidates:
        if all(kronecker_sizes(update.shape, 2, size) == [part.shape for part in update.parts] for update in updates):
            return size
    return None
