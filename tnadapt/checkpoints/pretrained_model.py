"""Pretrained, the metadata of an adapter file: which base it belongs to, for which task, with which labels."""

from __future__ import annotations

import dataclasses
import itertools
import json
import math
import re
from collections.abc import Iterable, Mapping, Sequence
from typing import Any, NamedTuple

from tnadapt.argument_checks import checks_arguments
from tnadapt.errors import ConfigError, FileError, TnadaptError, pluralize, safe_repr, summarize

from .container import encodes

#: Maximum number of labels; ImageNet-21k has 21,843.
MAX_LABELS = 1 << 15
_MAX_TEXT = 1024
_MAX_INPUTS = 64
_DTYPES = ("float64", "float32", "float16", "bfloat16")
_PROBLEMS = ("regression", "single_label_classification", "multi_label_classification")


class PretrainedTask(NamedTuple):
    """What a task needs of transformers: names of public classes, so that no file can name another class.

    Attributes
    ----------
    model : str
        The class that builds the model.
    processor : str
        The class that loads what prepares its inputs.
    labelled : bool
        Whether its outputs have names.
    """

    model: str
    processor: str
    labelled: bool = False


#: The tasks by name. The first one whose class builds a model's class is the model's task.
TASKS: Mapping[str, PretrainedTask] = {
    "text-classification": PretrainedTask("AutoModelForSequenceClassification", "AutoTokenizer", True),
    "token-classification": PretrainedTask("AutoModelForTokenClassification", "AutoTokenizer", True),
    "question-answering": PretrainedTask("AutoModelForQuestionAnswering", "AutoTokenizer"),
    "multiple-choice": PretrainedTask("AutoModelForMultipleChoice", "AutoTokenizer"),
    # Before text generation, whose class builds some of these models, too.
    "image-text-to-text": PretrainedTask("AutoModelForImageTextToText", "AutoProcessor"),
    "text-generation": PretrainedTask("AutoModelForCausalLM", "AutoTokenizer"),
    "text2text-generation": PretrainedTask("AutoModelForSeq2SeqLM", "AutoTokenizer"),
    "fill-mask": PretrainedTask("AutoModelForMaskedLM", "AutoTokenizer"),
    "image-classification": PretrainedTask("AutoModelForImageClassification", "AutoImageProcessor", True),
    "image-segmentation": PretrainedTask("AutoModelForSemanticSegmentation", "AutoImageProcessor", True),
    "object-detection": PretrainedTask("AutoModelForObjectDetection", "AutoImageProcessor", True),
    "video-classification": PretrainedTask("AutoModelForVideoClassification", "AutoImageProcessor", True),
    "audio-classification": PretrainedTask("AutoModelForAudioClassification", "AutoFeatureExtractor", True),
    "speech-seq2seq": PretrainedTask("AutoModelForSpeechSeq2Seq", "AutoProcessor"),
    "speech-ctc": PretrainedTask("AutoModelForCTC", "AutoProcessor"),
    "feature-extraction": PretrainedTask("AutoModel", "AutoTokenizer"),
}


def _natural(value: Any) -> bool:
    return type(value) is int and 0 <= value < 1 << 31


def _sizes(value: Any) -> bool:
    return isinstance(value, list) and 0 < len(value) <= 3 and all(_natural(size) for size in value)


# The settings with which each library builds a model, and the check of their values.
_SETTINGS: dict[str, dict[str, Any]] = {
    "transformers": {"problem_type": lambda value: value in _PROBLEMS, "pad_token_id": _natural},
    "timm": {"num_classes": _natural, "in_chans": _natural, "img_size": _sizes},
}


def is_local(name: str) -> bool:
    """Return whether a name is the path of a folder rather than a name on the hub, whether or not the folder exists.

    Examples
    --------
    >>> is_local("/home/ann/model"), is_local("user/model")
    (True, False)
    """
    return bool(re.match(r"local-dir:|[/.~]|[A-Za-z]:|.*\\", name)) or name.count("/") > 1


