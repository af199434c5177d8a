"""Loading an adapter's file: onto a model (``load``), or with the base model that it names (``load_pretrained``)."""

from __future__ import annotations

import collections
import dataclasses
import logging
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from tnadapt.argument_checks import checks_arguments
from tnadapt.checkpoints import adapter_format
from tnadapt.checkpoints.adapter_file import AdapterFile
from tnadapt.checkpoints.checkpoint import gguf_place
from tnadapt.checkpoints.container import file_error_context
from tnadapt.checkpoints.fingerprint import Fingerprint
from tnadapt.checkpoints.population_file import PopulationFile, rows_of
from tnadapt.checkpoints.pretrained_model import Pretrained
from tnadapt.checkpoints.stored_weights import ModuleNames
from tnadapt.errors import ConfigError, FileError, TargetError, safe_repr, summarize
from tnadapt.targets.prefixes import paired, renamed_targets
from tnadapt.targets.roles import are_roles
from tnadapt.targets.target import Target

from . import _adapter_saving as saving
from ._adapter import Adapter
from ._attach import AttachRequest, carry_out
from ._base_models import LIBRARIES, describe
from ._delta import copy_all
from ._registry import refuse_merged, take_off
from ._state import ADAPTERS_ATTR, checked_pairs
from ._target_selection import find_targets
from ._trainable import keep
from ._weights import names_of_shared, numbers, split_by_file

# -- Onto a model ------------------------------------------------------------------------------------------------------


_log = logging.getLogger(__name__)


@checks_arguments
def load(
    model: nn.Module,
    path: str | os.PathLike[str],
    name: str = "default",
    *,
    member: int | str | None = None,
    check_base: bool = True,
    untie: bool = False,
    keep_tied: bool = False,
    detach_norm: bool = False,
    dropout: float = 0.0,
    dtype: torch.dtype | str | None = None,
    members: Sequence[int | str] | None = None,
    sparse: bool = False,
) -> Adapter:
    """Load an adapter, or a population, from a file and attach it.

    Parameters
    ----------
    model : Module
        The base model that it was trained on.
    path : path-like
        A file that :meth:`Adapter.save` or :func:`tnadapt.save` wrote.
    name : str
        Name of the adapter on this model.
    member : int or str, optional
        Of a population's file, the number or name of a member to load as a single adapter.
    check_base : bool
        Whether the model's weights must be those that it was trained on. False allows another model whose weights have
        the same shapes.
    untie : bool
        As in :func:`tnadapt.torch.attach`; an adapter that was attached with it must be loaded with it. A parameter
        that the file keeps of one module alone, as PEFT's ``modules_to_save`` are, becomes a copy as well.
    keep_tied : bool
        As in :func:`tnadapt.torch.attach`. A file of an adapter that was attached with it says so; it is for files that
        do not, such as those that :func:`tnadapt.extract` makes of checkpoints.
    detach_norm : bool
        As in :func:`tnadapt.torch.attach`.
    dropout : float
        As in :func:`tnadapt.torch.attach`, for training it further.
    dtype : torch.dtype or str, optional
        Dtype of the arrays, such as ``torch.bfloat16`` or ``"bfloat16"``. By default, that of the file if it is
        float32 or float64, and float32 for arrays in half precision, as in PEFT. If the update depends on the dtype,
        as frozen arrays or a start that is subtracted are rounded to it, it stays that of the file.
    members : sequence of int or str, optional
        Of a population's file, the members to load as a population, in this order; all of them by default.
    sparse : bool
        As in :func:`tnadapt.torch.attach`, for a population.

    Returns
    -------
    Adapter
        A :class:`tnadapt.torch.Population` if the file is of one. Attached, with its parameters, the choice of trained
        arrays and the kept parameters as they were saved.

    Raises
    ------
    FileError
        If the file is damaged, its random draws differ from this machine's, or it does not belong to this model: names,
        shapes, or the fingerprint of the adapted weights. The model is then unchanged.
    TargetError
        If the model already has an adapter of that name.

    Notes
    -----
    Weights are found by their paths, or by the names that transformers gives them in checkpoints. If modules have been
    renamed since, all weights are matched by role and shape.

    Float32 holds all numbers of half precision, so the update is that of the file. If it is saved again, it is in
    float32; ``dtype=`` keeps another dtype.

    Examples
    --------
    >>> import tempfile, torch, tnadapt.torch
    >>> model = torch.nn.TransformerEncoderLayer(16, 2, dim_feedforward=32, batch_first=True)
    >>> with tempfile.TemporaryDirectory() as folder:
    ...     adapter = tnadapt.torch.attach(model)
    ...     adapter.save(folder + "/adapter.safetensors")
    ...     adapter.detach()
    ...     tnadapt.torch.load(model, folder + "/adapter.safetensors").num_parameters
    368
    """
    if isinstance(path, (AdapterFile, PopulationFile)):
        raise FileError(
            "path must be that of a file; got its content: give the path that it was loaded from, or save it first "
            "with tnadapt.save(path, file)"
        )
    if member is not None and members is not None:
        raise ConfigError("member is one adapter, and members are a population: give one of the two")
    file = _content(path, member, members)
    return attach_file(
        model, file, path, name, check_base, dtype, untie=untie, keep_tied=keep_tied, detach_norm=detach_norm,
        dropout=dropout, sparse=sparse,
    )  # fmt: skip


