"""PEFT's SHiRA, FourierFT, WaveFT, C3A and MiSS: a few trained values at some positions of a matrix.

All weights share one config, whose map has a single number of values. If the numbers differ, the shorter vectors get
zeros at further positions of the same permutation. Positions that no seed gives are listed in the config, as far as it
can hold them.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

from tnadapt.algebra import maps
from tnadapt.algebra.config import MAX_ALPHA, MIN_ALPHA, Config
from tnadapt.algebra.maps import Recipe, Scatter, TorchScatter
from tnadapt.algebra.torch_streams import DEFAULT_SEED, permutation_head
from tnadapt.backends import load_backend
from tnadapt.checkpoints.adapter_file import AdapterFile
from tnadapt.errors import ConfigError, FileError, safe_repr
from tnadapt.targets.target import Target

from ._file_format import EncodedAdapter
from ._peft_content import OwnStructure, PeftContent, PeftMethod, dense_updates, group_of
from ._peft_settings import integer_of, number_of
from ._updates import Float, Module

Ints = NDArray[np.int64]

# -- One vector for each weight, to which a map is applied -------------------------------------------------------------


#: A module's tensor, and the settings.
Encoded = tuple[Float, dict[str, object]]


class PeftVectors(PeftMethod):
    """Base class of methods with one trained tensor for each weight, the vector to which a map is applied."""

    def write(self, modules: Sequence[Module], file: AdapterFile) -> EncodedAdapter:
        """Encode the vectors."""
        self.require_one_weight_per_group(file)
        config, tensors, settings = file.config, dict[str, Float](), dict[str, object]()
        for module in modules:
            group = group_of(file.plan, module)
            if config.on != "weight" or list(group.network.shapes) != ["split0.dense"] or group.frozen_names:
                self.refuse(
                    "it needs one trained vector for each weight, order=1 and format='dense', and a map with "
                    f"on='weight', as presets.{self.preset} has them"
                )
            vector: Float = file.arrays[group.names["split0.dense"]].astype(np.float64).reshape(-1)
            tensor, settings = self.encode_vector(module, vector, group.network.scale, config.projection)
            tensors[self.name_of(module, self.tensors[0])] = tensor
        return EncodedAdapter(tensors, config=settings)

    def encode_vector(self, module: Module, vector: Float, scale: float, projection: Recipe) -> Encoded:
        """Return a module's tensor, and the settings; raise ConfigError for the map of another method."""
        raise NotImplementedError


def few_values(targets: Sequence[Target], values: Sequence[Float], recipe: Recipe, scale: float = 1.0) -> OwnStructure:
    """Return one vector per weight, to which a map is applied."""
    alpha, factor = (scale, 1.0) if MIN_ALPHA <= scale <= MAX_ALPHA else (None, scale)
    config = Config(order=1, format="dense", rank=1, projection=recipe, on="weight", alpha=alpha)
    arrays = {f"group{number}.split0.dense": array.reshape(-1) * factor for number, array in enumerate(values)}
    return OwnStructure(targets, config, arrays)


def padded(values: Float, size: int) -> Float:
    """Return values with zeros at the end."""
    return np.pad(values, (0, size - values.size))


# -- SHiRA: some elements of each weight, at positions that are stored -------------------------------------------------


