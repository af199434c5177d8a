"""Saving an adapter and kept parameters: to a file, a folder with a model card, the hub; swapping in another's file.

:func:`to_file` makes the content of a file from an adapter on a model, and :func:`save` writes it. A folder
(:func:`save_folder`) has the file, its card (:func:`model_card`) and the files of a tokenizer or processor; it can be
uploaded (:func:`push`) and downloaded (:func:`adapter_path`).
"""

from __future__ import annotations

import dataclasses
import functools
import hashlib
import json
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
from tnadapt.checkpoints import adapter_format
from tnadapt.checkpoints.adapter_file import KEPT, AdapterFile
from tnadapt.checkpoints.container import path_of
from tnadapt.checkpoints.fingerprint import Fingerprint, compare, fingerprint
from tnadapt.checkpoints.pretrained_model import Pretrained, is_local
from tnadapt.errors import ConfigError, FileError, TargetError, TnadaptError, escaped, pluralize, safe_repr
from tnadapt.report import TextTable
from tnadapt.targets.target import Target

from . import _merging as merging
from ._base_models import refusing
from ._delta import copy_all, gather_full
from ._registry import refuse_merged
from ._state import AdapterState, checked_pairs, named_parameters, need_attached
from ._weights import names_of_shared, split_by_file

__all__ = [
    "FILE_NAME",
    "PROCESSOR_FILES",
    "README",
    "FileErrorContext",
    "adapter_path",
    "base_fingerprint",
    "check_kept",
    "fingerprint_of",
    "for_others",
    "is_repository",
    "is_writer",
    "kept_pairs",
    "marked",
    "model_card",
    "need_base",
    "processor_folder",
    "push",
    "save",
    "save_folder",
    "swap",
    "to_file",
    "unmarked",
]


# -- The check that a file's adapter has the form of one on a model ----------------------------------------------------


def check_same(adapter: AdapterState, file: AdapterFile) -> None:
    """Raise a FileError unless config, activation, targets and kept parameters are the same."""
    names = names_of_shared(adapter.model)
    # Of a tied weight, an adapter keeps the first name, and a file any of them.
    their_kept, our_kept = (sorted({names.get(name, [name])[0] for name in kept}) for kept in (file.kept, adapter.kept))
    compared: list[tuple[str, Any, Any, Callable[[Any, Any], str]]] = [
        # How it is trained changes no array.
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
    """Return the settings that differ, of which the others need no mention."""
    mine, other = ours.to_dict(), theirs.to_dict()
    names = [name for name in mine if name in other and mine[name] != other[name]]
    if not names or mine.keys() != other.keys() or "parts" in mine:
        return _values(theirs, ours)
    return "; ".join(f"{name}: {_values(other[name], mine[name])}" for name in names)


def _targets(theirs: Sequence[tuple[Any, ...]], ours: Sequence[tuple[Any, ...]]) -> str:
    numbers = f"{pluralize(len(theirs), 'weight')} in the file, {len(ours)} here"
    for place in theirs:
        if place not in ours:
            return f"{numbers}; not here: {safe_repr(place[0])} of {place[1]}"
    extra = next((place for place in ours if place not in theirs), None)
    return (
        f"{numbers}; not in the file: {safe_repr(extra[0])} of {extra[1]}" if extra else f"{numbers}, in another order"
    )


def _places(targets: Sequence[Target]) -> list[tuple[Any, ...]]:
    return [(target.label, target.shape, target.index, target.rows, target.tied) for target in targets]


# -- The file, and swapping in the arrays of another one ---------------------------------------------------------------


_NAMES = {torch.float64: "float64", torch.float32: "float32", torch.float16: "float16", torch.bfloat16: "bfloat16"}


def to_file(adapter: AdapterState, store_bases: bool = False) -> AdapterFile:
    """Return the contents of an adapter's file; if the model is sharded, every process must call.

    The arrays that are computed from the base weights are included with ``store_bases``, and where the weights have no
    fingerprint by which the file could recognize them.
    """
    if adapter.plan.needs_base:
        raise TargetError(
            f"adapter {adapter.name!r} has arrays that are computed from the base weights, which had no values when it "
            "was attached: call reset() once the model has its weights"
        )
    plan, base = adapter.plan.file_plan, base_fingerprint(adapter)
    all_stored = store_bases or base is None
    stored = {name: array for name, array in plan.given.items() if all_stored or name not in plan.base_shapes}
    dtypes: dict[str, str] = {}

    def host(name: str, tensor: Tensor) -> np.ndarray:
        if tensor.device.type == "meta":
            raise TargetError(f"adapter {adapter.name!r} is on the meta device and has no values to save")
        tensor = gather_full(tensor.detach()).cpu()
        if tensor.dtype is torch.bfloat16:
            dtypes[name] = "bfloat16"
            tensor = tensor.float()
        return tensor.numpy().copy()

    tensors, shared = _tensors(adapter.model), names_of_shared(adapter.model)
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
        given=stored,
        ties=ties,
    )