def _content(
    path: str | os.PathLike[str], member: int | str | None, members: Sequence[int | str] | None = None
) -> AdapterFile | PopulationFile:
    if member is not None:
        return adapter_format.load_single(path, member=member)
    return adapter_format.load(path) if members is None else adapter_format.load(path, members=members)


def attach_file(
    model: nn.Module,
    content: AdapterFile | PopulationFile,
    path: str | os.PathLike[str],
    name: str,
    check_base: bool,
    dtype: torch.dtype | str | None = None,
    **options: Any,
) -> Adapter:
    """Attach an adapter that was read from a path, with these options of ``attach``; see :func:`load`."""
    arrays: Mapping[str, Any]
    if isinstance(content, PopulationFile):
        file, arrays = content.shared, rows_of(content).arrays()
        options |= {"population": len(content), "names": content.names}
    else:
        file, arrays = content, content.arrays
    with file_error_context(os.fsdecode(path)):
        dtype = _dtype_on_load(file) if dtype is None else dtype
        targets = _located(model, file)
        saving.check_kept(model, file)
        copies = split_by_file(model, file, options.get("untie", False), options.get("keep_tied", False))
        kept = _kept(model, file, copies)
        base = _base(model, targets, file.base)
        if check_base and file.base is not None and base is not None:
            difference = file.base.difference(base)
            if difference is not None:
                apart, close = file.base.apart(base), ""
                if apart < 0.5:  # unrelated models are 1.4 apart
                    close = (
                        f"They are about {100 * apart:.2g} % apart, as quantized weights are from the originals (a "
                        "common factor of all weights does not count). "
                    )
                raise FileError(
                    f"it was trained on another base model than this {type(model).__name__}: of the adapted weights, "
                    f"{difference}. {close}Give the model it was trained on, or check_base=False"
                )
        if not file.complete and (not check_base or file.base is None or base is None):
            raise FileError(
                "its arrays are computed from the base weights, which have to be those that it was trained on: give "
                "the model with its weights and leave check_base=False out, or save the adapter with store_bases=True"
            )
    request = AttachRequest(
        model, file.config, targets, name, kept=kept, activation=file.activation, dtype=dtype, given=file.given,
        fresh=False, copies=copies, **options,
    )  # fmt: skip
    before: list[tuple[Tensor, Tensor]] = []
    try:
        adapter = carry_out(request)
        state = adapter._state
        state.alone += tuple(weight for weight, others in file.ties.items() if not others and weight not in state.alone)
        state.pretrained = _recorded(model, file.pretrained, check_base)
        pairs = saving.kept_pairs(model, file)
        before = [(tensor, tensor.detach().clone()) for tensor, _ in pairs]
        copy_all([*checked_pairs(state, arrays), *pairs])
        keep(state, file.trained)
    except BaseException:  # KeyboardInterrupt, too, at any point after attaching
        with torch.no_grad():
            for tensor, value in before:
                tensor.copy_(value)
        left = model.__dict__.get(ADAPTERS_ATTR, {}).get(name)
        if left is not None:
            take_off(left)
        raise
    _log.info("loaded %r", adapter)
    return adapter


