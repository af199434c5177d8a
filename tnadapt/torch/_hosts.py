"""Find the module whose forward uses a weight, where an adapter has to act, by analysis of its source code.

Usually it is the module that holds the weight. Some parents read a child's weight directly and never call the child:
timm's BEiT, ``F.linear(x, self.qkv.weight, bias)``; the fast path of :class:`torch.nn.TransformerEncoderLayer`. This is
visible in their source, which is parsed here but never run.
"""

from __future__ import annotations

import ast
import functools
import inspect
import textwrap
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from torch import nn

from tnadapt.targets.target import Target

__all__ = ["host_of", "paths_of", "reads_outside"]

# All dotted paths of each module, by the module's id.
Paths = Mapping[int, Sequence[str]]

# A step of a chain that is only known at run time: a loop variable or a computed index.
_ANY = "*"

# Reads its first layer's weights only to check whether they need gradients.
_ONLY_LOOK = (nn.TransformerEncoder.forward,)

# Attributes of a weight that do not depend on its values.
_ABOUT = {
    "dtype", "device", "shape", "ndim", "dim", "size", "numel", "requires_grad", "is_cuda", "is_nested", "layout",
    "stride", "is_contiguous", "is_quantized", "grad",
}  # fmt: skip


def paths_of(model: nn.Module) -> Paths:
    """Return all dotted paths of each module of a model by the module's id; compute it once for many targets.

    Examples
    --------
    >>> linear = nn.Linear(2, 2)
    >>> paths_of(nn.Sequential(linear, linear))[id(linear)]
    ['0', '1']
    """
    found: dict[int, list[str]] = {}
    for path, module in model.named_modules(remove_duplicate=False):
        found.setdefault(id(module), []).append(path)
    return found


def host_of(model: nn.Module, target: Target, paths: Paths | None = None) -> str:
    """Return the module whose forward must apply an update: the weight's owner, or a parent that reads it directly.

    Parameters
    ----------
    model : Module
    target : Target
    paths : mapping, optional
        :func:`paths_of` the model, if already computed.

    Returns
    -------
    str
        Dotted path; empty for the model itself. If several modules read the weight, the outermost, whose forward
        encloses the others.

    Examples
    --------
    >>> layer = nn.TransformerEncoderLayer(8, 2, dim_feedforward=16)
    >>> host_of(layer, Target("self_attn", (24, 8), "q", "in_proj_weight")) == ""
    True
    >>> host_of(nn.Sequential(nn.Linear(2, 2)), Target("0", (2, 2)))
    '0'
    """
    outside = reads_outside(model, target, paths)
    return outside[0] if outside else target.module


def reads_outside(model: nn.Module, target: Target, paths: Paths | None = None) -> list[str]:
    """Return the ancestors of a weight's module whose forward reads the weight directly, outermost first.

    Parameters
    ----------
    model : Module
    target : Target
    paths : mapping, optional
        :func:`paths_of` the model, if already computed.

    Returns
    -------
    list of str
        Dotted paths; empty if only the owner reads the weight.

    Notes
    -----
    Detects reads of attributes of ``self``, also through local names, ``getattr``, an index or a loop, in ``forward``
    and the methods that it uses. Reads in other functions or in classes without source are not detected.

    Examples
    --------
    >>> attention = nn.MultiheadAttention(8, 2)
    >>> reads_outside(attention, Target("out_proj", (8, 8))) == [""]
    True
    """
    owner = model.get_submodule(target.module)
    found: dict[str, None] = {}
    for path in (paths_of(model) if paths is None else paths)[id(owner)]:
        found.update(dict.fromkeys(_readers(model, path, target.parameter)))
    return sorted(found, key=lambda path: path.count(".") + bool(path))


def _readers(model: nn.Module, path: str, parameter: str) -> Iterator[str]:
    parts = path.split(".") if path else []
    for length in range(len(parts)):
        above = ".".join(parts[:length])
        cls: Any = type(model.get_submodule(above))
        # PEFT's wrapper exposes its base layer's weight as its own.
        below = (*(part for part in parts[length:] if part != "base_layer"), parameter)
        if len(below) > 1 and any(_same(read, below) for read in _reads(cls)):
            yield above


def _same(read: tuple[str, ...], path: tuple[str, ...]) -> bool:
    return len(read) == len(path) and all(one in (other, _ANY) for one, other in zip(read, path, strict=True))


