"""Check the links inside of the built documentation: ``python -m tests.links docs/_build/html``.

Sphinx checks references by name. This checks what remains: paths and anchors in Markdown, raw HTML, the gallery and the
theme. ``sphinx -b linkcheck`` checks links to other sites, for which it needs the network.
"""

from __future__ import annotations

import argparse
from html.parser import HTMLParser
from pathlib import Path
from urllib.parse import unquote, urlsplit

__all__ = ["broken"]

# Listings of code, whose links back Sphinx makes of private names, and templates of the theme.
LEFT_OUT = ("_modules", "_static")


class _Page(HTMLParser):
    """The anchors of a page, and the links and pictures on it."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.anchors, self.links = {"", "top"}, set[str]()
        self.feed(text)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        for name, value in attrs:
            if value and (name == "id" or (name == "name" and tag == "a")):
                self.anchors.add(value)
            elif value and name in ("href", "src"):
                self.links.add(value)


def broken(folder: Path) -> list[str]:
    """Return the links on the pages of a folder that lead to no file or no anchor in it, a line each."""
    folder = folder.resolve()
    paths = [path for path in sorted(folder.rglob("*.html")) if path.relative_to(folder).parts[0] not in LEFT_OUT]
    pages = {path: _Page(path.read_text(encoding="utf-8")) for path in paths}
    found = []
    for path, page in pages.items():
        for link in sorted(page.links):
            parts = urlsplit(link)
            if parts.scheme or parts.netloc:
                continue
            target = (path.parent / unquote(parts.path)).resolve() if parts.path else path
            if not target.exists():
                found.append(f"{path.relative_to(folder)}: {link}: no such file")
            elif target in pages and unquote(parts.fragment) not in pages[target].anchors:
                found.append(f"{path.relative_to(folder)}: {link}: no such anchor")
    return found


def main() -> None:
    """Print the broken links; exit with 1 if there are any, or no pages."""
    given = argparse.ArgumentParser(description=__doc__)
    given.add_argument("folder", type=Path, help="what sphinx -b html built")
    folder = given.parse_args().folder
    if not (folder / "index.html").is_file():
        raise SystemExit(f"{folder} has no index.html")
    if found := broken(folder):
        raise SystemExit("\n".join(found))


if __name__ == "__main__":
    main()
