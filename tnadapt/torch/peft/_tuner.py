"""PEFT's tuner and tuner layer, which map PEFT's calls to tnadapt's adapters; arrays under the names PEFT expects."""

from __future__ import annotations

import collections
import contextlib
import dataclasses
import functools
import math
import re
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, cast

import torch
from peft import PeftConfig
from peft.functional import delete_adapter, set_adapter, set_requires_grad
from peft.tuners.tuners_utils import BaseTuner, BaseTunerLayer, check_adapters_to_merge
from peft.utils.integrations import init_empty_weights
from peft.utils.other import AuxiliaryTrainingWrapper, set_additional_trainable_modules
from torch import Tensor, nn

from tnadapt.algebra.config import Config
from tnadapt.checkpoints.adapter_file import AdapterFile
from tnadapt.checkpoints.fingerprint import Fingerprint
from tnadapt.errors import BackendError, ConfigError, FileError, TargetError, TnadaptError, safe_repr
from tnadapt.torch import _merging as merging
from tnadapt.torch._adapter import Adapter
from tnadapt.torch._adapter_saving import base_fingerprint
from tnadapt.torch._attach import AttachRequest, carry_out
from tnadapt.torch._registry import let_go, let_go_merged, overlapping, take_off
from tnadapt.torch._rows import BASE, assigned, row_runner
from tnadapt.torch._state import PREFIX, AdapterState, RowAssignment, entered, register_in
from tnadapt.torch._trainable import keep

from ._peft_config import TnadaptConfig, select_targets

# -- The names of arrays on a PEFT model and in PEFT's files -----------------------------------------------------------

# On the model ``base_model.tnadapt.tnadapt_arrays.default.group0_split0_factor0``, in a file
# ``base_model.model.tnadapt.group0.split0.factor0``.


_ARRAY = r"(?:group\d+_(?:term\d+_)?split\d+_[a-z]+\d*(?:_[a-z]+)?|(?:group\d+_)?theta|weight\d+_[a-z]+)"
_RESERVED = re.compile(rf"tnadapt|tnadapt_arrays|{_ARRAY}")


def in_file(key: str, adapter_name: str) -> str | None:
    """Return an array's name in a file, given its name in a state dict; None if it does not belong to this adapter.

    Examples
    --------
    >>> in_file("base_model.tnadapt.tnadapt_arrays.mine.group0_split0_factor0", "mine")
    'base_model.model.tnadapt.group0.split0.factor0'
    >>> in_file("base_model.model.lm_head.weight", "mine")
    """
    # Everything in an adapter's container is one of its arrays: formats and sources of other packages choose names.
    match = re.fullmatch(rf"(.*\.)?tnadapt\.tnadapt_arrays\.{re.escape(adapter_name)}\.([^.]+)", key)
    return None if match is None else f"{match[1] or ''}model.tnadapt.{match[2].replace('_', '.')}"


def check_adapter_name(name: str) -> None:
    """Raise a TargetError if PEFT would confuse the name with a part of every array's name, or torch forbids it."""
    if _RESERVED.fullmatch(name):
        raise TargetError(
            f"an adapter cannot be called {name!r}: the arrays of all adapters have this word in their names, and PEFT "
            "could not tell them apart; give another name"
        )
    if "." in name or hasattr(nn.ModuleDict(), name):
        raise TargetError(
            f"an adapter cannot be called {name!r}: its arrays are kept in an nn.ModuleDict, which takes no names with "
            "dots or of its attributes; give another name"
        )


# -- The adapters on a model as PEFT sees them: a single "tuner layer" -------------------------------------------------


