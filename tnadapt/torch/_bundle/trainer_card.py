"""The card of an adapter that a Trainer trained: the adapter's own, with what the Trainer writes about its training."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

from tnadapt.checkpoints import adapter_format

from .hub import FILE_NAME, README
from .model_card import marked, model_card, unmarked

__all__ = ["complete_trainer_card"]

# transformers and TRL give this tag to the cards that they write.
_TAG = "generated_from_trainer"
# TRL's example loads a whole model, which is not there.
_NO_SECTION = ("Quick start",)
# "This model is a fine-tuned version of …", or "… was trained from scratch": the adapter's card says what it is.
_CLAIM = re.compile(r"^This model (is a fine-tuned version of|was trained from scratch)\b.*\n?", re.MULTILINE)


def complete_trainer_card(folder: Path, where: str) -> None:
    """Put the card of a folder's adapter before the text of its README.md, if a Trainer wrote that.

    A Trainer's card says how to load a whole model. The front matter is that of both.

    Parameters
    ----------
    folder : Path
        Nothing happens unless it has an adapter's file and a Trainer's card.
    where : str
        The name of the folder or repository, from which the card loads the adapter.
    """
    card, file = folder / README, folder / FILE_NAME
    if not card.is_file() or not file.is_file():
        return
    theirs = card.read_text(encoding="utf-8")
    if unmarked(theirs) is not None or _TAG not in _tags(_front_matter(theirs)):
        return
    ours = unmarked(model_card(adapter_format.load(file), where, {}))
    assert ours is not None
    card.write_text(marked(_combined(ours, theirs)), encoding="utf-8", newline="\n")


def _combined(ours: str, theirs: str) -> str:
    from huggingface_hub.utils import yaml_dump

    about, more = _front_matter(ours), _front_matter(theirs)
    tags = list(dict.fromkeys([*_tags(about), *_tags(more)]))
    front = yaml_dump({**more, **about, "tags": tags}, sort_keys=False)
    return f"---\n{front}---\n{_body(ours).rstrip()}\n\n{_training(_body(theirs))}"


def _training(body: str) -> str:
    """Return a Trainer's text without its title, its claims about the model, and examples of loading it."""
    intro, *sections = re.split(r"^## ", body, flags=re.MULTILINE)
    intro = _CLAIM.sub("", re.sub(r"^# .*\n?", "", _without_comments(intro), flags=re.MULTILINE)).strip()
    kept = [f"## {section.strip()}\n" for section in sections if not section.startswith(_NO_SECTION)]
    return "\n".join([f"## Training\n\n{intro}\n"] * bool(intro) + kept)


def _without_comments(text: str) -> str:
    return re.sub(r"<!--.*?-->", "", text, flags=re.DOTALL)


def _front_matter(card: str) -> dict[str, Any]:
    from huggingface_hub import ModelCard

    found: dict[str, Any] = ModelCard(card, ignore_metadata_errors=True).data.to_dict()
    return found


def _body(card: str) -> str:
    from huggingface_hub import ModelCard

    text: str = ModelCard(card, ignore_metadata_errors=True).text
    return text


def _tags(front: dict[str, Any]) -> list[str]:
    tags = front.get("tags") or []
    return [tags] if isinstance(tags, str) else list(tags)
