"""The model's own parameters that stay trainable with an adapter: those that a caller names, and biases."""

from __future__ import annotations

import itertools
from collections.abc import Iterable, Sequence

from torch import nn

from tnadapt.argument_checks import is_sequence, wrong_argument
from tnadapt.errors import ConfigError, TargetError, safe_repr
from tnadapt.targets.target import Target

from ._state import is_array
from ._weights import join

__all__ = ["BIASES", "kept_names", "matching"]

#: Which biases stay trainable.
BIASES = ("none", "adapted", "all")


def kept_names(model: nn.Module, patterns: str | Sequence[str], biases: str, targets: Sequence[Target]) -> list[str]:
    """Return the names of the parameters that stay trainable: those that patterns match, and biases.

    Parameters
    ----------
    model : Module
    patterns : str or sequence of str
        As for :func:`matching`.
    biases : {"none", "adapted", "all"}
        Of no layer, of the layers that the targets are weights of, or of all layers.
    targets : sequence of Target

    Returns
    -------
    list of str

    Raises
    ------
    TargetError
        As for :func:`matching`; or if there is no such bias.
    ConfigError
        If ``biases`` is another word.

    Examples
    --------
    >>> model = nn.Sequential(nn.Linear(2, 2), nn.Linear(2, 2))
    >>> kept_names(model, (), "adapted", [Target("1", (2, 2))])
    ['1.bias']
    """
    kept = matching(model, patterns, {target.name for target in targets})
    if not isinstance(biases, str) or biases not in BIASES:
        raise ConfigError(f"biases must be one of {', '.join(BIASES)}; got {safe_repr(biases)}")
    if biases == "none":
        return kept
    own = {join(target.module, bias) for target in targets for bias in _biases_of(target.parameter)}
    found = [name for name in _biases(model) if biases == "all" or name in own]
    if not found:
        layer = "adapted layer" if biases == "adapted" else "layer"
        raise TargetError(f"biases={biases!r}: no {layer} of this {type(model).__name__} has a bias; leave biases out")
    return list(dict.fromkeys([*kept, *found]))


def _biases(model: nn.Module) -> list[str]:
    """Return the names of all biases: a shared one under the first of its names."""
    return [
        name
        for name, parameter in model.named_parameters()
        if name.rpartition(".")[2].endswith("bias") and parameter.is_floating_point() and not is_array(name)
    ]


def _biases_of(weight: str) -> tuple[str, ...]:
    """Return the names that the bias of a weight may have in its module."""
    # nn.MultiheadAttention has one in_proj_bias for q_proj_weight, k_proj_weight and v_proj_weight.
    return weight.replace("weight", "bias"), *(("in_proj_bias",) if weight.endswith("_proj_weight") else ())


def matching(model: nn.Module, patterns: str | Sequence[str], targets: Iterable[str]) -> list[str]:
    """Return the parameters and buffers whose dotted paths contain a pattern as whole components, in order."""
    if not isinstance(patterns, str) and not is_sequence(patterns):
        raise wrong_argument("keep_trainable", "a name or a sequence of names", patterns, TargetError)
    patterns = [patterns] if isinstance(patterns, str) else list(patterns)
    for pattern in patterns:
        if not isinstance(pattern, str):
            raise wrong_argument("keep_trainable", "a name or a sequence of names", pattern, TargetError)
    # What a state dict leaves out. Making one raises an error for some modules, as bitsandbytes' embeddings.
    left_out = {
        join(path, name)
        for path, module in model.named_modules(remove_duplicate=False)
        for name in module._non_persistent_buffers_set
    }
    # A tied weight has several names and is kept under the first.
    tensors = list(
        itertools.chain(model.named_parameters(remove_duplicate=False), model.named_buffers(remove_duplicate=False))
    )
    first: dict[int, str] = {}
    for name, tensor in tensors:
        first.setdefault(id(tensor), name)
    names = {name: first[id(tensor)] for name, tensor in tensors if name not in left_out and not is_array(name)}
    kept: dict[str, None] = {}
    for pattern in patterns:
        found = [own for name, own in names.items() if f".{pattern}." in f".{name}."]
        if not found:
            modules = ", ".join(name for name, _ in model.named_children())
            raise TargetError(
                f"keep_trainable: no parameter is at or below {safe_repr(pattern)}; the model's parts are: {modules}"
            )
        kept.update(dict.fromkeys(found))
    both = [name for name in targets if name in kept]
    if both:
        raise TargetError(
            f"{both[0]} is both a target and in keep_trainable; it can be adapted or trained itself, not both"
        )
    return list(kept)
