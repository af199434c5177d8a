"""The choice of a strategy for one weight, and the refusal of those that do not suit it."""

from __future__ import annotations

from torch import nn

from tnadapt.algebra.applying import Applying
from tnadapt.algebra.config import Config
from tnadapt.algebra.factoring import Factoring, factoring
from tnadapt.algebra.superlora import SuperLoRA
from tnadapt.errors import ConfigError, TargetError, safe_repr
from tnadapt.targets.target import RowIndices, Target

from ._embedding_forward import is_lookup
from ._experts import tokens_of_one
from ._forward_patch import ForwardPatch
from ._merging import numbers
from ._quantized import QuantizedLayer, is_embedding, is_packed, quantized_type
from ._step_cost import MACHINES, choose

__all__ = ["is_quantized", "strategy_of"]


def strategy_of(
    wanted: str,
    plan: SuperLoRA,
    index: int,
    tokens: int,
    target: Target,
    owner: nn.Module,
    host: nn.Module,
    activation: str | None,
    dropout: bool = False,
) -> tuple[str, Factoring | None]:
    """Return the strategy for a weight, and the factors of its update where the strategy uses them."""
    config, applying, plan = plan.config, plan.applying, plan.arrays_plan
    weight = owner._parameters.get(target.parameter)
    quantized = is_quantized(owner, target)
    # Adding to the output must be equivalent to changing the weight, which is known only for linear forwards.
    embeds, looks_up = is_embedding(owner), host is owner and _looks_up(owner) and target.parameter == "weight"
    if embeds and quantized and (quantized_type(owner) is None or not looks_up):
        raise TargetError(
            f"{target.name} belongs to a quantized embedding, {type(owner).__name__}, whose forward tnadapt does not "
            "know as a lookup: leave it out of the targets, or register its type with tnadapt.torch.register_quantized"
        )
    if looks_up and activation is None:
        return _of_lookup(wanted, plan, index, target, config, applying, quantized)
    linear = type(owner).forward is nn.Linear.forward or type(owner).__name__ == "Conv1D"
    linear = linear or (quantized and not embeds and not isinstance(owner, nn.modules.conv._ConvNd))
    own = host is owner and linear and len(target.stored) == 2 and target.parameter == "weight"
    if target.index is not None and not quantized and activation is None:
        # Whatever the module does with the matrices of its experts, the update of one acts on products with it.
        own, tokens = True, tokens_of_one(owner, tokens, target.stored[0])
    how = factoring(plan, index) if own and applying.takes_factors else None
    if activation is not None and not applying.additive:
        raise ConfigError(
            f"activation={activation!r} acts on the input of one of two factors, so that there is no ΔW, and "
            f"apply={config.apply!r} needs one: leave activation out, or use apply='add'"
        )
    if quantized and not applying.additive:
        _check_quantized(config, applying, target, owner)
    can_factor = how is not None
    if activation is not None:
        if plan.point.subtracts:
            raise ConfigError(
                f"activation={activation!r} depends on the input, so that the update of a start cannot be subtracted: "
                f"use start='zero' instead of {config.start!r}"
            )
        if how is None or not how.is_plain or wanted not in ("auto", "factored"):
            raise ConfigError(
                f"activation={activation!r} acts between the two factors of one low-rank matrix per weight, in the "
                f"factored strategy; {target.name} with {safe_repr(config)} has none: use tnadapt.presets.lora(rank)"
            )
        split = how.network.splits[0]
        left = how.network.prefixes[0][0] + split.zero
        if activation == "relu" and not all(f"{zero}.".startswith(f"{left}.") for zero in how.group.start.zeros):
            raise ConfigError(
                f"activation='relu' has the derivative zero at zero, and config.sources freezes {split.zero!r}, the "
                "array that has to start at zero behind it: nothing would learn. Use another activation, or train it"
            )
        return "factored", how
    if wanted == "factored" and not can_factor:
        raise ConfigError(
            "strategy='factored' needs a linear layer, and an update whose rows and columns are separate, as those of "
            f"tnadapt.presets.lora(rank) or lokr(rank) are; {target.name} has {safe_repr(config)}: use strategy='auto'"
        )
    if wanted == "additive" and not applying.scales_outputs:
        raise ConfigError(
            f"strategy='additive' adds to the output, and magnitude_axis={config.magnitude_axis!r} scales the input of "
            f"{target.name}: use 'weight'"
        )
    if wanted == "additive" and not own:
        raise ConfigError(
            f"strategy='additive' needs a linear layer; {target.name} is read by {type(host).__name__} itself: "
            "use 'weight'"
        )
    if wanted == "weight" and quantized:
        raise ConfigError(f"strategy='weight' cannot add to {target.name}, which is quantized: use 'additive'")
    if wanted != "auto":
        return wanted, how if wanted == "factored" else None
    if own and not quantized and isinstance(target.rows, RowIndices) and applying.additive:
        return "additive", None  # a product with a few rows, rather than a copy of the weight of a whole vocabulary
    if own:
        device = weight.device.type if weight is not None else "cpu"
        machine = MACHINES.get(device, MACHINES["cpu"])
        packed = _moved(owner) if quantized else None
        chosen = choose(plan, index, how, tokens, machine, applying, dropout, packed)
        return chosen, how if chosen == "factored" else None
    if quantized:
        raise TargetError(
            f"{target.name} is quantized and read by {type(host).__name__} itself: leave it out of the targets"
        )
    return "weight", None


