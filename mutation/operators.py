"""The mutation operators: a selection of cosmic-ray's, and four of our own.

cosmic-ray replaces every arithmetic operator by each of the eleven others, and every comparison by each of the seven
others. Here each operator is replaced by the one that it is most easily confused with, and each comparison by its
negation and by the one that differs on equality: less than half as many mutants, at the same places. :func:`left_out`
returns the others.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

import parso.python.tree as tree
from cosmic_ray.operators.operator import Example, Operator
from cosmic_ray.plugins import get_operator, operator_names

__all__ = ["OURS", "DropKeyword", "DropStatement", "NegateIn", "ReturnNone", "left_out", "operators"]

_BINARY = [
    ("Add", "Sub"), ("Sub", "Add"), ("Mul", "FloorDiv"), ("Div", "Mul"), ("FloorDiv", "Mul"), ("Mod", "FloorDiv"),
    ("Pow", "Mul"), ("LShift", "RShift"), ("RShift", "LShift"), ("BitOr", "BitAnd"), ("BitAnd", "BitOr"),
    ("BitXor", "BitAnd"),
]  # fmt: skip
_COMPARISONS = [
    ("Eq", "NotEq"), ("NotEq", "Eq"), ("Lt", "LtE"), ("Lt", "GtE"), ("LtE", "Lt"), ("LtE", "Gt"), ("Gt", "GtE"),
    ("Gt", "LtE"), ("GtE", "Gt"), ("GtE", "Lt"), ("Is", "IsNot"), ("IsNot", "Is"),
]  # fmt: skip
_CHOSEN = [
    *(f"ReplaceBinaryOperator_{before}_{after}" for before, after in _BINARY),
    *(f"ReplaceComparisonOperator_{before}_{after}" for before, after in _COMPARISONS),
    *(f"ReplaceUnaryOperator_{before}" for before in ("Delete_Not", "Delete_USub", "Delete_Invert")),
    "AddNot", "ReplaceTrueWithFalse", "ReplaceFalseWithTrue", "ReplaceAndWithOr", "ReplaceOrWithAnd",
    "ReplaceBreakWithContinue", "ReplaceContinueWithBreak", "ExceptionReplacer", "NumberReplacer", "RemoveDecorator",
    "ZeroIterationForLoop",
]  # fmt: skip


def _span(node: Any) -> tuple[tuple[int, int], tuple[int, int]]:
    return node.start_pos, node.end_pos


class DropStatement(Operator):  # type: ignore[misc]
    """Replace a statement with a side effect by ``pass``: a call, a raise, an assignment to an item."""

    def mutation_positions(self, node: Any) -> Iterator[Any]:
        if node.parent is not None and node.parent.type == "simple_stmt" and _has_effect(node):
            yield _span(node)

    def mutate(self, node: Any, index: int) -> Any:
        return tree.Keyword("pass", node.start_pos, prefix=node.get_first_leaf().prefix)

    @classmethod
    def examples(cls) -> Sequence[Example]:
        return (
            Example("f(x)\n", "pass\n"),
            Example("x[0] = 1\n", "pass\n"),
            Example("x += 1\n", "pass\n"),
            Example("if x:\n    raise E\n", "if x:\n    pass\n"),
        )


def _has_effect(node: Any) -> bool:
    if node.type in ("atom_expr", "power"):  # a call
        return node.children[-1].type == "trailer" and node.children[-1].children[0].value == "("
    if node.type == "expr_stmt":
        target, operator = node.children[:2]
        augmented = operator.type == "operator" and operator.value != "="
        return augmented or (operator.type == "operator" and target.type in ("atom_expr", "power"))
    return node.type in ("raise_stmt", "del_stmt", "yield_expr")


class DropKeyword(Operator):  # type: ignore[misc]
    """Drop one keyword argument of a call."""

    def mutation_positions(self, node: Any) -> Iterator[Any]:
        if node.type == "argument" and node.children[0].type == "name" and node.children[1] == "=":
            yield _span(node)

    def mutate(self, node: Any, index: int) -> Any:
        # Also remove a comma: two in a row are a syntax error.
        siblings = node.parent.children
        place = siblings.index(node)
        if place + 1 < len(siblings) and siblings[place + 1] == ",":
            siblings[place + 1].value = ""
        elif place and siblings[place - 1] == ",":
            siblings[place - 1].value = ""
        return None

    @classmethod
    def examples(cls) -> Sequence[Example]:
        return Example("f(x, y=1)", "f(x)"), Example("f(y=1)", "f()")


class ReturnNone(Operator):  # type: ignore[misc]
    """Replace a conditionally returned value by None."""

    def mutation_positions(self, node: Any) -> Iterator[Any]:
        # The last statement returns the function's main result: any test notices.
        if node.type == "return_stmt" and node.children[1:] and node.children[1].get_code().strip() != "None":
            holder = node.parent.parent
            if holder is not None and holder.parent is not None and holder.parent.type != "funcdef":
                yield _span(node)

    def mutate(self, node: Any, index: int) -> Any:
        node.children[1:] = [tree.Keyword("None", node.children[1].start_pos, prefix=" ")]
        return node

    @classmethod
    def examples(cls) -> Sequence[Example]:
        return (Example("def f():\n    if x:\n        return 1\n", "def f():\n    if x:\n        return None\n"),)


class NegateIn(Operator):  # type: ignore[misc]
    """Replace ``in`` by ``not in`` and vice versa, which cosmic-ray does not."""

    def mutation_positions(self, node: Any) -> Iterator[Any]:
        if node.type == "comparison" and node.children[1].get_code(include_prefix=False) in ("in", "not in"):
            yield _span(node.children[1])

    def mutate(self, node: Any, index: int) -> Any:
        before = node.children[1]
        after = "in" if before.type == "comp_op" else "not in"
        node.children[1] = tree.Keyword(after, before.start_pos, prefix=before.get_first_leaf().prefix)
        return node

    @classmethod
    def examples(cls) -> Sequence[Example]:
        return Example("x in y", "x not in y"), Example("x not in y", "x in y")


#: Our own operators, by name.
OURS = {kind.__name__: kind for kind in (DropStatement, DropKeyword, NegateIn, ReturnNone)}


def operators() -> dict[str, Operator]:
    """Return all selected operators, by a short name."""
    return {**_named(_CHOSEN), **{name: kind() for name, kind in OURS.items()}}


def left_out() -> dict[str, Operator]:
    """Return cosmic-ray's other operators, by a short name, without the two that require variable names."""
    core = (name.removeprefix("core/") for name in operator_names() if name.startswith("core/"))
    return _named([name for name in sorted(core) if name not in _CHOSEN and not name.startswith("Variable")])


def _named(names: Sequence[str]) -> dict[str, Operator]:
    return {name.removeprefix("Replace").replace("Operator_", "_"): get_operator(f"core/{name}")() for name in names}
