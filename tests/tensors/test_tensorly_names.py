"""TensorLy's names: its own tests and signatures, scripts of its users, and what each keyword does or refuses."""

from __future__ import annotations

import importlib
import inspect
import re
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import tensorly

from tnadapt.errors import BackendError, ConfigError, ShapeError, UnexpectedKeywordError
from tnadapt.tensors import CPTensor, TuckerTensor
from tnadapt.tensors import tensorly as tl

from ._tensorly_suite import Case, cases, run, suite_modules
from .test_decompositions import crawling

#: TensorLy's test modules of what both have.
SHARED = {
    "decomposition.tests.test_cp", "decomposition.tests.test_tucker", "decomposition.tests.test_tt_decomposition",
    "decomposition.tests.test_tr_svd", "decomposition.tests.test_tr_als", "tests.test_core", "tests.test_cp_tensor",
    "tests.test_tucker_tensor", "tests.test_tt_tensor", "tests.test_tr_tensor", "tests.test_tt_matrix",
    "tenalg.tests.test_khatri_rao", "tenalg.tests.test_kronecker", "tenalg.tests.test_n_mode_product",
    "tenalg.tests.test_outer_product", "tenalg.tests.test_generalised_inner_product", "random.tests.test_base",
    "tenalg.tests.test_unfolding_dot_khatri_rao",
}  # fmt: skip

#: Its other test modules, with what these test.
OTHERS = {
    "decomposition.tests.test_robust_decomposition": "robust PCA",
    "decomposition.tests.test_symmetric_cp": "symmetric CP by power iteration",
    "decomposition.tests.test_parafac2": "PARAFAC2",
    "decomposition.tests.test_cp_power": "CP by power iteration",
    "decomposition.tests.test_constrained_parafac": "constraints by ADMM",
    "decomposition.tests.test_cmtf_als": "coupled matrix and tensor factorization",
    "tests.test_testing": "its assertions",
    "tests.test_backend": "its backends",
    "tests.test_preprocessing": "compression for PARAFAC2",
    "tests.test_parafac2_tensor": "PARAFAC2",
    "tenalg.tests.test_batched_tensordot": "batched tensordot",
    "tenalg.tests.test_tenalg_utils": "its private helpers",
    "tenalg.tests.test_svd": "its SVD functions",
    "tenalg.tests.test_proximal": "proximal operators",
    "tenalg.tests.test_tenalg_backend": "its backends",
}

#: Tests of the shared modules that are not run.
LEFT_OUT = {
    "test_cp.test_initialize_nn_cp": "of the private initialize_cp, with no function of ours but cp_to_tensor",
    "test_cp.test_sample_khatri_rao": "of sampling rows",
    "test_cp.test_leverage_score_indices": "of the private sampling of rows",
    "test_cp.test_randomised_parafac": "of CP by sampled rows",
    "test_cp.test_randomised_parafac_rank_deficient": "of CP by sampled rows",
    "test_cp.test_randomised_parafac_error_estimate": "of CP by sampled rows",
    "test_cp.test_randomised_parafac_invalid_arguments": "of CP by sampled rows",
    "test_tucker.test_tucker_factors_only_init_recomputes_core": "of the private initialize_tucker, to the last bit",
    "test_tr_als.test_tensor_ring_als_sampled": "of rings by sampled rows",
    "test_tr_als.test_tensor_ring_als_sampled_large_decomp": "of rings by sampled rows",
    "test_core.test_matricize": "of several modes as rows",
    "test_cp_tensor.test_cptensor_normalize_inplace": "of a method that changes its object",
    "test_cp_tensor.testvalidate_cp_rank": "of choosing ranks without decomposing",
    "test_tucker_tensor.test_n_param_tucker": "of a private count of parameters",
    "test_tucker_tensor.test_validate_tucker_rank": "of choosing ranks without decomposing",
    "test_tt_tensor.test_tt_n_param": "of a private count of parameters",
    "test_tt_tensor.test_validate_tt_rank": "of choosing ranks without decomposing",
    "test_tr_tensor.test_validate_tr_rank": "of choosing ranks without decomposing",
    "test_base.test_check_random_state": "of TensorLy's seeds",
}

