"""Saving an adapter and kept parameters: to a file, a folder with a model card, the hub; swapping in another's file.

:func:`to_file` builds the content of a file from an adapter on a model. A folder (:func:`save_folder`) has it, its
card (:func:`model_card`) and the files of a tokenizer or processor; it can be downloaded (:func:`adapter_path`).
:class:`AdapterFiles` has the methods of an adapter.
"""

from __future__ import annotations

import dataclasses
import functools
import hashlib
import json
import logging
import os
import re
import tempfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from tnadapt.algebra.config import Config
from tnadapt.argument_checks import checks_arguments
from tnadapt.checkpoints import adapter_format
from tnadapt.checkpoints.adapter_file import KEPT, AdapterFile
from tnadapt.checkpoints.container import file_error_context, path_of
from tnadapt.checkpoints.fingerprint import Fingerprint, compare, fingerprint
from tnadapt.checkpoints.population_file import PopulationFile
from tnadapt.checkpoints.pretrained_model import Pretrained, is_local
from tnadapt.errors import ConfigError, FileError, TargetError, TnadaptError, escaped, pluralize, safe_repr
from tnadapt.report import TextTable
from tnadapt.targets.target import Target

from . import _merging as merging
from ._base_models import describe, imported, refusing
from ._delta import copy_all, gather_full, reshard
from ._registry import refuse_merged
from ._state import AdapterState, checked_pairs, named_parameters, need_attached
from ._weights import DTYPES, names_of_shared, split_by_file, tensors_of

_log = logging.getLogger(__name__)


# -- The check that a file's adapter has the same form as one on a model -----------------------------------------------


def check_same(adapter: AdapterState, file: AdapterFile) -> None:
    """Raise a FileError unless config, activation, targets and kept parameters are the same."""
    names = names_of_shared(adapter.model)
    # An adapter keeps the first name of a tied weight, a file any of them.
    their_kept, our_kept = (sorted({names.get(name, [name])[0] for name in kept}) for kept in (file.kept, adapter.kept))
    compared: list[tuple[str, Any, Any, Callable[[Any, Any], str]]] = [
        # Settings of training do not change any array.
        ("config", file.config.replace(rate="sgd"), adapter.plan.config.replace(rate="sgd"), _settings),
        ("activation", file.activation, adapter.activation, _values),
        ("list of targets", _places(file.targets), _places(adapter.targets), _targets),
        ("list of kept parameters", their_kept, our_kept, _values),
    ]
    for what, theirs, ours, difference in compared:
        if theirs != ours:
            raise FileError(
                f"its {what} differs from that of adapter {adapter.name!r} ({difference(theirs, ours)}): attach the "
                "adapter as it was for this file, or load the file under another name"
            )


def _values(theirs: Any, ours: Any) -> str:
    return f"{safe_repr(theirs)} in the file, {safe_repr(ours)} here"


def _settings(theirs: Any, ours: Any) -> str:
    """Describe the settings that differ."""
    mine, other = ours.to_dict(), theirs.to_dict()
    names = [name for name in mine if name in other and mine[name] != other[name]]
    if not names or mine.keys() != other.keys() or "parts" in mine:
        return _values(theirs, ours)
    return "; ".join(f"{name}: {_values(other[name], mine[name])}" for name in names)


def _targets(theirs: Sequence[tuple[Any, ...]], ours: Sequence[tuple[Any, ...]]) -> str:
    numbers = f"{pluralize(len(theirs), 'weight')} in the file, {len(ours)} here"
    for where, places, others in (("here", theirs, ours), ("in the file", ours, theirs)):
        for place in places:
            if place not in others:
                return f"{numbers}; not {where}: {safe_repr(place[0])} of {place[1]}"
    return f"{numbers}, in another order"


def _places(targets: Sequence[Target]) -> list[tuple[Any, ...]]:
    return [(target.label, target.shape, target.index, target.rows, target.tied) for target in targets]


# -- The file, and swapping in the arrays of another one ---------------------------------------------------------------


def population_to_file(
    population: AdapterState, about: Pretrained | None = None, store_bases: bool = False
) -> PopulationFile:
    """Return the contents of a population's file; see :func:`to_file`."""
    assert population.members is not None
    shared = to_file(population.members.state(population, 0), about, store_bases)
    stacked = {name: _on_host(population, array) for name, array in named_parameters(population)}
    return PopulationFile(shared, population.plan.to_arrays(stacked), population.members.names)


