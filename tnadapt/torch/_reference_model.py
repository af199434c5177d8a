"""A frozen copy of a model that shares the base's tensors: the reference of preference training."""

from __future__ import annotations

import copy

from torch import Tensor, nn

from tnadapt.argument_checks import checks_arguments
from tnadapt.errors import TargetError

from ._registry import attached
from ._removal import take_off
from ._state import is_array

__all__ = ["reference_model"]


@checks_arguments
def reference_model(model: nn.Module, *, with_adapters: bool = False) -> nn.Module:
    """Return a frozen copy of a model, without its adapters, that shares the base's parameters.

    DPO, GRPO with a divergence, and distillation compare the model in training with a reference. This one takes almost
    no memory: only the modules are copied, and parameters that are trained.

    Parameters
    ----------
    model : Module
        A model with adapters, none of them merged.
    with_adapters : bool
        Whether the reference is the model with its adapters as they are now, in copies of their own, such as after
        supervised fine-tuning. By default it is the base.

    Returns
    -------
    Module
        Of the model's class, in evaluation mode. No parameter of it requires a gradient.

    Raises
    ------
    TargetError
        If the model has no adapter, or one is merged.

    Notes
    -----
    Parameters that ``keep_trainable`` left free are copied with their current values: create the reference before
    training. The frozen parameters are the same objects in both models, so do not move only one of them to another
    device or dtype, and do not shard them (FSDP). Merge the adapter that was trained once the reference is no longer
    used: the sum would be in both models, and ``merge()`` warns of it. Merging on the reference itself is refused.

    Examples
    --------
    >>> import torch, tnadapt.torch
    >>> model = torch.nn.TransformerEncoderLayer(16, 2, dim_feedforward=32, dropout=0.0, batch_first=True)
    >>> x = torch.randn(2, 3, 16)
    >>> before = model(x)
    >>> adapter = tnadapt.torch.attach(model)
    >>> reference = tnadapt.torch.reference_model(model)
    >>> with torch.no_grad():
    ...     for array in adapter.parameters():
    ...         _ = array.add_(1.0)
    >>> [torch.allclose(one(x), before, atol=1e-5) for one in (reference, model)]
    [True, False]
    >>> reference.linear1.weight is model.linear1.weight
    True

    In TRL: ``DPOTrainer(model, ref_model=tnadapt.torch.reference_model(model), …)``.
    """
    states = attached(model)
    if not states:
        raise TargetError(
            f"{type(model).__name__} has no adapter, so that all of its parameters may be trained: for a reference, "
            "copy.deepcopy() it"
        )
    merged = next((state for state in states.values() if state.merged is not None), None)
    if merged is not None:
        raise TargetError(f"adapter {merged.name!r} is merged into the weights that the reference shares: unmerge() it")
    shared = _shared(model)
    # A tensor that the memo names is not copied.
    reference = copy.deepcopy(model, {id(tensor): tensor for tensor in shared})
    for state in states.values():
        state.references.add(reference)
    for state in attached(reference).values():
        state.shares_weights = True
        # Removing an adapter restores what was trainable before attach(), which here would be in the model in training.
        state.was_trainable = dict.fromkeys(state.was_trainable, False)
        if not with_adapters:
            take_off(state)
    own = {id(tensor) for tensor in shared}
    for parameter in reference.parameters():
        if id(parameter) not in own:
            parameter.requires_grad_(False)
    return reference.eval()


def _shared(model: nn.Module) -> list[Tensor]:
    """Return the parameters of the base that are frozen; buffers are small, and a forward pass may write to them."""
    frozen: list[Tensor] = [
        parameter for name, parameter in model.named_parameters() if not is_array(name) and not parameter.requires_grad
    ]
    return frozen