#: Functions that stay TensorLy's in a test, since it assigns to a field of a result.
KEPT = {
    "test_cp.test_parafac": {"random_cp"},
    "test_tt_decomposition.test_tensor_train": {"random_tt"},
}

ALL = list(cases(sorted(SHARED)))


def test_every_test_module_of_tensorly_is_run_or_named() -> None:
    assert set(OTHERS) | SHARED == suite_modules()
    names = {case.name for case in ALL}
    assert set(LEFT_OUT) | set(KEPT) <= names


@pytest.mark.law("tensorly-conventions")
@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("case", [case for case in ALL if case.name not in LEFT_OUT], ids=str)
def test_tensorlys_own_tests_pass_with_our_functions(case: Case, monkeypatch: pytest.MonkeyPatch) -> None:
    assert run(case, monkeypatch, KEPT.get(case.name, set()))


# -- Signatures ----------------------------------------------------------------------------------

PLACES = (
    "decomposition", "decomposition._tucker", "random", "tenalg.core_tenalg", "base", "cp_tensor", "tucker_tensor",
    "tt_tensor", "tr_tensor", "tt_matrix",
)  # fmt: skip


def theirs(name: str) -> Any:
    """TensorLy's function or class of a name."""
    if name == "tt_matrix_to_tensor":
        return importlib.import_module("tensorly.tenalg.core_tenalg._tt_matrix").tt_matrix_to_tensor
    found = [getattr(importlib.import_module(f"tensorly.{place}"), name, None) for place in PLACES]
    return next(one for one in found if one is not None)


def words(function: Any) -> list[tuple[str, Any]]:
    """The arguments of a function, with their defaults."""
    return [(one.name, one.default) for one in inspect.signature(function).parameters.values()]


@pytest.mark.parametrize("name", sorted(name for name in tl.__all__ if not inspect.isclass(getattr(tl, name))))
def test_arguments_have_tensorlys_names_order_and_defaults(name: str) -> None:
    mine, other = words(getattr(tl, name)), words(theirs(name))
    assert [word for word, _ in mine] == [word for word, _ in other]
    for (word, default), (_, expected) in zip(mine, other, strict=True):
        assert default == expected, word


@pytest.mark.parametrize("name", sorted(name for name in tl.__all__ if inspect.isclass(getattr(tl, name))))
def test_classes_take_the_keywords_of_tensorlys(name: str) -> None:
    allowed = {word for word, _ in words(theirs(name).__init__)} - {"self", "rank"}
    if name == "Tucker_NN":
        allowed.remove("svd")  # which TensorLy ignores there
    made = getattr(tl, name)(2)
    assert allowed <= set(vars(made)), name
    with pytest.raises(UnexpectedKeywordError, match=f"{name} has no depth; expected "):
        getattr(tl, name)(2, depth=1)


def test_a_class_decomposes_by_its_settings() -> None:
    tensor = tl.random_cp((4, 5, 6), 2, full=True, random_state=0)
    one = tl.CP(2, n_iter_max=7, tol=0)
    assert one.fit(tensor) is one
    assert one.decomposition_.rank == 2
    assert len(one.errors_) <= 7
    assert repr(one) == "CP(rank=2)"
    assert tl.TensorTrain(rank=2).fit_transform(tensor).rank == (1, 2, 2, 1)


# -- Scripts -------------------------------------------------------------------------------------

