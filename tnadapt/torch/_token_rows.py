"""Targets that are the rows of some tokens in a model's embedding."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable
from typing import Any

from torch import nn

from tnadapt.errors import TargetError, integer, safe_repr
from tnadapt.targets.row_sets import MAX_SIZE
from tnadapt.targets.target import RowIndices, Target

from ._quantized import is_embedding
from ._weights import modules_of, weights_of

__all__ = ["token_targets"]


def token_targets(model: nn.Module, tokens: Iterable[int], module: str | None = None) -> list[Target]:
    """Return the rows of some tokens in an embedding as a target, for :func:`attach`.

    With ``tnadapt.presets.dense()`` exactly these rows are trained, as with PEFT's ``trainable_token_indices``. Any
    other config makes the rows, too.

    Parameters
    ----------
    model : Module
    tokens : iterable of int
        Their indices in the vocabulary, in any order: what a tokenizer's ``convert_tokens_to_ids`` returns.
    module : str, optional
        Path of the embedding; by default the one that the model's ``get_input_embeddings()`` returns, or the only one
        it has.

    Returns
    -------
    list of Target
        One target. Where the embedding is tied to the output head, attach it with ``keep_tied=True``, and the head has
        the changed rows, too.

    Raises
    ------
    TargetError
        If there is no such embedding, or a token is not in it.

    Examples
    --------
    >>> import torch, tnadapt, tnadapt.torch
    >>> model = torch.nn.Sequential(torch.nn.Embedding(10, 4), torch.nn.Linear(4, 2))
    >>> adapter = tnadapt.torch.attach(model, tnadapt.presets.dense(), tnadapt.torch.token_targets(model, [9, 5]))
    >>> adapter.num_parameters, adapter.targets[0].rows
    (8, RowIndices(numbers=(5, 9)))
    """
    if module is not None and not isinstance(module, str):
        raise TargetError(f"module must be the path of an embedding, or None; got {safe_repr(module)}")
    if not isinstance(model, nn.Module):
        raise TargetError(f"tokens are rows of an embedding in a torch module; got {type(model).__name__}")
    try:
        given = list(tokens)
    except TypeError:
        raise TargetError(f"tokens must be indices of a vocabulary; got {safe_repr(tokens)}") from None
    numbers = {integer("a token", token, 0, MAX_SIZE, TargetError) for token in given}
    if not numbers:
        raise TargetError("tokens must be at least one index of a vocabulary; got none")
    whole = _embedding(model, module)
    if max(numbers) >= whole.out:
        raise TargetError(
            f"token {max(numbers)} is not among the {whole.out} of {whole.name}: resize the embedding first"
        )
    return [dataclasses.replace(whole, rows=RowIndices(tuple(sorted(numbers))))]


def _embedding(model: nn.Module, path: str | None) -> Target:
    """Return the whole weight of a model's token embedding."""
    embeddings = {name: module for name, module in modules_of(model) if is_embedding(module)}
    if path is not None:
        found = [name for name in embeddings if name == path]
    else:
        own = _input_embeddings(model)
        found = [name for name, module in embeddings.items() if own is None or module is own]
    if len(found) != 1:
        there = f"it has {', '.join(embeddings)}" if embeddings else "it has none"
        raise TargetError(
            f"{safe_repr(path)} is not an embedding of {type(model).__name__}; {there}"
            if path is not None
            else f"which embedding of {type(model).__name__} has the tokens is unclear; {there}: give module='path'"
        )
    (weight,) = weights_of(found[0], embeddings[found[0]])
    return weight.target("embedding", "")


def _input_embeddings(model: Any) -> Any:
    try:
        return model.get_input_embeddings()
    except (AttributeError, NotImplementedError, TypeError):
        return None
