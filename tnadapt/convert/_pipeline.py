"""The steps of a conversion: its request, reading and writing; its result; the registry of file formats.

:func:`requested` checks the arguments, and :func:`run` carries the conversion out: it reads any file as an AdapterFile
and writes that as a :class:`Conversion`. :func:`register_file_format` adds a format.
"""

from __future__ import annotations

import collections
import dataclasses
import difflib
import math
import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, ClassVar, NamedTuple

import numpy as np

from tnadapt.argument_checks import checks_arguments, integer
from tnadapt.checkpoints.adapter_file import AdapterFile
from tnadapt.checkpoints.adapter_format import NO_MEMBERS, chosen_member, content_of, example_of, load, load_single
from tnadapt.checkpoints.atomic_files import replace_file
from tnadapt.checkpoints.container import file_error_context, missing_file, path_of
from tnadapt.checkpoints.population_changes import Attached
from tnadapt.checkpoints.population_file import MemberRows, PopulationFile, population_of_rows, rows_of
from tnadapt.errors import ConfigError, FileError, TnadaptError, escaped, pluralize, safe_repr
from tnadapt.plugins import Registry, load_plugins
from tnadapt.targets.target import Target

from . import _file_format, _updates
from ._base_model import Base, as_base, check_base, with_base_arrays
from ._file_format import ConversionRequest, FileFormat
from ._files import StoredFiles, replace_folder, replace_folders
from ._updates import Module, ModuleUpdate, Unpacked, is_embedding, place_of

# -- The table of file formats, and the names of the forms that they write ---------------------------------------------


#: The name of this library's own form.
OWN = "tnadapt"

# Files are detected in reverse order.
_formats: Registry[FileFormat] = Registry(
    "file format",
    FileFormat,
    {
        "peft": "tnadapt.convert._peft_format:PeftFormat",
        "lycoris": "tnadapt.convert._lycoris_format:LycorisFormat",
        "kohya": "tnadapt.convert._lycoris_format:KohyaFormat",
        "diffusers": "tnadapt.convert._diffusers_format:DiffusersFormat",
        "gguf": "tnadapt.convert._gguf_format:GgufFormat",
        "vllm": "tnadapt.convert._peft_format:VllmFormat",
    },
)  # fmt: skip


def register_file_format(name: str, cls: type[FileFormat]) -> None:
    """Register a file format of adapters for :func:`tnadapt.convert` and ``tnadapt convert``.

    Parameters
    ----------
    name : str
        Lower-case letters, digits, ``.`` and ``_``. The format's forms are named ``NAME-lora`` and so on.
    cls : type
        A subclass of :class:`FileFormat`, called without arguments.

    Raises
    ------
    ConfigError
        If the name has another form, is built in, or registered by another module, or the class lacks a method; the
        message names it.

    Notes
    -----
    Formats are asked to detect a path in reverse order of registration. The module that registered a name can replace
    the class, so that a notebook cell can be rerun.
    """
    if isinstance(name, str) and "-" in name:
        raise ConfigError(f"the name of a file format has no '-', which begins the form: {name}-lora; got {name!r}")
    if isinstance(name, str) and name == OWN:
        raise ConfigError(f"file format {name!r} is built in and cannot be replaced: choose another name")
    _formats.check(name, cls)
    if unknown := [method for method in cls.kinds if method not in _file_format.KINDS]:
        raise ConfigError(
            f"kinds of {cls.__name__} may have {', '.join(_file_format.KINDS)}; got {safe_repr(unknown[0])}"
        )
    asked = ["detect", "read"]
    asked += ["encode", "write"] if cls.kinds else []
    asked += ["fit_kronecker"] if "lokr" in cls.kinds else []
    asked += ["encode_file", "write"] if cls.structures else []
    if missing := [method for method in dict.fromkeys(asked) if getattr(cls, method) is getattr(FileFormat, method)]:
        raise ConfigError(f"the file format {name!r} lacks {', '.join(missing)}: define that on {cls.__name__}")
    _formats.register(name, cls)


def forms() -> tuple[str, ...]:
    """Return all valid values of ``to``: a format alone, for the adapter's own method, and with each of its methods."""
    names = [OWN]
    for name, cls in _formats.items():
        names += [name] if cls.kinds else []
        names += [f"{name}-{method}" for method in (*cls.kinds, *cls.structures)]
    return tuple(names)


