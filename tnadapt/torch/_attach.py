"""``attach``: put a new adapter on a model, in four steps: targets, plan, forms, installation.

Each step is a function of the :class:`AttachRequest` and the results of the steps before it; :func:`carry_out` runs
them. Also here: which of the base's parameters stay trainable.
"""

from __future__ import annotations

import dataclasses
import difflib
import functools
import inspect
import itertools
import logging
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import torch
from torch import nn

from tnadapt.algebra import presets
from tnadapt.algebra.composite import CompositeConfig
from tnadapt.algebra.config import Config
from tnadapt.algebra.factoring import Factoring
from tnadapt.algebra.folding import MAX_SIZE
from tnadapt.algebra.group import useful_rank
from tnadapt.algebra.named_config import config_of
from tnadapt.algebra.update_plan import UpdatePlan, share_maps
from tnadapt.argument_checks import flag, integer, is_sequence, wrong_argument
from tnadapt.backends import load_backend
from tnadapt.checkpoints.adapter_file import plan_of
from tnadapt.checkpoints.population_file import checked_names
from tnadapt.errors import BackendError, ConfigError, TargetError, safe_repr, warn
from tnadapt.targets.roles import is_within
from tnadapt.targets.target import Target, check_distinct

from ._adapter import Adapter
from ._delta import is_sharded
from ._forward_pass import PassHooks, check_dropout
from ._forward_patch import ACTIVATIONS, STRATEGIES, ForwardPatch
from ._population import Population
from ._registry import attached, freeze, install_methods, overlapping, prepare, refuse_merged, take_off, untie
from ._state import ADAPTERS_ATTR, DOT, AdapterSlot, AdapterState, Members, is_array
from ._strategy_choice import TOKENS, is_quantized, strategy_of
from ._target_selection import check_ordered, find_targets, of_patterns
from ._weights import DTYPES, bound, host_of, join, names_of_shared, paths_of, tensors_of, tied

# -- The model's own parameters that stay trainable: those that a caller names, and biases -----------------------------


#: Which biases stay trainable.
BIASES = ("none", "adapted", "all")


def kept_names(model: nn.Module, patterns: str | Sequence[str], biases: str, targets: Sequence[Target]) -> list[str]:
    """Return the names of the parameters that stay trainable: those that patterns match, and biases.

    Parameters
    ----------
    model : Module
    patterns : str or sequence of str
        Whole components of the dotted paths of parameters and buffers.
    biases : {"none", "adapted", "all"}
        Of no layer, of the layers that the targets are weights of, or of all layers.
    targets : sequence of Target

    Returns
    -------
    list of str
        In the order of the patterns and of the model; a tied parameter under the first of its names.

    Raises
    ------
    TargetError
        If a pattern matches nothing, or a target; or if there is no such bias.
    ConfigError
        If ``biases`` is another word.

    Examples
    --------
    >>> model = nn.Sequential(nn.Linear(2, 2), nn.Linear(2, 2))
    >>> kept_names(model, "0", "adapted", [Target("1", (2, 2))])
    ['0.weight', '0.bias', '1.bias']
    """
    several: list[Any] = list(patterns) if is_sequence(patterns) else [patterns]
    kept = _matching(model, several) if several else []
    both = [target.name for target in targets if target.name in kept]
    if both:
        raise TargetError(
            f"{both[0]} is both a target and in keep_trainable; it can be adapted or trained itself, not both"
        )
    if not isinstance(biases, str) or biases not in BIASES:
        raise ConfigError(f"biases must be one of {', '.join(BIASES)}; got {safe_repr(biases)}")
    if biases == "none":
        return kept
    adapted = {join(target.module, bias) for target in targets for bias in _biases_of(target.parameter)}
    bias_names = [
        name
        for name, parameter in model.named_parameters()
        if name.rpartition(".")[2].endswith("bias") and parameter.is_floating_point() and not is_array(name)
        if biases == "all" or name in adapted
    ]
    if not bias_names:
        layer = "adapted layer" if biases == "adapted" else "layer"
        raise TargetError(f"biases={biases!r}: no {layer} of this {type(model).__name__} has a bias; leave biases out")
    return list(dict.fromkeys([*kept, *bias_names]))


