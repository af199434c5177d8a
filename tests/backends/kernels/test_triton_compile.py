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

torch = pytest.importorskip("torch")
triton = pytest.importorskip("triton", minversion="3.5")

from ..internals import launch_plans
from .internals import triton_launcher

GPUTarget = pytest.importorskip("triton.backends.compiler").GPUTarget

pytestmark = pytest.mark.skipif(os.environ.get("TRITON_INTERPRET") == "1", reason="the interpreter does not compile")

# What the smallest multiprocessor that Triton compiles for has. (Triton before 3.7 takes two tiles, others one.)
SHARED = 64 << 10


class NoDevice:
    """The parts of a driver that compiling needs."""

    def __init__(self, capability: int) -> None:
        self.capability = capability

    def get_current_device(self) -> int:
        return self.capability  # of which nothing is kept for a device that is there

    def get_current_stream(self, device: int) -> int:
        return 0

    def get_current_target(self) -> Any:
        return GPUTarget("cuda", self.capability, 32)


def stack(cubin: bytes, path: Path) -> int:
    """Return the bytes that a thread spills from its registers."""
    tool = Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / "cuobjdump"
    if not tool.exists():
        pytest.skip("this Triton comes without cuobjdump")
    path.write_bytes(cubin)
    command = [str(tool), "--dump-resource-usage", str(path)]
    said = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    return max(map(int, re.findall(r"STACK:(\d+)", said)))


# One pass, a padded and a gathered vector, and passes over rows and columns with a short period and a long one.
SIZES = [(1, 1), (100, 1000), (300, 30000), (1 << 10, 1 << 24), (1 << 24, 1 << 24)]


@pytest.mark.parametrize(("signs", "kept"), [(True, False), (False, False), (True, True)])
@pytest.mark.parametrize(("capability", "n_in", "n_out"), [*((80, *size) for size in SIZES), (90, 1 << 10, 1 << 24)])
def test_what_is_launched_compiles(
    capability: int, n_in: int, n_out: int, signs: bool, kept: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Run the launcher's calls except for the launch itself: arguments, their types, and compilation."""
    made = []
    run = triton.JITFunction.run

    def prepare(self: Any, *args: Any, warmup: bool, **options: Any) -> Any:
        made.append(run(self, *args, warmup=True, **options))
        return made[-1]

    monkeypatch.setenv("TRITON_CACHE_DIR", str(tmp_path))
    monkeypatch.setattr(triton.JITFunction, "run", prepare)
    monkeypatch.setattr(triton.runtime.driver, "_active", NoDevice(capability))
    length, period = (1 << (n - 1).bit_length() for n in (max(n_in, n_out), n_in))
    gain = torch.empty(length) if kept else None
    f = launch_plans.Drawn(n_in, n_out, length, period, 2**64 - 1, 2**32 - 1, signs, gain)
    assert triton_launcher.fastfood(torch.empty(2, n_in), f).shape == (2, n_out)
    assert triton_launcher.fastfood_adjoint(torch.empty(2, n_out), f).shape == (2, n_in)
    for dtype in (torch.float32, torch.float64):
        assert triton_launcher.fwht(torch.empty(2, length, dtype=dtype), length, 0.1, length).shape == (2, length)
    assert triton_launcher.shuffle(torch.empty(2, n_out), f.seed, f.group).shape == (2, n_out)
    assert len(made) >= 6
    for number, kernel in enumerate(made):
        assert kernel.metadata.shared <= SHARED
        # Fused multiplications and additions would change last bits of the draws.
        assert not kernel.metadata.enable_fp_fusion
        # Some of what normal numbers need, perhaps (272 by Triton 3.7), but nothing like all of a tile's at once.
        assert stack(kernel.asm["cubin"], tmp_path / f"{number}.cubin") <= 288
