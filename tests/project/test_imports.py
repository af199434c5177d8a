"""Importing tnadapt imports no framework and prints nothing, and every public name is there when it is asked for."""

from __future__ import annotations

import importlib
import subprocess
import sys

import pytest

import tnadapt
from tests.support.depth import in_depth


def run(code: str) -> str:
    return subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout


# Every program runs in a process of its own: (code, what it prints).
PROGRAMS = {
    "importing the package imports four modules of its own, and no NumPy": (
        """
import sys, tnadapt
print(sorted(name for name in sys.modules if name.partition(".")[0] in ("numpy", "tnadapt")))
""",
        "['tnadapt', 'tnadapt.argument_checks', 'tnadapt.convert', 'tnadapt.errors', 'tnadapt.lazy_names']",
    ),
    # numba, where there is one, brings SciPy along.
    "using NumPy imports no framework": (
        """
import sys, numpy as np, tnadapt as tna
sys.modules["numba"] = None
plan = tna.UpdatePlan(tna.presets.superlora(2, projection="nonlinear", ratio=0.5), [(8, 8)])
plan.deltas(plan.init())
print([n for n in ('torch', 'jax', 'cupy', 'tensorly', 'scipy') if n in sys.modules])
""",
        "[]",
    ),
    # Otherwise a thread that uses fwht, and one that imports the package of the maps, wait for each other.
    "a package is imported before its module is locked": (
        """
import importlib, sys, tnadapt
locked = []
class Finder:
    def find_spec(self, name, path=None, target=None):
        if name == "tnadapt.algebra.maps":
            locked.append([one for one in importlib._bootstrap._module_locks if one.startswith(f"{name}.")])
sys.meta_path.insert(0, Finder())
tnadapt.fwht
print(locked)
""",
        "[[]]",
    ),
    "every public name is there however it is asked for": (
        """
import tnadapt
assert set(tnadapt.__all__) <= set(dir(tnadapt))
from tnadapt import *
assert all(getattr(tnadapt, name) is globals()[name] for name in tnadapt.__all__)
from tnadapt.convert import *
try:
    tnadapt.nonsense
except AttributeError as error:
    print(error)
""",
        "module 'tnadapt' has no attribute 'nonsense'",
    ),
    # Importing tnadapt.convert would put the package in place of the function, if its modules were imported later.
    "a function called as a package stays one": (
        """
import importlib, pkgutil, tnadapt
extras = ("torch", "finetune", "cli", "plot", "testing.strategies", "backends._", "__main__",
          "testing._contracts")
for module in pkgutil.walk_packages(tnadapt.__path__, "tnadapt."):
    if not module.name.removeprefix("tnadapt.").startswith(extras):
        importlib.import_module(module.name)
packages = {path.name for path in pkgutil.iter_modules(tnadapt.__path__) if path.ispkg}
print(sorted(packages & set(tnadapt.__all__)))
print([name for name in tnadapt.__all__ if type(getattr(tnadapt, name)) is type(tnadapt)])
print(tnadapt.convert.__module__, importlib.import_module("tnadapt.convert").Conversion.__name__)
""",
        "['convert']\n['maps', 'presets', 'sources']\ntnadapt.convert Conversion",
    ),
}


@pytest.mark.parametrize("name", PROGRAMS)
def test_a_program_prints(name: str) -> None:
    code, printed = PROGRAMS[name]
    assert run(code).strip() == printed


@pytest.mark.law("offline")
def test_no_framework_is_imported() -> None:
    # Nor what only some functions need.
    unwanted = ["torch", "jax", "cupy", "tensorly", "scipy", "matplotlib", "hypothesis", "pytest", "typer", "rich"]
    unwanted += ["safetensors", "transformers", "peft", "sklearn", "numba", "llvmlite", "triton"]
    code = f"import sys, tnadapt, tnadapt.backends; print([name for name in {unwanted} if name in sys.modules])"
    assert run(code).strip() == "[]"


@pytest.mark.parametrize("name", ["maps", "presets", "sources"])
@pytest.mark.parametrize("first", ["tnadapt.{0}", "tnadapt.algebra.{0}", "tnadapt"])
def test_a_short_name_is_the_module_itself(name: str, first: str) -> None:
    code = f"""
import {first.format(name)}
import tnadapt, tnadapt.{name} as short
from tnadapt import {name} as attribute
from tnadapt.algebra import {name} as module
from tnadapt.{name} import __all__ as names
print(short is attribute is module is tnadapt.{name}, names is module.__all__)
"""
    assert run(code).strip() == "True True"


