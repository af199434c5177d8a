"""The sentences of a page or a docstring, without code and markup. Line numbers stay what they are."""

from __future__ import annotations

import ast
import re

__all__ = ["of_markdown", "of_python", "of_rst"]

FENCE = re.compile(r"^\s*(```+|~~~+)")
DIRECTIVE = re.compile(r"^(\s*)\.\. ([\w:-]+)::")
# What these hold is not prose; what others hold, such as list-table or grid-item-card, is.
CODE = {"code-block", "math", "image", "toctree", "currentmodule", "autosummary", "automodule", "include", "rubric"}
INLINE = [
    (re.compile(r"!?\[([^\]]*)\]\([^)]*\)"), r"\1"),  # a link of Markdown
    (re.compile(r"``.+?``"), "…"),
    (re.compile(r"\{?:?[\w:-]+:?\}?`[^`<]*<[^`>]*>`"), "…"),  # a role with a title
    (re.compile(r"(:[\w:-]+:|\{[\w:-]+\})`[^`]*`"), "…"),
    (re.compile(r"`([^`<]+?) ?<[^`>]*>`__?"), r"\1"),  # a link of reStructuredText
    (re.compile(r"`[^`]*`"), "…"),
    (re.compile(r"https?://\S+"), "…"),
    (re.compile(r"\*+([^*\n]+)\*+"), r"\1"),
    (re.compile(r"<[^>\n]+>"), ""),
]


def of_markdown(text: str) -> str:
    """Return the text without fenced code, comments, tables and markup."""
    lines, fence = list[str](), ""
    for line in re.sub(r"<!--.*?-->", lambda found: "\n" * found[0].count("\n"), text, flags=re.DOTALL).splitlines():
        mark = FENCE.match(line)
        if mark and not fence:
            fence = mark[1]
            lines.append("")
        elif fence:
            if mark and mark[1].startswith(fence):
                fence = ""
            lines.append("")
        else:
            lines.append("" if line.lstrip().startswith("|") else line)
    return _without_markup("\n".join(lines))


def of_rst(text: str) -> str:
    """Return the text without literal blocks, examples, directives of code and markup."""
    lines, example, block = list[str](), False, None
    for line in text.splitlines():
        indent = len(line) - len(line.lstrip())
        if block is not None and line.strip() and indent <= block:
            block = None
        example = bool(line.strip()) and (example or line.lstrip().startswith(">>>"))
        if block is not None or example:
            lines.append("")
            continue
        directive = DIRECTIVE.match(line)
        if directive and directive[2] in CODE:
            block = indent
            lines.append("")
        elif directive or re.match(r"\s*(:[\w-]+:|\.\. )", line) or re.fullmatch(r"\s*([=\-~^*]\s*){3,}", line):
            lines.append("")  # an option, a comment, a rule of a title or table
        elif line.rstrip().endswith("::"):
            block = indent
            lines.append(line.rstrip()[:-1])
        else:
            cell = re.sub(r"^(\s*)(\* - |- |\* )", r"\1", line)
            lines.append(cell + " |" * bool(re.search(r"\S {2,}\S", cell)))  # a table's row ends here
    return _without_markup("\n".join(lines))


def of_python(text: str) -> str:
    """Return the docstrings of a module, each in its own lines."""
    lines = [""] * len(text.splitlines())
    for node in ast.walk(ast.parse(text)):
        if isinstance(node, ast.Module | ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef):
            docstring = ast.get_docstring(node, clean=False)
            if docstring is not None:
                indent = " " * node.body[0].col_offset
                own = of_rst(indent + docstring).splitlines()
                start = node.body[0].lineno - 1
                lines[start : start + len(own)] = own
    return "\n".join(lines)


def _without_markup(text: str) -> str:
    for pattern, instead in INLINE:
        text = pattern.sub(lambda found, to=instead: found.expand(to) + "\n" * found[0].count("\n"), text)
    return text
