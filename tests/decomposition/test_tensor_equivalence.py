"""Matrices that turn one tensor into another are found from far away, where least squares alone has local minima."""

from __future__ import annotations

import numpy as np
import pytest

import tnadapt as tna
from tests.support.depth import in_depth
from tnadapt.algebra.products import tucker_tensor
from tnadapt.backends import load_backend
from tnadapt.decomposition._parameter_fit import _independent
from tnadapt.decomposition._tensor_equivalence import equivalence
from tnadapt.sources import Mixed, Seeded
from tnadapt.testing.verification import examples

NUMPY = load_backend("numpy")
# Of general position, of two slices, of coinciding eigenvalues, of few classes, of other orders.
CORES = [(4, 4, 4), (3, 5, 6), (2, 5, 5), (5, 2, 5), (6, 6, 2), (3, 3, 3), (2, 3, 4), (1, 4, 4), (5, 5), (3, 4, 3, 4)]


def _error(found: list[np.ndarray], tensor: np.ndarray, wanted: np.ndarray) -> float:
    return float(np.linalg.norm(tucker_tensor(NUMPY, tensor, found) - wanted) / np.linalg.norm(wanted))


@pytest.mark.parametrize("core", CORES)
def test_mixing_matrices_of_a_frozen_core_are_recovered(core: tuple[int, ...]) -> None:
    mixed = Mixed(Seeded("uniform"))
    sizes = tuple(size + 2 for size in core)
    config = tna.Config(
        format="tucker", order=len(core), fold=sizes, groups=1, rank=core, alpha=float(2 * max(core)),
        sources={"core": Seeded("normal"), **{f"factor{mode}": mixed for mode in range(len(core))}},
    )  # fmt: skip
    plan = tna.SuperLoRA(config, [(sizes[0], int(np.prod(sizes[1:])))])
    for seed in in_depth(range(100), range(5)):
        rng = np.random.default_rng(seed)
        params = {name: np.eye(len(a)) + rng.normal(size=a.shape) for name, a in plan.init(dtype="float64").items()}
        _, report = tna.decompose(plan.deltas(params), config)
        assert report.error < 1e-5, seed


def test_tensors_of_general_position_need_one_start() -> None:
    for seed in range(20):
        rng = np.random.RandomState(seed)
        tensor = rng.normal(size=(4, 5, 6))
        wanted = tucker_tensor(NUMPY, tensor, [rng.normal(size=(size, size)) for size in tensor.shape])
        state = rng.get_state()[2]
        assert _error(equivalence(tensor, wanted, rng), tensor, wanted) < 1e-3
        assert rng.get_state()[2] == state  # no random start


def test_no_matrices_turn_a_tensor_into_one_of_another_class() -> None:
    rng = np.random.RandomState(0)
    tensor, wanted = rng.normal(size=(2, 4, 5, 5))
    found = equivalence(tensor, wanted, rng)
    assert 0.1 < _error(found, tensor, wanted) <= 1.0


def test_modes_in_which_a_tensor_has_less_than_full_rank() -> None:
    rng = np.random.RandomState(0)
    factors = [rng.normal(size=size) for size in ((3, 3), (6, 4), (5, 4))]
    tensor = tucker_tensor(NUMPY, rng.normal(size=(3, 4, 4)), factors)
    wanted = tucker_tensor(NUMPY, tensor, [rng.normal(size=(size, size)) for size in tensor.shape])
    assert _error(equivalence(tensor, wanted, rng), tensor, wanted) < 1e-3


# -- Groups ------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("name", "sets"), [("vera", [[0], [1], [2], [3]]), ("tied_lora", [[0, 1, 2, 3]])])
def test_groups_without_a_common_parameter_are_fitted_by_themselves(name: str, sets: list[list[int]]) -> None:
    config, shapes = examples()[name]
    plan = tna.SuperLoRA(config, shapes)
    assert _independent(plan) == sets
    if len(sets) > 1:
        rng = np.random.default_rng(0)
        deltas = [rng.normal(size=shape) for shape in shapes]
        params, report = tna.decompose(deltas, config)
        deltas[1:] = [np.zeros(shape) for shape in shapes[1:]]
        alone, other = tna.decompose(deltas, config)
        assert report.groups[0].error == other.groups[0].error
        for full in plan.groups[0].names.values():
            np.testing.assert_array_equal(params[full], alone[full])
        assert other.iterations < report.iterations
