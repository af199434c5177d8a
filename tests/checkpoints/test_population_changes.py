"""Members are appended and replaced atomically: under kills, power failures, and other processes."""

from __future__ import annotations

import builtins
import contextlib
import dataclasses
import io
import itertools
import multiprocessing
import os
import signal
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

import tnadapt as tna
from tests.stress_merge import child
from tests.support.depth import in_depth
from tnadapt import AdapterFile, Config, FileError, PopulationFile

from .internals import population_changes
from .test_adapter_file import made
from .test_population_file import OTHERS, member, members, same_arrays, saved

# A child process never uses JAX, whose threads it lacks.
pytestmark = pytest.mark.filterwarnings("ignore:os.fork:RuntimeWarning")

ROW = 58 * 4 + 8  # without a name


def constant(value: float) -> AdapterFile:
    """A member whose numbers are all equal: one that is a mixture of two shows."""
    file = member("lora")
    return dataclasses.replace(file, arrays={name: np.full_like(array, value) for name, array in file.arrays.items()})


def population(*values: float, names: Sequence[str | None] | None = None) -> PopulationFile:
    return PopulationFile.from_members([constant(value) for value in values], names)


def value_of(file: AdapterFile) -> float:
    values = np.unique(np.concatenate([array.ravel() for array in file.arrays.values()]))
    assert values.size == 1, "a mixture of two members"
    return float(values[0])


def values_of(path: Path) -> list[float]:
    """The values of all members, read in both ways."""
    population = tna.load(path)
    values = [value_of(file) for file in population]
    assert [float(stacked.flat[0]) for stacked in next(iter(population.arrays.values()))] == values
    return values


# -- The same bytes as if all were saved at once -----------------------------------------------------------------------


@dataclasses.dataclass
class Step:
    """Members that are appended, or one that is replaced."""

    values: list[int]
    names: list[str | None]
    which: int | None


def steps() -> st.SearchStrategy[list[Step]]:
    name = st.none() | st.text(st.characters(codec="utf-8", categories=["L", "N", "S"]), min_size=1, max_size=9)
    step = st.integers(1, 3).flatmap(
        lambda count: st.builds(
            Step,
            st.lists(st.integers(0, 99), min_size=count, max_size=count),
            st.lists(name, min_size=count, max_size=count),
            st.none() | st.integers(0, 99),
        )
    )
    return st.lists(step, min_size=1, max_size=6)


@pytest.mark.law("file-bytes")
@given(steps())
def test_the_file_is_the_one_that_is_saved_at_once(
    tmp_path_factory: pytest.TempPathFactory, changes: list[Step]
) -> None:
    folder = tmp_path_factory.mktemp("changes")
    values: list[float] = [0.0]
    names: list[str | None] = [None]
    path = saved(folder / "population.safetensors", [constant(0)])
    for step in changes:
        new = [constant(value) for value in step.values]
        if step.which is not None:
            number = step.which % len(values)
            by_name = names[number] is not None and step.values[0] % 2
            tna.replace(path, names[number] if by_name else number, new[0] if step.values[0] % 3 else new[0].arrays)
            values[number] = step.values[0]
        else:
            texts = [name if name not in names and step.names.count(name) == 1 else None for name in step.names]
            if len(new) == 1:
                tna.append(path, new[0].arrays, texts[0])
            else:
                tna.append(path, PopulationFile.from_members(new, texts))
            values += step.values
            names += texts
        again = saved(folder / "again.safetensors", [constant(value) for value in values], names)
        assert path.read_bytes() == again.read_bytes()


@pytest.mark.parametrize(
    "case", ["float64", "float16", "bfloat16", "unaligned", "theta", "parts", "magnitude", "given"]
)
def test_every_kind_of_member_can_be_appended_and_replaced(tmp_path: Path, case: str) -> None:
    files = members(case, 5)
    path = saved(tmp_path / "population.safetensors", files[:1])
    tna.append(path, PopulationFile.from_members(files[1:3]))
    tna.append(path, files[3].arrays)
    tna.replace(path, 0, files[4])
    expected = saved(tmp_path / "again.safetensors", [files[4], *files[1:4]])
    assert path.read_bytes() == expected.read_bytes()
    same_arrays(tna.load(path), [files[4], *files[1:4]])