SCRIPTS = {
    "an image": """
import numpy as np
from tensorly.decomposition import parafac, tucker
from tensorly import cp_to_tensor, tucker_to_tensor

y, x = np.mgrid[0:40, 0:50]
image = np.stack([np.sin(x / 9.0) + y / 40.0, np.cos(x * y / 300.0), np.exp(-y / 20.0)], axis=2)
weights, factors = parafac(image, rank=12, init="random", tol=1e-6, random_state=3)
core, tucker_factors = tucker(image, rank=[20, 20, 2], init="random", tol=1e-5, random_state=3)
cp_error = np.linalg.norm(cp_to_tensor((weights, factors)) - image) / np.linalg.norm(image)
tucker_error = np.linalg.norm(tucker_to_tensor((core, tucker_factors)) - image) / np.linalg.norm(image)
assert weights.shape == (12,) and [f.shape for f in factors] == [(40, 12), (50, 12), (3, 12)]
assert core.shape == (20, 20, 2)
assert cp_error < 0.3 and tucker_error < 0.5
""",
    "serology": """
import numpy as np
from tensorly.datasets.data_imports import load_covid19_serology
from tensorly.decomposition import parafac
from tensorly import cp_to_tensor

data = load_covid19_serology()
explained = []
for rank in (1, 2, 3):
    found = parafac(data.tensor, rank, tol=1e-8, n_iter_max=200, linesearch=True)
    explained.append(1.0 - np.sum((cp_to_tensor(found) - data.tensor) ** 2) / np.sum(data.tensor**2))
assert 0.4 < explained[0] < explained[1] < explained[2] < 1.0
found.factors[1][:, 0] *= -1
found.factors[2][:, 0] *= -1
assert np.isclose(1.0 - np.sum((cp_to_tensor(found) - data.tensor) ** 2) / np.sum(data.tensor**2), explained[2])
""",
    "a video": """
import numpy as np
from tensorly.decomposition import tensor_train, partial_tucker
from tensorly import tt_to_tensor
from tensorly.tenalg import multi_mode_dot

t, y, x = np.mgrid[0:12, 0:16, 0:20]
video = np.exp(-((x - 4 - t) ** 2 + (y - 8) ** 2) / 9.0)
train = tensor_train(video, rank=[1, 8, 40, 1])
assert [core.shape[1] for core in train] == [12, 16, 20]
assert train[0].shape[2] == 8 and train[1].shape[2] <= 40
assert np.linalg.norm(tt_to_tensor(train) - video) < 0.1 * np.linalg.norm(video)
(core, factors), errors = partial_tucker(video, rank=[4, 12], modes=[1, 2])
assert core.shape == (12, 4, 12) and errors[-1] < 0.1
assert np.linalg.norm(multi_mode_dot(core, factors, modes=[1, 2]) - video) < 0.1 * np.linalg.norm(video)
""",
    "counts": """
import numpy as np
from tensorly.decomposition import CP, non_negative_parafac_hals, non_negative_tucker_hals
from tensorly.random import random_cp
from tensorly.cp_tensor import cp_normalize
from tensorly import cp_to_tensor

tensor = random_cp((8, 9, 10), 3, full=True, random_state=5)
found, errors = non_negative_parafac_hals(tensor, rank=3, init="random", random_state=1, return_errors=True)
weights, factors = cp_normalize(found)
assert errors[-1] < 0.05 and all((factor >= 0).all() for factor in factors)
assert np.allclose([np.linalg.norm(factor, axis=0) for factor in factors], 1.0)
core, factors = non_negative_tucker_hals(tensor, rank=[2, 2, 2], n_iter_max=30)
assert (core >= 0).all()
fitted = CP(rank=3, n_iter_max=300, tol=1e-9).fit_transform(tensor)
assert np.linalg.norm(cp_to_tensor(fitted) - tensor) < 1e-2 * np.linalg.norm(tensor)
""",
}


def imported_from_us(script: str) -> str:
    """Change the imports of what both have; fail if none is."""

    def changed(line: re.Match[str]) -> str:
        names = [name.strip() for name in line[2].split(",")]
        mine = [name for name in names if name in tl.__all__]
        rest = [name for name in names if name not in tl.__all__]
        lines = [f"from {line[1]} import {', '.join(rest)}"] if rest else []
        return "\n".join([*lines, f"from tnadapt.tensors.tensorly import {', '.join(mine)}"] if mine else lines)

    return re.sub(r"^from (tensorly[\w.]*) import (.+)$", changed, script, flags=re.MULTILINE)


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("name", SCRIPTS)
def test_scripts_run_with_tensorlys_imports_and_with_ours(name: str) -> None:
    mine = imported_from_us(SCRIPTS[name])
    assert "from tnadapt.tensors.tensorly import" in mine
    assert not re.search(r"from tensorly\S* import .*(parafac|tucker|tensor_train|to_tensor|random_cp)", mine)
    exec(compile(SCRIPTS[name], name, "exec"), {})
    exec(compile(mine, f"{name}, ours", "exec"), {})