def base_fingerprint(adapter: AdapterState) -> Fingerprint | None:
    """Return the fingerprint of the adapted weights without the update; None if one cannot be dequantized."""
    need_base(adapter.model, adapter)
    weights = [merging.original(adapter, index) for index in range(len(adapter.targets))]
    adapter.base = fingerprint_of(weights, adapter.base)
    return adapter.base


def fingerprint_of(weights: list[Tensor | None], expected: Fingerprint | None = None) -> Fingerprint | None:
    """Return the fingerprint of weights; None if one has no numbers.

    Where it is probably the expected one, only the SHA-256 is computed, which takes a fraction of the time.
    """
    known = [weight for weight in weights if weight is not None and weight.device.type != "meta"]
    dtypes = {weight.dtype for weight in known}
    if len(known) != len(weights) or not known or not dtypes <= _NAMES.keys():
        return None
    # Several dtypes are promoted to one that represents all their values.
    dtype = functools.reduce(torch.promote_types, dtypes)

    def host() -> Iterator[np.ndarray]:
        for weight in known:
            tensor = weight.detach().cpu().to(dtype).contiguous()
            yield tensor.view(torch.int16).numpy().view(np.uint16) if tensor.dtype is torch.bfloat16 else tensor.numpy()

    if expected is not None and expected.dtype == _NAMES[dtype] and compare(expected, host(), _NAMES[dtype]) is None:
        return expected
    return fingerprint(host(), _NAMES[dtype])


def need_base(model: nn.Module, but: AdapterState | None = None) -> None:
    """Raise a TargetError if another adapter is merged into the weights."""
    refuse_merged(model, "another adapter is saved or loaded", but)


def save(
    adapter: AdapterState, path: str | os.PathLike[str], about: Pretrained | None, store_bases: bool = False
) -> None:
    """Save an adapter; see :meth:`Adapter.save`."""
    need_attached(adapter)
    file = dataclasses.replace(to_file(adapter, store_bases), pretrained=about)
    if is_writer():
        adapter_format.save(path, file)


def is_writer() -> bool:
    """Return whether this process writes files: process 0 of several."""
    distributed = torch.distributed.is_available() and torch.distributed.is_initialized()
    return not distributed or torch.distributed.get_rank() == 0


def swap(adapter: AdapterState, path: str | os.PathLike[str]) -> None:
    """Load another adapter's arrays in place; see :meth:`Adapter.swap`."""
    need_attached(adapter)
    file = adapter_format.load(path, like=adapter.plan.file_plan)
    with FileErrorContext(path):
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


class FileErrorContext:
    """A context that turns the package's errors into FileErrors that begin with the path."""

    def __init__(self, path: Any) -> None:
        self.path = os.fsdecode(path)

    def __enter__(self) -> None:
        return None

    def __exit__(self, error_type: type[BaseException] | None, error: BaseException | None, trace: Any) -> None:
        if isinstance(error, TnadaptError):
            raise FileError(f"{self.path}: {error}") from error


def check_kept(model: nn.Module, file: AdapterFile) -> None:
    """Raise a FileError if the model lacks a parameter that the file keeps, or its shape differs."""
    tensors = _tensors(model)
    for name, array in file.kept.items():
        tensor = tensors.get(name)
        if tensor is None:
            raise FileError(f"it keeps {name!r}, which this {type(model).__name__} does not have")
        if tuple(tensor.shape) != array.shape:
            raise FileError(
                f"it keeps {name!r} of shape {array.shape}, and this model's is {tuple(tensor.shape)}: "
                "build the model with the head that it was trained with"
            )


def kept_pairs(model: nn.Module, file: AdapterFile) -> list[tuple[Tensor, np.ndarray]]:
    """Return the model's tensors that the file keeps, with their values in the file."""
    tensors = _tensors(model)
    return [(tensors[name], array.copy()) for name, array in file.kept.items()]


