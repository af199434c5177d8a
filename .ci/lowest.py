"""Print the lower bounds of pyproject.toml as exact versions: of the dependencies, and of the extras that are named.

A resolver with a "lowest" strategy takes the next version if a bound is unavailable; with exact versions it fails.
"""

import re
import sys
import tomllib
from collections.abc import Iterator
from pathlib import Path

PROJECT = tomllib.loads((Path(__file__).parents[1] / "pyproject.toml").read_text(encoding="utf-8"))["project"]


def bounds(requirements: list[str]) -> Iterator[str]:
    """Yield ``name==version`` of each requirement, with this project's extras expanded."""
    for requirement in requirements:
        if own := re.fullmatch(r"tnadapt\[(.*)\]", requirement):
            yield from bounds([one for extra in own[1].split(",") for one in PROJECT["optional-dependencies"][extra]])
        else:
            yield requirement.partition(";")[0].strip().replace(">=", "==")


if __name__ == "__main__":
    extras = [f"tnadapt[{extra}]" for extra in sys.argv[1:]]
    print("\n".join(sorted({*bounds([*PROJECT["dependencies"], *extras])})))