# -- Keywords ------------------------------------------------------------------------------------

TENSOR = np.random.default_rng(0).normal(size=(4, 5, 6))


def test_results_are_ours_with_tensorlys_weights() -> None:
    found = tl.parafac(TENSOR, 3)
    assert isinstance(found, CPTensor)
    assert (found.weights == 1.0).all()
    assert found.error == pytest.approx(np.linalg.norm(found.to_tensor() - TENSOR) / np.linalg.norm(TENSOR))
    unit, errors = tl.parafac(TENSOR, 3, normalize_factors=True, return_errors=True)
    assert np.allclose(np.linalg.norm(unit.factors[2], axis=0), 1.0)
    assert errors == list(unit.history)
    assert np.allclose(unit.to_tensor(), found.to_tensor())
    assert found.outcome is not None
    assert found.outcome.method == "ALS"


def test_a_rank_above_the_possible_is_cut_or_filled_with_zeros() -> None:
    found = tl.parafac(TENSOR, 25)
    assert found.rank == 25
    assert not found.factors[0][:, 20:].any()
    assert found.error < 1e-6
    assert tl.parafac(TENSOR, 25, normalize_factors=True).weights[20:].tolist() == [0.0] * 5
    assert tl.tucker(TENSOR, [9, 9, 9]).rank == (4, 5, 6)
    assert tl.tucker(TENSOR, [1, 5, 1]).rank == (1, 5, 1)
    assert tl.tensor_train(TENSOR, [1, 9, 9, 1]).rank == (1, 4, 6, 1)
    assert tl.tensor_train(TENSOR, 9).rank == (1, 4, 6, 1)
    assert tl.tensor_train_matrix(TENSOR.reshape(2, 2, 5, 6)[:, :, :, :], 99).rank == (1, 10, 1)


@pytest.mark.parametrize("rank", ["same", 0.5])
def test_a_share_of_the_parameters_chooses_tensorlys_ranks(rank: Any) -> None:
    assert tl.parafac(TENSOR, rank, n_iter_max=3).rank == tensorly.validate_cp_rank((4, 5, 6), rank)
    assert list(tl.tucker(TENSOR, rank).rank) == tensorly.validate_tucker_rank((4, 5, 6), rank)
    expected = np.minimum(tensorly.validate_tt_rank((4, 5, 6), rank), [1, 4, 6, 1])
    assert list(tl.tensor_train(TENSOR, rank).rank) == expected.tolist()
    assert list(tl.tensor_ring_als(TENSOR, rank, n_iter_max=2).rank) == tensorly.validate_tr_rank((4, 5, 6), rank)


def test_a_callback_gets_the_result_so_far_and_stops_the_iteration() -> None:
    seen: list[float] = []

    def callback(found: CPTensor, error: float) -> bool:
        assert np.linalg.norm(found.to_tensor() - TENSOR) == pytest.approx(error * np.linalg.norm(TENSOR), rel=1e-6)
        seen.append(error)
        return len(seen) == 4

    found = tl.parafac(TENSOR, 3, callback=callback, tol=0)
    assert seen == list(found.history)
    assert len(seen) == 4
    rings: list[Any] = []
    ring = tl.tensor_ring_als(TENSOR, 2, callback=lambda found, error: rings.append((found.rank, error)))
    assert [error for _, error in rings] == list(ring.history)
    assert rings[0][0] == (2, 2, 2, 2)
    matrices: list[float] = []
    tl.parafac(TENSOR[0], 2, callback=lambda found, error: matrices.append(error))
    assert len(matrices) == 1


def test_watching_changes_nothing_also_where_gauss_newton_goes_on(capsys: pytest.CaptureFixture[str]) -> None:
    tensor, rank = crawling(1)
    errors: list[float] = []

    def callback(found: CPTensor, error: float) -> None:
        assert np.linalg.norm(found.to_tensor() - tensor) == pytest.approx(error * np.linalg.norm(tensor), rel=1e-6)
        errors.append(error)

    plain, watched = tl.parafac(tensor, rank), tl.parafac(tensor, rank, callback=callback, verbose=True)
    assert watched.outcome.method == "ALS, Gauss-Newton"
    assert all((one == other).all() for one, other in zip(plain.factors, watched.factors, strict=True))
    assert errors == list(plain.history) == list(watched.history)
    assert len(capsys.readouterr().out.splitlines()) == len(errors)


