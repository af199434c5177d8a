"""Which weights of a model an adapter updates: attention projections, targets by role or name, layers and exclusion.

:class:`TargetSearch` finds the projections of every attention by structure and names, and what the argument
``targets`` selects. :func:`find_targets` is the complete selection, with ``layers`` and ``exclude``, and
:func:`of_patterns` that for several configs in one adapter.
"""

from __future__ import annotations

import dataclasses
import difflib
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Any

from torch import nn

from tnadapt.algebra.composite import CompositeConfig
from tnadapt.algebra.config import Config
from tnadapt.algebra.named_config import named_config
from tnadapt.algebra.presets import PRESETS
from tnadapt.argument_checks import flag
from tnadapt.errors import ConfigError, TargetError, pluralize, safe_repr
from tnadapt.targets import roles
from tnadapt.targets.attention_layouts import AttentionLayout, by_name, of_class
from tnadapt.targets.fused_rows import Facts, Fused, LayoutError, place_rows
from tnadapt.targets.target import ROLES, Rows, Target, check_distinct

from ._weights import Weight, join, modules_of, plain, reported_by, usable, weights_of, wraps

# -- The layout of a fused weight, and its rows that produce q, k and v ------------------------------------------------


def layout_of(parent: Any, weight: str = "") -> AttentionLayout | None:
    """Return the table's entry for an attention of this class with a fused weight of this name, or None."""
    names = [name for cls in type(parent).__mro__ for name in (f"{cls.__module__}.{cls.__name__}", cls.__name__)]
    return of_class(names, lambda name: hasattr(parent, name), weight)


# Layouts that are known by the class of the attention come from a table shared with checkpoints on disk. The layout of
# an unknown class is inferred from the weight's name, with one block per letter in order, as in most libraries. Block
# sizes come from the numbers of heads where keys and values have fewer heads, else the blocks are equal; they are
# checked against the width of the output projection. Where the name is ambiguous, the caller must give the rows.


def _in_use(names: Sequence[str], has_weight: Callable[[str], bool]) -> list[str]:
    """Drop the separate projections that diffusers keeps next to a fused copy and no longer reads."""
    parsed = {name: roles.parse_projection_name(name, attention=True) for name in names}

    def stream(projection: roles.ProjectionName) -> bool:
        return projection.family.startswith("add_") or "added" in projection.family

    fused = {
        (stream(says), letter)
        for name, says in parsed.items()
        if says and len(says.letters) > 1 and has_weight(name)
        for letter in says.letters
    }
    return [name for name, says in parsed.items() if says is None or (stream(says), says.letters) not in fused]


# -- The search of a model for the selection of ``targets`` ------------------------------------------------------------


# Names of a model's direct children that hold the output head, which is trained whole rather than adapted.
_HEADS = ("lm_head", "embed_out", "classifier", "score", "qa_outputs", "head", "heads", "fc", "classification_head")
_WRAPPERS = ("module", "_orig_mod", "base_model", "model")


