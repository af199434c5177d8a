"""Describe the machine of a benchmark: processor, cores, memory, system, and relevant versions."""

from __future__ import annotations

import contextlib
import importlib.metadata
import os
import platform
import re
import subprocess
from datetime import UTC, datetime
from pathlib import Path

PACKAGES = (
    "numpy", "numba", "torch", "triton", "jax", "cupy-cuda12x", "transformers", "peft", "lycoris-lora", "fht-cpu",
    "scipy", "tensorly", "opt-einsum", "quimb", "teneva",
)  # fmt: skip


def machine() -> dict[str, str]:
    """Return a mapping of name to text; unknown entries are omitted."""
    found = {
        "processor": _processor(),
        "cores": str(len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()),
        "caches": _caches(),
        "memory": f"{_memory() / 2**30:.0f} GiB" if _memory() else "",
        "card": _card(),
        "system": f"{platform.system()} {platform.release().split('-')[0]}",
        "Python": platform.python_version(),
        "BLAS": _blas(),
        "date": datetime.now(UTC).date().isoformat(),
    }
    return {name: text for name, text in found.items() if text} | installed(*PACKAGES)


def installed(*names: str) -> dict[str, str]:
    """Return the versions of packages; those that are not installed are left out."""
    found = {}
    for name in names:
        with contextlib.suppress(importlib.metadata.PackageNotFoundError):
            found[name] = importlib.metadata.version(name)
    return found


def _processor() -> str:
    try:
        text = Path("/proc/cpuinfo").read_text()
    except OSError:
        text = ""
    name = re.search(r"^model name\s*:\s*(.*)$", text, flags=re.MULTILINE)
    vectors = "AVX-512" if "avx512f" in text else "AVX2" if "avx2" in text else platform.machine()
    return f"{name[1] if name else platform.processor() or platform.machine()} ({vectors})"


def _caches() -> str:
    sizes = []
    for folder in sorted(Path("/sys/devices/system/cpu/cpu0/cache").glob("index*")):
        level, kind, size = ((folder / name).read_text().strip() for name in ("level", "type", "size"))
        if kind != "Instruction":
            sizes.append(f"L{level} {size}")
    return ", ".join(sizes)


def _memory() -> int:
    try:
        return os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    except (AttributeError, ValueError, OSError):
        return 0


def _card() -> str:
    """Return the GPU's name, if the driver's command reports one."""
    try:
        told = subprocess.run(
            ["nvidia-smi", "--query-gpu=name", "--format=csv,noheader"], capture_output=True, text=True, check=True
        )
    except (OSError, subprocess.CalledProcessError):
        return ""
    return ", ".join(sorted(set(told.stdout.strip().splitlines())))


def _blas() -> str:
    try:
        import threadpoolctl
    except ImportError:
        return ""
    import numpy  # noqa: F401

    pools = [pool for pool in threadpoolctl.threadpool_info() if pool["user_api"] == "blas"]
    return "; ".join(
        f"{pool['internal_api']} {pool['version']} {pool.get('architecture', '')}".strip() for pool in pools
    )
