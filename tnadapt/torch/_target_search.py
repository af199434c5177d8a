"""The search of one model for the weights that ``targets`` asks for."""

from __future__ import annotations

import dataclasses
import difflib
import functools
import re
from collections.abc import Callable, Iterator
from typing import Any

from torch import nn

from tnadapt.errors import TargetError, safe_repr
from tnadapt.targets.roles import layer_of
from tnadapt.targets.target import Target

from ._attention_search import AttentionModule, attentions
from ._quantized import is_embedding
from ._weights import Weight, modules_of, plain, weights_of, wraps

__all__ = ["WORDS", "TargetSearch"]

_ROLES = frozenset("qkvo")
#: Words that name targets, besides roles.
WORDS = ("all-linear", "conv", "embeddings")

# Names of a model's direct children that hold the output head, which is trained whole rather than adapted.
_HEADS = ("lm_head", "embed_out", "classifier", "score", "qa_outputs", "head", "heads", "fc", "classification_head")
_WRAPPERS = ("module", "_orig_mod", "base_model", "model")


class TargetSearch:
    """One model, inspected once for several searches."""

    def __init__(self, model: nn.Module) -> None:
        self.model = model
        self.places = list(modules_of(model))

    @functools.cached_property
    def attentions(self) -> list[AttentionModule]:
        return list(attentions(self.model))

    @functools.cached_property
    def weights(self) -> list[Weight]:
        return [weight for path, module in self.places for weight in weights_of(path, module)]

    @functools.cached_property
    def modules(self) -> dict[str, nn.Module]:
        return dict(self.places)

    @functools.cached_property
    def by_name(self) -> dict[tuple[str, str], Weight]:
        return {(weight.path, weight.parameter): weight for weight in self.weights}

    def find(self, targets: Any) -> list[Target]:
        if isinstance(targets, str):
            return self._by_word(targets)
        if callable(targets):
            return self._by_function(targets)
        if not isinstance(targets, (list, tuple, set, frozenset)):
            raise TargetError(
                "targets must be roles such as 'qv', 'all-linear', 'conv', 'embeddings', a regular expression, a list "
                f"or a function; got {safe_repr(targets)}"
            )
        entries = sorted(targets, key=str) if isinstance(targets, (set, frozenset)) else targets
        return [target for entry in entries for target in self._by_entry(entry)]

    def nothing(self, targets: Any) -> TargetError:
        """Return the error of a search that found nothing."""
        linear = list(dict.fromkeys(weight.name for weight in self.weights if weight.kind != "other"))
        some = ", ".join(linear[:10]) + (f" and {len(linear) - 10} more" if len(linear) > 10 else "")
        there = (
            f"it has {len(linear)} linear or convolution weights: {some}" if linear else "it has no such weight at all"
        )
        return TargetError(
            f"no target in {type(self.model).__name__} for {safe_repr(targets)}; {there}. Name them in a list, as "
            "targets=['path', …], or give 'all-linear', 'conv', 'embeddings', a regular expression for paths, or a "
            "function"
        )

    # -- Words -------------------------------------------------------------------------------

    def _by_word(self, word: str) -> list[Target]:
        if word and _ROLES.issuperset(word):
            return [target for found in self.attentions for target in found.targets(word)]
        if word == "all-linear":
            heads = _heads(self.model)
            return [
                _whole(weight) for weight in self.weights if weight.kind == "linear" and id(weight.module) not in heads
            ]
        if word == "embeddings":
            return [_whole(weight) for weight in self.weights if is_embedding(weight.module)]
        if word == "conv":
            return [_whole(weight) for weight in self.weights if weight.kind == "conv"]
        try:
            pattern = re.compile(word)
        except re.error as error:
            raise TargetError(
                f"targets={safe_repr(word)} is not a role, keyword or regular expression: {error}"
            ) from None
        found = []
        for path, module in self.places:
            # PEFT's wrapper is skipped: the layer in it has the same plain path.
            if not wraps(module) and (pattern.fullmatch(path) or pattern.fullmatch(plain(path))):
                found += self._whole_of(path, module)
        if not found:
            raise self._no_match(word)
        return found

    def by_pattern(self, pattern: str) -> list[Target]:
        """Return the targets of a word, or of a regular expression for the whole path or its last whole parts.

        Of a module that holds no weight itself, those are all linear weights in it.
        """
        if pattern in WORDS or (pattern and _ROLES.issuperset(pattern)):
            return self._by_word(pattern)
        try:
            ends = re.compile(rf"(?:.*\.)?(?:{pattern})")
        except re.error as error:
            raise TargetError(f"{safe_repr(pattern)} is not a role, keyword or regular expression: {error}") from None
        found = []
        for path, module in self.places:
            if wraps(module) or not (ends.fullmatch(path) or ends.fullmatch(plain(path))):
                continue
            own = weights_of(path, module)
            inside = [weight for weight in self.weights if weight.path.startswith(f"{path}." if path else "")]
            found += [_whole(weight) for weight in own or inside if own or weight.kind == "linear"]
        if not found:
            raise self._no_match(pattern)
        return found

    def _whole_of(self, path: str, module: nn.Module) -> list[Target]:
        weights = weights_of(path, module)
        if not weights:
            inside = [weight.path for weight in self.weights if weight.path.startswith(f"{path}." if path else "")]
            there = f"; name the modules inside it, such as {', '.join(inside[:4])}" if inside else ""
            raise TargetError(f"{safe_repr(path)} is a {type(module).__name__}, which holds no weight to adapt{there}")
        return [_whole(weight) for weight in weights]

    # -- Lists -------------------------------------------------------------------------------

    def _by_entry(self, entry: Any) -> list[Target]:
        if isinstance(entry, Target):
            return [self._checked(entry)]
        if not isinstance(entry, str) or not entry:
            raise TargetError(f"a list of targets must hold paths or tnadapt.Target; got {safe_repr(entry)}")
        found = [_whole(weight) for weight in self.weights if _ends(entry, weight.path) or _is_name(entry, weight)]
        if found:
            return found
        path, colon, letters = entry.rpartition(":")
        if colon and letters and _ROLES.issuperset(letters):
            return self._roles_at(path, letters, _ends)
        for path, module in self.places:
            if _ends(entry, path):
                return self._whole_of(path, module)
        raise self._no_match(entry)

    def _roles_at(self, path: str, letters: str, same: Callable[[str, str], bool]) -> list[Target]:
        """Return the targets with these roles in the attention or weight at a path."""
        found = []
        for attention in self.attentions:
            weights = [weight for _, _, weight in attention.inputs] + attention.outputs
            whole = same(path, attention.path)
            if whole or any(same(path, weight.path) for weight in weights):
                found += [target for target in attention.targets(letters) if whole or same(path, target.module)]
        if not found:
            raise self._no_match(
                path, f" with the roles {letters!r}", [attention.path for attention in self.attentions]
            )
        return found

    def _no_match(self, name: str, what: str = "", among: list[str] | None = None) -> TargetError:
        own = (plain(weight.path) for weight in self.weights if weight.kind != "other")
        names = among or list(dict.fromkeys(own))
        last = {path.rpartition(".")[2]: path for path in reversed(names)}
        close = [last.get(near, near) for near in difflib.get_close_matches(name, [*last, *names], 4)]
        some = list(dict.fromkeys(close)) or names[:6]
        there = f"{'close matches' if close else 'it has'}: {', '.join(some)}" if some else "the model has none at all"
        # A word in another spelling is meant, whatever modules have similar names.
        spelled = name.lower().replace("_", "-")
        word = [spelled] if spelled in WORDS and not what else []
        if not (word or close or what):
            word = difflib.get_close_matches(spelled, WORDS, 1, 0.75)
        meant = f"did you mean {word[0]!r}? " if word else ""
        listed = len({weight.path for weight in self.weights if _ends(name, weight.path)})
        way = f": [{name!r}] matches {listed} of them" if listed else ""
        return TargetError(
            f"no module of {type(self.model).__name__} matches {safe_repr(name)}{what} ({len(names)} could); "
            f"{meant}{there}. A "
            "list takes whole paths or their last whole parts, a plain string is a regular expression for a whole path"
            f"{way}"
        )

    # -- Functions and targets ---------------------------------------------------------------

    def _by_function(self, choose: Callable[[str, nn.Module], Any]) -> list[Target]:
        found: list[Target] = []
        for path, module in self.places:
            given = choose(path, module)
            if given is None or given is False:
                continue
            if given is True:
                found += self._whole_of(path, module)
            elif isinstance(given, str) and given and _ROLES.issuperset(given):
                found += self._roles_at(path, given, str.__eq__)
            elif isinstance(given, Target):
                found.append(self._checked(given))
            elif isinstance(given, (list, tuple)) and all(isinstance(target, Target) for target in given):
                found += [self._checked(target) for target in given]
            else:
                raise TargetError(
                    "a function for targets must return True, roles such as 'qv', tnadapt.Target or None; for "
                    f"{safe_repr(path)} it returned {safe_repr(given)}"
                )
        return found

    def _checked(self, target: Target) -> Target:
        """Return a caller's target after checking that the model has that weight in that shape."""
        module = self.modules.get(target.module)
        if module is None:
            raise self._no_match(target.module)
        weight = self.by_name.get((target.module, target.parameter))
        if weight is not None and weight.stored is not None:
            stored, transposed = weight.stored, weight.transposed
            if (weight.index is None) != (target.index is None):
                kind = "one matrix" if weight.index is None else f"{stored[0]} matrices, of which an index selects one"
                raise TargetError(f"{target.name} is {kind}; the target given for it has index={target.index}")
        else:
            tensor = module._parameters.get(target.parameter)
            if tensor is None:
                raise TargetError(f"{target.name}: a {type(module).__name__} has no parameter {target.parameter!r}")
            stored, transposed = tuple(tensor.shape), target.transposed
        if (stored, transposed) != (target.stored, target.transposed):
            raise TargetError(
                f"{target.name} is stored as {stored}{_order(transposed)}; the target given for it says "
                f"{target.stored}{_order(target.transposed)}"
            )
        groups = 1 if weight is None else weight.groups
        if target.groups not in (1, groups):
            raise TargetError(
                f"{target.name} is a convolution with groups={groups}; the target given for it has "
                f"groups={target.groups}"
            )
        # Files of earlier versions do not have it.
        return target if target.groups == groups else dataclasses.replace(target, groups=groups)


