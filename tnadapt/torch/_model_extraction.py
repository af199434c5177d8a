"""Extract an adapter from a fully fine-tuned model in memory, by fitting the changes of its weights."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from tnadapt.algebra.config import Config
from tnadapt.algebra.named_config import config_of
from tnadapt.backends import load_backend
from tnadapt.checkpoints.adapter_file import plan_of
from tnadapt.decomposition import FitReport, Settings, Step, smallest_rank
from tnadapt.errors import ShapeError, TargetError, escaped, safe_repr, warn
from tnadapt.targets.target import Target, check_distinct

from ._adapter import Adapter
from ._attach import attach, check_name, kept_names
from ._delta import gather_full
from ._registry import refuse_merged
from ._state import AdapterState
from ._target_selection import find_targets, of_patterns
from ._weights import current_value, tensors_of


def extract(
    base: nn.Module,
    tuned: nn.Module | Mapping[str, Tensor],
    cfg: Config | str | Mapping[Any, Config | str] | None = None,
    targets: Any = "qv",
    name: str = "default",
    *,
    max_error: float | None = None,
    max_rank: int | None = None,
    keep_trainable: str | Sequence[str] = (),
    keep_tied: bool = False,
    progress: Callable[[Step], None] | None = None,
    **settings: Any,
) -> Adapter:
    """Attach to a base model an adapter that approximates a fully fine-tuned version of it.

    Parameters
    ----------
    base : Module
        The model before fine-tuning; the adapter is attached to it.
    tuned : Module or mapping of str to Tensor
        The same model after full fine-tuning, or its state dict.
    cfg : Config, str or mapping, optional
        The form of the updates: a config, the name of a preset, or a mapping from patterns to these, as for
        :func:`tnadapt.torch.attach`; ``tnadapt.presets.superlora(rank=8)`` by default.
    targets : str, list or function
        The weights to adapt, as for :func:`tnadapt.torch.attach`.
    name : str
        Name of the adapter.
    max_error : float, optional
        Use the smallest rank whose relative Frobenius error is at most this, instead of the config's rank.
    max_rank : int, optional
        The largest rank to try with ``max_error``.
    keep_trainable : str or sequence of str
        Parameters to copy from the tuned model and save with the adapter, as in :func:`tnadapt.torch.attach`: a new
        head, say.
    keep_tied : bool
        Whether a target whose weight is shared with other modules updates it in all of them.
    progress : callable, optional
        Called with a :class:`~tnadapt.decomposition.Step`.
    **settings
        ``tol``, ``max_iterations``, ``svd`` and ``seed`` of :func:`tnadapt.decompose`; with the name of a preset also
        its settings, except for the seed.

    Returns
    -------
    Adapter
        Attached; ``adapter.report`` has the error of the fit. A warning names parameters that differ and are neither
        targets nor kept.

    Raises
    ------
    TargetError
        If a target is not in both models, has another shape, or is quantized.
    ShapeError, ConfigError
        If an update is not finite, the config does not suit the weights, or no rank reaches the error. The base is then
        unchanged.

    Notes
    -----
    The fit runs on the device of the base's weights, in float32 (float64 for float64 models). It needs memory for a few
    copies of one group's updates at a time. :func:`tnadapt.extract` does the same for checkpoints on disk.

    Examples
    --------
    >>> import copy, torch, tnadapt.torch
    >>> base = torch.nn.TransformerEncoderLayer(16, 2, dim_feedforward=32, batch_first=True).eval()
    >>> tuned = copy.deepcopy(base)
    >>> with torch.no_grad():
    ...     _ = tuned.self_attn.in_proj_weight[:16].add_(0.1)  # of rank one
    >>> adapter = tnadapt.torch.extract(base, tuned, tnadapt.presets.lora(1))
    >>> print(adapter.report)
    relative error ... in 2 groups, 64 parameters for 512 elements; the optimum
    >>> x = torch.randn(1, 3, 16)
    >>> bool(torch.allclose(base(x), tuned(x), atol=1e-5))
    True
    """
    chosen, rest = Settings.taken_from(settings)
    if isinstance(cfg, Mapping):
        cfg, targets = of_patterns(base, cfg)
    cfg = config_of(cfg, rest, "extract", ("targets", "max_error", "max_rank", "keep_trainable", *Settings.NAMES))
    if not isinstance(base, nn.Module):
        raise TargetError(f"extract needs a torch module as base; got {type(base).__name__}")
    refuse_merged(base, "its change is extracted")
    resolved = find_targets(base, targets, keep_tied=keep_tied)
    # Raise the errors of attach() now rather than after the fit.
    check_distinct(resolved)
    check_name(base, name)
    kept_names(base, keep_trainable, "none", resolved)
    theirs = _state(tuned)
    weights = [(_weight(base, target), _theirs(theirs, target)) for target in resolved]
    dtype = torch.float64 if weights[0][0].dtype is torch.float64 else torch.float32
    like = torch.zeros(0, dtype=dtype, device=weights[0][0].device)

    def read(weight: int) -> Tensor:
        before, after = weights[weight]
        # The difference of two close half-precision numbers is exact in single precision.
        difference: Tensor = resolved[weight].select(after).to(like) - resolved[weight].select(before).to(like)
        return difference

    def fit(config: Config) -> tuple[dict[str, Tensor], FitReport]:
        plan = plan_of(config, resolved).with_base(
            lambda weight: resolved[weight].select(weights[weight][0]).to(dtype).cpu()
        )
        return chosen.fit(load_backend("torch"), like, plan, read, progress)

    with torch.no_grad():
        if max_error is None:
            arrays, report = fit(cfg)
        else:
            _, cfg, arrays, report = smallest_rank(fit, cfg, max_error, max_rank)
        adapter = attach(base, cfg, resolved, name, keep_trainable=keep_trainable, dtype=dtype)
        try:
            _copy_kept(adapter._state, theirs)
            adapter.load_arrays(arrays)
        except BaseException:
            adapter.detach()
            raise
    adapter.report = report
    others = list(_others(base, theirs, resolved, adapter._state))
    if others:
        more = f" and {len(others) - 4} more" if len(others) > 4 else ""
        warn(
            f"the two models differ in {', '.join(map(escaped, others[:4]))}{more}, which the adapter does not hold: "
            "name them in keep_trainable=, or make them targets",
        )
    return adapter


def _state(tuned: Any) -> Mapping[str, Tensor]:
    if isinstance(tuned, nn.Module):
        return tensors_of(tuned)
    if not isinstance(tuned, Mapping) or not all(isinstance(value, Tensor) for value in tuned.values()):
        raise TargetError(f"tuned must be a torch module or a state dict of tensors; got {type(tuned).__name__}")
    return tuned


def _weight(base: nn.Module, target: Target) -> Tensor:
    weight = current_value(base.get_submodule(target.module), target.parameter)
    if weight is None or not weight.is_floating_point():
        raise TargetError(
            f"{target.name} is quantized in the base, so its change cannot be computed: leave it out of the targets"
        )
    if weight.device.type == "meta":
        raise TargetError(f"{target.name} is on the meta device and has no values: load the model's weights first")
    return gather_full(weight.detach())


def _theirs(state: Mapping[str, Tensor], target: Target) -> Tensor:
    tensor = state.get(target.name)
    if tensor is None:
        raise TargetError(f"the tuned model has no {safe_repr(target.name)}: give a fine-tuned version of the base")
    tensor = gather_full(tensor.detach())
    if tuple(tensor.shape) != target.stored or not tensor.is_floating_point():
        raise TargetError(
            f"{target.name} is {tuple(tensor.shape)}, {tensor.dtype} in the tuned model and {target.stored} in the "
            "base: give a fine-tuned version of the base"
        )
    return tensor


def _copy_kept(adapter: AdapterState, theirs: Mapping[str, Tensor]) -> None:
    tensors = tensors_of(adapter.model)
    for name in adapter.kept:
        if name not in theirs or theirs[name].shape != tensors[name].shape:
            shape = tuple(theirs[name].shape) if name in theirs else "missing"
            raise ShapeError(
                f"keep_trainable names {name}; it is {shape} in the tuned model, {tuple(tensors[name].shape)} in the "
                "base: build the base with the head of the tuned model"
            )
    for name in adapter.kept:
        tensors[name].copy_(theirs[name])


def _others(
    base: nn.Module, theirs: Mapping[str, Tensor], targets: Sequence[Target], adapter: AdapterState
) -> Iterator[str]:
    """Yield the parameters and buffers that differ and are neither targets nor kept."""
    kept = set(adapter.kept)
    adapted = {name for target in targets for name in (target.name, *target.tied)}
    adapter_names = set(adapter.parameter_names.values())
    ours = tensors_of(base)
    for name, tuned in theirs.items():
        before = ours.get(name)
        if name in kept or (before is not None and before.device.type == "meta"):
            continue
        if before is None or tuned.shape != before.shape:
            yield name
            continue
        before, after = gather_full(before.detach()), gather_full(tuned.detach()).to(before)
        if name in adapted:
            mine = [target for target in targets if name in (target.name, *target.tied)]
            if any(target.is_whole for target in mine):
                continue
            after = after.clone()
            for target in mine:
                target.write(after, target.select(before))
        if not torch.equal(before, after):
            yield name
    # Only parameters: a state dict omits buffers that the model recomputes.
    yield from (
        name
        for name, tensor in ours.items()
        if isinstance(tensor, nn.Parameter) and name not in theirs and name not in adapter_names
    )
