"""Arrays that depend only on integers: computed on the host when first needed, and cached for every library."""

from __future__ import annotations

from collections.abc import Hashable, Iterator
from typing import Any

import numpy as np

__all__ = ["FixedArrays"]

Array = Any  # an array of any supported library


class FixedArrays:
    """Arrays that depend only on integers: computed on the host when first needed, and cached.

    A subclass defines them in ``make``. ``kept`` caches them on the host, ``placed`` on the devices of each library.
    Copies and pickles leave the arrays out, as they can be recomputed.
    """

    def __init__(self) -> None:
        self.kept: dict[Hashable, np.ndarray] = {}
        self.placed: dict[tuple[str, str, Hashable], Array] = {}

    def make(self, key: Hashable) -> np.ndarray:
        """Compute the array with that key as a NumPy array."""
        raise NotImplementedError

    def host(self, key: Hashable) -> np.ndarray:
        """Return the array with that key on the host, from the cache or computed, not cached. Do not write to it."""
        found = self.kept.get(key)
        return self.make(key) if found is None else found

    def held(self, key: Hashable) -> np.ndarray:
        """Return the array with that key on the host, computed once and cached. Do not write to it."""
        found = self.kept.get(key)
        if found is None:
            found = self.kept[key] = self.make(key)
        return found

    def on(self, backend: Any, key: Hashable, like: Array, dtype: str | None = None, keep: bool = True) -> Array:
        """Return the array with that key in like's library, on its device, and in ``dtype`` if one is given."""
        found = backend.fixed(self, key, backend.device(like), keep)
        return found if dtype is None else backend.astype(found, dtype)

    def put_on(self, backend: Any, key: Hashable, device: Any, keep: bool = True) -> Array:
        """Return the array with that key on a device of a library; cached if ``keep``, unless it is a placeholder."""
        where = (backend.name, str(device), key)
        found = self.placed.get(where)
        if found is None:
            host = self.host(key)
            found = backend.constant(host, device)
            if keep:
                self.kept[key] = host
                if backend.is_concrete(found):
                    self.placed[where] = found
        return found

    def free(self) -> None:
        """Give back the memory of everything that can be computed again."""
        # New dictionaries instead of clear(): another thread may be reading the old ones.
        self.kept, self.placed = {}, {}

    @property
    def spare_bytes(self) -> int:
        """Bytes of memory that is kept for the next call, beyond the arrays."""
        return 0

    def components(self) -> Iterator[FixedArrays]:
        """Yield this object and those that it is made of, such as the maps of a chain."""
        yield self
        for value in self.__dict__.values():
            for one in value if isinstance(value, (tuple, list)) else (value,):
                if isinstance(one, FixedArrays):
                    yield from one.components()

    def name_of(self, backend: str, key: Hashable, device: Any) -> str:
        """Return the name of the attribute that is the array with that key on a device; create it if necessary.

        For a compiler that must not trace how an array is computed: it treats the returned name as a constant, and
        reads the attribute like any other tensor. Some compilers pass only constants to functions that they do not
        trace; this is why it is a method of this object, and the backend is given by name.
        """
        # The compiler splits attribute names at dots.
        name = f"placed on {device}: {key}".replace(".", "/")
        if name not in self.__dict__:
            from . import load_backend

            self.__dict__[name] = self.put_on(load_backend(backend), key, device)
        return name

    def __getstate__(self) -> dict[str, Any]:
        state = {name: value for name, value in self.__dict__.items() if not name.startswith("placed")}
        return {**state, "kept": {}, "placed": {}}
