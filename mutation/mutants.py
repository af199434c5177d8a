"""All mutants of a module, each with a name that changes elsewhere in the file do not affect."""

from __future__ import annotations

import ast
import dataclasses
import difflib
import hashlib
import re
import subprocess
from collections import Counter
from collections.abc import Iterator, Mapping
from functools import cached_property
from pathlib import Path
from typing import Any

from cosmic_ray.ast import ast_nodes, get_ast
from cosmic_ray.mutating import mutate_code

from .operators import operators

__all__ = ["Module", "Mutant", "changed_lines"]

_OPERATORS = operators()


@dataclasses.dataclass(frozen=True)
class Mutant:
    """One mutation of one place.

    Attributes
    ----------
    module : str
        Path of the file, from the root of the repository.
    function : str
        The function or class, with dots; empty at module level.
    operator : str
    occurrence : int
        The number of the place among this operator's in the file, as cosmic-ray counts.
    line : int
    key : str
        The name: a digest of everything except line numbers.
    """

    module: str
    function: str
    operator: str
    occurrence: int
    line: int
    key: str


class Module:
    """A file, and its mutants.

    Parameters
    ----------
    root : Path
        The repository.
    path : str
        The file, from there.
    operators : mapping of str to Operator, optional
        By name; those of :func:`mutation.operators.operators`.
    """

    def __init__(self, root: Path, path: str, operators: Mapping[str, Any] = _OPERATORS) -> None:
        self.path, self.operators = path, operators
        self.code = (root / path).read_text(encoding="utf-8")
        self._tree = ast.parse(self.code)
        self._lines = self.code.splitlines()

    @cached_property
    def mutants(self) -> list[Mutant]:
        """All mutants that change code that runs, in the order of the operators and of the file."""
        return list(self._found())

    def _found(self) -> Iterator[Mutant]:
        nodes, unseen = list(ast_nodes(get_ast(self.code))), self._never_run()
        repeated: Counter[tuple[str, ...]] = Counter()
        for name, operator in self.operators.items():
            places = (place for node in nodes for place in operator.mutation_positions(node))
            for occurrence, ((line, column), _) in enumerate(places):
                if any(start <= (line, column) < stop for start, stop in unseen):
                    continue
                function, text = self.function(line), self._lines[line - 1].strip()
                offset = column - (len(self._lines[line - 1]) - len(self._lines[line - 1].lstrip()))
                place = (self.path, function, name, text, str(offset))
                repeated[place] += 1
                key = hashlib.sha256("\0".join([*place, str(repeated[place])]).encode()).hexdigest()[:12]
                yield Mutant(self.path, function, name, occurrence, line, key)

    def mutated(self, mutant: Mutant) -> str | None:
        """Return the file with that mutation; None if it is not valid Python, or the same program."""
        code = mutate_code(self.code, self.operators[mutant.operator], mutant.occurrence)
        try:
            same = code is None or ast.dump(ast.parse(code)) == ast.dump(self._tree)
            return None if same else code
        except SyntaxError:
            return None

    def change(self, code: str) -> str:
        """Return the lines that differ, as in a diff."""
        lines = difflib.unified_diff(self._lines, code.splitlines(), n=0, lineterm="")
        return "\n".join(line for line in lines if line[:3] not in ("---", "+++") and line[:2] != "@@")

    def function(self, line: int) -> str:
        """Return the names of the functions and classes around a line, with dots."""
        return ".".join(node.name for node in self._around(line))

    def reach(self, line: int) -> range | None:
        """Return the lines of which one runs if the given line does; None if it runs when the module is imported.

        A statement may span many lines, of which coverage does not count all. The head of a function runs on import,
        and any caller of the function sees it.
        """
        around = self._around(line)
        if not around or isinstance(around[-1], ast.ClassDef):
            return None
        function = around[-1]
        if line < function.body[0].lineno:
            return range(function.body[0].lineno, (function.end_lineno or line) + 1)
        best = function.body[0]
        for node in ast.walk(function):
            if isinstance(node, ast.stmt) and node is not function and node.lineno <= line <= (node.end_lineno or line):
                best = node
        body = getattr(best, "body", None)
        stop = body[0].lineno - 1 if isinstance(body, list) and body else best.end_lineno or line
        return range(best.lineno, max(line, stop) + 1)

    def _around(self, line: int) -> list[Any]:
        found, kinds = [], (ast.FunctionDef, ast.AsyncFunctionDef, ast.ClassDef)
        for node in ast.walk(self._tree):  # outer ones first
            if isinstance(node, kinds):
                first = min([node.lineno, *(decorator.lineno for decorator in node.decorator_list)])
                if first <= line <= (node.end_lineno or line):
                    found.append(node)
        return found

    def _never_run(self) -> list[tuple[tuple[int, int], tuple[int, int]]]:
        """Return the ranges without effect at run time: annotations, code for type checkers, and mere assertions."""
        found: list[ast.AST] = []
        for node in ast.walk(self._tree):
            found += [node.annotation] if isinstance(node, ast.AnnAssign) else []
            if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
                everything = node.args
                arguments = [*everything.posonlyargs, *everything.args, *everything.kwonlyargs]
                arguments += [one for one in (everything.vararg, everything.kwarg) if one is not None]
                found += [one.annotation for one in arguments if one.annotation is not None]
                found += [node.returns] if node.returns is not None else []
            if isinstance(node, ast.If) and ast.unparse(node.test) == "TYPE_CHECKING":
                found.append(node)
            # The first argument of cast() is a type as well; zip(strict=True) is an assertion, and never fires.
            if isinstance(node, ast.Call) and ast.unparse(node.func) == "cast":
                found.append(node.args[0])
            if isinstance(node, ast.Call) and ast.unparse(node.func) == "zip":
                found += [keyword for keyword in node.keywords if keyword.arg == "strict"]
            # Type aliases at module level.
            if isinstance(node, ast.Assign) and node in self._tree.body and _alias(node.value):
                found.append(node.value)
        return [((n.lineno, n.col_offset), (n.end_lineno, n.end_col_offset)) for n in found]  # type: ignore[attr-defined]


def changed_lines(root: Path, path: str, since: str) -> set[int]:
    """Return the numbers of a file's lines that git says have changed since a commit."""
    command = ["git", "blame", "-s", f"{since}..HEAD", "--", path]
    blame = subprocess.run(command, cwd=root, capture_output=True, text=True, check=True).stdout
    # Each line begins with the commit that last changed it; "^" marks those that are as old as the given commit.
    numbers = re.findall(r"^[0-9a-f]+ (?:\S+ +)?(\d+)\)", blame, re.MULTILINE)
    return set(map(int, numbers))


def _alias(node: ast.expr) -> bool:
    """Return whether the expression is a union of types, or a subscripted type."""
    if isinstance(node, ast.BinOp):
        return isinstance(node.op, ast.BitOr) and _alias(node.left)
    return isinstance(node, ast.Name | ast.Attribute) or (isinstance(node, ast.Subscript) and _alias(node.value))