def _is_form(to: str) -> bool:
    return to == OWN or to in forms()


def format_of(name: str) -> FileFormat:
    """Return a format by its name; that of this library reads and writes nothing."""
    file_format = FileFormat() if name == OWN else _formats.find(name)()
    file_format.name = name
    return file_format


# -- The request: checked arguments, and the method where only a format is named ---------------------------------------


_DTYPES = ("float32", "float16", "bfloat16", "float64")


def requested(
    to: str,
    rank: int | None,
    max_error: float | None,
    base: Any,
    part: str | None,
    dtype: str | None,
    without_kept: bool,
) -> ConversionRequest:
    """Check the arguments of :func:`tnadapt.convert`; the part is checked when the source is known."""
    if not _is_form(to):
        load_plugins()
        if not _is_form(to):
            raise _no_choice("to", to, forms())
    if dtype is not None and dtype not in _DTYPES:
        raise ConfigError(f"dtype (--dtype) must be one of {', '.join(_DTYPES)}; got {safe_repr(dtype)}")
    if max_error is not None and not 0 <= max_error <= 1:
        raise ConfigError(f"max_error (--max-error) must be a number from 0 to 1; got {safe_repr(max_error)}")
    if rank is not None:
        rank = integer("rank", rank, 1, 1 << 40, ConfigError)
        if not has_rank(to):
            raise ConfigError(f"rank={rank} (--rank) applies to LoRA, LoKr and LoHa only; {to!r} has no rank to choose")
    name, _, method = to.partition("-")
    return ConversionRequest(format_of(name), method, rank, max_error, base, part, dtype, without_kept)


def _no_choice(what: str, given: str, known: Sequence[str]) -> ConfigError:
    close = difflib.get_close_matches(given, known, n=2)
    meant = f"; did you mean {' or '.join(map(repr, close))}?" if close else ""
    return ConfigError(f"{what} (--{what}) must be one of {', '.join(known)}; got {safe_repr(given)}{meant}")


def check_part(part: str | None, source: FileFormat, target: FileFormat) -> None:
    """Raise ConfigError unless ``part`` is None, or a part that the source may have or the result may be."""
    if part is None:
        return
    known = [*source.parts_read, *target.parts_written]
    if not known:
        raise ConfigError(
            f"part={safe_repr(part)} (--part) has no effect on a conversion from {source.name} to {target.name}: only "
            "files of kohya and diffusers have parts. Leave it out"
        )
    if part not in known:
        raise _no_choice("part", part, list(dict.fromkeys(known)))


def has_rank(form: str) -> bool:
    """Return whether a form is of a rank: not the full differences, nor a structure of its own."""
    _, _, method = form.partition("-")
    return form != OWN and method in ("", *_file_format.KINDS) and method != "full"


def with_method(request: ConversionRequest, modules: Sequence[Module], unpacked: Unpacked) -> ConversionRequest:
    """Return a request with its method; for a format alone, that of all updates, or else the format's first: LoRA."""
    if request.kind:
        return request
    kinds = request.format.kinds
    methods = {form.kind if (form := module.form(unpacked)) is not None else "" for module in modules}
    common = methods.pop() if len(methods) == 1 else ""
    method = common if common in kinds else kinds[0]
    return request._replace(kind=method)


# -- The result: the adapter in its new form, its error, and how to save it --------------------------------------------


@dataclasses.dataclass(frozen=True, eq=False)
class _MeasuredConversion:
    """What was converted, and how exactly."""

    kind: str
    origin: str
    exact: bool
    error: float
    errors: Mapping[str, float]
    parameters: tuple[int, int]
    notes: tuple[str, ...] = ()

    #: What ``errors`` are of.
    _measured: ClassVar[str] = "weight"

    def __repr__(self) -> str:
        return f"{type(self).__name__}({self.origin!r} -> {self.kind!r}, {self._quality()})"

    def __str__(self) -> str:
        before, after = self.parameters
        lines = [
            f"{self.origin} -> {self.kind}, {pluralize(len(self.errors), self._measured)}",
            f"parameters {before:,} -> {after:,}",
            self._quality(),
        ]
        if not self.exact:
            worst = sorted(self.errors.items(), key=lambda item: -item[1])[:5]
            lines += [f"  {error:9.3g}  {escaped(name)}" for name, error in worst]
        return "\n".join([*lines, *map(escaped, self.notes)])

    def _quality(self) -> str:
        what = "exact but for rounding" if self.exact else "NOT exact"
        return f"{what}: relative error {self.error:.3g}"

    def to_dict(self) -> dict[str, Any]:
        """Return the fields as a JSON-compatible dictionary, without the tensors."""
        before, after = self.parameters
        return {
            "from": self.origin,
            "to": self.kind,
            "exact": self.exact,
            "error": self.error,
            "errors": {name: error if error < float("inf") else None for name, error in self.errors.items()},
            "parameters": {"before": before, "after": after},
            "notes": list(self.notes),
        }