class TargetSearch(roles.ModuleTree[Weight]):
    """One model, inspected once for several searches."""

    def __init__(self, model: nn.Module) -> None:
        if not isinstance(model, nn.Module):
            raise TargetError(f"targets are found in a torch module; got {type(model).__name__}")
        self.model = model
        self.modules = dict(modules_of(model))
        #: The weights that each module itself holds, by its id.
        self.held = {id(module): weights_of(path, module) for path, module in self.modules.items()}
        self.weights = [weight for weights in self.held.values() for weight in weights]

    # -- The model as a tree in which attentions are found ------------------------------------

    def paths(self) -> Iterable[str]:
        return self.modules

    def is_attention(self, path: str) -> bool:
        module = self.modules[path]
        names = type(module).__name__, plain(path).rpartition(".")[2]
        return roles.is_attention(*names) or layout_of(module) is not None

    def children(self, path: str) -> list[str]:
        module = self.modules[path]
        names = [*module._parameters, *(name for name, child in module._modules.items() if child is not None)]
        if not getattr(module, "fused_projections", False):
            return names
        return _in_use(names, lambda name: bool(self.projections(path, name)))

    def projections(self, path: str, child: str) -> list[Weight]:
        """Return the weights of a projection, which PEFT may wrap, or which a norm, pooling or convolution is next to.

        Depthwise convolutions and embeddings are not projections.
        """
        module = self.modules[path]
        inner = module._modules.get(child)
        if inner is None:
            return [weight for weight in self.held[id(module)] if weight.parameter == child]
        weights = [
            weight
            for below, part in modules_of(inner)
            for weight in self.held.get(id(part), ())
            if weight.kind in ("linear", "conv") or (weight.kind == "other" and not plain(below))
            if not 1 < weight.groups == part.in_channels
        ]
        return roles.main_projection(weights, join(path, child), lambda weight: weight.path)

    def sizes(self, weight: Weight) -> tuple[int, int]:
        return weight.target("linear", "").shape

    def fused_rows(self, path: str, child: str, weight: Weight, fused: Fused) -> dict[str, Rows | None]:
        parent: Any = self.modules[path]
        entry, config = layout_of(parent, child), getattr(parent, "config", None)
        rule = by_name(child) if entry is None else entry.rule
        lookups = [lambda name: getattr(parent, name, None), lambda name: getattr(config, name, None)]
        try:
            if rule is None:
                raise LayoutError("libraries lay it out in different ways")
            facts = Facts(lookups, "its attributes are not those that were expected: there is no")
            return place_rows(rule(facts, fused), fused)
        except LayoutError as error:
            raise TargetError(
                f"{weight.path} computes {', '.join(fused.letters)} with one weight of {fused.out} rows, and the "
                f"layout of the rows in a {type(parent).__name__} is unknown: {error}; give the rows, "
                f"targets=[tnadapt.Target({weight.path!r}, stored shape, 'q', rows=tnadapt.Rows(start, length, stride, "
                "count)), …], or leave it out with a list of paths or a function"
            ) from None

    def targets_of(self, attention: roles.AttentionWeights[Weight], letters: str) -> list[Target]:
        """Return each weight of an attention, or part of one, that produces one of the letters."""
        layer = roles.layer_of(plain(attention.path))
        return [weight.target(role, layer, rows) for weight, role, rows in self.parts(attention, letters)]

    # -- Kinds of targets ---------------------------------------------------------------------

    def find(self, targets: Any) -> list[Target]:
        if isinstance(targets, str):
            return self._by_word(targets)
        if callable(targets):
            return self._by_function(targets)
        if not isinstance(targets, (list, tuple, set, frozenset)):
            raise TargetError(
                "targets must be roles such as 'qv', 'all-linear', 'conv', 'embeddings', a regular expression, a list "
                f"or a function; got {safe_repr(targets)}. Settings are keywords, such as rank=8"
            )
        entries = sorted(targets, key=str) if isinstance(targets, (set, frozenset)) else targets
        return [target for entry in entries for target in self._by_entry(entry)]

    def nothing(self, targets: Any) -> TargetError:
        """Return the error of a search that found nothing."""
        linear = list(dict.fromkeys(weight.name for weight in self.weights if weight.kind in ("linear", "conv")))
        some = ", ".join(linear[:10]) + (f" and {len(linear) - 10} more" if len(linear) > 10 else "")
        available = (
            f"it has {len(linear)} linear or convolution weights: {some}" if linear else "it has no such weight at all"
        )
        return TargetError(
            f"no target in {type(self.model).__name__} for {safe_repr(targets)}; {available}. Name them in a list, as "
            "targets=['path', …], or give 'all-linear', 'conv', 'embeddings', a regular expression for paths, or a "
            "function"
        )

    # -- Words -------------------------------------------------------------------------------

    def _by_word(self, word: str) -> list[Target]:
        if roles.are_roles(word):
            return [target for attention in self.attentions for target in self.targets_of(attention, word)]
        if word not in roles.KEYWORDS:
            return self._by_expression(word)
        layer_type = {"all-linear": "linear", "embeddings": "embedding", "conv": "conv"}[word]
        heads = self._heads() if word == "all-linear" else ()
        return [
            _whole(weight) for weight in self.weights if weight.kind == layer_type and id(weight.module) not in heads
        ]

    def _heads(self) -> set[int]:
        """Return the ids of the head's modules: reported by the model, or the last layer of a child with its name."""
        heads: list[Any] = []
        for method in ("get_output_embeddings", "get_classifier"):
            reported = reported_by(self.model, method)
            heads += reported if isinstance(reported, (tuple, list)) else [reported]
        model: nn.Module | None = self.model
        while model is not None and len(model._modules) == 1 and next(iter(model._modules)) in _WRAPPERS:
            model = next(iter(model._modules.values()))
        heads += [] if model is None else [model._modules.get(name) for name in _HEADS]
        last = set()
        for head in heads:
            if isinstance(head, nn.Module):
                last.update([id(module) for _, module in modules_of(head) if self.held.get(id(module))][-1:])
        return last

    def _by_expression(self, word: str, ends: bool = False) -> list[Target]:
        """Return the targets of the modules whose path, or with ``ends`` its last parts, matches an expression."""
        is_match = roles.path_matcher(word, "" if ends else "targets", ends)
        targets = list[Target]()
        for path, module in self.modules.items():
            # PEFT's wrapper is skipped: the layer in it has the same plain path.
            if wraps(module) or not (is_match(path) or is_match(plain(path))):
                continue
            # A module that holds no weight itself stands for all linear weights in it.
            if ends and not self.held[id(module)]:
                targets += [_whole(weight) for weight in self._inside(path) if weight.kind == "linear"]
            else:
                targets += self._whole_of(path, module)
        if not targets:
            raise self._no_match(word)
        return targets

    def by_pattern(self, pattern: str) -> list[Target]:
        """Return the targets of a word, or of a regular expression for the whole path or its last whole parts."""
        if pattern in roles.KEYWORDS or roles.are_roles(pattern):
            return self._by_word(pattern)
        return self._by_expression(pattern, ends=True)

    def _inside(self, path: str) -> list[Weight]:
        return [weight for weight in self.weights if weight.path.startswith(f"{path}." if path else "")]

    def _whole_of(self, path: str, module: nn.Module) -> list[Target]:
        weights = self.held[id(module)]
        if not weights:
            inside = ", ".join(weight.path for weight in self._inside(path)[:4])
            hint = f"; name the modules inside it, such as {inside}" if inside else ""
            raise TargetError(f"{safe_repr(path)} is a {type(module).__name__}, which holds no weight to adapt{hint}")
        return list(map(_whole, weights))

    # -- Lists -------------------------------------------------------------------------------

    def _by_entry(self, entry: Any) -> list[Target]:
        if isinstance(entry, Target):
            return [self._checked(entry)]
        if not isinstance(entry, str) or not entry:
            raise TargetError(f"a list of targets must hold paths or tnadapt.Target; got {safe_repr(entry)}")
        targets = [_whole(weight) for weight in self.weights if _ends(entry, weight.path) or _is_name(entry, weight)]
        if targets:
            return targets
        path, colon, letters = entry.rpartition(":")
        if colon and roles.are_roles(letters):
            return self._roles_at(path, letters, _ends)
        for path, module in self.modules.items():
            if _ends(entry, path):
                return self._whole_of(path, module)
        raise self._no_match(entry)

    def _roles_at(self, path: str, letters: str, same: Callable[[str, str], bool]) -> list[Target]:
        """Return the targets with these roles in the attention or weight at a path."""
        targets = list[Target]()
        for attention in self.attentions:
            weights = [*(weight for _, _, weight in attention.inputs), *attention.outputs]
            whole = same(path, attention.path)
            if whole or any(same(path, weight.path) for weight in weights):
                targets += [
                    target for target in self.targets_of(attention, letters) if whole or same(path, target.module)
                ]
        if not targets:
            raise self._no_match(
                path, f" with the roles {letters!r}", [attention.path for attention in self.attentions]
            )
        return targets

    def _no_match(self, name: str, what: str = "", among: list[str] | None = None) -> TargetError:
        paths = (plain(weight.path) for weight in self.weights if weight.kind in ("linear", "conv"))
        names = among or list(dict.fromkeys(paths))
        close = roles.similar_paths(name, names)
        some = close or names[:6]
        hint = f"{'close matches' if close else 'it has'}: {', '.join(some)}" if some else "the model has none at all"
        # A keyword in another spelling is meant, even if modules have similar names.
        spelled = name.lower().replace("_", "-")
        word = [] if what else difflib.get_close_matches(spelled, roles.KEYWORDS, 1, 1.0 if close else 0.75)
        meant = f"did you mean {word[0]!r}? " if word else ""
        listed = (
            f"; for modules of this name give [{name!r}]" if any(roles.ends_in(path, name) for path in names) else ""
        )
        return TargetError(
            f"no module of {type(self.model).__name__} matches {safe_repr(name)}{what} ({len(names)} could); "
            f"{meant}{hint}. A list takes whole paths or their last whole parts, a plain string is letters of qkvo or "
            f"a regular expression for a whole path{listed}"
        )

    # -- Functions and targets ---------------------------------------------------------------

    def _by_function(self, choose: Callable[[str, nn.Module], Any]) -> list[Target]:
        targets: list[Target] = []
        for path, module in self.modules.items():
            choice = choose(path, module)
            if choice is None or choice is False:
                continue
            if choice is True:
                targets += self._whole_of(path, module)
            elif isinstance(choice, str) and roles.are_roles(choice):
                targets += self._roles_at(path, choice, str.__eq__)
            else:
                several = [choice] if isinstance(choice, Target) else choice
                if not isinstance(several, (list, tuple)) or not all(isinstance(each, Target) for each in several):
                    raise TargetError(
                        "a function for targets must return True, roles such as 'qv', tnadapt.Target or None; for "
                        f"{safe_repr(path)} it returned {safe_repr(choice)}"
                    )
                targets += map(self._checked, several)
        return targets

    def _checked(self, target: Target) -> Target:
        """Return a caller's target after checking that the model has that weight in that shape."""
        module = self.modules.get(target.module)
        if module is None:
            raise self._no_match(target.module)
        weight = next((weight for weight in self.held[id(module)] if weight.parameter == target.parameter), None)
        if weight is not None and weight.stored is not None:
            stored, transposed = weight.stored, weight.transposed
            if (weight.index is None) != (target.index is None):
                form = "one matrix" if weight.index is None else f"{stored[0]} matrices, of which an index selects one"
                raise TargetError(f"{target.name} is {form}; the target given for it has index={target.index}")
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
    role = weight.kind if weight.kind in ("conv", "embedding") else "linear"
    # The last component is dropped: a module's index in a Sequential is not the number of a layer.
    return weight.target(role, roles.layer_of(plain(weight.path).rpartition(".")[0]))


