"""Append members to the file of a population, and replace them, without rewriting the rest.

At every moment, and after a crash at any moment, the file has all members of before or of after the change.
"""

from __future__ import annotations

import contextlib
import dataclasses
import io
import os
import stat
from collections.abc import Iterator, Mapping
from typing import Any, Protocol, runtime_checkable

import numpy as np

from tnadapt.argument_checks import checks_arguments
from tnadapt.errors import ConfigError, FileError, TnadaptError, safe_repr

from . import container
from .adapter_file import AdapterFile
from .adapter_format import population_of, save_population
from .atomic_files import lock, names_handle, unlock, write_all
from .population_file import (
    MAX_MEMBERS,
    PopulationFile,
    check_shared,
    checked_names,
    numbers_of,
    rows_of,
    width_of_names,
)


@runtime_checkable
class Attached(Protocol):
    """An adapter that is attached to a model, such as :class:`tnadapt.torch.Adapter`."""

    def to_file(self) -> AdapterFile | PopulationFile:
        """Return what a file of it would have."""


@checks_arguments
def append(
    path: str | os.PathLike[str],
    member: AdapterFile | Mapping[str, np.ndarray] | PopulationFile | Attached,
    name: str | None = None,
) -> None:
    """Append a member, or all members of another population, to the file of a population.

    Parameters
    ----------
    path : str or PathLike
        A file that :func:`tnadapt.save` wrote of a :class:`~tnadapt.PopulationFile`.
    member : AdapterFile, mapping of str to ndarray, PopulationFile, or attached adapter
        The new member, equal to those of the file in everything but its arrays; or its arrays alone, by the names and
        in the shapes of ``plan.param_shapes``, in the file's dtype. Of a population, all members are appended, with
        their names, or none is. An attached adapter, or member of an attached population, is taken as it would be
        saved.
    name : str, optional
        Name of the member: printable, at most 256 bytes in UTF-8, and not yet in the file.

    Raises
    ------
    FileError
        If the file is damaged, or of one adapter; if the member differs from its members in more than its arrays, or
        has NaN or infinity; if a name is invalid or taken. The file has not changed then.

    Notes
    -----
    Several processes can append to one file: each waits for the others. Readers need not wait, and see all of the new
    members or none. A crash leaves the members of before or of after the call. The bytes written are those of the new
    members and 512 more; of the old ones, only the names are read. A name longer than all before it, rounded up to a
    multiple of 8 bytes, needs a wider column: the file is then rewritten once, and replaced atomically.

    Files are locked by ``flock``. On systems and file systems without it, processes must not change a file at once.

    Examples
    --------
    >>> import tempfile
    >>> import tnadapt as tna
    >>> config, targets = tna.Config(rank=1), [tna.Target("blocks.0.attn.query", (4, 6), "q")]
    >>> member = tna.AdapterFile(config, targets, tna.UpdatePlan(config, [(4, 6)]).init())
    >>> with tempfile.TemporaryDirectory() as folder:
    ...     path = folder + "/users.safetensors"
    ...     tna.save(path, tna.PopulationFile.from_members([member], names=["ann"]))
    ...     tna.append(path, member, "bob")
    ...     tna.load(path).names
    ['ann', 'bob']
    """
    where = container.path_of(path)
    with container.file_error_context(where), _locked(where) as file:
        population = file.population
        new = _new_members(member, name, population)
        names, arrays = new.names, rows_of(new).arrays()
        if len(population) + len(new) > MAX_MEMBERS:
            raise ConfigError(f"would have {len(population) + len(new)} members; at most {MAX_MEMBERS} are possible")
        given = [text for text in names if text is not None]
        for text, number in zip(given, rows_of(population).find(given), strict=True):
            if number is not None:
                raise ConfigError(
                    f"has a member {safe_repr(text)} already, number {number}: tnadapt.replace changes it"
                )
        layout = rows_of(population).layout
        if width_of_names(names) > layout.name_bytes or not file.has_room:
            stacked = {key: np.concatenate([old, arrays[key]]) for key, old in rows_of(population).arrays().items()}
            save_population(file.path, PopulationFile(new.shared, stacked, [*population.names, *names]))
        else:
            file.append(layout.pack(arrays, names))


@checks_arguments
def replace(
    path: str | os.PathLike[str], which: int | str, member: AdapterFile | Mapping[str, np.ndarray] | Attached
) -> None:
    """Replace the arrays of a member in the file of a population; its number and name stay.

    Parameters
    ----------
    path : str or PathLike
        A file that :func:`tnadapt.save` wrote of a :class:`~tnadapt.PopulationFile`.
    which : int or str
        The member's number or name.
    member : AdapterFile, mapping of str to ndarray, or attached adapter
        As for :func:`append`.

    Raises
    ------
    FileError
        As for :func:`append`; and if there is no such member. The file has not changed then.

    Notes
    -----
    As for :func:`append`: other processes may read and change the file, and a crash leaves the old member or the new
    one. Bytes of two rows are written.

    Examples
    --------
    >>> import tempfile
    >>> import tnadapt as tna
    >>> config, targets = tna.Config(rank=1), [tna.Target("blocks.0.attn.query", (4, 6), "q")]
    >>> member = tna.AdapterFile(config, targets, tna.UpdatePlan(config, [(4, 6)]).init())
    >>> ones = {name: np.ones_like(array) for name, array in member.arrays.items()}
    >>> with tempfile.TemporaryDirectory() as folder:
    ...     path = folder + "/users.safetensors"
    ...     tna.save(path, tna.PopulationFile.from_members([member, member], names=["ann", "bob"]))
    ...     tna.replace(path, "bob", ones)
    ...     [float(adapter.deltas()[0].sum()) for adapter in tna.load(path)]
    [0.0, 24.0]
    """
    where = container.path_of(path)
    with container.file_error_context(where), _locked(where) as file:
        population = file.population
        (number,) = numbers_of(population, [which], "which")
        new = _member(member, population)
        layout = rows_of(population).layout
        name = layout.name(rows_of(population).row(number), number)
        row = layout.pack({key: array[None] for key, array in new.arrays.items()}, [name])
        file.replace(number, row.tobytes())


