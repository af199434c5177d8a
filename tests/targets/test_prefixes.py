"""Names of one model in two places that differ by a prefix."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from tnadapt.errors import TargetError
from tnadapt.targets.prefixes import Prefix, found_prefix, near_names
from tnadapt.targets.target import Target

NAMES = st.lists(st.lists(st.sampled_from("abc"), min_size=1, max_size=3).map(".".join), min_size=1, unique=True)


@given(NAMES, st.lists(st.sampled_from("xyz"), min_size=1, max_size=2).map(".".join), st.booleans())
def test_one_prefix_more_or_less_is_found(modules: list[str], prefix: str, more: bool) -> None:
    targets = [Target(module if more else f"{prefix}.{module}", (2, 3)) for module in modules]
    stored = {f"{prefix}.{module}.weight" if more else f"{module}.weight": (2, 3) for module in modules}
    found = found_prefix(targets, stored)
    assert found == (Prefix(given=f"{prefix}.") if more else Prefix(taken=f"{prefix}."))
    assert {found.target(target).name for target in targets} == set(stored)
    assert found_prefix(targets, {target.name: (2, 3) for target in targets}) == Prefix()


def test_of_several_the_shapes_tell() -> None:
    targets = [Target("layer.0.q", (2, 2))]
    stored = {"encoder.layer.0.q.weight": (2, 2), "decoder.layer.0.q.weight": (3, 3)}
    assert found_prefix(targets, stored) == Prefix(given="encoder.")
    with pytest.raises(TargetError, match="may be any of 'decoder"):
        found_prefix(targets, {**stored, "decoder.layer.0.q.weight": (2, 2)})
    two = [*targets, Target("layer.1.q", (2, 2))]
    both = {f"{part}.layer.{n}.q.weight": (2, 2) for part in ("encoder", "decoder") for n in range(2)}
    why = (
        r"^'layer\.0\.q\.weight' may be any of 'decoder\.layer\.0\.q\.weight', 'encoder\.layer\.0\.q\.weight', and "
        "it is unclear which"
    )
    with pytest.raises(TargetError, match=why):
        found_prefix(two, both)
    assert found_prefix(two, {**both, "decoder.layer.1.q.weight": (3, 3)}) == Prefix(given="encoder.")


def test_names_that_no_prefix_explains() -> None:
    targets = [Target("layer.0.q", (2, 2)), Target("layer.0.v", (2, 2))]
    stored = {"model.layer.0.q.weight": (2, 2), "other.layer.0.v.weight": (2, 2)}
    assert found_prefix(targets, stored) is None
    assert "model.layer.0.q.weight" in near_names("layer.0.q.weight", stored)
    assert near_names("layer.0.q.weight", ["zzz"]) == ""
    with pytest.raises(TargetError, match=r"does not begin with 'bert\.'"):
        Prefix(taken="bert.").target(targets[0])
