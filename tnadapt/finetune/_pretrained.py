"""The user's pretrained model: a local folder or a hub name through transformers, or ``timm:NAME``."""

from __future__ import annotations

import contextlib
import inspect
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from tnadapt.errors import FileError, TnadaptError, safe_repr

from ._data import Data, Samples, choose, divide
from ._data_sources import first_line, quiet, read
from ._encode import Images, Texts
from .problem import Part, Problem, Spec, under

__all__ = ["pretrained"]

HEADS = ("classifier", "score", "head", "classification_head", "fc")
LONGEST = 256


def pretrained(spec: Spec) -> Problem:
    """Return the problem of a user's model and data.

    Parameters
    ----------
    spec : Spec
        Must have ``model`` and ``data``.

    Raises
    ------
    TnadaptError
        If the model or data does not exist, they do not fit together, or a required library is missing.
    """
    assert spec.model is not None
    assert spec.data is not None
    data = read(spec.data, spec.text_column, spec.label_column, spec.label_names)
    test = None if data.test is None else choose(data.test, spec.limit)
    data = Data(data.name, data.kind, data.classes, choose(data.samples, spec.limit), test)
    samples = divide(data, validation=spec.holdout)
    if spec.model.startswith("timm:"):
        if spec.head_rows:
            raise TnadaptError("head_rows needs a head that transformers loads; give --model a folder or a hub name")
        return _timm(spec, data, samples)
    return _transformers(spec, data, samples)


# -- transformers ------------------------------------------------------------------------------


def _transformers(spec: Spec, data: Data, samples: dict[str, Samples]) -> Problem:
    name = str(spec.model)
    if not Path(name).exists() and name.startswith((".", "/", "~")):
        raise FileError(f"no model at {name}: there is no such folder")
    if Path(name).is_dir() and not (Path(name) / "config.json").is_file():
        raise FileError(f"no model at {name}: the folder has no config.json")
    if Path(name).is_file():
        raise FileError(f"no model at {name}: expected a folder with a config.json, or a hub name, not a file")
    try:
        import transformers
    except ImportError:
        raise TnadaptError(
            "models are loaded with transformers, which is not installed: pip install 'tnadapt[hub]'"
        ) from None
    kind = "SequenceClassification" if data.kind == "text" else "ImageClassification"
    auto = getattr(transformers, f"AutoModelFor{kind}")
    new: list[str] = []
    settings: dict[str, Any] = {}
    # A head of another size is initialized randomly; a head to take rows from must be the checkpoint's.
    head = {} if spec.head_rows else {"num_labels": len(data.classes), "ignore_mismatched_sizes": True}

    def build(seed: int) -> nn.Module:
        with _silent(transformers), torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            model, loaded = auto.from_pretrained(name, output_loading_info=True, dtype=torch.float32, **head)
        if spec.head_rows:
            _cut_head(model, loaded["missing_keys"], spec.head_rows, len(data.classes))
        new[:] = sorted({*loaded["missing_keys"], *(key[0] for key in loaded["mismatched_keys"])})
        for setting, value in settings.items():
            setattr(model.config, setting, value)
        return model  # type: ignore[no-any-return]

    way = "" if Path(name).exists() else "; give --model a folder"
    with _refused(f"cannot load {safe_repr(name)} for {data.kind}s through transformers", way):
        model = build(0)
    drawn = tuple(dict.fromkeys(key.rpartition(".")[0] or key for key in new))
    if len(new) == len(model.state_dict()):
        raise TnadaptError(
            f"{safe_repr(name)} has none of the weights of {type(model).__name__}; give a checkpoint of that model"
        )
    parts: dict[str, Part]
    if data.kind == "text":
        tokenizer = _tokenizer(name, transformers)
        settings["pad_token_id"] = tokenizer.pad_token_id
        model = build(0)
        parts = dict(_texts(spec, tokenizer, samples, model))
    else:
        parts = dict(_images(spec, samples, model.config, _processor(name, transformers)))
    brought = () if drawn or spec.head_rows else _head(model)
    return _problem(spec, data, parts, model, build, _logits(model, data.kind), drawn, brought)