class TnadaptLayer(nn.Module, BaseTunerLayer):  # type: ignore[misc]  # PEFT's types are not looked at
    """The adapters of a model as the single "tuner layer" that PEFT sees.

    PEFT's own methods have one such layer per weight, with its share of the parameters. Here the parameters of a group
    belong to many weights, so there is one layer for all of them. It is next to the base model, which it does not
    change, and holds the arrays as ``tnadapt_arrays.{adapter}.{array}``.
    """

    adapter_layer_names = ("tnadapt_arrays",)

    def __init__(self) -> None:
        super().__init__()
        self.tnadapt_arrays = nn.ModuleDict()
        self.handles: dict[str, Adapter] = {}
        self.merged_adapters: list[str] = []
        self._active_adapter: list[str] = []
        self._disable_adapters = False
        # Mixing weights of the adapters that are inactive at the moment, to restore later.
        self._weights: dict[str, float] = {}
        self._bases: dict[str, dict[str, Any]] = {}

    def extra_repr(self) -> str:
        """Return the adapters' descriptions for ``print(peft_model)``."""
        return ", ".join(map(repr, self.handles.values()))

    @property
    def in_features(self) -> tuple[int, ...]:
        """The input sizes of the adapted weights, one adapter after another."""
        return tuple(target.shape[1] for handle in self.handles.values() for target in handle.targets)

    @property
    def out_features(self) -> tuple[int, ...]:
        """The output sizes of the adapted weights, in the order of :attr:`in_features`."""
        return tuple(target.shape[0] for handle in self.handles.values() for target in handle.targets)

    def add(self, handle: Adapter) -> None:
        """Add an adapter that was just attached, and register its arrays here."""
        arrays = nn.ParameterDict()
        register_in(
            handle._state,
            arrays,
            f"they belong to a PEFT model; call its delete_adapter({handle.name!r}), unload() or merge_and_unload()",
        )
        self.tnadapt_arrays[handle.name] = arrays
        self.handles[handle.name] = handle

    def remove(self, name: str) -> None:
        """Remove an adapter from the model."""
        handle = self.handles[name]
        # While other adapters remain, requires_grad is decided by them and by PEFT (modules_to_save). Detaching would
        # reset it to its state before the first adapter, so it is saved and restored.
        required = _trainable(handle.model) if len(self.handles) > 1 else {}
        try:
            let_go(handle._state)
        finally:
            _restore(required)
        self.drop(name)

    def drop(self, name: str) -> None:
        """Forget an adapter that was removed from the model, also one that was only partly added."""
        self.handles.pop(name, None)
        if name in self.tnadapt_arrays:
            del self.tnadapt_arrays[name]
        self._weights.pop(name, None)
        self._bases.pop(name, None)

    def base_of(self, name: str) -> dict[str, Any] | None:
        """Return the description of the base model for a file; None while another adapter is merged into the base."""
        # Computed when first needed, because it reads every weight.
        if name not in self._bases and set(self.merged_adapters) <= {name}:
            self._bases[name] = _describe_base(self.handle(name))
        return self._bases.get(name)

    def get_base_layer(self) -> nn.Module:
        """Raise an AttributeError: there is no single base layer, hence no ``weight`` and ``bias`` for PEFT to read."""
        raise AttributeError("a TnadaptLayer stands for many weights and has no base layer")

    def inactive_weights(self) -> dict[AdapterState, float]:
        """Return the mixing weights that inactive adapters have when they are active."""
        return {self.handles[name]._state: weight for name, weight in self._weights.items()}

    def handle(self, name: str) -> Adapter:
        """Return the handle of an adapter.

        Raises
        ------
        TargetError
            If there is none of that name.
        """
        if name not in self.handles:
            names = ", ".join(map(repr, self.handles)) or "none"
            raise TargetError(f"no tnadapt adapter {name!r} on this model; there are: {names}")
        return self.handles[name]

    def set_adapter(self, adapter_names: str | list[str], inference_mode: bool = False) -> None:
        """Activate these adapters, and train them unless ``inference_mode``; deactivate and freeze the others."""
        names = [adapter_names] if isinstance(adapter_names, str) else list(adapter_names)
        for name in names:
            self.handle(name)
        self.set_requires_grad(list(self.handles), False)
        self.set_requires_grad(names, not inference_mode)
        self._active_adapter = names
        self._switch()

    def set_requires_grad(self, adapter_names: str | Sequence[str], requires_grad: bool = True) -> None:
        """Set whether these adapters are trained; arrays that ``set_trainable`` froze stay frozen."""
        for name in [adapter_names] if isinstance(adapter_names, str) else adapter_names:
            handle = self.handle(name)
            for array, parameter in handle.named_parameters():
                frozen = handle.trained is not None and array not in handle.trained
                parameter.requires_grad_(requires_grad and not frozen)

    def enable_adapters(self, enabled: bool) -> None:
        """Enable or disable all adapters; disabling unmerges, as in PEFT's own layers."""
        if not enabled and self.merged:
            self.unmerge()
        self._disable_adapters = not enabled
        self._switch()

    def merge(self, safe_merge: bool = False, adapter_names: list[str] | None = None) -> None:
        """Merge these adapters, the active ones by default: all, or none if one fails.

        ``safe_merge`` is always on: nothing that is not finite is ever added.
        """
        names = list(check_adapters_to_merge(self, adapter_names))
        handles = [self.handle(name) for name in names]
        before, new = self.merged_adapters, [handle for handle in handles if not handle.merged]
        try:
            for name, handle in zip(names, handles, strict=True):
                self._act(name, True)
                handle.merge()
            self.merged_adapters = [*before, *names]
            self._switch()
        except BaseException as error:  # also OutOfMemoryError and KeyboardInterrupt
            for other in reversed(new):
                if other.merged:
                    other.unmerge()
            self.merged_adapters = before
            self._switch()
            if not isinstance(error, TnadaptError):
                raise
            if all(bool(torch.isfinite(array).all()) for _, array in handle.named_parameters()):
                raise
            # Code that uses PEFT looks for this sentence.
            raise BackendError(
                f"NaNs detected in the merged weights. The adapter {name} seems to be broken: {error}"
            ) from error

    def unmerge(self) -> None:
        """Restore the exact bits that the weights had before any merge."""
        if not self.merged:
            warnings.warn("Already unmerged. Nothing to do.", stacklevel=2)
        while self.merged_adapters:
            # In reverse order, because each restores the rows that it found. An adapter that is listed but no longer
            # merged comes from an unmerge() that was interrupted.
            handle = self.handles[self.merged_adapters[-1]]
            if handle.merged:
                handle.unmerge()
            self.merged_adapters = self.merged_adapters[:-1]
        self._switch()

    def delete_adapter(self, adapter_name: str) -> None:
        """Remove an adapter from the model; if it was active, another one becomes active."""
        self.handle(adapter_name)
        self.remove(adapter_name)
        super().delete_adapter(adapter_name)

    def _switch(self) -> None:
        """Set every adapter to its mixing weight, or to zero if it is inactive."""
        # While some are merged, no other adapter acts, like in PEFT's own layers.
        active = [] if self._disable_adapters else self._active_adapter
        for name in self.handles:
            self._act(name, name in (self.merged_adapters or active))

    def _act(self, name: str, acts: bool) -> None:
        handle = self.handles[name]
        if acts and handle.weight == 0.0:
            handle.set_weight(self._weights.get(name, 1.0))
            self._weights.pop(name, None)
        elif not acts and handle.weight != 0.0:
            self._weights[name] = handle.weight
            handle.set_weight(0.0)

    def _move_adapter_to_device_of_base_layer(self, adapter_name: str, device: torch.device | None = None) -> None:
        handle = self.handles[adapter_name]
        first = handle.targets[0]
        weight = handle.model.get_submodule(first.module)._parameters.get(first.parameter)
        for _, parameter in handle.named_parameters():
            where = device if weight is None or device is not None else weight.device
            if where is not None and parameter.device.type != "meta":
                parameter.data = parameter.data.to(where)