@dataclasses.dataclass(frozen=True, eq=False, repr=False)
class PopulationConversion(_MeasuredConversion):
    """All members of a population in another form, each with its error relative to the original.

    Attributes
    ----------
    kind : str
        The new form: "peft-lora", "vllm-lora" and so on.
    origin : str
        "tnadapt".
    exact : bool
        Whether the only error of each member is that of rounding.
    error : float
        The largest error of a member.
    errors : dict of str to float
        The error of each member, as in :class:`Conversion`, by the name of its folder: the member's name, or the number
        of a member without one.
    parameters : (int, int)
        Elements of all members' tensors before and after.
    notes : tuple of str
        Remarks on the members.
    """

    _measured: ClassVar[str] = "member"


@dataclasses.dataclass(frozen=True, eq=False, repr=False)
class Conversion(_MeasuredConversion):
    """An adapter in another form, with its error relative to the original.

    Attributes
    ----------
    kind : str
        The new form: "tnadapt", "peft-lora", "lycoris-full" and so on.
    origin : str
        The form of the source; "lycoris" if a file mixes methods.
    exact : bool
        Whether the only error is that of rounding.
    error : float
        ``|new - old| / |old|``, in the Frobenius norm of all updates together, measured on the written bytes; 0 if all
        updates are zero.
    errors : dict of str to float
        The relative error of each weight, by its name in a state dict; infinite if only the new update is nonzero.
    parameters : (int, int)
        Elements of the adapter's tensors before and after.
    notes : tuple of str
        Remarks, such as that all updates are stored dense.
    file : AdapterFile or None
        The adapter, if its kind is "tnadapt".
    tensors : dict of str to ndarray
        The tensors of all other kinds, as they are written; bfloat16 values as float32, see ``dtypes``.
    dtypes : dict of str to str
        Tensors that are written as "bfloat16".
    config : dict or None
        PEFT's ``adapter_config.json``.
    files : dict of str to bytes
        The files of all kinds but "tnadapt"; ``""`` is the name of an adapter's only file.
    """

    file: AdapterFile | None = None
    tensors: Mapping[str, np.ndarray] = dataclasses.field(default_factory=dict)
    dtypes: Mapping[str, str] = dataclasses.field(default_factory=dict)
    config: Mapping[str, Any] | None = None
    files: Mapping[str, bytes] = dataclasses.field(default_factory=dict, repr=False)

    @property
    def content(self) -> bytes:
        """Content of the file with the tensors; empty for kind "tnadapt"."""
        return next(iter(self.files.values()), b"")

    @checks_arguments
    def save(self, path: str | os.PathLike[str], overwrite: bool = False) -> None:
        """Write the adapter: a folder for PEFT, otherwise a file.

        Parameters
        ----------
        path : str or PathLike
            Path in an existing folder.
        overwrite : bool
            Whether to replace an existing adapter; in a folder, only the files of the adapter are replaced.

        Raises
        ------
        FileError
            If the path exists and ``overwrite`` is not given, or the adapter cannot be written. Nothing has changed
            then. (If a disk fails between the two files of a folder, and again while the old ones are restored, the
            message says where they are.)

        Notes
        -----
        A kill at any point leaves the old adapter, the new one, or a folder without ``adapter_config.json``, which PEFT
        and this library reject. In that case, the old files are in a subfolder ``.tnadapt-….tmp/old``.
        """
        where = path_of(path)
        check_free(where, [name for name in self.files if name], overwrite)
        with file_error_context(where):
            if self.file is not None:
                replace_file(where, content_of(self.file), overwrite)
            elif "" in self.files:
                replace_file(where, self.files[""], overwrite)
            else:
                replace_folder(where, self.files, overwrite)


