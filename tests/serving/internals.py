"""The private module of tnadapt.serving in which tests count and fail calls."""

from __future__ import annotations

from tnadapt.serving import _served_folder as served_folder

__all__ = ["served_folder"]
