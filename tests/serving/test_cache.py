"""The cache of expanded adapters keeps its limit, removes what was used least recently, and nothing that is in use."""

from __future__ import annotations

import concurrent.futures
import os
import random
import signal
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from hypothesis import example, given
from hypothesis import strategies as st

import tnadapt as tna
from tests.serving.internals import served_folder
from tnadapt import ConfigError, FileError
from tnadapt.checkpoints import atomic_files
from tnadapt.serving import ServedFolder

from .adapters import adapter

# A child process never uses JAX, whose threads it lacks.
pytestmark = pytest.mark.filterwarnings("ignore:os.fork:RuntimeWarning")

NAMES = ["ann", "bob", "cid", "dan", "eve", "flo"]


@pytest.fixture(scope="module")
def adapters(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder of adapters, of which every third is larger as LoRA."""
    folder = tmp_path_factory.mktemp("adapters")
    for number, name in enumerate(NAMES):
        tna.save(folder / f"{name}.safetensors", adapter(tna.presets.lora(10 if number % 3 == 0 else 2), number))
    return folder


@pytest.fixture(scope="module")
def expected(adapters: Path) -> dict[str, dict[str, bytes]]:
    """The files of each adapter as LoRA."""
    return {name: dict(tna.convert(adapters / f"{name}.safetensors", to="vllm-lora").files) for name in NAMES}


def request(folder: ServedFolder, name: str) -> Any:
    """An adapter as LoRA, or None if the limit leaves no room for it."""
    try:
        return folder.find(name, "m")
    except FileError as error:
        if " bytes do not fit, as its limit is " not in str(error):
            raise
        return None


def contents(served: Any) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in Path(served.path).iterdir()}


def in_cache(cache: Path) -> dict[str, int]:
    """The folders in the cache, and the bytes of their files."""
    places = [place for place in cache.iterdir() if not place.name.startswith(".")]
    return {str(place): sum(path.stat().st_size for path in place.iterdir()) for place in places}


# -- The law -----------------------------------------------------------------------------------------------------------


class Reference:
    """Which adapters a limited cache has, by a list of them in the order of their last use."""

    def __init__(self, sizes: dict[str, int]) -> None:
        self.sizes, self.cached, self.used = sizes, list[str](), dict[int, set[str]]()

    def fits(self, size: int, limit: int | None) -> bool:
        """Make room for this size; return whether there is."""
        in_use = set[str]().union(*self.used.values())
        while limit is not None and size + sum(self.sizes[name] for name in self.cached) > limit:
            unused = [name for name in self.cached if name not in in_use]
            if not unused:
                return False
            self.cached.remove(unused[0])
        return True

    def find(self, server: int, name: str, limit: int | None) -> bool:
        """Return whether an adapter is served."""
        self.used[server].add(name)
        if name in self.cached:
            self.cached.remove(name)
        elif not self.fits(self.sizes[name], limit):
            return False
        self.cached.append(name)
        return True


# One that was requested again is not the least recently used one.
@example(
    requests=[(0, "bob"), (0, "cid"), (0, None), (1, "bob"), (1, None), (2, "eve"), (2, None), (1, "bob")],
    limits=(None, None, 28_000),
)
@given(
    requests=st.lists(st.tuples(st.integers(0, 2), st.sampled_from([*NAMES, None])), max_size=30),
    limits=st.tuples(*[st.one_of(st.none(), st.integers(1, 60_000))] * 3),
)
def test_it_has_what_a_list_in_the_order_of_use_has(
    requests: list[tuple[int, str | None]], limits: tuple[int | None, ...], adapters: Path,
    expected: dict[str, dict[str, bytes]], tmp_path_factory: pytest.TempPathFactory,
) -> None:  # fmt: skip
    cache = tmp_path_factory.mktemp("cache")
    reference = Reference({name: sum(map(len, files.values())) for name, files in expected.items()})
    servers, places = dict[int, ServedFolder](), dict[str, str]()
    for number, name in requests:
        if name is None:  # it ends
            servers.pop(number, None)
            reference.used.pop(number, None)
            continue
        if number not in servers:
            servers[number], reference.used[number] = ServedFolder(adapters, cache, limit=limits[number]), set()
            reference.fits(0, limits[number])
        served = request(servers[number], name)
        assert (served is not None) == reference.find(number, name, limits[number])
        if served is not None:
            places[name] = served.path
            assert contents(served) == expected[name]
        assert in_cache(cache) == {places[name]: reference.sizes[name] for name in reference.cached}


# -- Races -------------------------------------------------------------------------------------------------------------


def serve_at_random(adapters: Path, cache: Path, expected: dict[str, dict[str, bytes]], seed: int, rounds: int) -> int:
    """Start servers and request adapters, whose files must stay until the server ends; return how many there were."""
    rng, count = random.Random(seed), 0
    for _ in range(rounds):
        folder, served = ServedFolder(adapters, cache, limit=rng.choice([30_000, 50_000, 80_000])), dict[str, Any]()
        for name in rng.choices(NAMES, k=4):
            served[name] = request(folder, name)
            present = [each for each in served if served[each] is not None]
            assert [contents(served[each]) for each in present] == [expected[each] for each in present]
        count += len(present)
    return count


def test_servers_at_once_keep_what_they_were_given_and_the_limit(
    adapters: Path, expected: dict[str, dict[str, bytes]], tmp_path: Path
) -> None:
    cache = tmp_path / "cache"
    with concurrent.futures.ThreadPoolExecutor(4) as pool:
        counts = [pool.submit(serve_at_random, adapters, cache, expected, seed, 8) for seed in range(4)]
        while not all(count.done() for count in counts):
            time.sleep(0.005)
            if cache.exists():
                with atomic_files.turn(str(cache / ".lock")):
                    assert sum(in_cache(cache).values()) <= 80_000
    assert all(count.result() > 8 for count in counts)


@pytest.mark.slow
@pytest.mark.skipif(not hasattr(os, "fork"), reason="processes are forked")
def test_processes_at_once_keep_what_they_were_given(
    adapters: Path, expected: dict[str, dict[str, bytes]], tmp_path: Path
) -> None:
    children = [
        fork(lambda seed=seed: serve_at_random(adapters, tmp_path / "cache", expected, seed, 40)) for seed in range(4)
    ]
    # One of them at a time is killed wherever it is.
    for seed in range(20):
        child = fork(lambda seed=seed: serve_at_random(adapters, tmp_path / "cache", expected, 100 + seed, 100))
        time.sleep(0.02 * (seed % 7))
        os.kill(child, signal.SIGKILL)
        os.waitpid(child, 0)
    assert [os.waitpid(child, 0)[1] for child in children] == [0] * 4
    serve_at_random(adapters, tmp_path / "cache", expected, 200, 3)
    assert len(list((tmp_path / "cache").glob(".used-*"))) <= 2  # of the last two servers


def fork(work: Callable[[], object]) -> int:
    """Return a child process that exits with 0 if the work succeeds."""
    process = os.fork()
    if process == 0:
        try:
            work()
        except BaseException:
            os._exit(1)
        os._exit(0)
    return process


@pytest.mark.skipif(not hasattr(os, "fork"), reason="a process is forked and killed")
def test_what_a_process_was_given_stays_until_it_ends(
    adapters: Path, expected: dict[str, dict[str, bytes]], tmp_path: Path
) -> None:
    read, write = os.pipe()

    def serve_and_wait() -> None:
        folder = ServedFolder(adapters, tmp_path)
        for name in ("bob", "cid"):
            folder.find(name, "m")
        os.write(write, b"!")
        time.sleep(60)

    child = fork(serve_and_wait)
    try:
        assert os.read(read, 1) == b"!"
        used, size = sum(in_cache(tmp_path).values()), sum(map(len, expected["eve"].values()))
        assert used == sum(len(content) for name in ("bob", "cid") for content in expected[name].values())
        folder = ServedFolder(adapters, tmp_path, limit=used + 100)
        for _ in range(2):
            with pytest.raises(FileError) as caught:
                folder.find("eve", "m")
            assert str(caught.value) == (
                f"{tmp_path}: {size:,} bytes do not fit, as its limit is {used + 100:,} bytes, and running servers "
                f"use {used:,}: raise the limit (TNADAPT_VLLM_LIMIT), or restart a server"
            )
    finally:
        os.kill(child, signal.SIGKILL)
        os.waitpid(child, 0)
        os.close(read)
        os.close(write)
    assert folder.find("eve", "m") is not None
    assert len(in_cache(tmp_path)) == 2  # the older one made room


# -- The cache on disk -------------------------------------------------------------------------------------------------


def test_only_adapters_are_removed(adapters: Path, tmp_path: Path) -> None:
    (tmp_path / "other").mkdir()
    for name in ("other/adapter_config.json", "notes.txt", ".hidden"):
        (tmp_path / name).write_text("mine" * 100)
    ServedFolder(adapters, tmp_path).find("ann", "m")
    ServedFolder(adapters, tmp_path, limit=1)
    kept = {path.name for path in tmp_path.iterdir() if not path.name.startswith(".used-")}
    assert kept == {"other", "notes.txt", ".hidden", ".lock"}


def test_a_folder_that_is_half_removed_is_written_again(
    adapters: Path, expected: dict[str, dict[str, bytes]], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in ("ann", "bob"):
        ServedFolder(adapters, tmp_path).find(name, "m")

    def stop(place: Path) -> None:
        (place / "adapter_model.safetensors").unlink()
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(served_folder.shutil, "rmtree", stop)
        with pytest.raises(KeyboardInterrupt):
            ServedFolder(adapters, tmp_path, limit=1)
    for name in ("ann", "bob"):
        assert contents(ServedFolder(adapters, tmp_path).find(name, "m")) == expected[name]


@pytest.mark.parametrize(
    ("limit", "why"),
    [
        (0, "limit must be from 1 to 4611686018427387904; got 0"),
        (-1, "limit must be from 1 to 4611686018427387904; got -1"),
        (1e9, "limit must be an integer or None; got 1000000000.0"),
        ("20GB", "limit must be an integer or None; got '20GB'"),
        (True, "limit must be an integer or None; got True"),
    ],
)
def test_limits_that_are_none(limit: Any, why: str, adapters: Path, tmp_path: Path) -> None:
    with pytest.raises(ConfigError) as caught:
        ServedFolder(adapters, tmp_path / "cache", limit=limit)
    assert str(caught.value) == why
    assert not (tmp_path / "cache").exists()


def test_a_limit_needs_locks(adapters: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: object) -> None:
        raise OSError(37, "No locks available")

    for where, change in (
        ("file system", lambda patch: patch.setattr(atomic_files.fcntl, "flock", refuse)),
        ("system", lambda patch: patch.setattr(served_folder, "HAS_LOCKS", False)),
    ):
        with monkeypatch.context() as patch:
            change(patch)
            with pytest.raises(FileError) as caught:
                ServedFolder(adapters, tmp_path, limit=10**9)
            assert str(caught.value) == (
                f"{tmp_path}: limit needs locks of files, which this {where} does not have: leave it out"
            )
            assert ServedFolder(adapters, tmp_path).find("ann", "m") is not None


def test_a_cache_that_others_write_is_read(adapters: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    first = ServedFolder(adapters, tmp_path).find("ann", "m")

    def refuse(path: str) -> None:
        raise PermissionError(13, "Permission denied", path)

    monkeypatch.setattr(served_folder, "turn", refuse)
    assert ServedFolder(adapters, tmp_path).find("ann", "m") == first
    with pytest.raises(FileError) as caught:
        ServedFolder(adapters, tmp_path, limit=10**9)
    assert str(caught.value) == f"{tmp_path}: Permission denied"