def _biases_of(weight: str) -> tuple[str, ...]:
    """Return the names that the bias of a weight may have in its module."""
    # nn.MultiheadAttention has one in_proj_bias for q_proj_weight, k_proj_weight and v_proj_weight.
    return weight.replace("weight", "bias"), *(("in_proj_bias",) if weight.endswith("_proj_weight") else ())


def _matching(model: nn.Module, patterns: Sequence[Any]) -> list[str]:
    for pattern in patterns:
        if not isinstance(pattern, str):
            raise wrong_argument("keep_trainable", "a name or a sequence of names", pattern, TargetError)
    # What a state dict leaves out; some modules, such as bitsandbytes' embeddings, raise an error when one is built.
    left_out = {
        join(path, name)
        for path, module in model.named_modules(remove_duplicate=False)
        for name in module._non_persistent_buffers_set
    }
    tensors = tensors_of(model).items()
    first: dict[int, str] = {}
    for name, tensor in tensors:
        first.setdefault(id(tensor), name)
    names = {name: first[id(tensor)] for name, tensor in tensors if name not in left_out and not is_array(name)}
    kept: dict[str, None] = {}
    for pattern in patterns:
        matches = [original for name, original in names.items() if is_within(name, pattern)]
        if not matches:
            modules = [name for name, _ in model.named_children()]
            close = difflib.get_close_matches(pattern, modules, 1)
            meant = f"did you mean {close[0]!r}? The" if close else "the"
            raise TargetError(
                f"keep_trainable: no parameter is at or below {safe_repr(pattern)}; {meant} model's parts are: "
                f"{', '.join(modules)}"
            )
        kept.update(dict.fromkeys(matches))
    return list(kept)


# -- Attaching ---------------------------------------------------------------------------------------------------------


_log = logging.getLogger(__name__)


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
    population: int | None = None,
    names: Sequence[str | None] | None = None,
    seeds: str = "one",
    sparse: bool = False,
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
    exclude : str or list, optional
        Targets to leave out, in the words of ``targets``.
    keep_trainable : str or sequence of str
        Parameters of the base that stay trainable, by whole components of their paths: ``"classifier"`` is every
        parameter below a module of that name. They are saved with the adapter.
    biases : {"none", "adapted", "all"}
        The biases that stay trainable, like ``keep_trainable``: those of the adapted layers, or of all layers.
    strategy : {"auto", "weight", "factored", "additive"}
        How a layer uses its update; see :mod:`tnadapt.torch._forward_patch`. ``"auto"`` picks for each weight the
        strategy with the cheapest training step, estimated from operations and bytes
        (:mod:`tnadapt.torch._strategy_choice`); the summary shows the choice.
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
        training mode (``lora_dropout`` of PEFT; :mod:`tnadapt.torch._forward_pass`). It is not saved with the adapter.
    population : int, optional
        Attach a :class:`tnadapt.torch.Population` of so many adapters: every trained array has a leading axis of that
        length, and ``with adapter.members(...)`` gives each row of a batch its member. Frozen arrays are shared.
    names : sequence of (str or None), optional
        The names of the population's members.
    seeds : {"one", "each"}
        Whether the members of a population start alike, or each from random arrays of its own: member k from the seed
        ``config.seed + k``. Arrays that θ makes start alike in any case.
    sparse : bool
        Whether the gradients of a population are row-sparse: see :class:`tnadapt.torch.Population`.
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
    >>> optimizer = torch.optim.AdamW(adapter.parameters(), lr=adapter.learning_rate(), betas=(0.9, 0.9))

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
    second: object = cfg
    if isinstance(second, nn.Module):
        got = type(second).__name__
        raise TargetError(f"cfg must be a Config or the name of a preset; got {got}; model and cfg may be swapped")
    if isinstance(cfg, Mapping):
        if targets != "qv":
            raise ConfigError(
                f"the keys of a mapping of configs are the targets; got targets={safe_repr(targets)}, too"
            )
        cfg, targets = of_patterns(model, cfg, layers, exclude)
        layers = exclude = None
    elif isinstance(cfg, CompositeConfig):
        check_ordered(targets)
    is_given = cfg is not None
    cfg = config_of(cfg, settings, "attach", keywords)
    adapter = carry_out(
        AttachRequest(
            model, cfg, targets, name, layers=layers, exclude=exclude, keep_trainable=keep_trainable, biases=biases,
            strategy=strategy, tokens=tokens, activation=activation, dtype=dtype, untie=untie, keep_tied=keep_tied,
            given=given, progress=progress, detach_norm=detach_norm, dropout=dropout, population=population,
            names=names, seeds=seeds, sparse=sparse,
        )
    )  # fmt: skip
    if is_given:
        _warn_of_useless_rank(adapter.plan, adapter.targets)
    return adapter


