"""The specification of a study: the model and data that the user names, and samples in the model's input format."""

from __future__ import annotations

import dataclasses
import os
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

from tnadapt.argument_checks import checks_arguments
from tnadapt.checkpoints.checkpoint import gguf_place, need_gguf
from tnadapt.errors import FileError, TnadaptError, safe_repr

from .data import HOLDOUT, require_data

if TYPE_CHECKING:
    import torch
    from torch import Tensor


# -- Where the user's model is, checked before transformers looks ------------------------------------------------------


def model_place(name: str, kind: str) -> tuple[str, str]:
    """Return where a model is: a folder or a name on the hub, and the GGUF file in it, "" if there is none.

    Parameters
    ----------
    name : str
        A folder, a GGUF file, a name on the hub, or ``owner/name/file.gguf`` there.
    kind : {"text", "image"}
        What the data have.

    Raises
    ------
    FileError
        If there is no model.
    TnadaptError
        If a GGUF file cannot be read, because the package is missing or the data have images.
    """
    _require_model(name)
    folder, file = gguf_place(name)
    if file:
        if kind == "image":
            raise TnadaptError(
                f"{safe_repr(name)} is a GGUF file, of which transformers makes language models, and the data have "
                "images"
            )
        need_gguf(name)
    return folder, file


def _require_model(name: str) -> None:
    """Raise a FileError if a name is a path without a model."""
    path = Path(name)
    if not os.path.exists(name) and name.startswith((".", "/", "~")):
        raise FileError(f"no model at {name}: there is no such {'file' if path.suffix else 'folder'}")
    if gguf_place(name)[1]:
        return
    if os.path.isdir(name) and not (path / "config.json").is_file():
        raise FileError(f"no model at {name}: the folder has no config.json and no .gguf file")
    if os.path.isfile(name):
        raise FileError(
            f"no model at {name}: expected a folder with a config.json, a .gguf file or a hub name, not another file"
        )


# -- The model and the data that the user names, and samples in the model's input format -------------------------------


# Fields that do not apply to the digits.
_OF_DATA = ("task", "text_column", "label_column", "separator", "tokenizer", "image_size", "max_length")


@checks_arguments
@dataclasses.dataclass(frozen=True)
class Spec:
    """The specification of a problem: small and picklable, for :func:`~tnadapt.finetune.open_problem` and workers.

    Attributes
    ----------
    model, data : str, optional
        Both None for scikit-learn's digits.
    text_column, label_column : str, optional
    label_names : tuple of str
        Additional names that the label column may have.
    task : str, optional
        The name of a :class:`~tnadapt.finetune.tasks.LearningTask`; the one that fits the data if None.
    separator : str, optional
        Between several labels of one sample.
    tokenizer : str, optional
        A folder or hub name, if the model comes without one.
    image_size, max_length, limit : int, optional
        Pixels per side, tokens per text, and samples from each part of the source.
    holdout : float
        The fraction of each class that is held out of training to choose rates.
    keep_trainable : tuple of str
        Modules or parameters that are trained along with every adapter; a new head always is.
    head_rows : tuple of int
        Instead of a new head, use the checkpoint's head, frozen and cut to these of its classes, one for each class of
        the data in order.
    cache : Path, optional
        Folder for the pretrained model of the digits.
    pretrain_epochs : int
        Epochs of pretraining that model.
    """

    model: str | None = None
    data: str | None = None
    text_column: str | None = None
    label_column: str | None = None
    label_names: tuple[str, ...] = ()
    task: str | None = None
    separator: str | None = None
    tokenizer: str | None = None
    image_size: int | None = None
    max_length: int | None = None
    limit: int | None = None
    holdout: float = HOLDOUT
    keep_trainable: tuple[str, ...] = ()
    head_rows: tuple[int, ...] = ()
    cache: Path | None = None
    pretrain_epochs: int = 60

    def check(self) -> None:
        """Refuse what can be refused without opening the model or the data, and without torch.

        Raises
        ------
        TnadaptError
            If only one of model and data is given, one of them is a path at which nothing is, or an option is empty or
            needs both.

        Examples
        --------
        >>> Spec(model="bert-base-uncased").check()
        Traceback (most recent call last):
        tnadapt.errors.TnadaptError: --model needs --data, too; with neither, the data are scikit-learn's digits
        """
        if self.model is None and self.data is None:
            for name in _OF_DATA:
                if getattr(self, name) is not None:
                    raise TnadaptError(
                        f"--{name.replace('_', '-')} needs --model and --data; without them the data are "
                        "scikit-learn's digits"
                    )
            if self.cache is not None and self.cache.is_file():
                raise FileError(f"{self.cache} is a file and should be a folder; give another folder with --cache")
            return
        if self.model is None or self.data is None:
            option, other = ("--data", "--model") if self.model is None else ("--model", "--data")
            raise TnadaptError(f"{option} needs {other}, too; with neither, the data are scikit-learn's digits")
        for name in _OF_DATA:
            value = getattr(self, name)
            if isinstance(value, str) and not (value if name == "separator" else value.strip()):
                raise TnadaptError(f"--{name.replace('_', '-')} is empty")
        require_data(self.data)
        if not self.model.startswith("timm:"):
            _require_model(self.model)


class Part(Protocol):
    """Training, validation or test samples in the model's input format."""

    labels: Tensor
    """The targets, one row per sample: class numbers of shape (n,) or whatever the task has."""

    lengths: Tensor | None
    """Lengths of texts in tokens, to batch similar ones together. None if all inputs have the same size."""

    def batch(self, indices: Tensor, device: torch.device) -> Any:
        """Return the inputs of these samples, as :attr:`Problem.logits` takes them."""
        ...
