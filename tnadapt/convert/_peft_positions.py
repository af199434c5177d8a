"""PEFT's SHiRA, FourierFT, WaveFT, C3A and MiSS: a few trained values at some positions of a matrix.

All weights have one config, whose map has one number of values. Where theirs differ, the shorter ones get zeros at
further positions of the same permutation. Positions that no seed gives are listed in the config, as long as it holds
them.
"""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

from tnadapt.algebra.config import Config
from tnadapt.algebra.maps import CenteredWavelet, Circulant, Recipe, Scatter, Tile, TorchScatter, make_map_on_weights
from tnadapt.algebra.torch_streams import DEFAULT_SEED, permutation_head
from tnadapt.backends import load_backend
from tnadapt.checkpoints.adapter_file import AdapterFile
from tnadapt.errors import ConfigError, FileError, safe_repr
from tnadapt.targets.target import Target

from ._file_format import EncodedAdapter
from ._peft_content import (
    OwnStructure,
    PeftContent,
    PeftMethod,
    rank_of,
    scaled_config,
    seed_of,
)
from ._peft_settings import integer_of, number_of
from ._updates import Float, Module, ModuleUpdate

__all__ = ["PeftC3a", "PeftFourierFT", "PeftMiss", "PeftShira", "PeftWaveFT"]


# -- Settings and names in common --------------------------------------------------------------------------------------


def few_values(targets: Sequence[Target], values: Sequence[Float], projection: Recipe, scale: float) -> OwnStructure:
    """Return one vector per weight, to which a map is applied."""

    def config_of(alpha: float | None) -> Config:
        return Config(order=1, format="dense", rank=1, projection=projection, on="weight", alpha=alpha)

    config, factor = scaled_config(scale, config_of)
    arrays = {f"group{number}.split0.dense": array.reshape(-1) * factor for number, array in enumerate(values)}
    return OwnStructure(targets, config, arrays)


def dense_updates(targets: Sequence[Target], deltas: Sequence[Float], why: str) -> OwnStructure:
    """Return the updates themselves, exact but large, with a note."""
    updates = [ModuleUpdate("dense", target.shape, (delta,)) for target, delta in zip(targets, deltas, strict=True)]
    return OwnStructure(targets, updates=updates, notes=(f"stored dense: {why}",))


def targets_with_room(content: PeftContent, values: Sequence[Float]) -> list[Target]:
    """Return the target of each module, which must have as many elements as there are values."""
    return [
        content.target_from_base(path, functools.partial(_has_room, array.size), f"it has {array.size} values")
        for path, array in zip(content.modules, values, strict=True)
    ]


def _has_room(count: int, rows: int, cols: int) -> bool:
    return rows * cols >= count


def padded(values: Float, size: int) -> Float:
    """Return values with zeros at the end."""
    return np.pad(values, (0, size - values.size))


def values_of(method: PeftMethod, module: Module, file: AdapterFile) -> tuple[Float, float, Recipe]:
    """Return the values of a weight, their scale and the map; raise ConfigError if the config has another structure."""
    config, plan = file.config, file.plan
    method.require_one_weight_per_group(file)
    group = plan.groups[plan.layout.of_weight(module.targets[0][0])[0].group]
    if config.on != "weight" or list(group.network.shapes) != ["split0.dense"] or group.frozen_names:
        method.refuse(
            "it needs one trained vector for each weight, order=1 and format='dense', and a map with on='weight', as "
            f"presets.{method.preset} has them"
        )
    vector: Float = file.arrays[group.names["split0.dense"]].astype(np.float64).reshape(-1)
    return vector, group.network.scale, config.projection


# -- SHiRA: some elements of each weight, at positions that are stored -------------------------------------------------


