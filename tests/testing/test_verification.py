"""verify: all laws hold, and a broken one is detected."""

from __future__ import annotations

import dataclasses
import json
import math
import re
import sys
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
from tnadapt.testing import round_trips
from tnadapt.testing.strategies import plans
from tnadapt.testing.verification import Law, Report, relative_error, verify


@pytest.mark.law("projection-adjoint", "presets", "parameter-count")
# JAX compiles every operation for every shape, for minutes; tests/plugins verifies configs on it.
@pytest.mark.parametrize("name", in_depth(["numpy", "torch", "jax"], ["torch"] if installed("torch") else ["numpy"]))
def test_all_laws_hold(name: str) -> None:
    if not installed(name):
        pytest.skip(f"{name} is not installed")
    report = tna.verify(backends=[name], deep=True)
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
        "error ≤ max_error",
        "a tensor of these ranks is recovered",
    }
    assert ("the gradient = the exact derivative" in {law.name for law in report.laws}) == (name != "numpy")


@pytest.mark.law("projection-adjoint", "update-formula")
@given(plans())
@settings(max_examples=15)
def test_any_config(plan: tna.UpdatePlan) -> None:
    layers = [plan.layout.of_weight(weight)[0].group for weight in range(len(plan.shapes))]
    report = verify(plan.config, plan.shapes, layers, backends=["numpy"])
    assert report.holds, str(report)


F = tna.presets.superlora(2, projection="nonlinear", ratio=0.3)
LORA = tna.presets.lora(2)
khatri_rao, words, small_transform = factor_products.khatri_rao, rng.words, Linear._small_transform
adjoint, delta, start = Linear.adjoint, tna.UpdatePlan.delta, Initializer.make
tensor_of, deltas_of = tna.tensors.TuckerTensor.to_tensor, tna.AdapterFile.deltas


def converted_wrongly(source: Any, *arguments: Any, **settings: Any) -> Any:
    if isinstance(source, tna.AdapterFile):
        arrays = {name: array * 1.00001 for name, array in source.arrays.items()}
        source = dataclasses.replace(source, arrays=arrays)
    return tna.convert(source, *arguments, **settings)


@pytest.mark.parametrize(
    ("place", "name", "wrong", "config", "laws"),
    [
        (tna.algebra.formats, "khatri_rao", lambda *a: khatri_rao(*a) * (1 + 1e-9), LORA,
         {"ΔW = the textbook formula"}),
        (rng, "words", lambda *a: words(*a) ^ np.uint32(1 << 31), ["library"],
         {"draws = the known answers, whole or in pieces"}),
        (Linear, "_small_transform", lambda self, b, x: small_transform(self, b, x) * 1.000001, F,
         {"F = its dense matrix", "a slice of F = F's", "ΔW = the textbook formula"}),
        (Linear, "adjoint", lambda self, b, y: adjoint(self, b, y) * 1.000001, F,
         {"F's adjoint = its matrix transposed", "<F x, y> = <x, Fᵀ y>"}),
        (tna.UpdatePlan, "delta", lambda self, p, i: delta(self, p, 0), LORA, {"a slice = the whole's"}),
        (reference, "count", lambda *a: 1, LORA, {"parameters counted = made = formula"}),
        (Initializer, "make", lambda self, key: start(self, key) * np.float32(0), F,
         {"at the start the gradient is not 0"}),
        (Initializer, "make", lambda self, key: start(self, key) + np.float32(1), LORA,
         {"at the start ΔW is exactly 0"}),
        (tna.tensors.TuckerTensor, "to_tensor", lambda self: tensor_of(self) * 1.00001, ["decompositions"],
         {"a decomposition's tensor = TensorLy's", "a tensor of these ranks is recovered"}),
        (tna.tensors.TuckerTensor, "bound", 1.0, ["decompositions"], {"a bound on the error ≤ the error"}),
        (tna.tensors.TuckerTensor, "bound", math.nan, ["decompositions"], {"a bound on the error ≤ the error"}),
        (tna.AdapterFile, "deltas", lambda self: [x * 1.00001 for x in deltas_of(self)], ["conversion"],
         {"ΔW of a file read back"}),
        (round_trips, "convert", converted_wrongly, ["conversion"], {"ΔW of a file = the other library's formula"}),
        (tna.UpdatePlan, "delta", lambda *_: 1 / 0, ["lora"], {"no exception is raised"}),
    ],
)  # fmt: skip
def test_what_is_wrong_breaks_its_law(
    monkeypatch: pytest.MonkeyPatch,
    place: Any,
    name: str,
    wrong: Any,
    config: tna.Config | list[str] | None,
    laws: set[str],
) -> None:
    monkeypatch.setattr(place, name, wrong)
    chosen = {"only": config} if isinstance(config, list) else {"config": config}
    broken = {law.name for law in verify(**chosen, backends=["numpy"]).laws if not law.holds}
    assert laws <= broken
    if name == "count":
        assert broken == laws


