"""verify: all laws hold, and a broken one is detected."""

from __future__ import annotations

import json
import math
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import tnadapt as tna
from tests.conftest import installed
from tests.support.depth import in_depth
from tests.support.references import reference
from tnadapt.algebra import products as factor_products
from tnadapt.algebra import rng
from tnadapt.algebra.init import Initializer
from tnadapt.algebra.maps import Linear
from tnadapt.backends import load_backend
from tnadapt.testing.strategies import plans
from tnadapt.testing.verification import Law, Report, relative_error, verify


@pytest.mark.law("projection-adjoint", "presets", "parameter-count")
# JAX compiles every operation for every shape, for minutes; tests/plugins verifies configs on it.
@pytest.mark.parametrize("name", in_depth(["numpy", "torch", "jax"], ["numpy", "torch"]))
def test_all_laws_hold(name: str) -> None:
    if not installed(name):
        pytest.skip(f"{name} is not installed")
    report = tna.verify(backends=[name])
    assert report.holds, str(report)
    assert {law.name for law in report.laws} >= {
        "ΔW = the method's own formula",
        "F's adjoint = its matrix transposed",
        "F = its dense matrix",
        "parameters counted = made = formula",
        "at the start ΔW is exactly 0",
        "a slice = the whole's",
        "ΔW = NumPy's",
        "draws = the known answers, whole or in pieces",
    }
    assert ("the gradient = the exact derivative" in {law.name for law in report.laws}) == (name != "numpy")


@pytest.mark.law("projection-adjoint", "update-formula")
@given(plans())
@settings(max_examples=15)
def test_any_config(plan: tna.SuperLoRA) -> None:
    layers = [plan.layout.of_weight(weight)[0].group for weight in range(len(plan.shapes))]
    report = verify(plan.config, plan.shapes, layers, backends=["numpy"])
    assert report.holds, str(report)


F = tna.presets.superlora(2, projection="nonlinear", ratio=0.3)
LORA = tna.presets.lora(2)
khatri_rao, words, small_transform = factor_products.khatri_rao, rng.words, Linear._small_transform
adjoint, delta, start = Linear.adjoint, tna.SuperLoRA.delta, Initializer.make


@pytest.mark.parametrize(
    ("place", "name", "wrong", "config", "laws"),
    [
        (tna.algebra.formats, "khatri_rao", lambda *a: khatri_rao(*a) * (1 + 1e-9), LORA,
         {"ΔW = the textbook formula"}),
        (rng, "words", lambda *a: words(*a) ^ np.uint32(1 << 31), None,
         {"draws = the known answers, whole or in pieces"}),
        (Linear, "_small_transform", lambda self, b, x: small_transform(self, b, x) * 1.000001, F,
         {"F = its dense matrix", "a slice of F = F's", "ΔW = the textbook formula"}),
        (Linear, "adjoint", lambda self, b, y: adjoint(self, b, y) * 1.000001, F,
         {"F's adjoint = its matrix transposed", "<F x, y> = <x, Fᵀ y>"}),
        (tna.SuperLoRA, "delta", lambda self, p, i: delta(self, p, 0), LORA, {"a slice = the whole's"}),
        (reference, "count", lambda *a: 1, LORA, {"parameters counted = made = formula"}),
        (Initializer, "make", lambda self, key: start(self, key) * np.float32(0), F,
         {"at the start the gradient is not 0"}),
        (Initializer, "make", lambda self, key: start(self, key) + np.float32(1), LORA,
         {"at the start ΔW is exactly 0"}),
    ],
)  # fmt: skip
def test_what_is_wrong_breaks_its_law(
    monkeypatch: pytest.MonkeyPatch, place: Any, name: str, wrong: Any, config: tna.Config | None, laws: set[str]
) -> None:
    monkeypatch.setattr(place, name, wrong)
    broken = {law.name for law in verify(config, backends=["numpy"]).laws if not law.holds}
    assert laws <= broken
    if name == "count":
        assert broken == laws


def test_what_is_no_number_never_holds() -> None:
    law = Law("x", "y", "numpy", 1, math.nan, 1e-12)
    assert not law.holds
    assert not Law("x", "y", "numpy", 0, 0.0, 1e-12).holds
    good = Law("x", "z", "numpy", 1, 0.0, 1e-12)
    report = Report((good, law))
    assert not report.holds
    assert "BROKEN: y" in str(report)
    assert "nan" in str(report)
    assert not Report(()).holds


def test_the_report_is_json_and_a_table() -> None:
    report = verify(tna.presets.lora(1), [(3, 2)], backends=["numpy"])
    again = json.loads(json.dumps(report.to_dict()))
    assert again["holds"] is True
    assert len(again["laws"]) == len(report.laws)
    assert "all laws hold" in str(report)


@given(st.integers(0, 10))
@settings(max_examples=3)
def test_the_seed_is_of_the_parameters_alone(seed: int) -> None:
    assert verify(tna.presets.lokr(1), [(4, 4)], backends=["numpy"], seed=seed).holds


def test_errors_of_arrays_of_other_shapes_are_infinite() -> None:
    assert relative_error(np.zeros(2), np.zeros(3)) == math.inf
    assert relative_error(np.zeros(0), np.zeros(0)) == 0.0


def test_bad_input() -> None:
    with pytest.raises(tna.ConfigError, match="shapes belong to a config"):
        verify(shapes=[(2, 2)])
    with pytest.raises(tna.ConfigError, match="a list of one or more names"):
        verify(backends=[])
    with pytest.raises(tna.ConfigError, match="backends must be a sequence of strings or None; got 'numpy'"):
        verify(backends="numpy")
    with pytest.raises(tna.ConfigError, match="seed must be from 0"):
        verify(tna.Config(), backends=["numpy"], seed=-1)
    with pytest.raises(tna.BackendError, match="no backend named 'nope'"):
        verify(backends=["nope"])
    with pytest.raises(tna.ConfigError, match="needs layers"):
        verify(tna.Config(groups="layer"), backends=["numpy"])


def test_a_library_without_a_device_is_said_to_be_absent(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(type(load_backend("numpy")), "usable", lambda self: False)
    report = verify(backends=["numpy"])
    assert report.absent == {"numpy": "no device to compute on"}
    assert not report.holds
    assert "numpy: not checked" in str(report)