# -- One adapter for each sample of a batch, by PEFT's adapter_names=: tnadapt.torch.rows with PEFT's checks -----------

# The sentences of the errors are PEFT's, for which code that uses PEFT looks.


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
    """Return the tensor whose first dimension consists of the samples, if it is known."""
    samples = next((kwargs[name] for name in _INPUTS if kwargs.get(name) is not None), args[0] if args else None)
    return samples if isinstance(samples, Tensor) and samples.ndim else None


def _wrong_length(names: Sequence[Any], x: Tensor) -> TargetError:
    return TargetError(
        "Length of `adapter_names` should be the same as the number of inputs, but got "
        f"{len(names)} and {len(x)} respectively."
    )


def _hooks(tuner: nn.Module, assignment: RowAssignment) -> list[Any]:
    """Register hooks that check the model's inputs, and pass the names to PEFT's wrappers of ``modules_to_save``."""
    names = [BASE if name is None else name for name in assignment.names]

    def check(module: nn.Module, args: Any, kwargs: dict[str, Any]) -> None:
        # Some of PEFT's forward passes do not show their inputs earlier. generate() repeats samples.
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


# -- init_weights=False: an adapter with a random update from the start, as in PEFT's methods --------------------------


@torch.no_grad()
def start_randomly(handle: Adapter) -> None:
    """Add normal numbers from torch's generator to the arrays that start from zero, or to all if none does.

    PEFT's methods draw from that generator, too, so ``torch.manual_seed`` has the same effect.
    """
    units = handle.plan.units
    named = [(name, array) for name, array in handle.named_parameters() if array.device.type != "meta"]
    has_zero = not all(array.any() for _, array in named)
    # A single array is the update itself, so its numbers must be small; otherwise the small initial values of the other
    # arrays scale the product.
    # They are smaller still if the scale or F enlarges them, like WaveFT's scale of 25.
    # θ moves all arrays of a product at once.
    alone = len(named) == handle.plan.num_groups or handle.plan.theta is not None
    if not has_zero and not handle.plan.point.leaves_zero:
        # All arrays move at once, and some are identities.
        for _, array in named:
            array.add_(torch.randn_like(array), alpha=0.3 * float(array.square().mean().sqrt()))
        return
    enlarged = max(group.network.scale * math.sqrt(group.projection.map.variance()) for group in handle.plan.groups)
    for name, array in named:
        if not has_zero or not array.any():
            array.add_(torch.randn_like(array), alpha=(0.1 / max(1.0, enlarged) if alone else 1.0) / units[name])


