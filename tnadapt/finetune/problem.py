"""A problem: a pretrained model and the data to fine-tune it on, in the form that trainings use."""

from __future__ import annotations

import dataclasses
import hashlib
import json
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from tnadapt.errors import TargetError
from tnadapt.targets.roles import is_within

from ._learning_task import LearningTask
from ._specification import Part


@dataclasses.dataclass(frozen=True)
class Problem:
    """A pretrained model and labeled samples in its input format.

    Attributes
    ----------
    name : str
    kind : {"image", "text"}
    classes : tuple of str
    parts : dict of str to Part
        ``training``, ``validation``, ``test``.
    build : callable
        ``build(seed)`` returns a new copy of the base model, with a head drawn from the seed.
    logits : callable
        ``logits(model, inputs)`` returns logits of shape (n, classes).
    keep_trainable : tuple of str
        Modules or parameters that are trained along with every adapter: all of ``drawn``, and others.
    drawn : tuple of str
        Modules or parameters that ``build`` draws from the seed, such as a new head; the rest is the base.
    task : LearningTask
        Its loss and metrics.
    threads : int, optional
        Number of threads per training; all if None.
    sketch : callable, optional
        ``sketch()`` returns a model of the same structure, for checks before the base is needed; ``build(0)`` if None.
    rate : float, optional
        The learning rate that suits the base; by default it follows from the weights of ``build(0)``.
    source : mapping
        What a saved adapter needs to encode inputs: name of the tokenizer, lengths, settings of images.
    """

    name: str
    kind: str
    classes: tuple[str, ...]
    parts: dict[str, Part]
    build: Callable[[int], nn.Module]
    logits: Callable[[nn.Module, Any], Tensor]
    keep_trainable: tuple[str, ...]
    drawn: tuple[str, ...]
    task: LearningTask
    threads: int | None = None
    sketch: Callable[[], nn.Module] | None = None
    rate: float | None = None
    source: Mapping[str, Any] = dataclasses.field(default_factory=dict)


def under(name: str, keep: Sequence[str]) -> bool:
    """Return whether a parameter's path contains one of the names as whole components, as in ``keep_trainable``.

    Examples
    --------
    >>> under("model.head.weight", ["head"]), under("header.weight", ["head"])
    (True, False)
    """
    return any(is_within(name, kept) for kept in keep)


def check_kept(model: nn.Module, keep: Sequence[str]) -> None:
    """Raise a TargetError if a name to keep matches nothing."""
    names = [name for name, _ in model.named_parameters()]
    for kept in keep:
        if not any(is_within(name, kept) for name in names):
            tops = ", ".join(sorted({repr(name.split(".")[0]) for name in names}))
            raise TargetError(
                f"--keep-trainable {kept}: the model has no such parameter or module; its top-level parts are {tops}"
            )


def free(model: nn.Module, keep: Sequence[str]) -> None:
    """Freeze all except the kept parameters.

    Raises
    ------
    TargetError
        If a name to keep matches nothing.
    """
    check_kept(model, keep)
    for name, parameter in model.named_parameters():
        parameter.requires_grad_(under(name, keep))


def samples_digest(parts: Mapping[str, Part], batch: int = 256) -> str:
    """Return the SHA-256 of labels and model inputs: tokens, or normalized pixels."""
    seen = hashlib.sha256()
    for name, part in parts.items():
        seen.update(name.encode())
        seen.update(part.labels.numpy().tobytes())
        for indices in torch.split(torch.arange(len(part.labels)), batch):
            inputs = part.batch(indices, torch.device("cpu"))
            for tensor in inputs.values() if isinstance(inputs, Mapping) else [inputs]:
                seen.update(f"{tensor.dtype} {tuple(tensor.shape)}".encode())
                seen.update(tensor.contiguous().numpy().tobytes())
    return seen.hexdigest()


# Fields of a transformers config that describe the origin of a model rather than the model.
_ORIGIN = ("_name_or_path", "transformers_version", "architectures")


def base_digest(model: nn.Module, drawn: Iterable[str] = ()) -> str:
    """Return the SHA-256 of a model's modules, settings and weights, except randomly initialized ones."""
    drawn = tuple(drawn)
    seen = hashlib.sha256(repr(model).encode())
    config: Any = getattr(model, "config", None)
    if hasattr(config, "to_dict"):
        settings = {name: value for name, value in config.to_dict().items() if name not in _ORIGIN}
        seen.update(json.dumps(settings, sort_keys=True, default=str).encode())
    for name, tensor in sorted(model.state_dict().items()):
        if under(name, drawn):
            continue
        seen.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}".encode())
        seen.update(tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy().tobytes())
    return seen.hexdigest()
