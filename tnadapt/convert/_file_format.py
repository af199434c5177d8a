"""The contract of a file format: what :func:`tnadapt.convert` asks of the adapters of another library.

One class describes one format: it recognises, reads, encodes and writes the files. :class:`FileFormat` has defaults
that refuse what a format does not say it can hold.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np

from tnadapt.errors import ConfigError, safe_repr, summarize
from tnadapt.targets.target import Target

from ._base_model import Base, target_of
from ._files import StoredFiles
from ._unpack import Module, TargetUpdate
from ._updates import Float, ModuleUpdate

__all__ = ["KINDS", "EncodedAdapter", "ExportChoice", "FileFormat", "ForeignAdapter"]

# What an adapter can be written as; "full" is one dense update a module.
KINDS = ("lora", "lokr", "loha", "full")


class ForeignAdapter(NamedTuple):
    """An adapter as a file of another library holds it.

    Attributes
    ----------
    kind : str
        "lora", "lokr", "loha" or "full"; "" where the file mixes methods.
    updates : sequence of TargetUpdate
        At least one.
    dtype : str
        Of the stored tensors; of several, the one that holds all of their numbers.
    kept : mapping of str to ndarray
        Parameters trained beside the adapter, by their names in the base.
    kept_dtypes : mapping of str to str
        "bfloat16" for those of ``kept`` that are stored so, by ``kept.NAME``.
    model : str
        Class name of the base model, or "".
    """

    kind: str
    updates: Sequence[TargetUpdate]
    dtype: str
    kept: Mapping[str, np.ndarray] = {}
    kept_dtypes: Mapping[str, str] = {}
    model: str = ""

    @classmethod
    def of(
        cls, kind: str, updates: Mapping[str, ModuleUpdate], base: Base | None = None, dtype: str = "float32"
    ) -> ForeignAdapter:
        """Return the adapter with these updates of linear layers, by their paths; checked against the base."""
        found = [TargetUpdate(target_of(path, update.shape, base), update) for path, update in updates.items()]
        return cls(kind, found, dtype)


class ExportChoice(NamedTuple):
    """What the updates of all modules become.

    Attributes
    ----------
    updates : list of ModuleUpdate
        One a module: of kind "lora", "lokr" or "loha", or "dense" for "full".
    ranks : list of int
        The rank that the library takes each of them for.
    exact : bool
        Whether nothing but rounding is lost.
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
        In float64. They are stored in the dtype that the conversion asks for.
    scalars : mapping of str to ndarray
        Such as alpha: stored in float32, and not counted as parameters.
    config : dict, optional
        Settings in a file of their own.
    record : mapping
        What the format adds to the record of the conversion, in the metadata of its file.
    """

    tensors: dict[str, Float]
    scalars: Mapping[str, Float] = {}
    config: dict[str, Any] | None = None
    record: Mapping[str, Any] = {}


class FileFormat:
    """A file format of adapters: inherit from it, and register the class by :func:`register_file_format`.

    A format defines :meth:`detect` and :meth:`read`; :meth:`encode` and :meth:`write` if ``kinds`` is not empty; and
    :meth:`fit_kronecker` if "lokr" is among them. The other methods have defaults.

    Attributes
    ----------
    name : str
        Set by the registration.
    library : str
        For messages.
    kinds : tuple of str
        What can be written: "lora", "lokr", "loha" and "full" make the forms ``NAME-lora`` and so on.
    folder : tuple of str
        Names of the files, where an adapter is a folder with several; the last one is put in place last.
    no_attention : str
        Why the parameters of ``nn.MultiheadAttention`` cannot be converted.
    no_kronecker : str
        What to do where :meth:`fit_kronecker` finds nothing for the nearest Kronecker products.
    """

    name = ""
    library = ""
    kinds: tuple[str, ...] = ()
    folder: tuple[str, ...] = ()
    no_attention = "it has no module for nn.MultiheadAttention"
    no_kronecker = "no Kronecker product of this rank can be loaded there: give another rank"

    # -- Reading -------------------------------------------------------------------------------

    def detect(self, path: str) -> str | None:
        """Return the path of the adapter that a path leads to, or None if it is not of this format.

        The path may lead to anything, or to nothing.

        Raises
        ------
        FileError
            If it is of this format and cannot be read.
        """
        raise self._lacks("detect")

    def read(self, files: StoredFiles, base: Base | None, part: str | None) -> ForeignAdapter:
        """Read an adapter.

        Parameters
        ----------
        files : StoredFiles
            At the path that :meth:`detect` returned, or in memory: what is written is read back to measure it.
        base : Base, optional
            The base model's modules, as the caller gave them.
        part : str, optional
            Which adapter to read of a file with several.

        Raises
        ------
        FileError, TargetError
            If it is damaged or holds what an adapter file cannot.
        """
        raise self._lacks("read")

    # -- Writing -------------------------------------------------------------------------------

    def check_target(self, target: Target) -> None:
        """Raise a ConfigError unless the library can adapt the target's parameter. By default: a module's weight."""
        if target.parameter == "in_proj_weight":
            raise ConfigError(
                f"{target.name} cannot be converted to {self.library}: {self.no_attention}; merge the adapter into the "
                "model, or keep it a tnadapt file"
            )
        if target.parameter != "weight" or not target.module:
            raise ConfigError(
                f"{target.name} cannot be converted: {self.library} adapts the weight of a layer in the model, and "
                "this is another parameter"
            )

    def check_module(self, module: Module, kind: str) -> None:
        """Raise a ConfigError unless the library has such an adapter for the module. By default: matrices (out, in)."""
        if module.transposed or len(module.stored) != 2:
            what = "as (in, out)" if module.transposed else f"in {len(module.stored)} axes"
            raise ConfigError(
                f"{safe_repr(module.path)} is stored {what}, and {self.library} has {kind} for matrices (out, in) alone"
            )

    def check_adapter(self, modules: Sequence[Module], kept: Mapping[str, np.ndarray]) -> None:
        """Raise a ConfigError unless the whole adapter can be held. By default: if nothing was trained beside it."""
        if kept:
            raise ConfigError(
                f"{self.library} has no place for the parameters that were trained beside the adapter: "
                f"{summarize(kept)}. "
                "Convert without them by without_kept=True (--without-kept), and put them into the model by yourself"
            )

    def fit_kronecker(self, updates: Sequence[ModuleUpdate], stored: Sequence[tuple[int, ...]]) -> ExportChoice | None:
        """Return updates of kind "lokr" as the library loads them, or None where it cannot.

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
            Names of the parameters trained beside the adapter, which are stored, too.
        """
        raise self._lacks("encode")

    def kept_name(self, name: str) -> str:
        """Return the name of the tensor that stores a parameter trained beside the adapter."""
        raise self._lacks("kept_name")

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
            What :meth:`encode` returned, in the dtype to store.
        dtypes : mapping of str to str
            Which float32 arrays hold numbers of "bfloat16", and should be stored so.
        record : mapping of str to JSON values
            What the conversion did, for the metadata of the file.
        config : mapping, optional
            As from :meth:`encode`.

        Returns
        -------
        dict of str to bytes
            By the names in ``folder``, in that order; an adapter that is one file has the name ``""``.
        """
        raise self._lacks("write")

    def _lacks(self, method: str) -> ConfigError:
        return ConfigError(f"the file format {self.name!r} lacks a method: define {type(self).__name__}.{method}")