def test_a_population_is_appended_with_its_names(tmp_path: Path) -> None:
    path = saved(tmp_path / "population.safetensors", members(count=1), ["a"])
    tna.append(path, PopulationFile.from_members(members(count=2), ["b", None]))
    assert tna.load(path).names == ["a", "b", None]


def test_an_append_writes_the_new_rows_and_the_first_bytes_alone(tmp_path: Path) -> None:
    arrays = {name: np.zeros((500, *array.shape), np.float32) for name, array in member("lora").arrays.items()}
    path = tmp_path / "population.safetensors"
    tna.save(path, PopulationFile(member("lora"), arrays))
    calls: list[tuple[str, Any, Any]] = []
    with watched(lambda call, apply: (calls.append(call), apply())):
        tna.append(path, constant(1))
        tna.replace(path, 3, constant(2))
    written = [len(content) for name, _, content in calls if name == "write"]
    assert written == [ROW, 512, 8 + 8 + ROW + 8, ROW]
    assert [name for name, _, _ in calls] == ["write", "fsync"] * 4 + ["truncate"]
    longer: list[tuple[str, Any, Any]] = []
    with watched(lambda call, apply: (longer.append(call), apply())):
        tna.append(path, constant(1), "a name")
    assert sum(len(content) for name, _, content in longer if name == "write") == path.stat().st_size
    assert tna.load(path)["a name"].num_parameters == 58


def test_a_mapped_population_shows_replacements_and_no_new_members(tmp_path: Path) -> None:
    path = saved(tmp_path / "population.safetensors", [constant(0), constant(1)])
    population = tna.load(path)
    arrays = population.arrays
    tna.append(path, constant(2))
    tna.replace(path, 1, constant(3))
    assert len(population) == 2
    assert value_of(population[1]) == 3.0
    assert all((array[1] == 3.0).all() for array in arrays.values())


# -- What is refused ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("call", "why"),
    [
        (
            lambda path: tna.append(path, constant(1), "a"),
            "has a member 'a' already, number 0: tnadapt.replace changes",
        ),
        (lambda path: tna.append(path, population(1, 2, names=["x", "a"])), "has a member 'a' already, number 0"),
        (lambda path: tna.append(path, constant(1), ""), "name must be printable text of 1 to 256 bytes in UTF-8; got"),
        (lambda path: tna.append(path, constant(1), "a\n"), "name must be printable text of 1 to 256 bytes"),
        (
            lambda path: tna.append(path, population(1), "x"),
            "name= is for one member; those of a population have names of their own",
        ),
        (
            lambda path: tna.append(path, PopulationFile.from_members([member("theta")])),
            "the new population differs from the population in config",
        ),
        (lambda path: tna.append(path, {}), "the member: the arrays must be those of config and targets; missing: "),
        (
            lambda path: tna.append(path, {k: a.astype("f8") for k, a in constant(1).arrays.items()}),
            "the member has dtype float64; that of the population is float32",
        ),
        (
            lambda path: tna.append(path, constant(np.nan)),
            "holds NaN or infinity; an adapter file may only have finite numbers",
        ),
        (lambda path: tna.replace(path, 0, constant(np.inf).arrays), "the member: 'group0.split0.factor0' holds NaN"),
        (lambda path: tna.replace(path, 2, constant(1)), "which must be from 0 to 1; got 2"),
        (lambda path: tna.replace(path, "c", constant(1)), "which: there is no member 'c'; the names are 'a'; "),
    ],
)
def test_a_change_that_is_none_changes_nothing(tmp_path: Path, call: Callable[[Path], None], why: str) -> None:
    path = saved(tmp_path / "population.safetensors", [constant(0), constant(1)], ["a", None])
    before = path.read_bytes()
    with pytest.raises(FileError) as caught:
        call(path)
    assert str(caught.value).startswith(f"{path}: ")
    assert str(caught.value).count(str(path)) == 1
    assert why in str(caught.value)
    assert path.read_bytes() == before


