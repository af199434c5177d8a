"""Targets: their fields, their places in the stored array, their JSON; and no row belongs to two of them."""

from __future__ import annotations

import itertools
import json
import re
import time
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

import tnadapt as tna
from tests.support import checkpoint_files as cp
from tests.support import forge
from tnadapt import RowIndices, Rows, Target, TargetError
from tnadapt.targets.target import check_distinct

from .internals import open_checkpoint, resolve


@pytest.mark.parametrize(
    ("fields", "why"),
    [
        ({"module": 3}, "module must be a string; got 3"),
        ({"parameter": None}, "parameter must be a string; got None"),
        ({"layer": 0}, "layer must be a string; got 0"),
        ({"parameter": ""}, "parameter must be a name, such as 'weight'; got ''"),
        ({"role": "query"}, "role must be one of q, k, v, o, linear, conv, embedding; got 'query'"),
        ({"role": None}, "role must be one of q, k, v, o, linear, conv, embedding; got None"),
        ({"transposed": 1}, "transposed must be True or False; got 1"),
        ({"stored": 6}, "stored shape must be two to eight sizes; got 6"),
        ({"stored": "64"}, "stored shape must be two to eight sizes; got '64'"),
        ({"stored": {6, 4}}, "stored shape must be two to eight sizes; got {"),
        ({"stored": ()}, r"stored shape must be two to eight sizes; got \(\)"),
        ({"stored": (6,)}, r"stored shape must be two to eight sizes; got \(6,\)"),
        ({"stored": [1] * 9}, r"stored shape must be two to eight sizes; got \[1, 1, "),
        ({"stored": (6, 0)}, "a size of a stored shape must be at least 1; got 0"),
        ({"stored": (6, 2**62 + 1)}, "a size of a stored shape must be at most 4,611,686,018,427,387,904; got 46"),
        ({"stored": (6, 4.0)}, "a size of a stored shape must be an integer; got 4.0"),
        ({"stored": (6, 4, 1), "transposed": True}, r"weight must be a matrix; m\.weight has shape \(6, 4, 1\)"),
        ({"rows": 3}, r"rows must be \(start, length, stride, count\); got 3"),
        ({"rows": {0, 1, 2, 6}}, r"rows must be \(start, length, stride, count\); got {"),
        ({"rows": (0, 3, 6)}, r"rows must be \(start, length, stride, count\); got \(0, 3, 6\)"),
        ({"rows": (0, 1, 6, 1, 1)}, r"rows must be \(start, length, stride, count\); got \(0, 1, 6, 1, 1\)"),
        ({"rows": (-1, 3, 6, 1)}, r"rows of m\.weight must be at least 0; got -1"),
        ({"rows": (0, 0, 6, 1)}, r"rows of m\.weight must be at least 1; got 0"),
        ({"rows": (0, 1, 0, 1)}, r"rows of m\.weight must be at least 1; got 0"),
        ({"rows": (0, 1, 6, 0)}, r"rows of m\.weight must be at least 1; got 0"),
        ({"rows": (0, 1.0, 6, 1)}, r"rows of m\.weight must be an integer; got 1\.0"),
        ({"rows": (4, 3, 6, 1)}, r"rows 4 to 6 of 1 blocks of 6 do not fit the 6 rows of m\.weight"),
        ({"rows": (0, 1, 3, 1)}, r"rows 0 to 0 of 1 blocks of 3 do not fit the 6 rows of m\.weight"),
        ({"rows": (0, 1, 4, 2)}, r"rows 0 to 0 of 2 blocks of 4 do not fit the 6 rows of m\.weight"),
        ({"rows": (0, 1, 6, 1), "transposed": True}, r"do not fit the 4 rows of m\.weight"),
        ({"rows": RowIndices((2, 6))}, r"row 6 is not among the 6 rows of m\.weight"),
        ({"rows": RowIndices((4,)), "transposed": True}, r"row 4 is not among the 4 rows of m\.weight"),
        ({"index": 0}, r"one of the matrices of a 3-D weight; m\.weight has \(6, 4\)"),
        ({"stored": (3, 6, 4), "index": 3}, r"the index of m\.weight must be from 0 to 2; got 3"),
        ({"stored": (3, 6, 4), "index": True}, r"the index of m\.weight must be an integer; got True"),
        ({"stored": (3, 6, 4), "index": 0, "rows": (0, 1, 3, 1)}, "do not fit the 6 rows"),
        *(
            ({"stored": stored, "groups": groups}, rf"divide them; m\.weight has shape .*, and groups={groups}")
            for stored, groups in (((6, 2), 2), ((6, 2, 3), 4))
        ),
        *(
            ({"stored": (6, 2, 3), "groups": groups}, r"the groups of m\.weight must be")
            for groups in (0, 1.5, True, "2")
        ),
        ({"tied": "head.weight"}, "tied names must be a list of dotted paths; got 'head.weight'"),
        ({"tied": ("",)}, r"tied names must be a list of dotted paths; got \(''"),
        ({"tied": ("m.weight",)}, "tied names must be different ones"),
        ({"tied": ("a.weight", "a.weight")}, "tied names must be different ones"),
    ],
)  # fmt: skip
def test_wrong_fields_are_refused(fields: dict[str, Any], why: str) -> None:
    with pytest.raises(TargetError, match=why):
        Target(**{"module": "m", "stored": (6, 4), **fields})


