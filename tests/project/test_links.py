"""The check of the built documentation finds links that lead nowhere, and no others."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

from tests.links import broken

PAGES = {
    "index.html": '<h1 id="start">A</h1><a href="#start"></a><a href="#"></a><a href="https://example.org/x#y"></a>'
    '<a href="deep/page.html#here"></a><a href="deep/page.html?q=1"></a><img src="gone.png">',
    "deep/page.html": '<p id="here"></p><a href="../index.html#none"></a><a href="../a%20b.txt"></a>'
    '<a href="mailto:a@b.org"></a>',
    "_modules/code.html": '<a href="nowhere.html"></a>',
    "a b.txt": "",
}


def test_links_that_lead_nowhere_are_found(tmp_path: Path) -> None:
    for name, text in PAGES.items():
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text(text, encoding="utf-8")
    assert broken(tmp_path) == [
        "deep/page.html: ../index.html#none: no such anchor",
        "index.html: gone.png: no such file",
    ]
    (tmp_path / "gone.png").touch()
    (tmp_path / "deep" / "page.html").write_text('<p id="here">', encoding="utf-8")
    assert broken(tmp_path) == []


def test_an_empty_folder_is_no_documentation(tmp_path: Path) -> None:
    done = subprocess.run(
        [sys.executable, "-m", "tests.links", str(tmp_path)],
        capture_output=True, text=True, check=False, cwd=Path(__file__).parents[2],
    )  # fmt: skip
    assert done.returncode == 1
    assert "has no index.html" in done.stderr
