"""The folders of what trainings report to TensorBoard, which holds a curve for each."""

from __future__ import annotations

import contextlib
from pathlib import Path
from typing import Any

__all__ = ["clear_logs", "log_folder", "log_to"]

# How TensorBoard's writers name their files; a reader joins all of those in one folder.
_EVENTS = "events.out.tfevents.*"


def log_folder(adapters: Path, file_name: str) -> Path:
    """Return the folder of a training's reports, next to that of the adapters.

    Examples
    --------
    >>> log_folder(Path("runs/reviews/adapters"), "lora-1.safetensors").as_posix()
    'runs/reviews/logs/lora-1'
    """
    return adapters.parent / "logs" / file_name.removesuffix(".safetensors")


def clear_logs(folder: Path) -> None:
    """Delete what an earlier training reported to a folder; files of others stay, and so do those that are in use."""
    for path in folder.rglob(_EVENTS):
        with contextlib.suppress(OSError):
            path.unlink()
    below = sorted((path for path in folder.rglob("*") if path.is_dir()), reverse=True)
    for path in (*below, folder):
        with contextlib.suppress(OSError):
            path.rmdir()  # fails unless it is empty


def log_to(callbacks: Any, folder: Path) -> None:
    """Let the callback for TensorBoard write to a folder itself, unless the user's environment names another.

    By default the Trainer writes to a folder below it that has the time and this machine's name.
    """
    for callback in callbacks:
        if getattr(callback, "logging_dir", "") is None:
            callback.logging_dir = str(folder)