def content_of(
    adapter: AdapterState, about: Pretrained | None = None, store_bases: bool = False
) -> AdapterFile | PopulationFile:
    """Return the contents of the file of an adapter or population."""
    return (to_file if adapter.members is None or adapter.whole is not adapter else population_to_file)(
        adapter, about, store_bases
    )


def _on_host(adapter: AdapterState, tensor: Tensor) -> np.ndarray:
    """Return a tensor as a NumPy array of its own, bfloat16 as float32."""
    if tensor.device.type == "meta":
        raise TargetError(f"adapter {adapter.name!r} is on the meta device and has no values to save")
    tensor = gather_full(tensor.detach()).cpu()
    return (tensor.float() if tensor.dtype is torch.bfloat16 else tensor).numpy().copy()


def to_file(adapter: AdapterState, about: Pretrained | None = None, store_bases: bool = False) -> AdapterFile:
    """Return the contents of an adapter's file; if the model is sharded, every process must call.

    The arrays that are computed from the base weights are included with ``store_bases``, and where the weights have no
    fingerprint by which the file could recognize them.
    """
    if adapter.plan.needs_base:
        raise TargetError(
            f"adapter {adapter.name!r} has arrays that are computed from the base weights, which had no values when it "
            "was attached: call reset() once the model has its weights"
        )
    # NumPy would share the memory of what FSDP2 has gathered, which could then not be freed.
    reshard(adapter.model, adapter.owner)
    plan, base = adapter.plan.file_plan, base_fingerprint(adapter)
    left_out = {} if store_bases or base is None else plan.base_shapes
    dtypes: dict[str, str] = {}

    def host(name: str, tensor: Tensor) -> np.ndarray:
        if tensor.dtype is torch.bfloat16:
            dtypes[name] = "bfloat16"
        return _on_host(adapter, tensor)

    tensors, shared = tensors_of(adapter.model), names_of_shared(adapter.model)
    ties: dict[str, tuple[str, ...]] = dict.fromkeys(adapter.alone, ())
    ties |= {name: tuple(other for other in shared[name] if other != name) for name in adapter.kept if name in shared}
    return AdapterFile(
        config=plan.config,
        targets=adapter.targets,
        arrays=adapter.plan.to_arrays({name: host(name, parameter) for name, parameter in named_parameters(adapter)}),
        kept={name: host(KEPT + name, tensors[name]) for name in adapter.kept},
        dtypes=dtypes,
        base=base,
        activation=adapter.activation,
        model=adapter.model_name,
        trained=adapter.trained,
        given={name: array for name, array in plan.given.items() if name not in left_out},
        pretrained=about,
        ties=ties,
    )


def base_fingerprint(adapter: AdapterState) -> Fingerprint | None:
    """Return the fingerprint of the adapted weights without the update; None if one cannot be dequantized."""
    refuse_merged(adapter.model, "another adapter is saved or loaded", adapter)
    weights = [merging.original(adapter, index) for index in range(len(adapter.targets))]
    adapter.base = fingerprint_of(weights, adapter.base)
    return adapter.base


def fingerprint_of(weights: list[Tensor | None], expected: Fingerprint | None = None) -> Fingerprint | None:
    """Return the fingerprint of weights; None if one has no numbers.

    Where it is probably the expected one, only the SHA-256 is computed, which takes a fraction of the time.
    """
    known = [weight for weight in weights if weight is not None and weight.device.type != "meta"]
    dtypes = {weight.dtype for weight in known}
    if len(known) != len(weights) or not known or not dtypes <= DTYPES.keys():
        return None
    # Several dtypes are promoted to one that represents all their values.
    dtype = functools.reduce(torch.promote_types, dtypes)

    def host() -> Iterator[np.ndarray]:
        for weight in known:
            tensor = weight.detach().cpu().to(dtype).contiguous()
            yield tensor.view(torch.int16).numpy().view(np.uint16) if tensor.dtype is torch.bfloat16 else tensor.numpy()

    if expected is not None and expected.dtype == DTYPES[dtype] and compare(expected, host(), DTYPES[dtype]) is None:
        return expected
    return fingerprint(host(), DTYPES[dtype])