class PeftShira(PeftMethod):
    """``r (rows + cols)`` trained elements per weight."""

    preset = "shira"
    tensors = ("shira_weight", "shira_indices")
    integers = ("shira_indices",)
    fields = ("r", "mask_type", "random_seed", "init_weights")

    def read(self, content: PeftContent) -> OwnStructure:
        """Read the values, with their positions as the seed that gives them, or a list."""
        rank, targets, places, values = content.rank(32), list[Target](), list[Ints](), list[Float]()
        for path in content.modules:
            elements, indices = content.tensor(path, "shira_weight", 1), content.tensor(path, "shira_indices", 2)
            sides, rest = divmod(elements.size, rank)
            if indices.shape != (2, elements.size) or rest:
                raise content.misfit(path, f"shira_weight must have r (rows + cols) elements, r = {rank}, and "
                                     "shira_indices a row and a column for each")  # fmt: skip
            why = f"rows and columns must sum to {sides}"
            target = content.target_from_base(path, sides, lambda rows, cols, size: rows + cols == size, why)
            if (indices < 0).any() or (indices >= np.array(target.shape)[:, None]).any():
                raise content.misfit(path, f"shira_indices has a position outside the {target.shape} elements")
            flat = indices[0] * target.shape[1] + indices[1]
            if len(np.unique(flat)) < len(flat):
                raise content.misfit(path, "shira_indices has a position twice")
            targets.append(target)
            places.append(flat)
            values.append(elements)
        seed = content.seed("random_seed", DEFAULT_SEED)
        return _seeded(targets, places, values, seed) or _listed(targets, places, values)

    def write(self, modules: Sequence[Module], file: AdapterFile) -> EncodedAdapter:
        """Encode the values with their positions, and zeros at further ones up to ``r (rows + cols)``."""
        elements = [self._elements(module, file) for module in modules]
        rank = max(-(-len(places) // sum(module.shape)) for module, (places, _) in zip(modules, elements, strict=True))
        tensors, indices = dict[str, Float](), dict[str, NDArray[np.int32]]()
        for module, (places, values) in zip(modules, elements, strict=True):
            rows, cols = module.shape
            size = rank * (rows + cols)
            if size > rows * cols:
                self.refuse(
                    f"PEFT trains r (rows + cols) elements of each weight, r = {rank} here, and {module.path} has fewer"
                )
            free = np.setdiff1d(np.arange(rows * cols), places)[: size - len(places)]
            whole = np.concatenate([places, free])
            order = np.argsort(whole)  # as PEFT lists them
            tensors[self.name_of(module, "shira_weight")] = padded(values, size)[order]
            indices[self.name_of(module, "shira_indices")] = np.stack(np.divmod(whole[order], cols)).astype(np.int32)
        return EncodedAdapter(tensors, config={"r": rank, "mask_type": "random"}, integers=indices)

    def _elements(self, module: Module, file: AdapterFile) -> tuple[Ints, Float]:
        """Return the positions in a weight, and the scaled values there."""
        config, plan = file.config, file.plan
        if not isinstance(config.projection, (Scatter, TorchScatter)) or config.before is not None or config.terms > 1:
            self.refuse("it needs projection=maps.Scatter(…) alone, as presets.shira has it")
        (piece, *more) = plan.layout.of_weight(module.targets[0][0])
        group = plan.groups[piece.group]
        if more or list(group.network.shapes) != ["split0.dense"] or group.frozen_names:
            self.refuse("it needs one trained vector, order=1 and format='dense', as presets.shira has it")
        # F of the numbers 1, 2, … shows the position of each value.
        numbers = np.arange(1.0, group.projection.n_in + 1)
        which = np.asarray(group.projection.map.slice(
            load_backend("numpy"), numbers, piece.group_start, piece.group_start + piece.length
        )).astype(np.int64)  # fmt: skip
        places = np.flatnonzero(which)
        vector = file.arrays[group.names["split0.dense"]].astype(np.float64).reshape(-1) * group.network.scale
        return places, vector[which[places] - 1]


def _seeded(
    targets: Sequence[Target], places: Sequence[Ints], values: Sequence[Float], seed: int
) -> OwnStructure | None:
    """Return the values in the order in which torch draws their positions, or None if it does not draw these."""
    most, arrays = max(array.size for array in values), []
    for target, flat, weight_values in zip(targets, places, values, strict=True):
        length = math.prod(target.shape)
        if most > length:
            return None
        drawn = permutation_head(length, weight_values.size, seed)
        order = np.argsort(flat)
        if not np.array_equal(flat[order], np.sort(drawn)):
            return None
        arrays.append(padded(weight_values[order][np.argsort(np.argsort(drawn))], most))
    return few_values(targets, arrays, TorchScatter(most, seed))


def _listed(targets: Sequence[Target], places: Sequence[Ints], values: Sequence[Float]) -> OwnStructure:
    """Return the values with a list of their positions in the long vector, or dense updates if it is too long."""
    starts = np.cumsum([0, *(math.prod(target.shape) for target in targets)])
    flat = np.concatenate([flat + start for flat, start in zip(places, starts, strict=False)])
    try:
        scatter = Scatter(positions=tuple(flat.tolist()))
        config = Config(groups=1, order=1, fold="hypercube", format="dense", rank=1, projection=scatter)
    except ConfigError:
        vector = np.zeros(starts[-1])
        vector[flat] = np.concatenate(values)
        deltas = [
            part.reshape(target.shape) for part, target in zip(np.split(vector, starts[1:-1]), targets, strict=True)
        ]
        return dense_updates(targets, deltas, f"no seed gives its {flat.size} positions, and a config cannot list them")
    return OwnStructure(targets, config, {"group0.split0.dense": np.concatenate(values)})


# -- FourierFT and WaveFT: a few entries of a transformed matrix, at positions given by a torch seed -------------------

# PEFT's WaveFT has a coefficient matrix of the weight's own size, which it puts into the middle of the one that the
# filters need, and it interchanges two quarters
# (``test_convention_waveft_interchanges_two_quarters_of_the_coefficients``).


_SEED = 777

Steps = tuple[str | maps.MapSettings, ...]


class PeftSpectrum(PeftVectors):
    """Base class of methods that transform a matrix with n trained entries at random positions.

    Attributes
    ----------
    scaling : float
        PEFT's default of the setting.
    """

    fields: tuple[str, ...] = ("n_frequency", "n_frequency_pattern", "scaling", "random_loc_seed", "init_weights")
    may_transpose = True
    scaling: float

    def read(self, content: PeftContent) -> OwnStructure:
        """Read the entries as a vector, and their positions as the map that draws them."""
        values = [content.tensor(path, self.tensors[0], 1) for path in content.modules]
        most = max(array.size for array in values)
        why = f"it has {most} values, as a config has one number of them"
        targets = [
            content.target_from_base(path, most, lambda rows, cols, size: rows * cols >= size, why)
            for path in content.modules
        ]
        scale = number_of("scaling", content.config.get("scaling", self.scaling))
        recipe = (TorchScatter(most, content.seed("random_loc_seed", _SEED)), *self.transform(content))
        return few_values(targets, [padded(array, most) for array in values], recipe, scale)

    def transform(self, content: PeftContent) -> Steps:
        """Return the steps of the map after the scattering of the entries."""
        raise NotImplementedError


class PeftFourierFT(PeftSpectrum):
    """``ΔW = scaling Re(ifft2(E))``, E with n trained entries."""

    preset = "fourierft"
    tensors = ("fourierft_spectrum",)
    scaling = 150.0

    def transform(self, content: PeftContent) -> tuple[str]:
        """Return the Fourier transform."""
        return ("dft2",)

    def encode_vector(self, module: Module, vector: Float, scale: float, projection: Recipe) -> Encoded:
        """Return the entries, if a seed gives their positions."""
        steps = projection if isinstance(projection, tuple) else (projection,)
        if len(steps) != 2 or steps[1] != "dft2" or not isinstance(steps[0], (Scatter, TorchScatter)):
            self.refuse("it needs projection=[maps.Scatter(…), 'dft2'], as presets.fourierft has it")
        seed = steps[0].seed if isinstance(steps[0], TorchScatter) else _SEED
        if isinstance(steps[0], Scatter):
            places = steps[0].positions
            if places is None or permutation_head(math.prod(module.shape), len(places), seed).tolist() != list(places):
                self.refuse(
                    "PEFT draws the positions from a seed of torch's, which is not what these are: train with "
                    f"maps.TorchScatter(size, seed={_SEED})"
                )
        return vector, {"n_frequency": vector.size, "scaling": scale, "random_loc_seed": seed}


class PeftWaveFT(PeftSpectrum):
    """``ΔW = scaling`` times the inverse wavelet transform of n trained coefficients."""

    preset = "waveft"
    tensors = ("waveft_spectrum",)
    fields = (*PeftSpectrum.fields, "wavelet_family", "use_idwt", "proportional_parameters")
    scaling = 25.0

    def transform(self, content: PeftContent) -> tuple[maps.CenteredWavelet, ...]:
        """Return the wavelet transform, unless PEFT leaves it out."""
        if not content.config.get("use_idwt", True):
            return ()
        family = content.config.get("wavelet_family", "db1")
        try:
            return (maps.CenteredWavelet("haar" if family == "db1" else family),)
        except ConfigError:
            raise FileError(
                f"wavelet_family={safe_repr(family)} cannot be converted: only db1 to db10 can be; merge the adapter "
                "with PEFT, and extract one from the merged weights"
            ) from None

    def encode_vector(self, module: Module, vector: Float, scale: float, projection: Recipe) -> Encoded:
        """Return the coefficients, if a seed of torch's gives their positions."""
        steps = projection if isinstance(projection, tuple) else (projection,)
        scatter, wavelet = steps[0], maps.CenteredWavelet() if steps[-1] == "centered-wavelet" else steps[-1]
        if len(steps) != 2 or not isinstance(scatter, TorchScatter) or not isinstance(wavelet, maps.CenteredWavelet):
            self.refuse(
                "PEFT draws the positions from a seed of torch's, and places the coefficients otherwise than "
                "presets.waveft: it needs projection=[maps.TorchScatter(size, seed), maps.CenteredWavelet(family)]"
            )
        family = "db1" if wavelet.family == "haar" else wavelet.family
        settings = {"scaling": scale, "random_loc_seed": scatter.seed, "wavelet_family": family}
        return vector, {**settings, "n_frequency": vector.size, "use_idwt": True}


# -- C3A: circulant blocks, with one kernel for each block -------------------------------------------------------------


class PeftC3a(PeftVectors):
    """``ΔW[m b + s, n b + t] = w[m, n, (t - s) mod b] / cols``."""

    preset = "c3a"
    tensors = ("c3a_kernel",)
    fields = ("block_size", "block_size_pattern", "init_weights")

    def read(self, content: PeftContent) -> OwnStructure:
        """Read the kernels as one vector per weight."""
        kernels = [content.tensor(path, "c3a_kernel", 3) for path in content.modules]
        targets = [
            content.target(path, (kernel.shape[0] * kernel.shape[2], kernel.shape[1] * kernel.shape[2]))
            for path, kernel in zip(content.modules, kernels, strict=True)
        ]
        blocks = {kernel.shape[2] for kernel in kernels}
        if len(blocks) == 1:
            return few_values(targets, kernels, maps.Circulant(blocks.pop(), average=True))
        deltas = [_circulant(kernel) / target.shape[1] for target, kernel in zip(targets, kernels, strict=True)]
        return dense_updates(targets, deltas, f"a config has one size of block, and there are {sorted(blocks)}")

    def encode_vector(self, module: Module, vector: Float, scale: float, projection: Recipe) -> Encoded:
        """Return the kernels."""
        if not isinstance(projection, maps.Circulant):
            self.refuse("it needs projection=maps.Circulant(…) alone, as presets.c3a has it")
        size, (rows, cols) = projection.block, module.shape
        kernel = scale * vector.reshape(rows // size, cols // size, size)
        return kernel if projection.average else kernel * cols, {"block_size": size}


def _circulant(kernel: Float) -> Float:
    """Return the matrix of the blocks of kernels (m, n, b)."""
    rows, cols, size = kernel.shape
    shifts = (np.arange(size) - np.arange(size)[:, None]) % size
    blocks: Float = kernel[:, :, shifts].swapaxes(1, 2)
    return blocks.reshape(rows * size, cols * size)


# -- MiSS: one narrow matrix, repeated over the columns of a weight (with "mini" over its rows) ------------------------


class PeftMiss(PeftVectors):
    """``ΔW[i, j] = D[j mod r, i]``."""

    preset = "miss"
    tensors = ("miss_block",)
    fields = ("r", "mini_r", "miss_dropout", "init_weights")

    def read(self, content: PeftContent) -> OwnStructure:
        """Read the matrix, transposed."""
        start = content.config.get("init_weights", True)
        if start == "bat":
            raise FileError(
                "init_weights='bat' cannot be converted: its update depends on the weight, W D + D; merge the adapter "
                "with PEFT, and extract one from the merged weights"
            )
        rank = content.rank(64)
        mini = integer_of("mini_r", content.config.get("mini_r", 1)) if start == "mini" else None
        values, targets = [], []

        def fits(rows: int, cols: int, height: int) -> bool:
            return rank <= cols and (rows == height if mini is None else rows % height == 0)

        for path in content.modules:
            block = content.tensor(path, "miss_block", 2)
            height = block.shape[1]
            if block.shape[0] != rank or mini not in (None, height):
                raise content.misfit(path, f"miss_block must be ({rank}, {'rows' if mini is None else mini})")
            what = f"it must have {height} rows{' or a multiple' * (mini is not None)}, and {rank} columns or more"
            targets.append(content.target_from_base(path, height, fits, what))
            values.append(block.T)
        return few_values(targets, values, maps.Tile(mini, rank))

    def encode_vector(self, module: Module, vector: Float, scale: float, projection: Recipe) -> Encoded:
        """Return the matrix, transposed."""
        if not isinstance(projection, maps.Tile) or projection.cols is None:
            self.refuse("it needs projection=maps.Tile(cols=…) alone, as presets.miss has it")
        rank, mini = projection.cols, projection.rows
        if mini is not None and module.shape[0] % mini:
            self.refuse(f"mini_r={mini} must divide the {module.shape[0]} rows of {module.path} there")
        settings = {} if mini is None else {"init_weights": "mini", "mini_r": mini}
        return scale * vector.reshape(-1, rank).T, {"r": rank, **settings}
