"""Nothing that is frozen has moved, and what moves is noticed."""

from __future__ import annotations

import dataclasses

import pytest

import tnadapt as tna
from tests.frozen import names, numbers
from tests.support.depth import long_only


def test_a_sample_of_the_numbers() -> None:
    assert numbers.moved(100) == []


@long_only
def test_all_numbers() -> None:
    assert numbers.moved() == []


def test_names() -> None:
    assert names.moved(names.current(without=["tnadapt.torch.peft"])) == []  # importing PEFT takes seconds


@long_only
def test_all_names() -> None:
    assert names.moved(names.current()) == []


def test_every_preset_map_and_source_is_frozen() -> None:
    frozen = numbers.recorded()
    used = "\n".join(frozen)
    assert [name for name in tna.presets.__all__ if f"{name}(" not in used] == []
    assert [name for name in tna.maps.MAPS.built_in if name not in used] == []
    settings = [make() for name, make in numbers.settings().items() if name.startswith("source/") and name in frozen]
    sources = {type(source) for setting in settings for source in setting.config.sources.values()}
    assert {tna.sources.SOURCES[name] for name in tna.sources.SOURCES.built_in} - sources == {tna.sources.Trained}


def differences(name: str = "F/cp/stack/linear") -> list[str]:
    return numbers.differences(numbers.cases()[name], numbers.recorded()[name], {})


def test_what_moves_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    plan, save = tna.UpdatePlan, tna.save
    init, deltas, vector = plan.init, plan.deltas, plan.vector
    assert differences() == []
    with monkeypatch.context() as patch:
        patch.setattr(plan, "init", lambda *args: {name: -array for name, array in init(*args).items()})
        assert differences() == ["start"]
    with monkeypatch.context() as patch:
        patch.setattr(plan, "deltas", lambda *args: [array * (1 + 1e-10) for array in deltas(*args)])
        assert [part.split()[0] for part in differences()] == ["update"]
    with monkeypatch.context() as patch:
        patch.setattr(plan, "vector", lambda *args: vector(*args)[::-1])
        assert [part.split()[0] for part in differences()] == ["slices"]
    with monkeypatch.context() as patch:
        patch.setattr(tna, "save", lambda path, file: save(path, dataclasses.replace(file, model="other")))
        assert differences() == ["file"]
    with monkeypatch.context() as patch:
        patch.setattr(tna, "Config", lambda **options: plan(**options))
        assert differences()[0].startswith("TypeError")


def test_what_is_gone_new_or_refused_is_named() -> None:
    refuses = numbers.cases()["F/circuit/named/nonlinear"]
    assert numbers.differences(None, ([], []), {}) == ["no longer listed"]
    assert numbers.differences(numbers.cases()["F/cp/stack/linear"], None, {}) == ["not recorded"]
    assert numbers.differences(refuses, None, {}) == []
    assert numbers.differences(refuses, ([], []), {})[0].startswith("refused: ")
