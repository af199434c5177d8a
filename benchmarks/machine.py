"""Describe the machine of a benchmark: processor, cores, memory, system, and relevant versions."""

from __future__ import annotations

import importlib.metadata
import os
import platform
import re
import subprocess
from datetime import UTC, datetime
from pathlib import Path

__all__ = ["machine"]

PACKAGES = (
    "numpy", "numba", "torch", "triton", "jax", "cupy-cuda12x", "transformers", "peft", "lycoris-lora", "fht-cpu",
    "scipy", "tensorly", "opt-einsum", "quimb",
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
    for name in PACKAGES:
        try:
            found[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            continue
    return {name: text for name, text in found.items() if text}


def _processor() -> str:
    try:
        names = re.findall(r"^model name\s*:\s*(.*)$", Path("/proc/cpuinfo").read_text(), flags=re.MULTILINE)
    except OSError:
        names = []
    name = names[0] if names else platform.processor() or platform.machine()
    return f"{name} ({'AVX-512' if 'avx512f' in _flags() else 'AVX2' if 'avx2' in _flags() else platform.machine()})"


def _flags() -> str:
    try:
        return Path("/proc/cpuinfo").read_text()
    except OSError:
        return ""


def _caches() -> str:
    sizes = []
    for index in range(5):
        folder = Path(f"/sys/devices/system/cpu/cpu0/cache/index{index}")
        try:
            kind, size = (folder / "type").read_text().strip(), (folder / "size").read_text().strip()
            level = (folder / "level").read_text().strip()
        except OSError:
            continue
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
