"""Attaching an adapter to a model."""

from __future__ import annotations

import inspect
import itertools
import logging
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import nn

from tnadapt.algebra.composite import CompositeConfig
from tnadapt.algebra.config import Config
from tnadapt.algebra.factoring import Factoring
from tnadapt.algebra.folding import MAX_SIZE
from tnadapt.algebra.named_config import config_of
from tnadapt.algebra.shared_maps import share_maps
from tnadapt.algebra.superlora import SuperLoRA
from tnadapt.argument_checks import flag
from tnadapt.backends import load_backend
from tnadapt.errors import BackendError, ConfigError, TargetError, integer, safe_repr
from tnadapt.targets.overlaps import check_distinct
from tnadapt.targets.target import Target

from . import _freezing as freezing
from ._adapter import Adapter
from ._argument_places import refuse_misplaced, warn_undropped, warn_useless_rank
from ._bound_plan import bound, is_bound
from ._config_patterns import check_ordered, of_patterns
from ._dropout import check_dropout
from ._forward_pass import PassHooks
from ._forward_patch import ACTIVATIONS, STRATEGIES, ForwardPatch
from ._kept_parameters import kept_names
from ._quantized_base import prepare
from ._registry import attached, overlapping, refuse_merged
from ._removal import take_off
from ._sharding import is_sharded
from ._state import ADAPTERS_ATTR, DOT, AdapterSlot, AdapterState
from ._step_cost import TOKENS
from ._strategy_choice import is_quantized, strategy_of
from ._target_selection import find_targets, host_of, paths_of, tied
from ._transformers_model import TransformersModel

__all__ = ["attach", "attach_with", "check_name", "checked_dtype"]

_log = logging.getLogger(__name__)

_DTYPES = {torch.float32: "float32", torch.float64: "float64", torch.bfloat16: "bfloat16", torch.float16: "float16"}