def _order(transposed: bool) -> str:
    return ", which is (in, out)" if transposed else ""


def _ends(entry: str, path: str) -> bool:
    """Return whether a path ends with the entry, by whole parts, with or without PEFT's wrapping."""
    return roles.ends_in(path, entry) or roles.ends_in(plain(path), entry)


def _is_name(entry: str, weight: Weight) -> bool:
    """Return whether the entry is the end of a parameter's name, except "weight" alone, which nearly all match."""
    return _ends(entry, weight.name) if entry != "weight" else weight.name == entry


# -- Targets kept by ``layers``, and targets removed by ``exclude`` ----------------------------------------------------


# -- Layers ------------------------------------------------------------------------------------------


def in_layers(search: TargetSearch, found: Sequence[Target], layers: Any) -> list[Target]:
    """Return the targets in these layers.

    Parameters
    ----------
    search : TargetSearch
        Of the model.
    found : sequence of Target
    layers : int or iterable of int
        Negative ones count from the end of each stack of layers.

    Returns
    -------
    list of Target

    Raises
    ------
    TargetError
        If ``layers`` is of another type, there is no such layer, or no target is in one.
    """
    wanted = _numbers(layers)
    places = [_place(target.module) for target in found]
    if all(place is None for place in places):
        raise TargetError(
            f"layers={safe_repr(layers)}: no number of a layer is in the paths of the targets, such as "
            f"{safe_repr(found[0].module)}; leave layers out, or give the targets as a list or a regular expression"
        )
    stacks = {place[0] for place in places if place}
    sizes = {stack: size for stack, size in _sizes(search.modules).items() if stack in stacks}
    for index in wanted:
        if not any(-size <= index < size for size in sizes.values()):
            existing = ", ".join(
                f"{safe_repr(stack) if stack else 'the model'} has 0 to {size - 1}" for stack, size in sizes.items()
            )
            raise TargetError(f"layers={safe_repr(layers)}: there is no layer {index}; {existing}")
    chosen = [
        target
        for target, place in zip(found, places, strict=True)
        if place is not None and not wanted.isdisjoint((place[1], place[1] - sizes[place[0]]))
    ]
    if not chosen:
        numbers = [place[1] for place in places if place is not None]
        raise TargetError(
            f"layers={safe_repr(layers)} leaves no target: they are in layers {min(numbers)} to {max(numbers)}"
        )
    return chosen


