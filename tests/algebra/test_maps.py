"""Every map inherits the contract."""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
import pytest

from tnadapt import ConfigError
from tnadapt.algebra.maps import KINDS, MAPS, BroughtMap, Map
from tnadapt.algebra.maps._matrices import Repeat
from tnadapt.maps import (
    CenteredWavelet,
    Circulant,
    Gather,
    Scatter,
    SignGather,
    TiedElements,
    Tile,
    TorchScatter,
    Wavelet,
)
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


class _Brought(MapContract):
    def _each(self, seed: int = 3) -> Iterator[Map]:
        for found in super()._each(seed):
            assert isinstance(found, BroughtMap)
            found.bring(found.stand_in(np.random.default_rng(seed)))
            yield found


class TestTied(_Brought):
    kind = MAPS["tied"]
    settings = (TiedElements(), TiedElements(normalized=True))


class TestGivenMatrix(_Brought):
    kind = MAPS["given"]


class TestScatter(MapContract):
    kind = MAPS["scatter"]
    lengths = ((0, 5), (0, 6), (0, 64), (0, 509))
    settings = (Scatter(5), Scatter(positions=(4, 0, 2)))


class TestTorchScatter(MapContract):
    kind = MAPS["torch-scatter"]
    lengths = ((0, 5), (0, 6), (0, 64), (0, 509))
    settings = (TorchScatter(5), TorchScatter(3, seed=-1))


class TestGather(MapContract):
    kind = MAPS["gather"]
    settings = (Gather(), Gather(4))


class TestSignGather(MapContract):
    kind = MAPS["sign-gather"]
    settings = (SignGather(), SignGather(4))


class TestCenteredWavelet(MapContract):
    kind = MAPS["centered-wavelet"]
    settings = (CenteredWavelet(), CenteredWavelet("db2"), CenteredWavelet("db5"))


class TestRepeat(MapContract):
    kind = Repeat
    # More than are concatenated, too.
    lengths = ((1, 1), (3, 3), (3, 7), (4, 8), (5, 64), (2, 509))


class TestTile(MapContract):
    kind = MAPS["tile"]
    shapes = ((2, 3), (4, 6), (9, 5), (16, 16), (12, 35))
    settings = (Tile(), Tile(cols=3), Tile(rows=2), Tile(2, 2))


class TestCirculant(MapContract):
    kind = MAPS["circulant"]
    shapes = ((3, 3), (3, 6), (12, 9), (18, 3))
    settings = (Circulant(1), Circulant(3), Circulant(3, average=True))


class TestDct2(MapContract):
    kind = MAPS["dct2"]


class TestDft2(MapContract):
    kind = MAPS["dft2"]


class TestWavelet(MapContract):
    kind = MAPS["wavelet"]
    settings = (Wavelet(), Wavelet("db2"), Wavelet("db5"))


class TestPeriodicWavelet(MapContract):
    kind = MAPS["wavelet"]
    shapes = ((2, 2), (4, 6), (16, 16), (12, 34))
    settings = tuple(Wavelet(family, periodic=True) for family in ("haar", "db2", "db7"))


def test_every_map_is_tested() -> None:
    contracts = [*MapContract.__subclasses__(), *_Brought.__subclasses__()]
    tested = {contract.kind for contract in contracts if isinstance(vars(contract).get("kind"), type)}
    assert {MAPS[name] for name in MAPS.built_in} <= tested


def test_the_papers_maps_are_built_in() -> None:
    assert MAPS.built_in[: len(KINDS)] == KINDS


@pytest.mark.parametrize("name", MAPS.built_in)
def test_a_class_has_the_name_it_is_registered_under(name: str) -> None:
    assert MAPS[name].kind == name


def test_an_unknown_map() -> None:
    with pytest.raises(ConfigError, match=r"projection must be one of 'identity', .*got 'svd'.*install the plug-in"):
        MAPS.find("svd")