@functools.lru_cache(maxsize=1024)
def _reads(cls: type) -> frozenset[tuple[str, ...]]:
    """Return the chains of attributes of ``self`` that the forward reads, each ending at a child's attribute."""
    found: set[tuple[str, ...]] = set()
    waiting, known = ["forward"], {"forward"}
    while waiting:
        for chain in _chains(_source(cls, waiting.pop())):
            if len(chain) > 1:
                found.add(chain)
            if chain[0] not in known:
                known.add(chain[0])
                waiting.append(chain[0])
    return frozenset(found)


def _source(cls: type, name: str) -> ast.FunctionDef | None:
    """Return the parsed function behind a method or property; None if there is none or its source is unavailable."""
    found = inspect.getattr_static(cls, name, None)
    for holder in ("fget", "func", "__func__"):
        found = getattr(found, holder, found)
    function = inspect.unwrap(found) if inspect.isfunction(found) else None
    if function is None or function in _ONLY_LOOK or inspect.getattr_static(nn.Module, name, None) is function:
        return None
    try:
        (node,) = ast.parse(textwrap.dedent(inspect.getsource(function))).body
    except (OSError, TypeError, SyntaxError, ValueError):
        return None
    return node if isinstance(node, ast.FunctionDef) else None


def _chains(function: ast.FunctionDef | None) -> Iterator[tuple[str, ...]]:
    if function is None or not function.args.args:
        return
    known: dict[str, tuple[str, ...]] = {function.args.args[0].arg: ()}
    for node in ast.walk(function):
        for name, chain in _named(node, known):
            known.setdefault(name, chain)
    inner: set[int] = set()
    for node in ast.walk(function):
        if isinstance(node, (ast.Attribute, ast.Subscript, ast.Call)):
            if isinstance(node, ast.Attribute) and node.attr in _ABOUT:
                inner.add(id(node.value))
                continue
            read = _chain(node, known)
            if read and id(node) not in inner:
                yield read


def _named(node: ast.AST, known: dict[str, tuple[str, ...]]) -> Iterator[tuple[str, tuple[str, ...]]]:
    """Yield local names bound to a chain: ``attn = self.attn``, or ``for layer in self.layers``."""
    if isinstance(node, ast.Assign):
        for target in node.targets:
            yield from _assigned(target, node.value, known)
    elif isinstance(node, (ast.NamedExpr, ast.AnnAssign)) and node.value is not None:
        yield from _assigned(node.target, node.value, known)
    elif isinstance(node, (ast.For, ast.comprehension)) and isinstance(node.target, ast.Name):
        several = isinstance(node.iter, (ast.Tuple, ast.List))
        found = _common(node.iter, known) if several else _chain(node.iter, known)
        if found:
            yield node.target.id, found if several else (*found, _ANY)


def _assigned(
    target: ast.AST, value: ast.AST, known: dict[str, tuple[str, ...]]
) -> Iterator[tuple[str, tuple[str, ...]]]:
    if isinstance(target, ast.Tuple) and isinstance(value, ast.Tuple):
        for one, other in zip(target.elts, value.elts, strict=False):
            yield from _assigned(one, other, known)
    elif isinstance(target, ast.Name) and (chain := _chain(value, known)):
        yield target.id, chain


def _common(several: ast.AST, known: dict[str, tuple[str, ...]]) -> tuple[str, ...] | None:
    """Return one chain that covers all of ``(self.q, self.v)``: ("*",)."""
    chains = [chain for item in ast.iter_child_nodes(several) if (chain := _chain(item, known))]
    if len({len(chain) for chain in chains}) != 1:
        return None
    return tuple(steps[0] if len(set(steps)) == 1 else _ANY for steps in zip(*chains, strict=True))


def _chain(node: ast.AST, known: dict[str, tuple[str, ...]]) -> tuple[str, ...] | None:
    """Return ``self.a.b[0]`` as ("a", "b", "0"); None if it does not start at ``self``."""
    if isinstance(node, ast.Name):
        return known.get(node.id)
    if isinstance(node, ast.Attribute):
        before = _chain(node.value, known)
        return None if before is None else (*before, node.attr)
    if isinstance(node, ast.Subscript):
        before = _chain(node.value, known)
        index = node.slice
        step = str(index.value) if isinstance(index, ast.Constant) else _ANY
        return None if before is None else (*before, step)
    if isinstance(node, ast.Call) and isinstance(node.func, ast.Name) and node.func.id == "getattr" and node.args[1:]:
        before = _chain(node.args[0], known)
        index = node.args[1]
        step = str(index.value) if isinstance(index, ast.Constant) else _ANY
        return None if before is None else (*before, step)
    if isinstance(node, ast.NamedExpr):
        return _chain(node.value, known)
    return None