def test_what_is_no_population_is_not_changed(tmp_path: Path) -> None:
    assert len(OTHERS) == 7  # members that do not belong to a population are tested there
    for path, why in (
        (tmp_path / "missing", "No such file or directory"),
        (tmp_path, "is not a file"),
        (Path("/dev/null"), "is not a file"),
    ):
        with pytest.raises(FileError, match=why):
            tna.append(path, constant(1))
    path = saved(tmp_path / "population.safetensors", [constant(0)])
    path.write_bytes(path.read_bytes()[:-1])
    with pytest.raises(FileError, match="is cut off or too long"):
        tna.replace(path, 0, constant(1))


def test_a_damaged_member_is_not_replaced_by_one_without_its_name(tmp_path: Path) -> None:
    path = saved(tmp_path / "population.safetensors", [constant(0), constant(1)])
    content = path.read_bytes()
    path.write_bytes(content[:-1] + bytes([content[-1] ^ 1]))
    with pytest.raises(FileError, match="member 1 is damaged: its bytes do not match its checksum"):
        tna.replace(path, 1, constant(2))
    tna.replace(path, 0, constant(2))
    assert value_of(tna.load(path)[0]) == 2.0


# -- Kills and power failures ------------------------------------------------------------------------------------------

Watcher = Callable[[tuple[str, Any, Any], Callable[..., Any]], Any]


@contextlib.contextmanager
def watched(watch: Watcher) -> Iterator[None]:
    """Pass each change of a file on disk, as a name, its position and content, and what makes it, to a function."""

    class Watched(io.FileIO):
        def write(self, content: Any) -> int:
            size = memoryview(content).nbytes
            watch(("write", self.tell(), bytes(content)), lambda part=content: super(Watched, self).write(part))
            return size

        def truncate(self, size: int | None = None) -> int:
            watch(("truncate", size, None), lambda: super(Watched, self).truncate(size))
            return size or 0

    real_open, real_fsync, real_replace = builtins.open, os.fsync, os.replace

    def open_(file: Any, mode: str = "r", buffering: int = -1, **settings: Any) -> Any:
        if buffering == 0 and "+" in mode:
            return Watched(file, mode.replace("b", ""))
        return real_open(file, mode, buffering, **settings)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(builtins, "open", open_)
        patch.setattr(os, "fsync", lambda handle: watch(("fsync", None, None), lambda: real_fsync(handle)))
        patch.setattr(os, "replace", lambda *paths: watch(("replace", None, None), lambda: real_replace(*paths)))
        yield


CHANGES: dict[str, tuple[Callable[[Path], None], list[float]]] = {
    "append": (lambda path: tna.append(path, constant(7)), [0, 1, 2, 7]),
    "append several": (lambda path: tna.append(path, population(7, 8)), [0, 1, 2, 7, 8]),
    "append a longer name": (lambda path: tna.append(path, constant(7), "long"), [0, 1, 2, 7]),
    "replace the first": (lambda path: tna.replace(path, 0, constant(7)), [7, 1, 2]),
    "replace the last": (lambda path: tna.replace(path, 2, constant(7)), [0, 1, 7]),
}
OLD: list[float] = [0, 1, 2]


def start(path: Path) -> Path:
    return saved(path, [constant(value) for value in OLD])


def killed(path: Path, change: Callable[[Path], None], at: int, part: float) -> int:
    """Make a change in a process that kills itself in its step on disk number ``at``, of which it makes a part."""
    count = itertools.count()

    def watch(call: tuple[str, Any, Any], apply: Callable[..., Any]) -> None:
        if next(count) == at:
            name, _, content = call
            if name == "write" and part:
                apply(content[: int(part * len(content))])
            os.kill(os.getpid(), signal.SIGKILL)
        apply()

    def act() -> None:
        with watched(watch):
            change(path)

    return child(act)


