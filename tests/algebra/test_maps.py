"""Every map inherits the contract."""

from __future__ import annotations

import pytest

from tnadapt import ConfigError
from tnadapt.algebra.maps import MAPS
from tnadapt.testing import MapContract


class TestIdentity(MapContract):
    kind = MAPS["identity"]


class TestShuffle(MapContract):
    kind = MAPS["shuffle"]


class TestLinear(MapContract):
    kind = MAPS["linear"]


class TestLinearV2(MapContract):
    kind = MAPS["linear_v2"]


class TestNonlinear(MapContract):
    kind = MAPS["nonlinear"]


class TestNonlinearV2(MapContract):
    kind = MAPS["nonlinear_v2"]


class TestOneHot(MapContract):
    kind = MAPS["one-hot"]


class TestSignedOneHot(MapContract):
    kind = MAPS["signed-one-hot"]


class TestNormal(MapContract):
    kind = MAPS["normal"]


def test_every_map_is_tested() -> None:
    tested = {
        contract.kind for contract in MapContract.__subclasses__() if isinstance(vars(contract).get("kind"), type)
    }
    assert {MAPS[name] for name in MAPS.built_in} <= tested


@pytest.mark.parametrize("name", MAPS.built_in)
def test_a_class_has_the_name_it_is_registered_under(name: str) -> None:
    assert MAPS[name].kind == name


def test_an_unknown_map() -> None:
    with pytest.raises(ConfigError, match=r"projection must be one of 'identity', .*got 'svd'.*install the plug-in"):
        MAPS.find("svd")
