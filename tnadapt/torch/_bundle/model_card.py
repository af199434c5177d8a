"""The model card that is saved next to an adapter: README.md, of which hubs read the first lines."""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from tnadapt.algebra.config import Config
from tnadapt.checkpoints.adapter_file import AdapterFile
from tnadapt.checkpoints.pretrained_model import Pretrained
from tnadapt.errors import FileError, escaped, pluralize

from .hub import README

__all__ = ["marked", "model_card", "unmarked", "write_card"]

# Names of repositories on the hub.
_REPOSITORY = re.compile(r"[A-Za-z0-9][\w.-]*(/[A-Za-z0-9][\w.-]*)?", re.ASCII)
_MARK = re.compile(r"\n<!-- tnadapt wrote this: ([0-9a-f]{16}) -->\n\Z")
#: Labels that a card lists.
_LISTED = 20
# Letters of a setting, such as explicit groups.
_LONG = 200
#: The hub's names of tasks that differ from those here.
_HUB_TASKS = {"speech-seq2seq": "automatic-speech-recognition", "speech-ctc": "automatic-speech-recognition"}


def model_card(file: AdapterFile, where: str, metrics: Mapping[str, float]) -> str:
    """Return the text of a card.

    Parameters
    ----------
    file : AdapterFile
    where : str
        The name of the folder or repository, from which the card loads the adapter.
    metrics : dict of str to float
    """
    about = file.pretrained or Pretrained()
    lines = ["---", *_front_matter(about), "---", "", f"# {_text(Path(where).name)}", ""]
    lines += [*_what(file, about), "", *_labels(about), *_metrics(metrics), "## Use", "", *_use(about, where)]
    return marked("\n".join(lines) + "\n")


def marked(text: str) -> str:
    """Return a card with the mark by which :func:`unmarked` knows that nobody edited it."""
    return f"{text}\n<!-- tnadapt wrote this: {_digest(text)} -->\n"


def unmarked(card: str) -> str | None:
    """Return a card without its mark, or None if it has none or was edited."""
    found = _MARK.search(card)
    text = card[: found.start()] if found is not None else ""
    return text if found is not None and _digest(text) == found[1] else None


def write_card(folder: Path, text: str, overwrite: bool) -> bool:
    """Write the card; return False, and leave the one that is there, if somebody else wrote or edited it."""
    path = folder / README
    try:
        if path.exists() and not overwrite and not _untouched(path):
            return False
        path.write_text(text, encoding="utf-8", newline="\n")
    except OSError as error:
        raise FileError(f"{path}: cannot write the card: {error}") from None
    return True


def _untouched(path: Path) -> bool:
    return unmarked(path.read_text(encoding="utf-8", errors="replace")) is not None


def _digest(text: str) -> str:
    return hashlib.sha256(text.encode()).hexdigest()[:16]


def _front_matter(about: Pretrained) -> Iterator[str]:
    if name := _repository(about):
        yield f"base_model: {json.dumps(name)}"
        yield "base_model_relation: adapter"
    yield "library_name: tnadapt"
    if about.task:
        yield f"pipeline_tag: {_HUB_TASKS.get(about.task, about.task)}"
    yield from ("tags:", "- tnadapt")


def _repository(about: Pretrained) -> str:
    """Return the base's name on the hub; "" if it has none, as the hub refuses cards with other names."""
    name = about.name.removeprefix("hf-hub:")
    if about.local or _REPOSITORY.fullmatch(name) is None or "--" in name or ".." in name:
        return ""
    return f"timm/{name}" if about.library == "timm" and "/" not in name else name


