"""Every format inherits the contract."""

from __future__ import annotations

from tnadapt.algebra.formats import FORMATS, make_format
from tnadapt.testing import FormatContract

globals().update(
    {f"Test_{name}": type(f"Test_{name}", (FormatContract,), {"kind": FORMATS[name]}) for name in FORMATS.built_in}
)


class TestLongCircuit(FormatContract):
    kind = FORMATS["circuit"]
    sizes = ((2, 3, 2, 4, 2, 3),)


def test_ranks_are_cut_to_what_sizes_allow() -> None:
    assert make_format("tucker", (2, 9), 4).shapes == {"core": (2, 4), "factor0": (2, 2), "factor1": (9, 4)}
    assert make_format("tucker", (2, 9), (None, 4)).shapes == {"core": (2, 4), "factor1": (9, 4)}
    assert make_format("tucker", (2, 3), (None, None)).shapes == {"core": (2, 3)}
    assert make_format("tt", (2, 9, 3), 4).shapes == {"core0": (1, 2, 2), "core1": (2, 9, 3), "core2": (3, 3, 1)}


def test_the_factor_of_the_leading_mode_starts_at_zero() -> None:
    found = {name: make_format(name, (4, 5, 6), 2).zero for name in FORMATS.built_in}
    assert found == {
        "dense": "dense", "cp": "factor0", "cp-weighted": "factor0", "tucker": "factor0", "tt": "core0",
        "cp-batched": "factor1", "circuit": "gate0",
    }  # fmt: skip
    # Of partial Tucker, that of the first mode that has one.
    assert make_format("tucker", (4, 5, 6), (None, 2, 3)).zero == "factor1"
    assert make_format("tucker", (4, 5, 6), (None, None, None)).zero == "core"
