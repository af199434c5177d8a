"""Contracts: the tests that every format, map, source and backend passes, as classes to inherit.

``class TestMine(FormatContract): kind = Mine`` runs them all; the pages on extending tnadapt and on backends have
examples.
"""

from __future__ import annotations

import copy
import importlib.util
import itertools
import json
import math
import os
import re
import tempfile
import unittest.mock
from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np
import pytest
from safetensors.numpy import save_file

import tnadapt as tna
from tnadapt.algebra.config import Config
from tnadapt.algebra.folding import Cut
from tnadapt.algebra.formats import FORMATS, jacobian_rank
from tnadapt.algebra.maps import Dft2, Linear, LinearV2, Map, MapSettings, Shuffle, Space
from tnadapt.algebra.maps.fastfood import fwht_plain
from tnadapt.algebra.sources import Multiplied, Source, Stream, Tied, source_from_dict, source_to_dict
from tnadapt.algebra.update_plan import UpdatePlan
from tnadapt.backends import FLOAT_DTYPES, OPTIONAL, Array, Backend, FixedArrays, get_backend, load_backend
from tnadapt.convert import FORMS
from tnadapt.errors import BackendError, ConfigError

from . import _reference as reference

# -- Formats -----------------------------------------------------------------------------------------------------------

# Options that other libraries' file formats need besides the adapter; llama.cpp also needs a base.
_WRITTEN: dict[str, dict[str, Any]] = {
    "peft": {}, "vllm": {}, "lycoris": {}, "kohya": {"part": "lora_unet"}, "diffusers": {"part": "unet"}, "gguf": {},
}  # fmt: skip
_LLAMA = {"model_type": "llama", "num_hidden_layers": 2, "num_attention_heads": 2}
_WEIGHTS = {f"model.layers.{layer}.self_attn.v_proj": (24, 20) for layer in (0, 1)}
# The rounding error of float32 in two factors and a sum of a few of their products.
_ROUNDING = 1e-5
_NUMPY = load_backend("numpy")


def _whole(split: Any, arrays: dict[str, np.ndarray]) -> np.ndarray:
    """Return the tensor of a format."""
    return np.asarray(split.tensor(_NUMPY, arrays, [(0, size) for size in split.sizes]))