def is_writer() -> bool:
    """Return whether this process writes files: process 0 of several."""
    distributed = torch.distributed.is_available() and torch.distributed.is_initialized()
    return not distributed or torch.distributed.get_rank() == 0


def swap(adapter: AdapterState, path: str | os.PathLike[str], member: int | str | None = None) -> None:
    """Load another adapter's arrays in place; see :meth:`Adapter.swap`."""
    need_attached(adapter)
    file = adapter_format.load_single(path, like=adapter.plan.file_plan, member=member)
    with file_error_context(os.fsdecode(path)):
        check_same(adapter, file)
        check_kept(adapter.model, file)
        split_by_file(adapter.model, file, False)
        base = base_fingerprint(adapter)
        if file.base is not None and base is not None and not file.base.matches(base):
            raise FileError(f"it was trained on another base model: {file.base.difference(base)}")
        frozen = adapter.plan.given
        brought = [name for name in frozen if name not in adapter.plan.base_shapes]
        for array in dict.fromkeys([*file.given, *brought]):
            if array not in frozen or array not in file.given or not np.array_equal(file.given[array], frozen[array]):
                raise FileError(
                    f"its frozen array {array!r} differs from that of adapter {adapter.name!r}: load it under another "
                    "name"
                )
    copy_all([*checked_pairs(adapter, file.arrays), *kept_pairs(adapter.model, file)])


def check_kept(model: nn.Module, file: AdapterFile) -> None:
    """Raise a FileError if the model lacks a parameter that the file keeps, or its shape differs."""
    tensors = tensors_of(model)
    for name, array in file.kept.items():
        tensor = tensors.get(name)
        if tensor is None:
            raise FileError(
                f"it keeps {name!r}, which this {type(model).__name__} does not have: build the model with that part, "
                "as for training, or let tnadapt.torch.load_pretrained build it"
            )
        if tuple(tensor.shape) != array.shape:
            raise FileError(
                f"it keeps {name!r} of shape {array.shape}, and this model's is {tuple(tensor.shape)}: "
                "build the model with the head that it was trained with"
            )


def kept_pairs(model: nn.Module, file: AdapterFile) -> list[tuple[Tensor, np.ndarray]]:
    """Return the model's tensors that the file keeps, with their values in the file."""
    tensors = tensors_of(model)
    return [(tensors[name], array.copy()) for name, array in file.kept.items()]


# -- The Hugging Face Hub: where an adapter is, downloads of its file, uploads of its folder ---------------------------


#: Names of the adapter and of its card in a folder or repository.
FILE_NAME = "adapter.safetensors"
README = "README.md"

#: A tokenizer or processor has at least one of these files.
PROCESSOR_FILES = ("tokenizer_config.json", "preprocessor_config.json", "processor_config.json")
# All files that they may have; no code.
_PROCESSOR_PATTERNS = [
    *PROCESSOR_FILES, "tokenizer*.json", "special_tokens_map.json", "added_tokens.json", "vocab.*", "merges.txt",
    "*.model", "*.jinja",
]  # fmt: skip

_ADAPTER_REPOSITORY = re.compile(r"\w[\w.-]*/\w[\w.-]*", re.ASCII)


def is_repository(where: str | os.PathLike[str]) -> bool:
    """Return whether this is a name on the hub: no file or folder here, and not written like one."""
    name = path_of(where)
    if isinstance(where, os.PathLike) or os.path.exists(name):
        return False
    return _ADAPTER_REPOSITORY.fullmatch(name) is not None and not name.endswith(".safetensors")


def adapter_path(where: str | os.PathLike[str], revision: str | None = None, token: str | bool | None = None) -> Path:
    """Return the path of an adapter's file: the file itself, one in a folder, or a download from the hub.

    Raises
    ------
    FileError
        If there is none.
    TnadaptError
        If huggingface_hub is not installed.
    """
    if is_repository(where):
        name = str(where)
        what = f"{FILE_NAME} of {safe_repr(name)}, which is no file or folder here,"
        return _downloaded(what, "hf_hub_download", name, filename=FILE_NAME, revision=revision, token=token)
    path = Path(path_of(where))
    if path.is_dir():
        if not (path / FILE_NAME).is_file():
            hint = ""
            if (path / "adapter_config.json").is_file():
                hint = "; it has an adapter of PEFT, which tnadapt.convert (tnadapt convert) turns into one"
            elif (path / "config.json").is_file():
                hint = "; it has a model: tnadapt.torch.attach adapts it, and load puts a saved adapter on it"
            raise FileError(f"{path}: this folder has no {FILE_NAME}, which save_pretrained writes{hint}")
        return path / FILE_NAME
    if not path.exists():
        raise FileError(f"{path}: there is no such file or folder; a name on the hub is like 'user/my-adapter'")
    return path


