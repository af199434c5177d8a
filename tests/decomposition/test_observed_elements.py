"""The structured values and Jacobian of observed elements are those of the network, column by column."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

import tnadapt as tna
from tnadapt.algebra.network import Network
from tnadapt.backends import load_backend
from tnadapt.decomposition import Limits
from tnadapt.decomposition.completion import ObservedElements, sweeps_on_observed
from tnadapt.testing.strategies import plans

NUMPY = load_backend("numpy")


def _columns(network: Network, arrays: dict[str, np.ndarray]) -> np.ndarray:
    """The Jacobian, column by column: the vector is affine in each array."""
    found = []
    for name, shape in network.shapes.items():
        at_zero = network.whole(NUMPY, {**arrays, name: np.zeros(shape)})
        for unit in np.eye(int(np.prod(shape))):
            found.append(network.whole(NUMPY, {**arrays, name: unit.reshape(shape)}) - at_zero)
    return np.stack(found, axis=1)


@given(st.data())
def test_the_jacobian_is_that_of_single_columns(data: st.DataObject) -> None:
    network = data.draw(plans()).groups[0].network
    rng = np.random.default_rng(data.draw(st.integers(0, 1000)))
    arrays = {name: rng.normal(size=shape) for name, shape in network.shapes.items()}
    count = data.draw(st.integers(1, network.size))
    some = np.sort(rng.choice(network.size, count, replace=False))
    elements = ObservedElements.of_network(network, some)
    assert elements.shapes == network.shapes
    at = elements.flat(arrays)
    expected = network.whole(NUMPY, arrays)[some]
    np.testing.assert_allclose(elements.values(at), expected, rtol=1e-9, atol=1e-9 * np.abs(expected).max())
    columns = _columns(network, arrays)[some]
    np.testing.assert_allclose(elements.jacobian(at).toarray(), columns, rtol=1e-9, atol=1e-9 * np.abs(columns).max())
    back = elements.arrays(at)
    assert all(np.array_equal(back[name], arrays[name]) for name in arrays)


def test_the_jacobian_of_a_long_train() -> None:
    """More indices than an einsum has letters."""
    config = tna.Config(rank=1, order=32, groups=1, fold=(2, 2, *[1] * 30), format="tt")
    network = tna.SuperLoRA(config, [(2, 2)]).groups[0].network
    arrays = {name: np.full(shape, 1.5) for name, shape in network.shapes.items()}
    elements = ObservedElements.of_network(network)
    np.testing.assert_allclose(elements.values(elements.flat(arrays)), network.whole(NUMPY, arrays))
    np.testing.assert_allclose(elements.jacobian(elements.flat(arrays)).toarray(), _columns(network, arrays))


@given(st.data())
def test_a_sweep_solves_for_each_array_in_turn(data: st.DataObject) -> None:
    network = data.draw(plans()).groups[0].network
    rng = np.random.default_rng(data.draw(st.integers(0, 1000)))
    arrays = {name: rng.normal(size=shape) for name, shape in network.shapes.items()}
    elements = ObservedElements.of_network(network)
    wanted, roots = rng.normal(size=network.size), rng.uniform(0.5, 2.0, size=network.size)
    found, error, _ = sweeps_on_observed(elements, wanted, arrays, Limits(0.0, 1), roots)
    # The same by dense least squares for one array after another.
    for name in network.shapes:
        jacobian = elements.jacobian(elements.flat(arrays)).toarray() * roots[:, None]
        first = elements.flat({k: np.full(v, float(k == name)) for k, v in network.shapes.items()}) == 1.0
        left = (wanted - elements.values(elements.flat(arrays))) * roots
        step = np.linalg.lstsq(jacobian[:, first], left, rcond=1e-10)[0]
        arrays[name] = arrays[name] + step.reshape(network.shapes[name])
    expected = np.linalg.norm((wanted - elements.values(elements.flat(arrays))) * roots) / np.linalg.norm(
        wanted * roots
    )
    assert error == pytest.approx(expected, rel=1e-4, abs=1e-6)
    made = elements.values(elements.flat(found))
    assert error == pytest.approx(np.linalg.norm((wanted - made) * roots) / np.linalg.norm(wanted * roots), rel=1e-9)