@pytest.mark.parametrize("stored", [(1, 1), [6, 4], (2, 1, 1, 1, 1, 1, 1, 3), (np.int64(6), 2**62)])
def test_two_to_eight_sizes_are_a_stored_shape(stored: Any) -> None:
    found = Target("m", stored).stored
    assert found == tuple(stored)
    assert all(type(size) is int for size in found)


@st.composite
def targets(draw: st.DrawFn) -> tuple[Target, list[int]]:
    """A target, and the rows that it is to have by the definition."""
    count, stride = draw(st.integers(1, 3)), draw(st.integers(1, 4))
    out, transposed, stack = count * stride, draw(st.booleans()), draw(st.none() | st.integers(1, 3))
    rest = draw(st.lists(st.integers(1, 3), min_size=1, max_size=1 if transposed or stack else 3))
    start = draw(st.integers(0, stride - 1))
    length = draw(st.integers(1, stride - start))
    chosen: Rows | RowIndices = Rows(start, length, stride, count)
    rows = [block * stride + row for block, row in itertools.product(range(count), range(start, start + length))]
    if draw(st.booleans()):
        rows = sorted(draw(st.sets(st.integers(0, out - 1), min_size=1)))
        chosen = RowIndices(tuple(rows))
    stored = (rest[0], out) if transposed else (out, *rest)
    target = Target(
        draw(st.sampled_from(["", "m.n"])), stored if stack is None else (stack, *stored), "q", rows=chosen,
        transposed=transposed, index=None if stack is None else draw(st.integers(0, stack - 1)),
        tied=draw(st.sampled_from([(), ("head.weight",), ("a.b", "c.d")])),
        parameter=draw(st.sampled_from(["weight", "p"])), layer=draw(st.sampled_from(["", "3"])),
    )  # fmt: skip
    return target, rows


@given(targets())
def test_what_is_written_is_selected_and_nothing_else_changes(view: tuple[Target, list[int]]) -> None:
    target, rows = view
    stored = np.zeros(target.stored)
    matrix = 1.0 + np.arange(np.prod(target.shape)).reshape(target.shape)
    target.write(stored, matrix)
    np.testing.assert_array_equal(target.select(stored), matrix)
    assert np.count_nonzero(stored) == matrix.size
    own = stored if target.index is None else stored[target.index]
    whole = own.T if target.transposed else own.reshape(len(own), -1)
    np.testing.assert_array_equal(whole[rows], matrix)
    assert target.shape == (len(rows), whole.shape[1])
    # Rows that are all of them are none in particular.
    assert (target.rows is None) == (rows == list(range(len(whole))))
    assert target.rows is None or target.rows.indices() == rows
    if not isinstance(target.rows, RowIndices):
        block = target.block(stored)
        assert np.array_equal(block.reshape(-1, block.shape[-1]), matrix)
        assert np.array_equal(target.like_block(matrix), block)
        block[...] = -1.0
        assert np.array_equal(target.select(stored), np.full(target.shape, -1.0))
    else:
        with pytest.raises(TargetError, match=r"no view of a list of rows, as of .*: use select\(\) and write\(\)"):
            target.block(stored)


