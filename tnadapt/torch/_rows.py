"""One adapter, or none, for each row of a batch."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from torch import nn

from tnadapt.errors import ConfigError, TargetError, safe_repr

from ._experts import sees_tokens_in_order
from ._idle_caches import trim_idle
from ._quantized import is_embedding
from ._registry import attached, overlapping
from ._row_assignment import RowAssignment, entered
from ._row_pass import check_usable, row_runner
from ._state import AdapterState

__all__ = ["BASE", "assigned", "rows"]

#: PEFT's name for no adapter.
BASE = "__base__"


@contextlib.contextmanager
def rows(model: nn.Module, names: Sequence[str | None]) -> Iterator[None]:
    """Give each row of a batch its own adapter, or none, inside ``with``.

    Parameters
    ----------
    model : Module
        The model that the adapters are attached to, a submodule of it or a wrapper.
    names : sequence of str or None
        An adapter's name for each row; None, or PEFT's ``"__base__"``, for the base alone. If a layer gets more rows,
        each name stands for the same number of consecutive ones: ``generate`` repeats rows like this for beams and
        return sequences, and so do models that flatten batch and tokens into one dimension.

    Raises
    ------
    TargetError
        If there is no adapter of a name, one is merged, a named one is disabled, or rows cannot be told apart: the
        batch is not the first dimension, or the weights are those of experts. In a forward pass: if the first dimension
        of a layer's input is not a multiple of the number of names.
    ConfigError
        If ``names`` is not a sequence of names.

    Notes
    -----
    A row's output is that of the row alone with its adapter activated: with the adapter's mixing weight, or 1 if that
    is 0. Adapters that no row has do not act; one that is attached inside acts on every row. Gradients flow as usual.

    It holds for the thread that enters it (more precisely, for its context), so threads with different rows do not mix;
    a thread that is started inside has to enter it itself. Inside another ``with rows(...)``, the inner one counts.

    Where a pipeline repeats the whole batch, as classifier-free guidance does, give a name for each row of the repeated
    batch: ``[*names, *names]``.

    Examples
    --------
    >>> import torch, tnadapt.torch
    >>> model = torch.nn.TransformerEncoderLayer(8, 2, batch_first=True).eval()
    >>> for name in "ab":
    ...     adapter = tnadapt.torch.attach(model, "lora", "all-linear", name, rank=2)
    ...     for parameter in adapter.parameters():
    ...         _ = torch.nn.init.normal_(parameter)
    >>> x = torch.randn(3, 5, 8)
    >>> with rows(model, ["b", None, "a"]):
    ...     y = model(x)
    >>> tnadapt.torch.adapters(model)["a"].activate()
    >>> torch.testing.assert_close(y[2:], model(x[2:]))
    """
    assignment = assigned(model, names)
    try:
        with entered(assignment, row_runner()):
            for state in filter(None, assignment.groups):
                state.idle = None
            yield
    finally:
        trim_idle(assignment.governed)


def assigned(
    model: nn.Module, names: Sequence[str | None], weights: Mapping[AdapterState, float] | None = None
) -> RowAssignment:
    """Return the assignment that :func:`rows` enters, after its checks."""
    if isinstance(names, str) or not isinstance(names, Sequence) or not names:
        raise ConfigError(
            "rows() needs a list with an adapter's name, or None, for each row of the batch; got " + safe_repr(names)
        )
    there = attached(model)
    states: list[AdapterState | None] = []
    for name in names:
        if name is not None and not isinstance(name, str):
            raise ConfigError(f"an entry of rows() is an adapter's name or None; got {safe_repr(name)}")
        if name is None or (name == BASE and name not in there):
            states.append(None)
        elif name in there:
            states.append(there[name])
        else:
            listed = ", ".join(map(repr, there)) or "none"
            raise TargetError(f"no adapter {name!r} on this model; there are: {listed}, and None for the base")
    governed = overlapping(model)
    named = {state for state in states if state is not None}
    for state in governed:
        check_usable(state, state in named)
    _check_batch_first(model, named)
    _check_experts(named)
    _check_embeddings(model, named)
    return RowAssignment(states, governed, weights)


def _check_batch_first(model: nn.Module, named: set[AdapterState]) -> None:
    owners = {id(slot.owner): slot.target.name for state in named for slot in state.slots}
    for path, module in model.named_modules():
        if getattr(module, "batch_first", True) is False:
            # torch's Transformer layers have it in their attention alone, and their other layers see the same order.
            around = isinstance(module, nn.MultiheadAttention) and path
            outer = model.get_submodule(path.rpartition(".")[0]) if around else module
            inside = next((owners[id(one)] for one in outer.modules() if id(one) in owners), None)
            if inside is not None:
                raise TargetError(
                    f"{path or type(model).__name__} has batch_first=False: the first dimension of its input, which "
                    f"{inside} sees, is not that of the batch's rows. Build the model with batch_first=True, or run "
                    "the rows of each adapter on their own, after activate()"
                )


def _check_experts(named: set[AdapterState]) -> None:
    for state in named:
        for slot in state.slots:
            target = slot.target
            if target.index is None:
                apart = "experts" not in target.module.split(".")
            else:
                apart = sees_tokens_in_order(slot.owner)
            if not apart:
                raise TargetError(
                    f"{target.name} belongs to experts, which see selected tokens of all rows: their rows cannot be "
                    f"told apart. Run the rows of adapter {state.name!r} on their own, after activate()"
                )


# Embeddings that are looked up by each row's own tokens or positions. Others, such as tables of relative positions, get
# indices without rows.
_BY_ROWS = ("embed_positions", "position", "token_type", "wpe", "wte")


def _check_embeddings(model: nn.Module, named: set[AdapterState]) -> None:
    found: list[Any] = [module for module in model.modules() if hasattr(module, "get_input_embeddings")]
    if not found:
        return  # not one of transformers' models, whose embeddings are known
    inputs = set()
    for one in found:
        with contextlib.suppress(NotImplementedError, AttributeError):
            inputs.add(id(one.get_input_embeddings()))
    for state in named:
        for slot in state.slots:
            name = slot.target.module.rpartition(".")[2]
            if is_embedding(slot.owner) and id(slot.owner) not in inputs and not name.startswith(_BY_ROWS):
                raise TargetError(
                    f"{slot.target.name} is not an embedding of tokens or positions, and its indices may have no rows: "
                    f"run the rows of adapter {state.name!r} on their own, after activate()"
                )