CHAINS = [
    "algebra.geometry.geometry", "algebra.rng.words", "algebra.formats.FORMATS", "backends.register_backend",
    "plugins.load_plugins", "report", "targets.attention_layouts.register_layout", "presets.lora", "maps.MAPS",
    "torch.attach", "plot.layout", "serving.ServedFolder", "testing.configs", "tensors.fold", "decomposition.Step",
    "planning.Plan", "checkpoints",
]  # fmt: skip


@pytest.mark.parametrize(
    "chain", in_depth(CHAINS, ["algebra.formats.FORMATS", "presets.lora", "torch.attach", "report"])
)
def test_modules_are_attributes_without_an_import(chain: str) -> None:
    first = chain.partition(".")[0]
    if first == "torch":
        pytest.importorskip("torch")
    # What needs an extra is not listed.
    listed = first not in ("torch", "plot", "serving", "testing")
    code = f"import tnadapt; names = dir(tnadapt); print(tnadapt.{chain} is not None, {first!r} in names)"
    assert run(code).strip() == f"True {listed}"


@pytest.mark.parametrize("name", ["maps", "presets", "sources"])
def test_a_thread_that_gets_the_file_of_a_short_name_finds_the_names_in_it(name: str) -> None:
    # Another thread has begun to import the file, and has not yet replaced it by the module.
    code = f"""
import importlib.util
from tnadapt.algebra import {name} as module
spec = importlib.util.find_spec("tnadapt.{name}")
file = importlib.util.module_from_spec(spec)
spec.loader.exec_module(file)
print(file is module, all(getattr(file, name) is getattr(module, name) for name in module.__all__))
"""
    assert run(code).strip() == "False True"


@pytest.mark.parametrize("name", sorted(tnadapt._ELSEWHERE))
def test_a_name_of_another_package_gets_its_place(name: str) -> None:
    place = tnadapt._ELSEWHERE[name]
    with pytest.raises(AttributeError, match=f"^module 'tnadapt' has no attribute '{name}': use {place}$"):
        getattr(tnadapt, name)
    if ".torch." in place:
        pytest.importorskip("torch")
    module, _, attribute = place.rpartition(".")
    assert hasattr(importlib.import_module(module), attribute)


@pytest.mark.parametrize(
    "module", ["tnadapt", "tnadapt.convert", "tnadapt.finetune", "tnadapt.serving", "tnadapt.testing"]
)
def test_a_misspelt_name_gets_the_right_one(module: str) -> None:
    if module == "tnadapt.finetune":
        pytest.importorskip("torch")
    package = importlib.import_module(module)
    for name in package.__all__:
        with pytest.raises(AttributeError, match=f"^module '{module}' has no attribute '{name}s'") as caught:
            getattr(package, f"{name}s")
        # Python's "Did you mean" compares the names of the object.
        assert (caught.value.name, caught.value.obj) == (f"{name}s", package)
        assert name in dir(package)


@pytest.mark.parametrize(("package", "extra"), [("torch", "torch"), ("finetune", "demo")])
@pytest.mark.parametrize("code", ["import tnadapt; tnadapt.{}", "import tnadapt.{}"])
def test_what_is_missing_is_said_with_the_extra(code: str, package: str, extra: str) -> None:
    missing = f"""
import sys
sys.modules["torch"] = None  # as if it were not installed
try:
    {code.format(package)}
except ModuleNotFoundError as error:
    print(error)
"""
    message = f'tnadapt.{package} needs PyTorch, which is not installed: pip install "tnadapt[{extra}]"'
    assert run(missing).strip() == message


def test_the_core_works_where_no_framework_can_be_imported() -> None:
    code = """
import sys
for name in ("torch", "jax", "cupy", "numba"):
    sys.modules[name] = None
import tnadapt as tna
from tnadapt.backends import available_backends
assert available_backends() == ["numpy"], available_backends()
try:
    tna.UpdatePlan(tna.Config(), [(4, 4)]).init("torch")
except tna.BackendError as error:
    print(error)
print(tna.verify(tna.presets.lora(1)).holds)
"""
    printed = run(code)
    assert "backend 'torch' needs a library that cannot be imported here" in printed
    assert printed.strip().endswith("True")