@given(targets())
def test_a_target_survives_json(view: tuple[Target, list[int]]) -> None:
    target, _ = view
    assert Target.from_list(json.loads(json.dumps(target.to_list()))) == target
    assert [one.name for one in target.tied_targets()] == list(target.tied)
    assert Target("", target.stored).name == "weight"


SETTINGS = "a target's settings must be among groups, index, layer, parameter, rows, tied, transposed; got"


@pytest.mark.parametrize(
    ("value", "message"),
    [
        ("abc", r"a target must be \[module, shape, role\] and at most its settings; got 'abc'"),
        (["a", [1, 1]], "at most its settings"),
        (["a", [1, 1], "q", {}, {}], "at most its settings"),
        (["a", [1, 1], "q", []], SETTINGS),
        (["a", [1, 1], "q", {"row": 1}], SETTINGS),
        (["m", [6, 4], "q", {"rows": {}}], "must be four integers, or indices; got {}"),
        (["m", [6, 4], "q", {"rows": {"numbers": [1]}}], "must be four integers, or indices; got {'numbers'"),
        (["m", [6, 4], "q", {"rows": {"indices": [1], "more": 2}}], "must be four integers, or indices"),
        (["m", [6, 4], "q", {"rows": {"indices": "12"}}], "must be four integers, or indices"),
        (["m", [6, 4], "q", {"rows": {"indices": []}}], "at least one integer"),
        (["m", [6, 4], "q", {"rows": {"indices": [3, 1]}}], "must increase"),
        (["m", [6, 4], "q", {"rows": {"indices": [6]}}], "row 6 is not among the 6 rows"),
    ],
)
def test_a_list_that_is_no_target_is_refused(value: Any, message: str) -> None:
    with pytest.raises(TargetError, match=message):
        Target.from_list(value)


def test_groups_are_those_of_a_convolution() -> None:
    target = Target("a", (6, 2, 3), "conv", groups=3)
    assert target.to_list() == ["a", [6, 2, 3], "conv", {"groups": 3}]
    assert Target.from_list(target.to_list()) == target
    assert "groups=3" in repr(target)
    assert "groups" not in repr(Target("a", (6, 2, 3), "conv"))


@pytest.mark.parametrize(
    ("numbers", "why"),
    [
        ((), r"a list of at least one integer; got \(\)"),
        (5, "a list of at least one integer; got 5"),
        ({5, 9}, "a list of at least one integer; got {"),
        ((5, 5), "must increase; 5 follows 5"),
        ((9, 5), "must increase; 5 follows 9"),
        ((-1,), "an index of a row must be at least 0"),
        ((1.0,), "an index of a row must be an integer; got 1.0"),
        ((True,), "an index of a row must be an integer; got True"),
    ],
)
def test_wrong_lists_of_rows_are_refused(numbers: Any, why: str) -> None:
    with pytest.raises(TargetError, match=why):
        RowIndices(numbers)


def test_labels_tell_targets_apart() -> None:
    stack = (3, 6, 4)
    found = [
        Target("m", (6, 4)), Target("m", (6, 4), rows=Rows(2, 2, 6)), Target("m", (6, 4), rows=RowIndices((4,))),
        Target("m", (6, 4), rows=RowIndices((1, 5))), Target("m", stack, index=2),
        Target("m", stack, rows=Rows(0, 1, 2, 3), index=1),
    ]  # fmt: skip
    labels = [target.label.removeprefix("m.weight") for target in found]
    assert labels == ["", "[2:4]", "[4]", "[1, …]", "[2]", "[1][0:1]"]


OVERLAP = re.compile(r"targets (\d+) and (\d+) overlap: both update row (\d+) of '.*'")
FUSED = [Target("attn.qkv", (6, 4), role, rows=Rows(start, 2, 6)) for role, start in (("q", 0), ("v", 4))]


