"""No row of a stored parameter belongs to two targets, wherever the targets come from."""

from __future__ import annotations

import re
import time
from pathlib import Path

import numpy as np
import pytest
from hypothesis import example, given
from hypothesis import strategies as st

import tnadapt as tna
from tests.support import checkpoint_files as cp
from tests.support import forge
from tnadapt.targets.target import Rows, Target, check_distinct

from .internals import open_checkpoint, resolve

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


def runs(*rows: tuple[int, ...]) -> list[Target]:
    return [Target("a", (12, 2), rows=Rows(*one)) for one in rows]


LISTS = st.sets(st.integers(0, 11), min_size=1, max_size=5).map(lambda numbers: listed(*sorted(numbers)))


@pytest.mark.law("name-clash")
@given(
    st.sampled_from([1, 2, 6, 12, 24, 60]).flatmap(lambda out: st.lists(views(out), min_size=1, max_size=4))
    | st.lists(views(12) | LISTS, min_size=2, max_size=4)
)
# Rows 2, 3, 6, 7, … of blocks of four, and one run that wraps around the end of a block.
@example(runs((2, 2, 4, 3), (3, 2, 12)))
@example(runs((2, 2, 4, 3), (5, 2, 12)))
@example(runs((2, 2, 4, 3), (4, 3, 12)))
@example(runs((2, 2, 4, 3), (4, 2, 12), (8, 2, 12)))
# In blocks of six, rows 0 to 4 and row 1; only the first of them reaches row 3.
@example(runs((0, 5, 12), (7, 1, 12), (3, 1, 6, 2)))
@example(runs((3, 1, 6, 2), (7, 1, 12), (0, 5, 12)))
@example(runs((7, 1, 12), (3, 1, 6, 2), (0, 5, 12)))
@example(runs((0, 5, 12), (7, 1, 12), (5, 1, 6, 2)))
def test_targets_overlap_exactly_where_their_rows_do(targets: list[Target]) -> None:
    rows = [set(target.rows.indices()) if target.rows else set(range(target.shape[0])) for target in targets]
    if sum(map(len, rows)) == len(set.union(*rows)):
        check_distinct(targets)
        return
    with pytest.raises(tna.TargetError) as caught:
        check_distinct(targets)
    said = OVERLAP.match(str(caught.value))
    assert said is not None
    one, two, row = map(int, said.groups())
    assert row in rows[one] & rows[two]


def test_the_message_names_both_targets_and_their_rows() -> None:
    interleaved = Target("a", (12, 4), "q", rows=Rows(0, 2, 6, 2)), Target("a", (12, 4), "v", rows=Rows(7, 2, 12))
    with pytest.raises(tna.TargetError) as caught:
        check_distinct(interleaved)
    assert str(caught.value) == (
        "targets 0 and 1 overlap: both update row 7 of 'a.weight' (0: role q, rows 0 to 1 of each of 2 blocks of 6; "
        "1: role v, rows 7 to 8 of 12). Give each row of a weight to one target"
    )


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
    mixed = [
        Target("a", (1 << 60, 2), rows=Rows(2 * n + 1, 1, 1 << (20 + n % 4), 1 << (40 - n % 4))) for n in range(99)
    ]
    apart = [Target(f"a{n}", (1 << 60, 2)) for n in range(many)]
    lists = [Target("a", (4 * size, 2), rows=tna.RowIndices(tuple(range(n, 2 * size, 2)))) for n in range(2)]
    start = time.process_time()
    check_distinct([*lists, Target("a", (4 * size, 2), rows=Rows(2 * size, 2 * size, 4 * size))])
    assert time.process_time() - start < 3.0
    for targets in (heads, heads[:99] + mixed, apart):
        check_distinct(targets)
    with pytest.raises(tna.TargetError, match="targets 99999 and 100000 overlap"):
        check_distinct([*heads, heads[-1]])
    assert time.process_time() - start < 20.0
    strides = [Target("a", (1 << 60, 2), rows=Rows(0, 1, 1 << (8 + n), 1 << (52 - n))) for n in range(17)]
    with pytest.raises(tna.TargetError, match="blocks of 17 different lengths; at most 16 are supported"):
        check_distinct(strides)


# -- Every way in --------------------------------------------------------------------------------

TWICE = [Target("a.q", (4, 6), "q"), Target("a.q", (4, 6), "q")]
ALIAS = [Target("a.q", (4, 6), "q"), Target("a", (4, 6), "q", parameter="q.weight")]
SHARED = [Target("a.q", (6, 4), "q", rows=Rows(0, 4, 6)), Target("a.q", (6, 4), "v", rows=Rows(2, 4, 6))]
BAD = pytest.mark.parametrize("targets", [TWICE, ALIAS, SHARED], ids=["twice", "alias", "shared rows"])


def arrays_of(targets: list[Target]) -> dict[str, np.ndarray]:
    return tna.SuperLoRA(tna.Config(rank=1), [target.shape for target in targets]).init()


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