def _whole(weight: Weight) -> Target:
    role = "embedding" if is_embedding(weight.module) else "conv" if weight.kind == "conv" else "linear"
    # The last component is dropped: a module's index in a Sequential is not the number of a layer.
    return weight.target(role, layer_of(plain(weight.path).rpartition(".")[0]))


def _order(transposed: bool) -> str:
    return ", which is (in, out)" if transposed else ""


def _ends(entry: str, path: str) -> bool:
    """Return whether a path equals the entry or ends in it, by whole components, with or without PEFT's wrapping."""
    return any(one == entry or one.endswith(f".{entry}") for one in (path, plain(path)))


def _is_name(entry: str, weight: Weight) -> bool:
    """Return whether the entry is the end of a parameter's name; "weight" alone would match nearly all."""
    return _ends(entry, weight.name) if entry != "weight" else weight.name == entry


def _heads(model: nn.Module) -> set[int]:
    """Return ids of the output head's modules: those the model reports, or the last layer below a child so named."""
    found: list[Any] = []
    for method in ("get_output_embeddings", "get_classifier"):
        try:
            given = getattr(model, method)()
        except (AttributeError, NotImplementedError, TypeError):
            continue
        found += given if isinstance(given, (tuple, list)) else [given]
    while len(model._modules) == 1 and next(iter(model._modules)) in _WRAPPERS:
        inner = next(iter(model._modules.values()))
        if inner is None:
            break
        model = inner
    found += [model._modules[name] for name in _HEADS if name in model._modules]
    return {id(module) for head in found if isinstance(head, nn.Module) for module in _last(head)}


def _last(head: nn.Module) -> Iterator[nn.Module]:
    holders = [module for path, module in modules_of(head) if weights_of(path, module)]
    yield from holders[-1:]
