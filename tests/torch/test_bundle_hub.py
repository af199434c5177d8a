"""Uploads and downloads, with the functions of huggingface_hub replaced."""

from __future__ import annotations

import dataclasses
import shutil
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

torch = pytest.importorskip("torch")
transformers = pytest.importorskip("transformers")
huggingface_hub = pytest.importorskip("huggingface_hub")

import tnadapt as tna
import tnadapt.torch as tt
from tnadapt.errors import FileError, TnadaptError

from . import test_bundle as bundle
from .test_bundle import adapted, bert, outputs, tokenizer

__all__ = ["bert"]  # the fixture


class Hub:
    """Repositories in a folder, and a record of all calls."""

    def __init__(self, root: Path) -> None:
        self.root, self.calls = root, list[tuple[Any, ...]]()

    def api(self, token: Any = None) -> Hub:
        self.calls.append(("HfApi", token))
        return self

    def create_repo(self, repo_id: str, **settings: Any) -> None:
        self.calls.append(("create_repo", repo_id, settings))
        (self.root / repo_id).mkdir(parents=True, exist_ok=True)

    def create_branch(self, repo_id: str, **settings: Any) -> None:
        self.calls.append(("create_branch", repo_id, settings))

    def file_exists(self, repo_id: str, filename: str, revision: Any = None) -> bool:
        return (self.root / repo_id / filename).exists()

    def upload_folder(self, *, repo_id: str, folder_path: Path, ignore_patterns: Any, **settings: Any) -> Any:
        self.calls.append(("upload_folder", repo_id, settings))
        ignored = shutil.ignore_patterns(*(ignore_patterns or ()))
        shutil.copytree(folder_path, self.root / repo_id, ignore=ignored, dirs_exist_ok=True)
        return SimpleNamespace(commit_url=f"https://hub/{repo_id}/commit/1")

    def hf_hub_download(self, repo_id: str, filename: str, **settings: Any) -> str:
        self.calls.append(("hf_hub_download", repo_id, filename, settings))
        if not (self.root / repo_id / filename).exists():
            raise FileNotFoundError("404 Client Error.\nRepository Not Found")
        return str(self.root / repo_id / filename)

    def snapshot_download(self, repo_id: str, *, allow_patterns: list[str], **settings: Any) -> str:
        self.calls.append(("snapshot_download", repo_id, settings))
        folder = self.root / "snapshots"
        for pattern in allow_patterns:
            for path in (self.root / repo_id).glob(pattern):
                folder.mkdir(exist_ok=True)
                shutil.copy(path, folder)
        return str(folder)


@pytest.fixture
def hub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Hub:
    made = Hub(tmp_path / "hub")
    monkeypatch.setattr(huggingface_hub, "HfApi", made.api)
    monkeypatch.setattr(huggingface_hub, "hf_hub_download", made.hf_hub_download)
    monkeypatch.setattr(huggingface_hub, "snapshot_download", made.snapshot_download)
    return made


def test_an_upload(bert: Path, hub: Hub) -> None:
    _, adapter = adapted(bert, "user/base")
    address = adapter.push_to_hub(
        "user/mine", private=True, token="hf_x", commit_message="First", tokenizer=tokenizer(), metrics={"f1": 0.5}
    )
    assert address == "https://hub/user/mine/commit/1"
    assert hub.calls == [
        ("HfApi", "hf_x"),
        ("create_repo", "user/mine", {"private": True, "exist_ok": True}),
        ("upload_folder", "user/mine", {"commit_message": "First", "revision": None}),
    ]
    names = sorted(path.name for path in (hub.root / "user" / "mine").iterdir())
    assert names == ["README.md", "adapter.safetensors", "tokenizer.json", "tokenizer_config.json"]
    assert tna.load(hub.root / "user/mine/adapter.safetensors").pretrained == adapter.pretrained
    card = (hub.root / "user/mine/README.md").read_text()
    assert 'base_model: "user/base"' in card
    assert 'load_pretrained("user/mine")' in card
    assert "# mine\n" in card


def test_a_branch_and_a_card_that_stays(bert: Path, hub: Hub) -> None:
    _, adapter = adapted(bert)
    (hub.root / "user" / "mine").mkdir(parents=True)
    card = hub.root / "user" / "mine" / "README.md"
    card.write_text("by hand")
    adapter.push_to_hub("user/mine", revision="v2")
    assert ("create_branch", "user/mine", {"branch": "v2", "exist_ok": True}) in hub.calls
    assert hub.calls[-1] == (
        "upload_folder", "user/mine", {"commit_message": "Upload a tnadapt adapter", "revision": "v2"}
    )  # fmt: skip
    assert card.read_text() == "by hand"
    adapter.push_to_hub("user/mine", overwrite_card=True)
    assert "An adapter of [tnadapt]" in card.read_text()


