"""Files of populations: exact, equal to a reference, read by member, and refused if damaged."""

from __future__ import annotations

import copy
import dataclasses
import hashlib
import json
import pickle
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import safetensors.numpy
from hypothesis import given
from hypothesis import strategies as st

import tnadapt as tna
from tests.conftest import peak_of
from tests.support import forge
from tnadapt import AdapterFile, BackendError, Config, ConfigError, FileError, PopulationFile, ShapeError, UpdatePlan
from tnadapt.algebra.composite import CompositeConfig
from tnadapt.checkpoints.fingerprint import fingerprint

from .test_adapter_file import SHAPES, TARGETS, arrays_of, made, round_to_bfloat16

NAMES = ["ann", None, "größe 7", "user-0000000000000001"]
ITEM = {"F64": 8, "F32": 4, "F16": 2, "BF16": 2}


def kept() -> dict[str, np.ndarray]:
    """Parameters whose bytes end at an odd position."""
    return {"head": np.ones((3, 2), np.float32), "steps": np.array([1, 2, 3], np.uint8)}


def member(case: str, seed: int = 0) -> AdapterFile:
    """One of the members of a case, which differ in their arrays alone."""
    if case == "bfloat16":
        arrays = {name: round_to_bfloat16(array) for name, array in arrays_of(Config(rank=2), seed=seed).items()}
        return made(arrays=arrays, dtypes=dict.fromkeys(arrays, "bfloat16"), kept=kept())
    if case in ("float64", "float16"):
        return made(Config(rank=1), arrays=arrays_of(Config(rank=1), case, seed))
    if case == "unaligned":
        base = fingerprint([np.ones(shape, np.float32) for shape in SHAPES], "float32")
        return made(arrays=arrays_of(Config(rank=2), seed=seed), kept=kept(), base=base, model="Vît", activation="gelu")
    config: Any = {
        "lora": Config(rank=2),
        "theta": tna.presets.unilora(7, 2),
        "projection": tna.presets.superlora(1, projection="linear", ratio=0.5, seed=9),
        "parts": CompositeConfig([(Config(rank=1), 2), (Config(rank=2), 1)]),
        "magnitude": tna.presets.dora(1),
        "given": tna.presets.lora(1, start="given"),
    }[case]
    fixed = {}
    if case == "given":
        plan = UpdatePlan(config, SHAPES)
        fixed = {name: np.full(shape, 0.5, np.float32) for name, shape in plan.start_shapes.items()}
    return made(config, arrays=arrays_of(config, seed=seed), given=fixed)


CASES = (
    "lora", "float64", "float16", "bfloat16", "unaligned", "theta", "projection", "parts", "magnitude", "given",
)  # fmt: skip


def members(case: str = "lora", count: int = 4) -> list[AdapterFile]:
    return [member(case, seed) for seed in range(count)]


def saved(path: Path, files: Sequence[AdapterFile], names: Sequence[str | None] | None = None) -> Path:
    tna.save(path, PopulationFile.from_members(files, names))
    return path


def alone(file: AdapterFile, path: Path) -> bytes:
    tna.save(path, file)
    return path.read_bytes()


def row_of(file: AdapterFile, tag: str, name: str | None, width: int) -> bytes:
    """A row, by the specification."""
    numbers = b""
    for key in UpdatePlan(file.config, SHAPES).param_shapes:
        array = file.arrays[key]
        bits = array.view(np.uint32) >> 16 if tag == "BF16" else array
        numbers += np.asarray(bits, forge.NUMPY[tag]).tobytes()
    return forge.row(numbers, (name or "").encode().ljust(width, b"\0"))


