"""Which modes are joined last: the choice by shapes, and that it changes nothing but the time."""

from __future__ import annotations

import pytest

from tnadapt.algebra.products import cp_groups, train_cut, tucker_last


@pytest.mark.parametrize(
    ("sizes", "expected"),
    [
        ((5, 7), (0, 1)),
        ((2000, 40, 10), (0, 1)),
        ((10, 40, 2000), (0, 2)),
        # A long mode in the middle: a batch, and the one long operand is not expanded.
        ((10, 2000, 40), (1, 2)),
        # Few columns are no batch.
        ((100, 1000, 10), (0, 1)),
        ((16, 16, 16, 16, 16), (1, 3)),
        ((0, 3, 2), (0, 2)),
    ],
)
def test_groups_of_cp(sizes: tuple[int, ...], expected: tuple[int, int]) -> None:
    assert cp_groups(sizes, 8) == expected


@pytest.mark.parametrize(
    ("sizes", "ranks", "expected"),
    [
        ((64, 64, 64), (4, 4, 4), 2),
        ((10, 2000, 40), (4, 4, 4), 1),
        ((2000, 10, 40), (4, 4, 4), 0),
        ((100, 1000, 10), (4, 4, 4), 0),
        # The small rank, not only the long mode.
        ((30, 40), (2, 39), 0),
        ((0, 3), (2, 3), 1),
    ],
)
def test_last_mode_of_tucker(sizes: tuple[int, ...], ranks: tuple[int, ...], expected: int) -> None:
    assert tucker_last(sizes, ranks) == expected


@pytest.mark.parametrize(
    ("sizes", "bonds", "expected"),
    [
        ((8, 8, 8, 8), (4, 4, 4), 2),
        ((8, 8, 8), (4, 4), 2),
        ((2000, 10, 10), (4, 4), 1),
        # A thin bond away from the middle saves more arithmetic than a balanced cut.
        ((8, 8, 8, 8), (4, 50, 2), 3),
    ],
)
def test_cut_of_trains(sizes: tuple[int, ...], bonds: tuple[int, ...], expected: int) -> None:
    assert train_cut(sizes, bonds) == expected
