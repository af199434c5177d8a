"""PEFT's WaveFT: a few wavelet coefficients per weight, at positions that PEFT leaves to a seed of torch's.

PEFT has a matrix of coefficients of the weight's own size, which it puts into the middle of the one that the filters
need, and it interchanges two quarters (``test_convention_waveft_interchanges_two_quarters_of_the_coefficients``).
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from tnadapt.algebra.maps import CenteredWavelet, Recipe, TorchScatter, make_map_on_weights
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
        """Read the coefficients as a vector, and their positions as the map that draws them."""
        content.require_modules()
        values = [content.tensor(path, "waveft_spectrum", 1) for path in content.modules]
        targets = targets_with_room(content, values)
        scale = number_of("scaling", content.config.get("scaling", 25.0))
        seed = seed_of("random_loc_seed", content.config.get("random_loc_seed"), _SEED)
        most, shapes = max(own.size for own in values), [target.shape for target in targets]
        transform = content.config.get("use_idwt", True)
        steps = (_wavelet(content.config.get("wavelet_family", "db1")),) if transform else ()
        if all(rows * cols >= most for rows, cols in shapes):
            map_: Recipe = (TorchScatter(most, seed), *steps) if steps else TorchScatter(most, seed)
            return few_values(targets, [padded(own, most) for own in values], map_, scale)
        backend, deltas = load_backend("numpy"), []
        for own, shape in zip(values, shapes, strict=True):
            made = make_map_on_weights((TorchScatter(own.size, seed), *steps), [shape])
            deltas.append(np.asarray(made.forward(backend, own)).reshape(shape) * scale)
        why = f"a config has one number of coefficients, and {most} are more than a weight has"
        return dense_updates(targets, deltas, why)

    def write(self, modules: Sequence[Module], file: AdapterFile) -> EncodedAdapter:
        """Encode the coefficients, if a seed of torch's gives their positions."""
        tensors, settings = dict[str, Float](), dict[str, object]()
        for module in modules:
            values, scale, projection = values_of(self, module, file)
            seed, family = self._seed_and_family(projection)
            settings = {"scaling": scale, "random_loc_seed": seed, "wavelet_family": family}
            settings |= {"n_frequency": values.size, "use_idwt": True}
            tensors[self.name_of(module, "waveft_spectrum")] = values
        return EncodedAdapter(tensors, config=settings)

    def _seed_and_family(self, projection: Recipe) -> tuple[int, str]:
        steps = projection if isinstance(projection, tuple) else (projection,)
        scatter, wavelet = steps[0], CenteredWavelet() if steps[-1] == "centered-wavelet" else steps[-1]
        if len(steps) != 2 or not isinstance(scatter, TorchScatter) or not isinstance(wavelet, CenteredWavelet):
            self.refuse(
                "PEFT draws the positions from a seed of torch's, and places the coefficients otherwise than "
                "presets.waveft: it needs projection=[maps.TorchScatter(size, seed), maps.CenteredWavelet(family)]"
            )
        return scatter.seed, "db1" if wavelet.family == "haar" else wavelet.family


def _wavelet(family: object) -> CenteredWavelet:
    try:
        return CenteredWavelet("haar" if family == "db1" else family)  # type: ignore[arg-type]
    except ConfigError:
        raise FileError(
            f"wavelet_family={safe_repr(family)} cannot be converted: only db1 to db10 can be; merge the adapter with "
            "PEFT, and extract one from the merged weights"
        ) from None
