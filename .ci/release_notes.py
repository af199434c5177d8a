"""Print the section of CHANGELOG.md about this version: the text of its release.

    python .ci/release_notes.py [TAG]

Fails if the version or its date is another one in CHANGELOG.md, CITATION.cff or the conda recipe. Given a tag, such as
v0.1.0, it fails as well if the tag names another version, or if CHANGELOG.md still lists changes under Unreleased:
the tag would contain them.
"""

import re
import sys
from pathlib import Path

ROOT = Path(__file__).parents[1]


def found(place: str, pattern: str) -> str:
    """Return what the group of the pattern matches in a file of the project."""
    match = re.search(pattern, (ROOT / place).read_text(encoding="utf-8"), flags=re.MULTILINE)
    if not match:
        raise SystemExit(f"{place} has no line that matches {pattern}")
    return match[1]


def sections() -> dict[str, tuple[str, str]]:
    """Return date and text of each section of CHANGELOG.md by its version, newest first."""
    text = (ROOT / "CHANGELOG.md").read_text(encoding="utf-8")
    parts = re.split(r"^## \[(.+?)\](?: - (\S+))?\n", text, flags=re.MULTILINE)[1:]
    # Links are at the end of the file, below the oldest section.
    return {
        version: (date or "", re.sub(r"(?m)^\[.+\]: .*\n", "", body).strip())
        for version, date, body in zip(*(parts[first::3] for first in range(3)), strict=True)
    }


def notes(tag: str = "") -> str:
    """Return the text of the version's section."""
    version = found("tnadapt/__init__.py", r'^__version__ = "(.+)"$')
    changelog = sections()
    newest = next((name for name in changelog if name != "Unreleased"), "none")
    versions = {
        "the newest section of CHANGELOG.md": newest,
        "CITATION.cff": found("CITATION.cff", r"^version: (.+)$"),
        "conda-recipe/recipe.yaml": found("conda-recipe/recipe.yaml", r'^  version: "(.+)"$'),
    }
    if tag:
        versions["the tag"] = tag.removeprefix("v")
    for place, other in versions.items():
        if other != version:
            raise SystemExit(f"tnadapt/__init__.py has version {version}, {place} has {other}: they must be equal")
    date, text = changelog[version]
    cited = found("CITATION.cff", r'^date-released: "?([\d-]+)"?$')
    if date != cited:
        raise SystemExit(f"CHANGELOG.md dates {version} {date}, CITATION.cff {cited}: they must be equal")
    if tag and changelog.get("Unreleased", ("", ""))[1]:
        raise SystemExit(f"CHANGELOG.md has changes under Unreleased that {tag} contains: move them to {version}")
    return text


if __name__ == "__main__":
    print(notes(*sys.argv[1:2]))