def reference(
    files: Sequence[AdapterFile], names: Sequence[str | None], folder: Path, changes: Mapping[str, Any] | None = None
) -> bytes:
    """The bytes of a population's file, by the specification, from the file of its first member alone."""
    recipe, tensors = forge.parsed(alone(files[0], folder / "alone.safetensors"))
    shapes = UpdatePlan(files[0].config, SHAPES).param_shapes
    tag = next(tensors[name][0] for name in shapes)
    width = max(-(-len((name or "").encode()) // 8) * 8 for name in names)
    count = sum(tensors[name][1].size for name in shapes)
    about = {"parameters": count, "dtype": tag, "name_bytes": width}
    recipe |= {"version": 3, "population": about, **(changes or {})}
    shared = {name: tensor for name, tensor in tensors.items() if name not in shapes}
    rows = b"".join(row_of(file, tag, name, width) for file, name in zip(files, names, strict=True))
    return forge.population(recipe, shared, rows, len(files))


def same_arrays(population: PopulationFile, files: Sequence[AdapterFile]) -> None:
    """A population has the arrays of these files, to the bit."""
    assert len(population) == len(files)
    for name, stacked in population.arrays.items():
        assert [array.tobytes() for array in stacked] == [file.arrays[name].tobytes() for file in files]


# -- Round trips -------------------------------------------------------------------------------------------------------


@pytest.mark.law("file-round-trip", "independent-readers")
@pytest.mark.parametrize("case", CASES)
def test_the_bytes_are_those_of_the_specification_and_members_those_of_their_files(tmp_path: Path, case: str) -> None:
    files = members(case)
    path = saved(tmp_path / "population.safetensors", files, NAMES)
    assert path.read_bytes() == reference(files, NAMES, tmp_path)
    loaded = tna.load(path)
    assert loaded.names == NAMES
    assert (loaded.config, loaded.targets, loaded.num_parameters) == (
        files[0].config, files[0].targets, files[0].num_parameters,
    )  # fmt: skip
    same_arrays(loaded, files)
    for number, (file, name) in enumerate(zip(files, NAMES, strict=True)):
        expected = alone(file, tmp_path / "one.safetensors")
        assert alone(loaded[number], tmp_path / "two.safetensors") == expected
        if name is not None:
            assert alone(loaded[name], tmp_path / "two.safetensors") == expected
    some = tna.load(path, members=["größe 7", 0])
    same_arrays(some, [files[2], files[0]])
    assert some.names == ["größe 7", "ann"]
    # Saved again, it is the same file.
    tna.save(tmp_path / "again.safetensors", loaded)
    assert (tmp_path / "again.safetensors").read_bytes() == path.read_bytes()


def test_frozen_arrays_that_are_drawn_are_in_the_rows(tmp_path: Path) -> None:
    plan = UpdatePlan(Config(rank=2), SHAPES)
    trained = [name for name in plan.param_shapes if name.endswith("factor0")]
    files = [made(arrays=plan.init(), trained=trained), made(trained=trained)]
    path = saved(tmp_path / "population.safetensors", files)
    loaded = tna.load(path)
    assert loaded.num_parameters == files[0].num_parameters < loaded.plan.num_parameters
    for file, one in zip(files, loaded, strict=True):
        assert alone(one, tmp_path / "two.safetensors") == alone(file, tmp_path / "one.safetensors")


def test_members_may_train_more_arrays_than_a_header_has_tensors(tmp_path: Path) -> None:
    targets = [tna.Target(f"blocks.{number}", (2, 2), "q") for number in range(600)]
    plan = UpdatePlan(Config(rank=1), [(2, 2)] * 600)
    trained = tuple(plan.param_shapes)[:-1]
    file = AdapterFile(plan.config, targets, plan.init(), trained=trained)
    loaded = tna.load(saved(tmp_path / "population.safetensors", [file]))
    assert loaded.shared.trained == trained
    same_arrays(loaded, [file])


def test_it_is_a_sequence_of_adapters_with_their_own_arrays(tmp_path: Path) -> None:
    path = saved(tmp_path / "population.safetensors", members(), NAMES)
    loaded = tna.load(path)
    assert repr(loaded) == "PopulationFile(4 members of 58 parameters)"
    assert repr(loaded.select([2])) == "PopulationFile(1 member of 58 parameters)"
    assert [type(one) for one in loaded] == [AdapterFile] * 4
    assert (loaded.dtype, loaded.plan.num_parameters) == ("float32", 58)
    first = loaded[0]
    for array in first.arrays.values():
        array += 1.0
    assert not np.array_equal(first.deltas()[0], loaded[0].deltas()[0])
    with pytest.raises(ValueError, match="read-only"):
        next(iter(loaded.arrays.values()))[0] = 0.0
    for copied in (copy.deepcopy(loaded), pickle.loads(pickle.dumps(loaded))):
        same_arrays(copied, members())


def test_arrays_are_views_of_the_file_where_that_is_possible(tmp_path: Path) -> None:
    def views(case: str) -> bool:
        arrays = tna.load(saved(tmp_path / case, members(case))).arrays
        return all(array.base is not None and not array.flags.c_contiguous for array in arrays.values())

    assert views("lora")
    assert views("float16")
    aligned = tna.load(saved(tmp_path / "unaligned", members("unaligned"))).arrays
    assert all(array.flags.aligned for array in aligned.values())
    big = 1 << 12
    ones = {name: np.ones((big, *shape), np.float32) for name, shape in member("lora").plan.param_shapes.items()}
    tna.save(tmp_path / "big", PopulationFile(member("lora"), ones))
    loaded = tna.load(tmp_path / "big")
    assert peak_of(lambda: loaded.arrays) < 4 * 58 * 4 * big  # the rows are checked in pieces
    assert peak_of(lambda: tna.load(tmp_path / "big", members=[7])) < 1 << 18


def test_other_readers_open_it(tmp_path: Path) -> None:
    path = saved(tmp_path / "population.safetensors", members("unaligned"), NAMES)
    tensors = safetensors.numpy.load_file(path)
    assert set(tensors) == {"kept.head", "kept.steps", "members"}
    assert tensors["members"].shape == (4, 58 * 4 + 24 + 8)


def test_a_header_without_room_gets_it_by_an_append(tmp_path: Path) -> None:
    path = saved(tmp_path / "population.safetensors", members("lora"), NAMES)
    with safetensors.safe_open(path, "np") as file:
        metadata = file.metadata()
    safetensors.numpy.save_file(safetensors.numpy.load_file(path), path, metadata)
    assert b'"shape":[4,264]' in path.read_bytes()
    same_arrays(tna.load(path), members())
    tna.append(path, member("lora", 4), "last")
    again = saved(tmp_path / "again.safetensors", members(count=5), [*NAMES, "last"])
    assert path.read_bytes() == again.read_bytes()


def test_the_numbers_that_change_are_in_the_first_bytes(tmp_path: Path) -> None:
    contents = [saved(tmp_path / str(count), members(count=count)).read_bytes() for count in (1, 3)]
    length = int.from_bytes(contents[0][:8], "little")
    assert length == int.from_bytes(contents[1][:8], "little")
    assert contents[0][512 : 8 + length] == contents[1][512 : 8 + length]
    assert contents[0][8:].startswith(b'{"members":{"dtype":"U8","shape":[1                   ,240],"data_offsets":[0,')


def test_a_member_is_read_without_the_others(tmp_path: Path) -> None:
    files = members()
    path = saved(tmp_path / "population.safetensors", files, ["a", "b", "c", "d"])
    content = bytearray(path.read_bytes())
    rows = 4 * 58 + 8 + 8
    for number in (0, 1, 3):  # damage the numbers of the others
        at = len(content) - (4 - number) * rows
        content[at : at + 200] = b"\xff" * 200
    path.write_bytes(content)
    same_arrays(tna.load(path, members=[2]), [files[2]])
    same_arrays(tna.load(path, members=["c"]), [files[2]])
    with pytest.raises(FileError, match=r"population.safetensors: member 1 \('b'\) is damaged: its bytes do not match"):
        tna.load(path, members=[2, 1])
    with pytest.raises(FileError, match=r"^[^:]*population.safetensors: member 0 \('a'\) is damaged"):
        _ = tna.load(path).arrays


# -- What is refused ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("which", "why"),
    [
        ([4], "members must be from 0 to 3; got 4"),
        ([0, -1], "members must be from 0 to 3; got -1"),
        ([True], "members must be a sequence of integers or strings or None; got [True]"),
        ([1.0], "members must be a sequence of integers or strings or None; got [1.0]"),
        (3, "members must be a sequence of integers or strings or None; got 3; for one, members=[3]"),
        ("ann", "members must be a sequence of integers or strings or None; got 'ann'; for one, members=['ann']"),
        ([], "members is empty: give the number or name of at least one"),
        (["bob"], "members: there is no member 'bob'; the names are 'ann', 'größe 7', 'user-0000000000000001'; "),
        ([""], "members: there is no member ''"),
        (["a\ud800"], "members: there is no member 'a\\ud800'"),
        ([1, 1], "members has member 1 twice; name each once"),
        ([0, "ann"], "members has member 0 twice, as 0 and 'ann'; name each once"),
    ],
)
def test_members_that_are_not_there(tmp_path: Path, which: Any, why: str) -> None:
    path = saved(tmp_path / "population.safetensors", members(), NAMES)
    with pytest.raises(tna.TnadaptError) as caught:
        tna.load(path, members=which)
    assert why in str(caught.value)
    assert isinstance(caught.value, FileError) == str(caught.value).startswith(f"{path}: ")


@pytest.mark.parametrize(
    ("which", "why"),
    [
        (4, "which must be from 0 to 3; got 4"), (-1, "which must be from 0 to 3; got -1"),
        (True, "which must be an integer or a name; got True"), (1.5, "which must be an integer or a name; got 1.5"),
        ("bob", "which: there is no member 'bob'; the members have no names; numbers are from 0 to 3"),
        (slice(2), "which must be an integer or a name; got slice"),
    ],
)  # fmt: skip
def test_a_member_that_is_not_there(which: Any, why: str) -> None:
    with pytest.raises(ConfigError) as caught:
        PopulationFile.from_members(members())[which]
    assert why in str(caught.value)


@pytest.mark.parametrize(
    ("names", "why"),
    [
        (["a"], "names must have a name, or None, for each of the 2 members; got 1"),
        (["a", ""], "names[1] must be printable text of 1 to 256 bytes in UTF-8; got ''"),
        (["a", "b\n"], "names[1] must be printable text of 1 to 256 bytes in UTF-8; got 'b\\n'"),
        (["a", "\u202e"], "names[1] must be printable text"),
        (["a", "\ud800"], "names[1] must be printable text"),
        (["ä" * 129, "a"], "names[0] must be printable text of 1 to 256 bytes"),
        (["a", "a"], "names has 'a' twice; members must have different names"),
        (["a", 3], "names must be a sequence of strings or None"),
        ("ab", "names must be a sequence of strings or None"),
    ],
)
def test_names_that_are_none(tmp_path: Path, names: Any, why: str) -> None:
    with pytest.raises(ConfigError) as caught:
        PopulationFile.from_members(members(count=2), names)
    assert why in str(caught.value)
    longest = ["ä" * 128, "\N{GRINNING FACE}"]
    assert tna.load(saved(tmp_path / "long", members(count=2), longest)).names == longest


def stacked(**changes: Any) -> dict[str, Any]:
    arrays = {name: np.stack([file.arrays[name] for file in members()]) for name in member("lora").arrays}
    return {**arrays, **{name.replace("__", "."): array for name, array in changes.items()}}


FIRST = "group0__split0__factor0"


@pytest.mark.parametrize(
    ("error", "change", "why"),
    [
        (ShapeError, {"more": np.ones(4)}, "missing or unknown: 'more'"),
        (ShapeError, {FIRST: np.ones((3, 6, 2), "f4")}, "arrays['group0.split0.factor1'] has shape (4, 4, 2); for 3"),
        (ShapeError, {FIRST: np.ones((4, 2, 6), "f4")}, "has shape (4, 2, 6); for 4 members, expected (4, 6, 2)"),
        (BackendError, {FIRST: np.ones((4, 6, 2))}, "has dtype float64; that of the members is float32"),
        (ConfigError, {FIRST: np.ones((0, 6, 2), "f4")}, "the number of members must be at least 1; got 0"),
        (ConfigError, {FIRST: np.float32(1)[...]}, "the number of members must be at least 1; got 0"),
        (ShapeError, {FIRST: np.full((4, 6, 2), np.nan, "f4")}, "of member 0 holds NaN or infinity; expected finite"),
    ],
)
def test_arrays_that_are_none(error: type[Exception], change: Any, why: str) -> None:
    with pytest.raises(error) as caught:
        PopulationFile(member("lora"), stacked(**change))
    assert why in str(caught.value)


def test_bfloat16_is_not_rounded_silently() -> None:
    file = member("bfloat16")
    arrays = {name: np.full((2, *array.shape), 1.0 + 2.0**-20, np.float32) for name, array in file.arrays.items()}
    with pytest.raises(BackendError, match="has values that bfloat16 cannot represent; round them"):
        PopulationFile(file, arrays)


OTHERS: list[tuple[dict[str, Any], str]] = [
    ({"config": Config(rank=2, seed=1)}, "in config (seed: 1 and 0)"),
    ({"targets": (dataclasses.replace(TARGETS[0], module="x"), *TARGETS[1:])}, "in targets (Target("),
    ({"activation": "relu"}, "in activation ('relu' and None)"),
    ({"model": "ViT"}, "in model ('ViT' and '')"),
    ({"kept": {"head": np.ones(2)}}, "in kept ('head' not in the population)"),
    ({"trained": ["group0.split0.factor0"]}, "in trained (('group0.split0.factor0',) and None)"),
    ({"arrays": arrays_of(Config(rank=2), "float64")}, "in dtype ('float64' and 'float32')"),
]


@pytest.mark.parametrize(("fields", "why"), OTHERS)
def test_members_that_differ_in_more_than_their_arrays(tmp_path: Path, fields: dict[str, Any], why: str) -> None:
    other = made(fields.get("config", Config(rank=2)), **{key: fields[key] for key in fields if key != "config"})
    path = saved(tmp_path / "population.safetensors", members())
    before = path.read_bytes()
    for change in (lambda: tna.append(path, other), lambda: tna.replace(path, 0, other)):
        with pytest.raises(FileError) as caught:
            change()
        assert str(caught.value).startswith(f"{path}: the member differs from the population ")
        assert why in str(caught.value)
        assert "give the arrays as a mapping if they are what is meant" in str(caught.value)
    with pytest.raises(ConfigError, match=r"members\[1\] differs from members\[0\] in "):
        PopulationFile.from_members([member("lora"), other])
    assert path.read_bytes() == before


def test_kept_and_given_arrays_must_be_equal() -> None:
    for case, field in (("unaligned", "kept"), ("given", "given")):
        file = member(case)
        name = next(iter(getattr(file, field)))
        other = dataclasses.replace(file, **{field: {**getattr(file, field), name: getattr(file, field)[name] + 1}})
        with pytest.raises(ConfigError, match=rf"differs from members\[0\] in {field} \('{name}'\)"):
            PopulationFile.from_members([file, other])


def test_an_adapter_is_expected(tmp_path: Path) -> None:
    path = saved(tmp_path / "population.safetensors", members(), NAMES)
    base = tmp_path / "base.safetensors"
    weights = {f"{target.module}.weight": np.ones(target.shape, np.float32) for target in TARGETS}
    safetensors.numpy.save_file(weights, base)
    population, out = tna.load(path), tmp_path / "out.safetensors"
    alone, unnamed = tmp_path / "alone.safetensors", saved(tmp_path / "unnamed.safetensors", members(count=1))
    tna.save(alone, population[1])
    why = "is a population of 4 members, and one adapter is expected: give one of them, such as "
    nobody = (
        "member: there is no member 'bob'; the names are 'ann', 'größe 7', 'user-0000000000000001'; numbers are from "
        "0 to 3"
    )
    single = "has one adapter, and no members: leave out member= (--member)"
    for adapter, which, message in (
        (path, None, f"{path}: {why}member='ann' (--member ann)"),
        (population, None, f"adapter {why}member='ann' (--member ann)"),
        (unnamed, None, f"{unnamed}: {why.replace('4 members', '1 member')}member=0 (--member 0)"),
        (path, "bob", f"{path}: {nobody}"),
        (population, "bob", nobody),
        (path, 4, f"{path}: member must be from 0 to 3; got 4"),
        (alone, "ann", f"{alone}: {single}"),
        (population[0], 0, f"adapter {single}"),
    ):
        with pytest.raises((FileError, ConfigError)) as caught:
            tna.merge(base, adapter, out, member=which)
        assert str(caught.value) == message
    assert not out.exists()
    with pytest.raises(
        AttributeError, match=r"no attribute 'deltas': it is of one member, as in population\[0\]\.deltas"
    ):
        population.deltas()
    with pytest.raises(AttributeError, match=r"no attribute 'nothing'$"):
        _ = population.nothing
    tna.merge(base, alone, out)
    expected = out.read_bytes()
    for adapter, which in ((path, 1), (population, 1), (path, "größe 7"), (population, "größe 7")):
        tna.merge(base, adapter, out, member=which, overwrite=True)
        assert (out.read_bytes() == expected) == (which == 1)


def test_a_member_of_a_file_is_swapped_in_and_loaded_as_one_adapter(tmp_path: Path) -> None:
    torch = pytest.importorskip("torch")
    import tnadapt.torch as tnt

    model = torch.nn.ModuleDict({"q": torch.nn.Linear(4, 6), "v": torch.nn.Linear(4, 5)})
    adapter = tnt.attach(model, "lora", ["q", "v"], rank=2)
    adapter.save(tmp_path / "one.safetensors")
    file = tna.load(tmp_path / "one.safetensors")
    other = dataclasses.replace(file, arrays={name: array + 1 for name, array in file.arrays.items()})
    path = saved(tmp_path / "population.safetensors", [file, other], ["ann", "bob"])
    why = r"population.safetensors: is a population of 2 members, .* such as member='ann' \(--member ann\)"
    with pytest.raises(FileError, match=why):
        adapter.swap(path)
    adapter.swap(path, "bob")
    adapter.save(tmp_path / "swapped.safetensors")
    same_arrays(tna.load(path, members=["bob"]), [tna.load(tmp_path / "swapped.safetensors")])
    adapter.detach()
    with pytest.raises(FileError, match=why):
        tnt.load_pretrained(path, base=model, merge=True)
    with pytest.raises(FileError, match="it does not say what its base model is"):
        tnt.load_processor(path)  # which is the same for all members
    path = path.rename(tmp_path / "adapter.safetensors")
    for call in (
        lambda: tnt.load(model, path, member=1),
        lambda: tnt.from_pretrained(model, tmp_path, member="bob"),
        lambda: tnt.adapters(tnt.load_pretrained(path, member="bob", base=model))["default"],
    ):
        adapter = call()
        adapter.save(tmp_path / "loaded.safetensors")
        assert (tmp_path / "loaded.safetensors").read_bytes() == (tmp_path / "swapped.safetensors").read_bytes()
        adapter.detach()


@pytest.mark.law("draws-digest")
def test_other_draws_are_refused_at_every_load(tmp_path: Path) -> None:
    files = members("theta")
    path = tmp_path / "population.safetensors"
    path.write_bytes(reference(files, NAMES, tmp_path, {"draws": "0" * 64}))
    for read in (lambda: tna.load(path), lambda: tna.load(path), lambda: tna.load(path, members=[1])):
        with pytest.raises(
            FileError, match=f"was trained with fixed draws whose digest is {'0' * 64}; on this machine"
        ):
            read()
    same_arrays(tna.load(path, check_draws=False), files)
    path.write_bytes(reference(files, NAMES, tmp_path))
    same_arrays(tna.load(path), files)
    for seed in range(70):  # more than are remembered
        config = tna.presets.unilora(7, 2, seed=seed)
        tna.save(path, PopulationFile.from_members([made(config)] * 2))
        assert len(tna.load(path)) == 2


@pytest.mark.parametrize("case", ["lora", "theta", "projection", "parts", "magnitude"])
def test_a_load_makes_one_plan(case: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path, make, plans = saved(tmp_path / "population.safetensors", members(case)), UpdatePlan.__init__, list[int]()
    tna.load(path)  # the digest of the draws is known from now on
    monkeypatch.setattr(UpdatePlan, "__init__", lambda *args, **more: plans.append(1) or make(*args, **more))
    for read in (lambda: tna.load(path, members=[1])[0], lambda: tna.load(path)[2]):
        file = read()
        assert (len(plans), file.num_parameters) == (1, sum(map(np.size, file.arrays.values())))
        assert file.plan.num_parameters == file.num_parameters
        plans.clear()


def test_an_adapter_has_no_members(tmp_path: Path) -> None:
    path = tmp_path / "adapter.safetensors"
    tna.save(path, member("lora"))
    with pytest.raises(FileError, match="has one adapter, and no members: leave out members="):
        tna.load(path, members=[0])
    with pytest.raises(FileError, match="has one adapter, not a population: save a population first"):
        tna.append(path, member("lora"))


def test_info_describes_it(tmp_path: Path) -> None:
    path = saved(tmp_path / "population.safetensors", members(count=10), [*[f"user-{k}" for k in range(9)], None])
    summary = tna.info(path)
    assert (summary["kind"], summary["version"], summary["parameters"]) == ("population", 3, 58)
    assert summary["members"] == {"count": 10, "first": [f"user-{k}" for k in range(8)], "name_bytes": 8}
    assert json.loads(json.dumps(summary)) == summary


def test_info_names_the_file_of_a_damaged_member(tmp_path: Path) -> None:
    path = saved(tmp_path / "population.safetensors", members())
    content = path.read_bytes()
    path.write_bytes(content[:-1] + bytes([content[-1] ^ 1]))
    with pytest.raises(FileError, match=r"population\.safetensors: member 3 is damaged"):
        tna.info(path)


# -- Damaged and hostile files -----------------------------------------------------------------------------------------


def read_all(path: Path) -> None:
    _ = tna.load(path).arrays, tna.load(path).names


@pytest.mark.law("cut-off", "byte-changed")
def test_a_file_that_is_cut_off_or_changed_anywhere_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(time, "sleep", lambda seconds: None)
    path = saved(tmp_path / "population.safetensors", members("float16", 2), ["a", None])
    content = path.read_bytes()
    for stop in range(len(content)):
        forge.write(path, content[:stop])
        with pytest.raises(FileError):
            tna.load(path)
    data = 8 + int.from_bytes(content[:8], "little")
    for position in range(len(content)):
        for bit in range(8) if position < data else (position % 8,):
            changed = bytearray(content)
            changed[position] ^= 1 << bit
            forge.write(path, changed)
            with pytest.raises(FileError):
                read_all(path)


ROW = 58 * 4 + 8
ABOUT = {"parameters": 58, "dtype": "F32", "name_bytes": 0}


@pytest.mark.law("bad-tensors")
@pytest.mark.parametrize(
    ("changes", "why"),
    [
        ({"population": ...}, "the tnadapt entry has unknown keys: none; lacks: 'population'"),
        ({"population": 4}, "the tnadapt entry's population must be an object; got 4"),
        ({"population": {"parameters": 58}}, "population must have parameters, dtype and name_bytes; got"),
        ({"population": {**ABOUT, "count": 4}}, "population must have parameters, dtype and name_bytes; got"),
        ({"population": {**ABOUT, "parameters": 57}}, "require 58 numbers of each member; a row has 57"),
        ({"population": {**ABOUT, "parameters": True}}, "parameters must be a positive integer; got True"),
        ({"population": {**ABOUT, "parameters": -1}}, "parameters must be a positive integer; got -1"),
        ({"population": {**ABOUT, "parameters": 2**70}}, "require 58 numbers of each member; a row has"),
        ({"population": {**ABOUT, "dtype": "U8"}}, "dtype must be one of F64, F32, F16, BF16; got 'U8'"),
        ({"population": {**ABOUT, "dtype": ["F32"]}}, "dtype must be one of F64, F32, F16, BF16; got ['F32']"),
        ({"population": {**ABOUT, "dtype": "F64"}}, "rows of 240 bytes; config and targets require 472"),
        ({"population": {**ABOUT, "name_bytes": 8}}, "rows of 240 bytes; config and targets require 248"),
        ({"population": {**ABOUT, "name_bytes": 4}}, "name_bytes must be a multiple of 8 from 0 to 256; got 4"),
        ({"population": {**ABOUT, "name_bytes": 264}}, "name_bytes must be a multiple of 8 from 0 to 256; got 264"),
        ({"population": {**ABOUT, "name_bytes": 8.0}}, "name_bytes must be a multiple of 8 from 0 to 256; got 8.0"),
        ({"version": 1}, "the tnadapt entry has unknown keys: 'population'; lacks: none"),
        ({"version": 2}, "the tnadapt entry has unknown keys: 'config', 'population'; lacks: 'parts'"),
        ({"config": ...}, "the tnadapt entry has unknown keys: none; lacks: 'config'"),
        ({"parts": []}, "the tnadapt entry has unknown keys: 'config'; lacks: none"),
        ({"config": {"rank": 10**9}}, "numbers of each member; a row has 58"),
        ({"config": {"rank": 1, "groups": 60, "fold": "hypercube", "terms": 1000}}, "arrays; there are 58"),
    ],
)
def test_a_recipe_that_is_none(tmp_path: Path, changes: dict[str, Any], why: str) -> None:
    recipe, _ = forge.parsed(alone(member("lora"), tmp_path / "alone"))
    changed = {**recipe, "version": 3, "population": ABOUT, **changes}
    recipe = {key: value for key, value in changed.items() if value is not ...}
    path = tmp_path / "population.safetensors"
    path.write_bytes(forge.population(recipe, {}, row_of(member("lora"), "F32", None, 0), 1))
    with pytest.raises(FileError) as caught:
        tna.load(path)
    assert str(caught.value).startswith(f"{path}: ")
    assert why in str(caught.value)


@pytest.mark.law("bad-tensors")
@pytest.mark.parametrize(
    ("entry", "why"),
    [
        ({"dtype": "U8", "shape": [ROW]}, "'members' must be U8 with the shape [members, bytes of a row]"),
        ({"dtype": "U8", "shape": [1, ROW, 1]}, "of 1 to 2147483648 members; got U8 [1, 240, 1]"),
        ({"dtype": "F32", "shape": [1, ROW // 4]}, "of 1 to 2147483648 members; got F32 [1, 60]"),
        ({"dtype": "U8", "shape": [2, ROW // 2]}, "its members have rows of 120 bytes; config and targets require 240"),
        ({"dtype": "U8", "shape": [0, ROW]}, "'members' needs 0 bytes; its data_offsets 0 and 240 do not hold that"),
        ({"dtype": "U8", "shape": [2**40, ROW]}, "do not hold that"),
    ],
)
def test_rows_that_are_none(tmp_path: Path, entry: dict[str, Any], why: str) -> None:
    recipe, _ = forge.parsed(alone(member("lora"), tmp_path / "alone"))
    text = forge.seal({**recipe, "version": 3, "population": ABOUT}, {})
    header = {"members": {**entry, "data_offsets": [0, ROW]}, "__metadata__": {"tnadapt": text}}
    path = tmp_path / "population.safetensors"
    path.write_bytes(forge.container(header, row_of(member("lora"), "F32", None, 0)))
    with pytest.raises(FileError) as caught:
        tna.load(path)
    assert why in str(caught.value)


def test_rows_must_be_the_last_tensor_and_hold_the_arrays_alone(tmp_path: Path) -> None:
    recipe, tensors = forge.parsed(alone(member("lora"), tmp_path / "alone"))
    row = np.frombuffer(row_of(member("lora"), "F32", None, 0), np.uint8).reshape(1, -1)
    path = tmp_path / "population.safetensors"
    name = "group0.split0.factor0"

    def refusal(recipe: Mapping[str, Any], shared: forge.Tensors, order: Sequence[str]) -> str:
        header, data = forge.listed({**shared, "members": ("U8", row)}, order)
        path.write_bytes(forge.container({"__metadata__": {"tnadapt": forge.seal(recipe, shared)}, **header}, data))
        with pytest.raises(FileError) as caught:
            tna.load(path)
        return str(caught.value)

    population = {**recipe, "version": 3, "population": ABOUT}
    first = {name: tensors[name]}
    kept_head = {"kept.head": ("F32", np.ones(2, np.float32))}
    assert "its last tensor must be 'members'; got 'kept.head'" in refusal(
        population, kept_head, ["members", "kept.head"]
    )
    assert f"the members' arrays must be in the rows alone; got tensors '{name}'" in refusal(
        population, first, [name, "members"]
    )
    assert "unknown: 'members'" in refusal(recipe, tensors, [*tensors, "members"])
    path.write_bytes(forge.adapter(population, {}))
    with pytest.raises(FileError, match="its last tensor must be 'members'; got None"):
        tna.load(path)


def test_names_and_numbers_in_rows(tmp_path: Path) -> None:
    files = members(count=2)
    path = tmp_path / "population.safetensors"

    def put(file: AdapterFile, first: str, second: bytes) -> None:
        content = reference([files[0], file], [first, "x" * 8], tmp_path)
        row = bytearray(content[-ROW - 8 :])
        row[-16:-8] = second.ljust(8, b"\0")
        row[-8:] = hashlib.sha256(row[:-8]).digest()[:8]
        path.write_bytes(content[: -len(row)] + row)

    put(files[1], "ann", b"ann")
    for read in (lambda: tna.load(path).names, lambda: tna.load(path, members=["ann"]), lambda: tna.load(path)["ann"]):
        with pytest.raises(FileError, match="members 0 and 1 have the same name, 'ann'"):
            read()
    for content, text in ((b"a\nb", r"b'a\\nb'"), (b"\xff", r"b'\\xff'"), (b"a\0b", r"b'a\\x00b'")):
        put(files[1], "ann", content)
        for read in (lambda: tna.load(path).names, lambda: tna.load(path, members=[1])):
            with pytest.raises(FileError, match=f"{path}: the name of member 1 is not printable text: {text}"):
                read()
        assert tna.load(path)["ann"].num_parameters == 58
    broken = {name: np.full_like(array, np.inf) for name, array in files[1].arrays.items()}
    put(dataclasses.replace(files[1], arrays=broken), "ann", b"bob")
    for read in (lambda: tna.load(path, members=[1]), lambda: tna.load(path).arrays, lambda: tna.load(path)["bob"]):
        with pytest.raises(FileError, match=rf"{path}: member 1 \('bob'\) holds NaN or infinity"):
            read()


@pytest.mark.law("allocation-limit")
def test_a_file_of_holes_is_refused(tmp_path: Path) -> None:
    recipe, _ = forge.parsed(alone(member("lora"), tmp_path / "alone"))
    count = 2**31
    content = forge.population({**recipe, "version": 3, "population": ABOUT}, {}, b"", 0)
    content = content.replace(b"[0                   ,0]", f"[{count:<20},{ROW}]".encode())
    content = content.replace(b"[0,0                   ]", f"[0,{count * ROW:<20}]".encode())
    content = content[8:].rstrip()
    content += b" " * (-len(content) % 8)
    path = tmp_path / "population.safetensors"
    with open(path, "wb") as file:
        file.write(len(content).to_bytes(8, "little") + content)
        file.truncate(8 + len(content) + count * ROW)

    def read() -> None:
        with pytest.raises(FileError, match="the rest is holes, and was not read"):
            tna.load(path)

    assert peak_of(read) < 1 << 20


@given(st.integers(0, 2**32), st.integers(1, 5))
def test_any_bytes_behind_the_rows_change_nothing(
    tmp_path_factory: pytest.TempPathFactory, seed: int, count: int
) -> None:
    folder = tmp_path_factory.mktemp("tails")
    path = saved(folder / "population.safetensors", members(count=2))
    rng = np.random.default_rng(seed)
    tail = rng.bytes(int(rng.integers(1, count * ROW)))
    with open(path, "ab") as file:
        file.write(tail)
    same_arrays(tna.load(path), members(count=2))
    tna.append(path, member("lora", 2))
    same_arrays(tna.load(path), members(count=3))
    assert path.read_bytes() == saved(folder / "again.safetensors", members(count=3)).read_bytes()