# -- The description of the base model in adapter_config.json, and the check that an adapter fits a base ---------------


def _describe_base(handle: Adapter) -> dict[str, Any]:
    """Describe the base model and the draws for a file, which reads every adapted weight."""
    base = base_fingerprint(handle._state)
    return {
        "weights": dict(collections.Counter(f"{rows}x{cols}" for rows, cols in handle.plan.shapes)),
        "fingerprint": None if base is None else {**dataclasses.asdict(base), "sketch": list(base.sketch)},
        "draws": AdapterFile(handle.config, handle.targets, handle.plan.init(), given=handle.plan.given).draws,
    }


def _check_base(handle: Adapter, saved: dict[str, Any] | None, source: dict[str, Any] | None) -> None:
    """Raise a FileError unless the adapter was trained on these weights and with the same draws."""
    # ``saved`` is from :func:`_describe_base`, or None to skip its comparison. ``source`` is the fingerprint of the
    # base from which arrays are computed: on another base, the arrays that the adapter does not store would differ.
    computed = handle.plan.base_shapes
    if saved is None and (source is None or not computed):
        return
    here, class_name = _describe_base(handle), type(handle.model).__name__
    way = (
        "Give the base model that it was trained on; or, to use it here anyway, load its TnadaptConfig, set "
        "config.base = None, and pass it as config="
    )
    if saved is not None and saved.get("weights") != here["weights"]:
        raise FileError(
            f"the adapter was trained on weights of the shapes {safe_repr(saved.get('weights'))}, and target_modules "
            f"find {here['weights']} in this {class_name}. {way}"
        )
    if saved is not None and saved.get("draws") != here["draws"]:
        raise FileError(
            f"the adapter was trained with fixed draws whose digest is {safe_repr(saved.get('draws'))}; on this "
            f"machine it is {here['draws']}. Its updates would differ: run tnadapt.verify to see why"
        )
    other = f"the adapter was trained on another base model than this {class_name}: of its weights"
    if computed and (difference := _difference(source, here["fingerprint"])) is not None:
        raise FileError(
            f"{other}, {difference}. Arrays such as {next(iter(computed))!r} are computed from the base weights and "
            "not stored, and would be other ones here. Give the base model that it was trained on; or, on that model, "
            "save the adapter with tnadapt.torch.adapters(model)[name].save(path, store_bases=True), and load that "
            "file with tnadapt.torch.load(…, check_base=False)"
        )
    if saved is not None and (difference := _difference(saved.get("fingerprint"), here["fingerprint"])) is not None:
        raise FileError(f"{other}, {difference}. {way}")


