"""Convert adapters from and to PEFT, LyCORIS and other libraries: exactly if possible, otherwise with a known error.

:func:`convert` reads any file as an :class:`~tnadapt.AdapterFile`, and writes that in another form (``_pipeline``).
The :class:`FileFormat` of a library (such as ``_peft_format``) reads its files as one ``ModuleUpdate`` per module, and
``_file_format`` joins these into an adapter file. For export, ``_updates`` determines the form of each module's update,
``_nearest`` chooses the form to write, and the format encodes and writes it. The result is read back to measure the
error. Other packages add a format with a class and :func:`register_file_format`.
"""

from __future__ import annotations

import importlib
import os
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

from tnadapt.argument_checks import checks_arguments
from tnadapt.lazy_names import lazy_names

if TYPE_CHECKING:
    from tnadapt.checkpoints.adapter_file import AdapterFile
    from tnadapt.checkpoints.population_changes import Attached
    from tnadapt.checkpoints.population_file import PopulationFile

    from ._base_model import Base, target_of
    from ._file_format import EncodedAdapter, ExportChoice, FileFormat, ForeignAdapter
    from ._files import StoredFiles
    from ._pipeline import Conversion, PopulationConversion, register_file_format
    from ._updates import Module, ModuleUpdate, Pair, TargetUpdate

    FORMS: tuple[str, ...]

__all__ = [
    "FORMS",
    "Base",
    "Conversion",
    "EncodedAdapter",
    "ExportChoice",
    "FileFormat",
    "ForeignAdapter",
    "Module",
    "ModuleUpdate",
    "Pair",
    "PopulationConversion",
    "StoredFiles",
    "TargetUpdate",
    "convert",
    "register_file_format",
    "target_of",
]

# Imported on first use: tnadapt itself exports convert, and most programs never call it.
_PLACES = {
    "_base_model": ("Base", "target_of"),
    "_file_format": ("EncodedAdapter", "ExportChoice", "FileFormat", "ForeignAdapter"),
    "_files": ("StoredFiles",),
    "_pipeline": ("Conversion", "PopulationConversion", "register_file_format"),
    "_updates": ("Module", "ModuleUpdate", "Pair", "TargetUpdate"),
}
_LAZY = {name: module for module, names in _PLACES.items() for name in names}


