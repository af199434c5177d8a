"""Which files belong to a checkpoint: those in its folder, and those that links lead to without leaving it.

In a Hugging Face cache, files are links: ``REPOSITORY/snapshots/REVISION/config.json`` leads to
``REPOSITORY/blobs/HASH``. That folder of blobs is part of every checkpoint below ``snapshots``.
"""

from __future__ import annotations

import os
import stat

__all__ = ["Belonging"]


class Belonging:
    """What a folder of a checkpoint, and its links, may lead to.

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
        """Where a name in the folder leads, if that is outside of the checkpoint; None if it stays inside."""
        path = os.path.realpath(os.path.join(self.folder, name))
        return None if any(path.startswith(os.path.join(root, "")) for root in self._roots) else path

    def file(self, name: str) -> str | None:
        """The real path of a regular file of the checkpoint; None if it is none, or leads outside."""
        path = os.path.realpath(os.path.join(self.folder, name))
        try:
            regular = stat.S_ISREG(os.lstat(path).st_mode)
        except OSError:  # a dangling link, or one that leads in a circle
            return None
        return path if regular and self.leaves(name) is None else None


def _blobs(folder: str) -> list[str]:
    """The blobs of the Hugging Face cache that a folder is in, if it is in one."""
    while (parent := os.path.dirname(folder)) != folder:
        # snapshots/REVISION: the name before the last of REPOSITORY/snapshots/REVISION.
        if os.path.basename(parent) == "snapshots":
            blobs = os.path.join(os.path.dirname(parent), "blobs")
            if os.path.isdir(blobs) and not os.path.islink(blobs):
                return [blobs]
        folder = parent
    return []