class PeftShira(PeftMethod):
    """``r (rows + cols)`` trained elements per weight."""

    preset = "shira"
    tensors = ("shira_weight", "shira_indices")
    integers = ("shira_indices",)
    fields = ("r", "mask_type", "random_seed", "init_weights")

    def read(self, content: PeftContent) -> OwnStructure:
        """Read the values, with their positions as the seed that gives them, or a list."""
        content.require_modules()
        rank, targets, places, values = rank_of(content, 32), list[Target](), list[NDArray[np.int64]](), list[Float]()
        for path in content.modules:
            elements, indices = content.tensor(path, "shira_weight", 1), content.tensor(path, "shira_indices", 2)
            sides, rest = divmod(elements.size, rank)
            if indices.shape != (2, elements.size) or rest:
                raise content.misfit(path, f"shira_weight must have r (rows + cols) elements, r = {rank}, and "
                                     "shira_indices a row and a column for each")  # fmt: skip
            target = content.target_from_base(
                path, functools.partial(_have_sum, sides), f"rows and columns must sum to {sides}"
            )
            if (indices < 0).any() or (indices >= np.array(target.shape)[:, None]).any():
                raise content.misfit(path, f"shira_indices has a position outside the {target.shape} elements")
            flat = indices[0] * target.shape[1] + indices[1]
            if len(np.unique(flat)) < len(flat):
                raise content.misfit(path, "shira_indices has a position twice")
            targets.append(target)
            places.append(flat)
            values.append(elements)
        seed = seed_of("random_seed", content.config.get("random_seed"), DEFAULT_SEED)
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

    def _elements(self, module: Module, file: AdapterFile) -> tuple[NDArray[np.int64], Float]:
        """Return the positions in a weight, and the scaled values there."""
        config, plan = file.config, file.plan
        if not isinstance(config.projection, (Scatter, TorchScatter)) or config.before is not None or config.terms > 1:
            self.refuse("it needs projection=maps.Scatter(…) alone, as presets.shira has it")
        (piece, *more) = plan.layout.of_weight(module.targets[0][0])
        group = plan.groups[piece.group]
        if more or list(group.network.shapes) != ["split0.dense"] or group.frozen_names:
            self.refuse("it needs one trained vector, order=1 and format='dense', as presets.shira has it")
        # F of the numbers 1, 2, … tells which of the values is where.
        numbers = np.arange(1.0, group.projection.n_in + 1)
        which = np.asarray(group.projection.map.slice(
            load_backend("numpy"), numbers, piece.group_start, piece.group_start + piece.length
        )).astype(np.int64)  # fmt: skip
        places = np.flatnonzero(which)
        vector = file.arrays[group.names["split0.dense"]].astype(np.float64).reshape(-1) * group.network.scale
        return places, vector[which[places] - 1]


def _have_sum(total: int, rows: int, cols: int) -> bool:
    return rows + cols == total


def _seeded(
    targets: Sequence[Target], places: Sequence[NDArray[np.int64]], values: Sequence[Float], seed: int
) -> OwnStructure | None:
    """Return the values in the order in which torch draws their positions; None if it does not draw these."""
    most, arrays = max(array.size for array in values), []
    for target, flat, weight_values in zip(targets, places, values, strict=True):
        length = target.shape[0] * target.shape[1]
        if most > length:
            return None
        drawn = permutation_head(length, weight_values.size, seed)
        order = np.argsort(flat)
        if not np.array_equal(flat[order], np.sort(drawn)):
            return None
        arrays.append(padded(weight_values[order][np.argsort(np.argsort(drawn))], most))
    return few_values(targets, arrays, TorchScatter(most, seed), 1.0)


def _listed(targets: Sequence[Target], places: Sequence[NDArray[np.int64]], values: Sequence[Float]) -> OwnStructure:
    """Return the values with a list of their positions; the updates if it is too long.

    The positions are those in each weight if they are the same in all, otherwise those in the long vector.
    """
    if all(np.array_equal(flat, places[0]) for flat in places) and len({target.shape for target in targets}) == 1:
        with contextlib.suppress(ConfigError):
            return few_values(targets, values, Scatter(positions=tuple(places[0].tolist())), 1.0)
    sizes = [target.shape[0] * target.shape[1] for target in targets]
    starts = np.cumsum([0, *sizes])
    flat = np.concatenate([flat + start for flat, start in zip(places, starts, strict=False)])
    try:
        config = Config(
            groups=1,
            order=1,
            fold="hypercube",
            format="dense",
            rank=1,
            projection=Scatter(positions=tuple(flat.tolist())),
        )
    except ConfigError:
        deltas = []
        for target, weight_values, positions in zip(targets, values, places, strict=True):
            delta = np.zeros(target.shape)
            delta.reshape(-1)[positions] = weight_values
            deltas.append(delta)
        return dense_updates(targets, deltas, f"no seed gives its {flat.size} positions, and a config cannot list them")
    return OwnStructure(targets, config, {"group0.split0.dense": np.concatenate(values)})


