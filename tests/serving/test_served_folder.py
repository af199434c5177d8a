"""Files in a folder become LoRA on demand: once for each content, for the right base, and under safe names alone."""

from __future__ import annotations

import concurrent.futures
import json
import multiprocessing
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import tnadapt as tna
from tests.serving.internals import served_folder
from tnadapt import AdapterFile, ConfigError, FileError, TargetError, TnadaptError
from tnadapt.serving import ServedFolder

from .adapters import adapter, complete, saved_model, tiny

P = tna.presets


@pytest.fixture
def place(tmp_path: Path) -> Path:
    (tmp_path / "adapters").mkdir()
    saved_model(tmp_path / "base")
    return tmp_path


def served(place: Path, base: str | None = "base") -> ServedFolder:
    return ServedFolder(place / "adapters", place / "cache", None if base is None else place / base)


def entries(place: Path) -> list[Path]:
    """The adapters in the cache."""
    return [path for path in (place / "cache").iterdir() if not path.name.startswith(".")]


@pytest.fixture
def calls(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """The files that are read and converted from now on."""
    noted = list[str]()
    for name in ("convert", "load", "load_single", "open_checkpoint"):
        real = getattr(served_folder, name)
        monkeypatch.setattr(
            served_folder, name, lambda *args, name=name, real=real, **more: noted.append(name) or real(*args, **more)
        )
    return noted


def test_thirteen_parameters_are_served_as_lora(place: Path) -> None:
    file = tiny()
    assert file.num_parameters == 13
    assert not file.complete
    tna.save(place / "adapters" / "tiny.safetensors", file)
    found = served(place).find("tiny", "org/model")
    assert found is not None
    config = json.loads(Path(found.path, "adapter_config.json").read_text())
    assert (config["r"], config["lora_alpha"], config["peft_type"]) == (8, 8, "LORA")
    again = tna.convert(found.path).file
    assert again is not None
    for target, delta, own in zip(again.targets, again.deltas(), complete(file).deltas(), strict=True):
        assert target.module in {one.module for one in file.targets}
        np.testing.assert_allclose(delta, own, rtol=0, atol=1e-6 * float(np.abs(own).max()))


@pytest.mark.parametrize(
    "name",
    ["../secret", "..", ".", "", "a/b", "a\\b", "/etc/passwd", ".hidden", "a\0b", "a b", "x" * 129, "math\n", "~root"],
)
def test_names_that_are_paths_are_not_looked_up(name: str, place: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    tna.save(place / "secret.safetensors", adapter(tna.presets.lora(2)))
    folder = served(place)

    def refuse(*_: object) -> bool:
        raise AssertionError("the disk is not asked")

    monkeypatch.setattr(Path, "is_file", refuse)
    assert folder.file_of(name) is None
    assert folder.find(name, "m") is None


def test_it_is_expanded_once_for_each_content_and_base(place: Path, calls: list[str]) -> None:
    path = place / "adapters" / "math.safetensors"
    tna.save(path, adapter(tna.presets.lora(2)))
    first = served(place).find("math", "m")
    assert first is not None
    assert first.number > 0
    assert served(place).find("math", "m") == first
    tna.save(place / "adapters" / "same.safetensors", adapter(tna.presets.lora(2)))
    assert served(place).find("same", "m") == first
    # A folder of save_pretrained is an adapter.
    (place / "adapters" / "folder").mkdir()
    tna.save(place / "adapters" / "folder" / "adapter.safetensors", adapter(tna.presets.lora(2)))
    assert served(place).find("folder", "m") == first
    assert calls.count("convert") == 1
    # An entry that lost a file is written again.
    Path(first.path, "adapter_config.json").unlink()
    assert served(place).find("math", "m") == first
    assert Path(first.path, "adapter_config.json").is_file()
    tna.save(path, adapter(tna.presets.lora(2), seed=1))
    second = served(place).find("math", "m")
    assert second is not None
    assert {first.path, first.number}.isdisjoint({second.path, second.number})
    saved_model(place / "base", seed=5)
    assert served(place).find("math", "m") not in (first, second)
    assert calls.count("convert") == 4
    assert served(place).find("nobody", "m") is None
    with pytest.raises(FileError, match="is not a folder: create it, or give another folder"):
        ServedFolder(place / "nowhere", place / "cache")


def find(place: Path) -> tuple[str, int] | None:
    return served(place).find("tiny", "m")


@pytest.mark.parametrize("workers", ["threads", pytest.param("processes", marks=pytest.mark.slow)])
def test_requests_at_once_get_one_complete_folder(workers: str, place: Path) -> None:
    tna.save(place / "adapters" / "tiny.safetensors", tiny())
    pool: concurrent.futures.Executor = concurrent.futures.ThreadPoolExecutor(8)
    if workers == "processes":
        pool = concurrent.futures.ProcessPoolExecutor(3, multiprocessing.get_context("spawn"))
    with pool:
        answers = set(pool.map(find, [place] * 16))
    assert len(answers) == 1
    (entry,) = entries(place)  # and nothing is left of the others
    assert sorted(path.name for path in entry.iterdir()) == ["adapter_config.json", "adapter_model.safetensors"]
    assert not list((place / "cache").glob("*.tmp"))


def test_a_folder_that_another_writer_has_just_made_is_not_written_again(
    place: Path, calls: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    # While it is rewritten, its last file is missing, and a third writer would fail.
    tna.save(place / "adapters" / "tiny.safetensors", tiny())
    load = served_folder.load_single
    others = iter([served(place)])

    def load_while_another_finds(path: Path) -> AdapterFile:
        if other := next(others, None):
            other.find("tiny", "m")
        return load(path)

    monkeypatch.setattr(served_folder, "load_single", load_while_another_finds)
    assert find(place) == find(place)
    assert calls.count("convert") == 1


def test_the_base_is_what_vllm_serves(place: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    tna.save(place / "adapters" / "tiny.safetensors", tiny())
    folder = served(place, None)
    assert folder.find("tiny", str(place / "base")) is not None
    hub = pytest.importorskip("huggingface_hub")
    with pytest.raises(TargetError, match="set TNADAPT_VLLM_BASE to the folder of the model that vLLM serves"):
        folder.find("tiny", "nobody/has-this-model")
    monkeypatch.setattr(hub, "snapshot_download", lambda name, local_files_only: place / "base")
    assert folder.find("tiny", "org/model") is not None


def test_the_headers_of_the_base_are_read_again_if_a_file_has_changed(place: Path, calls: list[str]) -> None:
    tna.save(place / "adapters" / "math.safetensors", adapter(tna.presets.lora(2), base=0))
    base, folder = place / "base", served(place, None)
    weights, config = base / "model.safetensors", base / "config.json"

    def find_twice() -> Any:
        adapters = [folder.find("math", str(base)) for _ in range(2)]
        assert adapters[0] == adapters[1]
        assert calls.count("open_checkpoint") <= 1
        calls.clear()
        return adapters[0]

    folder.find("math", str(base))
    calls.clear()
    first = find_twice()
    config.write_text(json.dumps({"quantization_config": {"quant_method": "awq"}}))
    folder.find("math", str(base))
    calls.clear()
    assert find_twice() != first  # as the base is unknown
    config.write_text("{}")
    assert find_twice() == first
    weights.rename(base / "other.safetensors")
    assert find_twice() == first  # of the same weights
    saved_model(base, seed=1)
    (base / "other.safetensors").unlink()
    with pytest.raises(TargetError, match="base is another model than the one that the adapter was trained on"):
        folder.find("math", str(base))


@pytest.mark.parametrize("kind", ["quantized", "pickled"])
def test_a_base_that_cannot_be_compared_is_not(kind: str, place: Path) -> None:
    tna.save(place / "adapters" / "math.safetensors", adapter(tna.presets.lora(2)))
    tna.save(place / "adapters" / "tiny.safetensors", tiny())
    base, settings = place / "base", {"model_type": "llama"}
    if kind == "quantized":
        (base / "config.json").write_text(json.dumps({**settings, "quantization_config": {"quant_method": "awq"}}))
    else:
        for file in base.iterdir():
            file.unlink()
        (base / "pytorch_model.bin").write_bytes(b"")
        (base / "config.json").write_text(json.dumps(settings))
    folder = served(place, None)
    assert folder.find("math", str(base)) is not None
    with pytest.raises(TargetError, match="TNADAPT_VLLM_BASE to the folder of the model that vLLM serves, unquantized"):
        folder.find("tiny", str(base))


@pytest.mark.parametrize(
    ("config", "why"),
    [
        (tna.presets.dora(2), "apply='magnitude' of this adapter does more than add"),
        (tna.presets.dense(), "and LoRA of that rank is larger than the update itself"),
        (None, r"math\.safetensors"),
    ],
)
def test_what_is_merge_only_or_damaged_is_refused(config: tna.Config | None, why: str, place: Path) -> None:
    path = place / "adapters" / "math.safetensors"
    path.write_bytes(b"no adapter") if config is None else tna.save(path, adapter(config))
    with pytest.raises(TnadaptError, match=why):
        served(place).find("math", "m")


def test_a_refusal_is_remembered_until_the_file_or_the_base_changes(place: Path, calls: list[str]) -> None:
    path, folder, told = place / "adapters" / "math.safetensors", served(place), set[str]()
    good, bad, other = (adapter(config, seed) for config, seed in ((P.lora(2), 0), (P.dense(), 0), (P.dense(), 1)))
    # The other one has the same size, and its refusal is still known after one that is served.
    for file, reads in ((bad, 1), (bad, 1), (bad, 1), (other, 2), (good, 3), (other, 3)):
        if file is not bad or not told:
            tna.save(path, file)
        if file is good:
            assert folder.find("math", "m") is not None
            continue
        with pytest.raises(ConfigError, match="LoRA of that rank is larger than the update itself") as error:
            folder.find("math", "m")
        told.add(str(error.value))
        assert calls.count("load_single") == reads
    assert len(told) == 1
    saved_model(place / "base", seed=1)
    for file in (tiny(), adapter(P.lora(2), base=0)):
        tna.save(path, file)
        calls.clear()
        for _ in range(2):
            with pytest.raises(TargetError, match="base is another model than the one that the adapter was trained on"):
                folder.find("math", "m")
        assert calls.count("load_single") == 1
        assert len(entries(place)) == 1  # of the good one
    saved_model(place / "base", seed=0)
    assert folder.find("math", "m") is not None


@pytest.mark.parametrize("error", [FileError("No space left on device"), ConfigError("there is not enough memory")])
def test_errors_that_may_pass_are_not_remembered(
    error: TnadaptError, place: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(*_: object, **more: object) -> None:
        raise error from (MemoryError() if isinstance(error, ConfigError) else None)

    tna.save(place / "adapters" / "math.safetensors", adapter(P.lora(2)))
    folder = served(place)
    with monkeypatch.context() as patch:
        patch.setattr(served_folder, "convert", fail)
        with pytest.raises(type(error)):
            folder.find("math", "m")
    assert folder.find("math", "m") is not None


# -- Members of populations --------------------------------------------------------------------------------------------


LORA = P.lora(2)


def save_population(
    path: Path, names: Sequence[str | None], preset: tna.Config = LORA, seed: int = 0
) -> list[AdapterFile]:
    """Write a population of different members, with the fingerprint of the base; return its members."""
    members = [adapter(preset, seed + number, base=0) for number in range(len(names))]
    tna.save(path, tna.PopulationFile.from_members(members, names))
    return members


def served_bytes(found: served_folder.ServedAdapter | None) -> dict[str, bytes]:
    assert found is not None
    return {path.name: path.read_bytes() for path in Path(found.path).iterdir()}


NAMES = ["ann", "user@example.com", "../größe 7", None]


@pytest.mark.parametrize("preset", [P.lora(2), P.tinylora(13)])
def test_a_member_is_served_as_its_own_file_would_be(preset: tna.Config, place: Path) -> None:
    (place / "adapters" / "users").mkdir()
    for path in (place / "adapters" / "users" / "adapter.safetensors", place / "adapters" / "users.safetensors"):
        members = save_population(path, NAMES, preset)
        folder = served(place)
        for name, member in zip(NAMES[:3], members, strict=False):
            tna.save(place / "alone.safetensors", member)
            expected = tna.convert(place / "alone.safetensors", to="vllm-lora", base=place / "base").files
            found = folder.find(name, "m")
            assert served_bytes(found) == expected
            assert folder.file_of(name) == path
            # The cache is that of the content.
            tna.save(place / "adapters" / "alone.safetensors", member)
            assert folder.find("alone", "m") == found
        assert folder.find("3", "m") is None
        assert folder.find("", "m") is None
        with pytest.raises(FileError, match="is a population: request one of its members, by the member's name"):
            folder.find("users", "m")
        path.unlink()
    assert served(place).find("ann", "m") is None


def test_what_members_share_is_computed_once(place: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with_base, calls = AdapterFile.with_base, list[int]()
    monkeypatch.setattr(AdapterFile, "with_base", lambda file, weights: calls.append(1) or with_base(file, weights))
    path = place / "adapters" / "users.safetensors"
    save_population(path, [f"user-{number}" for number in range(5)], P.tinylora(13))
    folder = served(place)
    entries = {folder.find(f"user-{number}", "m") for number in range(5)}
    assert (len(entries), len(calls)) == (5, 1)
    arrays = {name: np.ones_like(array) for name, array in tna.load(path)[0].arrays.items()}
    tna.append(path, arrays, "user-5")
    tna.replace(path, "user-0", {name: 2 * array for name, array in arrays.items()})
    entries |= {folder.find("user-5", "m"), folder.find("user-0", "m")}
    assert (len(entries), len(calls)) == (7, 1)
    saved_model(place / "base", seed=1)
    for _ in range(2):
        with pytest.raises(TargetError, match="base is another model than the one that the adapter was trained on"):
            folder.find("user-0", "m")
    saved_model(place / "base")
    assert folder.find("user-4", "m") not in entries
    assert len(calls) == 2


def test_changes_of_a_population_are_seen(place: Path) -> None:
    path = place / "adapters" / "users.safetensors"
    _, bob = save_population(path, ["ann", "bob"])
    folder = served(place)
    first = folder.find("ann", "m")
    assert folder.find("cid", "m") is None
    other = adapter(P.lora(2), 7, base=0)
    tna.append(path, other, "cid")
    added = folder.find("cid", "m")
    assert added not in (first, None)
    assert folder.find("ann", "m") == first
    tna.replace(path, "ann", other)
    assert folder.find("ann", "m") == added
    # A file of this name comes first, and a member of two files is refused.
    tna.save(place / "adapters" / "ann.safetensors", bob)
    assert folder.find("ann", "m") == folder.find("bob", "m")
    (place / "adapters" / "ann.safetensors").unlink()
    assert folder.find("ann", "m") == added
    save_population(twice := place / "adapters" / "more.safetensors", ["dan", "ann"])
    for find in (lambda: folder.find("ann", "m"), lambda: folder.file_of("ann")):
        with pytest.raises(FileError) as caught:
            find()
        assert str(caught.value) == f"several files have a member 'ann': {twice}, {path}. Leave it in one of them"
    assert folder.find("dan", "m") == first  # of the same content
    twice.unlink()
    assert folder.find("dan", "m") is None


def test_other_files_of_the_folder_are_passed_over(place: Path, calls: list[str]) -> None:
    for name in ("users", "more"):
        save_population(place / "adapters" / f"{name}.safetensors", [f"{name}-{number}" for number in range(20)])
    (place / "adapters" / "link.safetensors").symlink_to("nowhere")
    (place / "adapters" / "folder.safetensors").mkdir()
    (place / "adapters" / "empty").mkdir()
    (place / "adapters" / "notes.txt").write_text("mine")
    (place / "adapters" / ".hidden.safetensors").write_text("damaged")
    folder = served(place)
    for number in range(20):
        path = folder.file_of(f"more-{number}")
        assert path == place / "adapters" / "more.safetensors"
        assert folder.file_of(f"more-{number}-{number}") is None
    assert calls.count("load") == 2
    path.rename(place / "adapters" / "folder.safetensors" / "adapter.safetensors")
    assert folder.file_of("more-3") == place / "adapters" / "folder.safetensors" / "adapter.safetensors"
    assert folder.file_of("users-3") == place / "adapters" / "users.safetensors"
    assert calls.count("load") == 3


def test_a_damaged_population_hides_no_other_adapter(place: Path) -> None:
    save_population(place / "adapters" / "users.safetensors", ["ann", "bob"])
    save_population(broken := place / "adapters" / "broken.safetensors", ["cid", "dan"], seed=4)
    content = broken.read_bytes()
    folder = served(place)
    before = folder.find("cid", "m")
    broken.write_bytes(content[:-1] + bytes([content[-1] ^ 1]))  # of the checksum of the last member
    assert folder.find("cid", "m") == before
    with pytest.raises(FileError, match=r"broken\.safetensors: member 1 \('dan'\) is damaged"):
        folder.find("dan", "m")
    broken.write_bytes(content[:400])
    assert folder.find("ann", "m") is not None
    for name in ("cid", "nobody"):
        with pytest.raises(FileError, match=r"broken\.safetensors"):
            folder.find(name, "m")
    broken.write_bytes(content)
    assert (folder.find("cid", "m"), folder.find("nobody", "m")) == (before, None)


@pytest.mark.parametrize(
    ("start", "numbers"),
    [("0123abcd", [19114957, 19114958, 19114959]), ("ffffffff", [2**31 - 1, 1, 2]), ("80000000", [1, 2, 3])],
)
def test_no_two_adapters_have_one_number(
    start: str, numbers: list[int], place: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    names = ["ann", "bob", "cid"]
    save_population(place / "adapters" / "users.safetensors", names)
    digest = served_folder._digest
    monkeypatch.setattr(served_folder, "_digest", lambda *arguments: start + digest(*arguments)[8:])
    folder = served(place)
    for _ in range(2):
        adapters = [folder.find(name, "m") for name in names]
        assert [each.number for each in adapters if each is not None] == numbers
    assert len({each.path for each in adapters if each is not None}) == 3