def _warn_of_useless_rank(plan: UpdatePlan, targets: Sequence[Target]) -> None:
    """Warn of a rank beyond the largest that the updates can use."""
    config = plan.config
    # More frozen arrays, or arrays made from θ, can be useful whatever the sizes: no warning about those, nor about the
    # default of a preset.
    if isinstance(config, CompositeConfig) or config.sources or config.before is not None:
        return
    rank, most = config.rank, useful_rank(group for group, _ in plan.alike)
    if not isinstance(rank, int) or most is None or rank <= most or _is_default(config):
        return
    useful = plan_of(config.replace(rank=most), targets)
    # Some formats cut the rank to what is possible.
    if plan.num_parameters > useful.num_parameters:
        warn(
            f"rank={rank} is beyond {most}, the largest useful rank for these weights: more parameters add nothing to "
            f"what their updates can be. Give rank={most} or less",
        )


def _is_default(config: Config) -> bool:
    """Return whether a config has the default rank of its preset."""
    from tnadapt.planning import preset_call  # rarely needed, and takes a while to import

    call = preset_call(config)
    if call is None:
        return False
    rank = inspect.signature(getattr(presets, call.preset)).parameters.get("rank")
    return rank is not None and bool(rank.default == config.rank)


@dataclasses.dataclass(frozen=True)
class AttachRequest:
    """The arguments of :func:`attach`, which describes them, checked.

    Attributes
    ----------
    fresh : bool
        False for a caller that loads all parameters, which are then zeros.
    kept : sequence of str, optional
        The names of the parameters and buffers that stay trainable, in place of ``keep_trainable`` and ``biases``.
    copies : sequence of str
        Names of tied weights that get a copy of their own.
    """

    model: nn.Module
    config: Config
    targets: Any
    name: str
    _: dataclasses.KW_ONLY
    layers: Any = None
    exclude: Any = None
    keep_trainable: str | Sequence[str] = ()
    biases: str = "none"
    strategy: str = "auto"
    tokens: int = TOKENS
    activation: str | None = None
    dtype: torch.dtype | str = torch.float32
    untie: bool = False
    keep_tied: bool = False
    given: Mapping[str, Any] | None = None
    progress: Callable[[int, int], None] | None = None
    detach_norm: bool
    dropout: float = 0.0
    population: int | None = None
    names: Sequence[str | None] | None = None
    seeds: str = "one"
    sparse: bool = False
    fresh: bool = True
    kept: Sequence[str] | None = None
    copies: Sequence[str] = ()

    def __post_init__(self) -> None:
        model: Any = self.model
        if not isinstance(model, nn.Module):
            got = type(model).__name__
            if isinstance(model, str):
                got += f": open the model first, for example AutoModel.from_pretrained({safe_repr(model)})"
            raise TargetError(f"attach needs a torch module; got {got}")
        check_name(self.model, self.name)
        put = functools.partial(object.__setattr__, self)
        put("tokens", integer("tokens", self.tokens, 1, MAX_SIZE, ConfigError))
        check_form(self.strategy, self.activation)
        put("dtype", checked_dtype(self.dtype))
        put("detach_norm", flag("detach_norm", self.detach_norm))
        put("dropout", check_dropout(self.dropout))
        if not isinstance(self.seeds, str) or self.seeds not in SEEDS:
            raise ConfigError(f"seeds must be one of {', '.join(SEEDS)}; got {safe_repr(self.seeds)}")
        put("sparse", flag("sparse", self.sparse))
        if self.population is None:
            if self.names is not None or self.seeds != "one" or self.sparse:
                raise ConfigError("names, seeds and sparse are those of a population's members: give population=, too")
            return
        put("population", integer("population", self.population, 1, MAX_SIZE, ConfigError))
        if self.names is not None:
            put("names", tuple(checked_names(self.names, self.population)))