@pytest.mark.parametrize(
    "keywords",
    [{"orthogonalise": True}, {"l2_reg": 0.1}, {"sparsity": 0.1}, {"n_iter_max": 0}, {"fixed_modes": [0]}],
    ids=lambda keywords: next(iter(keywords)),
)
def test_keywords_of_another_algorithm_run_tensorlys(keywords: dict[str, Any]) -> None:
    seen: list[Any] = []
    words = {"n_iter_max": 5, **keywords, "callback": lambda found, error: seen.append((found, error)) or None}
    found = tl.parafac(TENSOR, 2, **words)
    if "sparsity" in keywords:
        (found, sparse), (last, _) = found, seen[-1]
        assert np.count_nonzero(sparse) == 12
        assert isinstance(last[0], CPTensor)
    elif seen:
        assert isinstance(seen[-1][0], CPTensor)
    assert found.outcome.method == "TensorLy, parafac"
    assert found.error == pytest.approx(np.linalg.norm(found.to_tensor() - TENSOR) / np.linalg.norm(TENSOR))


def test_a_mask_leaves_missing_elements_out_though_they_are_nan() -> None:
    whole = tl.random_cp((5, 6, 7), 1, full=True, random_state=0)
    mask = np.random.default_rng(0).random(whole.shape) > 0.2
    holes = np.where(mask, whole, np.nan)
    for found in (
        tl.parafac(holes, 1, mask=mask, tol=1e-12, n_iter_max=300),
        tl.tucker(holes, [1, 1, 1], mask=mask, tol=1e-12, n_iter_max=300),
        tl.non_negative_parafac(holes, 1, mask=mask, tol=1e-12, n_iter_max=300),
    ):
        assert np.allclose(found.to_tensor(), whole, atol=1e-3)
        assert found.error < 1e-3
    (core, factors), _ = tl.partial_tucker(holes, [1, 1], modes=[1, 2], mask=mask, tol=1e-12, n_iter_max=300)
    assert np.allclose(tl.multi_mode_dot(core, factors, modes=[1, 2]), whole, atol=1e-3)
    with pytest.raises(ShapeError, match="pass mask="):
        tl.parafac(holes, 1)
    # Nothing is missing: our own iteration runs.
    assert tl.parafac(whole, 1, mask=np.ones(whole.shape)).outcome.method == "ALS"
    assert tl.tucker(whole, [1, 1, 1], mask=mask * 0 + 1).outcome.method.startswith("HOSVD")


@pytest.mark.parametrize("init", ["svd", "random", "given"])
@pytest.mark.parametrize(("share", "noise"), [(0.6, 0.0), (0.5, 0.1)])
def test_parafac_with_a_mask_is_no_worse_than_tensorlys(init: str, share: float, noise: float) -> None:
    rng = np.random.default_rng(0)
    whole = tl.random_cp((6, 7, 8), 2, full=True, random_state=1) + noise * rng.normal(size=(6, 7, 8))
    mask = rng.random(whole.shape) < share
    start = tl.random_cp((6, 7, 8), 2, random_state=3) if init == "given" else init

    def error(found: Any) -> float:
        left = tensorly.cp_to_tensor((found[0], found[1])) - whole
        return float(np.linalg.norm(left * mask) / np.linalg.norm(whole * mask))

    found, errors = tl.parafac(whole, 2, mask=mask, init=start, return_errors=True)
    assert (found.weights == 1.0).all()
    assert found.outcome.method == "least squares on the observed elements"
    assert errors == list(found.history)
    assert error(found) == pytest.approx(found.error, abs=1e-12)
    theirs = tensorly.decomposition.parafac(whole * mask, 2, mask=mask * 1.0, init=start, random_state=0)
    assert error(found) <= error(theirs)
    if not noise:
        assert error(found) < 1e-9