def _difference(saved: Any, here: dict[str, Any] | None) -> str | None:
    """Describe how two fingerprints differ, or return None if they match or one of them could not be taken."""
    if saved is None or here is None:
        return None
    try:
        return Fingerprint(**saved).difference(Fingerprint(**here))
    except (TypeError, TnadaptError) as error:
        raise FileError(f"the fingerprint of the base model in the adapter's config is invalid: {error}") from None


def _base_dtype(handle: Adapter) -> torch.dtype:
    """Return the dtype of the adapted weights, promoted if they differ; float32 if all are quantized."""
    stored = [merging.stored(handle._state, index) for index in range(len(handle.targets))]
    dtypes = [weight.dtype for weight in stored if weight is not None]
    # torch counts float8 types as floating point, but cannot compute in them.
    wide = [dtype for dtype in dtypes if dtype.is_floating_point and dtype.itemsize > 1]
    return functools.reduce(torch.promote_types, wide) if wide else torch.float32


# -- The tuner ---------------------------------------------------------------------------------------------------------


class TnadaptModel(BaseTuner):  # type: ignore[misc]  # PEFT's types are not looked at
    """The wrapper that PEFT puts around the model; maps PEFT's calls to those of :class:`tnadapt.torch.Adapter`.

    Attributes
    ----------
    model : Module
        The base model.
    tnadapt : TnadaptLayer
        The adapters.
    """

    prefix = PREFIX
    tuner_layer_cls = TnadaptLayer
    uses_shared_state = True
    tnadapt: TnadaptLayer
    targeted_module_names: list[str]

    def _pre_injection_hook(self, model: nn.Module, config: PeftConfig, adapter_name: str) -> None:
        self.tnadapt = TnadaptLayer()

    def _create_and_replace(self, *args: Any, **kwargs: Any) -> None:
        raise NotImplementedError("tnadapt replaces no modules")

    def inject_adapter(
        self,
        model: nn.Module,
        adapter_name: str,
        autocast_adapter_dtype: bool = True,
        low_cpu_mem_usage: bool = False,
        state_dict: dict[str, Tensor] | None = None,
    ) -> None:
        """Attach an adapter; the first one becomes active."""
        earlier, trainable = list[AdapterState](), dict[nn.Parameter, bool]()
        attaching = False
        try:
            earlier = overlapping(model)
            attaching = True
            config: Any = self.peft_config[adapter_name]
            layer = self.tnadapt
            if layer.handles:
                trainable = _trainable(self)
            check_adapter_name(adapter_name)
            if layer.merged:
                warnings.warn("An adapter cannot be added while others are merged. Unmerging them first.", stacklevel=2)
                layer.unmerge()
            with init_empty_weights() if low_cpu_mem_usage else contextlib.nullcontext():
                handle = _attach(model, config, adapter_name)
                layer.add(handle)
            _check_base(handle, config.base, config.computed_from)
            if config.trained is not None:
                _choose(handle, config.trained)
            if not config.init_weights:
                start_randomly(handle)
            active = self.active_adapters
            if active:
                self.set_adapter(active, inference_mode=config.inference_mode)
            else:
                layer.set_adapter([])
            set_additional_trainable_modules(
                model=model,
                peft_config=config,
                model_config=self.get_model_config(self),
                adapter_name=adapter_name,
                activate_adapter=adapter_name in active,
            )
            _restore(trainable)
            self.targeted_module_names = list(
                dict.fromkeys([*self.targeted_module_names, *(target.module for target in handle.targets)])
            )
        except BaseException:  # KeyboardInterrupt, too: PEFT does not roll back
            for other in overlapping(model):
                if attaching and other not in earlier:
                    take_off(other)
                    self.tnadapt.drop(adapter_name)
            _restore(trainable)
            # A second tuner on the same base shares this dictionary with the first.
            if adapter_name not in [other.name for other in earlier]:
                self.peft_config.pop(adapter_name, None)
            raise

    def set_adapter(self, adapter_name: str | list[str], inference_mode: bool = False) -> None:
        """Activate these adapters; see PEFT."""
        for name in [adapter_name] if isinstance(adapter_name, str) else adapter_name:
            self.tnadapt.handle(name)  # raises before PEFT freezes the modules_to_save of the others
        set_adapter(self, adapter_name, inference_mode=inference_mode)
        self.active_adapter = adapter_name

    def set_requires_grad(self, adapter_names: str | Sequence[str], requires_grad: bool = True) -> None:
        """Set whether these adapters and their ``modules_to_save`` are trained."""
        set_requires_grad(self, adapter_names=adapter_names, requires_grad=requires_grad)

    def delete_adapter(self, adapter_name: str) -> None:
        """Remove an adapter from the model.

        Raises
        ------
        TargetError
            If there is none of that name, or it is merged.
        """
        if adapter_name not in self.tnadapt.handles:
            names = ", ".join(map(repr, self.tnadapt.handles)) or "none"
            raise TargetError(f"Adapter {adapter_name} does not exist; there are: {names}")
        if adapter_name in self.tnadapt.merged_adapters:
            raise TargetError(
                f"Cannot delete adapter(s) {[adapter_name]} while they are merged. Please unmerge them first. "
                "(unmerge_adapter() does so.)"
            )
        self.active_adapter = delete_adapter(self, adapter_name, prefix=self.prefix, layer_cls=TnadaptLayer) or []
        del self.peft_config[adapter_name]

    def merge_adapter(self, adapter_names: list[str] | None = None, safe_merge: bool = False) -> None:
        """Merge adapters into the weights, the active ones by default: all of them, or none if one fails."""
        self._check_merge_allowed()
        self.tnadapt.merge(adapter_names=adapter_names)

    def unmerge_adapter(self) -> None:
        """Restore the exact bits that the weights had before any merge."""
        self.tnadapt.unmerge()

    @contextlib.contextmanager
    def _enable_peft_forward_hooks(self, *args: Any, **kwargs: Any) -> Iterator[None]:
        names = kwargs.pop("adapter_names", None)
        if names is None:
            yield
            return
        with mixed_batch(self, self.tnadapt, names, args, kwargs):
            yield

    def add_weighted_adapter(self, *args: Any, **kwargs: Any) -> None:
        """Raise a ConfigError: adapters are mixed without a new one, by :func:`tnadapt.torch.mix`."""
        raise ConfigError(
            "tnadapt's adapters are combined by their weights, without a new adapter, which could have another "
            "form: tnadapt.torch.mix(model, {'first': 0.5, 'second': 0.5})"
        )

    def _enable_adapter_layers(self, enabled: bool = True) -> None:
        self.tnadapt.enable_adapters(enabled)
        super()._enable_adapter_layers(enabled)

    def _cast_adapter_dtype(self, adapter_name: str, autocast_adapter_dtype: bool = True) -> None:
        handle = self.tnadapt.handle(adapter_name)
        dtype = torch.float32 if autocast_adapter_dtype else _base_dtype(handle)
        for _, parameter in handle.named_parameters():
            if not autocast_adapter_dtype or parameter.dtype in (torch.float16, torch.bfloat16):
                parameter.data = parameter.data.to(dtype)

    def _unload_and_optionally_merge(
        self,
        merge: bool = True,
        progressbar: bool = False,
        safe_merge: bool = False,
        adapter_names: list[str] | None = None,
    ) -> nn.Module:
        layer = self.tnadapt
        if layer.merged and not merge:
            layer.unmerge()
        wanted = self.active_adapters if adapter_names is None else adapter_names
        left = [name for name in wanted if name not in layer.merged_adapters]
        if merge and left:
            layer.merge(adapter_names=left)
        # PEFT removes its own wrappers of modules_to_save.
        super()._unload_and_optionally_merge(merge=merge, progressbar=progressbar, adapter_names=adapter_names)
        for name, handle in list(layer.handles.items()):
            if name in layer.merged_adapters:
                let_go_merged(handle._state)
            else:
                let_go(handle._state)
            layer.drop(name)
        layer.merged_adapters = []
        model: nn.Module = self.model
        return model

    # -- State dicts -------------------------------------------------------------------------

    @classmethod
    def _get_adapter_state_dict(
        cls,
        model: nn.Module,
        config: Any,
        adapter_name: str,
        state_dict: dict[str, Tensor],
        unwanted_adapter_names: Any,
    ) -> dict[str, Tensor]:
        layer = _layer_of(model)
        handle = layer.handle(adapter_name)
        values: dict[str, Any] = {"trained": None if handle.trained is None else list(handle.trained)}
        computed = config.computed_from is None and handle.plan.base_shapes
        base = layer.base_of(adapter_name) if config.base is None or computed else None
        if base is not None and config.base is None:
            values["base"] = dict(base)
        if base is not None and computed and base["fingerprint"] is not None:
            values["computed_from"] = dict(base["fingerprint"])
        config.keep_for_file(**values)
        # PEFT's files have the arrays, as tnadapt's do.
        return _converted(state_dict, handle, handle._state.plan.to_arrays)

    @classmethod
    def _remove_adapter_name_from_key(cls, key: str, adapter_name: str) -> str:
        return in_file(key, adapter_name) or super()._remove_adapter_name_from_key(key, adapter_name)

    @classmethod
    def _remap_adapter_state_dict_for_load(
        cls, model: nn.Module, config: Any, adapter_name: str, state_dict: dict[str, Tensor]
    ) -> dict[str, Tensor]:
        if adapter_name in _layer_of(model).merged_adapters:
            raise TargetError(f"adapter {adapter_name!r} is merged: call unmerge_adapter() before arrays are loaded")
        names, expected = dict[str, str](), dict[str, tuple[int, ...]]()
        for name, tensor in model.state_dict().items():
            key = in_file(name, adapter_name)
            if key is not None:
                names[key], expected[key] = name, tuple(tensor.shape)
        shapes = {key: tuple(tensor.shape) for key, tensor in state_dict.items() if ".tnadapt." in f".{key}"}
        if shapes != expected:
            wrong = sorted(set(shapes.items()) ^ set(expected.items()))[:4]
            raise FileError(
                f"these arrays do not fit adapter {adapter_name!r}, and none was loaded; they differ in: {wrong}"
            )
        renamed = {names.get(key, key): tensor for key, tensor in state_dict.items()}
        handle = _layer_of(model).handle(adapter_name)
        return renamed | _converted(renamed, handle, handle._state.plan.from_arrays)