@checks_arguments
def from_pretrained(
    model: nn.Module,
    folder: str | os.PathLike[str],
    name: str = "default",
    *,
    member: int | str | None = None,
    check_base: bool = True,
    untie: bool = False,
    keep_tied: bool = False,
    detach_norm: bool = False,
    dropout: float = 0.0,
    dtype: torch.dtype | str | None = None,
    revision: str | None = None,
    token: str | bool | None = None,
) -> Adapter:
    """Attach the adapter that :meth:`Adapter.save_pretrained` wrote to a folder, or one on the hub; see :func:`load`.

    ``revision`` and ``token`` are those of a repository on the hub. :func:`load_pretrained` builds the model, too.
    """
    path = saving.adapter_path(folder, revision, token)
    return load(
        model, path, name, member=member, check_base=check_base, untie=untie, keep_tied=keep_tied,
        detach_norm=detach_norm, dropout=dropout, dtype=dtype,
    )  # fmt: skip


def _dtype_on_load(file: AdapterFile) -> torch.dtype:
    """Return the default dtype of a loaded adapter's arrays: half precision is for storage, not for training."""
    dtype: torch.dtype = getattr(torch, file.dtype)
    return dtype if dtype.itemsize > 2 or file.depends_on_dtype else torch.float32


def _recorded(model: nn.Module, about: Pretrained | None, check_base: bool) -> Pretrained | None:
    """Return what the file says about its base, or for another base only the parts that do not depend on it."""
    if about is None or check_base or (pretrained := describe(model)) is None:
        return about
    labels = about.labels if len(about.labels) == len(pretrained.labels) else pretrained.labels
    return dataclasses.replace(pretrained, labels=labels, inputs=about.inputs)


def _located(model: nn.Module, file: AdapterFile) -> list[Target]:
    """Return the file's targets on this model, at the recorded paths or else by equal roles and shapes."""
    try:
        return find_targets(model, list(file.targets), untie=True)
    except TargetError as error:
        wrong = str(error).partition(";")[0]
        for target in file.targets:
            if wrong.startswith(f"{target.name} is stored as "):
                wrong += f", and was stored as {target.stored} when it was trained"
                if "which is (in, out)" in wrong and not target.transposed:
                    wrong += (
                        "; if the file was converted, convert it again with base= (--base), the folder of the model"
                    )
    renamed = _renamed(model, file.targets)
    if renamed is not None:
        return find_targets(model, renamed, untie=True)
    roles = "".join(dict.fromkeys(target.role for target in file.targets))
    if not are_roles(roles):
        raise FileError(f"this {type(model).__name__} does not have its weights: {wrong}")
    try:
        candidates = find_targets(model, roles)
    except TargetError:
        candidates = []
    theirs, ours = ([(target.role, target.shape) for target in targets] for targets in (file.targets, candidates))
    partners = paired(file.targets, candidates)
    if partners is None:
        unclear = " that can be matched unambiguously" if sorted(theirs) == sorted(ours) else ""
        raise FileError(
            f"this {type(model).__name__} does not have its weights ({wrong}), nor weights of the same roles and "
            f"shapes{unclear}: the file has {_counted(theirs)}, the model {_counted(ours)}. "
            "Load it on the model that it was trained on"
        )
    return [dataclasses.replace(new, layer=old.layer) for new, old in zip(partners, file.targets, strict=True)]