TWICE = [*zip(CHANGES, itertools.cycle(["append several", "append a longer name", "replace the first"]), strict=False)]


@pytest.mark.slow
@pytest.mark.parametrize(
    ("name", "again"),
    # Each change by itself, and with one of three that repair the file in its turn.
    [
        *((name, None) for name in in_depth(CHANGES, [*CHANGES][::2])),
        *in_depth(TWICE, TWICE[1::2]),
    ],
)
def test_a_process_killed_at_any_step_leaves_the_old_members_or_the_new(
    tmp_path: Path, name: str, again: str | None, small_process: ProcessPoolExecutor
) -> None:
    small_process.submit(kill_at_each_step, tmp_path, name, again).result()


@pytest.fixture(scope="module")
def small_process() -> Iterator[ProcessPoolExecutor]:
    """A new process: to fork one in which many tests have run takes ten times as long."""
    with ProcessPoolExecutor(1, multiprocessing.get_context("spawn")) as executor:
        yield executor


def kill_at_each_step(folder: Path, name: str, again: str | None) -> None:
    change, new = CHANGES[name]
    path = folder / "population.safetensors"
    for at, part in itertools.product(range(40), (0.0, 0.5)):
        code = killed(start(path), change, at, part)
        values = values_of(path)
        assert values in (OLD, new)
        if code == 0:
            assert values == new
            break
        assert code == -signal.SIGKILL
        if again is None:
            # The next change repairs the file.
            tna.append(path, constant(9))
            values += [9.0]
        else:
            # Killed again while it is repaired.
            for second in range(12):
                follow, _ = CHANGES[again]
                before = values_of(path)
                if killed(path, follow, second, part) == 0:
                    break
                assert values_of(path)[:1] in ([0.0], [7.0])
                assert len(values_of(path)) >= len(before)
            tna.replace(path, 1, constant(5))
            values = values_of(path)
            assert values[1] == 5.0
        assert values_of(path) == values
        population = tna.load(path)
        expected = saved(folder / "again.safetensors", list(population), population.names)
        assert path.read_bytes() == expected.read_bytes()
    else:
        raise AssertionError("the change has more steps than were tried")


def after_failure(durable: bytes, calls: Sequence[tuple[str, Any, Any]], reached: Callable[[], bool]) -> bytes:
    """The bytes after a power failure: what was synchronized, and of the rest any sectors, lengths and truncations."""
    content = bytearray(durable)
    for name, position, data in calls:
        if name == "truncate":
            if reached():
                del content[position:]
            continue
        size = 512 if position == 0 else 64  # the first bytes are one sector of a disk
        for at in range(0, len(data), size):
            piece = data[at : at + size]
            stop = position + at + len(piece)
            if reached() and stop > len(content):  # the length reaches the disk
                content.extend(bytes(stop - len(content)))
            if reached() and stop <= len(content):
                content[position + at : stop] = piece
    return bytes(content)


@pytest.mark.law("power-failure")
@pytest.mark.parametrize("name", ["append", "append several", "replace the first", "replace the last"])
@given(st.data())
def test_a_power_failure_leaves_the_old_members_or_the_new(
    tmp_path_factory: pytest.TempPathFactory, name: str, data: st.DataObject
) -> None:
    path = start(tmp_path_factory.mktemp("power") / "population.safetensors")
    rng = np.random.default_rng(data.draw(st.integers(0, 2**32)))
    likely = data.draw(st.sampled_from([0.1, 0.5, 0.9]))
    states: list[list[float]] = [OLD]
    change, new = CHANGES[name]
    second, _ = CHANGES[data.draw(st.sampled_from(["append", "replace the first", "replace the last"]))]
    content = path.read_bytes()
    # The second change begins on a disk that the first one has left, with or without a failure.
    for act in (change, second):
        calls: list[tuple[str, Any, Any]] = []
        path.write_bytes(content)
        with watched(lambda call, apply: (calls.append(call), apply())):  # noqa: B023
            act(path)
        states.append(values_of(path))
        stop = data.draw(st.integers(0, len(calls)))
        durable, pending = content, list[tuple[str, Any, Any]]()
        for call in calls[:stop]:
            if call[0] == "fsync":
                durable, pending = after_failure(durable, pending, lambda: True), []
            else:
                pending.append(call)
        content = after_failure(durable, pending, lambda: bool(rng.random() < likely))
        path.write_bytes(content)
        assert values_of(path) in states[-2:]
        states[-1] = values_of(path)
    assert new is not None
    tna.append(path, constant(9))
    assert values_of(path) == [*states[-1], 9.0]


