"""What the data of a study may be, as far as their name and the file system say."""

from __future__ import annotations

import os
from pathlib import Path

from tnadapt.argument_checks import checks_arguments
from tnadapt.checkpoints.container import path_of
from tnadapt.errors import FileError

from ._sample_tables import TABLES

__all__ = ["IMAGES", "is_file_of_data", "require_data"]

#: The suffixes of images.
IMAGES = frozenset({".png", ".jpg", ".jpeg", ".bmp", ".gif", ".ppm", ".pgm", ".tif", ".tiff", ".webp"})

#: The suffix of arrays.
NPZ = ".npz"


def is_file_of_data(path: Path) -> bool:
    """Return whether a file has a suffix of data that can be read."""
    return path.suffix.lower() in (*TABLES, NPZ)


@checks_arguments
def require_data(source: str, one_image: bool = False) -> None:
    """Raise an error if a source of data is a file of another kind, or a path at which nothing is.

    Parameters
    ----------
    source : str
        As for :func:`~tnadapt.finetune._data_sources.open_source`.
    one_image : bool
        Whether it may be an image, too.

    Raises
    ------
    FileError

    Examples
    --------
    >>> require_data("imdb")  # perhaps a name for datasets
    >>> require_data("nowhere.csv")
    Traceback (most recent call last):
    tnadapt.errors.FileError: no data at nowhere.csv: there is no such file or folder
    """
    path = Path(path_of(source))
    # These functions of os.path return False for a path that cannot be one, such as one that is too long.
    if os.path.isdir(path):
        return
    if os.path.isfile(path):
        if not is_file_of_data(path) and not (one_image and path.suffix.lower() in IMAGES):
            images = "an image or a folder of images" if one_image else "a folder of images"
            raise FileError(
                f"cannot read data from {path}: expected a .csv, .tsv, .jsonl, .json or .npz file, or {images}"
            )
    elif is_file_of_data(path) or source.startswith((".", "/", "~")):
        raise FileError(f"no data at {path}: there is no such file or folder")