def _numbers(layers: Any) -> set[int]:
    try:
        wanted = [layers] if isinstance(layers, int) else list(layers)
    except TypeError:
        wanted = []
    if not wanted or not all(isinstance(layer, int) and not isinstance(layer, bool) for layer in wanted):
        raise TargetError(
            "layers must be the number of a layer, a range or a list of such numbers, of which negative ones count "
            f"from the end; got {safe_repr(layers)}"
        )
    return set(wanted)


def _place(path: str) -> tuple[str, int] | None:
    """Return the stack and the number of the layer that a module is in: the first number above it in its path."""
    # With experts, or blocks of stages, later numbers are those of parts of a layer.
    parts = plain(path).split(".")[:-1]
    for place, part in enumerate(parts):
        layer = roles.number(part)
        if layer is not None:
            return ".".join(parts[:place]), layer
    return None


def _sizes(paths: Iterable[str]) -> dict[str, int]:
    """Return the number of layers in each stack."""
    sizes: dict[str, int] = {}
    for path in paths:
        stack, _, last = plain(path).rpartition(".")
        index = roles.number(last)
        if index is not None:
            sizes[stack] = max(sizes.get(stack, 0), index + 1)
    return sizes


# -- Exclusion ---------------------------------------------------------------------------------------


def without(search: TargetSearch, found: Sequence[Target], exclude: Any) -> list[Target]:
    """Return the targets that are not excluded.

    Parameters
    ----------
    search : TargetSearch
        Of the model.
    found : sequence of Target
    exclude : str or list
        As ``targets``; a path stands for everything at or below it.

    Returns
    -------
    list of Target

    Raises
    ------
    TargetError
        If it has another type, it excludes nothing or everything, an entry of a list is nowhere in the model, or it
        excludes rows of a weight that is a target as a whole.
    """
    below, weights = _excluded(search, exclude)
    rows: dict[tuple[str, str], list[Target]] = {}
    for target in weights:
        rows.setdefault((target.module, target.parameter), []).append(target)
    kept = [
        target
        for target in found
        if not any(part in below for part in _above(target.module))
        and not _covered(target, rows.get((target.module, target.parameter), []))
    ]
    if len(kept) == len(found):
        some = ", ".join(dict.fromkeys(target.name for target in found[:4]))
        raise TargetError(
            f"exclude={safe_repr(exclude)} excludes none of the {pluralize(len(found), 'target')}, such as {some}; "
            "leave it out, or give roles, a regular expression for the whole path of a module, or a list of paths or "
            "their last whole parts"
        )
    if not kept:
        raise TargetError(f"exclude={safe_repr(exclude)} excludes all of the {pluralize(len(found), 'target')}")
    return kept


