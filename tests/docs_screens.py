"""Check that no page of the built documentation scrolls sideways: ``python -m tests.docs_screens FOLDER``.

Ten pages are opened in Chromium, in windows as narrow as a phone's and as wide as a laptop's. What is wider than its
column, such as a table, must scroll in a container of its own. Needs the package playwright and a browser: Playwright's
own, or a Chromium on the path. Without them nothing is checked.
"""

from __future__ import annotations

import argparse
import importlib
import shutil
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

__all__ = ["PAGES", "browser", "overflows"]

WIDTHS = (420, 1400)
PAGES = (
    "index", "quickstart", "attach", "presets", "tensors", "projection", "quality", "architecture", "glossary",
    "api/index",
)  # fmt: skip
BROWSERS = ("chromium", "chromium-browser", "google-chrome")

# Returns what makes a page too wide, the innermost elements alone, and the tables that no container scrolls.
SCRIPT = r"""() => {
  const within = (element, ...overflows) => {
    for (let one = element.parentElement; one && one !== document.body; one = one.parentElement)
      if (overflows.includes(getComputedStyle(one).overflowX)) return true;
  };
  const name = (element) => [element.tagName.toLowerCase(), ...element.classList].join(".") + ": "
    + element.textContent.trim().replace(/\s+/g, " ").slice(0, 50);
  const all = (selector) => [...document.querySelectorAll(selector)];
  const cut = ["auto", "scroll", "hidden", "clip"];
  const wide = all("body *").filter((element) => {
    const box = element.getBoundingClientRect();
    return box.width && box.left < innerWidth && box.right > innerWidth + 1 && !within(element, ...cut);
  });
  const inner = wide.filter((element) => !wide.some((other) => other !== element && element.contains(other)));
  const width = document.documentElement.scrollWidth;
  const bare = all("article table").filter((table) => !within(table, "auto", "scroll"));
  return [
    ...(width > innerWidth ? [`is ${width} pixels wide`, ...inner.map((one) => "reaches out: " + name(one))] : []),
    ...bare.map((table) => "does not scroll: " + name(table)),
  ];
}"""


@contextmanager
def browser() -> Iterator[Any]:
    """Start a browser; raise ImportError without the package, and FileNotFoundError without a browser."""
    with importlib.import_module("playwright.sync_api").sync_playwright() as playwright:
        path = next(filter(None, map(shutil.which, BROWSERS)), None)
        if path is None and not Path(playwright.chromium.executable_path).exists():
            raise FileNotFoundError(f"none of {', '.join(BROWSERS)} is on the path, and Playwright has installed none")
        # As root, as in containers, Chromium has no sandbox. The pages are our own.
        started = playwright.chromium.launch(executable_path=path, args=["--no-sandbox"])
        try:
            yield started
        finally:
            started.close()


def overflows(browser: Any, folder: Path, pages: Sequence[str] = PAGES, pictures: Path | None = None) -> list[str]:
    """Return what is wider than the window, one line each; save pictures of the pages if a folder is given."""
    lines = []
    for width in WIDTHS:
        tab = browser.new_page(viewport={"width": width, "height": 900})
        for page in pages:
            tab.goto((folder.resolve() / f"{page}.html").as_uri(), wait_until="networkidle")
            lines += [f"{page}.html at {width}: {line}" for line in tab.evaluate(SCRIPT)]
            if pictures:
                pictures.mkdir(parents=True, exist_ok=True)
                tab.screenshot(path=pictures / f"{page.replace('/', '-')}-{width}.png")
        tab.close()
    return lines


def main() -> None:
    """Print what is too wide; exit with 1 if there is something."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("folder", type=Path, help="what sphinx -b html built")
    parser.add_argument("--pictures", type=Path, help="save a picture of each page in this folder")
    arguments = parser.parse_args()
    try:
        with browser() as started:
            lines = overflows(started, arguments.folder, pictures=arguments.pictures)
    except (ImportError, FileNotFoundError) as error:
        print(f"nothing checked: {error}")
        return
    if lines:
        raise SystemExit("\n".join(lines))


if __name__ == "__main__":
    main()
