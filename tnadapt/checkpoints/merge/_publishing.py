"""Putting a finished file or folder in its final place: in one step where the system can, and always undoable.

Where names can be exchanged (:mod:`tnadapt.checkpoints.renaming`), readers find the previous content or the new one at
any time, and the previous content is then where the new one was made. Elsewhere a folder takes two renames, between
which its name is missing, and the previous content is in a place of its own until the new one is there.
"""

from __future__ import annotations

import os
from collections.abc import Callable

from tnadapt.errors import FileError

from ..atomic_files import sync_folder
from ..renaming import exchange, rename_new
from ._comparison import same_content

__all__ = ["LeftoverError", "Refusal", "place", "put_back"]

#: Given a path, says why what is there must not be replaced, or None if it may be, or nothing is there.
Refusal = Callable[[str], str | None]

_ATTEMPTS = 100


class LeftoverError(FileError):
    """What an earlier run moved away is in its folder, and where it was there is something else."""


def place(made: str, out: str, aside: str, refusal: Refusal | None, compare: bool = False) -> None:
    """Rename what was made to its final place.

    Parameters
    ----------
    made, out : str
        On one file system. If something was at ``out``, it is then at ``made``, at ``aside``, or gone.
    aside : str
        A free name for the previous folder, where two renames are needed. It is there afterwards in that case alone.
    refusal : callable, optional
        What may be replaced. It is asked before, and again about what was in fact replaced, which goes back if the
        answer is different: somebody may have put it there in between. If None, nothing may be.
    compare : bool
        Whether it is success, too, if nothing may be replaced, and what is there has the same content.

    Raises
    ------
    FileError
        If something is there that may not be replaced. Nothing has changed then.
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
                "is not what an earlier run, which was killed as it finished, would have put there: remove it, or "
                "run again with overwrite=True (--overwrite)"
                if compare
                else "came to be while it was made: remove it, or run again with overwrite=True (--overwrite)"
            )
        _check(refusal, out)
        try:
            return _replace(made, out, aside, refusal)
        except FileNotFoundError:
            if not os.path.lexists(made):
                raise
            # What was to be replaced is gone: the name is free.
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
        If something else is at ``out`` by now.
    """
    try:
        rename_new(aside, out)
    except FileExistsError:
        raise LeftoverError(
            f"has been created while its previous content, now in {aside}, was being replaced: move one of them away, "
            "and run again"
        ) from None
    sync_folder(os.path.dirname(out))
