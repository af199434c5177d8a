"""PEFT's WaveFT: a few wavelet coefficients per weight, at positions that PEFT leaves to a seed of torch's.

PEFT has a matrix of coefficients of the weight's own size, which it puts into the middle of the one that the filters
need, and it interchanges two quarters (``test_convention_waveft_interchanges_two_quarters_of_the_coefficients``).
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

from tnadapt.algebra.maps import Recipe, Scatter, TorchScatter, Wavelet, make_map_on_weights
from tnadapt.algebra.torch_streams import permutation_head
from tnadapt.backends import load_backend
from tnadapt.checkpoints.adapter_file import AdapterFile
from tnadapt.errors import ConfigError, FileError, safe_repr

from ._file_format import EncodedAdapter
from ._peft_content import PeftContent
from ._peft_method import OwnStructure, PeftMethod, seed_of
from ._peft_positions import dense_updates, few_values, padded, targets_with_room, values_of
from ._peft_settings import number_of
from ._unpack import Module
from ._updates import Float

__all__ = ["PeftWaveFT"]

_SEED = 777


class PeftWaveFT(PeftMethod):
    """``ΔW = scaling`` times the inverse wavelet transform of n trained coefficients."""

    title = "WaveFT"
    tensors = ("waveft_spectrum",)
    fields = (
        "n_frequency", "n_frequency_pattern", "scaling", "random_loc_seed", "init_weights", "wavelet_family",
        "use_idwt", "proportional_parameters",
    )  # fmt: skip
    may_transpose = True

    def read(self, content: PeftContent) -> OwnStructure:
        """Read the coefficients as a vector, with their positions in :class:`tnadapt.maps.Wavelet`'s matrix."""
        content.require_modules()
        values = [content.tensor(path, "waveft_spectrum", 1) for path in content.modules]
        targets = targets_with_room(content, values)
        scale = number_of("scaling", content.config.get("scaling", 25.0))
        seed = seed_of("random_loc_seed", content.config.get("random_loc_seed"), _SEED)
        most, shapes = max(own.size for own in values), [target.shape for target in targets]
        room = all(rows * cols >= most for rows, cols in shapes)
        if not content.config.get("use_idwt", True):
            if room:
                return few_values(targets, [padded(own, most) for own in values], TorchScatter(most, seed), scale)
            plain = [_placed(own, shape, seed) * scale for own, shape in zip(values, shapes, strict=True)]
            return dense_updates(
                targets, plain, f"a config has one number of entries, and {most} are more than a weight has"
            )
        wavelet = _wavelet(content.config.get("wavelet_family", "db1"))
        why = "the weights differ in their shapes, and a config has one list of positions"
        if room and len(set(shapes)) == 1:
            try:
                places = _positions(wavelet, shapes[0], most, seed)
                scatter = Scatter(positions=tuple(places.tolist()))
                return few_values(targets, [padded(own, most) for own in values], (scatter, wavelet), scale)
            except ConfigError:
                why = f"{most} positions are more than a config may list"
        backend, deltas = load_backend("numpy"), []
        for own, shape in zip(values, shapes, strict=True):
            map_ = make_map_on_weights(wavelet, [shape])
            coefficients = np.zeros(map_.n_in)
            coefficients[_positions(wavelet, shape, own.size, seed)] = own
            deltas.append(np.asarray(map_.forward(backend, coefficients)).reshape(shape) * scale)
        return dense_updates(targets, deltas, why)

    def write(self, modules: Sequence[Module], file: AdapterFile) -> EncodedAdapter:
        """Encode the coefficients, if PEFT's default seed gives their positions."""
        tensors, settings = dict[str, Float](), dict[str, object]()
        for module in modules:
            values, scale, projection = values_of(self, module, file)
            family = self._family(projection, module)
            settings = {
                "n_frequency": values.size,
                "scaling": scale,
                "random_loc_seed": _SEED,
                "wavelet_family": family,
            }
            tensors[self.name_of(module, "waveft_spectrum")] = values
        return EncodedAdapter(tensors, config=settings)

    def _family(self, projection: Recipe, module: Module) -> str:
        steps = projection if isinstance(projection, tuple) else (projection,)
        wavelet = Wavelet() if steps[-1] == "wavelet" else steps[-1]
        scatter = steps[0]
        if len(steps) != 2 or not isinstance(scatter, Scatter) or not isinstance(wavelet, Wavelet) or wavelet.periodic:
            self.refuse("it needs projection=[maps.Scatter(…), maps.Wavelet(…)], as presets.waveft has it")
        places = scatter.positions
        if places is None or _positions(wavelet, module.shape, len(places), _SEED).tolist() != list(places):
            self.refuse(
                f"PEFT draws the positions from a seed of torch's, and those of its default, {_SEED}, are others"
            )
        return "db1" if wavelet.family == "haar" else wavelet.family


def _wavelet(family: object) -> Wavelet:
    try:
        return Wavelet("haar" if family == "db1" else family)  # type: ignore[arg-type]
    except ConfigError:
        raise FileError(
            f"wavelet_family={safe_repr(family)} cannot be converted: only db1 to db10 can be; merge the adapter with "
            "PEFT, and extract one from the merged weights"
        ) from None


def _placed(values: Float, shape: tuple[int, int], seed: int) -> Float:
    found = np.zeros(shape[0] * shape[1])
    found[permutation_head(found.size, values.size, seed)] = values
    return found.reshape(shape)


def _positions(wavelet: Wavelet, shape: tuple[int, int], count: int, seed: int) -> NDArray[np.int64]:
    """Return the positions of PEFT's coefficients in the matrix of :class:`tnadapt.maps.Wavelet`."""
    rows, cols = (wavelet.coefficients(side) for side in shape)
    place = permutation_head(shape[0] * shape[1], count, seed)
    row, col = place // shape[1] + (rows - shape[0]) // 2, place % shape[1] + (cols - shape[1]) // 2
    # PEFT's upper right quarter is high-pass along rows.
    low, left = row < rows // 2, col < cols // 2
    return np.where(left, row % (rows // 2), row % (rows // 2) + rows // 2) * cols + np.where(
        low, col % (cols // 2), col % (cols // 2) + cols // 2
    )