# -- FourierFT: a few frequencies per weight, at positions left to a seed of torch's -----------------------------------


_FOURIER_SEED = 777


class PeftFourierFT(PeftMethod):
    """``ΔW = scaling Re(ifft2(E))``, E with n trained entries."""

    preset = "fourierft"
    tensors = ("fourierft_spectrum",)
    fields = ("n_frequency", "n_frequency_pattern", "scaling", "random_loc_seed", "init_weights")
    may_transpose = True

    def read(self, content: PeftContent) -> OwnStructure:
        """Read the entries as a vector, and their positions as the map that draws them."""
        content.require_modules()
        values = [content.tensor(path, "fourierft_spectrum", 1) for path in content.modules]
        targets = targets_with_room(content, values)
        scale = number_of("scaling", content.config.get("scaling", 150.0))
        seed = seed_of("random_loc_seed", content.config.get("random_loc_seed"), _FOURIER_SEED)
        most = max(array.size for array in values)
        if all(target.shape[0] * target.shape[1] >= most for target in targets):
            map_ = (TorchScatter(most, seed), "dft2")
            return few_values(targets, [padded(array, most) for array in values], map_, scale)
        deltas = []
        for target, entries in zip(targets, values, strict=True):
            spectrum = np.zeros(target.shape[0] * target.shape[1])
            spectrum[permutation_head(spectrum.size, entries.size, seed)] = entries
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
        if places is None or permutation_head(length, len(places), _FOURIER_SEED).tolist() != list(places):
            self.refuse(
                "PEFT draws the positions from a seed of torch's, which is not what these are: train with "
                f"maps.TorchScatter(size, seed={_FOURIER_SEED})"
            )
        return _FOURIER_SEED


# -- WaveFT: a few wavelet coefficients per weight, at positions left to a seed of torch's -----------------------------

# PEFT has a matrix of coefficients of the weight's own size, which it puts into the middle of the one that the filters
# need, and it interchanges two quarters (``test_convention_waveft_interchanges_two_quarters_of_the_coefficients``).


_WAVELET_SEED = 777


class PeftWaveFT(PeftMethod):
    """``ΔW = scaling`` times the inverse wavelet transform of n trained coefficients."""

    preset = "waveft"
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
        seed = seed_of("random_loc_seed", content.config.get("random_loc_seed"), _WAVELET_SEED)
        most, shapes = max(array.size for array in values), [target.shape for target in targets]
        transform = content.config.get("use_idwt", True)
        steps = (_wavelet(content.config.get("wavelet_family", "db1")),) if transform else ()
        if all(rows * cols >= most for rows, cols in shapes):
            map_: Recipe = (TorchScatter(most, seed), *steps) if steps else TorchScatter(most, seed)
            return few_values(targets, [padded(array, most) for array in values], map_, scale)
        backend, deltas = load_backend("numpy"), []
        for coefficients, shape in zip(values, shapes, strict=True):
            wavelet_map = make_map_on_weights((TorchScatter(coefficients.size, seed), *steps), [shape])
            deltas.append(np.asarray(wavelet_map.forward(backend, coefficients)).reshape(shape) * scale)
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


# -- C3A: circulant blocks, with one kernel for each block -------------------------------------------------------------


