"""Frozen arrays that a seed determines: normal, uniform, signs, orthonormal, one-hot, identity."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable

import numpy as np

from tnadapt.errors import ConfigError, safe_repr

from .. import rng
from ._source import Source, Stream

__all__ = ["Seeded"]

Shape = tuple[int, ...]


@dataclasses.dataclass(frozen=True)
class Seeded(Source):
    """A frozen array, computed from the config's seed. It is not stored.

    Parameters
    ----------
    distribution : str
        - ``"normal"``: independent normal numbers;
        - ``"uniform"``: independent numbers, uniform on an interval around 0;
        - ``"signs"``: independent signs;
        - ``"orthonormal"``: orthonormal columns (or rows, if there are fewer of them), the Q of a QR decomposition of
          normal numbers whose R has a positive diagonal;
        - ``"one-hot"``: a single one per column, in a random row; no row has two before every row has one;
        - ``"eye"``: ones on the diagonal.

        The last three are for matrices; an array with more axes counts as the matrix of its last axis.
    shared : bool
        Whether all groups have the same array (VeRA). If their sizes differ, it is that of the largest sizes, cut to
        the leading elements along each axis.
    scale : float, optional
        Root mean square of the first three; factor of the last three. By default :math:`1 / \\sqrt d` for the first
        three, with d the size of the leading axis (before it is cut), and 1 for the others.

    Raises
    ------
    ConfigError
        If the distribution is unknown, or the scale is not a positive number.

    Notes
    -----
    All but ``"orthonormal"`` have the same bits on every machine. QR decompositions differ between LAPACKs in the last
    bits of float64, and rarely after rounding to float32.

    Examples
    --------
    LoRA with a frozen random factor (LoRA-FA):

    >>> import tnadapt as tna
    >>> config = tna.presets.lora(4).replace(sources={"factor1": tna.sources.Seeded("normal")})
    >>> tna.parameter_count(config, [(768, 768)] * 24)
    73728
    >>> Seeded("eye").array((3, 2), Stream(seed=0, group=0, purpose=1 << 16)).tolist()
    [[1.0, 0.0], [0.0, 1.0], [0.0, 0.0]]
    """

    distribution: str
    shared: bool = True
    scale: float | None = None

    def __post_init__(self) -> None:
        if not isinstance(self.distribution, str) or self.distribution not in _DRAW:
            raise ConfigError(
                f"distribution must be one of {', '.join(map(repr, _DRAW))}; got {safe_repr(self.distribution)}"
            )
        if not isinstance(self.shared, bool):
            raise ConfigError(f"shared must be True or False; got {safe_repr(self.shared)}")
        if self.scale is None:
            return
        number = isinstance(self.scale, (int, float)) and not isinstance(self.scale, bool)
        if not number or not 1e-30 <= self.scale <= 1e30:
            raise ConfigError(f"scale must be a number from 1e-30 to 1e30, or None; got {safe_repr(self.scale)}")
        object.__setattr__(self, "scale", float(self.scale))  # the class is frozen

    @property
    def independent_of_group(self) -> bool:
        """Whether all groups have the same array."""
        return self.shared

    def array(self, shape: Shape, stream: Stream) -> np.ndarray:
        """See :meth:`Source.array`."""
        if self.shared:
            whole = stream.largest or shape
            stream = dataclasses.replace(stream, group=0)
        else:
            whole = shape
        drawn = _DRAW[self.distribution](whole, stream)
        if self.scale is not None:
            drawn = drawn * self.scale
        elif self.distribution in _INDEPENDENT:
            drawn = drawn / math.sqrt(whole[0])
        return np.ascontiguousarray(drawn[tuple(map(slice, shape))], np.float32)


def _normal(shape: Shape, stream: Stream) -> np.ndarray:
    drawn = rng.normals(stream.seed, stream.group, stream.purpose, 0, math.prod(shape))
    return drawn.astype(np.float64).reshape(shape)


def _uniform(shape: Shape, stream: Stream) -> np.ndarray:
    words = rng.words(stream.seed, stream.group, stream.purpose, 0, math.prod(shape))
    # The middle of each of 2**32 intervals of [-√3, √3], whose variance is 1.
    return ((words.astype(np.float64) + 0.5) * 2.0**-31 - 1.0).reshape(shape) * math.sqrt(3.0)


def _signs(shape: Shape, stream: Stream) -> np.ndarray:
    words = rng.words(stream.seed, stream.group, stream.purpose, 0, math.prod(shape))
    return np.where(words >> 31, -1.0, 1.0).reshape(shape)


def _orthonormal(shape: Shape, stream: Stream) -> np.ndarray:
    matrix = _normal(shape, stream).reshape(-1, shape[-1])
    wide = matrix.shape[0] < matrix.shape[1]
    q, r = np.linalg.qr(matrix.T if wide else matrix)
    q = q * np.where(np.diagonal(r) < 0.0, -1.0, 1.0)
    return (q.T if wide else q).reshape(shape)


def _one_hot(shape: Shape, stream: Stream) -> np.ndarray:
    columns = shape[-1]
    rows = math.prod(shape) // columns
    words = rng.words(stream.seed, stream.group, stream.purpose, 0, rows * -(-columns // rows))
    # Each block of so many columns as there are rows takes the rows in the order of its words.
    order = np.argsort(words.reshape(-1, rows), axis=1, kind="stable").reshape(-1)[:columns]
    found = np.zeros((rows, columns))
    found[order, np.arange(columns)] = 1.0
    return found.reshape(shape)


def _eye(shape: Shape, stream: Stream) -> np.ndarray:
    return np.eye(math.prod(shape) // shape[-1], shape[-1]).reshape(shape)


_DRAW: dict[str, Callable[[Shape, Stream], np.ndarray]] = {
    "normal": _normal,
    "uniform": _uniform,
    "signs": _signs,
    "orthonormal": _orthonormal,
    "one-hot": _one_hot,
    "eye": _eye,
}
_INDEPENDENT = ("normal", "uniform", "signs")
