"""Methods of PEFT, attached by PEFT's own ``get_peft_model``; their parameters are counted on the meta device.

Scales are PEFT's defaults, except that α is the rank where PEFT divides by the rank, as in tnadapt's presets.
"""

from __future__ import annotations

import copy
import math
import warnings
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import nn

from tnadapt.algebra.presets import LARGEST_DENSE

from ..facts import Facts
from ._method import Method, Setting, UnfitError

Arguments = Mapping[str, Any]

#: Methods of PEFT that do not take part, and why.
LEFT_OUT = {
    "AdaLoRA": "needs calls in the training loop that reallocate ranks",
    "AdaMSS": "its parameters cannot be counted without the weights",
    "FRoD": "its parameters cannot be counted without the weights",
    "LN tuning, BEFT": "adapt norms or biases, not the task's weights",
    "OSF": "trains all elements of the weights",
    "Poly, X-LoRA": "combine several adapters",
    "prompts, prefixes, CPT, Cartridge, Shadow": "change the inputs or the model, not the task's weights",
}


#: The rates of PEFT's own comparison (method_comparison/MetaMathQA at 5d602fdbf), by method, the highest where it has
#: several; all others have 1e-4.
RATES = {
    "c3a": 3e-1, "delora": 1e-3, "glora": 5e-4, "gralora": 2e-4, "hira": 4.5e-3, "ia3": 5e-3, "lokr": 3e-3,
    "pvera": 3e-3, "road": 1e-3, "shira": 3e-4, "tinylora": 1e-3, "vblora": 5e-4, "vera": 1e-3,
}  # fmt: skip


class PeftMethod(Method):
    """A method of PEFT with its settings in order of size."""

    library = "PEFT"

    def __init__(
        self,
        name: str,
        title: str,
        config: str,
        arguments: Callable[[int, Facts], Arguments],
        most: Callable[[Facts], int],
        label: Callable[[Arguments], str],
        count: Callable[[Arguments, Facts], int] | None = None,
    ) -> None:
        self.name, self.title, self.config = f"peft-{name}", title, config
        self.rate = RATES.get(name, 1e-4)
        self.arguments, self.most, self.label, self.count = arguments, most, label, count
        self._counts: dict[tuple[Facts, int], int] = {}

    def largest(self, facts: Facts, sketch: nn.Module, budget: int) -> Setting:
        def counted(size: int) -> int:
            if (facts, size) not in self._counts:
                self._counts[facts, size] = self.parameters(self.arguments(size, facts), facts, sketch)
            return self._counts[facts, size]

        if self.most(facts) < 1:
            raise UnfitError("does not fit the shapes of the weights")
        if counted(1) > budget:
            raise UnfitError(f"needs at least {counted(1):,} parameters")
        low, high = 1, self.most(facts)
        while low < high:
            middle = (low + high + 1) // 2
            low, high = (middle, high) if counted(middle) <= budget else (low, middle - 1)
        # Beyond some sizes, more of it is no more parameters: LoKr's factors are full.
        arguments = self.arguments(_first(counted, low), facts)
        return self.setting(budget, self.label(arguments), counted(low), {"peft": self.config, **arguments})

    def parameters(self, arguments: Arguments, facts: Facts, sketch: nn.Module) -> int:
        """Return the number of trained parameters of a setting."""
        if self.count is not None:
            if not all(isinstance(sketch.get_submodule(module), nn.Linear) for module in facts.modules):
                raise UnfitError("is for linear layers")
            return self.count(arguments, facts)
        try:
            with torch.device("meta"):
                return trained(self._wrapped(copy.deepcopy(sketch), arguments, facts, 0))
        except Exception as error:  # PEFT raises several kinds of errors for layers that a method does not support
            raise UnfitError(f"PEFT refuses it: {str(error).splitlines()[0][:120]}") from None

    def attach(self, model: nn.Module, setting: Setting, facts: Facts, targets: Any, seed: int) -> nn.Module:
        arguments = {name: value for name, value in setting.values.items() if name != "peft"}
        # PEFT draws from the global generators.
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            return self._wrapped(model, arguments, facts, seed)

    def _wrapped(self, model: nn.Module, arguments: Arguments, facts: Facts, seed: int) -> nn.Module:
        import peft

        cls = getattr(peft, self.config)
        seeds = {name: seed for name in _SEEDS if name in cls.__dataclass_fields__}
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            config = cls(target_modules=list(facts.modules), **seeds, **arguments)
            return peft.get_peft_model(model, config)  # type: ignore[no-any-return]