@checks_arguments
def convert(
    source: str | os.PathLike[str] | AdapterFile | PopulationFile | Attached,
    out: str | os.PathLike[str] | None = None,
    *,
    to: str = "tnadapt",
    member: int | str | None = None,
    rank: int | None = None,
    max_error: float | None = None,
    base: Any = None,
    part: str | None = None,
    dtype: str | None = None,
    without_kept: bool = False,
    overwrite: bool = False,
    progress: Callable[[int, int], None] | None = None,
) -> Conversion | Any:  # Any: a PopulationConversion, for a population without member
    """Convert an adapter between this library, PEFT, LyCORIS and others: exactly, or with a measured error.

    Parameters
    ----------
    source : str, PathLike, AdapterFile, PopulationFile or attached adapter
        A tnadapt file; a folder that PEFT saved, with LoRA, LoKr, LoHa or one of the other methods that
        :doc:`/convert_reference` lists; a safetensors file of LyCORIS or kohya (LoRA, LoKr, LoHa, full differences) or
        of diffusers (LoRA); a GGUF adapter that this library wrote; or any path that a registered file format reads. An
        attached adapter is converted as it would be saved.
    out : str or PathLike, optional
        Where to write the result: a folder for PEFT, otherwise a file. Nothing is written if None. All members of a
        population become a folder of such folders, each with the name of its member, or the number of one without.
    to : str
        "tnadapt", "peft-lora", "peft-lokr", "peft-loha", "lycoris-lora", "lycoris-lokr", "lycoris-loha",
        "lycoris-full", the same with "kohya" for "lycoris", "diffusers-lora", "gguf-lora" for llama.cpp, "vllm-lora",
        or a form of a registered file format. A format alone, such as "kohya", takes the adapter's own method if all of
        its updates have one, and otherwise LoRA. The other methods of PEFT, such as "peft-vera", are written from a
        config of that structure only.
    member : int or str, optional
        Of a population, the number or name of the member to convert. Without it, all members are converted, and ``to``
        must be a form that is a folder, such as "vllm-lora".
    rank : int, optional
        Largest rank allowed. Without it, an update keeps its rank, or gets the smallest within ``max_error``.
    max_error : float, optional
        Largest relative error allowed, in the Frobenius norm of all updates together. None allows only rounding: a
        lossy conversion must be requested.
    base : optional
        The base model: a safetensors file, an index or a folder, of which only headers are read; a model of torch; a
        mapping of modules' paths to shapes; or a list of paths. Files of LyCORIS need one, as their names lack the dots
        of the paths. For other files, the adapter's names and shapes are checked against it; a file may name the
        weights otherwise, as for :func:`tnadapt.merge`. Some of PEFT's methods do not store the shapes of the weights,
        or depend on the order of the modules, which a model or a mapping gives. If this library's adapter has arrays
        that are computed from the base weights and not stored, base must be a path: the weights are read. "gguf-lora"
        needs a path with a config.json, or the GGUF file of the model.
    part : str, optional
        The part of a diffusion pipeline, by diffusers' name or kohya's prefix, such as "unet", "text_encoder_2" or
        "lora_te2". It selects the adapter in a file of kohya's or diffusers that has those of several models, and names
        the part that is written. By default, that is the part that was read, or follows from the names of the modules;
        if they do not show it, it must be given.
    dtype : str, optional
        The dtype of the result's tensors. By default that of the source, or float32 if that would round any value.
    without_kept : bool
        Whether to omit parameters that were trained alongside the adapter, such as a classifier head.
    overwrite : bool
        Whether to replace an existing ``out``.
    progress : callable, optional
        Called with the number of members of a population that are converted and of all, after each.

    Returns
    -------
    Conversion or PopulationConversion
        The result, with the overall error and that of each weight, measured on the bytes that are written; of all
        members of a population, with the error of each.

    Raises
    ------
    ConfigError
        If the error of the result would exceed ``max_error``, or the form cannot represent it: the message states the
        error and the alternatives. Nothing is written.
    FileError, TargetError
        If the source is damaged or has content that cannot be converted, the base is another model, or ``out`` cannot
        be written.

    Notes
    -----
    These conversions are exact: LoRA of order 2 with one weight per group to LoRA; Kronecker products whose sizes
    divide the weight's to LoKr, where more than two factors are multiplied into two; LoHa to LoHa; any update of low
    matrix rank to all three; everything to "lycoris-full". Otherwise it is the truncated SVD, which LoKr and LoHa hold
    with a factor of 1 × 1 or of ones. All computations are in float64, one weight at a time. The error is also
    recorded in the metadata of the file, under "tnadapt.convert".

    Examples
    --------
    >>> import numpy as np, tnadapt as tna
    >>> plan = tna.UpdatePlan(tna.presets.lora(rank=2), [(8, 12)])
    >>> rng = np.random.default_rng(0)
    >>> arrays = {name: rng.normal(size=shape).astype("f4") for name, shape in plan.param_shapes.items()}
    >>> file = tna.AdapterFile(plan.config, [tna.Target("blocks.0.query", (8, 12), "q")], arrays)
    >>> conversion = tna.convert(file, to="peft-lora")
    >>> conversion.exact, conversion.config["r"], sorted(conversion.tensors)[0]
    (True, 2, 'base_model.model.blocks.0.query.lora_A.weight')
    >>> tna.convert(file, to="peft-lora", rank=1)
    Traceback (most recent call last):
        ...
    tnadapt.errors.ConfigError: the conversion to peft-lora would change the updates by a relative error of 0.293,
    that of blocks.0.query.weight by 0.293, and nothing but rounding is allowed: give a larger rank or a wider dtype,
    max_error=0.3 (--max-error 0.3) to accept it, or to='lycoris-full' (--to lycoris-full), which holds every update
    """
    from ._pipeline import requested, run

    request = requested(to, rank, max_error, base, part, dtype, without_kept)
    return run(source, out, request, member, overwrite, progress or (lambda done, total: None))


_lazy, __dir__ = lazy_names(__name__, _LAZY)


def __getattr__(name: str) -> Any:
    if name == "FORMS":  # never stored, as it grows with every format that is registered
        return importlib.import_module("._pipeline", __name__).forms()
    return _lazy(name)