def _cut_head(model: nn.Module, missing: Sequence[str], rows: Sequence[int], classes: int) -> None:
    """Cut the checkpoint's head to some of its classes."""
    name = _head(model)[0]
    whole = getattr(model, name)
    if not isinstance(whole, nn.Linear) or any(under(key, [name]) for key in missing):
        raise TnadaptError(f"the checkpoint has no linear head {name!r} to take rows from; leave head_rows out")
    if len(rows) != classes or not all(0 <= row < whole.out_features for row in rows):
        raise TnadaptError(
            f"head_rows needs {classes} of the {whole.out_features} classes of the checkpoint's head, one for each "
            f"class of the data; got {list(rows)}"
        )
    cut = nn.Linear(whole.in_features, len(rows), bias=whole.bias is not None)
    with torch.no_grad():
        cut.weight.copy_(whole.weight[list(rows)])
        if whole.bias is not None:
            cut.bias.copy_(whole.bias[list(rows)])
    setattr(model, name, cut)
    model.config.num_labels = len(rows)  # type: ignore[union-attr]


def _logits(model: nn.Module, kind: str) -> Callable[[nn.Module, Any], Tensor]:
    if kind == "text":
        return lambda model, inputs: model(**inputs).logits
    more = {"interpolate_pos_encoding": True}
    if "interpolate_pos_encoding" not in inspect.signature(model.forward).parameters:
        more = {}
    return lambda model, inputs: model(pixel_values=inputs, **more).logits


def _head(model: nn.Module) -> tuple[str, ...]:
    """Return the name of a head from the checkpoint, which must be one of the usual names."""
    found = tuple(name for name in HEADS if hasattr(model, name))
    if not found:
        raise TnadaptError(
            f"cannot tell which part of {type(model).__name__} is its head; its parts are "
            f"{', '.join(name for name, _ in model.named_children())}: give --keep-trainable NAME"
        )
    return found


def _tokenizer(name: str, transformers: Any) -> Any:
    with _refused(f"no tokenizer in {safe_repr(name)}"), _silent(transformers):
        tokenizer = transformers.AutoTokenizer.from_pretrained(name)
    if tokenizer.pad_token is None:
        if tokenizer.eos_token is None:
            raise TnadaptError(f"the tokenizer of {name} has neither a padding token nor an end-of-sequence token")
        tokenizer.pad_token = tokenizer.eos_token
    return tokenizer


def _texts(spec: Spec, tokenizer: Any, samples: dict[str, Samples], model: Any) -> Iterator[tuple[str, Part]]:
    most = min(getattr(model.config, "max_position_embeddings", None) or 1 << 30, tokenizer.model_max_length)
    longest, least = spec.max_length or min(LONGEST, most), tokenizer.num_special_tokens_to_add() + 1
    if not least <= longest <= most:
        raise TnadaptError(f"--max-length must be from {least} to {most} for {safe_repr(spec.model)}; got {longest}")
    known = model.get_input_embeddings().num_embeddings
    special = torch.tensor(tokenizer.all_special_ids)
    for part, some in samples.items():
        texts = Texts(some, tokenizer, longest, tokenizer.pad_token_id)
        if texts.lengths is not None and not bool(texts.lengths.all()):
            empty = samples[part].inputs[int(texts.lengths.argmin())]
            raise TnadaptError(f"the tokenizer of {safe_repr(spec.model)} finds no token in {safe_repr(empty)}")
        # If the folder has no tokenizer, transformers returns one without a vocabulary.
        if all(bool(torch.isin(tokens, special).all()) for tokens in texts.tokens):
            raise TnadaptError(f"no tokenizer in {safe_repr(spec.model)} whose vocabulary has any word of the texts")
        top = max((int(tokens.max()) for tokens in texts.tokens if len(tokens)), default=0)
        if top >= known:
            raise TnadaptError(
                f"the tokenizer returned token {top}, but the model has only {known} tokens: they do not fit together"
            )
        yield part, texts


def _processor(name: str, transformers: Any) -> dict[str, Any]:
    """Return the image settings that come with a model; empty if there are none."""
    with contextlib.suppress(Exception), _silent(transformers):
        return dict(transformers.AutoImageProcessor.from_pretrained(name).to_dict())
    return {}


def _images(
    spec: Spec, samples: dict[str, Samples], config: Any, processor: dict[str, Any]
) -> Iterator[tuple[str, Part]]:
    size = spec.image_size or _side(processor.get("crop_size")) or _side(processor.get("size"))
    size = size or _side(getattr(config, "image_size", None)) or 224
    channels = int(getattr(config, "num_channels", 3))
    given = processor.get("image_mean"), processor.get("image_std")
    yield from _divided(samples, size, channels, None if None in given else given)