def _kept(model: nn.Module, file: AdapterFile, copies: Sequence[str]) -> list[str]:
    """Return the file's kept parameters by their names on the model, which for a tied weight is the first one."""
    names = names_of_shared(model)
    kept = list(dict.fromkeys(name if name in copies else names.get(name, [name])[0] for name in file.kept))
    both = next((target.name for target in file.targets if target.name in kept), None)
    if both is not None:
        raise FileError(f"it both updates and keeps {both}: it can be adapted or trained itself, not both")
    return kept


def _renamed(model: nn.Module, targets: Sequence[Target]) -> list[Target] | None:
    """Return targets named as in a checkpoint (such as from :func:`tnadapt.extract`) with the names of a model."""
    config: Any = getattr(model, "config", None)
    shapes = {name: tuple(parameter.shape) for name, parameter in model.named_parameters()}
    if not callable(getattr(config, "to_dict", None)) or all(target.name in shapes for target in targets):
        return None
    names = ModuleNames({**config.to_dict(), "architectures": [type(model).__name__]}).inverse(shapes)
    renamed = renamed_targets(targets, shapes, lambda name: names.get(name, []))
    return None if renamed is None else [renamed[1].target(target) for target in renamed[0]]


def _counted(weights: list[tuple[str, tuple[int, int]]]) -> str:
    counts = collections.Counter(weights)
    listed = [f"{count} {role} of {rows}×{cols}" for (role, (rows, cols)), count in list(counts.items())[:6]]
    return ", ".join(listed) + (", …" if len(counts) > 6 else "") or "none"


def _base(model: nn.Module, targets: list[Target], expected: Fingerprint | None) -> Fingerprint | None:
    refuse_merged(model, "another adapter is saved or loaded")
    weights: list[Tensor | None] = []
    for target in targets:
        weight = numbers(model.get_submodule(target.module), target.parameter)
        weights.append(None if weight is None else target.select(weight))
    return saving.fingerprint_of(weights, expected)


# -- Ready to predict, from the file alone: the base is built as the file says -----------------------------------------


