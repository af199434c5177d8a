"""A run of everything is parallel; examples of a library that is not installed are skipped."""

from __future__ import annotations

import importlib.util
import os
import re
from collections.abc import Iterator

import pytest

from tnadapt.plugins import forget_registered
from tnadapt.targets.attention_layouts import forget_layouts

# Short names of modules of tnadapt.algebra, where their examples run.
collect_ignore = ["tnadapt/maps.py", "tnadapt/presets.py", "tnadapt/sources.py"]
if not importlib.util.find_spec("torch"):
    # Two packages that cannot be imported without torch, though some of their modules could be alone.
    collect_ignore += ["tnadapt/torch", "tnadapt/finetune"]


@pytest.hookimpl(tryfirst=True)  # before pytest-xdist reads its option
def pytest_cmdline_main(config: pytest.Config) -> None:
    """Start a process for each processor if no paths are given, nor ``-n``, and pytest-xdist is installed."""
    everything = config.args_source is not pytest.Config.ArgsSource.ARGS
    if everything and config.getoption("numprocesses", 0) is None and not hasattr(config, "workerinput"):
        config.option.numprocesses = "logical"
        if config.option.dist == "no":
            # Most tests of a file run in one process, where their fixtures and compiled kernels are made once.
            config.option.dist = "worksteal"
        # Threads of a BLAS or a compiler in each of the processes would slow all of them down.
        os.environ.setdefault("OMP_NUM_THREADS", "1")


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    for item in items:
        if not isinstance(item, pytest.DoctestItem):
            continue
        source = "".join(example.source for example in item.dtest.examples)
        lines = re.findall(r"^(?:import (.+)|from (\w+))", source, flags=re.MULTILINE)
        names = [name.split()[0].partition(".")[0] for several, one in lines for name in (several or one).split(",")]
        missing = next((name for name in names if importlib.util.find_spec(name) is None), None)
        if missing is not None:
            item.add_marker(pytest.mark.skip(reason=f"its example imports {missing}, which is not installed"))


@pytest.fixture(autouse=True)
def _own_folder(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """An example that writes a file writes it somewhere else than here, and what it registers is forgotten."""
    example = isinstance(request.node, pytest.DoctestItem)
    if example:
        monkeypatch.chdir(request.getfixturevalue("tmp_path"))
    yield
    if example:
        forget_registered()
        forget_layouts()