@st.composite
def views(draw: st.DrawFn, out: int) -> Target:
    """Some rows of one parameter of so many rows."""
    stride = draw(st.sampled_from([size for size in range(1, out + 1) if out % size == 0]))
    start = draw(st.integers(0, stride - 1))
    length = draw(st.integers(1, min(3, stride - start)))
    rows = Rows(start, length, stride, out // stride)
    return draw(
        st.sampled_from([Target("a", (out, 2), rows=rows), Target("", (out, 2), parameter="a.weight", rows=rows)])
    )


def listed(*numbers: int, index: int | None = None) -> Target:
    stored = (12, 2) if index is None else (3, 12, 2)
    return Target("a", stored, rows=tna.RowIndices(numbers), index=index)


LISTS = st.sets(st.integers(0, 11), min_size=1, max_size=5).map(lambda numbers: listed(*sorted(numbers)))


@pytest.mark.law("name-clash")
@given(
    st.sampled_from([1, 2, 6, 12, 24, 60]).flatmap(lambda out: st.lists(views(out), min_size=1, max_size=4))
    | st.lists(views(12) | LISTS, min_size=2, max_size=4)
)
def test_targets_overlap_exactly_where_their_rows_do(targets: list[Target]) -> None:
    rows = [set(target.rows.indices()) if target.rows else set(range(target.shape[0])) for target in targets]
    patterns = {target.rows.stride for target in targets if isinstance(target.rows, Rows)}
    if sum(map(len, rows)) == len(set.union(*rows)) and len(patterns) < 2:
        check_distinct(targets)
        return
    with pytest.raises(tna.TargetError) as caught:
        check_distinct(targets)
    said = OVERLAP.match(str(caught.value))
    if said is None:
        assert len(patterns) > 1
        assert "in blocks of different lengths" in str(caught.value)
        return
    one, two, row = map(int, said.groups())
    assert row in rows[one] & rows[two]


def test_the_message_names_both_targets_and_their_rows() -> None:
    interleaved = Target("a", (12, 4), "q", rows=Rows(0, 2, 6, 2)), Target("a", (12, 4), "v", rows=Rows(1, 2, 6, 2))
    with pytest.raises(tna.TargetError) as caught:
        check_distinct(interleaved)
    assert str(caught.value) == (
        "targets 0 and 1 overlap: both update row 1 of 'a.weight' (0: role q, rows 0 to 1 of each of 2 blocks of 6; "
        "1: role v, rows 1 to 2 of each of 2 blocks of 6). Give each row of a weight to one target"
    )
    of_other_blocks = [interleaved[0], Target("a", (12, 4), "v", rows=Rows(7, 2, 12))]
    with pytest.raises(
        tna.TargetError, match=r"targets 0 and 1 have rows of 'a\.weight' in blocks of different lengths"
    ):
        check_distinct(of_other_blocks)


STACK = (3, 12, 2)


@pytest.mark.parametrize(
    ("one", "other"),
    [
        (FUSED[0], Target("attn.qkv", (8, 4), "v")),
        (FUSED[0], Target("attn.qkv", (4, 6), "v", transposed=True)),
        (FUSED[0], Target("attn.qkv", (6, 2, 2), "v")),
        (Target("attn.qkv", STACK, index=1), Target("attn.qkv", STACK)),
    ],
)
def test_one_parameter_described_in_two_ways(one: Target, other: Target) -> None:
    with pytest.raises(tna.TargetError, match=r"targets 0 and 1 describe 'attn\.qkv\.weight' differently"):
        check_distinct([one, other])


def test_matrices_of_one_stack_are_separate() -> None:
    check_distinct([listed(1, 2, index=0), listed(1, 2, index=1), Target("a", STACK, index=2)])
    with pytest.raises(tna.TargetError, match=r"both update row 2 of matrix 1 of 'a.weight' .*rows 2, 5; 1: .* all 12"):
        check_distinct([listed(2, 5, index=1), Target("a", STACK, index=1)])


def test_sizes_that_a_file_claims_take_no_time_and_no_memory() -> None:
    many, size = 100_000, 200_000
    heads = [Target("a", (1 << 60, 2), rows=Rows(2 * n, 1, 1 << 30, 1 << 30)) for n in range(many)]
    apart = [Target(f"a{n}", (1 << 60, 2)) for n in range(many)]
    lists = [Target("a", (4 * size, 2), rows=tna.RowIndices(tuple(range(n, 2 * size, 2)))) for n in range(2)]
    start = time.process_time()
    check_distinct([*lists, Target("a", (4 * size, 2), rows=Rows(2 * size, 2 * size, 4 * size))])
    assert time.process_time() - start < 3.0
    for targets in (heads, apart):
        check_distinct(targets)
    with pytest.raises(tna.TargetError, match="targets 99999 and 100000 overlap"):
        check_distinct([*heads, heads[-1]])
    assert time.process_time() - start < 20.0


TWICE = [Target("a.q", (4, 6), "q"), Target("a.q", (4, 6), "q")]
ALIAS = [Target("a.q", (4, 6), "q"), Target("a", (4, 6), "q", parameter="q.weight")]
SHARED = [Target("a.q", (6, 4), "q", rows=Rows(0, 4, 6)), Target("a.q", (6, 4), "v", rows=Rows(2, 4, 6))]
BAD = pytest.mark.parametrize("targets", [TWICE, ALIAS, SHARED], ids=["twice", "alias", "shared rows"])


def arrays_of(targets: list[Target]) -> dict[str, np.ndarray]:
    return tna.UpdatePlan(tna.Config(rank=1), [target.shape for target in targets]).init()


def forged(folder: Path, targets: list[Target]) -> Path:
    """An adapter file that is right in all but its targets."""
    recipe = {"version": 1, "config": {"rank": 1}, "targets": [target.to_list() for target in targets]}
    tensors = {name: ("F32", array.astype("f4")) for name, array in arrays_of(targets).items()}
    path = folder / "adapter.safetensors"
    forge.write(path, forge.adapter(recipe, tensors))
    return path


@pytest.mark.law("name-clash")
@BAD
def test_nothing_is_made_of_them_and_no_file_loaded_merged_converted_or_described(
    tmp_path: Path, targets: list[Target]
) -> None:
    message = "targets 0 and 1 overlap: both update row"
    with pytest.raises(tna.TargetError, match=message):
        tna.AdapterFile(tna.Config(rank=1), targets, arrays_of(targets))
    path = forged(tmp_path, targets)
    cp.write(tmp_path / "base", {"a.q.weight": ("F32", np.zeros(targets[0].stored, np.float32))})
    for use in (
        lambda: tna.load(path),
        lambda: tna.info(path),
        lambda: tna.merge(tmp_path / "base", path, tmp_path / "out"),
        lambda: tna.convert(path, tmp_path / "out", to="peft-lora"),
    ):
        with pytest.raises(tna.FileError, match=message):
            use()
    assert not (tmp_path / "out").exists()
    torch, tt = pytest.importorskip("torch"), pytest.importorskip("tnadapt.torch")
    model = torch.nn.ModuleDict({"a": torch.nn.ModuleDict({"q": torch.nn.Linear(*targets[0].stored[::-1])})})
    with pytest.raises(tna.FileError, match=message):
        tt.load(model, path)
    if targets is not ALIAS:  # which names no module of the model
        with pytest.raises(tna.TargetError, match=message):
            tt.attach(model, targets=targets)


def test_two_kept_parameters_with_one_place_in_the_checkpoint(tmp_path: Path) -> None:
    target = Target("bert.layer.q", (4, 6), "q")
    tensors = {"layer.q.weight": ("F32", np.zeros((4, 6), np.float32))}
    both = {"bert.norm.weight": np.zeros(2, np.float32), "norm.weight": np.ones(2, np.float32)}
    file = tna.AdapterFile(tna.Config(rank=1), [target], arrays_of([target]), kept=both)
    for name, more in (("there", {"norm.weight": ("F32", np.zeros(2, np.float32))}), ("added", {})):
        cp.write(tmp_path / name, tensors | more)
        with pytest.raises(tna.FileError, match=r"keeps both 'bert\.norm\.weight' and 'norm\.weight', which are both"):
            resolve(open_checkpoint(tmp_path / name), file)