def check_form(strategy: Any, activation: Any) -> None:
    """Raise a ConfigError if there is no such strategy or activation."""
    if not isinstance(strategy, str) or strategy not in STRATEGIES:
        raise ConfigError(f"strategy must be one of {', '.join(STRATEGIES)}; got {safe_repr(strategy)}")
    if activation is not None and (not isinstance(activation, str) or activation not in ACTIVATIONS):
        raise ConfigError(f"activation must be one of {', '.join(ACTIVATIONS)}, or None; got {safe_repr(activation)}")


#: Whether the members of a population start alike, or each from its own seed.
SEEDS = ("one", "each")


class Form(NamedTuple):
    """How one weight uses its update.

    Attributes
    ----------
    number : int
        That of the target.
    target : Target
        It, or the same weight under another name.
    owner, host : Module
        The module that holds the weight, and the one whose forward applies it.
    strategy : str
    factoring : Factoring or None
    """

    number: int
    target: Target
    owner: nn.Module
    host: nn.Module
    strategy: str
    factoring: Factoring | None


def carry_out(request: AttachRequest) -> Adapter:
    """Attach what is requested; if anything fails, the model is as it was."""
    targets = _targets(request)
    plan = _plan(request, targets)
    forms = _forms(request, targets, plan)
    return _install(request, targets, plan, forms)


def _targets(request: AttachRequest) -> list[Target]:
    targets = find_targets(
        request.model, request.targets, layers=request.layers, exclude=request.exclude, untie=request.untie,
        keep_tied=request.keep_tied,
    )  # fmt: skip
    check_distinct(targets)
    if request.dropout > 0.0 and all(target.role == "embedding" for target in targets):
        warn(
            f"dropout={request.dropout:g} drops nothing here: all targets are embeddings, whose inputs are indices. "
            "Leave it out, or adapt other weights as well",
        )
    return targets


def _plan(request: AttachRequest, targets: Sequence[Target]) -> UpdatePlan:
    """Return the plan of the targets in units, with the arrays that are computed from their weights."""
    model = request.model
    plan = plan_of(request.config, targets, request.given)
    if plan.needs_base:
        refuse_merged(model, f"adapter {request.name!r} is attached, whose arrays are computed from it")
        plan = bound(plan, targets, [model.get_submodule(target.module) for target in targets], request.progress)
    share_maps(plan, [other.plan for other in attached(model).values()])
    return plan.training_plan


def _forms(request: AttachRequest, targets: Sequence[Target], plan: UpdatePlan) -> list[Form]:
    """Choose how each weight uses its update, and a tied weight under each of its names."""
    # The forms of the first names come first, in order of the targets.
    model, paths = request.model, paths_of(request.model)
    places = [*enumerate(targets)]
    places += [(index, other) for index, target in enumerate(targets) for other in target.tied_targets()]
    hosts: dict[str, nn.Module] = {}
    forms = []
    for index, target in places:
        if target.name not in hosts:  # the many experts of one parameter have one host
            hosts[target.name] = model.get_submodule(host_of(model, target, paths))
        owner, host = model.get_submodule(target.module), hosts[target.name]
        strategy, factoring = strategy_of(
            request.strategy, plan, index, request.tokens, target, owner, host, request.activation,
            request.dropout > 0.0,
        )  # fmt: skip
        forms.append(Form(index, target, owner, host, strategy, factoring))
    return forms


