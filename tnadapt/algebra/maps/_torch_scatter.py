"""Scatter at the positions that torch's generator draws: those of PEFT's FourierFT and SHiRA."""

from __future__ import annotations

import dataclasses

import numpy as np

from tnadapt.errors import ConfigError, integer

from ..folding import MAX_SIZE
from ..torch_streams import DEFAULT_SEED, permutation_head
from ._map import Space
from ._map_settings import MapSettings
from ._scatter import ScatterMap

__all__ = ["TorchScatter", "TorchScatterMap"]


@dataclasses.dataclass(frozen=True)
class TorchScatter(MapSettings):
    """Values at the first ``size`` positions of ``torch.randperm(n)``, n the length of the output; zero elsewhere.

    PEFT leaves the positions of FourierFT and SHiRA to a torch seed. With this map, such an adapter is the trained
    values and this seed, for weights of any shapes. The positions are drawn without torch, and depend on neither the
    config's seed nor the group. For new adapters, use :class:`Scatter`.

    Parameters
    ----------
    size : int
        Number of values.
    seed : int
        Of ``torch.Generator().manual_seed(seed)``; by default that of a generator that nobody has seeded.

    Raises
    ------
    ConfigError
        If one of them is not an integer in its range.

    Examples
    --------
    >>> import numpy as np, tnadapt as tna
    >>> f = tna.Projection(tna.maps.TorchScatter(size=2, seed=777), n_out=6)
    >>> f(np.array([1.0, 2.0]))  # torch.randperm(6, generator=torch.Generator().manual_seed(777))[:2] is [5, 0]
    array([2., 0., 0., 0., 0., 1.])
    """

    size: int
    seed: int = DEFAULT_SEED

    def __post_init__(self) -> None:
        object.__setattr__(self, "size", integer("TorchScatter's size", self.size, 1, MAX_SIZE, ConfigError))
        seed = integer("TorchScatter's seed", self.seed, -(1 << 63), (1 << 64) - 1, ConfigError)
        object.__setattr__(self, "seed", seed)
        super().__post_init__()


class TorchScatterMap(ScatterMap):
    """``y[positions[i]] = x[i]``, and 0 elsewhere."""

    kind = "torch-scatter"
    settings_class = TorchScatter  # type: ignore[assignment]
    settings: TorchScatter  # type: ignore[assignment]

    @classmethod
    def fixes_length(cls, settings: TorchScatter) -> bool:  # type: ignore[override]
        return True

    @classmethod
    def domain(cls, codomain: Space, settings: TorchScatter) -> Space:  # type: ignore[override]
        if settings.size > codomain.length:
            raise ConfigError(
                f"TorchScatter has size={settings.size}, more positions than places: its output has {codomain.length} "
                f"elements; give a size of at most {codomain.length}"
            )
        return Space(settings.size)

    @property
    def samples(self) -> bool:
        return True

    @property
    def _invertible(self) -> bool:
        return False

    def make(self, key: object) -> np.ndarray:
        if key == "positions":
            return permutation_head(self.n_out, self.n_in, self.settings.seed)
        return super().make(key)