def _converted(
    tensors: Mapping[str, Tensor], handle: Adapter, convert: Callable[[Mapping[str, Tensor]], Mapping[str, Tensor]]
) -> dict[str, Tensor]:
    """Convert an adapter's tensors in a state dict between parameters and arrays, which differ by their units."""
    arrays = {name: array for array, name in handle._state.parameter_names.items()}
    converted = {}
    for key, tensor in tensors.items():
        if in_file(key, handle.name) is None:
            continue
        array = arrays[key.rpartition(".")[2]]
        converted[key] = convert({array: tensor})[array]
    return converted


def _layer_of(model: nn.Module) -> TnadaptLayer:
    return next(module for module in model.modules() if isinstance(module, TnadaptLayer))


def _trainable(model: nn.Module) -> dict[nn.Parameter, bool]:
    # A function: in Python 3.13, a ``try`` may not catch an interrupt of a comprehension inside it.
    return {parameter: parameter.requires_grad for parameter in model.parameters()}


def _restore(trainable: Mapping[nn.Parameter, bool]) -> None:
    for parameter, required in trainable.items():
        parameter.requires_grad_(required)


def _choose(handle: Adapter, trained: Sequence[str]) -> None:
    """Train only these arrays of a fresh adapter, one of which then starts at zero."""
    shapes = handle.plan.param_shapes
    unknown = sorted(set(trained) - set(shapes))
    if unknown:
        raise ConfigError(
            f"trained={safe_repr(unknown)} of the config are not arrays of adapter {handle.name!r}, which has "
            f"{safe_repr(list(shapes))}: give some of these names, or None to train all"
        )
    meta = any(array.device.type == "meta" for _, array in handle.named_parameters())
    keep(handle._state, trained, None if meta else handle._state.plan.init(trained=trained))


def _attach(model: nn.Module, config: TnadaptConfig, name: str) -> Adapter:
    about = BaseTuner.get_model_config(model)
    model_type = about.get("model_type") if isinstance(about, Mapping) else None
    targets = select_targets(model, config, model_type)
    settings = Config.from_dict(config.settings)
    # Not attach(), which warns of a rank that its caller chose: here it may be a preset's, or that of a file.
    return carry_out(
        AttachRequest(
            model, settings, targets, name, strategy=config.strategy, activation=config.activation,
            detach_norm=config.detach_norm, dropout=config.dropout,
        )
    )  # fmt: skip