def _divided(samples: dict[str, Samples], size: int, channels: int, given: Any) -> Iterator[tuple[str, Part]]:
    """Yield the parts as images with the same normalization: the model's, or that of the training images."""
    if channels not in (1, 3):
        raise TnadaptError(f"the model takes images of {channels} channels; only 1 and 3 are supported")
    statistics = None
    if given is not None:
        mean, std = (torch.tensor(numbers, dtype=torch.float32).expand(channels)[:, None, None] for numbers in given)
        statistics = mean, std
    for part, some in samples.items():
        images = Images(some, size, channels, statistics)
        statistics = images.statistics
        yield part, images


def _side(size: Any) -> int | None:
    if isinstance(size, dict):
        size = size.get("height") or size.get("shortest_edge")
    if isinstance(size, (list, tuple)):
        size = size[0]
    return int(size) if size else None


# -- timm --------------------------------------------------------------------------------------


def _timm(spec: Spec, data: Data, samples: dict[str, Samples]) -> Problem:
    if data.kind != "image":
        raise TnadaptError(f"{spec.model} is an image model, but {data.name} has texts")
    try:
        import timm
    except ImportError:
        raise TnadaptError("timm is not installed: pip install 'tnadapt[hub]'") from None
    name = str(spec.model).removeprefix("timm:")

    def build(seed: int) -> nn.Module:
        more: dict[str, Any] = {"img_size": spec.image_size} if spec.image_size else {}
        with quiet("timm", "huggingface_hub"), torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            try:
                return timm.create_model(name, pretrained=True, num_classes=len(data.classes), **more)  # type: ignore[no-any-return]
            except TypeError:  # models that accept any size have no img_size argument
                return timm.create_model(name, pretrained=True, num_classes=len(data.classes))  # type: ignore[no-any-return]

    with _refused(f"cannot load {safe_repr(name)} through timm"):
        model = build(0)
    config: Any = model.pretrained_cfg
    named = config.get("classifier") or "head"
    head = (named,) if isinstance(named, str) else tuple(named)
    channels, *_, side = config["input_size"]
    parts: dict[str, Part] = dict(_divided(samples, spec.image_size or side, channels, (config["mean"], config["std"])))
    return _problem(spec, data, parts, model, build, lambda model, images: model(images), head)


# -- Both --------------------------------------------------------------------------------------


def _problem(
    spec: Spec,
    data: Data,
    parts: dict[str, Part],
    model: nn.Module,
    build: Callable[[int], nn.Module],
    logits: Callable[[nn.Module, Any], Tensor],
    drawn: tuple[str, ...],
    head: tuple[str, ...] = (),
) -> Problem:
    """Build the problem, after checking that the model accepts a batch of the samples."""
    with _refused(f"{safe_repr(spec.model)} does not take the samples of {data.name}"), torch.no_grad():
        part = parts["training"]
        largest = torch.arange(len(part.labels)) if part.lengths is None else part.lengths.argsort(descending=True)
        found = logits(model.eval(), part.batch(largest[:2], torch.device("cpu")))
        if found.shape[1:] != (len(data.classes),):
            raise TnadaptError(
                f"{safe_repr(spec.model)} returned {tuple(found.shape)} logits for two samples of {data.name}; "
                f"expected (2, {len(data.classes)})"
            )
    # Randomly initialized modules must be trained and saved in any case.
    keep = (*(spec.keep_trainable or head), *(name for name in drawn if not under(name, spec.keep_trainable or head)))
    name = Path(str(spec.model).removeprefix("timm:")).name
    return Problem(f"{data.name} with {name}", data.kind, data.classes, parts, build, logits, keep, drawn)


# -- Messages of other libraries ---------------------------------------------------------------


@contextlib.contextmanager
def _refused(what: str, way: str = "") -> Iterator[None]:
    """Turn any error of a hub, proxy or loader into a one-line TnadaptError with a way out."""
    try:
        yield
    except TnadaptError:
        raise
    except Exception as error:
        raise TnadaptError(f"{what}: {first_line(error)}{way}") from None


@contextlib.contextmanager
def _silent(transformers: Any) -> Iterator[None]:
    """Silence transformers' messages and progress bars inside ``with``."""
    logging = transformers.utils.logging
    level, bars = logging.get_verbosity(), logging.is_progress_bar_enabled()
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    try:
        with quiet("transformers", "huggingface_hub"):
            yield
    finally:
        logging.set_verbosity(level)
        if bars:
            logging.enable_progress_bar()
