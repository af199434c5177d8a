"""The check that a file's adapter has the form of one on a model, and what is said of the difference."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

from tnadapt.checkpoints.adapter_file import AdapterFile
from tnadapt.errors import FileError, pluralize, safe_repr
from tnadapt.targets.target import Target

from ._state import AdapterState
from ._tied_weights import names_of_shared

__all__ = ["check_same"]


def check_same(adapter: AdapterState, file: AdapterFile) -> None:
    """Raise a FileError unless config, activation, targets and kept parameters are the same."""
    names = names_of_shared(adapter.model)
    # Of a tied weight, an adapter keeps the first name, and a file any of them.
    their_kept, our_kept = (sorted({names.get(name, [name])[0] for name in own}) for own in (file.kept, adapter.kept))
    compared: list[tuple[str, Any, Any, Callable[[Any, Any], str]]] = [
        # How it is trained changes no array.
        ("config", file.config.replace(rate="sgd"), adapter.plan.config.replace(rate="sgd"), _settings),
        ("activation", file.activation, adapter.activation, _values),
        ("list of targets", _places(file.targets), _places(adapter.targets), _targets),
        ("list of kept parameters", their_kept, our_kept, _values),
    ]
    for what, theirs, ours, difference in compared:
        if theirs != ours:
            raise FileError(
                f"its {what} differs from that of adapter {adapter.name!r} ({difference(theirs, ours)}): attach the "
                "adapter as it was for this file, or load the file under another name"
            )


def _values(theirs: Any, ours: Any) -> str:
    return f"{safe_repr(theirs)} in the file, {safe_repr(ours)} here"


def _settings(theirs: Any, ours: Any) -> str:
    """Return the settings that differ, of which the others need no mention."""
    mine, other = ours.to_dict(), theirs.to_dict()
    names = [name for name in mine if name in other and mine[name] != other[name]]
    if not names or mine.keys() != other.keys() or "parts" in mine:
        return _values(theirs, ours)
    return "; ".join(f"{name}: {_values(other[name], mine[name])}" for name in names)


def _targets(theirs: Sequence[tuple[Any, ...]], ours: Sequence[tuple[Any, ...]]) -> str:
    numbers = f"{pluralize(len(theirs), 'weight')} in the file, {len(ours)} here"
    for place in theirs:
        if place not in ours:
            return f"{numbers}; not here: {safe_repr(place[0])} of {place[1]}"
    extra = next((place for place in ours if place not in theirs), None)
    return (
        f"{numbers}; not in the file: {safe_repr(extra[0])} of {extra[1]}" if extra else f"{numbers}, in another order"
    )


def _places(targets: Sequence[Target]) -> list[tuple[Any, ...]]:
    return [(target.label, target.shape, target.index, target.rows, target.tied) for target in targets]