def _of_lookup(
    wanted: str, plan: SuperLoRA, index: int, target: Target, config: Config, applying: Applying, quantized: bool
) -> tuple[str, Factoring | None]:
    """Return the strategy for an embedding, whose updates can be looked up like its weight."""
    if quantized and not applying.additive:
        raise ConfigError(
            f"apply={config.apply!r} of {target.label} does more than add rows of ΔW, and the embedding is quantized: "
            "use apply='add', or leave it out of the targets"
        )
    if quantized and wanted == "weight":
        raise ConfigError(f"strategy='weight' cannot add to {target.name}, which is quantized: use 'additive'")
    if not applying.additive:
        if wanted in ("auto", "weight"):
            return "weight", None
        raise ConfigError(
            f"strategy={wanted!r} looks up rows of ΔW, and apply={config.apply!r} of {target.label} does more than add "
            "them: use 'weight', or 'auto'"
        )
    # The rows of a few tokens are as cheap to compute as their factors.
    few = isinstance(target.rows, RowIndices)
    how = factoring(plan, index) if wanted == "factored" or (wanted == "auto" and not few) else None
    if how is not None and how.sides is not None:
        how = None  # a map of rows mixes those of ΔW that are looked up
    if wanted == "factored" and how is None:
        raise ConfigError(
            "strategy='factored' looks up rows of a factor, and needs an update whose rows and columns are separate, "
            f"as those of tnadapt.presets.lora(rank) are; {target.label} has {safe_repr(config)}: use strategy='auto'"
        )
    if wanted == "auto":
        return ("additive" if how is None else "factored"), how
    return wanted, how


def _looks_up(host: nn.Module) -> bool:
    patch = ForwardPatch.of(host)
    before = host.__dict__.get("forward") if patch is None else patch.before
    return before is None and is_lookup(host)


def is_quantized(owner: nn.Module, target: Target) -> bool:
    """Return whether a weight has no numbers to read in place."""
    weight = owner._parameters.get(target.parameter)
    if weight is None or not weight.is_floating_point() or is_packed(weight):
        return True
    return quantized_type(owner) is not None


def _moved(owner: nn.Module) -> float:
    """Return the elements that dequantizing moves for each element of a quantized weight."""
    kind = quantized_type(owner)
    return QuantizedLayer.moved if kind is None else kind.moved


def _check_quantized(config: Config, applying: Applying, target: Target, owner: nn.Module) -> None:
    """Raise a ConfigError if W' of a quantized weight cannot be computed."""
    if numbers(owner, target.parameter) is None:
        raise ConfigError(
            f"apply={config.apply!r} needs the values of {target.name}, which is quantized, and they cannot be read: "
            "register its layer type with tnadapt.torch.register_quantized"
        )
    if not applying.scales_outputs:
        raise ConfigError(
            f"magnitude_axis={config.magnitude_axis!r} changes the weight itself, and {target.name} is quantized: use "
            "magnitude_axis='rows', which scales the output"
        )