def check_free(path: str | os.PathLike[str], names: Sequence[str], overwrite: bool) -> None:
    """Raise FileError unless a file, or a folder with the given files, may be written at a path."""
    path = path_of(path)
    folder = os.path.dirname(os.path.realpath(path))
    if not os.path.isdir(folder):
        raise FileError(f"{path}: the folder {folder} does not exist; make it first")
    taken = os.path.lexists(path)
    if names and os.path.isdir(path):
        files = set(os.listdir(path))
        if "config.json" in files and files.isdisjoint(names):
            # transformers would take the adapter in it for a part of the model.
            raise FileError(f"{path}: is the folder of a model, as it has a config.json; give another folder")
        taken = any(os.path.lexists(os.path.join(path, name)) for name in names)
    if taken and not overwrite:
        raise FileError(f"{path}: exists; give another path, or overwrite=True (--overwrite)")


# -- The whole of a conversion -----------------------------------------------------------------------------------------


def run(
    source: str | os.PathLike[str] | AdapterFile | PopulationFile | Attached,
    out: str | os.PathLike[str] | None,
    request: ConversionRequest,
    member: int | str | None,
    overwrite: bool,
    progress: Callable[[int, int], None],
) -> Conversion | PopulationConversion:
    """Read an adapter or a population, write it in the requested form, and save that if ``out`` is given."""
    source = source.to_file() if isinstance(source, Attached) else source
    if out is not None:
        if not isinstance(source, (AdapterFile, PopulationFile)) and not os.path.lexists(path := path_of(source)):
            raise missing_file(path)
        check_free(out, request.format.folder, overwrite)
    adapter = read(source, request, member)
    if adapter.rows is not None:
        return _run_all(adapter, adapter.rows, None if out is None else path_of(out), request, overwrite, progress)
    result = write(adapter, request)
    if out is not None:
        result.save(out, overwrite)
    return result


def _run_all(
    adapter: ConvertedFrom,
    rows: MemberRows,
    out: str | None,
    request: ConversionRequest,
    overwrite: bool,
    progress: Callable[[int, int], None],
) -> PopulationConversion:
    """Convert all members of a population, and save them as folders that appear when the last one is complete."""
    population = population_of_rows(adapter.file, rows)
    folders = _member_folders(population)
    if out is not None and os.path.isdir(out):
        for folder in folders:
            check_free(os.path.join(out, folder), request.format.folder, overwrite)
    results = list[Conversion]()

    def converted() -> Iterator[tuple[str, Mapping[str, bytes]]]:
        for number, folder in enumerate(folders):
            member = population[number]
            try:
                result = write(adapter._replace(file=member), request)
            except TnadaptError as error:
                raise type(error)(f"member {number} ({folder!r}): {error}") from error
            # Without what is written, which would fill the memory.
            results.append(dataclasses.replace(result, errors={}, tensors={}, dtypes={}, config=None, files={}))
            yield folder, result.files
            progress(number + 1, len(folders))

    if out is None:
        collections.deque(converted(), maxlen=0)
    else:
        replace_folders(out, converted(), overwrite)
    return PopulationConversion(
        results[0].kind,
        OWN,
        all(result.exact for result in results),
        max(result.error for result in results),
        {folder: result.error for folder, result in zip(folders, results, strict=True)},
        (sum(result.parameters[0] for result in results), sum(result.parameters[1] for result in results)),
        tuple(dict.fromkeys(note for result in results for note in result.notes)),
    )


# In bytes, on the file systems of Linux.
_LONGEST_FOLDER = 255


def _member_folders(population: PopulationFile) -> list[str]:
    """Return the names of the members' folders: their own names, or the numbers of those without."""
    numbers = dict[str, int]()
    for number, name in enumerate(population.names):
        folder = str(number) if name is None else name
        if folder.startswith(".") or os.path.basename(folder) != folder or len(folder.encode()) > _LONGEST_FOLDER:
            problem = f"the name of member {number}, {folder!r}, cannot be that of a folder"
        elif folder in numbers:
            problem = f"members {numbers[folder]} and {number} would have the same folder, {folder!r}"
        else:
            numbers[folder] = number
            continue
        raise ConfigError(f"{problem}: convert that member alone, by member={number} (--member {number})")
    return list(numbers)


# -- Reading: any file as an AdapterFile -------------------------------------------------------------------------------


# In a folder that save_pretrained of tnadapt.torch has written.
_OWN_FILE = "adapter.safetensors"