def _downloaded(what: str, function: str, name: str, **options: Any) -> Path:
    """Return where a function of huggingface_hub puts files of a repository."""
    with refusing(
        f"cannot download {what} from the hub", "check the name, the network and the token, or give a folder"
    ):
        return Path(getattr(_hub(), function)(name, **options))


def processor_folder(name: str, revision: str | None, token: str | bool | None) -> Path:
    """Download the files of a repository's tokenizer or processor; return their folder."""
    return _downloaded(
        f"the tokenizer or processor of {safe_repr(name)}", "snapshot_download", name, revision=revision, token=token,
        allow_patterns=_PROCESSOR_PATTERNS,
    )  # fmt: skip


def _hub() -> Any:
    return imported("huggingface_hub", "talks to the hub")


# -- The model card, README.md, whose front matter hubs read -----------------------------------------------------------


# Names of repositories on the hub.
_MODEL_REPOSITORY = re.compile(r"[A-Za-z0-9][\w.-]*(/[A-Za-z0-9][\w.-]*)?", re.ASCII)
_MARK = re.compile(r"\n<!-- tnadapt wrote this: ([0-9a-f]{16}) -->\n\Z")
#: Maximum number of labels that a card lists.
_LISTED = 20
# Maximum length of a setting, such as explicit groups.
_LONG = 200
#: Tasks with a different name on the hub.
_HUB_TASKS = {"speech-seq2seq": "automatic-speech-recognition", "speech-ctc": "automatic-speech-recognition"}


def model_card(file: AdapterFile | PopulationFile, where: str, metrics: Mapping[str, float]) -> str:
    """Return the text of a card.

    Parameters
    ----------
    file : AdapterFile or PopulationFile
    where : str
        The name of the folder or repository, from which the card loads the adapter.
    metrics : dict of str to float
    """
    shared, members = (file.shared, len(file)) if isinstance(file, PopulationFile) else (file, None)
    about = shared.pretrained or Pretrained()
    lines = ["---", *_front_matter(about), "---", "", f"# {_text(Path(where).name)}", ""]
    lines += [*_what(shared, about, members), ""]
    if about.labels:
        listed = ", ".join(f"{number} {_text(label)}" for number, label in enumerate(about.labels[:_LISTED]))
        more = len(about.labels) - _LISTED
        lines += [f"Labels: {listed}" + (f" and {more} more." if more > 0 else "."), ""]
    if metrics:
        rows = [(_text(name), f"{value:.6g}") for name, value in metrics.items()]
        lines += ["## Results", "", TextTable(rows, ("metric", "value")).markdown(), ""]
    lines += ["## Use", "", *_use(about, where)]
    return marked("\n".join(lines) + "\n")


def marked(text: str) -> str:
    """Return a card with the mark by which :func:`unmarked` knows that nobody edited it."""
    return f"{text}\n<!-- tnadapt wrote this: {_digest(text)} -->\n"


def unmarked(card: str) -> str | None:
    """Return a card without its mark, or None if it has none or was edited."""
    mark = _MARK.search(card)
    text = card[: mark.start()] if mark is not None else ""
    return text if mark is not None and _digest(text) == mark[1] else None


def write_card(folder: Path, text: str, overwrite: bool) -> bool:
    """Write the card; return False, and leave the one that is there, if somebody else wrote or edited it."""
    path = folder / README
    try:
        if path.exists() and not overwrite and unmarked(path.read_text(encoding="utf-8", errors="replace")) is None:
            return False
        path.write_text(text, encoding="utf-8", newline="\n")
    except OSError as error:
        raise FileError(f"{path}: cannot write the card: {error}") from None
    return True


def _digest(text: str) -> str:
    return hashlib.sha256(text.encode()).hexdigest()[:16]