@checks_arguments
def load_pretrained(
    where: str | os.PathLike[str],
    *,
    member: int | str | None = None,
    base: str | os.PathLike[str] | nn.Module | None = None,
    device: str | torch.device | None = None,
    dtype: torch.dtype | None = None,
    quantization_config: Any = None,
    revision: str | None = None,
    token: str | bool | None = None,
    name: str = "default",
    check_base: bool = True,
    merge: bool = False,
    untie: bool = False,
    detach_norm: bool = False,
) -> nn.Module:
    """Build the base model that an adapter's file records, attach the adapter, and return the model in eval mode.

    Parameters
    ----------
    where : path-like or str
        A folder that :meth:`Adapter.save_pretrained` wrote, a file that :meth:`Adapter.save` wrote, or the name of a
        repository on the hub.
    member : int or str, optional
        As in :func:`load`.
    base : path-like, str or Module, optional
        The base to use instead of the recorded one: a folder, a GGUF file, a name on the hub, or a model, which is
        changed in place.
    device : str or torch.device, optional
        Where to put the model; the CPU if None.
    dtype : torch.dtype, optional
        The dtype of the base; that of the model when the adapter was saved if None.
    quantization_config : object, optional
        Loads the base quantized, as in ``from_pretrained`` of transformers.
    revision, token
        Of the adapter's repository on the hub. The revision of the base is in the file.
    name, check_base, untie, detach_norm
        As in :func:`load`.
    merge : bool
        Whether to merge ΔW into the weights (:meth:`Adapter.merge`), so that the model runs as fast as its base.

    Returns
    -------
    Module
        A model of transformers, whose ``config.id2label`` has the labels, or of timm, whose
        ``pretrained_cfg["label_names"]`` has. ``adapters(model)`` has the adapter's handle, whose ``pretrained`` has
        all that the file records; :func:`load_processor` returns the tokenizer or processor.

    Raises
    ------
    FileError
        If the file is damaged or does not say what its base is, the base is not the one that it was trained on, or some
        parameters are neither in the base nor in the file.
    TnadaptError
        If the base cannot be loaded, or a library is missing: the extra ``hub`` has them.

    Notes
    -----
    A file may come from someone else. It can name a base, of which only safetensors and GGUF files are read; no code
    from a repository is run. With ``base`` you decide what is loaded.

    Examples
    --------
    >>> import tempfile, torch, transformers, tnadapt.torch
    >>> config = transformers.BertConfig(
    ...     vocab_size=40, hidden_size=16, num_hidden_layers=1, num_attention_heads=2, intermediate_size=32)
    >>> folder = tempfile.TemporaryDirectory()
    >>> transformers.BertModel(config).save_pretrained(folder.name + "/base")
    >>> model = transformers.BertForSequenceClassification.from_pretrained(
    ...     folder.name + "/base", id2label={0: "bad", 1: "good"})
    >>> adapter = tnadapt.torch.attach(model, "superlora", keep_trainable="classifier", rank=2)
    >>> adapter.save(folder.name + "/mine.safetensors")
    >>> loaded = tnadapt.torch.load_pretrained(folder.name + "/mine.safetensors")
    >>> type(loaded).__name__, loaded.config.id2label
    ('BertForSequenceClassification', {0: 'bad', 1: 'good'})
    >>> folder.cleanup()
    """
    if device is not None:
        _check_usable(device)
    path = saving.adapter_path(where, revision, token)
    # One adapter is merged: a population is refused before the base is loaded.
    content = adapter_format.load_single(path, member=member) if merge else _content(path, member)
    file = content.shared if isinstance(content, PopulationFile) else content
    with file_error_context(os.fsdecode(path)):
        about = _about(file, base)
        if isinstance(base, nn.Module):
            model = base
        else:
            dtype = dtype or (getattr(torch, about.dtype) if about.dtype else None)
            model, random = LIBRARIES[about.library].build(
                about, device=device, dtype=dtype, quantization_config=quantization_config, token=token,
                trusted=base is not None,
            )  # fmt: skip
            _check_known(file, about, type(model).__name__, random)
    if device is not None and quantization_config is None:
        model = model.to(device)
    adapter = attach_file(model, content, path, name, check_base, untie=untie, detach_norm=detach_norm)
    try:
        LIBRARIES[about.library].set_labels(model, about)
        if merge:
            adapter.merge()
    except BaseException:  # leave no part of it on the caller's model
        adapter.detach()
        raise
    return model.eval()


@checks_arguments
def load_processor(
    where: str | os.PathLike[str], *, revision: str | None = None, token: str | bool | None = None
) -> Any:
    """Return what prepares a model's inputs: the tokenizer or processor saved with an adapter, or else its base's.

    Parameters
    ----------
    where, revision, token
        As in :func:`load_pretrained`.

    Returns
    -------
    object
        The tokenizer, image processor, feature extractor or processor of transformers, by the task; timm's transform
        of images for evaluation for a model of timm.

    Raises
    ------
    FileError
        If the file is damaged, or does not say for which task its model is.
    TnadaptError
        If it cannot be loaded, or a library is missing.

    Examples
    --------
    >>> import tempfile, transformers, tnadapt.torch
    >>> words = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", "bad", "good"]
    >>> config = transformers.BertConfig(
    ...     vocab_size=len(words), hidden_size=16, num_hidden_layers=1, num_attention_heads=2, intermediate_size=32)
    >>> adapter = tnadapt.torch.attach(transformers.BertForSequenceClassification(config), "superlora", rank=2)
    >>> tokenizer = transformers.BertTokenizerFast({word: number for number, word in enumerate(words)})
    >>> with tempfile.TemporaryDirectory() as folder:
    ...     adapter.save_pretrained(folder, tokenizer=tokenizer)
    ...     load_processor(folder)("good bad")["input_ids"]
    [2, 6, 5, 3]
    """
    path = saving.adapter_path(where, revision, token)
    file = adapter_format.load(path, check_draws=False)
    about = (file.shared if isinstance(file, PopulationFile) else file).pretrained
    with file_error_context(os.fsdecode(path)):
        if about is None:
            raise FileError("it does not say what its base model is: load its tokenizer or processor yourself")
        folder = _own_folder(where, path, revision, token)
        if folder is None:
            _refuse_remote(about)
        return LIBRARIES[about.library].processor(about, folder, token)