@checks_arguments
@dataclasses.dataclass(frozen=True)
class Pretrained:
    """The pretrained model that an adapter was trained on, and how to build it again.

    :attr:`tnadapt.torch.Adapter.pretrained` is one, and files store it; :func:`tnadapt.torch.load_pretrained` builds
    the model from it.

    Parameters
    ----------
    name : str
        Name on the hub, path of a local folder, or timm's name of a model; "" if unknown.
    revision : str
        The hub's revision, as the hash of a commit if known; "" for none.
    file : str
        The GGUF file in that repository or folder, if the weights are read from one.
    library : {"transformers", "timm"}
    task : str
        A key of ``TASKS``, such as "text-classification", which determines the class of the model; "" if unknown.
    labels : sequence of str
        Names of the outputs, in their order.
    dtype : str
        The dtype of the base: float64, float32, float16 or bfloat16; "" if unknown.
    settings : dict
        Settings of the model that differ from the base's: ``problem_type`` and ``pad_token_id`` with transformers,
        ``num_classes``, ``in_chans`` and ``img_size`` with timm.
    inputs : dict
        Settings of the tokenizer or of the images, by any names: text, numbers, booleans, None, or lists of them.

    Raises
    ------
    ConfigError
        If a value is of another type, unknown or too long.

    Examples
    --------
    >>> import tnadapt as tna
    >>> base = tna.Pretrained("bert-base-uncased", task="text-classification", labels=["no", "yes"])
    >>> base.id2label, base.label2id
    ({0: 'no', 1: 'yes'}, {'no': 0, 'yes': 1})
    """

    name: str = ""
    revision: str = ""
    file: str = ""
    library: str = "transformers"
    task: str = ""
    labels: Sequence[str] = ()
    dtype: str = ""
    settings: Mapping[str, Any] = dataclasses.field(default_factory=dict)
    inputs: Mapping[str, Any] = dataclasses.field(default_factory=dict)

    def __post_init__(self) -> None:
        for field in ("name", "revision", "file"):
            _check_line(field, getattr(self, field))
        if not re.fullmatch(r"(?!.*\.\.)[\w./-]*", self.revision, re.ASCII):
            raise ConfigError(f"revision must be a commit, branch or tag; got {safe_repr(self.revision)}")
        if not re.fullmatch(r"(?!/|.*\.\.)[\w. /()+,=@~-]*", self.file):
            raise ConfigError(f"file must be a file in the base's folder; got {safe_repr(self.file)}")
        _check_choice("library", self.library, tuple(_SETTINGS))
        _check_choice("task", self.task, ("", *TASKS))
        _check_choice("dtype", self.dtype, ("", *_DTYPES))
        # The class is frozen.
        object.__setattr__(self, "labels", _own_labels(self.labels))
        object.__setattr__(self, "settings", _own_settings(self.settings, self.library))
        object.__setattr__(self, "inputs", _own_inputs(self.inputs))

    @property
    def id2label(self) -> dict[int, str]:
        """The labels by their number."""
        return dict(enumerate(self.labels))

    @property
    def label2id(self) -> dict[str, int]:
        """The numbers by their label."""
        return {label: number for number, label in enumerate(self.labels)}

    @property
    def local(self) -> bool:
        """Whether the name is the path of a folder rather than a name on the hub."""
        return is_local(self.name)

    @property
    def remote(self) -> bool:
        """Whether the name is an address or a network share, neither on the hub nor in a folder of this machine."""
        return re.match(r"(local-dir:)?[/\\]{2}|(?!local-dir:|hf-hub:)\w[\w+.-]+:", self.name) is not None

    def to_dict(self) -> dict[str, Any]:
        """Return the values that differ from the defaults, as JSON-compatible values."""
        values = {**vars(self), "labels": list(self.labels)}
        usual = {"library": "transformers"}
        return {name: value for name, value in values.items() if value and value != usual.get(name)}

    @classmethod
    @checks_arguments
    def from_dict(cls, values: Mapping[str, Any], labels: Iterable[Any] = ()) -> Pretrained:
        """Return one from the values of :meth:`to_dict`, with the labels apart; raise FileError for any others."""
        unknown = values.keys() - {field.name for field in dataclasses.fields(cls)}
        if unknown:
            raise FileError(f"pretrained has unknown keys: {summarize(unknown)}")
        try:
            # One by one: in a hostile file each value may consist of many objects.
            checked = [_label(label) for label in itertools.islice(labels, MAX_LABELS + 1)]
            return cls(**{**values, "labels": checked or values.get("labels", ())})
        except TnadaptError as error:
            raise FileError(f"pretrained: {error}") from error


def _check_line(field: str, value: str) -> None:
    if len(value) > _MAX_TEXT or not value.isprintable():
        raise ConfigError(
            f"{field} must be at most {_MAX_TEXT} letters without control characters; got {safe_repr(value)}"
        )


def _check_choice(field: str, value: str, known: Sequence[str]) -> None:
    if value not in known:
        listed = ", ".join(filter(None, known))
        raise ConfigError(f"{field} must be one of {listed}; got {safe_repr(value)}")


def _own_labels(labels: Sequence[str]) -> tuple[str, ...]:
    if len(labels) > MAX_LABELS:
        raise ConfigError(f"labels must be at most {MAX_LABELS}; got {pluralize(len(labels), 'label')}")
    return tuple(map(_label, labels))


def _label(label: Any) -> str:
    if not isinstance(label, str) or len(label) > _MAX_TEXT or not encodes(label):
        raise ConfigError(f"a label must be a string of at most {_MAX_TEXT} letters; got {safe_repr(label)}")
    return label


def _own_settings(settings: Mapping[str, Any], library: str) -> dict[str, Any]:
    known, values = _SETTINGS[library], {}
    for name, value in settings.items():
        if name not in known:
            raise ConfigError(f"settings of {library} must be among {', '.join(known)}; got {safe_repr(name)}")
        value = list(value) if isinstance(value, tuple) else value
        if not known[name](value):
            raise ConfigError(f"settings have an impossible {name}: {safe_repr(value)}")
        values[name] = value
    return values


def _own_inputs(inputs: Mapping[str, Any]) -> dict[str, Any]:
    if len(inputs) > _MAX_INPUTS:
        raise ConfigError(f"inputs must be at most {_MAX_INPUTS} settings; got {len(inputs)}")
    values = {}
    for name, value in inputs.items():
        _check_line("the name of a setting in inputs", name)
        value = list(value) if isinstance(value, tuple) else value
        items = value if isinstance(value, list) else [value]
        if len(items) > _MAX_TEXT or not all(map(_plain, items)):
            raise ConfigError(
                f"inputs[{safe_repr(name)}] must be text, a number, a boolean, None or a list of these; got "
                f"{safe_repr(value)}"
            )
        values[name] = value
    if len(json.dumps(values)) > 1 << 14:
        raise ConfigError("inputs must be small settings, of at most 16 KiB as JSON")
    return values


def _plain(value: Any) -> bool:
    if isinstance(value, str):
        return len(value) <= _MAX_TEXT and encodes(value)
    if isinstance(value, int):  # and booleans
        return abs(value) < 1 << 63
    return value is None or (isinstance(value, float) and math.isfinite(value))