class ConvertedFrom(NamedTuple):
    """The source of a conversion.

    Attributes
    ----------
    kind : str
        "tnadapt", "peft-lora", "lycoris-lokr" and so on; "lycoris" if a file mixes methods.
    file : AdapterFile
    parameters : int
        Number of elements of its stored tensors.
    notes : tuple of str
        Remarks from reading it.
    updates : tuple of ModuleUpdate
        The update of each target as stored in another library's file; empty for a file of this library.
    part : str
        The part of the file that was read; "" if it has no parts.
    base : Base or None
    rows : MemberRows or None
        Of a population whose members are all converted, their rows; ``file`` is then what they share.
    """

    kind: str
    file: AdapterFile
    parameters: int
    notes: tuple[str, ...] = ()
    updates: tuple[ModuleUpdate, ...] = ()
    part: str = ""
    base: Base | None = None
    rows: MemberRows | None = None


def read(source: Any, request: ConversionRequest, member: int | str | None) -> ConvertedFrom:
    """Read an adapter in any format, or a population.

    Raises
    ------
    FileError
        If there is no such file, or it is damaged or cannot be converted. The message begins with the path.
    ConfigError
        If neither the source nor the result has such a part.
    """
    adapter = _read(source, request.format, request.part, request.format.configure(request.base), member)
    if request.without_kept:
        adapter = adapter._replace(file=_without_kept(adapter.file))
    adapter.file.check_finite()
    return adapter


def _read(source: Any, target: FileFormat, part: str | None, base: Any, member: int | str | None) -> ConvertedFrom:
    with file_error_context("base"):
        known = as_base(base)
    if isinstance(source, (AdapterFile, PopulationFile)):
        check_part(part, format_of(OWN), target)
        alone = isinstance(source, AdapterFile) or member is not None
        return _from_own(chosen_member(source, member, "source ") if alone else source, target, known, base)
    path = path_of(source)
    with file_error_context(path):
        detected = _detect(path)
        if detected is None and os.path.isdir(path):
            path = os.path.join(path, _OWN_FILE)
            if not os.path.exists(path):
                raise FileError(
                    f"is a folder with neither adapter_config.json nor {_OWN_FILE} in it; give the path of an adapter"
                )
            detected = _detect(path)
    if detected is None:
        try:
            file = load(path) if member is None else load_single(path, member=member)
        except FileError:
            # Neither a file of this library nor of a registered format: a plug-in may register one.
            load_plugins()
            with file_error_context(path):
                detected = _detect(path)
            if detected is None:
                raise
        else:
            check_part(part, format_of(OWN), target)
            with file_error_context(path):
                return _from_own(file, target, known, base)
    reader, place = detected
    if member is not None:
        raise FileError(f"{path}: {NO_MEMBERS}")
    check_part(part, reader, target)
    with file_error_context(path):
        # If a format has no parts to read, the caller means a part of the result.
        return _read_foreign(reader, StoredFiles(place), known, part if reader.parts_read else None)


def _detect(path: str) -> tuple[FileFormat, str] | None:
    """Return the format that detects a path, and the path of its adapter, asking formats registered last first."""
    names = [name for name in reversed(tuple(_formats)) if name not in _formats.built_in]
    # Of the built-in formats only PEFT's are folders, so the others are not imported for one.
    names += ["peft"] if os.path.isdir(path) else reversed(_formats.built_in)
    for reader in map(format_of, names):
        if (place := reader.detect(path)) is not None:
            return reader, place
    return None


def _read_foreign(reader: FileFormat, files: StoredFiles, base: Base | None, part: str | None) -> ConvertedFrom:
    try:
        adapter = reader.read(files, base, part)
    except (TnadaptError, OSError, MemoryError):
        raise
    except Exception as error:
        if reader.name in _formats.built_in:
            raise  # a bug of ours must not look like a damaged file
        # For damaged files, other packages' libraries may raise anything.
        raise FileError(
            f"the file format {reader.name!r} ({reader.library}) cannot read it: {type(error).__name__}: {error}"
        ) from error
    form = f"{reader.name}-{adapter.kind}" if adapter.kind else reader.name
    file, updates = _file_format.file_of(adapter)
    stored = sum(update.num_parameters for update in updates) if adapter.parameters is None else adapter.parameters
    return ConvertedFrom(form, file, stored, adapter.notes, updates, adapter.part, base)


