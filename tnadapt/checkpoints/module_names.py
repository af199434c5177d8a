"""Names of a model's parameters that are not those of its checkpoint, as transformers renames them on loading.

From version 5 on, transformers gives many architectures other module names than their checkpoints have, and saves under
the names of the checkpoints: the queries of ViT are ``layers.0.attention.q_proj`` in memory, and
``encoder.layer.0.attention.attention.query`` on disk. Its own table says how, and is read if transformers is installed.
No model is built: ``config.json`` tells whose entries apply, and a name counts only if a tensor has it.
"""

from __future__ import annotations

import functools
import importlib
import importlib.util
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Any

__all__ = ["ModuleNames"]

# No model nests its modules this deep, and no config has as many parts.
_MAX_DEPTH, _MAX_PARTS = 64, 64


class ModuleNames:
    """The names that the parameters of a model may have in its checkpoint.

    Parameters
    ----------
    config : mapping, None or callable
        Its ``config.json``, or a function that returns it. It is read, and transformers imported, on the first name.

    Examples
    --------
    >>> ModuleNames(None).of("encoder.layer.0.fc.weight")
    ['encoder.layer.0.fc.weight']
    """

    def __init__(self, config: Mapping[str, Any] | Callable[[], Mapping[str, Any] | None] | None) -> None:
        self._config = config

    def of(self, name: str) -> list[str]:
        """Return the names that a parameter may have in the checkpoint; first its own."""
        parts = name.split(".")
        found = {name: None}
        if len(parts) > _MAX_DEPTH or not self._tables:
            return [name]
        # transformers renames a parameter within the innermost model that has it, and then within those around that.
        # Which modules are models is unknown here, so that every part of the path is tried as one.
        for depth in range(len(parts) - 1, -1, -1):
            prefix = "".join(f"{part}." for part in parts[:depth])
            for known in [known for known in found if known.startswith(prefix)]:
                for table in self._tables:
                    found[prefix + _renamed(table, known.removeprefix(prefix))] = None
        return list(found)

    def inverse(self, names: Iterable[str]) -> dict[str, list[str]]:
        """Return for each name in a checkpoint those of the given parameters that may have it there."""
        found: dict[str, list[str]] = {}
        for name in names:
            for stored in self.of(name):
                found.setdefault(stored, []).append(name)
        return found

    @property
    def way_out(self) -> str:
        """The end of a message about a name that was not found; empty if transformers' table was read."""
        if not self._kinds or _installed():
            return ""
        return ". transformers may have renamed it on loading: install transformers, whose table of names is then read"

    @functools.cached_property
    def _kinds(self) -> dict[str, None]:
        return dict.fromkeys(_kinds(self._config() if callable(self._config) else self._config))

    @functools.cached_property
    def _tables(self) -> list[Sequence[Any]]:
        """For each type and class of the model and its parts, the transforms by which transformers saves it."""
        if not self._kinds or not _installed():
            return []
        return [table for kind in _with_classes(self._kinds) for table in _saving(kind)]


def _installed() -> bool:
    return importlib.util.find_spec("transformers") is not None


def _kinds(config: Any) -> Iterator[str]:
    """Yield the types and classes that a config names for a model and its parts."""
    parts = [config]
    for _ in range(_MAX_PARTS):
        if not parts:
            return
        part = parts.pop()
        if isinstance(part, Mapping):
            classes = part.get("architectures")
            for kind in (part.get("model_type"), *(classes if isinstance(classes, list) else ())):
                if isinstance(kind, str):
                    yield kind
            parts += [value for value in part.values() if isinstance(value, Mapping)]


def _with_classes(kinds: Iterable[str]) -> list[str]:
    """Return types and classes of models, with the classes that belong to the types."""
    classes = vars(importlib.import_module("transformers.models.auto.modeling_auto"))
    configs = importlib.import_module("transformers.models.auto.configuration_auto").CONFIG_MAPPING_NAMES
    found = dict[str, None]()
    for kind in kinds:
        found[kind] = None
        for table in [table for name, table in classes.items() if name.endswith("_MAPPING_NAMES")]:
            own = table.get(kind, ())
            found |= dict.fromkeys((own,) if isinstance(own, str) else own)
        # Some parts of models, such as the text model of SigLIP, have classes that no table lists.
        if isinstance(config := configs.get(kind), str):
            found[f"{config.removesuffix('Config')}Model"] = None
    return list(found)


def _saving(kind: str) -> Iterator[Sequence[Any]]:
    """Yield the transforms by which transformers saves a type or class of models; none if it renames nothing."""
    try:
        mapping = importlib.import_module("transformers.conversion_mapping")
    except ModuleNotFoundError:  # before 5.0, checkpoints have the names of the modules
        return
    loading = mapping.get_checkpoint_conversion_mapping(kind) or ()
    saving = [transform.reverse_transform() for transform in reversed(loading)]
    # Saving adds a prefix only if loading has removed it, so that it may be missing.
    without = [transform for transform in saving if type(transform).__name__ != "PrefixChange"]
    yield from (table for table in (saving, without if len(without) < len(saving) else ()) if table)


def _renamed(saving: Sequence[Any], name: str) -> str:
    """Return the name under which a parameter is saved; its own if the numbers are changed as well."""
    renaming = [transform for transform in saving if not hasattr(transform, "operations")]
    computed = [transform for transform in saving if hasattr(transform, "operations")]
    if any(transform.rename_source_key(name)[1] is not None for transform in computed):
        return name
    renamed = name
    for transform in renaming:
        renamed = transform.rename_source_key(renamed)[0]
    return renamed
