"""The Triton kernels compiled to machine code without a device: compiler errors, and the resources of the code.

test_triton.py checks on a device that the machine code computes the right bits.
"""

from __future__ import annotations

import os
import re
import subprocess
from pathlib import Path
from typing import Any

import pytest

triton = pytest.importorskip("triton", minversion="3.5")

from ..internals import launch_plans as passes
from .internals import triton_kernels, triton_launcher

compiler = pytest.importorskip("triton.compiler")
GPUTarget = pytest.importorskip("triton.backends.compiler").GPUTarget

pytestmark = pytest.mark.skipif(os.environ.get("TRITON_INTERPRET") == "1", reason="the interpreter does not compile")

BITS = 24
warps = triton_launcher.warps
TILE = triton_launcher.TritonLauncher.tile_bytes
SHORT, ROWS, COLUMNS = passes.passes(12, 4, TILE)[0], *passes.passes(BITS - 4, 4, TILE)
# What the smallest multiprocessor that Triton compiles for has. (Triton before 3.7 takes two tiles, others one.)
SHARED = 64 << 10


def compiled(kernel: Any, capability: int, warps: int, dtype: str = "fp32", **constants: Any) -> Any:
    signature, constexprs, attrs = {}, {}, {}
    for index, parameter in enumerate(kernel.params):
        if parameter.is_constexpr:
            signature[parameter.name] = "constexpr"
            constexprs[parameter.name] = constants[parameter.name]
        elif parameter.name in ("x", "out"):
            signature[parameter.name] = f"*{dtype}"
            attrs[(index,)] = [["tt.divisibility", 16]]
        elif parameter.name == "gain":
            signature[parameter.name] = "*fp32"
        else:
            signature[parameter.name] = parameter.annotation_type
            if parameter.name in ("n_in", "n_out"):
                attrs[(index,)] = [["tt.divisibility", 16]]
    source = compiler.ASTSource(fn=kernel, signature=signature, constexprs=constexprs, attrs=attrs)
    options = {"num_warps": warps, "enable_fp_fusion": False}
    return triton.compile(source, target=GPUTarget("cuda", capability, 32), options=options)


def shape(step: passes.Pass) -> dict[str, int]:
    return {"STRIDE": step.stride, "BITS": step.bits, "ROWS": step.rows, "COLUMNS": step.columns}


@pytest.fixture(autouse=True)
def _own_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TRITON_CACHE_DIR", str(tmp_path))


def check(made: Any, tmp_path: Path) -> None:
    assert made.asm["cubin"]
    assert made.metadata.shared <= SHARED
    # Some of what normal numbers need, perhaps (272 by Triton 3.7), but nothing like all of a tile's at once.
    assert stack(made, tmp_path) <= 288


def stack(made: Any, tmp_path: Path) -> int:
    """Return the bytes that a thread spills from its registers."""
    tool = Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / "cuobjdump"
    if not tool.exists():
        pytest.skip("this Triton comes without cuobjdump")
    (tmp_path / "kernel.cubin").write_bytes(made.asm["cubin"])
    command = [str(tool), "--dump-resource-usage", str(tmp_path / "kernel.cubin")]
    said = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    return max(map(int, re.findall(r"STACK:(\d+)", said)))


@pytest.mark.parametrize("capability", [80, 90])
@pytest.mark.parametrize(
    ("step", "dtype"),
    [*((step, "fp32") for step in (SHORT, ROWS, COLUMNS)), *((step, "fp64") for step in passes.passes(BITS, 8, TILE))],
    ids=str,
)
def test_fwht(step: passes.Pass, dtype: str, capability: int, tmp_path: Path) -> None:
    kernel = triton_kernels.hadamard_pass
    check(compiled(kernel, capability, warps(step), dtype, LENGTH=1 << BITS, **shape(step)), tmp_path)


def test_gathering_and_shuffling(tmp_path: Path) -> None:
    sums = {"LENGTH": 1 << 24, "LOG_LENGTH": 24, "PERIOD": 1 << 18, "ROWS": 8, "COLUMNS": 128, "KEPT": False}
    for dtype in ("fp32", "fp64"):
        check(compiled(triton_kernels.gathered_sum, 80, 4, dtype, **sums), tmp_path)
    check(compiled(triton_kernels.shuffle, 80, 4, BITS=24, INVERSE=False, TILE=256), tmp_path)


PASSES = {
    "gathers": (ROWS, "permuted", "plain", True),
    "gathers back": (ROWS, "unpermuted", "plain", True),
    "begins with signs": (ROWS, "diagonal", "plain", True),
    "begins with normals": (ROWS, "diagonal", "plain", False),
    "ends with signs": (COLUMNS, "plain", "diagonal", True),
    "ends with normals": (COLUMNS, "plain", "diagonal", False),
    "is all": (SHORT, "permuted", "diagonal", False),
}


@pytest.mark.parametrize("kept", [False, True])
@pytest.mark.parametrize("name", PASSES)
def test_fastfood(name: str, kept: bool, tmp_path: Path) -> None:
    step, load, store, signs = PASSES[name]
    bits = 12 if step is SHORT else BITS
    made = compiled(
        triton_kernels.drawn_pass, 90 if name == "gathers" else 80, warps(step), LENGTH=1 << bits, LOG_LENGTH=bits,
        PERIOD=1 << bits if load == "unpermuted" else 1 << 10, LOAD=load, STORE=store, SIGNS=signs, KEPT=kept,
        **shape(step),
    )  # fmt: skip
    check(made, tmp_path)


class NoDevice:
    """The parts of a driver that compiling needs."""

    def get_current_device(self) -> int:
        return 99  # of which nothing is kept for a device that is there

    def get_current_stream(self, device: int) -> int:
        return 0

    def get_current_target(self) -> Any:
        return GPUTarget("cuda", 80, 32)


@pytest.mark.parametrize(("n_in", "n_out", "signs"), [(1, 1, True), (100, 1000, True), (300, 30000, False)])
def test_what_is_launched_compiles(n_in: int, n_out: int, signs: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """Run the launcher's calls except for the launch itself: arguments, their types, and compilation."""
    torch = pytest.importorskip("torch")
    made = []
    run = triton.JITFunction.run

    def prepare(self: Any, *args: Any, warmup: bool, **options: Any) -> Any:
        made.append(run(self, *args, warmup=True, **options))
        return made[-1]

    monkeypatch.setattr(triton.JITFunction, "run", prepare)
    monkeypatch.setattr(triton.runtime.driver, "_active", NoDevice())
    length = 1 << (max(n_in, n_out) - 1).bit_length()
    f = passes.Drawn(n_in, n_out, length, 1 << (n_in - 1).bit_length(), 2**64 - 1, 2**32 - 1, signs)
    assert triton_launcher.fastfood(torch.zeros(2, n_in), f).shape == (2, n_out)
    assert triton_launcher.fastfood_adjoint(torch.zeros(2, n_out), f).shape == (2, n_in)
    assert triton_launcher.fwht(torch.zeros(2, length, dtype=torch.float64), length, 0.1, length).shape == (2, length)
    assert triton_launcher.shuffle(torch.zeros(2, n_out), f.seed, f.group).shape == (2, n_out)
    assert len(made) >= 6
    assert all(kernel.asm["cubin"] for kernel in made)
    # Fused multiplications and additions would change last bits of the draws.
    assert not any(kernel.metadata.enable_fp_fusion for kernel in made)