def _tensors(model: nn.Module) -> dict[str, Tensor]:
    """Return the parameters and buffers of a model, of a tied weight by each of its names."""
    parameters: dict[str, Tensor] = dict(model.named_parameters(remove_duplicate=False))
    return {**parameters, **dict(model.named_buffers(remove_duplicate=False))}


# -- The Hugging Face Hub: where an adapter is, downloads of its file, uploads of its folder ---------------------------


#: Names of the adapter and of its card in a folder or repository.
FILE_NAME = "adapter.safetensors"
README = "README.md"

#: A tokenizer or processor has one of these files.
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
        return _downloaded(str(where), revision, token)
    path = Path(path_of(where))
    if path.is_dir():
        if not (path / FILE_NAME).is_file():
            raise FileError(f"{path}: this folder has no {FILE_NAME}, which save_pretrained writes{_peft_hint(path)}")
        return path / FILE_NAME
    if not path.exists():
        raise FileError(f"{path}: there is no such file or folder; a name on the hub is like 'user/my-adapter'")
    return path


def _peft_hint(folder: Path) -> str:
    if not (folder / "adapter_config.json").is_file():
        return ""
    return "; it has an adapter of PEFT, which tnadapt.convert (tnadapt convert) turns into one"


def _downloaded(name: str, revision: str | None, token: str | bool | None) -> Path:
    hub = _hub()
    with refusing(
        f"cannot download {FILE_NAME} of {safe_repr(name)}, which is no file or folder here, from the hub",
        "check the name, the network and the token, or give a folder",
    ):
        return Path(hub.hf_hub_download(name, FILE_NAME, revision=revision, token=token))


def processor_folder(name: str, revision: str | None, token: str | bool | None) -> Path:
    """Download the files of a repository's tokenizer or processor; return their folder."""
    hub = _hub()
    with refusing(
        f"cannot download the tokenizer or processor of {safe_repr(name)} from the hub",
        "check the name, the network and the token, or give a folder",
    ):
        return Path(hub.snapshot_download(name, revision=revision, token=token, allow_patterns=_PROCESSOR_PATTERNS))


def upload(
    folder: Path,
    name: str,
    *,
    private: bool | None,
    token: str | bool | None,
    commit_message: str | None,
    revision: str | None,
    overwrite_card: bool,
) -> str:
    """Upload a folder to a repository, which is created if needed; return the commit's address.

    A card that is in the repository stays unless ``overwrite_card``.
    """
    if _ADAPTER_REPOSITORY.fullmatch(name) is None:
        raise TnadaptError(f"repo_id must be like 'user/my-adapter'; got {safe_repr(name)}")
    api = _hub().HfApi(token=token)
    with refusing(f"cannot upload to {safe_repr(name)} on the hub", "check the name, the network and the token"):
        api.create_repo(name, private=private, exist_ok=True)
        if revision is not None:
            api.create_branch(name, branch=revision, exist_ok=True)
        has_card = not overwrite_card and api.file_exists(name, README, revision=revision)
        commit = api.upload_folder(
            repo_id=name,
            folder_path=folder,
            commit_message=commit_message or "Upload a tnadapt adapter",
            revision=revision,
            ignore_patterns=[README] if has_card else None,
        )
    return str(commit.commit_url)


def _hub() -> Any:
    try:
        import huggingface_hub
    except ImportError:
        raise TnadaptError(
            "huggingface_hub is not installed, which talks to the hub: pip install 'tnadapt[hub]'"
        ) from None
    return huggingface_hub


# -- The model card, README.md, of which hubs read the first lines -----------------------------------------------------


# Names of repositories on the hub.
_MODEL_REPOSITORY = re.compile(r"[A-Za-z0-9][\w.-]*(/[A-Za-z0-9][\w.-]*)?", re.ASCII)
_MARK = re.compile(r"\n<!-- tnadapt wrote this: ([0-9a-f]{16}) -->\n\Z")
#: Labels that a card lists.
_LISTED = 20
# Letters of a setting, such as explicit groups.
_LONG = 200
#: The hub's names of tasks that differ from those here.
_HUB_TASKS = {"speech-seq2seq": "automatic-speech-recognition", "speech-ctc": "automatic-speech-recognition"}