def test_a_local_base_is_not_named_in_an_upload(bert: Path, hub: Hub) -> None:
    model, adapter = adapted(bert)
    assert adapter.pretrained.name == str(bert)
    adapter.push_to_hub("user/mine")
    for path in (hub.root / "user" / "mine").iterdir():
        assert str(bert).encode() not in path.read_bytes()
    assert adapter.pretrained.name == str(bert)
    with pytest.raises(FileError, match="it does not name its base model: give base="):
        tt.load_pretrained("user/mine")
    assert torch.equal(outputs(tt.load_pretrained("user/mine", base=bert)), outputs(model))
    fresh = transformers.BertForSequenceClassification.from_pretrained(bert, num_labels=3)
    assert tt.from_pretrained(fresh, "user/mine", revision="v1").num_parameters == adapter.num_parameters
    assert hub.calls[-1][-1] == {"revision": "v1", "token": None}


@pytest.mark.parametrize(
    ("given", "uploaded"),
    [
        ("/home/ann/words", "./tokenizer"), ("/home/ann/words/", "./tokenizer"), (r"C:\Users\ann\words", "./tokenizer"),
        ("~ann", "./tokenizer"), ("/", "./tokenizer"), ("user/words", "user/words"), ("words", "words"),
    ],
)  # fmt: skip
def test_a_local_tokenizer_is_not_named_in_an_upload(bert: Path, hub: Hub, given: str, uploaded: str) -> None:
    _, adapter = adapted(bert, "user/base")
    adapter.pretrained = dataclasses.replace(adapter.pretrained, inputs={"tokenizer": given, "max_length": 8})
    adapter.push_to_hub("user/mine")
    found = tna.load(hub.root / "user/mine/adapter.safetensors").pretrained
    assert found == dataclasses.replace(adapter.pretrained, inputs={"tokenizer": uploaded, "max_length": 8})
    assert adapter.pretrained.inputs["tokenizer"] == given


def test_a_download(bert: Path, hub: Hub, monkeypatch: pytest.MonkeyPatch) -> None:
    model, adapter = adapted(bert, "user/base")
    adapter.push_to_hub("user/mine", tokenizer=tokenizer())
    hub.calls.clear()
    build = transformers.AutoModelForSequenceClassification.from_pretrained
    asked = list[tuple[str, Any, Any]]()

    def found(name: str, **settings: Any) -> Any:
        asked.append((name, settings["revision"], settings["trust_remote_code"]))
        return build(bert, **{**settings, "revision": None})

    monkeypatch.setattr(transformers.AutoModelForSequenceClassification, "from_pretrained", found)
    loaded = tt.load_pretrained("user/mine", revision="v2", token="hf_x")
    assert asked == [("user/base", "a" * 40, False)]
    assert hub.calls == [("hf_hub_download", "user/mine", "adapter.safetensors", {"revision": "v2", "token": "hf_x"})]
    words = tt.load_processor("user/mine")(["good film"], return_tensors="pt")
    assert hub.calls[-1] == ("snapshot_download", "user/mine", {"revision": None, "token": None})
    assert sorted(path.name for path in (hub.root / "snapshots").iterdir()) == [
        "tokenizer.json", "tokenizer_config.json"
    ]  # fmt: skip
    assert torch.equal(outputs(loaded, **words), outputs(model, **words))
    assert loaded.config.id2label == dict(enumerate(bundle.LABELS))


def test_messages(bert: Path, hub: Hub, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(TnadaptError) as caught:
        tt.load_pretrained("user/missing")
    assert str(caught.value) == (
        "cannot download adapter.safetensors of 'user/missing', which is no file or folder here, from the hub: 404 "
        "Client Error.; check the name, the network and the token, or give a folder"
    )
    _, adapter = adapted(bert)
    for name in ("a/b/c", "mine", "../mine"):
        with pytest.raises(TnadaptError, match=r"repo_id must be like 'user/my-adapter'; got "):
            adapter.push_to_hub(name)

    def offline(*_: Any, **__: Any) -> None:
        raise OSError("Cannot reach https://hub: offline mode is enabled.")

    monkeypatch.setattr(hub, "create_repo", offline)
    with pytest.raises(TnadaptError) as caught:
        adapter.push_to_hub("user/mine")
    assert str(caught.value) == (
        "cannot upload to 'user/mine' on the hub: Cannot reach https://hub: offline mode is enabled.; check the name, "
        "the network and the token"
    )