def _from_own(file: AdapterFile | PopulationFile, target: FileFormat, known: Base | None, base: Any) -> ConvertedFrom:
    rows = None
    if isinstance(file, PopulationFile):
        rows, file = rows_of(file), file.shared
        if not target.folder:
            raise ConfigError(
                f"a population of {pluralize(len(rows), 'member')} does not fit in one file: give {example_of(rows)}, "
                "or a form that is a folder, such as to='vllm-lora' (--to vllm-lora)"
            )
    if known is not None:
        check_base(file, known, base)
    return ConvertedFrom(OWN, with_base_arrays(file, base), file.num_parameters, base=known, rows=rows)


def _without_kept(file: AdapterFile) -> AdapterFile:
    dtypes = {name: dtype for name, dtype in file.dtypes.items() if name in file.arrays}
    ties = {name: others for name, others in file.ties.items() if name not in file.kept}
    return dataclasses.replace(file, kept={}, dtypes=dtypes, ties=ties)


# -- Writing: the AdapterFile in the requested form --------------------------------------------------------------------


def write(found: ConvertedFrom, request: ConversionRequest) -> Conversion:
    """Return an adapter in the requested form, with its error.

    Raises
    ------
    ConfigError
        If the error is larger than requested, or the form cannot represent the adapter.
    """
    try:
        result = _own(found, request.dtype) if request.form == OWN else _export(found, request)
    except MemoryError as error:
        rows, cols = max((target.shape for target in found.file.targets), key=math.prod)
        raise ConfigError(
            f"there is not enough memory for the largest update, {rows} × {cols}: check that the adapter is not damaged"
        ) from error
    _check_error(result, request.max_error)
    return result


def _check_error(result: Conversion, max_error: float | None) -> None:
    if result.error <= (max_error or 0.0) or (result.exact and max_error is None):
        return
    limit = "nothing but rounding" if max_error is None else f"max_error={max_error:g} (--max-error)"
    whole = not has_rank(result.kind)
    ways = "a wider dtype" if whole else "a larger rank or a wider dtype"
    full = "" if whole else f", or {_file_format.TO_FULL}"
    accept = ""
    if math.isfinite(result.error):
        unit = 10.0 ** (math.floor(math.log10(result.error)) - 1)
        least = min(1.0, math.ceil(result.error / unit) * unit)  # rounded up to two significant digits
        accept = f", max_error={least:g} (--max-error {least:g}) to accept it"
    worst = max(result.errors, key=lambda name: result.errors[name])
    raise ConfigError(
        f"the conversion to {result.kind} would change the updates by a relative error of {result.error:.3g}, that of "
        f"{worst} by {result.errors[worst]:.3g}, and {limit} is allowed: give {ways}{accept}{full}"
    )


# -- To a file of this library -------------------------------------------------------------------


def _own(found: ConvertedFrom, dtype: str | None) -> Conversion:
    file = found.file
    if dtype is None and found.kind != OWN and file.dtype in ("float16", "bfloat16") and file.depends_on_dtype:
        dtype = "float32"  # the dtype in which other libraries compute, whatever they store
    if dtype is not None:
        arrays, kinds = _updates.round_to(Unpacked(file).arrays, dtype)
        _updates.check_range(arrays, dtype)
        kept = {name: dtype_name for name, dtype_name in file.dtypes.items() if name not in file.arrays}
        file = dataclasses.replace(file, arrays=arrays, dtypes={**kept, **kinds})
    sizes = found.parameters, file.num_parameters
    if file.activation is not None:
        names = [target.name for target in file.targets]
        return Conversion(OWN, found.kind, True, 0.0, dict.fromkeys(names, 0.0), sizes, found.notes, file)
    before, after = Unpacked(found.file, found.updates), Unpacked(file)
    error, errors = _updates.errors_of(
        (target.label, before.update(number), after.update(number)) for number, target in enumerate(file.targets)
    )
    exact = all(_updates.is_rounding(value, file.dtype, True) for value in (error, *errors.values()))
    return Conversion(OWN, found.kind, exact, error, errors, sizes, found.notes, file)


# -- To another library's form -------------------------------------------------------------------


