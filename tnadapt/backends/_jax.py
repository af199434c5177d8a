"""The JAX backend: jax.numpy is itself an array-API namespace."""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from tnadapt.errors import BackendError

from . import FFT_DTYPES, Array, Backend, Map, dft2_by_fft


class JaxBackend(Backend):
    """JAX arrays and tracers; differentiable by jax.grad, through jit and vmap."""

    name = "jax"

    def __init__(self) -> None:
        super().__init__(jnp)

    def owns(self, x: Any) -> bool:
        return isinstance(x, jax.Array)

    def is_concrete(self, x: Array) -> bool:
        return not isinstance(x, jax.core.Tracer)

    def device(self, x: Array) -> Any:
        # A tracer has no device.
        return x.device if self.is_concrete(x) else None

    def dtype(self, name: str) -> Any:
        single = {"float64": "float32", "complex128": "complex64"}.get(name)
        if single is not None and jax.dtypes.canonicalize_dtype(name) == single:
            other = ", or ask for dtype='float32'" if name == "float64" else ""
            raise BackendError(
                f"JAX computes in {single}, not {name}, unless 64-bit numbers are switched on: "
                f"jax.config.update('jax_enable_x64', True){other}"
            )
        return super().dtype(name)

    def asarray(self, array: np.ndarray, dtype: str | None = None, device: Any = None) -> Array:
        if isinstance(device, str):
            platform, _, number = device.partition(":")
            try:
                device = jax.devices(platform)[int(number or 0)]
            except (RuntimeError, ValueError, IndexError) as error:
                raise BackendError(f"JAX has no device {device!r} here: {error}") from error
        library_dtype = None if dtype is None else self.dtype(dtype)
        try:
            return jnp.array(array, dtype=library_dtype, device=device)
        except (TypeError, ValueError) as error:
            raise BackendError(f"JAX cannot use device {device!r}: {error}") from error

    def precise_matmul(self, a: Array, b: Array) -> Array:
        # By default JAX uses TF32 on GPUs, and bfloat16 on TPUs.
        return jnp.matmul(a, b, precision=jax.lax.Precision.HIGHEST)

    def detached(self, x: Array) -> Array:
        return jax.lax.stop_gradient(x)

    def apart(self, arrays: Sequence[Array]) -> list[Array]:
        return list(jax.lax.optimization_barrier(tuple(arrays)))

    def constant(self, array: np.ndarray, device: Any) -> Array:
        if array.dtype == np.int64 and jax.dtypes.canonicalize_dtype(np.int64) != np.int64:
            # JAX would silently truncate to the low 32 bits.
            if array.size and array.max() >= 1 << 31:
                raise BackendError(
                    "positions past 2**31 need 64-bit integers: jax.config.update('jax_enable_x64', True)"
                )
            array = array.astype(np.int32)
        return jnp.asarray(array, device=device)

    def lacks(self, x: Array) -> frozenset[str]:
        return frozenset({"fwht", "fastfood", "shuffle"})

    def dft2(self, x: Array, fallback: Map) -> Array | None:
        return _dft2(x) if self.dtype_name(x) in FFT_DTYPES and x.size else None

    def double_precision(self) -> AbstractContextManager[Any]:
        return jax.enable_x64(True)  # type: ignore[no-any-return]

    def gradient(
        self, function: Callable[[dict[str, Array]], Array], arrays: dict[str, Array]
    ) -> dict[str, Array] | None:
        return dict(jax.grad(function)(arrays))

    def register_result(self, kind: type[tuple[Any, ...]]) -> None:
        _register_result(kind)

    def zeros(self, shape: Any, like: Array) -> Array:
        return jnp.zeros(tuple(shape), dtype=like.dtype, device=self.device(like))


# One program instead of eight: calling an operation takes JAX longer than transforming a small matrix.
_dft2 = jax.jit(functools.partial(dft2_by_fft, jnp))


@functools.cache
def _register_result(kind: type[tuple[Any, ...]]) -> None:
    # JAX rebuilds results with placeholders in place of arrays, which the class itself would refuse.
    jax.tree_util.register_pytree_node(
        kind, lambda one: (tuple(one), None), lambda _, parts: tuple.__new__(kind, tuple(parts))
    )
