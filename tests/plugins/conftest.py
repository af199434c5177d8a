"""Three plug-ins, each installed from its own package into a folder of its own, and gone again afterwards."""

from __future__ import annotations

import importlib
import importlib.util
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from tnadapt.plugins import forget_registered

HERE = Path(__file__).parent
PACKAGES = ("tensor-ring", "count-sketch", "block-term")


def command(plugins: Path | None, *words: object) -> subprocess.CompletedProcess[str]:
    """Run a command in a process that sees the plug-ins of a folder."""
    code = f"""
import runpy, sys
sys.path[:0] = {[str(plugins)] if plugins else []!r}
sys.argv = {["tnadapt", *map(str, words)]!r}
runpy.run_module("tnadapt", run_name="__main__")
"""
    return subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)


@pytest.fixture(scope="session")
def installed_plugins(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder into which pip has installed all of them."""
    if importlib.util.find_spec("hatchling") is None:
        pytest.skip("hatchling, which builds the plug-ins, is not installed")
    folder = tmp_path_factory.mktemp("plugins")
    sources = [str(HERE / package) for package in PACKAGES]
    command = [sys.executable, "-m", "pip", "install", "--quiet", "--no-deps", "--no-build-isolation", "--target"]
    subprocess.run([*command, str(folder), *sources], check=True, capture_output=True)
    return folder


@pytest.fixture
def plugins(installed_plugins: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """All are installed, as far as this process can see; nothing is imported or registered."""
    monkeypatch.syspath_prepend(str(installed_plugins))
    importlib.invalidate_caches()
    forget_registered()
    yield installed_plugins
    forget_registered()
    for package in PACKAGES:
        sys.modules.pop(f"tnadapt_{package.replace('-', '_')}", None)