def _what(file: AdapterFile, about: Pretrained) -> Iterator[str]:
    model = f" ({_text(file.model)})" if file.model else ""
    base = f"`{_base(about)}`{model}" if about.name else f"a {_text(file.model)}" if file.model else "a model"
    yield f"An adapter of [tnadapt](https://tnadapt.readthedocs.io) for {base}."
    yield ""
    roles = ", ".join(dict.fromkeys(target.role for target in file.targets))
    names = [_code(target.name) for target in file.targets]
    listed = ", ".join(f"`{name}` … `{names[-1]}`" if len(names) > 1 else f"`{name}`" for name in names[:1])
    rows = [
        ("Trained parameters", f"{file.num_parameters:,} {file.dtype}"),
        ("Updated weights", f"{pluralize(len(names), 'weight')} ({roles}): {listed}"),
        *_configs(file.config.to_dict()),
    ]
    if file.kept:
        kept = [f"`{_code(name)}`" for name in file.kept]
        rows.append(("Also trained", ", ".join(kept[:6]) + (f" and {len(kept) - 6} more" if len(kept) > 6 else "")))
    if about.task:
        rows.append(("Task", about.task))
    yield from _table(("", ""), rows)


def _configs(settings: dict[str, Any]) -> Iterator[tuple[str, str]]:
    """Return a row for the config, or one for each of several."""
    if "parts" not in settings:
        yield "Config", _config(settings)
    for own, weights in settings.get("parts", ()):
        yield "Config", f"{_config(own)} for {pluralize(weights, 'weight')}"


def _config(settings: dict[str, Any]) -> str:
    """Return the settings that differ from the defaults, and the rank; long ones in part."""
    usual = {**Config().to_dict(), "rank": None}
    told = {name: json.dumps(value) for name, value in settings.items() if value != usual.get(name)}
    told.pop("weight_shape", None)
    short = {name: text if len(text) <= _LONG else text[:_LONG] + " …" for name, text in told.items()}
    return ", ".join(f"`{_code(f'{name}={text}')}`" for name, text in short.items())


def _base(about: Pretrained) -> str:
    name = Path(about.name).name if about.local else about.name
    parts = [about.file and f"file {about.file}", about.revision and f"revision {about.revision}"]
    return _code(", ".join(filter(None, (name, *parts))))


def _labels(about: Pretrained) -> Iterator[str]:
    if about.labels:
        more = len(about.labels) - _LISTED
        listed = ", ".join(f"{number} {_text(label)}" for number, label in enumerate(about.labels[:_LISTED]))
        yield f"Labels: {listed}" + (f" and {more} more." if more > 0 else ".")
        yield ""


def _metrics(metrics: Mapping[str, float]) -> Iterator[str]:
    if metrics:
        yield from ("## Results", "")
        yield from _table(("metric", "value"), [(_text(name), f"{value:.6g}") for name, value in metrics.items()])
        yield ""


def _use(about: Pretrained, where: str) -> Iterator[str]:
    base = "" if _repository(about) else ', base="…"'
    yield from ("```python", "import tnadapt.torch", "")
    if about.task and about.library:
        yield f"model = tnadapt.torch.load_pretrained({json.dumps(where)}{base})"
        yield f"processor = tnadapt.torch.load_processor({json.dumps(where)})"
    else:
        yield f"adapter = tnadapt.torch.from_pretrained(model, {json.dumps(where)})  # on the base model"
    yield from ("```", "")
    if base:
        yield "The base model is not on the hub: give its folder, or the model itself."
        yield ""
    yield "`load_pretrained(…, merge=True)` adds the update to the weights, so that the model runs as fast as its base."
    yield "`tnadapt merge` writes a checkpoint with the update in its weights, which loads as that of the base does."
    yield "`tnadapt info` describes the file."


def _table(head: tuple[str, str], rows: list[tuple[str, str]]) -> Iterator[str]:
    yield f"| {head[0]} | {head[1]} |"
    yield "|---|---|"
    yield from (f"| {name} | {value} |" for name, value in rows)


def _text(text: str) -> str:
    """Return text that stays text in Markdown, on one line."""
    line = escaped(" ".join(text.split()))
    return re.sub(r"([\\`*_\[\]<>|#])", r"\\\1", line)


def _code(text: str) -> str:
    """Return text for a code span, in which Markdown escapes nothing; a table's cells end at a bar."""
    return escaped(" ".join(text.replace("`", "'").split())).replace("|", "\\|")
