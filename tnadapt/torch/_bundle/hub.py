"""Adapters on the Hugging Face Hub: where one is, downloads of its file, uploads of its folder."""

from __future__ import annotations

import os
import re
from pathlib import Path
from typing import Any

from tnadapt.checkpoints.container import path_of
from tnadapt.errors import FileError, TnadaptError, safe_repr

from .model_library import refusing

__all__ = ["FILE_NAME", "PROCESSOR_FILES", "README", "adapter_path", "is_repository", "processor_folder", "upload"]

#: Names of the adapter and of its card in a folder or repository.
FILE_NAME = "adapter.safetensors"
README = "README.md"

#: A tokenizer or processor has one of these files.
PROCESSOR_FILES = ("tokenizer_config.json", "preprocessor_config.json", "processor_config.json")
# All files that they may have; no code.
_PROCESSOR_PATTERNS = [
    *PROCESSOR_FILES, "tokenizer*.json", "special_tokens_map.json", "added_tokens.json", "vocab.*", "merges.txt",
    "*.model", "*.jinja",
]  # fmt: skip

_REPOSITORY = re.compile(r"\w[\w.-]*/\w[\w.-]*", re.ASCII)


def is_repository(where: str | os.PathLike[str]) -> bool:
    """Return whether this is a name on the hub: no file or folder here, and not written like one."""
    name = path_of(where)
    if isinstance(where, os.PathLike) or os.path.exists(name):
        return False
    return _REPOSITORY.fullmatch(name) is not None and not name.endswith(".safetensors")


def adapter_path(where: str | os.PathLike[str], revision: str | None = None, token: str | bool | None = None) -> Path:
    """Return the path of an adapter's file: the file itself, one in a folder, or a download from the hub.

    Raises
    ------
    FileError
        If there is none.
    TnadaptError
        If huggingface_hub is not installed.
    """
    if is_repository(where):
        return _downloaded(str(where), revision, token)
    path = Path(path_of(where))
    if path.is_dir():
        if not (path / FILE_NAME).is_file():
            raise FileError(f"{path}: this folder has no {FILE_NAME}, which save_pretrained writes{_peft_hint(path)}")
        return path / FILE_NAME
    if not path.exists():
        raise FileError(f"{path}: there is no such file or folder; a name on the hub is like 'user/my-adapter'")
    return path


def _peft_hint(folder: Path) -> str:
    if not (folder / "adapter_config.json").is_file():
        return ""
    return "; it has an adapter of PEFT, which tnadapt.convert (tnadapt convert) turns into one"


def _downloaded(name: str, revision: str | None, token: str | bool | None) -> Path:
    hub = _hub()
    with refusing(
        f"cannot download {FILE_NAME} of {safe_repr(name)}, which is no file or folder here, from the hub",
        "check the name, the network and the token, or give a folder",
    ):
        return Path(hub.hf_hub_download(name, FILE_NAME, revision=revision, token=token))


def processor_folder(name: str, revision: str | None, token: str | bool | None) -> Path:
    """Download the files of a repository's tokenizer or processor; return their folder."""
    hub = _hub()
    with refusing(
        f"cannot download the tokenizer or processor of {safe_repr(name)} from the hub",
        "check the name, the network and the token, or give a folder",
    ):
        return Path(hub.snapshot_download(name, revision=revision, token=token, allow_patterns=_PROCESSOR_PATTERNS))


def upload(
    folder: Path,
    name: str,
    *,
    private: bool | None,
    token: str | bool | None,
    commit_message: str | None,
    revision: str | None,
    overwrite_card: bool,
) -> str:
    """Upload a folder to a repository, which is created if needed; return the commit's address.

    A card that is in the repository stays unless ``overwrite_card``.
    """
    if _REPOSITORY.fullmatch(name) is None:
        raise TnadaptError(f"repo_id must be like 'user/my-adapter'; got {safe_repr(name)}")
    api = _hub().HfApi(token=token)
    with refusing(f"cannot upload to {safe_repr(name)} on the hub", "check the name, the network and the token"):
        api.create_repo(name, private=private, exist_ok=True)
        if revision is not None:
            api.create_branch(name, branch=revision, exist_ok=True)
        has_card = not overwrite_card and api.file_exists(name, README, revision=revision)
        commit = api.upload_folder(
            repo_id=name,
            folder_path=folder,
            commit_message=commit_message or "Upload a tnadapt adapter",
            revision=revision,
            ignore_patterns=[README] if has_card else None,
        )
    return str(commit.commit_url)


def _hub() -> Any:
    try:
        import huggingface_hub
    except ImportError:
        raise TnadaptError(
            "huggingface_hub is not installed, which talks to the hub: pip install 'tnadapt[hub]'"
        ) from None
    return huggingface_hub