def _first(counted: Callable[[int], int], size: int) -> int:
    """Return the smallest size with as many parameters as this one."""
    low, high = 1, size
    while low < high:
        middle = (low + high) // 2
        low, high = (low, middle) if counted(middle) == counted(size) else (middle + 1, high)
    return low


#: The fields by which methods of PEFT name the seed of what they draw and do not train.
_SEEDS = ("projection_prng_key", "projection_seed", "proj_seed", "random_loc_seed", "random_seed", "generator_seed")


def trained(model: nn.Module) -> int:
    """Return the number of trainable parameters."""
    return sum(parameter.numel() for parameter in model.parameters() if parameter.requires_grad)


# -- Settings in order of size --------------------------------------------------------------------


def _side(facts: Facts) -> int:
    return facts.side


def _smallest(facts: Facts) -> int:
    """Return the number of elements of the smallest weight."""
    return min(rows * cols for rows, cols in facts.shapes)


def _rank(arguments: Arguments) -> str:
    return f"r = {arguments['r']}"


def _of_ranks(name: str, title: str, config: str, *alphas: str, step: int = 1, **fixed: Any) -> PeftMethod:
    """Return a method with ranks up to the shorter side; the fields ``alphas`` equal the rank."""

    def arguments(size: int, facts: Facts) -> Arguments:
        return {"r": step * size, **dict.fromkeys(alphas, step * size), **fixed}

    return PeftMethod(name, title, config, arguments, lambda facts: facts.side // step, _rank)


def _of_values(name: str, title: str, config: str) -> PeftMethod:
    return PeftMethod(
        name, title, config, lambda size, facts: {"n_frequency": size},
        _smallest, lambda arguments: f"n = {arguments['n_frequency']}",
    )  # fmt: skip


def _blocks(facts: Facts) -> list[int]:
    """Return the common divisors of all sides."""
    common = math.gcd(*(side for shape in facts.shapes for side in shape))
    return [size for size in range(1, common + 1) if common % size == 0]


def _of_blocks(
    name: str,
    title: str,
    config: str,
    field: str,
    sizes: Callable[[Facts], list[int]],
    count: Callable[[Arguments, Facts], int] | None = None,
    **fixed: Any,
) -> PeftMethod:
    """Return a method with blocks of several sizes, those with the fewest parameters first."""
    return PeftMethod(
        name, title, config, lambda size, facts: {field: sizes(facts)[size - 1], **fixed},
        lambda facts: len(sizes(facts)), lambda arguments: f"b = {arguments[field]}", count,
    )  # fmt: skip


def _falling(facts: Facts) -> list[int]:
    return _blocks(facts)[::-1]


def _from_two(facts: Facts) -> list[int]:
    return _blocks(facts)[1:]


def _beyond(facts: Facts) -> int:
    """Return the largest rank of VeRA, which only sets the length of a diagonal and may exceed the sides."""
    return 4 * max(max(shape) for shape in facts.shapes)


def _randlora(size: int, facts: Facts) -> Arguments:
    return {"r": -(-facts.side // size)}


def _least_rank(size: int, first: int, dimensions: Callable[[int], int]) -> int:
    rank = first
    while dimensions(rank) < size:
        rank *= 2
    return rank


def _tinylora(size: int, facts: Facts) -> Arguments:
    return {"u": size, "r": _least_rank(size, 2, lambda r: len(facts.shapes) * r * r), "weight_tying": 1.0}


def _unilora(size: int, facts: Facts) -> Arguments:
    rank = _least_rank(size, 4, lambda r: sum(r * (rows + cols) for rows, cols in facts.shapes))
    return {"theta_d_length": size, "r": rank}


def _road_group(facts: Facts) -> int:
    """Return the largest even block up to PEFT's default; 1 if there is none."""
    return max((size for size in _blocks(facts) if size <= 64 and size % 2 == 0), default=1)


def _vector_length(facts: Facts) -> int:
    return max(size for size in _blocks(facts) if size <= 256)


def _shira_count(arguments: Arguments, facts: Facts) -> int:
    return sum(arguments["r"] * (rows + cols) for rows, cols in facts.shapes)


def _boft_count(arguments: Arguments, facts: Facts) -> int:
    return sum(cols * arguments["boft_block_size"] + rows for rows, cols in facts.shapes)


PEFT_METHODS = (
    _of_ranks("lora", "LoRA", "LoraConfig", "lora_alpha"),
    _of_ranks("dora", "DoRA", "LoraConfig", "lora_alpha", use_dora=True),
    _of_ranks("loha", "LoHa", "LoHaConfig", "alpha"),
    _of_ranks("lokr", "LoKr", "LoKrConfig", "alpha"),
    _of_ranks("lokr-both", "LoKr, both low-rank", "LoKrConfig", "alpha", decompose_both=True),
    _of_ranks("hira", "HiRA", "HiraConfig"),
    _of_ranks("gralora", "GraLoRA", "GraloraConfig", step=2),
    _of_ranks("hra", "HRA", "HRAConfig", step=2),
    _of_ranks("delora", "DeLoRA", "DeloraConfig"),
    _of_ranks("deft", "DEFT", "DeftConfig"),
    _of_ranks("glora", "GLoRA", "GloraConfig"),
    _of_ranks("lily", "Lily", "LilyConfig"),
    _of_ranks("miss", "MiSS", "MissConfig"),
    _of_ranks("peanut", "PEANUT", "PeanutConfig"),
    _of_ranks("psoft", "PSOFT", "PsoftConfig", "psoft_alpha"),
    PeftMethod("vera", "VeRA", "VeraConfig", lambda size, facts: {"r": size}, _beyond, _rank),
    PeftMethod("pvera", "PVeRA", "PveraConfig", lambda size, facts: {"r": size}, _beyond, _rank),
    PeftMethod("randlora", "RandLoRA", "RandLoraConfig", _randlora, _side, _rank),
    PeftMethod(
        "shira", "SHiRA", "ShiraConfig", lambda size, facts: {"r": size}, _side, _rank, _shira_count
    ),
    _of_values("fourierft", "FourierFT", "FourierFTConfig"),
    _of_values("waveft", "WaveFT", "WaveFTConfig"),
    _of_blocks("c3a", "C3A", "C3AConfig", "block_size", _falling),
    _of_blocks("oft", "OFT", "OFTConfig", "oft_block_size", _from_two),
    _of_blocks("oft-shared", "OFT, shared blocks", "OFTConfig", "oft_block_size", _from_two, block_share=True),
    _of_blocks("boft", "BOFT", "BOFTConfig", "boft_block_size", _from_two, _boft_count),
    PeftMethod(
        "supertuning", "SuperTuning", "SupertuningConfig",
        # Half an element more than ``size`` of the smallest weight, against rounding errors.
        lambda size, facts: {"sparsity": 1.0 - (size + 0.5) / _smallest(facts)}, _smallest,
        lambda one: f"sparsity = {one['sparsity']:.4g}",
    ),
    PeftMethod(
        "ia3", "IA³", "IA3Config", lambda size, facts: {"feedforward_modules": []}, lambda facts: 1, lambda one: ""
    ),
    PeftMethod(
        "road", "RoAd", "RoadConfig",
        lambda size, facts: {"variant": f"road_{2 ** (size - 1)}", "group_size": _road_group(facts)},
        lambda facts: 3 if _road_group(facts) > 1 else 0,
        lambda one: one["variant"].replace("road_", "variant "),
    ),
    PeftMethod(
        "tinylora", "TinyLoRA", "TinyLoraConfig", _tinylora,
        lambda facts: min(LARGEST_DENSE, len(facts.shapes) * facts.side**2),
        lambda one: f"u = {one['u']}, r = {one['r']}",
        lambda one, facts: one["u"],  # tied over all weights
    ),
    PeftMethod(
        "unilora", "Uni-LoRA", "UniLoraConfig", _unilora,
        lambda facts: sum(facts.side * (rows + cols) for rows, cols in facts.shapes),
        lambda one: f"p = {one['theta_d_length']}, r = {one['r']}",
        lambda one, facts: one["theta_d_length"],
    ),
    PeftMethod(
        "vblora", "VB-LoRA", "VBLoRAConfig",
        lambda size, facts: {"num_vectors": 2 * size, "vector_length": _vector_length(facts)},
        lambda facts: 512, lambda one: f"{one['num_vectors']} vectors of {one['vector_length']}",
    ),
)  # fmt: skip