def _front_matter(about: Pretrained) -> Iterator[str]:
    if name := _repository(about):
        yield f"base_model: {json.dumps(name)}"
        yield "base_model_relation: adapter"
    yield "library_name: tnadapt"
    if about.task:
        yield f"pipeline_tag: {_HUB_TASKS.get(about.task, about.task)}"
    yield from ("tags:", "- tnadapt")


def _repository(about: Pretrained) -> str:
    """Return the base's name on the hub, or "" if it has none, because the hub refuses cards with other names."""
    name = about.name.removeprefix("hf-hub:")
    if about.local or _MODEL_REPOSITORY.fullmatch(name) is None or "--" in name or ".." in name:
        return ""
    return f"timm/{name}" if about.library == "timm" and "/" not in name else name


def _what(file: AdapterFile, about: Pretrained, members: int | None) -> Iterator[str]:
    model = f" ({_text(file.model)})" if file.model else ""
    base = f"`{_base(about)}`{model}" if about.name else f"a {_text(file.model)}" if file.model else "a model"
    several = "An adapter" if members is None else f"A population of {pluralize(members, 'adapter')}"
    yield f"{several} of [tnadapt](https://tnadapt.readthedocs.io) for {base}."
    yield ""
    roles = ", ".join(dict.fromkeys(target.role for target in file.targets))
    names = [_code(target.name) for target in file.targets]
    listed = ", ".join(f"`{name}` … `{names[-1]}`" if len(names) > 1 else f"`{name}`" for name in names[:1])
    rows = [
        ("Trained parameters", f"{file.num_parameters:,} {file.dtype}"),
        ("Updated weights", f"{pluralize(len(names), 'weight')} ({roles}): {listed}"),
        *_configs(file.config.to_dict()),
    ]
    if file.kept:
        kept = [f"`{_code(name)}`" for name in file.kept]
        rows.append(("Also trained", ", ".join(kept[:6]) + (f" and {len(kept) - 6} more" if len(kept) > 6 else "")))
    if about.task:
        rows.append(("Task", about.task))
    yield TextTable(rows, ("", "")).markdown()


def _configs(settings: dict[str, Any]) -> Iterator[tuple[str, str]]:
    """Yield a row for each config."""
    if "parts" not in settings:
        yield "Config", _config(settings)
    for part, weights in settings.get("parts", ()):
        yield "Config", f"{_config(part)} for {pluralize(weights, 'weight')}"


def _config(settings: dict[str, Any]) -> str:
    """Return the settings that differ from the defaults, and the rank; long ones in part."""
    usual = {**Config().to_dict(), "rank": None}
    told = {name: json.dumps(value) for name, value in settings.items() if value != usual.get(name)}
    told.pop("weight_shape", None)
    short = {name: text if len(text) <= _LONG else text[:_LONG] + " …" for name, text in told.items()}
    return ", ".join(f"`{_code(f'{name}={text}')}`" for name, text in short.items())


def _base(about: Pretrained) -> str:
    name = Path(about.name).name if about.local else about.name
    parts = [about.file and f"file {about.file}", about.revision and f"revision {about.revision}"]
    return _code(", ".join(filter(None, (name, *parts))))


def _use(about: Pretrained, where: str) -> Iterator[str]:
    base = "" if _repository(about) else ', base="…"'
    yield from ("```python", "import tnadapt.torch", "")
    if about.task and about.library:
        yield f"model = tnadapt.torch.load_pretrained({json.dumps(where)}{base})"
        yield f"processor = tnadapt.torch.load_processor({json.dumps(where)})"
    else:
        yield f"adapter = tnadapt.torch.from_pretrained(model, {json.dumps(where)})  # on the base model"
    yield from ("```", "")
    if base:
        yield "The base model is not on the hub: give its folder, or the model itself."
        yield ""
    yield "`load_pretrained(…, merge=True)` adds the update to the weights, so that the model runs as fast as its base."
    yield "`tnadapt merge` writes a checkpoint with the update in its weights, which loads as that of the base does."
    yield "`tnadapt info` describes the file."


def _text(text: str) -> str:
    """Escape text for one line of Markdown."""
    line = escaped(" ".join(text.split()))
    return re.sub(r"([\\`*_\[\]<>|#])", r"\\\1", line)


def _code(text: str) -> str:
    """Return text for a code span, in which Markdown escapes nothing, and a bar would end a table's cell."""
    return escaped(" ".join(text.replace("`", "'").split())).replace("|", "\\|")