class FormatContract:
    """The tests of every format. Inherit from it and set ``kind``.

    Attributes
    ----------
    kind : type of Format
        The format under test; called as ``kind(sizes, rank)``.

    Examples
    --------
    >>> from tnadapt.algebra.formats import FORMATS
    >>> class TestCP(FormatContract):
    ...     kind = FORMATS["cp"]
    >>> TestCP().test_counts()
    """

    kind: Any
    sizes = ((5,), (4, 3), (2, 3, 4), (3, 1, 2, 3))
    ranks = (1, 2, 5)

    def _each(self) -> Any:
        for sizes, rank in itertools.product(self.sizes, self.ranks):
            split = self.kind(sizes, rank)
            rng = np.random.default_rng(0)
            yield split, {name: rng.normal(size=shape) for name, shape in split.shapes.items()}

    def test_counts(self) -> None:
        for split, arrays in self._each():
            assert split.num_parameters == sum(array.size for array in arrays.values())
            assert split.zero in split.shapes
            assert split.ones <= split.shapes.keys()

    def test_a_box_is_the_whole_cut(self) -> None:
        for split, arrays in self._each():
            whole = _whole(split, arrays)
            assert whole.shape == split.sizes
            for box in itertools.product(*([(0, d), (0, 1), (d - 1, d), (d // 2, d)] for d in split.sizes)):
                part = split.tensor(_NUMPY, arrays, box)
                cut = whole[tuple(slice(lo, hi) for lo, hi in box)]
                np.testing.assert_allclose(part, cut, rtol=1e-12, atol=1e-12)

    def test_an_unfolding_is_the_product_of_its_halves(self) -> None:
        for split, arrays in self._each():
            whole = _whole(split, arrays)
            for modes in range(1, len(split.sizes)):
                inner = split.inner(modes)
                name = type(split).__name__
                if not self.kind.unfolds:
                    assert inner is None, f"{name}.inner returned {inner}, but unfolds is False: remove that line"
                    continue
                assert inner is not None, f"{name}.inner returned None: implement it, or set unfolds = False"
                height, width = math.prod(split.sizes[:modes]), math.prod(split.sizes[modes:])
                expected = whole.reshape(height, width)
                for rows, cols in itertools.product(*(([0, n], [n - 1, n], [n // 3, n]) for n in (height, width))):
                    start = rows[0] * width + cols[0]
                    left, right = split.unfolded(_NUMPY, arrays, Cut(modes, tuple(rows), tuple(cols), start))
                    assert left.shape == (rows[1] - rows[0], inner)
                    assert right.shape == (inner, cols[1] - cols[0])
                    part = expected[slice(*rows), slice(*cols)]
                    np.testing.assert_allclose(left @ right, part, rtol=1e-12, atol=1e-12)

    def test_the_tensor_is_the_einsum_of_the_formula(self) -> None:
        for split, arrays in self._each():
            expected = np.einsum(split.formula, *arrays.values(), optimize=True)
            np.testing.assert_allclose(_whole(split, arrays), expected, rtol=1e-12, atol=1e-12)

    def test_the_factors_of_a_matrix_make_it(self) -> None:
        for sizes, rank in itertools.product(((9, 8), (8, 9), (4, 3)), self.ranks):
            split, rng = self.kind(sizes, rank), np.random.default_rng(0)
            arrays = {name: rng.normal(size=shape) for name, shape in split.shapes.items()}
            factors = split.factors(_NUMPY, arrays)
            if factors is None:
                assert split.rank_of_legs(((sizes[0], 1), (1, sizes[1]))) == min(sizes)
            else:
                np.testing.assert_allclose(factors[0] @ factors[1], _whole(split, arrays), rtol=1e-12, atol=1e-12)

    def test_ranks_of_unfoldings_are_limited_as_it_says(self) -> None:
        for split, arrays in self._each():
            order = len(split.sizes)
            whole = _whole(split, arrays)
            for size in range(1, order):
                for modes in itertools.combinations(range(order), size):
                    turned = np.transpose(whole, [*modes, *(m for m in range(order) if m not in modes)])
                    matrix = turned.reshape(math.prod(split.sizes[m] for m in modes), -1)
                    assert np.linalg.matrix_rank(matrix, rtol=1e-10) <= split.unfolding_rank(modes)
            for modes, rank in split.bounded_unfoldings():
                assert rank >= split.unfolding_rank(modes)
            known = split.matrix_rank() if order == 2 else None
            if known is not None:
                assert np.linalg.matrix_rank(whole, rtol=1e-10) == known

    def test_degrees_of_freedom_are_never_too_few(self) -> None:
        for split, _ in self._each():
            for times in (1, 2):
                counted = jacobian_rank(split, times)
                assert counted is not None
                assert counted <= split.freedom(split.sizes, times) <= math.prod(split.sizes)

    def test_no_rank_beyond_the_useful_one_makes_more(self) -> None:
        for split, _ in self._each():
            useful = split.useful_rank()
            if useful is not None and split.rank_given == self.ranks[-1]:
                assert useful >= 1
                most = self.kind(split.sizes, min(useful, 12))
                more = self.kind(split.sizes, min(useful, 12) + 1)
                if useful <= 12:
                    assert jacobian_rank(most, 1) == jacobian_rank(more, 1)

    def test_it_is_linear_in_each_array(self) -> None:
        for split, arrays in self._each():
            expected = 2.0 * _whole(split, arrays)
            for name, array in arrays.items():
                doubled = _whole(split, {**arrays, name: 2.0 * array})
                np.testing.assert_allclose(doubled, expected, rtol=1e-12, atol=1e-12)

    def test_the_adjoint_is_that_of_each_linear_map(self) -> None:
        rng = np.random.default_rng(1)
        for split, arrays in self._each():
            tensor = rng.normal(size=split.sizes)
            gradients = split.adjoint(_NUMPY, arrays, tensor)
            assert {name: tuple(gradient.shape) for name, gradient in gradients.items()} == split.shapes
            for name, array in arrays.items():
                # At another array than the gradient's, which tests that the map is linear in it.
                other = rng.normal(size=array.shape)
                expected = (_whole(split, {**arrays, name: other}) * tensor).sum()
                np.testing.assert_allclose((other * gradients[name]).sum(), expected, rtol=1e-9, atol=1e-9)

    def test_paths_count_the_elements_that_an_element_is_made_of(self) -> None:
        """Check that an element depends on ``num_terms_per_array(name)`` elements of an array, by its gradient."""
        for split, arrays in self._each():
            cotangent = np.zeros(split.sizes)
            cotangent[tuple(size // 2 for size in split.sizes)] = 1.0
            gradients = split.adjoint(_NUMPY, arrays, cotangent)
            for name, gradient in gradients.items():
                assert np.count_nonzero(gradient) == split.num_terms_per_array(name), (
                    f"{type(split).__name__}.num_terms_per_array({name!r})"
                )

    def test_paths_are_the_variance(self) -> None:
        """Check that independent unit numbers give elements of variance ``num_terms``, as initialization assumes."""
        rng = np.random.default_rng(0)
        for sizes, rank in (((6, 5), 2), ((3, 4, 3), 2)):
            split = self.kind(sizes, rank)
            total = []
            for _ in range(60):
                arrays = {
                    name: np.ones(shape) if name in split.ones else rng.choice([-1.0, 1.0], size=shape)
                    for name, shape in split.shapes.items()
                }
                total.append(_whole(split, arrays))
            assert 0.5 < np.mean(np.square(total)) / split.num_terms < 2.0

    def test_other_libraries_files_hold_the_update_or_say_how_far_they_are_off(self) -> None:
        """Convert adapters to the file formats and back, and compare with the plan's own updates in float64."""
        # A format without a name gets one for this test.
        with tempfile.TemporaryDirectory() as folder, unittest.mock.patch.dict(FORMATS._added):
            for number, (file, form, options) in enumerate(self._exports(folder)):
                path = os.path.join(folder, f"{number}.gguf" if form.startswith("gguf") else str(number))
                what = f"{file.config} as {form} with {options}"
                try:
                    report = tna.convert(file, path, to=form, **options)
                except ConfigError:
                    # Without a rank, a form may have no exact factors; with full rank, every update has them.
                    always = form.endswith("full") or "rank" in options
                    assert not always, what
                    continue
                updates, expected = (_updates(each) for each in (tna.convert(path).file, file))
                error = float(np.linalg.norm(updates - expected) / np.linalg.norm(expected))
                assert abs(error - report.error) <= _ROUNDING, f"{what}: the error is {error}, and not {report.error}"
                assert report.exact or options.get("rank") == 1, f"{what}: the error is {error}"

    def _exports(self, folder: str) -> Iterator[tuple[tna.AdapterFile, str, dict[str, Any]]]:
        """Yield adapters of this format, with the form to write each of them in, and the options."""
        base = os.path.join(folder, "base")
        os.mkdir(base)
        with open(os.path.join(base, "config.json"), "w") as written:
            json.dump(_LLAMA, written)
        zeros = {f"{path}.weight": np.zeros(shape, np.float32) for path, shape in _WEIGHTS.items()}
        save_file(zeros, os.path.join(base, "model.safetensors"))
        forms = [form.partition("-") for form in FORMS if form.endswith(("-lora", "-lokr", "-loha", "-full"))]
        if importlib.util.find_spec("gguf") is None:
            forms = [each for each in forms if each[0] != "gguf"]
        for file in self._adapters():
            for library, _, method in forms:
                if library not in _WRITTEN:
                    continue
                options = _WRITTEN[library] | ({"base": base} if library == "gguf" else {})
                yield file, f"{library}-{method}", options
                if library == "peft":
                    yield file, f"{library}-{method}", {**options, "rank": 20}
                if (library, method) == ("peft", "lora"):
                    yield file, f"{library}-{method}", {**options, "rank": 1, "max_error": 1.0}

    def _adapters(self) -> Iterator[tna.AdapterFile]:
        """Yield small adapters with random arrays: a matrix per weight, sums and products of two, a joint tensor."""
        name = next((name for name, cls in FORMATS.items() if cls is self.kind), None)
        if name is None:
            place = f"{self.kind.__module__} {self.kind.__qualname__}".lower()
            name = re.sub("[^a-z0-9]+", "-", place)[-64:].strip("-")
            tna.register_format(name, self.kind)
        rng = np.random.default_rng(0)
        for settings in (
            {},
            {"terms": 2},
            {"splits": 2},
            {"splits": 2, "combine": "hadamard", "leading": "same"},
            {"groups": 1, "order": 3, "fold": "hypercube"},
        ):
            config = tna.Config(rank=2, format=name, **settings)
            plan = tna.UpdatePlan(config, list(_WEIGHTS.values()))
            arrays = {full: rng.normal(size=shape).astype("f4") for full, shape in plan.param_shapes.items()}
            yield tna.AdapterFile(config, [tna.Target(path, shape) for path, shape in _WEIGHTS.items()], arrays)


def _updates(file: tna.AdapterFile | None) -> np.ndarray:
    """Return the elements of all updates of a file, in the order of its weights' names, computed in float64."""
    assert file is not None
    deltas = file.plan.deltas({name: array.astype(np.float64) for name, array in file.arrays.items()})
    names = [target.name for target in file.targets]
    return np.concatenate([deltas[names.index(name)].reshape(-1) for name in sorted(names)])


# -- Maps --------------------------------------------------------------------------------------------------------------


class MapContract:
    """The tests of every map F. Inherit from it and set ``kind``.

    Attributes
    ----------
    kind : type of Map
        The map under test; called as ``kind(n_in, n_out, seed, group)``, and with ``settings`` and ``shape`` if it has
        them.
    lengths : sequence of (int, int)
        ``n_in`` and ``n_out``; a map that keeps the length, or determines it by its settings, uses only the second.
    shapes : sequence of (int, int)
        Rows and columns of the output, instead of ``lengths``, of a two-sided map.
    settings : sequence of MapSettings
        Settings to test, if the map has settings. They must fit all lengths or shapes.

    Examples
    --------
    >>> from tnadapt.algebra.maps import MAPS
    >>> class TestLinear(MapContract):
    ...     kind = MAPS["linear"]
    >>> TestLinear().test_the_adjoint_is_that_of_the_derivative()
    """

    kind: Any
    lengths: Sequence[tuple[int, int]] = ((1, 1), (3, 7), (7, 3), (16, 16), (5, 64), (37, 509))
    shapes: Sequence[tuple[int, int]] = ((1, 1), (1, 6), (4, 6), (9, 5), (16, 16), (12, 35))
    settings: Sequence[MapSettings] = ()

    def _each(self, seed: int = 3) -> Iterator[Map]:
        for settings in self.settings or (None,):
            if self.kind.two_sided:
                spaces = [(rows * cols, Space(rows * cols, (rows, cols))) for rows, cols in self.shapes]
            else:
                spaces = [(n_in, Space(n_out)) for n_in, n_out in self.lengths]
            for n_in, space in spaces:
                if self.kind.fixes_length(settings):
                    n_in = self.kind.domain(space, settings).length
                extra: dict[str, Any] = {} if settings is None else {"settings": settings}
                if self.kind.two_sided:
                    extra["shape"] = space.shape
                yield self.kind(n_in, space.length, seed, 0, **extra)

    def test_lengths_and_batches(self) -> None:
        for f in self._each():
            x = np.random.default_rng(0).normal(size=(2, 3, f.n_in))
            outputs = np.asarray(f.forward(_NUMPY, x))
            assert outputs.shape == (2, 3, f.n_out)
            np.testing.assert_allclose(outputs[1, 2], f.forward(_NUMPY, x[1, 2]), rtol=1e-12, atol=1e-12)
            y = np.random.default_rng(1).normal(size=(2, 3, f.n_out))
            back = np.asarray(f.linear_part.adjoint(_NUMPY, y))
            assert back.shape == (2, 3, f.n_in)
            np.testing.assert_allclose(back[1, 2], f.linear_part.adjoint(_NUMPY, y[1, 2]), rtol=1e-12, atol=1e-12)
            if f.exact_in_batches:
                assert np.array_equal(outputs[1, 2], f.forward(_NUMPY, x[1, 2]))
                y = np.random.default_rng(1).normal(size=(4, f.n_out))
                alone = f.linear_part.adjoint(_NUMPY, y[3])
                assert np.array_equal(np.asarray(f.linear_part.adjoint(_NUMPY, y))[3], alone)

    def test_it_is_linear_where_it_says_so(self) -> None:
        rng = np.random.default_rng(0)
        for f in self._each():
            part = f.linear_part
            x, y = rng.normal(size=(2, f.n_in))
            expected = part.forward(_NUMPY, x) + 2.0 * part.forward(_NUMPY, y)
            np.testing.assert_allclose(part.forward(_NUMPY, x + 2.0 * y), expected, rtol=1e-10, atol=1e-10)
            assert f.linear == (part is f)

    def test_the_reference_matrix_is_the_map(self) -> None:
        for f in self._each():
            part = f.linear_part
            matrix = np.asarray(part.forward(_NUMPY, np.eye(f.n_in))).T
            np.testing.assert_allclose(matrix, reference.matrix_of(part), rtol=1e-10, atol=1e-10)

    def test_the_adjoint_is_that_of_the_derivative(self) -> None:
        rng = np.random.default_rng(1)
        for f in self._each():
            x, way = rng.normal(size=(2, f.n_in))
            y = rng.normal(size=f.n_out)
            h = 1e-6
            ahead, behind = (np.asarray(f.forward(_NUMPY, x + step * way)) for step in (h, -h))
            tangent = np.asarray(f.forward(_NUMPY, way)) if f.linear else (ahead - behind) / (2.0 * h)
            gradient = np.asarray(f.adjoint_at(_NUMPY, y, x))
            assert gradient.shape == (f.n_in,)
            tight = 1e-10 if f.linear else 1e-6
            np.testing.assert_allclose(tangent @ y, way @ gradient, rtol=tight, atol=tight)

    def test_its_sides_make_the_whole(self) -> None:
        rng = np.random.default_rng(4)
        for f in self._each():
            x, total = rng.normal(size=f.n_in), np.zeros(f.n_out)
            for rows, cols in f.sides():
                assert (rows.n_in * cols.n_in, rows.n_out * cols.n_out) == (f.n_in, f.n_out)
                half = np.asarray(cols.forward(_NUMPY, x.reshape(rows.n_in, cols.n_in)))
                total += np.asarray(rows.forward(_NUMPY, half.T)).T.ravel()
                for side in (rows, cols):
                    y = rng.normal(size=side.n_out)
                    forward = np.asarray(side.forward(_NUMPY, np.eye(side.n_in)))
                    np.testing.assert_allclose(side.adjoint(_NUMPY, y), forward @ y, rtol=1e-10, atol=1e-10)
            if f.sides():
                np.testing.assert_allclose(total, f.forward(_NUMPY, x), rtol=1e-10, atol=1e-10)

    def test_a_slice_is_the_whole_cut(self) -> None:
        rng = np.random.default_rng(2)
        for f in self._each():
            x = rng.normal(size=f.n_in)
            whole = np.asarray(f.forward(_NUMPY, x))
            for start, stop in {(0, f.n_out), (0, 1), (f.n_out - 1, f.n_out), (f.n_out // 3, f.n_out // 3 + 1)}:
                fresh = copy.deepcopy(f)
                assert not fresh.kept
                for each in (f, fresh):  # with draws in memory, and without
                    part = np.asarray(each.slice(_NUMPY, x, start, stop))
                    np.testing.assert_allclose(part, whole[start:stop], rtol=1e-10, atol=1e-10)

    def test_what_is_known_of_it_is_so(self) -> None:
        for f in self._each():
            part = f.linear_part
            matrix = reference.matrix_of(part)
            frobenius = float(np.sum(matrix * matrix))
            # Some maps state the mean over their draws.
            assert 0.3 * frobenius <= f.squared_norm() <= 3.0 * frobenius or f.n_out < 16
            assert math.isclose(f.gain(), f.squared_norm() / math.sqrt(f.n_in * f.n_out), rel_tol=1e-12)
            assert math.isclose(f.variance(), f.squared_norm() / f.n_out, rel_tol=1e-12)
            if f.isometry:
                assert f.square
                np.testing.assert_allclose(matrix @ matrix.T, np.eye(f.n_out), atol=1e-12)
            assert np.linalg.matrix_rank(matrix) <= f.freedom() <= min(f.n_in, f.n_out)
            cost = f.cost()
            assert cost is None or cost >= 0

    def test_equal_seeds_give_equal_maps(self) -> None:
        state = repr(np.random.get_state(legacy=False))
        for f, again, other in zip(self._each(), self._each(), self._each(seed=4), strict=True):
            assert f.digest() == again.digest() == copy.deepcopy(f).digest()
            assert [*map(np.ndarray.tobytes, f.streams())] == [*map(np.ndarray.tobytes, again.streams())]
            if f.n_out > 16 and any(
                a.tobytes() != b.tobytes() for a, b in zip(f.streams(), other.streams(), strict=True)
            ):
                assert f.digest() != other.digest()
        assert repr(np.random.get_state(legacy=False)) == state


# -- Sources -----------------------------------------------------------------------------------------------------------

_SMALL_WEIGHTS = [(6, 4), (8, 4)]
_CONFIGS = (
    Config(rank=2),
    Config(rank=2, format="tucker", groups=1, fold="hypercube", projection="linear", ratio=0.5),
    Config(rank=2, order=3, format="tt", groups=1, fold="balanced", projection="nonlinear"),
)


class SourceContract:
    """What every source must do. Inherit, register the class, and give ``sources``.

    What a source computes is tested for those that need nothing but their settings and random words: not for one that
    needs base weights or the caller's arrays, or refers to other arrays.

    Attributes
    ----------
    sources : sequence of Source
        Those under test: one for each kind of setting.
    shapes : sequence of tuple of int
        Shapes of arrays that they can provide. Give matrices alone for sources of matrices.

    Examples
    --------
    >>> from tnadapt.sources import Trained
    >>> class TestTrained(SourceContract):
    ...     sources = (Trained(),)
    >>> TestTrained().test_a_dictionary_gives_the_source_back()
    """

    sources: Any
    shapes: Sequence[tuple[int, ...]] = ((1,), (7,), (1, 1), (5, 3), (3, 5), (2, 3, 4))

    def test_a_dictionary_gives_the_source_back(self) -> None:
        for source in self.sources:
            for other in (source_from_dict(source_to_dict(source)), copy.deepcopy(source)):
                assert other == source
                assert hash(other) == hash(source)

    def test_frozen_arrays_are_finite_and_of_their_shape(self) -> None:
        for source in self._frozen():
            for shape in self.shapes:
                array = source.array(shape, Stream(3, 1, 1 << 16))
                assert array.shape == shape
                assert array.dtype == np.float32
                assert np.isfinite(array).all()

    def test_equal_streams_give_equal_arrays(self) -> None:
        state = repr(np.random.get_state(legacy=False))
        for source in self._frozen():
            for shape in self.shapes:
                array, again = (source.array(shape, Stream(2**64 - 1, 5, 1 << 16)) for _ in range(2))
                assert array.tobytes() == again.tobytes()
                assert not np.shares_memory(array, again)
        assert repr(np.random.get_state(legacy=False)) == state

    def test_a_plan_uses_what_they_compute(self) -> None:
        rng = np.random.default_rng(0)
        for source in [source for source in self.sources if source.trained or source in self._frozen()]:
            for config in _CONFIGS:
                every = UpdatePlan(config, _SMALL_WEIGHTS)
                arrays = {name: rng.normal(size=shape) for name, shape in every.param_shapes.items()}
                for number, (name, shape) in enumerate(every.groups[0].network.shapes.items()):
                    if len(shape) not in {len(other) for other in self.shapes}:
                        continue
                    plan = UpdatePlan(config.replace(sources={name: source}), _SMALL_WEIGHTS)
                    frozen = {f"group{g}.{name}" for g in range(plan.num_groups)} if not source.trained else set()
                    assert plan.frozen_shapes.keys() == frozen
                    assert plan.num_parameters == sum(
                        math.prod(shape) for full, shape in every.param_shapes.items() if full not in frozen
                    )
                    fresh = plan.init(dtype="float64")
                    assert not any(delta.any() for delta in plan.deltas(fresh))
                    if not plan.groups[0].projection.linear:
                        params = {full: array + 0.1 for full, array in fresh.items()}
                        assert any(delta.any() for delta in plan.deltas(params))
                    else:
                        whole = dict(arrays)
                        own_shapes = [every.param_shapes[full] for full in frozen]
                        largest = tuple(max(sizes) for sizes in zip(shape, *own_shapes, strict=True))
                        for full in frozen:
                            group, shape = int(full[5 : full.index(".")]), every.param_shapes[full]
                            stream = Stream(config.seed, group, (1 << 16) + number, largest)
                            whole[full] = source.array(shape, stream).astype(np.float64)
                        params = {full: arrays[full] for full in plan.param_shapes}
                        for update, expected in zip(plan.deltas(params), every.deltas(whole), strict=True):
                            np.testing.assert_allclose(update, expected, rtol=1e-12, atol=1e-12)

    def _frozen(self) -> list[Source]:
        return [
            source
            for source in self.sources
            if not (source.trained or source.needs_base or source.brought or isinstance(source, (Tied, Multiplied)))
        ]


# -- Backends ----------------------------------------------------------------------------------------------------------


class BackendContract:
    """The tests of every backend. Inherit from it and set ``backend``.

    Attributes
    ----------
    backend : Backend
        The backend under test.

    Examples
    --------
    >>> from tnadapt.backends import load_backend
    >>> class TestNumpy(BackendContract):
    ...     backend = load_backend("numpy")
    >>> TestNumpy().test_round_trip()
    """

    backend: Backend

    def _arange(self, *shape: int) -> Array:
        return self.backend.asarray(np.arange(math.prod(shape), dtype=np.float64).reshape(shape), "float32")

    def _same(self, actual: Array, expected: Any) -> None:
        assert self.backend.owns(actual)
        np.testing.assert_array_equal(self.backend.to_numpy(actual), expected)

    def test_owns_its_arrays_and_no_others(self) -> None:
        x = self._arange(2)
        assert self.backend.owns(x)
        assert get_backend(x) is self.backend
        assert not self.backend.owns([1.0])
        assert self.backend.is_concrete(x)
        assert self.backend.device(x) is not None, "device() returned None, which is for arrays inside a trace"

    def test_round_trip(self) -> None:
        host = np.array([[1.5, -2.0], [0.25, 3.0]])
        for dtype in FLOAT_DTYPES:
            try:
                self.backend.dtype(dtype)
            except BackendError as error:
                # Refusing a dtype is allowed: JAX has a float64 that must be enabled first. But a backend must not deny
                # a dtype that the library has, nor refuse float32, which every library has.
                denied = hasattr(self.backend.xp, dtype) and "no floating dtype" in str(error)
                if dtype == "float32" or denied:
                    raise
                if dtype not in str(error):
                    raise AssertionError(f"{dtype} is refused by an error that does not name it: {error}") from error
                continue
            x = self.backend.asarray(host, dtype)
            assert self.backend.dtype_name(x) == dtype
            assert self.backend.is_float(x)
            assert tuple(x.shape) == (2, 2)
            self._same(x, host)

    def test_asarray_copies(self) -> None:
        host = np.ones(3)
        x = self.backend.asarray(host)
        host[:] = 0.0
        self._same(x, [1.0, 1.0, 1.0])

    def test_unknown_dtypes_and_devices_are_refused(self) -> None:
        for dtype in ("int32", "float128", "", "nonsense"):
            with pytest.raises(BackendError):
                self.backend.dtype(dtype)

    def test_integers_are_no_floats(self) -> None:
        x = self.backend.constant(np.arange(3, dtype=np.int32), self.backend.device(self._arange(1)))
        assert not self.backend.is_float(x)
        with pytest.raises(BackendError, match="cast it"):
            self.backend.require_float(x, "x")

    def test_constants_keep_their_dtype(self) -> None:
        for dtype in (np.int8, np.int32, np.float32):
            x = self.backend.constant(np.array([1, -1], dtype), None)
            assert self.backend.dtype_name(x) == np.dtype(dtype).name

    def test_fixed_arrays_are_made_once(self) -> None:
        keys = []

        class Counted(FixedArrays):
            def make(self, key: Any) -> np.ndarray:
                keys.append(key)
                return np.full(2, float(key), np.float32)

        source, like = Counted(), self._arange(1)
        for _ in range(2):
            self._same(source.on(self.backend, 3, like), [3.0, 3.0])
            self._same(source.on(self.backend, 4, like, "float32", keep=False), [4.0, 4.0])
        assert keys == [3, 4, 4]

    def test_shapes(self) -> None:
        b, x = self.backend, self._arange(2, 3)
        host = np.arange(6.0).reshape(2, 3)
        self._same(b.reshape(x, (3, 2)), host.reshape(3, 2))
        self._same(b.permute_dims(x, (1, 0)), host.T)
        self._same(b.matrix_transpose(x), host.T)
        self._same(b.moveaxis(self._arange(2, 3, 4), 0, -1), np.moveaxis(np.arange(24.0).reshape(2, 3, 4), 0, -1))
        self._same(b.flatten(x), host.reshape(-1))
        self._same(b.where(x < 2.0, x, -x), np.where(host < 2.0, host, -host))
        for part, expected in zip(b.apart([x, x]), [host, host], strict=True):
            self._same(part, expected)
        self._same(b.pad_last(x, 4), np.pad(host, ((0, 0), (0, 1))))
        self._same(b.zeros((2, 2), x), np.zeros((2, 2)))
        self._same(x[:, 1:], host[:, 1:])
        self._same(x[..., :2], host[..., :2])

    def test_concat_and_split(self) -> None:
        b, x = self.backend, self._arange(5)
        parts = b.split(x, [2, 0, 3])
        assert [tuple(part.shape) for part in parts] == [(2,), (0,), (3,)]
        self._same(b.concat(parts), np.arange(5.0))
        self._same(b.concat([x]), np.arange(5.0))
        matrix = self._arange(2, 2)
        self._same(b.concat([matrix, matrix], axis=-1), np.tile(np.arange(4.0).reshape(2, 2), (1, 2)))

    def test_take(self) -> None:
        x = self._arange(2, 4)
        for dtype in (np.int32, np.int64):
            indices = self.backend.constant(np.array([3, 0, 0], dtype), self.backend.device(x))
            self._same(self.backend.take(x, indices), np.arange(8.0).reshape(2, 4)[:, [3, 0, 0]])
            self._same(self.backend.take(x, indices[1:], axis=0), np.arange(8.0).reshape(2, 4)[[0, 0]])

    def test_arithmetic(self) -> None:
        b, x = self.backend, self._arange(2, 3)
        host = np.arange(6.0).reshape(2, 3)
        self._same(b.matmul(x, b.matrix_transpose(x)), host @ host.T)
        self._same(b.precise_matmul(x, b.matrix_transpose(x)), host @ host.T)
        self._same(b.matmul(b.reshape(x, (2, 1, 3)), b.reshape(x, (2, 3, 1))), (host**2).sum(1).reshape(2, 1, 1))
        self._same(b.kron(x, b.matrix_transpose(x)), np.kron(host, host.T))
        self._same(b.sum(x, axis=0), host.sum(0))
        self._same((x + x) * 2.0 - x / 2.0, 3.5 * host)
        np.testing.assert_allclose(b.to_numpy(b.tanh(x)), np.tanh(host), rtol=1e-6)
        self._same(b.sqrt(x), np.sqrt(host.astype(np.float32)))
        self._same(b.astype(x, "float32"), host)
        assert b.astype(x, "float32") is x

    def test_linear_algebra(self) -> None:
        b = self.backend
        host = np.array([[2.0, 1.0], [1.0, 3.0], [0.0, 1.0]])
        for matrix in (host, host.T):
            x = b.asarray(matrix, "float32")
            u, s, vh = b.svd(x)
            assert (tuple(u.shape), tuple(s.shape), tuple(vh.shape)) == ((len(matrix), 2), (2,), (2, len(matrix[0])))
            self._equal(b.matmul(u * s, vh), x)
            self._equal(s, b.asarray(np.linalg.svd(matrix)[1], "float32"))
            q, r = b.qr(x)
            assert (tuple(q.shape), tuple(r.shape)) == ((len(matrix), 2), (2, len(matrix[0])))
            self._equal(b.matmul(q, r), x)
        square = b.asarray(host[:2], "float32")
        values, vectors = b.eigh(square)
        self._equal(b.matmul(vectors * values, b.matrix_transpose(vectors)), square)
        assert values[0] < values[1]
        right = b.asarray(host[:, :1][:2], "float32")
        self._equal(b.matmul(square, b.solve(square, right)), right)
        assert b.conj(square) is square

    def _found(self, method: str, result: Any) -> Any:
        """Return the result of an optional method, checking that it is None exactly if lacks() lists the method."""
        listed = self.backend.lacks(self._arange(1))
        assert listed <= set(OPTIONAL), f"lacks() lists {set(listed) - set(OPTIONAL)}; expected names of {OPTIONAL}"
        name = type(self.backend).__name__
        if method in listed:
            assert result is None, f"{name}.{method} returned a result, but lacks() lists it: remove it from lacks()"
        else:
            assert result is not None, f"{name}.{method} returned None: implement it, or list {method!r} in lacks()"
        return result

    def test_largest(self) -> None:
        b, device = self.backend, self.backend.device(self._arange(1))
        for host, expected in (([1.0, -3.0, 2.0], 3.0), ([0.0], 0.0), ([np.inf, 1.0], np.inf)):
            assert b.largest(b.constant(np.array(host, np.float32), device)) == expected
        assert np.isnan(b.largest(b.constant(np.array([1.0, np.nan], np.float32), device)))
        assert b.largest(self._arange(2, 3)[:, :0]) == 0.0

    def test_gradient(self) -> None:
        b = self.backend

        def squares(arrays: dict[str, Array]) -> Array:
            return b.sum(b.flatten(arrays["x"] * arrays["x"]), axis=0)

        gradients = self._found("gradient", b.gradient(squares, {"x": self._arange(3)}))
        if gradients is not None:
            self._same(gradients["x"], [0.0, 2.0, 4.0])

    def _equal(self, result: Array | None, expected: Array) -> None:
        if result is not None:
            assert self.backend.owns(result)
            actual, desired = self.backend.to_numpy(result), self.backend.to_numpy(expected)
            np.testing.assert_allclose(actual, desired, rtol=0.0, atol=1e-5 * float(np.max(np.abs(desired))))

    def test_the_kernel_of_fwht(self) -> None:
        b, x = self.backend, self._arange(3, 8)

        def plain(x: Array) -> Array:
            return fwht_plain(b, x, normalize=False)

        transformed = b.fwht(x, 1.0, -1, plain)
        self._equal(self._found("fwht", transformed), plain(x))

    def test_the_kernels_of_fastfood(self) -> None:
        for map_class in (Linear, LinearV2):
            # Long enough for backends to compile a kernel.
            b, f = self.backend, map_class(300, 9000, seed=5)
            forward, adjoint = f.plain(b)
            x, y = self._arange(2, f.n_in), self._arange(2, f.n_out)
            projected = b.fastfood(x, f, adjoint=False)
            self._equal(self._found("fastfood", projected), forward(x))
            pulled = b.fastfood(y, f, adjoint=True)
            self._equal(self._found("fastfood", pulled), adjoint(y))

    def test_the_kernel_of_shuffle(self) -> None:
        b, f = self.backend, Shuffle(1000, 1000, seed=5)
        x = self._arange(2, 1000)
        for inverse, name in ((False, "perm"), (True, "inverse")):
            order = f.host(name)

            def plain(x: Array, order: np.ndarray = order) -> Array:
                return b.take(x, b.constant(order, b.device(x)))

            shuffled = b.shuffle(x, "5 0", inverse, fallback=(plain, plain))
            if self._found("shuffle", shuffled) is not None:
                self._same(shuffled, b.to_numpy(plain(x)))

    def test_the_fft_of_dft2(self) -> None:
        b = self.backend
        for rows, cols in ((1, 1), (1, 2), (3, 1), (4, 6), (5, 7)):
            f = Dft2(rows * cols, rows * cols, shape=(rows, cols))
            x = self._arange(2, rows, cols)

            def plain(x: Array, f: Dft2 = f) -> Array:
                return b.reshape(f.forward_plain(b, b.reshape(x, (2, f.n_in))), x.shape)

            transformed = self._found("dft2", b.dft2(x, plain))
            self._equal(transformed, plain(x))
            assert transformed is None or tuple(transformed.shape) == (2, rows, cols)