def test_parafac_with_a_mask_shows_results_and_stops(capsys: pytest.CaptureFixture[str]) -> None:
    mask = np.random.default_rng(0).random(TENSOR.shape) < 0.7
    seen: list[tuple[Any, float]] = []

    def callback(found: Any, error: float) -> bool:
        seen.append((found, error))
        return len(seen) == 3

    found = tl.parafac(TENSOR, 2, mask=mask, callback=callback, verbose=True)
    assert [len(seen), found.converged, capsys.readouterr().out.count("iteration")] == [3, False, 3]
    for made, error in seen:
        left = np.linalg.norm((made.to_tensor() - TENSOR) * mask)
        assert left == pytest.approx(error * np.linalg.norm(TENSOR * mask))
    assert found.error == pytest.approx(seen[-1][1])
    kept = tl.parafac(TENSOR, 2, mask=mask, init=found, fixed_modes=[0], n_iter_max=3)
    assert kept.outcome.method == "TensorLy, parafac"
    assert np.allclose(kept.factors[0], found.factors[0])


def test_a_random_start_is_tensorlys() -> None:
    tensor = tl.random_cp((6, 7, 8), 3, full=True, random_state=5) + 0.01 * np.random.default_rng(0).normal(
        size=(6, 7, 8)
    )
    for seed in range(3):
        start = tensorly.random.random_cp((6, 7, 8), 3, random_state=seed, normalise_factors=False)
        mine = tl.parafac(tensor, 3, init="random", random_state=seed)
        assert (mine.to_tensor() == tl.parafac(tensor, 3, init=start).to_tensor()).all()
        other = tensorly.decomposition.parafac(tensor, 3, init="random", random_state=seed)
        assert mine.error <= 1.01 * np.linalg.norm(tl.cp_to_tensor(other) - tensor) / np.linalg.norm(tensor)
    assert (
        tl.parafac(tensor, 3, init="random").weights == tl.parafac(tensor, 3, init="random", random_state=0).weights
    ).all()
    # The real start of a complex tensor, of a generator, in another library.
    assert tl.parafac(tensor * 1j, 3, init="random", random_state=np.random.default_rng(0)).error < 0.1


def test_starts_and_fixed_modes() -> None:
    start = tl.random_cp((4, 5, 6), 2, random_state=1)
    kept = tl.parafac(TENSOR, 2, init=(start.weights, start.factors), fixed_modes=[0, 2])
    assert (kept.factors[0] == start.factors[0]).all()
    assert (kept.factors[2] == start.factors[2]).all()
    same, errors = tl.parafac(TENSOR, 2, init=start, fixed_modes=[0, 1, 2], return_errors=True)
    assert (same.to_tensor() == start.to_tensor()).all()
    assert errors == []
    core, factors = tl.tucker(TENSOR, [2, 2, 2], init="random", random_state=1)
    again = tl.tucker(TENSOR, [2, 2, 2], init=(core, factors), fixed_factors=[1])
    assert (again.factors[1] == factors[1]).all()
    assert tl.tucker(TENSOR, [2, 2, 2], init=list(factors)).error <= again.error + 1e-6
    (_, begun), _ = tl.partial_tucker(TENSOR, [2, 2], modes=[0, 2], init=[factors[0], factors[2]])
    assert [one.shape for one in begun] == [(4, 2), (6, 2)]