# -- The folder: the file, its card, and the files of its tokenizer or processor ---------------------------------------


def save_folder(
    adapter: AdapterState,
    folder: str | os.PathLike[str],
    about: Pretrained | None,
    processors: Sequence[Any],
    metrics: Mapping[str, float] | None,
    store_bases: bool,
    overwrite_card: bool,
    where: str | None = None,
) -> None:
    """Write a folder; see :meth:`Adapter.save_pretrained`. The card loads the adapter from ``where``."""
    need_attached(adapter)
    numbers = {name: float(value) for name, value in (metrics or {}).items()}
    processors = [processor for processor in processors if processor is not None]
    for processor in processors:
        if not callable(getattr(processor, "save_pretrained", None)):
            raise ConfigError(
                "tokenizer and processor must have save_pretrained, as those of transformers; got "
                f"{type(processor).__name__}"
            )
    file = content_of(adapter, about, store_bases)
    if not is_writer():
        return
    path = Path(path_of(folder))
    try:
        path.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise FileError(f"{os.fspath(folder)}: cannot create this folder: {error}") from None
    for processor in processors:
        processor.save_pretrained(path)
    write_card(path, model_card(file, where or path.absolute().name, numbers), overwrite_card)
    # Last: a folder with this file is complete.
    adapter_format.save(path / FILE_NAME, file)


def for_others(about: Pretrained | None) -> Pretrained | None:
    """Return what an uploaded file says about its base: no local paths, which nobody else has."""
    if about is None:
        return None
    # The paths may reveal a user's name, too.
    vocabulary = about.inputs.get("tokenizer")
    if isinstance(vocabulary, str) and is_local(vocabulary):
        # Without any name, predictions would silently use the base's own tokenizer.
        about = dataclasses.replace(about, inputs={**about.inputs, "tokenizer": "./tokenizer"})
    return dataclasses.replace(about, name="", revision="", file="") if about.local else about


# -- The methods that save, upload and exchange the adapter ------------------------------------------------------------


