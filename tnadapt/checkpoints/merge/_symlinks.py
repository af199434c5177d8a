"""Decide which files belong to a checkpoint: those in its folder, and the targets of links that do not leave it.

In a Hugging Face cache, files are links: ``REPOSITORY/snapshots/REVISION/config.json`` points to
``REPOSITORY/blobs/HASH``. The folder of blobs therefore counts as part of every checkpoint below ``snapshots``.
"""

from __future__ import annotations

import os
import stat

__all__ = ["Belonging"]


class Belonging:
    """The files that belong to the checkpoint in a folder.

    Parameters
    ----------
    folder : str

    Examples
    --------
    >>> from pathlib import Path
    >>> Path("model").mkdir(exist_ok=True)
    >>> _ = Path("model/config.json").write_text("{}")
    >>> os.symlink(os.path.abspath("/etc/passwd"), "model/notes.txt")
    >>> own = Belonging("model")
    >>> own.file("config.json") == os.path.realpath("model/config.json"), own.file("notes.txt")
    (True, None)
    """

    def __init__(self, folder: str) -> None:
        self.folder = os.path.realpath(folder)
        self._roots = [self.folder, *_blobs(self.folder)]

    def leaves(self, name: str) -> str | None:
        """Return the target of a name in the folder if it is outside of the checkpoint; None if it is inside."""
        path = os.path.realpath(os.path.join(self.folder, name))
        return None if any(path.startswith(os.path.join(root, "")) for root in self._roots) else path

    def file(self, name: str) -> str | None:
        """Return the real path of a regular file of the checkpoint; None if it is not one, or lies outside."""
        path = os.path.realpath(os.path.join(self.folder, name))
        try:
            regular = stat.S_ISREG(os.lstat(path).st_mode)
        except OSError:  # a dangling or circular link
            return None
        return path if regular and self.leaves(name) is None else None


def _blobs(folder: str) -> list[str]:
    """Return the folder of blobs if a folder lies in a Hugging Face cache."""
    while (parent := os.path.dirname(folder)) != folder:
        # In REPOSITORY/snapshots/REVISION, the parent of REVISION is named snapshots.
        if os.path.basename(parent) == "snapshots":
            blobs = os.path.join(os.path.dirname(parent), "blobs")
            if os.path.isdir(blobs) and not os.path.islink(blobs):
                return [blobs]
        folder = parent
    return []