@pytest.mark.parametrize(
    ("call", "text"),
    [
        (lambda: tl.parafac(TENSOR, 2, svd=np.linalg.svd), "svd must be one of 'truncated_svd', .* not called"),
        (lambda: tl.parafac(TENSOR, 2, cvg_criterion="x"), "cvg_criterion must be 'abs_rec_error' or 'rec_error'"),
        (lambda: tl.parafac(TENSOR, 2, init="x"), r"init must be 'svd', 'random' or \(weights, factors\)"),
        (lambda: tl.parafac(TENSOR, 2, init=3), r"init must be 'svd', 'random' or \(weights, factors\)"),
        (lambda: tl.parafac(TENSOR, 2, callback=3), "callback must be callable"),
        (lambda: tl.parafac(TENSOR, "many"), "rank must be numbers, a share of the parameters or 'same'"),
        (lambda: tl.tucker(TENSOR, 2, fixed_factors=[0]), r"fixed_factors=\[0\] .* give them as init="),
        (lambda: tl.tucker(TENSOR, 2, init="x"), "init must be 'svd', 'random'"),
        (lambda: tl.tucker(TENSOR, 2, init=(1, 2, 3)), "got a tuple of 3"),
        (lambda: tl.tucker(TENSOR, 2, init=[TENSOR[0]]), "init has 1 factors; expected 3"),
        (lambda: tl.partial_tucker(TENSOR, 2, modes=[0, 0]), "modes must be different ones"),
        (lambda: tl.partial_tucker(TENSOR, 2, modes=[0], init=[TENSOR[0]]), "the factors of init have shapes"),
        (lambda: tl.non_negative_tucker_hals(TENSOR, 2, fixed_modes=[0]), r"give init=\(core, factors\)"),
        (lambda: tl.tensor_ring(TENSOR, 3), r"multiply to 9, above 4, .* tensor_ring_als\(\)"),
        (lambda: tl.tensor_ring_als(TENSOR, 3, ls_solve="x"), "ls_solve must be 'lstsq' or 'normal_eq'"),
        (lambda: tl.tensor_train(TENSOR, [1, 2, 1]), "rank must be a number, or 4 of them of which the first"),
        (lambda: tl.tensor_ring(TENSOR, [1, 2, 1, 2]), "rank must be a number, or 4 of them of which the first"),
        (lambda: tl.random_cp((2, 3), 1, dtype="int8"), "dtype must be a real or complex floating one"),
        (lambda: tl.random_cp((2, 3), 1, colour=1), "colour is no part of a context"),
        (lambda: tl.random_cp((2, 3), 1, requires_grad=True), "requires_grad=True is not drawn"),
        (lambda: tl.partial_unfold(TENSOR, 0, 2, 1), "leave no mode"),
        (lambda: tl.partial_fold(TENSOR, 0, (2, 3)), "does not fold"),
        (lambda: tl.khatri_rao([TENSOR[0]], mask=np.ones(3)), "mask has shape"),
        (lambda: tl.batched_outer([np.ones((2, 3)), np.ones((3, 3))]), "expected the same first size"),
        (lambda: tl.cp_mode_dot((None, [np.ones((3, 1))]), np.ones(3), 0), "gives a number"),
        (lambda: tl.tucker_mode_dot((np.ones(1), [np.ones((3, 1))]), np.ones(3), 0), "gives a number"),
    ],
)  # fmt: skip
def test_what_is_refused_says_which_keyword_and_the_way_out(call: Any, text: str) -> None:
    with pytest.raises((ConfigError, ShapeError, BackendError), match=text):
        call()


def test_verbose_prints(capsys: pytest.CaptureFixture[str]) -> None:
    tl.parafac(TENSOR, 2, n_iter_max=2, verbose=True)
    tl.tucker(TENSOR, [2, 2, 2], verbose=1)
    tl.partial_tucker(TENSOR, [2, 2], modes=[0, 1], verbose=1)
    tl.tensor_train(TENSOR, 2, verbose=True)
    text = capsys.readouterr().out
    assert text.count("iteration 1, reconstruction error: ") == 3
    assert "TT factor 2 computed with shape (2, 6, 1)" in text


def test_random_tensors_are_tensorlys_numbers() -> None:
    for name, shape, rank in (
        ("random_cp", (3, 4, 5), 2), ("random_tucker", (3, 4, 5), [2, 2, 2]), ("random_tt", (3, 4, 5), 2),
        ("random_tr", (3, 4, 5), 2), ("random_tt_matrix", (2, 3, 4, 5), 2),
    ):  # fmt: skip
        mine = getattr(tl, name)(shape, rank, random_state=7, full=True)
        assert np.allclose(mine, getattr(tensorly.random, name)(shape, rank, random_state=7, full=True)), name
    assert (tl.random_tensor((2, 3), random_state=7) == tensorly.random.random_tensor((2, 3), random_state=7)).all()
    torch = pytest.importorskip("torch")
    found = tl.random_cp((3, 4), 2, random_state=0, dtype=torch.float32, device="cpu")
    assert found.factors[0].dtype == torch.float32
    assert tl.random_tt((3, 4), 2, random_state=np.random.default_rng(0), backend="torch").backend.name == "torch"