class AdapterFiles:
    """The part of an :class:`Adapter` that has to do with files."""

    _state: AdapterState

    @property
    def pretrained(self) -> Pretrained | None:
        """The pretrained model it belongs to, which files record: name, revision, task, labels.

        What the file had if the adapter was loaded, else what a model of transformers or timm says about itself, else
        None. Assign another one to change what is recorded: ``adapter.pretrained =
        dataclasses.replace(adapter.pretrained, labels=["no", "yes"])``. None reads it from the model again.
        """
        return self._state.pretrained or describe(self._state.model)

    @pretrained.setter
    def pretrained(self, about: Pretrained | None) -> None:
        if about is not None and not isinstance(about, Pretrained):
            raise ConfigError(f"pretrained must be a tnadapt.Pretrained or None; got {type(about).__name__}")
        self._state.pretrained = about

    @checks_arguments
    def save(self, path: str | os.PathLike[str], *, store_bases: bool = False) -> None:
        """Write one safetensors file: arrays, parameters in ``keep_trainable``, config, targets, :attr:`pretrained`.

        Parameters
        ----------
        path : path-like
            Written to a temporary name and renamed, so that an existing file is replaced atomically.
        store_bases : bool
            Whether to store the arrays that are computed from the base weights (``FromBase``, starts), so that the file
            gives the same bits on every machine. By default the file has the base's fingerprint, and they are computed
            again; a base without a fingerprint has them stored anyway.

        Raises
        ------
        FileError
            If it cannot be written, or an array is not finite.

        Notes
        -----
        Under ``torch.distributed`` every process must call (sharded arrays are gathered), and process 0 writes.
        """
        file = self.to_file(store_bases=store_bases)
        if is_writer():
            adapter_format.save(path, file)
        _log.info("saved %r to %s", self, escaped(str(path)))

    def to_file(self, *, store_bases: bool = False) -> AdapterFile | PopulationFile:
        """Return what :meth:`save` would write, in memory.

        Parameters
        ----------
        store_bases : bool
            As in :meth:`save`.

        Returns
        -------
        AdapterFile or PopulationFile
            With copies of the arrays on the host. Of a member, ``tna.append`` takes the member itself.

        Notes
        -----
        Under ``torch.distributed`` every process must call, as sharded arrays are gathered.
        """
        need_attached(self._state)
        return content_of(self._state, self.pretrained, store_bases)

    @checks_arguments
    def save_pretrained(
        self,
        folder: str | os.PathLike[str],
        *,
        tokenizer: Any = None,
        processor: Any = None,
        metrics: Mapping[str, float] | None = None,
        store_bases: bool = False,
        overwrite_card: bool = False,
    ) -> None:
        """Write a folder for :func:`tnadapt.torch.load_pretrained`: the file, a model card, tokenizer or processor.

        Parameters
        ----------
        folder : path-like
            Created if needed. The file is ``adapter.safetensors``, the card ``README.md``.
        tokenizer, processor : object, optional
            What prepares the model's inputs, as transformers loads it; its own ``save_pretrained`` writes its files.
        metrics : dict of str to float, optional
            Results for the card, such as ``{"accuracy": 0.93}``.
        store_bases : bool
            As in :meth:`save`.
        overwrite_card : bool
            Whether to replace a ``README.md`` that was written or edited by hand. A card that is as tnadapt wrote it
            is always replaced.

        Raises
        ------
        FileError
            If a file cannot be written.
        ConfigError
            If a metric is not a number, or the tokenizer or processor cannot be saved.

        Notes
        -----
        Under ``torch.distributed`` every process must call, and process 0 writes.
        """
        processors = (tokenizer, processor)
        save_folder(self._state, folder, self.pretrained, processors, metrics, store_bases, overwrite_card)

    @checks_arguments
    def push_to_hub(
        self,
        repo_id: str,
        *,
        private: bool | None = None,
        token: str | bool | None = None,
        commit_message: str | None = None,
        revision: str | None = None,
        tokenizer: Any = None,
        processor: Any = None,
        metrics: Mapping[str, float] | None = None,
        store_bases: bool = False,
        overwrite_card: bool = False,
    ) -> str:
        """Upload what :meth:`save_pretrained` writes to the Hugging Face Hub, and return the commit's address.

        Parameters
        ----------
        repo_id : str
            A repository such as "user/my-adapter", created if needed.
        private : bool, optional
            Whether a new repository is private; None for the hub's default.
        token : str or bool, optional
            As in huggingface_hub; None for the stored one.
        commit_message : str, optional
        revision : str, optional
            The branch, created if needed; None for the main one.
        tokenizer, processor, metrics, store_bases
            As in :meth:`save_pretrained`.
        overwrite_card : bool
            Whether to replace the ``README.md`` of the repository if it has one.

        Raises
        ------
        TnadaptError
            If huggingface_hub is missing or the upload fails.

        Notes
        -----
        A base or tokenizer in a local folder is not named in the upload, as nobody else has it. Call it in one process.
        """
        if _ADAPTER_REPOSITORY.fullmatch(repo_id) is None:
            raise TnadaptError(f"repo_id must be like 'user/my-adapter'; got {safe_repr(repo_id)}")
        about, processors = for_others(self.pretrained), (tokenizer, processor)
        with tempfile.TemporaryDirectory() as folder:
            save_folder(self._state, folder, about, processors, metrics, store_bases, True, repo_id)
            api = _hub().HfApi(token=token)
            with refusing(
                f"cannot upload to {safe_repr(repo_id)} on the hub", "check the name, the network and the token"
            ):
                api.create_repo(repo_id, private=private, exist_ok=True)
                if revision is not None:
                    api.create_branch(repo_id, branch=revision, exist_ok=True)
                has_card = not overwrite_card and api.file_exists(repo_id, README, revision=revision)
                commit = api.upload_folder(
                    repo_id=repo_id,
                    folder_path=Path(folder),
                    commit_message=commit_message or "Upload a tnadapt adapter",
                    revision=revision,
                    ignore_patterns=[README] if has_card else None,
                )
        return str(commit.commit_url)

    @checks_arguments
    def swap(self, path: str | os.PathLike[str], member: int | str | None = None) -> None:
        """Load the arrays of another adapter's file, of the same config and targets, in place without recompiling.

        Raises
        ------
        FileError
            If the file does not fit; nothing is changed.
        """
        swap(self._state, path, member)
        _log.info("swapped the arrays of %r for those in %s", self, escaped(str(path)))
