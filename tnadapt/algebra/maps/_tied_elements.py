"""TiedElements elements: each element of the output is the element of the input that a given index names."""

from __future__ import annotations

import dataclasses
import functools

import numpy as np

from tnadapt.backends import Backend
from tnadapt.backends.backend import Array
from tnadapt.errors import ConfigError, safe_repr

from ._brought import BroughtMap
from ._map_settings import MapSettings

__all__ = ["TiedElements", "TiedMap"]

# The index is stored in float32, which holds the integers up to this one.
_MOST = 1 << 24


@dataclasses.dataclass(frozen=True)
class TiedElements(MapSettings):
    """Each trained element is an element of θ, which a given index names: ``a[i] = a_start[i] + θ[index[i]]``.

    For ``Config.before`` only. The plan takes the index as ``given={"theta.index": index}``, integers from 0 to
    ``parameters - 1`` in the order of the trained arrays, and files store it.

    Parameters
    ----------
    normalized : bool
        Whether to divide each element by the square root of the number of elements with its index, so that the map is
        an isometry. Uni-LoRA's indices in PEFT are normalized.

    Raises
    ------
    ConfigError
        If normalized is not a boolean.

    Examples
    --------
    One number for all elements of the first factor, and one for those of the second:

    >>> import numpy as np, tnadapt as tna
    >>> config = tna.presets.lora(1, before="tied", parameters=2, offset=False)
    >>> plan = tna.SuperLoRA(config, [(2, 3)], given={"theta.index": np.array([0, 0, 1, 1, 1])})
    >>> plan.deltas({"theta": np.array([2.0, 5.0])})[0]
    array([[10., 10., 10.],
           [10., 10., 10.]])
    """

    normalized: bool = False

    def __post_init__(self) -> None:
        if not isinstance(self.normalized, bool):
            raise ConfigError(f"TiedElements's normalized must be True or False; got {safe_repr(self.normalized)}")
        super().__post_init__()


class TiedMap(BroughtMap):
    """``y[i] = c[index[i]] x[index[i]]``, where c is 1, or 1 / sqrt of the number of outputs with the index."""

    kind = "tied"
    settings_class = TiedElements
    settings: TiedElements
    brings = "index"
    fixed = ("index",)

    @property
    def brought_shape(self) -> tuple[int, ...]:
        return (self.n_out,)

    def check(self, array: np.ndarray, label: str) -> None:
        if self.n_in > _MOST:
            raise ConfigError(f"map 'tied' takes at most {_MOST} parameters; got {self.n_in}: use 'one-hot'")
        wrong = np.flatnonzero((array != np.floor(array)) | (array < 0) | (array >= self.n_in))
        if wrong.size:
            raise ConfigError(
                f"{label} must hold integers from 0 to {self.n_in - 1}, one less than the number of parameters; "
                f"element {wrong[0]} is {array[wrong[0]]:g}"
            )

    def stand_in(self, rng: np.random.Generator) -> np.ndarray:
        return rng.integers(self.n_in, size=self.n_out).astype(np.float32)

    def make(self, key: object) -> np.ndarray:
        index = self.brought.astype(np.int64)
        if key == "coefficients":
            return 1.0 / np.sqrt(np.maximum(np.bincount(index, minlength=self.n_in), 1))
        if isinstance(key, tuple):
            return self._stages[key[1]][0]
        return index.astype(np.int32)

    @functools.cached_property
    def _stages(self) -> list[tuple[np.ndarray, int]]:
        """How :meth:`adjoint` sums elements of one index: which to take, and how many consecutive ones to sum.

        A stage sums runs of elements with one index, padded with a zero after the last element. A run is as long as the
        mean number of elements per index, but at least 2, so that a stage takes at most about twice the elements that
        it is given, however unequal the numbers are. The sums of runs are the elements of the next stage.
        """
        owners = self.brought.astype(np.int64)
        order, stages = np.argsort(owners, kind="stable"), list[tuple[np.ndarray, int]]()
        while True:
            counts = np.bincount(owners, minlength=self.n_in)
            if counts.max() <= 1:
                break
            length = max(2, -(-owners.size // self.n_in))
            runs = -(-counts // length)
            ends, firsts = np.cumsum(runs), np.cumsum(counts) - counts
            owner = np.repeat(np.arange(self.n_in), runs)
            number = np.arange(owner.size) - (ends - runs)[owner]  # of the run, among those of its index
            place = number[:, None] * length + np.arange(length)
            inside = place < counts[owner][:, None]
            taken = np.where(inside, order[np.minimum(firsts[owner][:, None] + place, order.size - 1)], order.size)
            stages.append((taken.reshape(-1), length))
            owners, order = owner, np.arange(owner.size)
        # Back to one element per index; the zero after the last one for an index that no element has.
        last = np.full(self.n_in, owners.size)
        last[owners[order]] = order
        stages.append((last, 1))
        return stages

    def bring(self, array: np.ndarray, label: str = "the index") -> None:
        super().bring(array, label)
        self.__dict__.pop("_stages", None)

    def __getstate__(self) -> dict[str, object]:
        return {name: value for name, value in super().__getstate__().items() if name != "_stages"}

    def forward(self, backend: Backend, x: Array) -> Array:
        return self.slice(backend, x, 0, self.n_out)

    def slice(self, backend: Backend, x: Array, start: int, stop: int) -> Array:
        if self.settings.normalized:
            x = x * self.on(backend, "coefficients", x, backend.dtype_name(x))
        return backend.take(x, self.on(backend, "index", x)[start:stop])

    def adjoint(self, backend: Backend, y: Array) -> Array:
        for number, (_, length) in enumerate(self._stages):
            padded = backend.pad_last(y, y.shape[-1] + 1)
            y = backend.take(padded, self.on(backend, ("stage", number), y))
            if length > 1:
                y = backend.sum(backend.reshape(y, (*y.shape[:-1], y.shape[-1] // length, length)), axis=-1)
        if self.settings.normalized:
            y = y * self.on(backend, "coefficients", y, backend.dtype_name(y))
        return y

    def squared_norm(self) -> float:
        return float(np.unique(self.brought).size) if self.settings.normalized else float(self.n_out)

    def freedom(self) -> int:
        return int(np.unique(self.brought).size)

    def matrix(self) -> np.ndarray:
        found = np.zeros((self.n_out, self.n_in))
        for row, column in enumerate(self.brought.tolist()):
            found[row, int(column)] = 1.0
        if self.settings.normalized:
            found /= np.sqrt(np.maximum(found.sum(axis=0), 1.0))
        return found