def test_the_library_is_that_of_the_arrays() -> None:
    torch = pytest.importorskip("torch")
    before = tensorly.get_backend()
    tensor = torch.from_numpy(TENSOR)
    mask = torch.from_numpy(np.random.default_rng(1).random(TENSOR.shape) > 0.1)
    found: list[Any] = [
        tl.parafac(tensor, 2), tl.parafac(tensor, 2, l2_reg=0.1), tl.parafac(tensor, 2, mask=mask, n_iter_max=5),
        tl.non_negative_parafac(tensor.abs(), 2, n_iter_max=3), tl.tucker(tensor, [2, 2, 2]),
        tl.non_negative_tucker(tensor.abs(), [2, 2, 2], n_iter_max=3), tl.tensor_train(tensor, 2),
        tl.tensor_ring(tensor, 2), tl.tensor_ring_als(tensor, 2, n_iter_max=3),
        tl.cp_mode_dot(tl.parafac(tensor, 2), torch.ones(5, dtype=torch.float64), 1),
    ]  # fmt: skip
    (core, _), _ = tl.partial_tucker(tensor, [2], modes=[1], mask=mask, n_iter_max=3)
    assert core.dtype == torch.float64
    assert {one.backend.name for one in found} == {"torch"}
    assert tl.partial_unfold(tensor, 1).shape == (4, 6, 5)
    assert tensorly.get_backend() == before


def test_parts_of_several_dtypes_are_computed_in_the_widest() -> None:
    factors = [np.ones((2, 1)) * 1j, np.ones((3, 1), np.float32)]
    assert tl.cp_to_tensor((np.ones(1, np.float32), factors)).dtype == np.complex128
    assert tl.tucker_to_tensor((np.ones((1, 1)), factors)).dtype == np.complex128
    start = (np.ones(2), [np.ones((size, 2), np.float32) for size in (4, 5, 6)])
    assert tl.parafac(TENSOR, 2, init=start, n_iter_max=3).weights.dtype == np.float64
    assert isinstance(tl.tucker_normalize((np.ones((1, 1)), factors)), TuckerTensor)
    assert tl.tucker_mode_dot((np.ones((1, 1)), factors), np.ones(3), 1, keep_dim=True).shape == (2, 1)
    assert tl.cp_mode_dot((None, factors), np.ones((4, 3)), 1).shape == (2, 4)
    assert tl.cp_mode_dot((None, factors), np.ones(3), -1, keep_dim=True).shape == (2, 1)


TRACED: dict[str, Callable[[Any], Any]] = {
    "tensor_train": lambda tensor: tl.tt_to_tensor(tl.tensor_train(tensor, [1, 2, 3, 1])),
    "tensor_train_matrix": lambda tensor: tl.tt_matrix_to_tensor(tl.tensor_train_matrix(tensor.reshape(2, 2, 5, 6), 2)),
    "tensor_ring": lambda tensor: tl.tr_to_tensor(tl.tensor_ring(tensor, 2)),
    "tucker": lambda tensor: tl.tucker_to_tensor(tl.tucker(tensor, [2, 3, 2], n_iter_max=0)),
    "partial_tucker": lambda tensor: tl.partial_tucker(tensor, [2, 3], modes=[0, 2], n_iter_max=0)[0][0],
    "cp_normalize": lambda tensor: tl.cp_to_tensor(tl.cp_normalize((None, [tensor[0], tensor[1]]))),
}


@pytest.mark.parametrize("name", TRACED)
def test_gradients_flow_and_jit_runs(name: str) -> None:
    torch, jax = pytest.importorskip("torch"), pytest.importorskip("jax")
    tensor = torch.from_numpy(TENSOR).requires_grad_()
    TRACED[name](tensor).square().sum().backward()
    assert tensor.grad.abs().sum() > 0.0
    plain = np.asarray(TRACED[name](TENSOR))
    traced = np.asarray(jax.jit(TRACED[name])(jax.numpy.asarray(TENSOR.astype("float32"))))
    assert traced.shape == plain.shape
    assert np.linalg.norm(traced) == pytest.approx(np.linalg.norm(plain), rel=0.05)