def _refuse_remote(about: Pretrained) -> None:
    """Raise a FileError if a file's base is a remote address or a network share."""
    if about.remote:
        raise FileError(
            f"it names as its base {safe_repr(about.name)}, an address or network share, which is not opened because a "
            "file says so: give base= (--base) with it, or load the tokenizer or processor yourself"
        )


def _check_usable(device: str | torch.device) -> None:
    """Raise a ConfigError unless tensors can be created on a device."""
    try:
        torch.zeros(0, device=device)
    except Exception as error:  # an AssertionError if torch was built without CUDA
        reason = (str(error).splitlines() or [""])[0][:200]
        raise ConfigError(
            f"device must be one that torch can use here, such as 'cpu'; got {safe_repr(device)}: {reason}"
        ) from error


def _about(file: AdapterFile, base: str | os.PathLike[str] | nn.Module | None) -> Pretrained:
    """Return the description of the base to build: from the file, with the caller's base."""
    if isinstance(base, nn.Module):
        return file.pretrained or Pretrained()
    if file.pretrained is None:
        of_class = f", only its class {safe_repr(file.model)}" if file.model else ""
        raise FileError(
            f"it does not say what its base model is{of_class}: give the model itself, base=model, or load the adapter "
            "onto it by tna.torch.load, and save it again"
        )
    if base is None:
        _refuse_remote(file.pretrained)
        return file.pretrained
    about, name = file.pretrained, os.fspath(base)
    same = name == about.name
    if same or (about.file and os.path.isfile(os.path.join(name, about.file))):
        return dataclasses.replace(about, name=name, revision=about.revision if same else "")
    folder, gguf = gguf_place(name)
    return dataclasses.replace(about, name=folder, revision="", file=gguf)


def _check_known(file: AdapterFile, about: Pretrained, built: str, random: frozenset[str]) -> None:
    """Raise FileError if a parameter is neither in the base nor in the file."""
    unknown = random - file.kept.keys()
    if unknown and file.model and built != file.model:
        raise FileError(
            f"its base model {safe_repr(about.name)} is a {built}, and the adapter was trained on a "
            f"{safe_repr(file.model)}: give base= (--base) with the model it was trained on"
        )
    if unknown:
        raise FileError(
            f"its base model {safe_repr(about.name)} has no values for {summarize(unknown)}, and neither does the "
            "file, so that the model's outputs would be random: attach with keep_trainable for these parameters, "
            "train and save again; or give base= (--base) with a model that has them"
        )


def _own_folder(
    where: str | os.PathLike[str], path: Path, revision: str | None, token: str | bool | None
) -> str | None:
    """Return the folder with the files of the adapter's own tokenizer or processor, or None if there are none."""
    if saving.is_repository(where):
        folder = saving.processor_folder(str(where), revision, token)
    elif path.name == saving.FILE_NAME:
        folder = path.parent
    else:
        return None
    return str(folder) if any((folder / name).is_file() for name in saving.PROCESSOR_FILES) else None