def _excluded(search: TargetSearch, exclude: Any) -> tuple[set[str], list[Target]]:
    """Return the paths of modules excluded with everything below, and the excluded targets."""
    if isinstance(exclude, str) and (exclude in roles.KEYWORDS or roles.are_roles(exclude)):
        return set(), search.find(exclude)
    if isinstance(exclude, str):
        is_match = roles.path_matcher(exclude, "exclude")
        return {path for path in search.modules if is_match(path) or is_match(plain(path))}, []
    if not isinstance(exclude, (list, tuple, set, frozenset)):
        raise TargetError(
            "exclude must be roles such as 'qv', 'all-linear', 'conv', a regular expression or a list, as targets; got "
            f"{safe_repr(exclude)}"
        )
    modules, targets = set[str](), list[Target]()
    for entry in exclude:
        ends = {path for path in search.modules if isinstance(entry, str) and entry and _ends(entry, path)}
        modules |= ends
        if not ends:
            targets += search.find([entry])  # a parameter, roles of an attention, a Target; or an error
    return modules, targets


def _above(path: str) -> Iterator[str]:
    """Yield a path and the paths of all modules around it."""
    while path:
        yield path
        path = path.rpartition(".")[0]
    yield ""


def _covered(target: Target, excluded: Sequence[Target]) -> bool:
    """Return whether a target is excluded, or raise a TargetError if only some of its rows are."""
    for other in excluded:
        if other.rows is None or other.rows == target.rows:
            return True
        if _overlap(target, other):
            raise TargetError(
                f"exclude names the role {other.role!r} of {target.name}, of which other rows are a target as well: "
                "name the roles to adapt in targets, such as 'qv'"
            )
    return False