def attach(
    model: nn.Module,
    cfg: Config | str | Mapping[Any, Config | str] | None = None,
    targets: Any = "qv",
    name: str = "default",
    *,
    layers: int | Sequence[int] | None = None,
    exclude: Any = None,
    keep_trainable: str | Sequence[str] = (),
    biases: str = "none",
    strategy: str = "auto",
    tokens: int = TOKENS,
    activation: str | None = None,
    dtype: torch.dtype | str = torch.float32,
    untie: bool = False,
    keep_tied: bool = False,
    given: Mapping[str, Any] | None = None,
    progress: Callable[[int, int], None] | None = None,
    detach_norm: bool = False,
    dropout: float = 0.0,
    **settings: Any,
) -> Adapter:
    """Attach an adapter to the query and value projections, or other weights, of any torch model.

    The base is frozen and never changes; a fresh adapter leaves every output bit for bit the same.

    Parameters
    ----------
    model : Module
        Any model whose attention tnadapt knows: see :func:`tnadapt.torch.find_targets`.
    cfg : Config, str or mapping, optional
        The form of the updates: a config, or the name of a preset such as ``"lora"``, whose settings are further
        keywords. By default ``tnadapt.presets.superlora(rank=8)``, the paper's headline setting: all weights are one
        group, reshaped to a square with one low-rank matrix. It fits any number of weights of any shapes (grouped-query
        attention, Swin's stages), where LoRA's stacking needs equal columns, and the paper found it the best of all
        settings of its size.

        A mapping gives several configs to one adapter, each with the pattern of its weights, in place of ``targets``:
        ``{"qv": tnadapt.presets.lora(8), "mlp": "lokr"}``. A pattern is a role or keyword of ``targets``, or a regular
        expression for the path of a module or its last whole parts; a module without a weight of its own stands for all
        linear weights in it. No weight may match two.
    targets : str, list or function
        The weights to adapt: ``"qv"`` and other roles, ``"all-linear"``, ``"conv"``, a regular expression, a list of
        paths or of :class:`tnadapt.Target`, or a function; see :func:`tnadapt.torch.find_targets`.
    name : str
        Name of the adapter: any printable characters, unique on the model.
    layers : int, range or list of int, optional
        Only the targets in these layers; negative numbers count from the end. See :func:`tnadapt.torch.find_targets`.
    exclude : str, list or function, optional
        Targets to leave out, in the words of ``targets``.
    keep_trainable : str or sequence of str
        Parameters of the base that stay trainable, by whole components of their paths: ``"classifier"`` is every
        parameter below a module of that name. They are saved with the adapter.
    biases : {"none", "adapted", "all"}
        The biases that stay trainable, like ``keep_trainable``: those of the adapted layers, or of all layers.
    strategy : {"auto", "weight", "factored", "additive"}
        How a layer uses its update; see :mod:`tnadapt.torch._forward_patch`. ``"auto"`` picks for each weight the
        strategy with the cheapest training step, estimated from operations and bytes
        (:mod:`tnadapt.torch._step_cost`); the summary shows the choice.
    tokens : int
        For ``"auto"``: the number of rows a layer is called with, batch size times tokens.
    activation : {"relu", "gelu", "silu", "tanh"}, optional
        A nonlinearity between the two factors, on the activations (LoDA). Needs one low-rank matrix per weight.
    dtype : torch.dtype or str
        Dtype of the adapter's parameters, or its name. float32 also on half-precision models: small updates would
        vanish in less.
    untie : bool
        Where the weight of a target is shared with another module (tied weights), give the second its own copy.
    keep_tied : bool
        Where the weight of a target is shared, update it in all modules that hold it, with one ΔW. With neither of the
        two, tied weights are rejected.
    given : mapping of str to array, optional
        Frozen arrays of the config's ``Given`` sources, by their names in the plan.
    progress : callable, optional
        Called with the numbers of arrays that are computed from the base weights (``FromBase``, and starts such as
        "pissa") so far and in all.
    detach_norm : bool
        For ``apply="magnitude"``: whether the gradient takes ‖W + ΔW‖ for a constant, as PEFT does. The default is the
        exact gradient. It is not saved with the adapter.
    dropout : float
        The probability with which single elements of x are zero in the adapter's own part of a layer's output, in
        training mode (``lora_dropout`` of PEFT; :mod:`tnadapt.torch._dropout`). It is not saved with the adapter.
    **settings
        With the name of a preset: its settings, and fields of :class:`tnadapt.Config`. (``layers`` is always the one
        above.)

    Returns
    -------
    Adapter
        The handle.

    Raises
    ------
    TargetError
        If there is no target, the name is taken or invalid, weights are tied, or ``layers``, ``exclude``,
        ``keep_trainable`` or ``biases`` matches nothing; or arrays are computed from base weights into which another
        adapter is merged.
    ConfigError
        If the config does not suit the weights, the strategy does not suit the config, or there is no such preset or
        setting.
    BackendError
        If the dtype is not a floating-point dtype.

    In each case the model is unchanged.

    Warns
    -----
    UserWarning
        If the rank is beyond the largest useful one for these weights and is not the preset's default, or dropout drops
        nothing.

    Examples
    --------
    >>> import torch, tnadapt.torch
    >>> model = torch.nn.TransformerEncoderLayer(16, 2, dim_feedforward=32, batch_first=True)
    >>> adapter = tnadapt.torch.attach(model)
    >>> print(adapter.summary())
    adapter 'default' on TransformerEncoderLayer
    target                    role  shape  group[slice]  strategy
    self_attn.in_proj_weight  q     16×16  0[0:256]      weight
    self_attn.in_proj_weight  v     16×16  0[256:512]    weight
    368 parameters in 1 group for 512 elements of 2 weights; 16.5 % of the base's 2,224
    merge only: self_attn.in_proj_weight is not the weight of a layer
    >>> optimizer = torch.optim.AdamW(adapter.parameters(), lr=1e-3)

    A preset by its name:

    >>> tnadapt.torch.attach(model, "lora", name="second", rank=4, alpha=8).config.scale
    2.0

    Several configs in one adapter:

    >>> print(tnadapt.torch.attach(model, {"qv": "lora", "linear1": tnadapt.presets.lokr(2)}, name="third").summary())
    adapter 'third' on TransformerEncoderLayer
    target                    role    shape  group[slice]  strategy
    self_attn.in_proj_weight  q       16×16  0[0:256]      weight
    self_attn.in_proj_weight  v       16×16  1[0:256]      weight
    linear1.weight            linear  32×16  2[0:512]      weight
    ...
    """
    keywords = list(inspect.signature(attach).parameters)[:-1]
    refuse_misplaced(cfg, targets)
    if isinstance(cfg, Mapping):
        if targets != "qv":
            raise ConfigError(
                f"the keys of a mapping of configs are the targets; got targets={safe_repr(targets)}, too"
            )
        cfg, targets = of_patterns(model, cfg, layers=layers, exclude=exclude, untie=untie, keep_tied=keep_tied)
        layers = exclude = None
    elif isinstance(cfg, CompositeConfig):
        check_ordered(targets)
    is_given = cfg is not None
    cfg = config_of(cfg, settings, "attach", keywords)
    adapter = attach_with(
        model, cfg, targets, name, layers=layers, exclude=exclude, keep_trainable=keep_trainable, biases=biases,
        strategy=strategy, tokens=tokens, activation=activation, dtype=dtype, untie=untie, keep_tied=keep_tied,
        given=given, progress=progress, detach_norm=detach_norm, dropout=dropout,
    )  # fmt: skip
    warn_undropped(adapter.targets, adapter.dropout)
    if is_given:
        warn_useless_rank(adapter.plan, adapter.targets)
    return adapter


