"""The contract of a format: the tests that every tensor format passes, as a class to inherit.

``class TestMine(FormatContract): kind = Mine`` runs them all; the page on extending tnadapt has an example.
"""

from __future__ import annotations

import importlib.util
import itertools
import json
import math
import os
import re
import tempfile
import unittest.mock
from collections.abc import Iterator
from typing import Any

import numpy as np
from safetensors.numpy import save_file

import tnadapt as tna
from tnadapt.algebra.formats import FORMATS, jacobian_rank
from tnadapt.algebra.unfolding import Cut
from tnadapt.backends import get_backend
from tnadapt.convert import FORMS
from tnadapt.errors import ConfigError

from ._required import Required

__all__ = ["FormatContract"]

# What the file formats of other libraries need to know, other than the adapter; for llama.cpp also a base.
_WRITTEN: dict[str, dict[str, Any]] = {
    "peft": {}, "vllm": {}, "lycoris": {}, "kohya": {"part": "lora_unet"}, "diffusers": {"part": "unet"}, "gguf": {},
}  # fmt: skip
_LLAMA = {"model_type": "llama", "num_hidden_layers": 2, "num_attention_heads": 2}
_WEIGHTS = {f"model.layers.{layer}.self_attn.v_proj": (24, 20) for layer in (0, 1)}
# As float32 rounds two factors, and the sum of a few of their products.
_ROUNDING = 1e-5


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

    kind: Any = Required("MyFormat")
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
            backend = get_backend(*arrays.values())
            whole = split.tensor(backend, arrays, [(0, d) for d in split.sizes])
            assert whole.shape == split.sizes
            for box in itertools.product(*([(0, d), (0, 1), (d - 1, d), (d // 2, d)] for d in split.sizes)):
                part = split.tensor(backend, arrays, box)
                cut = whole[tuple(slice(lo, hi) for lo, hi in box)]
                np.testing.assert_allclose(part, cut, rtol=1e-12, atol=1e-12)

    def test_an_unfolding_is_the_product_of_its_halves(self) -> None:
        for split, arrays in self._each():
            backend = get_backend(*arrays.values())
            whole = split.tensor(backend, arrays, [(0, d) for d in split.sizes])
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
                    left, right = split.unfolded(backend, arrays, Cut(modes, tuple(rows), tuple(cols), start))
                    assert left.shape == (rows[1] - rows[0], inner)
                    assert right.shape == (inner, cols[1] - cols[0])
                    part = expected[slice(*rows), slice(*cols)]
                    np.testing.assert_allclose(left @ right, part, rtol=1e-12, atol=1e-12)

    def test_the_tensor_is_the_einsum_of_the_formula(self) -> None:
        for split, arrays in self._each():
            found = split.tensor(get_backend(*arrays.values()), arrays, [(0, d) for d in split.sizes])
            expected = np.einsum(split.formula, *arrays.values(), optimize=True)
            np.testing.assert_allclose(found, expected, rtol=1e-12, atol=1e-12)

    def test_the_factors_of_a_matrix_make_it(self) -> None:
        for sizes, rank in itertools.product(((9, 8), (8, 9), (4, 3)), self.ranks):
            split, rng = self.kind(sizes, rank), np.random.default_rng(0)
            arrays = {name: rng.normal(size=shape) for name, shape in split.shapes.items()}
            backend = get_backend(*arrays.values())
            found = split.factors(backend, arrays)
            whole = split.tensor(backend, arrays, [(0, size) for size in sizes])
            if found is None:
                assert split.rank_of_legs(((sizes[0], 1), (1, sizes[1]))) == min(sizes)
            else:
                np.testing.assert_allclose(found[0] @ found[1], whole, rtol=1e-12, atol=1e-12)

    def test_ranks_of_unfoldings_are_limited_as_it_says(self) -> None:
        for split, arrays in self._each():
            order = len(split.sizes)
            whole = split.tensor(get_backend(*arrays.values()), arrays, [(0, d) for d in split.sizes])
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
            backend = get_backend(*arrays.values())
            whole = [(0, d) for d in split.sizes]
            expected = split.tensor(backend, arrays, whole)
            for name, array in arrays.items():
                doubled = split.tensor(backend, {**arrays, name: 2.0 * array}, whole)
                np.testing.assert_allclose(doubled, 2.0 * expected, rtol=1e-12, atol=1e-12)

    def test_the_adjoint_is_that_of_each_linear_map(self) -> None:
        rng = np.random.default_rng(1)
        for split, arrays in self._each():
            backend = get_backend(*arrays.values())
            whole = [(0, d) for d in split.sizes]
            tensor = rng.normal(size=split.sizes)
            found = split.adjoint(backend, arrays, tensor)
            assert {name: tuple(gradient.shape) for name, gradient in found.items()} == split.shapes
            for name, array in arrays.items():
                # At another array than the gradient's, which tests that the map is linear in it.
                other = rng.normal(size=array.shape)
                made = split.tensor(backend, {**arrays, name: other}, whole)
                np.testing.assert_allclose((other * found[name]).sum(), (made * tensor).sum(), rtol=1e-9, atol=1e-9)

    def test_paths_count_the_elements_that_an_element_is_made_of(self) -> None:
        """Check that an element depends on ``num_terms_per_array(name)`` elements of an array, by its gradient."""
        for split, arrays in self._each():
            one = np.zeros(split.sizes)
            one[tuple(size // 2 for size in split.sizes)] = 1.0
            found = split.adjoint(get_backend(*arrays.values()), arrays, one)
            for name, gradient in found.items():
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
                total.append(split.tensor(get_backend(*arrays.values()), arrays, [(0, d) for d in sizes]))
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
                    # Without a rank, a form may have no exact factors; of full rank, every update has them.
                    always = form.endswith("full") or "rank" in options
                    assert not always, what
                    continue
                found, expected = (_updates(each) for each in (tna.convert(path).file, file))
                error = float(np.linalg.norm(found - expected) / np.linalg.norm(expected))
                assert abs(error - report.error) <= _ROUNDING, f"{what}: the error is {error}, and not {report.error}"
                assert report.exact or options.get("rank") == 1, f"{what}: the error is {error}"

    def _exports(self, folder: str) -> Iterator[tuple[tna.AdapterFile, str, dict[str, Any]]]:
        """Yield adapters of this format, the forms to write them in, and the options."""
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
            for library, _, kind in forms:
                if library not in _WRITTEN:
                    continue
                options = _WRITTEN[library] | ({"base": base} if library == "gguf" else {})
                yield file, f"{library}-{kind}", options
                if library == "peft":
                    yield file, f"{library}-{kind}", {**options, "rank": 20}
                if (library, kind) == ("peft", "lora"):
                    yield file, f"{library}-{kind}", {**options, "rank": 1, "max_error": 1.0}

    def _adapters(self) -> Iterator[tna.AdapterFile]:
        """Yield small adapters with random arrays: a matrix a weight, sums and products of two, and a joint tensor."""
        name = next((name for name, cls in FORMATS.items() if cls is self.kind), None)
        if name is None:
            name = re.sub("[^a-z0-9]+", "-", f"{self.kind.__module__} {self.kind.__qualname__}".lower())[-64:].strip(
                "-"
            )
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
            plan = tna.SuperLoRA(config, list(_WEIGHTS.values()))
            arrays = {full: rng.normal(size=shape).astype("f4") for full, shape in plan.param_shapes.items()}
            yield tna.AdapterFile(config, [tna.Target(path, shape) for path, shape in _WEIGHTS.items()], arrays)


def _updates(file: tna.AdapterFile | None) -> np.ndarray:
    """Return the elements of all updates of a file, in the order of its weights' names, computed in float64."""
    assert file is not None
    deltas = file.plan.deltas({name: array.astype(np.float64) for name, array in file.arrays.items()})
    names = [target.name for target in file.targets]
    return np.concatenate([deltas[names.index(name)].reshape(-1) for name in sorted(names)])
