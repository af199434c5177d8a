"""The parameters of a plan: where they start, what base weights determine, and the arrays that they make."""

from __future__ import annotations

import functools
from collections.abc import Callable, Collection, Mapping, Sequence
from typing import Any, ClassVar, Literal, Self, cast, overload

import numpy as np

from tnadapt.argument_checks import checks_arguments, wrong_argument
from tnadapt.backends import Backend, get_backend, load_backend
from tnadapt.backends.array_types import JaxArray, TorchArray
from tnadapt.backends.backend import Array
from tnadapt.errors import BackendError, ConfigError, ShapeError, safe_repr

from ._base_arrays import base_starts, from_base
from ._group_plan import GroupPlan, some_names
from .applying import applying_of
from .config import Config

__all__ = ["ParameterPlan"]


class ParameterPlan(GroupPlan):
    """A plan with parameters. The base of :class:`~tnadapt.SuperLoRA`, which adds updates.

    Examples
    --------
    >>> from tnadapt import Config
    >>> list(ParameterPlan(Config(rank=2), [(6, 4)]).init())
    ['group0.split0.factor0', 'group0.split0.factor1']
    """

    #: The class of the plans of each special class of configs.
    _of: ClassVar[dict[type[Config], type[ParameterPlan]]] = {}

    def __init_subclass__(cls, of: type[Config] | None = None) -> None:
        super().__init_subclass__()
        if of is not None:
            ParameterPlan._of[of] = cls

    def __new__(cls, config: Config, *args: Any, **settings: Any) -> Self:
        return cast(Self, object.__new__(cls._of.get(type(config), cls)))

    # -- Base weights ------------------------------------------------------------------------

    @checks_arguments
    def with_base(
        self, weights: Sequence[Any] | Callable[[int], Any], progress: Callable[[int, int], None] | None = None
    ) -> Self:
        """Return this plan with what is computed from the base weights: frozen arrays, the start, and magnitudes.

        Parameters
        ----------
        weights : sequence of array, or callable
            The base weight of each update, ``(rows, cols)``, of any library; or a function that returns the weight with
            an index, so that only one group's weights are in memory at a time.
        progress : callable, optional
            Called with the numbers of frozen arrays that are computed and of all, after each array.

        Returns
        -------
        SuperLoRA
            Itself if nothing of it is computed from the base.

        Raises
        ------
        ShapeError
            If a weight is missing or has another shape.
        ConfigError
            If an array cannot be computed from its weight: NaN, or too few singular values.

        Notes
        -----
        For :class:`tnadapt.sources.FromBase`; for starts that are computed from the base weights; and for
        ``apply="magnitude"``, whose magnitudes start at the norms of the weights. Memory: a group's weights in float64;
        for starts, those of as many groups as there are cores, up to 8.

        Examples
        --------
        >>> import numpy as np, tnadapt as tna
        >>> sources = {"factor0": tna.sources.FromBase("rows")}
        >>> plan = tna.SuperLoRA(tna.presets.lora(2, sources=sources), [(6, 4)])
        >>> plan.base_shapes, plan.with_base([np.diag([3.0, 2, 1, 1, 1, 1])[:, :4]]).given.keys()
        ({'group0.split0.factor0': (6, 2)}, dict_keys(['group0.split0.factor0']))
        """
        if not self.base_shapes and not self.weight_param_shapes:
            return self
        found = from_base(self, weights, progress) if self.base_shapes else {}
        plan = type(self)(self.config, self.shapes, self._layers, self._roles, given={**self.given, **found})
        plan._base_starts = base_starts(self, weights)
        return plan

    def fill(self, other: ParameterPlan) -> None:
        """Add what is computed from the base weights and this plan lacks, in place, from a plan that has it.

        For an adapter that uses the plan already. What the plan has stays as it is.

        Parameters
        ----------
        other : SuperLoRA
            A plan of the same config and shapes, such as :meth:`with_base` returns.
        """
        own = self.given
        self._given.update({name: array for name, array in other.given.items() if name not in own})
        # In place, like the given arrays: the plan in other units has the same ones.
        self._base_starts.update(
            {name: start for name, start in other.base_starts.items() if name not in self._base_starts}
        )

    # -- Start -------------------------------------------------------------------------------

    @checks_arguments
    def with_start(self, arrays: Mapping[str, Any]) -> Self:
        """Return this plan with other initial arrays, as ``start_from=arrays`` gives it.

        Parameters
        ----------
        arrays : mapping of str to array
            Of any library, for some or all names in ``array_shapes``. The others start as usual.

        Returns
        -------
        SuperLoRA
            A new plan, with the given and base arrays of this one.

        Raises
        ------
        ConfigError
            If ``config.start`` is not "given", a name is unknown, or an array is not finite.
        ShapeError
            If an array has another shape.

        Examples
        --------
        ΔW is the difference to the start, which itself is no zero:

        >>> import numpy as np, tnadapt as tna
        >>> plan = tna.SuperLoRA(tna.presets.lora(1, start="given"), [(2, 3)])
        >>> plan = plan.with_start({"group0.split0.factor0": np.ones((2, 1))})
        >>> params = plan.init()
        >>> params["group0.split0.factor0"].tolist(), bool(plan.deltas(params)[0].any())
        ([[1.0], [1.0]], False)
        """
        given = {name: array for name, array in self.given.items() if name not in self.start_shapes}
        plan = type(self)(self.config, self.shapes, self._layers, self._roles, given=given, start_from=arrays)
        plan._base_starts = self._base_starts
        return plan

    @overload
    def init(
        self,
        backend: Literal["numpy"] = "numpy",
        dtype: str = "float32",
        device: Any = None,
        trained: Collection[str] | None = None,
    ) -> dict[str, np.ndarray]: ...

    @overload
    def init(
        self,
        backend: Literal["torch"],
        dtype: str = "float32",
        device: Any = None,
        trained: Collection[str] | None = None,
    ) -> dict[str, TorchArray]: ...

    @overload
    def init(
        self,
        backend: Literal["jax"],
        dtype: str = "float32",
        device: Any = None,
        trained: Collection[str] | None = None,
    ) -> dict[str, JaxArray]: ...

    @overload
    def init(
        self, backend: str, dtype: str = "float32", device: Any = None, trained: Collection[str] | None = None
    ) -> dict[str, Any]: ...

    def init(
        self,
        backend: str = "numpy",
        dtype: str = "float32",
        device: Any = None,
        trained: Collection[str] | None = None,
    ) -> dict[str, Array]:
        """Return initial parameters, for which ΔW is exactly zero and its gradient is not.

        Parameters
        ----------
        backend : str
            ``"numpy"``, ``"torch"``, ``"jax"``, ``"cupy"`` or a registered name.
        dtype : str
            ``"float32"``, ``"float64"``, ``"float16"`` or ``"bfloat16"``.
        device : optional
            Device of the arrays; the library's default if None.
        trained : collection of str, optional
            Names of the arrays that will be trained while the others stay as returned. The array that starts at zero is
            then one of these, so that it has a gradient.

        Returns
        -------
        dict of str to array
            In the order of ``param_shapes``, with the same numbers in every library.

        Raises
        ------
        BackendError
            If the library, dtype or device is not available.
        ConfigError
            If the dtype cannot represent the initial values (float16, a nonlinear F and a tiny alpha), or ``trained``
            names no array.

        Notes
        -----
        For a linear F, the factor of the leading mode of the last split is zero in every term, and the other arrays are
        random. For a nonlinear F all arrays are random, and ``deltas`` subtracts the update of the initial values. The
        random arrays are normal, drawn from ``config.seed``, and scaled to a common root mean square: the one for which
        the first SGD step changes ΔW by 1/32 of what dense fine-tuning changes (for a white gradient and a scale of 1),
        whatever rank, order, splits and ρ are. :mod:`tnadapt.algebra.init` has the formula, and the case of order 1.

        Examples
        --------
        >>> import tnadapt as tna
        >>> params = tna.SuperLoRA(tna.Config(rank=1), [(2, 3)]).init()
        >>> params["group0.split0.factor0"].tolist()
        [[0.0], [0.0]]
        >>> plan = tna.SuperLoRA(tna.Config(rank=1), [(2, 3)])
        >>> params = plan.init(trained=["group0.split0.factor1"])
        >>> [bool(array.any()) for array in params.values()]
        [True, False]
        """
        library = load_backend(backend)
        if not library.usable():
            raise BackendError(f"{backend} is installed, but finds no device to compute on")
        if not isinstance(dtype, str):
            raise BackendError(f"dtype must be a name such as 'float32'; got {safe_repr(dtype)}")
        # Try an empty array first, to refuse an unavailable dtype or device before anything is drawn.
        library.asarray(np.zeros(0), dtype, device)
        made = self._weight_params(library, dtype, device)
        if self.theta is not None:
            self.theta.require_brought()
            self._require_gradient()
            for name, shape in self.theta.shapes.items():
                made[name] = library.asarray(np.zeros(shape), dtype, device)
            return {name: made[name] for name in self.param_shapes}
        for group, start in zip(self.groups, self.starts(trained), strict=True):
            for name, full in group.names.items():
                if full in made:
                    continue  # arrays that are tied
                host = start.host(name)
                if dtype == "float16" and np.max(np.abs(host)) > np.finfo(np.float16).max:
                    raise ConfigError(
                        f"{full} starts at numbers of up to {np.max(np.abs(host)):.1e}, which float16 cannot hold; "
                        f"use float32, or a larger alpha than {self.config.alpha}"
                    )
                made[full] = library.asarray(host, dtype, device)
        return {name: made[name] for name in self.param_shapes}

    def _weight_params(self, library: Backend, dtype: str, device: Any) -> dict[str, Array]:
        """Return the initial values of the parameters in ``weight_param_shapes``."""
        missing = [name for name in self.weight_param_shapes if name not in self._base_starts]
        if missing:
            raise ConfigError(
                f"{missing[0]} starts at the norms of its base weight, which this plan has not seen: call "
                "plan.with_base(weights) first, or attach the config to a model"
            )
        found = {}
        for name in self.weight_param_shapes:
            # To float32 first, as the norm is rounded where it is divided by.
            host = self._base_starts[name] if dtype == "float64" else self._base_starts[name].astype(np.float32)
            if dtype == "float16" and np.max(host) > np.finfo(np.float16).max:
                raise ConfigError(
                    f"{name} starts at norms of up to {np.max(host):.1e}, which float16 cannot hold; use float32"
                )
            found[name] = library.asarray(host, dtype, device)
        return found

    def arrays(self, params: Mapping[str, Array], dtype: str | None = None) -> dict[str, Array]:
        """Compute the arrays in ``array_shapes`` from the parameters: ``a_start + P θ``, or the parameters themselves.

        Parameters
        ----------
        params : mapping of str to array
            Names and shapes as in ``param_shapes``; one library, dtype and device.
        dtype : str, optional
            The dtype in which the parameters were trained, if they have been cast since: the arrays then have the
            numbers of training, and no gradient.

        Returns
        -------
        dict of str to array
            Differentiable in torch and JAX. ``arrays_plan`` computes updates from them.

        Raises
        ------
        ShapeError, BackendError
            As in :meth:`deltas`.

        Notes
        -----
        One call of P. a_start is rounded to the dtype of the parameters, and the sum is exactly a_start if θ is 0.

        Examples
        --------
        >>> import numpy as np, tnadapt as tna
        >>> plan = tna.SuperLoRA(tna.presets.lora(1, before="one-hot", parameters=2), [(2, 3)])
        >>> [array.shape for array in plan.arrays({"theta": np.ones(2)}).values()]
        [(2, 1), (3, 1)]
        """
        return self._arrays(self._checked(params), params, dtype)

    def _arrays(self, backend: Backend, params: Mapping[str, Array], dtype: str | None) -> dict[str, Array]:
        if dtype is not None and not isinstance(dtype, str):
            raise wrong_argument("dtype", "a string or None", dtype)
        if self.theta is None:
            return dict(params) if not self.weight_param_shapes else {name: params[name] for name in self.array_shapes}
        return self.theta.arrays(backend, params, functools.partial(self.array_start, backend), dtype)

    @functools.cached_property
    def arrays_plan(self) -> Self:
        """The plan of the updates alone, whose parameters are the arrays of this one.

        Itself, unless ``config.before`` makes them from θ or ``config.apply`` adds parameters of the weights.
        """
        if self.theta is None and self.applying.additive:
            return self
        found = object.__new__(type(self))
        own = {"theta", "param_shapes", "num_parameters", "arrays_plan", "weight_param_shapes", "weight_param_names"}
        # The groups, and the arrays that they draw, are shared.
        found.__dict__.update({name: value for name, value in self.__dict__.items() if name not in own})
        found.config = self.config.replace(
            before=None, parameters=None, scope="plan", offset=True, apply="add", magnitude_axis="rows"
        )
        found.applying, found._base_starts = applying_of("add"), {}
        _ = found.param_shapes, found.weight_param_names
        return found

    def array_start(self, backend: Backend, full: str, like: Array, dtype: str | None = None) -> Array:
        """Return the initial value of an array in ``array_shapes``, in the library, dtype and device of ``like``.

        ``dtype`` is the dtype to which it is rounded, if that is not like's.
        """
        index, _, name = full.removeprefix("group").partition(".")
        kind = backend.dtype_name(like)
        return self.groups[int(index)].start.on(backend, (name, dtype or kind), like, kind)

    def _require_gradient(self) -> None:
        """Raise a ConfigError if θ = 0 has no gradient: without an offset, where two arrays of a product are zero."""
        if self.config.offset:
            return
        for group in self.groups:
            for prefixes in group.network.prefixes:
                made = [name for name in group.names if name.startswith(tuple(prefixes))]
                if len(made) > 1:
                    raise ConfigError(
                        f"offset=False starts {' and '.join(made[:2])} at zero, whose product has no gradient there: "
                        "use offset=True, or sources that leave one array per term to train"
                    )

    def _checked(self, params: Mapping[str, Array]) -> Backend:
        """Return the backend of the parameters, after checking their names, shapes, dtypes and devices."""
        if not isinstance(params, Mapping):
            raise ShapeError(f"params must be a mapping of names to arrays; got {type(params).__name__}")
        expected = self.param_shapes
        if params.keys() != expected.keys():
            missing = [name for name in expected if name not in params]
            unknown = [name for name in params if name not in expected]
            raise ShapeError(
                f"params must have exactly the names of param_shapes; missing: {some_names(missing)}; "
                f"unknown: {some_names(unknown)}"
            )
        backend = get_backend(*params.values())
        for name, shape in expected.items():
            backend.require_float(params[name], f"params[{name!r}]")
            if tuple(params[name].shape) != shape:
                raise ShapeError(f"params[{name!r}] has shape {tuple(params[name].shape)}; expected {shape}")
        return backend
