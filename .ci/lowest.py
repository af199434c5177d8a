"""Print the lower bounds of pyproject.toml as exact versions: of the dependencies, and of the extras that are named."""

import re
import sys
import tomllib
from pathlib import Path

PROJECT = tomllib.loads((Path(__file__).parents[1] / "pyproject.toml").read_text(encoding="utf-8"))["project"]


def bounds(extras: list[str]) -> list[str]:
    """``name==version`` of every requirement, those of extras of extras included."""
    wanted, found, seen = list(PROJECT["dependencies"]), dict[str, str](), set[str]()
    queue = list(extras)
    while queue:
        extra = queue.pop()
        if extra not in seen:
            seen.add(extra)
            wanted += PROJECT["optional-dependencies"][extra]
    for requirement in wanted:
        if own := re.fullmatch(r"tnadapt\[(.*)\]", requirement):
            found.update(line.split("==") for line in bounds(own[1].split(",")))
            continue
        name, version = re.match(r"([\w.-]+)(?:\[[^]]*\])?\s*>=\s*([\w.]+)", requirement).groups()
        found[name] = version
    return [f"{name}=={version}" for name, version in sorted(found.items())]


if __name__ == "__main__":
    print("\n".join(bounds(sys.argv[1:])))