def attach_with(
    model: nn.Module,
    cfg: Config,
    targets: Any,
    name: str,
    *,
    layers: Any = None,
    exclude: Any = None,
    keep_trainable: str | Sequence[str] = (),
    biases: str = "none",
    strategy: str = "auto",
    tokens: int = TOKENS,
    activation: str | None = None,
    dtype: torch.dtype | str = torch.float32,
    untie: bool = False,
    keep_tied: bool = False,
    given: Mapping[str, Any] | None = None,
    progress: Callable[[int, int], None] | None = None,
    detach_norm: bool = False,
    dropout: float = 0.0,
    fresh: bool = True,
    kept: Sequence[str] | None = None,
    copies: Sequence[str] = (),
) -> Adapter:
    """Do :func:`attach`; with ``fresh=False`` for a caller that loads all parameters, which are then zeros.

    Such a caller names the parameters and buffers that are kept, and those whose weights are untied by ``copies``.
    """
    if not isinstance(model, nn.Module):
        raise TargetError(f"attach needs a torch module; got {type(model).__name__}")
    check_name(model, name)
    tokens = integer("tokens", tokens, 1, MAX_SIZE, ConfigError)
    if not isinstance(strategy, str) or strategy not in STRATEGIES:
        raise ConfigError(f"strategy must be one of {', '.join(STRATEGIES)}; got {safe_repr(strategy)}")
    if activation is not None and (not isinstance(activation, str) or activation not in ACTIVATIONS):
        raise ConfigError(f"activation must be one of {', '.join(ACTIVATIONS)}, or None; got {safe_repr(activation)}")
    dtype = checked_dtype(dtype)
    detach_norm = flag("detach_norm", detach_norm)
    dropout = check_dropout(dropout)
    found = find_targets(model, targets, layers=layers, exclude=exclude, untie=untie, keep_tied=keep_tied)
    check_distinct(found)
    plan = SuperLoRA(
        cfg,
        [target.shape for target in found],
        layers=[target.layer for target in found],
        roles=[target.role for target in found],
        given=given,
    )
    kept = kept_names(model, keep_trainable, biases, found) if kept is None else kept
    # A target of a tied weight has several places; those of the first names come first, in the order of the targets.
    places = [*enumerate(found), *((index, one) for index, target in enumerate(found) for one in target.tied_targets())]
    owners = [model.get_submodule(target.module) for _, target in places]
    hosts = _hosts(model, [target for _, target in places])
    if not is_bound(plan):
        refuse_merged(model, f"adapter {name!r} is attached, whose arrays are computed from it")
        plan = bound(plan, found, owners[: len(found)], progress)
    share_maps(plan, [other.plan for other in attached(model).values()])
    plan = plan.training_plan
    strategies = [
        strategy_of(strategy, plan, index, tokens, target, owner, host, activation, dropout > 0.0)
        for (index, target), owner, host in zip(places, owners, hosts, strict=True)
    ]
    # Leave inference mode: tensors created in it could never be trained.
    with torch.inference_mode(False):
        arrays = _arrays(plan, _weight_or_substitute(owners[0], found[0].parameter), dtype, fresh)
    # Nothing can fail from here on, but it can be interrupted.
    state = AdapterState(model, name, plan, found, kept, activation, detach_norm, dropout)
    adapter = Adapter(state)
    try:
        _put_on(state, arrays, places, owners, hosts, strategies, copies)
    except BaseException:
        take_off(state)
        raise
    _log.info("attached %r", adapter)
    return adapter


