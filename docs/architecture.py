"""Draw the pictures of ``docs/architecture.rst``: ``docs/_static/architecture.svg`` and ``attach.svg``.

    python docs/architecture.py

The first shows the packages, their imports, and the concepts of the page. An arrow points from a package to one that it
imports; an import that other arrows imply has none. The second shows the steps of the page's table, and their results.
"""

from __future__ import annotations

import itertools
import re
from pathlib import Path

import grimp

DOCS = Path(__file__).parent
PICTURE = DOCS / "_static" / "architecture.svg"
ATTACH = DOCS / "_static" / "attach.svg"
#: What several packages use: the files next to them. ``maps``, ``presets`` and ``sources`` are names of other files.
FILES = ("argument_checks", "errors", "lazy_names", "plugins", "report")

WIDTH, GAP, LINE, SPACE = 116, 32, 17, 16
HEAD = (
    '<defs><marker id="head" markerWidth="9" markerHeight="7" refX="8" refY="3.5" orient="auto">'
    '<path d="M0,0 L9,3.5 L0,7 z" fill="#555"/></marker></defs>'
)


def concepts() -> dict[str, list[str]]:
    """Return the concepts of each package, from the first table of the page."""
    page = (DOCS / "architecture.rst").read_text(encoding="utf-8")
    found: dict[str, list[str]] = {}
    for concept, package in re.findall(r"\* - \*\*(\w+)\*\*\n     - .*\n     - ``(\w+)/", page):
        found.setdefault(package, []).append(concept)
    return found


def imports() -> dict[str, set[str]]:
    """Return what each package imports, without what an import implies."""
    graph = grimp.build_graph("tnadapt", cache_dir=None)

    def package(module: str) -> str:
        name = module.split(".")[1] if "." in module else ""
        return "files" if name in FILES else name

    packages = {package(name) for name in graph.modules if graph.find_children(name)} - {""} | {"files"}
    direct: dict[str, set[str]] = {name: set() for name in sorted(packages)}
    for module in graph.modules:
        for imported in graph.find_modules_directly_imported_by(module):
            if package(module) in packages and package(imported) in packages - {package(module)}:
                direct[package(module)].add(package(imported))

    def reached(name: str) -> set[str]:
        return direct[name].union(*map(reached, direct[name]))

    return {name: below - set().union(*map(reached, below)) for name, below in direct.items()}


def columns(below: dict[str, set[str]]) -> tuple[list[list[str]], list[list[str]]]:
    """Return the nodes of each column from the left, and the nodes on the path of each arrow.

    A package's column is the length of its longest chain of imports. An arrow has a node in each column that it passes.
    """

    def depth(name: str) -> int:
        return 1 + max(map(depth, below[name]), default=-1)

    paths = []
    places: list[list[str]] = [[] for _ in range(1 + max(map(depth, below)))]
    for name in below:
        places[depth(name)].append(name)
    for name in below:
        for other in sorted(below[name]):
            passed = [(level, f"{name}>{other}>{level}") for level in range(depth(name) - 1, depth(other), -1)]
            for level, node in passed:
                places[level].append(node)
            paths.append([name, *(node for _, node in passed), other])
    pairs = [pair for path in paths for pair in itertools.pairwise(path)]
    # Sweeps from both sides in turn: each node is placed at the mean of its neighbors.
    for sweep in range(8):
        rank = {node: (number + 0.5) / len(column) for column in places for number, node in enumerate(column)}
        for column in places if sweep % 2 else reversed(places):
            neighbors = {
                node: [rank[second if first == node else first] for first, second in pairs if node in (first, second)]
                or [0.5]
                for node in column
            }
            column.sort(key=lambda node: (sum(neighbors[node]) / len(neighbors[node]), node))
            rank |= {node: (number + 0.5) / len(column) for number, node in enumerate(column)}
    return places[::-1], paths


