"""Install a wheel with each extra by itself, in an empty environment, and run what the extra is for.

    python .ci/extras.py WHEEL [EXTRA …]

Run it with a Python that has pip: the environments have the wheel and what it requires, and nothing else.
"""

import argparse
import os
import subprocess
import sys
import tempfile
import time
import venv
from pathlib import Path


def code(program: str) -> list[str]:
    """Return the command that runs a program in Python."""
    return ["python", "-c", program]


def imports(*modules: str) -> list[str]:
    """Return the command that imports modules."""
    return code(f"import {', '.join(modules)}")


# The environments are gone when this ends, and most of what is in them is never imported.
PIP = ["install", "--quiet", "--no-compile", "--disable-pip-version-check"]
DRY_RUN = ["tnadapt", "finetune", "--dry-run"]

# Of each extra: what must work with it alone. "core" is the wheel without extras.
CHECKS: dict[str, list[list[str]]] = {
    "core": [
        ["tnadapt", "--version"],
        ["tnadapt", "--help"],
        code("import tnadapt as tna; report = tna.verify(backends=['numpy']); print(report); assert report.holds"),
    ],
    "torch": [
        code(
            "import torch, tnadapt as tna\n"
            "model = torch.nn.Sequential(torch.nn.Linear(8, 8))\n"
            "adapter = tna.torch.attach(model, 'lora', rank=2, targets='all-linear')\n"
            "adapter.merge(); adapter.unmerge(); assert adapter.num_parameters == 32"
        )
    ],
    "jax": [code("import tnadapt as tna; assert tna.verify(tna.presets.lora(2), backends=['jax']).holds")],
    # Runs with and without a CUDA device: without one the backend is not available, and nothing else changes.
    "cupy": [
        code(
            "import importlib.metadata\n"
            "from tnadapt.backends import available_backends\n"
            "print(importlib.metadata.version('cupy-cuda12x'), available_backends())"
        )
    ],
    "fast": [
        code("from tnadapt.backends import kernels; assert kernels('walsh') is not None"),
        code("import tnadapt as tna; assert tna.verify(tna.presets.fastfood(0.5), backends=['numpy']).holds"),
    ],
    "cli": [["tnadapt", "presets"], ["tnadapt", "verify", "--backend", "numpy"]],
    "peft": [code("from tnadapt.torch import peft; peft.register(); peft.TnadaptConfig(preset='lora')")],
    "plot": [
        code("import tnadapt as tna; tna.plot.network(tna.presets.superlora(2), [(8, 8)] * 2, 'network.svg')"),
    ],
    "demo": [DRY_RUN],
    "hub": [imports("tnadapt.torch", "accelerate", "datasets", "huggingface_hub", "PIL", "timm", "transformers")],
    "paper": [DRY_RUN, imports("diffusers", "gguf", "onnx", "torch_fidelity", "torchvision")],
    "quality": [DRY_RUN, imports("peft")],
    "ray": [[*DRY_RUN, "--engine", "ray"], imports("ray")],
    "slurm": [[*DRY_RUN, "--engine", "slurm"], imports("submitit")],
    "gguf": [imports("gguf", "tnadapt.convert")],
    "dask": [
        code(
            "import dask.array, tnadapt as tna\n"
            "tensor = dask.array.ones((4, 5, 6), chunks=(2, 5, 6))\n"
            "assert tna.tucker(tensor, max_error=1e-6).rank == (1, 1, 1)"
        )
    ],
    "testing": [
        code(
            "from hypothesis import given\n"
            "from tnadapt.testing import BackendContract, shapes\n"
            "given(shapes())(lambda drawn: None)()"
        )
    ],
    "mutation": [["cosmic-ray", "--version"], imports("coverage")],
    "benchmarks": [imports("quimb", "fht_cpu", "reasoning_gym", "trl")],
    "lint": [["ruff", "--version"], ["mypy", "--version"], imports("codespell_lib", "importlinter", "proselint")],
    "docs": [["sphinx-build", "--version"], imports("myst_parser", "numpydoc", "sphinx_gallery", "sphinx_design")],
    "dev": [DRY_RUN, ["ruff", "--version"], imports("hypothesis", "pytest", "pywt", "xdist")],
    "ci": [DRY_RUN, imports("hatchling", "lightning", "lycoris", "onnxruntime", "sphinx")],
    "quantized": [imports("tnadapt.torch", "bitsandbytes", "hqq", "optimum.quanto", "torchao")],
    "all": [DRY_RUN, imports("dask", "gguf", "jax", "numba", "ray", "submitit", "tnadapt.torch.peft")],
}


def failure(wheel: Path, extra: str, folder: Path) -> str:
    """Install the wheel with an extra in a new environment in the folder, run the checks; return what failed."""
    environment, empty = folder / "venv", folder / "empty"
    venv.create(environment, symlinks=os.name != "nt")
    empty.mkdir()
    scripts = environment / ("Scripts" if os.name == "nt" else "bin")
    wanted = f"tnadapt @ {wheel.as_uri()}" if extra == "core" else f"tnadapt[{extra}] @ {wheel.as_uri()}"
    pip = [sys.executable, "-m", "pip", "--python", str(environment)]
    # Outside the checkout, and without its modules: what is imported is what the wheel installed.
    variables = {name: value for name, value in os.environ.items() if name not in ("PYTHONPATH", "PYTHONHOME")}
    variables |= {"PATH": f"{scripts}{os.pathsep}{os.environ['PATH']}", "HF_HUB_OFFLINE": "1", "MPLBACKEND": "agg"}
    installed = code(f"import tnadapt; assert tnadapt.__file__.startswith({str(environment)!r}), tnadapt.__file__")
    for command in ([*pip, *PIP, wanted], [*pip, "check"], installed, *CHECKS[extra]):
        program = command[0] if os.path.isabs(command[0]) else str(scripts / command[0])
        done = subprocess.run(
            [program, *command[1:]],
            cwd=empty, env=variables, text=True, encoding="utf-8", errors="replace", check=False,
            stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=subprocess.STDOUT,
        )  # fmt: skip
        if done.returncode:
            return f"{' '.join(command)}\nended with {done.returncode}:\n{done.stdout[-4000:]}"
    return ""


def main() -> int:
    """Check the extras that are named, or all of them, and print how each went."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("wheel", type=Path, help="a wheel of tnadapt")
    parser.add_argument("extras", nargs="*", metavar="EXTRA", help=f"of {', '.join(CHECKS)}; all by default")
    given = parser.parse_args()
    if unknown := sorted(set(given.extras) - set(CHECKS)):
        parser.error(f"no extra is called {', '.join(unknown)}; the extras are {', '.join(CHECKS)}")
    failed = []
    for extra in given.extras or CHECKS:
        start = time.monotonic()
        with tempfile.TemporaryDirectory(ignore_cleanup_errors=True) as folder:
            problem = failure(given.wheel.resolve(), extra, Path(folder).resolve())
        print(f"{extra:<12}{'FAILED' if problem else 'works':<8}{time.monotonic() - start:5.0f} s", flush=True)
        if problem:
            failed.append(extra)
            print(problem, flush=True)
    if failed:
        print(f"do not work: {', '.join(failed)}")
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