def model_card(file: AdapterFile, where: str, metrics: Mapping[str, float]) -> str:
    """Return the text of a card.

    Parameters
    ----------
    file : AdapterFile
    where : str
        The name of the folder or repository, from which the card loads the adapter.
    metrics : dict of str to float
    """
    about = file.pretrained or Pretrained()
    lines = ["---", *_front_matter(about), "---", "", f"# {_text(Path(where).name)}", ""]
    lines += [*_what(file, about), "", *_labels(about), *_metrics(metrics), "## Use", "", *_use(about, where)]
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
        if path.exists() and not overwrite and not _untouched(path):
            return False
        path.write_text(text, encoding="utf-8", newline="\n")
    except OSError as error:
        raise FileError(f"{path}: cannot write the card: {error}") from None
    return True


def _untouched(path: Path) -> bool:
    return unmarked(path.read_text(encoding="utf-8", errors="replace")) is not None


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
    """Return the base's name on the hub; "" if it has none, as the hub refuses cards with other names."""
    name = about.name.removeprefix("hf-hub:")
    if about.local or _MODEL_REPOSITORY.fullmatch(name) is None or "--" in name or ".." in name:
        return ""
    return f"timm/{name}" if about.library == "timm" and "/" not in name else name


def _what(file: AdapterFile, about: Pretrained) -> Iterator[str]:
    model = f" ({_text(file.model)})" if file.model else ""
    base = f"`{_base(about)}`{model}" if about.name else f"a {_text(file.model)}" if file.model else "a model"
    yield f"An adapter of [tnadapt](https://tnadapt.readthedocs.io) for {base}."
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
    """Return a row for the config, or one for each of several."""
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


def _labels(about: Pretrained) -> Iterator[str]:
    if about.labels:
        more = len(about.labels) - _LISTED
        listed = ", ".join(f"{number} {_text(label)}" for number, label in enumerate(about.labels[:_LISTED]))
        yield f"Labels: {listed}" + (f" and {more} more." if more > 0 else ".")
        yield ""


def _metrics(metrics: Mapping[str, float]) -> Iterator[str]:
    if metrics:
        yield from ("## Results", "")
        rows = [(_text(name), f"{value:.6g}") for name, value in metrics.items()]
        yield TextTable(rows, ("metric", "value")).markdown()
        yield ""


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
    """Return text that stays text in Markdown, on one line."""
    line = escaped(" ".join(text.split()))
    return re.sub(r"([\\`*_\[\]<>|#])", r"\\\1", line)


def _code(text: str) -> str:
    """Return text for a code span, in which Markdown escapes nothing; a table's cells end at a bar."""
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
    for processor in processors:
        if processor is not None and not callable(getattr(processor, "save_pretrained", None)):
            raise ConfigError(
                "tokenizer and processor must have save_pretrained, as those of transformers; got "
                f"{type(processor).__name__}"
            )
    file = dataclasses.replace(to_file(adapter, store_bases), pretrained=about)
    if not is_writer():
        return
    path = Path(path_of(folder))
    try:
        path.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise FileError(f"{os.fspath(folder)}: cannot create this folder: {error}") from None
    for processor in processors:
        if processor is not None:
            processor.save_pretrained(path)
    write_card(path, model_card(file, where or path.absolute().name, numbers), overwrite_card)
    # Last: a folder with this file is complete.
    adapter_format.save(path / FILE_NAME, file)


def push(
    adapter: AdapterState,
    name: str,
    about: Pretrained | None,
    processors: Sequence[Any],
    metrics: Mapping[str, float] | None,
    store_bases: bool,
    overwrite_card: bool,
    options: Mapping[str, Any],
) -> str:
    """Upload a folder; see :meth:`Adapter.push_to_hub`."""
    with tempfile.TemporaryDirectory() as folder:
        save_folder(adapter, folder, for_others(about), processors, metrics, store_bases, True, name)
        return upload(Path(folder), name, overwrite_card=overwrite_card, **options)


def for_others(about: Pretrained | None) -> Pretrained | None:
    """Return what an uploaded file says about its base: no local paths, which nobody else has."""
    if about is None:
        return None
    # The paths may tell a user's name, too.
    vocabulary = about.inputs.get("tokenizer")
    if isinstance(vocabulary, str) and is_local(vocabulary):
        # Without any name, predictions would silently use the base's own tokenizer.
        about = dataclasses.replace(about, inputs={**about.inputs, "tokenizer": "./tokenizer"})
    return dataclasses.replace(about, name="", revision="", file="") if about.local else about