class PeftC3a(PeftMethod):
    """``ΔW[m b + s, n b + t] = w[m, n, (t - s) mod b] / cols``."""

    preset = "c3a"
    tensors = ("c3a_kernel",)
    fields = ("block_size", "block_size_pattern", "init_weights")

    def read(self, content: PeftContent) -> OwnStructure:
        """Read the kernels as one vector per weight."""
        content.require_modules()
        kernels = [content.tensor(path, "c3a_kernel", 3) for path in content.modules]
        targets = [
            content.target(path, (kernel.shape[0] * kernel.shape[2], kernel.shape[1] * kernel.shape[2]))
            for path, kernel in zip(content.modules, kernels, strict=True)
        ]
        blocks = {kernel.shape[2] for kernel in kernels}
        if len(blocks) == 1:
            return few_values(targets, kernels, Circulant(blocks.pop(), average=True), 1.0)
        deltas = [_delta(kernel) for kernel in kernels]
        return dense_updates(targets, deltas, f"a config has one size of block, and there are {sorted(blocks)}")

    def write(self, modules: Sequence[Module], file: AdapterFile) -> EncodedAdapter:
        """Encode the kernels."""
        tensors, size = dict[str, Float](), 0
        for module in modules:
            values, scale, projection = values_of(self, module, file)
            if not isinstance(projection, Circulant):
                self.refuse("it needs projection=maps.Circulant(…) alone, as presets.c3a has it")
            size, (rows, cols) = projection.block, module.shape
            kernel = scale * values.reshape(rows // size, cols // size, size)
            tensors[self.name_of(module, "c3a_kernel")] = kernel if projection.average else kernel * cols
        return EncodedAdapter(tensors, config={"block_size": size})


def _delta(kernel: Float) -> Float:
    down, across, size = kernel.shape
    place = np.arange(size)
    blocks = kernel[:, :, (place[None, :] - place[:, None]) % size]
    delta: Float = blocks.transpose(0, 2, 1, 3).reshape(down * size, across * size) / (across * size)
    return delta


# -- MiSS: one narrow matrix, repeated over the columns of a weight (with "mini" over its rows) ------------------------


class PeftMiss(PeftMethod):
    """``ΔW[i, j] = D[j mod r, i]``."""

    preset = "miss"
    tensors = ("miss_block",)
    fields = ("r", "mini_r", "miss_dropout", "init_weights")

    def read(self, content: PeftContent) -> OwnStructure:
        """Read the matrix, transposed."""
        content.require_modules()
        start = content.config.get("init_weights", True)
        if start == "bat":
            raise FileError(
                "init_weights='bat' cannot be converted: its update depends on the weight, W D + D; merge the adapter "
                "with PEFT, and extract one from the merged weights"
            )
        rank, mini = rank_of(content, 64), None
        if start == "mini":
            mini = integer_of("mini_r", content.config.get("mini_r", 1))
        values, targets = [], []
        for path in content.modules:
            block = content.tensor(path, "miss_block", 2)
            height = block.shape[1]
            if block.shape[0] != rank or mini not in (None, height):
                raise content.misfit(path, f"miss_block must be ({rank}, {'rows' if mini is None else mini})")
            fits = functools.partial(_fits, rank, height, mini is not None)
            what = f"it must have {height} rows{' or a multiple' * (mini is not None)}, and {rank} columns or more"
            targets.append(content.target_from_base(path, fits, what))
            values.append(block.T)
        return few_values(targets, values, Tile(mini, rank), 1.0)

    def write(self, modules: Sequence[Module], file: AdapterFile) -> EncodedAdapter:
        """Encode the matrix, transposed."""
        tensors, config = dict[str, Float](), dict[str, object]()
        for module in modules:
            values, scale, tile = values_of(self, module, file)
            if not isinstance(tile, Tile) or tile.cols is None:
                self.refuse("it needs projection=maps.Tile(cols=…) alone, as presets.miss has it")
            if tile.rows is not None and module.shape[0] % tile.rows:
                self.refuse(f"mini_r={tile.rows} must divide the {module.shape[0]} rows of {module.path} there")
            tensors[self.name_of(module, "miss_block")] = scale * values.reshape(-1, tile.cols).T
            config = {"r": tile.cols}
            if tile.rows is not None:
                config |= {"init_weights": "mini", "mini_r": tile.rows}
        return EncodedAdapter(tensors, config=config)


def _fits(rank: int, height: int, repeated: bool, rows: int, cols: int) -> bool:
    return rank <= cols and (rows % height == 0 if repeated else rows == height)