# -- The whole selection -----------------------------------------------------------------------------------------------


def find_targets(
    model: nn.Module,
    targets: Any = "qv",
    *,
    layers: Any = None,
    exclude: Any = None,
    untie: bool = False,
    keep_tied: bool = False,
) -> list[Target]:
    """Find the weights of a model to adapt.

    Parameters
    ----------
    model : Module
        Any module. It is only inspected, so it may be on the meta device.
    targets : str, list or callable
        - roles, such as ``"qv"``, ``"q"`` or ``"qkvo"``: projections of attention modules, whatever their names and
          storage, including rows of a fused weight;
        - ``"all-linear"``: every linear layer except the output head, and every matrix of experts that a module keeps
          stacked in a parameter of three axes; fused weights whole;
        - ``"conv"``: every convolution of any kernel size as a matrix ``(out, in * kh * kw)``, grouped ones as they are
          stored; transposed convolutions are skipped, because the first axis of their weight is not the output;
        - ``"embeddings"``: every ``nn.Embedding``, of tokens, positions or types;
        - any other string: a regular expression for the whole dotted path of a module;
        - a list whose entries are paths, full or their last parts (``"query"``, ``"attention.self.query"``),
          :class:`tnadapt.Target` objects, or ``"path:roles"``, such as ``"blocks.0.attn:qv"`` or ``"attn.qkv:v"``,
          which selects roles of the attention or weight at that path. A path without roles selects a fused weight
          whole;
        - a function of a path and a module, called for every module, that returns True for the whole weight, roles, a
          Target or a list of Targets, or None.
    layers : int, range or list of int, optional
        Only targets in layers of these numbers; negative ones count from the end. A layer's number is the first number
        above the module in its path: 3 in ``model.layers.3.mlp.experts.7.up``. Where a model has several stacks of
        layers, such as an encoder and a decoder, they are counted separately. Targets outside of layers are left out.
    exclude : str or list, optional
        Targets to leave out, in the words of ``targets``. The path of a module, as an entry of a list or matched by a
        regular expression, stands for everything in it: ``["vision_tower"]``.
    untie : bool
        Whether to allow targets whose weight is shared with another module, which :func:`attach` then gives its own
        copy.
    keep_tied : bool
        Whether a target whose weight is shared with other modules updates it in all of them. The target then has its
        first name in the model, and the others as ``tied``.

    Returns
    -------
    list of Target
        In the order of the model's modules, and q before k before v within a module, without duplicates; a module with
        several paths appears under the first. A list of only Targets keeps the caller's order and any duplicates, which
        :func:`attach` rejects.

    Raises
    ------
    TargetError
        If nothing is found, an entry of a list matches nothing, the layout of a fused weight or the shape of a
        quantized weight is unknown, a weight is tied and neither ``untie`` nor ``keep_tied`` is true, or an embedding
        has ``sparse=True`` or a ``max_norm``. If a layer does not exist, or ``exclude`` matches nothing or everything.

    Examples
    --------
    >>> from torch import nn
    >>> model = nn.TransformerEncoderLayer(8, 2, dim_feedforward=16)
    >>> for target in find_targets(model):
    ...     print(target.role, target.name, target.rows)
    q self_attn.in_proj_weight Rows(start=0, length=8, stride=24, count=1)
    v self_attn.in_proj_weight Rows(start=16, length=8, stride=24, count=1)
    >>> [target.module for target in find_targets(model, ["linear1", "self_attn:o"])]
    ['self_attn.out_proj', 'linear1']
    >>> encoder = nn.TransformerEncoder(model, 3, enable_nested_tensor=False)
    >>> [target.module for target in find_targets(encoder, "all-linear", layers=-1, exclude=["self_attn", "linear2"])]
    ['layers.2.linear1']
    """
    untie, keep_tied = flag("untie", untie), flag("keep_tied", keep_tied)
    search = TargetSearch(model)
    selected = search.find(targets)
    if not selected:
        raise search.nothing(targets)
    if untie and keep_tied:
        raise TargetError("untie=True gives tied weights their own copies, and keep_tied=True keeps them one: give one")
    chosen = usable(model, filtered(search, selected, layers, exclude), untie, keep_tied)
    # Given Targets are never dropped: each has its place in the vector of all updates.
    named = isinstance(targets, str) or callable(targets)
    explicit = not named and all(isinstance(entry, Target) for entry in targets)
    return chosen if explicit else in_order(search, chosen)


