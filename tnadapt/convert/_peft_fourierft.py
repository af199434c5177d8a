"""PEFT's FourierFT: a few frequencies per weight, at positions that PEFT leaves to a seed of torch's."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from tnadapt.algebra.maps import Recipe, Scatter, TorchScatter
from tnadapt.algebra.torch_streams import permutation_head
from tnadapt.checkpoints.adapter_file import AdapterFile

from ._file_format import EncodedAdapter
from ._peft_content import PeftContent
from ._peft_method import OwnStructure, PeftMethod, seed_of
from ._peft_positions import dense_updates, few_values, padded, targets_with_room, values_of
from ._peft_settings import number_of
from ._unpack import Module
from ._updates import Float

__all__ = ["PeftFourierFT"]

_SEED = 777


class PeftFourierFT(PeftMethod):
    """``ΔW = scaling Re(ifft2(E))``, E with n trained entries."""

    title = "FourierFT"
    tensors = ("fourierft_spectrum",)
    fields = ("n_frequency", "n_frequency_pattern", "scaling", "random_loc_seed", "init_weights")
    may_transpose = True

    def read(self, content: PeftContent) -> OwnStructure:
        """Read the entries as a vector, and their positions as the map that draws them."""
        content.require_modules()
        values = [content.tensor(path, "fourierft_spectrum", 1) for path in content.modules]
        targets = targets_with_room(content, values)
        scale = number_of("scaling", content.config.get("scaling", 150.0))
        seed = seed_of("random_loc_seed", content.config.get("random_loc_seed"), _SEED)
        most = max(own.size for own in values)
        if all(target.shape[0] * target.shape[1] >= most for target in targets):
            map_ = (TorchScatter(most, seed), "dft2")
            return few_values(targets, [padded(own, most) for own in values], map_, scale)
        deltas = []
        for target, own in zip(targets, values, strict=True):
            spectrum = np.zeros(target.shape[0] * target.shape[1])
            spectrum[permutation_head(spectrum.size, own.size, seed)] = own
            deltas.append(np.asarray(np.fft.ifft2(spectrum.reshape(target.shape)).real * scale))
        return dense_updates(
            targets, deltas, f"a config has one number of entries, and {most} are more than a weight has"
        )

    def write(self, modules: Sequence[Module], file: AdapterFile) -> EncodedAdapter:
        """Encode the entries, if a seed gives their positions."""
        tensors, settings = dict[str, Float](), dict[str, object]()
        for module in modules:
            values, scale, projection = values_of(self, module, file)
            seed = self._seed(projection, module)
            settings = {"n_frequency": values.size, "scaling": scale, "random_loc_seed": seed}
            tensors[self.name_of(module, "fourierft_spectrum")] = values
        return EncodedAdapter(tensors, config=settings)

    def _seed(self, projection: Recipe, module: Module) -> int:
        """Return the seed of torch's that gives the positions."""
        steps = projection if isinstance(projection, tuple) else (projection,)
        if len(steps) != 2 or steps[1] != "dft2" or not isinstance(steps[0], (Scatter, TorchScatter)):
            self.refuse("it needs projection=[maps.Scatter(…), 'dft2'], as presets.fourierft has it")
        scatter = steps[0]
        if isinstance(scatter, TorchScatter):
            return scatter.seed
        length = module.shape[0] * module.shape[1]
        places = scatter.positions
        if places is None or permutation_head(length, len(places), _SEED).tolist() != list(places):
            self.refuse(
                "PEFT draws the positions from a seed of torch's, which is not what these are: train with "
                f"maps.TorchScatter(size, seed={_SEED})"
            )
        return _SEED
