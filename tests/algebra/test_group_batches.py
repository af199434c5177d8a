"""Groups in one call of F: the same bits as one by one, and as few calls as the backend's limit allows."""

from __future__ import annotations

import types
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

import tnadapt as tna
from tnadapt.algebra.group import batches
from tnadapt.algebra.maps import KINDS
from tnadapt.backends import Backend, load_backend
from tnadapt.testing.strategies import parameters, plans

MAPS = (*(kind for kind in KINDS if kind != "identity"), tna.maps.Gather(size=3), "normal")


@contextmanager
def at_once(backend: Backend, limit: int) -> Iterator[None]:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(backend, "at_once", lambda x: limit)
        yield


def superlora(count: int, side: int = 4, **settings: Any) -> tna.SuperLoRA:
    settings = {"projection": "linear", "ratio": 0.3, **settings}
    return tna.SuperLoRA(tna.presets.superlora(2, groups="weight", **settings), [(side, side)] * count)


@pytest.mark.parametrize("backend", ["numpy", "array_api_strict", "torch"], indirect=True)
@given(data=st.data())
def test_batches_change_no_bit(backend: Backend, data: st.DataObject) -> None:
    plan = data.draw(plans(projections=MAPS))
    kind = data.draw(st.sampled_from(["float32", "float64"]))
    params = {name: backend.asarray(a, kind) for name, a in data.draw(parameters(plan)).items()}
    start = data.draw(st.integers(0, plan.size - 1))
    stop = data.draw(st.integers(start + 1, plan.size))

    def computed(limit: int) -> list[np.ndarray]:
        with at_once(backend, limit):
            found = [*plan.deltas(params), plan.vector(params), plan.vector(params, start, stop)]
        return [backend.to_numpy(array) for array in found]

    for ours, plain in zip(computed(1 << 20), computed(0), strict=True):
        assert np.array_equal(ours, plain)


@pytest.mark.parametrize("projection", ["linear", "nonlinear_v2", "shuffle"])
def test_longer_vectors_keep_their_bits(projection: str, rng: np.random.Generator) -> None:
    # Long enough for the compiled kernels, and with many repeats of a short period.
    ratio = {} if projection == "shuffle" else {"ratio": 0.01}
    plan, backend = superlora(3, 130, projection=projection, **{"ratio": 1.0, **ratio}), load_backend("numpy")
    params = {name: a + rng.normal(size=a.shape).astype("float32") for name, a in plan.init().items()}
    with at_once(backend, 1 << 20):
        found = plan.vector(params)
    with at_once(backend, 0):
        assert np.array_equal(found, plan.vector(params))


@pytest.mark.parametrize(("limit", "calls"), [(0, 24), (16, 24), (63, 8), (1 << 20, 1)])
def test_as_few_calls_of_f_as_the_limit_allows(limit: int, calls: int, monkeypatch: pytest.MonkeyPatch) -> None:
    plan, backend, shapes = superlora(24), load_backend("numpy"), list[tuple[int, ...]]()
    kind = type(plan.groups[0].projection.map)
    forward = kind.forward

    def counted(self: Any, backend: Backend, x: Any) -> Any:
        shapes.append(x.shape[:-1])
        return forward(self, backend, x)

    monkeypatch.setattr(kind, "forward", counted)
    with at_once(backend, limit):
        plan.deltas(plan.init())
        assert len(shapes) == calls
        # One slice that ends within a group: the whole ones are still together.
        shapes.clear()
        plan.vector(plan.init(), 1)
    assert shapes == {0: [()] * 23, 16: [()] * 23, 63: [(3,)] * 7 + [(2,)], 1 << 20: [(23,)]}[limit]


@pytest.mark.parametrize("projection", ["linear", "nonlinear"])
def test_groups_of_weights_apart_are_computed_once(projection: str, monkeypatch: pytest.MonkeyPatch) -> None:
    config = tna.presets.superlora(2, groups=[[0, 2], [3, 1]], projection=projection, ratio=0.3)
    plan = tna.SuperLoRA(config, [(4, 3)] * 4)
    params = {name: array + 0.5 for name, array in plan.init(dtype="float64").items()}
    expected = np.concatenate([delta.reshape(-1) for delta in plan.deltas(params)])
    kind = type(plan.groups[0].projection.map)
    monkeypatch.setattr(kind, "slice", None)  # not called
    assert np.array_equal(plan.vector(params), expected)
    monkeypatch.undo()
    # Half of one group is missing: it is a slice, and the other one whole.
    np.testing.assert_allclose(plan.vector(params, 12), expected[12:], rtol=1e-12, atol=1e-14)


def test_what_is_not_alike_is_apart() -> None:
    backend, like = load_backend("numpy"), np.zeros(1)

    def together(plan: tna.SuperLoRA) -> list[list[int]]:
        return batches(backend, like, [(group, 0, group.size) for group in plan.groups])

    two = tna.SuperLoRA(tna.presets.superlora(2, groups="weight", projection="linear"), [(4, 4), (4, 5), (4, 4)])
    assert together(two) == [[0, 2], [1]]
    assert together(superlora(2, shared=False)) == [[0], [1]]
    assert together(superlora(2, projection="identity", ratio=1.0)) == [[0], [1]]
    # A product with a matrix sums one row in another order than several.
    assert together(superlora(2, projection="normal")) == [[0], [1]]
    assert together(superlora(2, projection=["shuffle", "linear"], ratio=0.3)) == [[0, 1]]


def test_processors_put_short_vectors_together_and_devices_longer_ones() -> None:
    torch = pytest.importorskip("torch")
    backend = load_backend("torch")
    assert backend.at_once(torch.zeros(1)) == load_backend("numpy").at_once(np.zeros(1)) == 1 << 16
    assert backend.at_once(types.SimpleNamespace(device=torch.device("cuda"))) == 1 << 24
    assert backend.at_once(torch.zeros(1, device="meta")) == 0


def test_jax_is_one_by_one() -> None:
    # XLA may round rows of a batch differently, and merges the launches of a program itself.
    jax = pytest.importorskip("jax")
    assert load_backend("jax").at_once(jax.numpy.zeros(1)) == 0
