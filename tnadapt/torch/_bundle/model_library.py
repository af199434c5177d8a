"""ModelLibrary, the interface of a library that builds pretrained models."""

from __future__ import annotations

import abc
import contextlib
import dataclasses
import logging
from collections.abc import Iterator
from typing import Any, ClassVar

import torch
from torch import nn

from tnadapt.checkpoints.pretrained_model import Pretrained
from tnadapt.errors import TnadaptError

__all__ = ["BuildOptions", "ModelLibrary", "missing", "quiet_loggers", "refusing"]


@dataclasses.dataclass(frozen=True)
class BuildOptions:
    """What the caller of ``load_pretrained`` chose, rather than the file.

    Attributes
    ----------
    device : str or torch.device or None
    dtype : torch.dtype or None
        None for the dtype that the file records.
    quantization_config : object or None
    token : str or bool or None
        Token of the hub.
    trusted : bool
        Whether the caller named the base. Of a base that only the file names, no pickle is read.
    """

    device: Any = None
    dtype: torch.dtype | None = None
    quantization_config: Any = None
    token: str | bool | None = None
    trusted: bool = False

    def dtype_for(self, about: Pretrained) -> torch.dtype | None:
        """Return the dtype to build with; None if neither the caller nor the file says."""
        return self.dtype or (getattr(torch, about.dtype) if about.dtype else None)


class ModelLibrary(abc.ABC):
    """A library of pretrained models. One class in one file, registered in ``libraries``."""

    #: Its name in files.
    name: ClassVar[str]

    @abc.abstractmethod
    def describe(self, model: nn.Module) -> Pretrained | None:
        """Return what the model says about itself; None if it is not of this library. Imports nothing."""

    @abc.abstractmethod
    def build(self, about: Pretrained, options: BuildOptions) -> tuple[nn.Module, frozenset[str]]:
        """Build the model; return it with the names of the parameters that its base has no values for."""

    @abc.abstractmethod
    def processor(self, about: Pretrained, folder: str | None, token: str | bool | None) -> Any:
        """Return what prepares the model's inputs: from a folder, or else (None) from the base."""

    @abc.abstractmethod
    def set_labels(self, model: nn.Module, about: Pretrained) -> None:
        """Name the model's outputs."""


def missing(library: str) -> TnadaptError:
    """Return the error for a library that is not installed."""
    return TnadaptError(f"{library} is not installed, which builds the base model: pip install 'tnadapt[hub]'")


@contextlib.contextmanager
def refusing(what: str, way: str) -> Iterator[None]:
    """Turn any error of a hub or loader into a one-line TnadaptError with the way out."""
    try:
        yield
    except TnadaptError:
        raise
    except Exception as error:
        lines = [line.strip() for line in str(error).splitlines() if line.strip()]
        raise TnadaptError(f"{what}: {(lines or [type(error).__name__])[0][:300]}; {way}") from error


@contextlib.contextmanager
def quiet_loggers(*names: str) -> Iterator[None]:
    """Show only errors of other libraries' loggers inside ``with``."""
    before = {name: logging.getLogger(name).level for name in names}
    for name in names:
        logging.getLogger(name).setLevel(logging.ERROR)
    try:
        yield
    finally:
        for name, level in before.items():
            logging.getLogger(name).setLevel(level)