def _put_on(
    state: AdapterState,
    arrays: Mapping[str, torch.Tensor],
    places: Sequence[tuple[int, Target]],
    owners: Sequence[nn.Module],
    hosts: Sequence[nn.Module],
    strategies: Sequence[tuple[str, Factoring | None]],
    copies: Sequence[str],
) -> None:
    model = state.model
    separate = tied(model, state.targets)
    own = {name for names in separate for name in names}
    state.alone = tuple(target.name for target in state.targets if target.name in own)
    for second in dict.fromkeys([*(second for _, second in separate), *copies]):
        freezing.untie(state, second)
    freezing.freeze(state)
    for array, tensor in arrays.items():
        model.register_parameter(state.parameter_names[array], nn.Parameter(tensor))
    for (index, target), owner, host, chosen in zip(places, owners, hosts, strategies, strict=True):
        there = ForwardPatch.of(host)
        patch = ForwardPatch(host) if there is None else there
        # Recorded before it is installed, so that take_off() finds everything that is in the model.
        state.patches.append(patch)
        if there is None:
            patch.install()
        quantized = not state.plan.applying.additive and is_quantized(owner, target)
        slot = AdapterSlot(state, index, owner, target, *chosen, quantized)
        state.slots.append(slot)
        patch.add(slot)
    prepare(state)
    hooks = PassHooks(state)
    model.register_forward_pre_hook(hooks.begin)
    model.register_forward_hook(hooks.end, always_call=True)
    model.__dict__.setdefault(ADAPTERS_ATTR, {})[state.name] = state
    TransformersModel.install(model)


def _hosts(model: nn.Module, targets: Sequence[Target]) -> list[nn.Module]:
    """Return the module whose forward applies each target."""
    paths, found = paths_of(model), dict[str, nn.Module]()
    for target in targets:
        if target.name not in found:  # the many experts of one parameter have one host
            found[target.name] = model.get_submodule(host_of(model, target, paths))
    return [found[target.name] for target in targets]


def check_name(model: nn.Module, name: str) -> None:
    """Raise a TargetError if a name is invalid or taken on this model."""
    if not isinstance(name, str) or not name or not name.isprintable():
        raise TargetError(
            f"an adapter's name must be a non-empty string of printable characters; got {safe_repr(name)}"
        )
    if DOT in name:
        raise TargetError(
            f"an adapter cannot be called {name!r}: {name.replace(DOT, '.')!r} is encoded like this in the names of "
            "parameters; give another name"
        )
    taken = {adapter.name: adapter for adapter in overlapping(model)}
    if name in taken:
        raise TargetError(
            f"this model already has an adapter {name!r} ({taken[name].handle!r}); give another name, or "
            "detach() it first"
        )


def checked_dtype(dtype: Any) -> torch.dtype:
    """Return a dtype of arrays, given by itself or by its name; raise BackendError for any other one."""
    names = {name: known for known, name in _DTYPES.items()}
    found = names.get(dtype, dtype) if isinstance(dtype, str) else dtype
    if not isinstance(found, torch.dtype) or found not in _DTYPES:
        raise BackendError(f"dtype must be one of {', '.join(map(str, _DTYPES))}; got {safe_repr(dtype)}")
    return found


def _arrays(plan: SuperLoRA, like: torch.Tensor | None, dtype: torch.dtype, fresh: bool) -> dict[str, torch.Tensor]:
    # Loaded before any program is compiled: loading it later would trigger a recompilation.
    load_backend("numpy")
    device = torch.device("cpu") if like is None else like.device
    if like is not None and is_sharded(like):
        raise TargetError("the model is sharded already; attach first, then fully_shard(model)")
    if device.type == "meta":
        # No values exist on this device: reset() draws them later.
        return {name: torch.empty(shape, dtype=dtype, device=device) for name, shape in plan.param_shapes.items()}
    if not fresh:
        return {name: torch.zeros(shape, dtype=dtype, device=device) for name, shape in plan.param_shapes.items()}
    return plan.init("torch", _DTYPES[dtype], device)


def _weight_or_substitute(owner: nn.Module, parameter: str) -> torch.Tensor | None:
    """Return the weight, or what a quantized layer has instead: it determines the device of the arrays."""
    weight: torch.Tensor | None = owner._parameters.get(parameter)
    weight = weight if weight is not None else next(itertools.chain(owner.parameters(), owner.buffers()), None)
    if weight is not None and weight.device.type == "meta" and hasattr(owner, "_hf_hook"):
        raise TargetError(
            "the model is offloaded by accelerate, which keeps each weight elsewhere until its module is called, and "
            "would keep the adapter there: attach to a model that is fully in memory"
        )
    return weight
