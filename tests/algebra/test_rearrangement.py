"""Rearrangement of Kronecker products to outer products, and the adjoint of a whole network."""

from __future__ import annotations

import functools

import numpy as np
from hypothesis import given
from hypothesis import strategies as st

from tnadapt.algebra.products import contracted, padded_to, rearranged
from tnadapt.backends import get_backend
from tnadapt.testing.strategies import parameters, plans

NUMPY = get_backend(np.zeros(1))


@st.composite
def splits(draw: st.DrawFn) -> list[np.ndarray]:
    order = draw(st.integers(1, 4))
    size = st.integers(1, 3)
    sizes = draw(st.lists(st.tuples(*[size] * order), min_size=1, max_size=4))
    rng = np.random.default_rng(draw(st.integers(0, 2**32 - 1)))
    return [rng.normal(size=one) for one in sizes]


@given(splits())
def test_a_kronecker_product_rearranged_is_an_outer_product(tensors: list[np.ndarray]) -> None:
    product = functools.reduce(np.kron, tensors)
    outer = functools.reduce(np.multiply.outer, [tensor.reshape(-1) for tensor in tensors])
    np.testing.assert_allclose(rearranged(NUMPY, product, [t.shape for t in tensors]), outer, rtol=1e-12)


@given(splits(), st.data())
def test_contracting_is_the_sum_over_all_other_splits(tensors: list[np.ndarray], data: st.DataObject) -> None:
    rng = np.random.default_rng(0)
    sizes = [tensor.size for tensor in tensors]
    tensor = rng.normal(size=sizes)
    kept = data.draw(st.integers(0, len(tensors) - 1))
    given = [None if k == kept else one for k, one in enumerate(tensors)]
    letters = "abcdefgh"[: len(sizes)]
    inputs = ",".join(letters[k] for k in range(len(sizes)) if k != kept)
    vectors = [one.reshape(-1) for k, one in enumerate(tensors) if k != kept]
    expected = np.einsum(f"{letters}{',' if vectors else ''}{inputs}->{letters[kept]}", tensor, *vectors)
    found = contracted(NUMPY, tensor, given, tensors[kept].shape)
    np.testing.assert_allclose(found, expected.reshape(tensors[kept].shape), rtol=1e-10, atol=1e-10)


def test_padding_is_at_the_end_of_every_mode() -> None:
    padded = padded_to(NUMPY, np.ones((2, 1)), (3, 2))
    np.testing.assert_array_equal(padded, [[1, 0], [1, 0], [0, 0]])


def test_32_modes_of_three_splits_have_no_more_axes_than_numpy_allows() -> None:
    sizes = [(1,) * 30 + (2, 1), (1,) * 31 + (2,), (1,) * 30 + (1, 2)]
    assert rearranged(NUMPY, np.arange(8.0).reshape((1,) * 30 + (2, 4)), sizes).shape == (2, 2, 2)


@given(st.data())
def test_the_adjoint_of_a_network_is_that_of_each_of_its_linear_maps(data: st.DataObject) -> None:
    plan = data.draw(plans())
    group = plan.groups[0]
    given = data.draw(parameters(plan))
    arrays = {name: given[full] for name, full in group.names.items()}
    rng = np.random.default_rng(1)
    vec = rng.normal(size=group.network.size)
    found = group.network.adjoint(NUMPY, arrays, vec)
    assert {name: array.shape for name, array in found.items()} == group.network.shapes
    base = {name: group.network.whole(NUMPY, {**arrays, name: 0.0 * array}) for name, array in arrays.items()}
    for name, gradient in found.items():
        other = rng.normal(size=gradient.shape)
        # Of several terms, the others are a constant.
        made = group.network.whole(NUMPY, {**arrays, name: other}) - base[name]
        np.testing.assert_allclose((other * gradient).sum(), (made * vec).sum(), rtol=1e-8, atol=1e-8)