def _export(found: ConvertedFrom, request: ConversionRequest) -> Conversion:
    """Encode an adapter in another library's form, and measure the error of the bytes to write."""
    file, form, dtype = found.file, request.format, request.dtype
    if file.activation is not None:
        file.deltas()  # raises an error, as an activation has no ΔW
    modules, unpacked = _updates.modules_of(file), Unpacked(file, found.updates)
    request = with_method(request, modules, unpacked)
    form.choose_part(modules, request.part, found.part)
    _check_modules(file, modules, request)
    additive, apply = file.plan.applying.additive, file.config.apply
    applies = form.applies if request.kind == "lora" and file.config.magnitude_axis == "rows" else ()
    if not additive and apply not in applies:
        raise _file_format.not_additive(apply, request.form)
    if request.kind in form.structures:
        encoded, known = form.encode_file(request.kind, modules, file), True
    else:
        from ._nearest import choose

        choice = choose(modules, unpacked, request)
        encoded, known = form.encode(request.kind, modules, choice, list(file.kept)), choice.exact
        if not additive:
            encoded = form.applied(encoded, modules, choice, file)
    encoded = form.completed(encoded, modules, file, found.base)
    stored, kinds = (_updates.round_to if dtype is not None else _updates.narrow)(encoded.tensors, dtype or file.dtype)
    _updates.check_range(stored, dtype or file.dtype)
    scalars = {name: array.astype(np.float32) for name, array in encoded.scalars.items()}
    tensors = stored | scalars | dict(encoded.integers)
    for name, array in file.kept.items():
        for stored_name in encoded.kept_names[name]:
            tensors[stored_name] = array
            kinds |= {stored_name: "bfloat16"} if f"kept.{name}" in file.dtypes else {}
    record = {"from": found.kind, "to": request.form, "config": file.config.to_dict(), **encoded.record}
    error, errors = _measured(modules, unpacked, request, form.write(tensors, kinds, record, encoded.config))
    written = next(kinds.get(name, array.dtype.name) for name, array in stored.items())
    exact = all(_updates.is_rounding(value, written, known) for value in (error, *errors.values()))
    record |= {"exact": exact, "error": float(f"{error:.2e}")}
    files = form.write(tensors, kinds, record, encoded.config)
    sizes = found.parameters, sum(array.size for array in stored.values())
    return Conversion(
        request.form,
        found.kind,
        exact,
        error,
        errors,
        sizes,
        tensors=tensors,
        dtypes=kinds,
        config=encoded.config,
        files=files,
    )


def _check_modules(file: AdapterFile, modules: Sequence[Module], request: ConversionRequest) -> None:
    """Raise ConfigError unless the form supports all adapted modules."""
    for target in file.targets:
        if target.index is None:
            request.format.check_target(target)
        elif request.form != "peft-lora":
            raise ConfigError(
                f"{target.label} cannot be converted to {request.form!r}: it is one of the {target.stored[0]} matrices "
                f"of a parameter, as experts are kept, which only PEFT's LoRA adapts: {_file_format.TO_PEFT_LORA}, or "
                f"{_file_format.MERGE}"
            )
    for module in modules:
        if is_embedding(module) and request.kind not in request.format.embeddings:
            raise ConfigError(
                f"{safe_repr(module.path)} is an embedding, and {request.format.library} has no {request.kind} of such "
                f"a layer: {_file_format.TO_PEFT_LORA}, or {_file_format.MERGE}"
            )
        request.format.check_module(module, request.kind)
    request.format.check_adapter(modules, file.kept)


# -- Measuring -----------------------------------------------------------------------------------


def _measured(
    modules: Sequence[Module], unpacked: Unpacked, request: ConversionRequest, files: Mapping[str, bytes]
) -> tuple[float, dict[str, float]]:
    """Read the written bytes back, and return their errors, overall and per module."""
    back = _read_foreign(format_of(request.format.name), StoredFiles(contents=files), None, None).file
    again, wanted = Unpacked(back), {module.place for module in modules}
    places, others = dict[str, int](), list[Target]()
    for number, target in enumerate(back.targets):
        target_places = [place_of(alias) for alias in (target, *target.tied_targets())]
        places |= dict.fromkeys(target_places, number)
        # Other libraries store all experts of a parameter, with zeros for those without a target.
        others += [target] if target.index is None and wanted.isdisjoint(target_places) else []
    if others or not places.keys() >= wanted:
        raise FileError("what was written does not read back: please report this")
    return _updates.errors_of(
        (module.name, module.update(unpacked), again.update(places[module.place])) for module in modules
    )