def _install(request: AttachRequest, targets: Sequence[Target], plan: UpdatePlan, forms: Sequence[Form]) -> Adapter:
    """Put the parameters and the forms on the model."""
    model, kept = request.model, request.kept
    if kept is None:
        kept = kept_names(model, request.keep_trainable, request.biases, targets)
    members = None
    if request.population is not None:
        names = None if request.names is None else tuple(request.names)
        members = Members(request.population, names, request.seeds, request.sparse)
    arrays = _arrays(request, plan, forms[0], members)
    pairs = tied(names_of_shared(model), targets)
    # Nothing can fail from here on, but an interrupt may come.
    state = AdapterState(
        model, request.name, plan, targets, kept, request.activation, request.detach_norm, request.dropout
    )
    state.alone = tuple(target.name for target in targets if any(target.name in pair for pair in pairs))
    state.members = members
    adapter = Adapter(state) if members is None else Population(state)
    try:
        for second in dict.fromkeys([*(second for _, second in pairs), *request.copies]):
            untie(state, second)
        freeze(state)
        for array, tensor in arrays.items():
            model.register_parameter(state.parameter_names[array], nn.Parameter(tensor))
        for form in forms:
            _put_on(state, form)
        prepare(state)
        hooks = PassHooks(state)
        model.register_forward_pre_hook(hooks.begin)
        model.register_forward_hook(hooks.end, always_call=True)
        model.__dict__.setdefault(ADAPTERS_ATTR, {})[state.name] = state
        install_methods(model)
    except BaseException:
        take_off(state)
        raise
    _log.info("attached %r", adapter)
    return adapter


def _arrays(request: AttachRequest, plan: UpdatePlan, form: Form, members: Members | None) -> dict[str, torch.Tensor]:
    """Return the new parameters, on the device of the first weight, or of a quantized layer's tensors."""
    # Loaded before any program is compiled: loading it later would trigger a recompilation.
    load_backend("numpy")
    owner, dtype = form.owner, checked_dtype(request.dtype)
    like: torch.Tensor | None = owner._parameters.get(form.target.parameter)
    like = like if like is not None else next(itertools.chain(owner.parameters(), owner.buffers()), None)
    device = torch.device("cpu") if like is None else like.device
    if device.type == "meta" and hasattr(owner, "_hf_hook"):
        raise TargetError(
            "the model is offloaded by accelerate, which keeps each weight elsewhere until its module is called, and "
            "would keep the adapter there: attach to a model that is fully in memory"
        )
    if like is not None and is_sharded(like):
        raise TargetError("the model is sharded already; attach first, then fully_shard(model)")
    # Leave inference mode: tensors created in it could never be trained.
    with torch.inference_mode(False):
        leading = () if members is None else (members.count,)
        # No values exist on the meta device: reset() draws them later.
        if device.type == "meta" or not request.fresh:
            shapes = plan.param_shapes.items()
            return {name: torch.zeros((*leading, *shape), dtype=dtype, device=device) for name, shape in shapes}
        arrays = plan.init("torch", DTYPES[dtype], device)
        return arrays if members is None else members.initial(arrays, plan.drawn_for)


def _put_on(state: AdapterState, form: Form) -> None:
    present = ForwardPatch.of(form.host)
    patch = ForwardPatch(form.host) if present is None else present
    # Recorded before it is installed, so that take_off() finds everything that is in the model.
    state.patches.append(patch)
    if present is None:
        patch.install()
    quantized = not state.plan.applying.additive and is_quantized(form.owner, form.target)
    slot = AdapterSlot(state, form.number, form.owner, form.target, form.strategy, form.factoring, quantized)
    state.slots.append(slot)
    patch.add(slot)


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
    names = {name: known for known, name in DTYPES.items()}
    torch_dtype = names.get(dtype, dtype) if isinstance(dtype, str) else dtype
    if not isinstance(torch_dtype, torch.dtype) or torch_dtype not in DTYPES:
        raise BackendError(f"dtype must be one of {', '.join(map(str, DTYPES))}; got {safe_repr(dtype)}")
    return torch_dtype