def test_a_replacement_that_was_not_completed_is_read_from_behind_the_rows(tmp_path: Path) -> None:
    path = start(tmp_path / "population.safetensors")
    calls: list[tuple[str, Any, Any]] = []
    old = path.read_bytes()
    with watched(lambda call, apply: (calls.append(call), apply())):
        tna.replace(path, 1, constant(7))
    (_, stop, trailer), (_, position, row) = (call for call in calls if call[0] == "write")
    assert stop == len(old)
    for length in range(len(trailer)):
        path.write_bytes(old + trailer[:length])
        assert values_of(path) == OLD
    path.write_bytes(old + trailer)
    opened = tna.load(path)
    assert values_of(path) == [0.0, 7.0, 2.0]
    for written in range(0, len(row), 16):  # and the row in its place is half written
        path.write_bytes(old[:position] + row[:written] + old[position + written :] + trailer)
        assert values_of(path) == [0.0, 7.0, 2.0]
        same_arrays(tna.load(path, members=[1]), [constant(7)])
    # A reader that opened the file before it was half written finds the row, too.
    path.write_bytes(old)
    opened = tna.load(path)
    with open(path, "r+b") as file:
        file.seek(position)
        file.write(row[:100])
        file.seek(stop)
        file.write(trailer)
    assert value_of(opened[1]) == 7.0
    changed = tna.load(path)
    assert [value_of(one) for one in changed] == [0.0, 7.0, 2.0]
    tna.append(path, constant(3))
    assert values_of(path) == [0.0, 7.0, 2.0, 3.0]


def test_a_copy_has_whole_rows_while_one_is_half_written(tmp_path: Path) -> None:
    path = start(tmp_path / "population.safetensors")
    calls: list[tuple[str, Any, Any]] = []
    old = path.read_bytes()
    with watched(lambda call, apply: (calls.append(call), apply())):
        tna.replace(path, 1, constant(7))
    (_, _, trailer), (_, position, row) = (call for call in calls if call[0] == "write")
    path.write_bytes(old)
    opened = tna.load(path)
    assert opened.arrays  # all rows are checked, but change afterwards
    with open(path, "r+b") as file:
        file.seek(position)
        file.write(row[:100])
        file.seek(0, os.SEEK_END)
        file.write(trailer)
    tna.save(tmp_path / "copy.safetensors", opened)
    assert values_of(tmp_path / "copy.safetensors") == [0.0, 7.0, 2.0]


def test_a_trailer_for_a_member_that_is_not_there_is_ignored(tmp_path: Path) -> None:
    longer = saved(tmp_path / "longer.safetensors", [constant(value) for value in (*OLD, 3)])
    calls: list[tuple[str, Any, Any]] = []
    with watched(lambda call, apply: (calls.append(call), apply())):
        tna.replace(longer, 3, constant(7))
    trailer = next(content for name, _, content in calls if name == "write")
    path = start(tmp_path / "population.safetensors")
    path.write_bytes(path.read_bytes() + trailer)
    assert values_of(path) == OLD
    tna.append(path, constant(3))
    assert values_of(path) == [*OLD, 3.0]


# -- Several processes -------------------------------------------------------------------------------------------------


def started(act: Callable[[], None]) -> int:
    """Run it in a forked process, and return its number."""
    pid = os.fork()
    if pid == 0:
        code = 1
        try:
            act()
            code = 0
        finally:
            os._exit(code)
    return pid