def _new_members(value: Any, name: str | None, population: PopulationFile) -> PopulationFile:
    """Return what is appended, after checking that it differs from the population in its arrays alone."""
    value = value.to_file() if isinstance(value, Attached) else value
    if isinstance(value, PopulationFile):
        if name is not None:
            raise ConfigError("name= is for one member; those of a population have names of their own")
        check_shared(value.shared, population.shared, "the new population")
        return value
    names = checked_names([name], 1, single=True)
    file = _member(value, population)
    return PopulationFile(file, {key: array[None] for key, array in file.arrays.items()}, names)


def _member(value: Any, population: PopulationFile) -> AdapterFile:
    """Return a new member, after checking that it differs from those of the population in its arrays alone."""
    shared = population.shared
    value = value.to_file() if isinstance(value, Attached) else value
    if isinstance(value, AdapterFile):
        check_shared(value, shared, "the member")
        value.check_finite()
        return value
    if isinstance(value, PopulationFile):
        raise ConfigError("the member: a whole population, in place of one member: give one, such as population[0]")
    try:
        # AdapterFile itself notes the dtype of arrays in ml_dtypes' bfloat16.
        file = dataclasses.replace(shared, arrays=value)
        file.check_finite()
    except TnadaptError as error:
        raise ConfigError(f"the member: {error}") from error
    if file.dtype != shared.dtype:
        raise ConfigError(f"the member has dtype {file.dtype}; that of the population is {shared.dtype}")
    return file


# -- The file, locked, and the order of the steps on disk --------------------------------------------------------------


class _LockedFile:
    """The file of a population that nobody else changes."""

    def __init__(self, file: io.FileIO, path: str) -> None:
        self._file, self.path = file, path
        state = os.fstat(file.fileno())
        with open(file.fileno(), "rb", closefd=False) as reader:
            opened = container.Container(reader, state.st_size, held=container.held_bytes(state))
            self.population = population_of(opened, path)
        self._entry, self._data = opened.entries[container.GROWING], opened.data
        self._start = self._data + self._entry.start

    @property
    def _stop(self) -> int:
        return self._start + len(self.population) * rows_of(self.population).layout.row_bytes

    def _entry_of(self, count: int) -> bytes:
        return container.growing_entry(self._entry.start, count, self._entry.shape[1])

    @property
    def has_room(self) -> bool:
        """Whether the header begins as this library writes it, with padded numbers."""
        entry = self._entry_of(len(self.population))
        return self._read(9, len(entry)) == entry

    def append(self, rows: np.ndarray) -> None:
        """Append rows: first behind the end that the header says, and then with a header that says they are there."""
        self._recover()
        self._write(self._stop, rows.tobytes())
        first = self._read(0, container.FIRST_BYTES)
        entry = self._entry_of(len(self.population) + len(rows))
        # In one call, and within one sector of a disk.
        self._write(0, first[:9] + entry + first[9 + len(entry) :])

    def replace(self, number: int, row: bytes) -> None:
        """Replace a row: first behind the last one, from where readers take it until it is complete in its place."""
        self._recover()
        self._write(self._stop, rows_of(self.population).layout.trailer(number, row))
        self._put(number, row)

    def _put(self, number: int, row: bytes) -> None:
        self._write(self._start + number * len(row), row)
        # If this does not reach the disk, the trailer says what the row is in any case.
        self._file.truncate(self._stop)

    def _recover(self) -> None:
        """Complete a replacement that was interrupted, and remove what else follows the rows."""
        layout = rows_of(self.population).layout
        size = os.fstat(self._file.fileno()).st_size
        if size == self._stop:
            return
        if size == self._stop + layout.trailer_bytes:
            trailer = self._read(self._stop, layout.trailer_bytes)
            replacement = layout.replacement(trailer, len(self.population))
            if replacement is not None:
                # Its writer may have been killed before it was on disk.
                os.fsync(self._file.fileno())
                self._put(*replacement)
        self._file.truncate(self._stop)

    def _read(self, at: int, count: int) -> bytes:
        self._file.seek(at)
        return self._file.read(count)

    def _write(self, at: int, content: bytes) -> None:
        self._file.seek(at)
        write_all(self._file, content)
        os.fsync(self._file.fileno())


@contextlib.contextmanager
def _locked(path: str) -> Iterator[_LockedFile]:
    """Open the file of a population and lock it, waiting for others that change it."""
    path = os.path.realpath(path)
    while True:
        if not stat.S_ISREG(os.stat(path).st_mode):
            raise FileError("is not a file")  # opening a pipe would block until somebody reads it
        with open(path, "r+b", buffering=0) as file:
            lock(file.fileno(), wait=True)
            try:
                # Whoever held the lock may have replaced the file: this one would then be changed in vain.
                if names_handle(path, file.fileno()):
                    yield _LockedFile(file, path)
                    return
            finally:
                unlock(file.fileno())