def drawing() -> str:
    """Return the picture."""
    named, below = concepts(), imports()
    listed = {name: named.get(name, []) for name in below} | {"files": list(FILES)}
    places, paths = columns(below)

    def height(node: str) -> int:
        return 0 if ">" in node else LINE * (1 + len(listed[node])) + 12

    heights = [sum(map(height, column)) + SPACE * (len(column) - 1) for column in places]
    boxes: dict[str, tuple[float, float]] = {}
    for number, column in enumerate(places):
        y = (max(heights) - heights[number]) / 2 + 2
        for node in column:
            boxes[node] = (number * (WIDTH + GAP) + 2, y)
            y += height(node) + SPACE
    arrows, rectangles, texts = [], [], []
    for path in paths:
        x, y = boxes[path[0]][0] + WIDTH, boxes[path[0]][1] + height(path[0]) / 2
        curve = f"M{x:g},{y:g}"
        for node in path[1:]:
            left, middle = boxes[node][0], boxes[node][1] + height(node) / 2
            curve += f" C{(x + left) / 2:g},{y:g} {(x + left) / 2:g},{middle:g} {left:g},{middle:g}"
            x, y = left, middle
            if ">" in node:
                x += WIDTH
                curve += f" H{x:g}"
        arrows.append(f'<path d="{curve}"/>')
    for node, lines in listed.items():
        x, y = boxes[node]
        fill = ' fill="#f6f0e2" stroke="#a07a1f"' if named.get(node) else ""
        rectangles.append(f'<rect x="{x:g}" y="{y:g}" width="{WIDTH}" height="{height(node)}" rx="5"{fill}/>')
        title = "*.py" if node == "files" else f"{node}/"
        for number, line in enumerate([title, *lines]):
            code = number == 0 or node == "files"
            font = 'font-family="monospace" font-size="12"' if code else 'font-weight="bold"'
            texts.append(f'<text x="{x + WIDTH / 2:g}" y="{y + 18 + LINE * number:g}" {font}>{line}</text>')
    size = f"0 0 {len(places) * (WIDTH + GAP) - GAP + 4} {max(heights) + 4:g}"
    return "\n".join(
        [
            f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="{size}" role="img" aria-labelledby="title" '
            'font-family="sans-serif" font-size="13">',
            '<title id="title">The packages of tnadapt, what they import, and the concepts in them</title>',
            HEAD,
            '<g stroke="#555" stroke-width="1.2" fill="none" marker-end="url(#head)">', *arrows, "</g>",
            '<g fill="#eef3fb" stroke="#3b6ea8" stroke-width="1.4">', *rectangles, "</g>",
            '<g text-anchor="middle" fill="#1d1d1d">', *texts, "</g>",
            "</svg>", "",
        ]
    )  # fmt: skip


def steps() -> list[tuple[str, str, str]]:
    """Return the name, the result and the first file of each step of ``attach``, from the page's table of them."""
    page = (DOCS / "architecture.rst").read_text(encoding="utf-8")
    names, results = re.findall(r"=+", page[page.index("============  ====") :])[:2]
    second, third = len(names) + 2, len(names) + len(results) + 4
    found = []
    for line in page.splitlines():
        row = line.removeprefix("   ")
        if re.match(r"``_\w+``", row):
            result = re.findall(r"``(\w+)``", row[second:third])[0]
            found.append((row[:second].strip(" `"), result, re.findall(r"``(\S+\.py)``", row[third:])[0]))
    return found


def attach_drawing() -> str:
    """Return the picture of ``attach``: a row of steps, with what passes from each to the next above the arrows."""
    width, gap, top = 196, 96, 44
    rows = steps()
    labels = ["request", *(result for _, result, _ in rows)]
    parts = []
    for number, (name, _, place) in enumerate(rows):
        x = gap + number * (width + gap)
        parts += [
            f'<rect x="{x}" y="{top - 24}" width="{width}" height="48" rx="5" fill="#f6f0e2" stroke="#a07a1f"/>',
            f'<text x="{x + width / 2:g}" y="{top - 4}" font-weight="bold">{name.strip("_")}</text>',
            f'<text x="{x + width / 2:g}" y="{top + 13}" font-family="monospace" font-size="11">{place}</text>',
        ]
    for number, label in enumerate(labels):
        x = number * (width + gap)
        parts += [
            f'<path d="M{x + 2},{top} H{x + gap - 2}" stroke="#555" stroke-width="1.2" marker-end="url(#head)"/>',
            f'<text x="{x + gap / 2:g}" y="{top - 8}" font-size="12">{label}</text>',
        ]
    return "\n".join(
        [
            f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {len(rows) * (width + gap) + gap} {2 * top}" '
            'role="img" aria-labelledby="title" font-family="sans-serif" font-size="13">',
            '<title id="title">The steps of attach, and what passes from each to the next</title>',
            HEAD,
            '<g text-anchor="middle" fill="#1d1d1d">', *parts, "</g>",
            "</svg>", "",
        ]
    )  # fmt: skip


if __name__ == "__main__":
    PICTURE.write_text(drawing(), encoding="utf-8")
    ATTACH.write_text(attach_drawing(), encoding="utf-8")
