"""Rules that group sibling names into an attention, shared by models in memory and checkpoints on disk."""

from __future__ import annotations

import pytest

from tnadapt.targets.roles import (
    Called,
    distinct_rows,
    main_projection,
    parse_projection_name,
    settled_names,
    unclear_children,
)
from tnadapt.targets.target import Rows


def called(*names: str) -> list[Called[str]]:
    """Names in an attention, each with a weight of its own."""
    found = []
    for name in names:
        says = parse_projection_name(name, attention=True)
        assert says is not None
        found.append((name, says, [name]))
    return found


@pytest.mark.parametrize(
    ("names", "makes"),
    [
        (("c_attn",), {"c_attn": "qkv"}),
        (("q_attn", "c_attn"), {"q_attn": "q", "c_attn": "kv"}),
        (("to_q", "to_kv"), {"to_q": "q", "to_kv": "kv"}),
        (("in_proj",), {"in_proj": "qkv"}),
        (("in_proj", "q_proj", "v_proj"), {"q_proj": "q", "v_proj": "v"}),
        (("in_proj_weight", "in_proj"), {"in_proj_weight": "qkv", "in_proj": "qkv"}),
    ],
)
def test_names_are_settled_by_those_beside_them(names: tuple[str, ...], makes: dict[str, str]) -> None:
    assert {name: says.letters for name, says, _ in settled_names(called(*names))} == makes


@pytest.mark.parametrize(
    ("found", "main"),
    [
        (["q.down", "q.linear"], ["q.linear"]),
        (["q.proj", "q.linear"], ["q.proj", "q.linear"]),  # two are called so
        (["q.deeper.proj", "q.other"], ["q.deeper.proj", "q.other"]),
        (["q"], ["q"]),
        ([], []),
    ],
)
def test_the_main_projection_of_several_weights(found: list[str], main: list[str]) -> None:
    assert main_projection(found, "q", str) == main
    # The same below the top of a model, which has no name.
    assert main_projection([name[2:] for name in found], "", str) == [name[2:] for name in main]


def test_children_that_are_unclear() -> None:
    names = ["q_proj", "k_proj", "v_gate_proj", "q_gate_proj", "k_norm"]
    inputs = called("q_proj", "k_proj")
    assert unclear_children(inputs, names, lambda name: True) == [("v_gate_proj", "v")]
    assert unclear_children(inputs, names, lambda name: name != "v_gate_proj") == []
    child, says, _ = inputs[0]
    several = [(child, says, ["q_proj.a", "q_proj.b"]), *called("v_proj")]
    assert unclear_children(several, names, lambda name: True) == [("q_proj", "q")]


def test_letters_that_share_their_rows_are_given_once() -> None:
    q, k = Rows(0, 4, 12), Rows(4, 4, 12)
    assert list(distinct_rows("qkv", {"q": q, "k": k, "v": k})) == [("q", q), ("k", k)]
    assert list(distinct_rows("qv", {"q": q})) == [("q", q)]
    assert list(distinct_rows("kv", {"k": None, "v": None})) == [("k", None)]
