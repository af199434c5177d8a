"""Move a finished file or folder to its final path: in one step if the system can, and always reversibly.

If the system can exchange names (:mod:`tnadapt.checkpoints.renaming`), readers find either the previous or the new
content at any time, and the previous content ends up at the path where the new one was built. Otherwise a folder takes
two renames, between which its name is missing. The previous content is set aside until the new one is in place.
"""

from __future__ import annotations

import os
from collections.abc import Callable

from tnadapt.errors import FileError

from ..atomic_files import sync_folder
from ..renaming import exchange, rename_new
from ._comparison import same_content

__all__ = ["LeftoverError", "Refusal", "place", "put_back"]

#: Given a path, returns why its content must not be replaced, or None if it may be or the path is free.
Refusal = Callable[[str], str | None]

_ATTEMPTS = 100


class LeftoverError(FileError):
    """An earlier run moved content away, and something else now has its path."""


def place(made: str, out: str, aside: str, refusal: Refusal | None, compare: bool = False) -> None:
    """Rename new content to its final path.

    Parameters
    ----------
    made, out : str
        The new content and its final path, on one file system. Previous content of ``out`` is afterwards at ``made``,
        at ``aside``, or deleted.
    aside : str
        A free name for the previous folder, used only if two renames are needed.
    refusal : callable, optional
        Decides what may be replaced; if None, nothing may. It is called before the rename, and again on what was
        actually replaced, as that may have been created in between. If it then refuses, the rename is undone.
    compare : bool
        Whether existing content that must not be replaced, but equals the new one, counts as success.

    Raises
    ------
    FileError
        If the path exists and must not be replaced. Nothing has changed then.
    OSError
        If the file system fails.
    """
    for _ in range(_ATTEMPTS):
        try:
            return rename_new(made, out)
        except FileExistsError:
            pass
        if refusal is None:
            if compare and same_content(made, out):
                return None
            raise FileError(
                "is not the output of an earlier run, which was killed during publishing: remove it, or "
                "run again with overwrite=True (--overwrite)"
                if compare
                else "was created during the merge: remove it, or run again with overwrite=True (--overwrite)"
            )
        _check(refusal, out)
        try:
            return _replace(made, out, aside, refusal)
        except FileNotFoundError:
            if not os.path.lexists(made):
                raise
            # The previous content has disappeared, so the name is free: try again.
    raise FileError("is created and removed by something else again and again: choose another name")


def _check(refusal: Refusal, path: str) -> None:
    if (why := refusal(path)) is not None:
        raise FileError(why)


def _replace(made: str, out: str, aside: str, refusal: Refusal) -> None:
    if exchange(made, out):
        if (why := refusal(made)) is not None:
            try:
                exchange(made, out)
            except FileNotFoundError:
                rename_new(made, out)
            raise FileError(why)
        return
    if not os.path.isdir(made):
        os.replace(made, out)
        return
    # A folder cannot be renamed onto one with files in it.
    try:
        os.rename(out, aside)
        _check(refusal, aside)
        rename_new(made, out)
    except BaseException:
        if os.path.lexists(aside) and os.path.lexists(made):
            put_back(aside, out)
        raise


def put_back(aside: str, out: str) -> None:
    """Undo the first of two renames.

    Raises
    ------
    LeftoverError
        If something else has taken the path ``out``.
    """
    try:
        rename_new(aside, out)
    except FileExistsError:
        raise LeftoverError(
            f"has been created while its previous content, now in {aside}, was being replaced: move one of them away, "
            "and run again"
        ) from None
    sync_folder(os.path.dirname(out))