@pytest.mark.slow
def test_processes_that_append_and_replace_wait_for_each_other_and_readers_do_not(tmp_path: Path) -> None:
    path = start(tmp_path / "population.safetensors")
    count = 25

    def append(writer: int) -> None:
        for number in range(count):
            # Some names are longer than all before: the file is then written anew.
            tna.append(path, constant(1000 * writer + number), f"{writer}-{number}" + "x" * (20 * (number == 15)))

    def replace() -> None:
        for number in range(2 * count):
            tna.replace(path, number % 3, constant(-number))

    kept_open = tna.load(path)
    writers = [started(lambda: append(1)), started(lambda: append(2)), started(replace)]
    running, seen, reads = set(writers), 0, 0
    while running:
        for pid in list(running):
            done, status = os.waitpid(pid, os.WNOHANG)
            if done:
                assert os.waitstatus_to_exitcode(status) == 0
                running.remove(pid)
        population = tna.load(path)
        names = population.names
        assert len(population) >= seen
        seen = len(population)
        for number, (file, name) in enumerate(zip(population, names, strict=True)):
            value = value_of(file)
            if number < 3:
                assert value <= 0.0 or value in OLD
            else:
                assert name is not None
                writer, index = name.rstrip("x").split("-")
                assert value == 1000 * int(writer) + int(index)
        assert len(kept_open) == 3
        reads += 1
    assert reads > 3
    final = tna.load(path)
    assert len(final) == 3 + 2 * count
    order = [name for name in final.names if name is not None]
    for writer in "12":
        mine = [name.rstrip("x") for name in order if name.startswith(writer)]
        assert mine == [f"{writer}-{number}" for number in range(count)]
    assert [value_of(final[number]) for number in range(3)] == [-48.0, -49.0, -47.0]


def test_a_reader_that_meets_an_append_reads_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The size of the file and its header are read one after the other."""
    path = start(tmp_path / "population.safetensors")
    before = os.fstat
    appended = []

    def fstat(handle: int) -> os.stat_result:
        state = before(handle)
        if not appended:
            appended.append(True)
            monkeypatch.setattr(os, "fstat", before)
            tna.append(path, constant(3))
        return state

    monkeypatch.setattr(os, "fstat", fstat)
    assert len(tna.load(path)) == 4


def test_a_file_that_was_replaced_while_an_append_waited_is_opened_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = start(tmp_path / "population.safetensors")
    real = population_changes.lock
    replaced = []

    def lock(handle: int, wait: bool = False) -> bool:
        if not replaced:
            replaced.append(True)
            saved(path, [constant(5)])
        return real(handle, wait)

    monkeypatch.setattr(population_changes, "lock", lock)
    tna.append(path, constant(6))
    assert values_of(path) == [5.0, 6.0]


def test_a_row_that_stays_half_written_is_damaged(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pauses: list[float] = []
    monkeypatch.setattr(time, "sleep", pauses.append)
    path = start(tmp_path / "population.safetensors")
    opened = tna.load(path)
    with open(path, "r+b") as file:
        file.seek(-100, os.SEEK_END)
        file.write(b"\1" * 10)
    with pytest.raises(FileError, match=rf"^{path}: member 2 is damaged: its bytes do not match its checksum"):
        opened[2]
    assert 0.1 < sum(pauses) < 1.0
    # A file by the same name that is another one says nothing of it.
    os.rename(path, tmp_path / "moved")
    start(path)
    with pytest.raises(FileError, match="member 2 is damaged"):
        opened[2]
    os.unlink(path)
    with pytest.raises(FileError, match="member 2 is damaged"):
        opened[2]
    assert value_of(opened[1]) == 1.0


def test_a_config_of_other_settings_is_another_population(tmp_path: Path) -> None:
    path = start(tmp_path / "population.safetensors")
    with pytest.raises(FileError, match=r"differs from the population in config \(rank: 1 and 2\)"):
        tna.append(path, made(Config(rank=1)))