def filtered(search: TargetSearch, found: Sequence[Target], layers: Any, exclude: Any) -> list[Target]:
    """Return the targets that ``layers`` and ``exclude`` leave."""
    if layers is not None:
        found = in_layers(search, found, layers)
    return list(found) if exclude is None else without(search, found, exclude)


def in_order(search: TargetSearch, targets: Iterable[Target]) -> list[Target]:
    """Return targets in the order of the model's modules, of roles and of their parameters, each once."""
    order = {path: place for place, path in enumerate(search.modules)}
    stored = {(weight.path, weight.parameter, weight.index): place for place, weight in enumerate(search.weights)}
    distinct = {(target.module, target.parameter, target.index, target.rows): target for target in targets}.values()
    places = {
        target: (
            order[target.module],
            ROLES.index(target.role),
            stored.get((target.module, target.parameter, target.index), len(stored)),
        )
        for target in distinct
    }
    return sorted(places, key=places.__getitem__)


# -- The targets of several configs in one adapter: each config with the pattern of its weights ------------------------


def of_patterns(
    model: nn.Module, patterns: Mapping[Any, Config | str], layers: Any = None, exclude: Any = None
) -> tuple[Config, list[Target]]:
    """Return the config of a mapping from patterns to configs, and its targets: those of the first pattern, and so on.

    Parameters
    ----------
    model : Module
    patterns : mapping
        From what ``targets`` of :func:`tnadapt.torch.find_targets` may be, with a tuple for a list, to a config or the
        name of a preset. Another string than a role or keyword is a regular expression for the path of a module, or
        for its last whole parts; of a module that holds no weight itself, all linear weights in it are meant.
    layers, exclude
        As for :func:`tnadapt.torch.find_targets`, which is yet to check the targets.

    Returns
    -------
    Config
        A :class:`tnadapt.CompositeConfig` if there are several.
    list of Target

    Raises
    ------
    TargetError
        If a pattern finds nothing, or two find the same weight; or as in :func:`tnadapt.torch.find_targets`.
    ConfigError
        If a value is not a config, or the configs cannot be in one adapter.

    Examples
    --------
    >>> from tnadapt import presets
    >>> model = nn.TransformerEncoderLayer(8, 2, dim_feedforward=16)
    >>> config, targets = of_patterns(model, {"linear[12]": "lora", "qv": presets.lokr(2)})
    >>> [part.weights for part in config.parts], [target.module for target in targets]
    ([2, 2], ['linear1', 'linear2', 'self_attn', 'self_attn'])
    """
    if not patterns:
        raise ConfigError("a mapping of patterns to configs must have at least one; got {}")
    configs = {pattern: _config(pattern, value) for pattern, value in patterns.items()}
    search = TargetSearch(model)
    by_pattern = {pattern: _found(search, pattern) for pattern in configs}
    _check_apart(by_pattern)
    left = set(filtered(search, [target for selected in by_pattern.values() for target in selected], layers, exclude))
    chosen = {pattern: [target for target in selected if target in left] for pattern, selected in by_pattern.items()}
    for pattern, selected in chosen.items():
        if not selected:
            raise TargetError(f"layers and exclude leave no target of {safe_repr(pattern)}: leave this pattern out")
    targets = [target for selected in chosen.values() for target in selected]
    parts = [(configs[pattern], len(selected)) for pattern, selected in chosen.items()]
    return (parts[0][0] if len(parts) == 1 else CompositeConfig(parts)), targets


