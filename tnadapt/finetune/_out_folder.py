"""The folder of a study: whether it can be used, as far as that can be seen before anything is written."""

from __future__ import annotations

from pathlib import Path

from tnadapt.argument_checks import checks_arguments
from tnadapt.checkpoints.container import path_of
from tnadapt.errors import FileError, safe_repr

__all__ = ["check_out"]


@checks_arguments
def check_out(out: Path) -> None:
    """Raise an error if the output of a study cannot be written to a folder.

    Parameters
    ----------
    out : Path
        It need not exist.

    Raises
    ------
    FileError

    Examples
    --------
    >>> check_out(Path("runs/digits"))
    """
    out = Path(path_of(out))
    files = (out / "pareto.png", out / "best.safetensors")
    for path, folder in ((out, True), (out / "adapters", True), *((file, False) for file in files)):
        try:
            wrong = path.exists() and path.is_dir() != folder
        except OSError as error:  # a name that is too long
            raise FileError(f"cannot use {safe_repr(str(path))}: {error.strerror}") from None
        if wrong:
            kinds = ("a file", "a folder") if folder else ("a folder", "a file")
            raise FileError(f"{path} is {kinds[0]} and should be {kinds[1]}; give another folder with --out")