def test_what_is_no_number_never_holds() -> None:
    broken, good = Law("x", "y", "numpy", 1, math.nan, 1e-12), Law("x", "z", "numpy", 1, 0.0, 1e-12)
    assert not broken.holds
    assert not Law("x", "y", "numpy", 0, 0.0, 1e-12).holds
    report = Report((good, broken))
    assert not report.holds
    assert "BROKEN: y" in str(report)
    assert "nan" in str(report)
    assert not Report(()).holds


def test_a_failure_says_what_failed_and_how_to_see_it_again(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tna.UpdatePlan, "delta", lambda self, p, i: delta(self, p, 0))
    lines = str(verify(backends=["numpy"], seed=7, only=["lora", "lora, start=random"])).split("\n")
    law = next(line for line in lines if line.startswith("  a slice = the whole's"))
    assert re.fullmatch(r"  a slice = the whole's: error \d\.\de\+00, allowed 1e-12 \(weights 12x8\*4\)", law)
    assert lines[lines.index(law) - 1] == "lora on numpy with seed 7 breaks"
    assert lines[lines.index(law) + 1] == "  to reproduce: tnadapt verify --only lora --backend numpy --seed 7"
    assert "  to reproduce: tnadapt verify --only 'lora, start=random' --backend numpy --seed 7" in lines
    monkeypatch.setattr(tna.UpdatePlan, "delta", lambda *_: [][0])
    assert "(IndexError: list index out of range)" in str(verify(backends=["numpy"], only=["lora"]))
    monkeypatch.setattr(tna.UpdatePlan, "delta", lambda self, p, i: delta(self, p, 0))
    report = verify(LORA, [(3, 2), (3, 2)], layers=[0, 1], backends=["numpy"], seed=3)
    (call,) = (line.removeprefix("  to reproduce: ") for line in str(report).split("\n") if "to reproduce" in line)
    assert eval(call, {"tnadapt": tna, "Config": tna.Config}).laws == report.laws


def test_a_report_has_versions_and_many_failures_are_counted() -> None:
    laws = tuple(Law("x", str(number), "numpy", 1, 1.0, 0.0) for number in range(7))
    assert "and 2 more" in str(Report(laws)).split("\n")
    versions = verify(backends=["numpy"], only=["conversion"]).to_dict()["versions"]
    assert versions["tnadapt"] == tna.__version__
    assert {"Python", "numpy", "tensorly"} <= versions.keys()


def test_without_deep_a_library_that_compiles_is_checked_for_less(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys.modules[verify.__module__], "_COMPILING", ("numpy",))
    lines: list[str] = []
    report = verify(backends=["numpy"], progress=lines.append)
    assert lines == [
        "numpy, operations", "numpy, presets: lora, 1 of 2", "numpy, presets: superlora, 2 of 2", "conversion",
    ]  # fmt: skip
    assert report.holds
    assert {law.subject for law in report.laws} == {"library", "lora", "superlora", "conversion"}


@given(st.integers(0, 10))
@settings(max_examples=3)
def test_the_seed_is_of_the_parameters_alone_and_the_report_is_json_and_a_table(seed: int) -> None:
    report = verify(tna.presets.lokr(1), [(4, 4)], backends=["numpy"], seed=seed)
    again = json.loads(json.dumps(report.to_dict()))
    assert again["holds"] is True
    assert len(again["laws"]) == len(report.laws)
    assert "all laws hold" in str(report)


def test_errors_of_arrays_of_other_shapes_are_infinite() -> None:
    assert relative_error(np.zeros(2), np.zeros(3)) == math.inf
    assert relative_error(np.zeros(0), np.zeros(0)) == 0.0


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        ({"shapes": [(2, 2)]}, tna.ConfigError, "shapes belong to a config"),
        ({"backends": []}, tna.ConfigError, "a list of one or more names"),
        ({"backends": "numpy"}, tna.ConfigError, "backends must be a sequence of strings or None; got 'numpy'"),
        ({"config": tna.Config(), "backends": ["numpy"], "seed": -1}, tna.ConfigError, "seed must be at least 0"),
        ({"backends": ["nope"]}, tna.BackendError, "no backend named 'nope'"),
        ({"config": tna.Config(groups="layer"), "backends": ["numpy"]}, tna.ConfigError, "needs layers"),
        ({"config": tna.Config(), "deep": True}, tna.ConfigError, "deep and only choose checks of the library"),
        ({"only": ["lorra"]}, tna.ConfigError, "only must name some of 'library', 'decompositions', .*; got 'lorra'"),
        ({"only": []}, tna.ConfigError, r"only must name some of 'library', .*; got \[\]"),
    ],
)
def test_bad_input(arguments: dict[str, Any], error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        verify(**arguments)


def test_conversion_alone_is_checked_with_numpy() -> None:
    pytest.importorskip("torch")
    with pytest.raises(
        tna.ConfigError, match="there is nothing to check: conversion is checked with the backend 'numpy'"
    ):
        verify(only=["conversion"], backends=["torch"])


def test_a_library_without_a_device_is_said_to_be_absent(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(type(load_backend("numpy")), "usable", lambda self: False)
    report = verify(backends=["numpy"])
    assert report.absent == {"numpy": "no device to compute on"}
    assert not report.holds
    assert "numpy: not checked" in str(report)