def check_ordered(targets: Any) -> None:
    """Raise a ConfigError unless the targets of a composite config are a list in the order of its parts."""
    if not isinstance(targets, (list, tuple)) or not all(isinstance(target, Target) for target in targets):
        raise ConfigError(
            "a CompositeConfig has its weights in an order: give a mapping of patterns to configs instead, or targets "
            f"as a list of tnadapt.Target in that order; got targets={safe_repr(targets)}"
        )


def _config(pattern: Any, value: Any) -> Config:
    if isinstance(value, str):
        if PRESETS.knows(pattern) and not PRESETS.knows(value):
            raise ConfigError(
                f"the mapping is from patterns to configs, {{{value!r}: {pattern!r}}}; got {{{pattern!r}: {value!r}}}"
            )
        return named_config(value, {})
    if not isinstance(value, Config) or isinstance(value, CompositeConfig):
        raise ConfigError(
            f"the config of {safe_repr(pattern)} must be a tnadapt.Config or the name of a preset; got "
            f"{type(value).__name__}"
        )
    return value


def _found(search: TargetSearch, pattern: Any) -> list[Target]:
    if isinstance(pattern, str):
        targets = search.by_pattern(pattern)
    else:
        targets = search.find([pattern] if isinstance(pattern, Target) else pattern)
    if not targets:
        raise search.nothing(pattern)
    return in_order(search, targets)


def _check_apart(found: Mapping[Any, list[Target]]) -> None:
    """Raise a TargetError if two patterns find the same rows of a weight."""
    before: dict[tuple[str, str, int | None], list[tuple[Any, Target]]] = {}
    for pattern, targets in found.items():
        for target in targets:
            others = before.setdefault((target.module, target.parameter, target.index), [])
            for earlier, other in others:
                if earlier is not pattern and _overlap(other, target):
                    raise TargetError(
                        f"{target.name} is found by {safe_repr(earlier)} and by {safe_repr(pattern)}, and each weight "
                        "has one config: make one pattern narrower, such as '(?!.*mlp).*proj' for all but an mlp's"
                    )
            others.append((pattern, target))


def _overlap(one: Target, other: Target) -> bool:
    try:
        check_distinct([one, other])
    except TargetError:
        return True
    return False
