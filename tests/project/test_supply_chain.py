"""What SECURITY.md promises: nothing read is run; and requirements that can be installed.

That no connection is opened is held by ``test_optimized``.
"""

from __future__ import annotations

import ast
import functools
import re
import sys
import tomllib
from collections.abc import Iterator
from pathlib import Path
from types import UnionType

import pytest

ROOT = Path(__file__).parents[2]
MODULES = sorted(path for package in ("tnadapt", "paper") for path in (ROOT / package).rglob("*.py"))
# Whose reading runs what is read.
RUNNING = {
    "pickle", "cPickle", "_pickle", "marshal", "shelve", "dill", "cloudpickle", "joblib", "yaml", "code", "runpy",
}  # fmt: skip
# The modules that start other programs: one fetches with pip and npm, when asked to, and one asks Slurm about jobs and
# cancels them, with its own commands.
STARTING = {"paper/registries.py", "tnadapt/finetune/engines/_slurm.py"}


def nodes(kind: type[ast.AST] | UnionType) -> Iterator[tuple[str, ast.AST]]:
    for path in MODULES:
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(node, kind):
                yield path.relative_to(ROOT).as_posix(), node


@functools.cache
def imported() -> list[tuple[str, str]]:
    found = list[tuple[str, str]]()
    for place, node in nodes(ast.Import | ast.ImportFrom):
        if isinstance(node, ast.Import):
            found += ((place, alias.name) for alias in node.names)
        elif not node.level:
            found.append((place, node.module))
    return [(place, module.split(".")[0]) for place, module in found]


@pytest.mark.law("nothing-run")
def test_nothing_that_runs_what_it_reads_is_imported() -> None:
    found = imported()
    assert ("tnadapt/checkpoints/container.py", "json") in found
    assert [one for one in found if one[1] in RUNNING] == []
    assert {place for place, name in found if name == "subprocess"} == STARTING
    assert [one for one in found if one[1] in ("socket", "urllib", "http", "requests", "httpx", "ftplib")] == []


@pytest.mark.law("nothing-run")
def test_nothing_is_evaluated_and_archives_are_read_without_pickles() -> None:
    loads = 0
    for place, call in nodes(ast.Call):
        name = ast.unparse(call.func)
        assert name not in ("eval", "exec", "compile", "__import__"), f"{place} calls {name}"
        keywords = {word.arg: ast.unparse(word.value) for word in call.keywords}
        # Left out, transformers may ask the user.
        assert keywords.get("trust_remote_code", "False") == "False", place
        assert keywords.get("shell") != "True", place
        if name in ("np.load", "numpy.load", "np.lib.format.read_array", "np.lib.format.write_array"):
            assert keywords.get("allow_pickle") == "False", place
            loads += 1
        if name == "torch.load":
            assert keywords.get("weights_only") == "True", place
            loads += 1
    assert loads >= 2


PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
EXTRAS = [one for some in PROJECT["optional-dependencies"].values() for one in some if not one.startswith("tnadapt[")]
REQUIREMENTS = [*PROJECT["dependencies"], *EXTRAS]


def test_every_import_is_declared() -> None:
    def names(requirements: list[str]) -> set[str]:
        return {re.split(r"[>\[]", one)[0].replace("-", "_") for one in requirements}

    required = {"scipy", "numpy", "tensorly", "array_api_compat", "safetensors"}
    optional = {
        "torch", "jax", "typer", "hypothesis", "pytest", "peft", "matplotlib", "transformers", "timm", "datasets",
        "huggingface_hub", "threadpoolctl", "dask", "gguf", "numba", "onnx", "diffusers", "torch_fidelity", "ray",
        "submitit",
    }  # fmt: skip
    assert required | {"packaging"} == names(PROJECT["dependencies"])
    assert required <= {name for _, name in imported()}
    assert optional | {"cupy_cuda12x", "scikit_learn", "pillow"} <= names(EXTRAS)
    known = required | optional | {"cupy", "sklearn", "PIL", "tnadapt", "paper"}
    known |= {"triton"}  # comes with torch, where torch is for CUDA
    known |= {"vllm"}  # which imports its plug-in, and is installed by whoever serves with it
    known |= {"llvmlite"}  # numba's own compiler, of the version that numba asks for
    assert [one for one in imported() if one[1] not in known | sys.stdlib_module_names] == []


@pytest.mark.parametrize("requirement", sorted(set(REQUIREMENTS)))
def test_every_dependency_has_a_lower_bound_and_no_upper_one(requirement: str) -> None:
    assert re.fullmatch(r"[\w.-]+>=[\d.]+(; .*)?", requirement), requirement
