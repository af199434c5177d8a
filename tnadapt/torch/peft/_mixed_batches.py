"""One adapter for each sample of a batch, by PEFT's ``adapter_names=``: :func:`tnadapt.torch.rows` with PEFT's checks.

The sentences of the errors are PEFT's, for which code that uses PEFT looks.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, cast

from torch import Tensor, nn

from tnadapt.errors import ConfigError, TargetError, safe_repr

from .._row_assignment import RowAssignment, entered
from .._row_pass import row_runner
from .._rows import BASE, assigned
from ._peft_library import AuxiliaryTrainingWrapper
from ._tuner_layer import TnadaptLayer

__all__ = ["mixed_batch"]

_INPUTS = ("input_ids", "inputs", "inputs_embeds", "pixel_values", "input_values", "input_features", "X")


@contextlib.contextmanager
def mixed_batch(
    tuner: nn.Module, layer: TnadaptLayer, names: Any, args: Sequence[Any], kwargs: Mapping[str, Any]
) -> Iterator[None]:
    """Give each sample its adapter inside ``with``; with the arguments of the forward pass or of ``generate``."""
    if not isinstance(names, (list, tuple)) or not names:
        raise ConfigError(f"adapter_names must be a list with a name for each sample; got {safe_repr(names)}")
    if tuner.training:
        raise ConfigError(
            "Cannot pass `adapter_names` when the model is in training mode. Call eval(), or train with "
            "tnadapt.torch.rows(model, names)"
        )
    unknown = sorted({str(name) for name in names} - {*layer.handles, BASE})
    if unknown:
        raise TargetError(f"Trying to infer with non-existing adapter(s): {', '.join(unknown)}")
    if layer.merged:
        raise TargetError(
            "Cannot pass `adapter_names` when there are merged adapters, please call `unmerge_adapter` first."
        )
    x = _samples(args, kwargs)
    if x is not None and len(x) != len(names):
        raise _wrong_length(names, x)
    # PEFT's name of the base, whatever adapters there are besides the plug-in's.
    wanted = [None if name == BASE else name for name in names]
    assignment = assigned(tuner, wanted, layer.inactive_weights())
    handles = _hooks(tuner, assignment)
    try:
        with entered(assignment, row_runner()):
            yield
    finally:
        for handle in handles:
            handle.remove()


def _samples(args: Sequence[Any], kwargs: Mapping[str, Any]) -> Tensor | None:
    """Return the tensor whose first dimension consists of the samples, as far as it is known."""
    found = next((kwargs[name] for name in _INPUTS if kwargs.get(name) is not None), args[0] if args else None)
    return found if isinstance(found, Tensor) and found.ndim else None


def _wrong_length(names: Sequence[Any], x: Tensor) -> TargetError:
    return TargetError(
        "Length of `adapter_names` should be the same as the number of inputs, but got "
        f"{len(names)} and {len(x)} respectively."
    )


def _hooks(tuner: nn.Module, assignment: RowAssignment) -> list[Any]:
    """Check what the model gets, and pass the names to PEFT's wrappers of ``modules_to_save``."""
    names = [BASE if name is None else name for name in assignment.names]

    def check(module: nn.Module, args: Any, kwargs: dict[str, Any]) -> None:
        # Some of PEFT's forward passes do not show their inputs before. generate() repeats samples.
        x = _samples(args, kwargs)
        if x is not None and len(x) % len(names):
            raise _wrong_length(names, x)

    def choose(module: nn.Module, args: Any, kwargs: dict[str, Any]) -> Any:
        number = len(args[0]) // len(names) if args and isinstance(args[0], Tensor) else 1
        # Consecutive samples of one name, as generate() repeats them.
        return args, {**kwargs, "adapter_names": [name for name in names for _ in range(max(number, 1))]}

    wrappers = [module for module in tuner.modules() if isinstance(module, AuxiliaryTrainingWrapper)]
    hooks = [module.register_forward_pre_hook(choose, with_kwargs=True) for module in wrappers]
    return [*hooks, cast(nn.Module, tuner.model).register_forward_pre_hook(check, with_kwargs=True)]
