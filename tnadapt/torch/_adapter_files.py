"""The files of an adapter: the methods of :class:`tnadapt.torch.Adapter` that save, upload and exchange it."""

from __future__ import annotations

import logging
import os
from collections.abc import Mapping
from typing import Any

from tnadapt.argument_checks import checks_arguments
from tnadapt.checkpoints.pretrained_model import Pretrained
from tnadapt.errors import ConfigError, escaped

from . import _adapter_saving as saving
from . import _folders as folders
from ._bundle.libraries import describe
from ._state import AdapterState

__all__ = ["AdapterFiles"]

_log = logging.getLogger(__name__)


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
        saving.save(self._state, path, self.pretrained, store_bases)
        _log.info("saved %r to %s", self, escaped(str(path)))

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
        folders.save(self._state, folder, self.pretrained, (tokenizer, processor), metrics, store_bases, overwrite_card)

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
        return folders.push(
            self._state, repo_id, self.pretrained, (tokenizer, processor), metrics, store_bases, overwrite_card,
            {"private": private, "token": token, "commit_message": commit_message, "revision": revision},
        )  # fmt: skip

    @checks_arguments
    def swap(self, path: str | os.PathLike[str]) -> None:
        """Load the arrays of another adapter's file, of the same config and targets, in place without recompiling.

        Raises
        ------
        FileError
            If the file does not fit; nothing is changed.
        """
        saving.swap(self._state, path)
        _log.info("swapped the arrays of %r for those in %s", self, escaped(str(path)))
