"""A folder of adapter files, and the LoRA to which each of them is expanded on its first request."""

from __future__ import annotations

import asyncio
import hashlib
import logging
import os
import re
import threading
from collections.abc import Iterable
from pathlib import Path
from typing import Any, NamedTuple

from tnadapt.argument_checks import checks_arguments
from tnadapt.checkpoints.adapter_file import AdapterFile
from tnadapt.checkpoints.adapter_format import content_of, load, load_single
from tnadapt.checkpoints.checkpoint import SUFFIX, file_state, open_checkpoint
from tnadapt.checkpoints.container import GROWING, path_of
from tnadapt.checkpoints.population_file import PopulationFile, name_content, rows_of, with_arrays
from tnadapt.checkpoints.stored_weights import base_weights
from tnadapt.convert import convert
from tnadapt.errors import ConfigError, FileError, TargetError, TnadaptError

# -- A folder of adapter files, and the LoRA to which each of them is expanded on its first request --------------------


# One component of a path that is neither hidden nor a parent.
_NAME = re.compile(r"[A-Za-z0-9_][A-Za-z0-9._-]{0,127}")

# Version of the written files: increase it when they change, because cache entries are never rewritten.
_VERSION = b"1"

# How the file of a population begins, behind the length of its header.
_POPULATION = b'{"%s":' % GROWING.encode()

# PEFT's settings, which are moved into place last.
_COMPLETE = "adapter_config.json"


class ServedAdapter(NamedTuple):
    """An adapter as LoRA.

    Attributes
    ----------
    path : str
        The folder of PEFT.
    number : int
        A positive number below 2**31 that no other adapter of the same :class:`ServedFolder` has. It follows from the
        content, unless another adapter has it by chance.
    """

    path: str
    number: int


class _Base(NamedTuple):
    """A base model: its path, or None if it is not here or cannot be compared, and what tells that it was replaced."""

    path: str | None
    state: list[bytes]


_NO_BASE = _Base(None, [b"None"])


class _ServedPopulation:
    """A file of a population, with what its members share, completed with arrays of the base once for all."""

    def __init__(self, path: str, file: PopulationFile, before: _ServedPopulation | None) -> None:
        self.path, self.file, self.rows = path, file, rows_of(file)
        self._completed: tuple[list[bytes], AdapterFile] | None = None
        self._lock = threading.Lock()
        if before is not None and content_of(before.file.shared) == content_of(file.shared):  # rows alone have changed
            self._completed = before._completed

    def shared(self, base: _Base) -> AdapterFile:
        """Return what the members share, with the arrays that are computed from the base."""
        with self._lock:  # those who wait would compute the same
            if self._completed is None or self._completed[0] != base.state:
                self._completed = base.state, _with_base(self.file.shared, self.path, base.path)
            return self._completed[1]


def _is_population(path: str) -> bool:
    with open(path, "rb") as file:
        return file.read(8 + len(_POPULATION)).endswith(_POPULATION)


def _loaded(path: str, content: bytes) -> AdapterFile:
    """Return the adapter in a file of this content."""
    file = load_single(path)
    if Path(path).read_bytes() != content:
        raise FileError(f"{path}: changed while it was read: request it again")
    return file


def _with_base(file: AdapterFile, path: str, base: str | None) -> AdapterFile:
    """Return an adapter with the arrays that are computed from the base, after checking that this is its base."""
    if base is None and not file.complete:
        raise TargetError(
            f"{path}: arrays of the adapter are computed from the base weights, and those were not found: set "
            "TNADAPT_VLLM_BASE to the folder of the model that vLLM serves, unquantized and in safetensors files"
        )
    if base is None or (file.complete and file.base is None):
        return file
    weights = base_weights(file, open_checkpoint(base))  # raises a TargetError for another base
    return file if file.complete else file.with_base(weights.of)


class ServedFolder:
    """A folder of adapter files that are expanded to PEFT's LoRA on demand.

    Parameters
    ----------
    folder : str or PathLike
        ``NAME.safetensors`` is the adapter NAME; ``NAME/adapter.safetensors`` is, too. If there is neither, it is the
        member NAME of a population's file in the folder.
    cache : str or PathLike
        Where expanded adapters are kept; created if it does not exist. Entries are named by the content of the file and
        the base, and never change: any number of processes may share them.
    base : str or PathLike, optional
        The base model's weights: a safetensors file, an index or a folder. Names, shapes and the fingerprint of an
        adapter are checked against them, and arrays that are computed from the base weights come from them. By default,
        the served model's name if that is a folder, or a model in the cache of Hugging Face's hub.

    Raises
    ------
    FileError
        If the folder does not exist.

    Notes
    -----
    Threads may call :meth:`find` at once. The folder is scanned at each request, so that changes are seen.

    Examples
    --------
    >>> import json, tempfile, numpy as np, tnadapt as tna
    >>> targets = [tna.Target(f"model.layers.{layer}.self_attn.q_proj", (64, 64), "q") for layer in range(4)]
    >>> plan = tna.UpdatePlan(tna.presets.lotr(rank=2), [target.shape for target in targets])
    >>> arrays = {name: np.ones(shape, "f4") for name, shape in plan.param_shapes.items()}
    >>> with tempfile.TemporaryDirectory() as folder:
    ...     tna.save(folder + "/math.safetensors", tna.AdapterFile(plan.config, targets, arrays))
    ...     served = ServedFolder(folder, folder + "/cache")
    ...     adapter = served.find("math", "org/model")
    ...     config = json.loads(Path(adapter.path, "adapter_config.json").read_text())
    ...     config["r"], served.find("math", "org/model") == adapter, served.find("../math", "org/model")
    (8, True, None)
    """

    @checks_arguments
    def __init__(
        self, folder: str | os.PathLike[str], cache: str | os.PathLike[str], base: str | os.PathLike[str] | None = None
    ) -> None:
        self.folder, self.cache = Path(path_of(folder)), Path(path_of(cache))
        self.base = None if base is None else path_of(base)
        # Adapters that cannot be served, by name: the digest, and the type and message of the error. An exception would
        # keep the adapter's arrays alive by its traceback.
        self._refused: dict[str, tuple[str, type[TnadaptError], str]] = {}
        # The state of each file of the folder, and the populations among them.
        self._known: tuple[dict[str, list[int]], dict[str, _ServedPopulation]] = {}, {}
        # The state of the files of each model, and the base that it is.
        self._bases: dict[str, tuple[dict[str, list[int] | None], _Base]] = {}
        # The digest of the adapter with a number.
        self._digests: dict[int, str] = {}
        if not self.folder.is_dir():
            raise FileError(f"{self.folder} is not a folder: create it, or give another folder of adapters")

    @checks_arguments
    def file_of(self, name: str) -> Path | None:
        """Return the file that has an adapter, alone or as a member, or None if there is none of this name.

        Names that are more than one component of a path are never looked up as files: they may come from anybody.
        """
        path = self._path_of(name)
        if path is not None and not _is_population(path):
            return Path(path)
        holder = self._holder_of(name)
        return None if holder is None else Path(holder.path)

    @checks_arguments
    def find(self, name: str, model: str) -> ServedAdapter | None:
        """Return an adapter as LoRA, expanded if it is not in the cache, or None if there is none of this name.

        Parameters
        ----------
        name : str
            Name of the adapter.
        model : str
            Name or path of the served model.

        Raises
        ------
        TnadaptError
            If the adapter cannot be served: the file is damaged, of another base, or holds no LoRA; several files have
            members of this name, or the file of this name is a population. Until the file or the base changes, later
            calls raise the same error at once.
        """
        path, holder = self._path_of(name), None
        if path is None or _is_population(path):
            holder = self._holder_of(name)
            if holder is None and path is not None:
                raise FileError(f"{path}: is a population: request one of its members, by the member's name")
            if holder is None:
                return None
            path = holder.path
        base = self._base_of(model)
        # The hashed bytes are the ones that are expanded, whatever happens to the path.
        member = None if holder is None else holder.file[name]
        content = Path(path).read_bytes() if member is None else content_of(member)
        digest = _digest(content, model, base)
        place = self.cache / digest
        if not (place / _COMPLETE).is_file():
            known, error_type, message = self._refused.get(name, ("", TnadaptError, ""))
            if known == digest:
                raise error_type(message)
            try:
                if holder is None or member is None:
                    file = _with_base(_loaded(path, content), path, base.path)
                else:
                    file = with_arrays(holder.shared(base), member.arrays)
                self._expand(file, base.path, place)
            except (ConfigError, TargetError) as error:
                # Errors of the adapter itself. Others may be temporary: a file being written, a full disk or memory.
                if not isinstance(error.__cause__, MemoryError):
                    self._refused[name] = digest, type(error), str(error)
                raise
        # vLLM keeps numbers in 32 bits with a sign.
        number = int(digest[:8], 16) & 0x7FFFFFFF or 1
        while self._digests.setdefault(number, digest) != digest:
            number = number % 0x7FFFFFFF + 1
        return ServedAdapter(str(place), number)

    def _path_of(self, name: str) -> str | None:
        """Return the path of the file with a name."""
        if not _NAME.fullmatch(name):
            return None
        places = self.folder / f"{name}.safetensors", self.folder / name / "adapter.safetensors"
        return next((str(place) for place in places if place.is_file()), None)

    def _holder_of(self, name: str) -> _ServedPopulation | None:
        """Return the population with a member of this name; raise FileError if there are several."""
        populations, failure = self._populations()
        holders, content = list[_ServedPopulation](), name_content(name)
        for population in populations:
            try:
                if population.rows.number_of(content) is not None:
                    holders.append(population)
            except FileError as error:
                failure = error
        if len(holders) > 1:
            paths = ", ".join(sorted(holder.path for holder in holders))
            raise FileError(f"several files have a member {name!r}: {paths}. Leave it in one of them")
        if not holders and failure is not None:
            raise failure
        return holders[0] if holders else None

    def _populations(self) -> tuple[Iterable[_ServedPopulation], FileError | OSError | None]:
        """Return the populations in the folder, after reading files that have changed, and the error of one of them."""
        states, failure = self._states()
        known, populations = self._known
        if states != known:
            populations, before = dict[str, _ServedPopulation](), populations
            for path in list(states):
                try:
                    if states[path] != known.get(path):
                        file = load(path) if _is_population(path) else None
                        if isinstance(file, PopulationFile):
                            populations[path] = _ServedPopulation(path, file, before.get(path))
                    elif path in before:
                        populations[path] = before[path]
                except (FileError, OSError) as error:
                    failure = error
                    del states[path]  # so that it is read again
            self._known = states, populations
        return populations.values(), failure

    def _states(self) -> tuple[dict[str, list[int]], FileError | OSError | None]:
        """Return the states of the files in the folder, and an error."""
        with os.scandir(self.folder) as entries:
            visible = [(entry.path, entry.is_dir()) for entry in entries if not entry.name.startswith(".")]
        states, failure = dict[str, list[int]](), None
        for path, is_folder in visible:
            if is_folder or path.endswith(SUFFIX):
                path = os.path.join(path, "adapter.safetensors") if is_folder else path
                try:
                    states[path] = file_state(path)
                except FileNotFoundError:
                    pass  # it was removed, or a folder has no adapter
                except OSError as error:
                    failure = error
        return states, failure

    def _expand(self, file: AdapterFile, base: str | None, place: Path) -> None:
        """Write an adapter's LoRA, where any of several concurrent writers may win, as all write the same."""
        self.cache.mkdir(parents=True, exist_ok=True)
        # A folder appears atomically. If its last file is missing, it was lost later, and the folder is rewritten.
        lost_a_file = place.is_dir()
        if lost_a_file and (place / _COMPLETE).is_file():  # another writer was faster
            return
        try:
            convert(file, place, to="vllm-lora", base=base, overwrite=lost_a_file)
        except FileError:
            if not (place / _COMPLETE).is_file():  # otherwise another writer was faster
                raise

    def _base_of(self, model: str) -> _Base:
        """Return the base of a served model, whose headers are read again only when a file has changed."""
        path = self.base or _folder_of(model)
        if path is None:
            return _NO_BASE
        known = self._bases.get(path)
        if known is not None and known[0] == _states_of(known[0]):
            return known[1]
        try:
            checkpoint = open_checkpoint(path)
            config = os.path.join(checkpoint.folder, "config.json")
            states = _states_of([path, checkpoint.index or path, config]) | checkpoint.states
            quantized = self.base is None and "quantization_config" in (checkpoint.config or {})
        except FileError:
            if self.base is not None:
                raise
            return _NO_BASE  # its weights are not in safetensors files
        files = [f"{size} {time}".encode() for size, time, _ in checkpoint.states.values()]
        base = _NO_BASE if quantized else _Base(path, [path.encode(), *files])
        self._bases[path] = states, base
        return base


def _folder_of(model: str) -> str | None:
    """Return the folder of a served model, or None if it is not on this machine."""
    if os.path.exists(model):
        return model
    try:
        from huggingface_hub import snapshot_download
        from huggingface_hub.errors import HFValidationError, LocalEntryNotFoundError
    except ImportError:
        return None
    try:
        return str(snapshot_download(model, local_files_only=True))  # where vLLM has downloaded it
    except (LocalEntryNotFoundError, HFValidationError):
        return None


def _states_of(paths: Iterable[str]) -> dict[str, list[int] | None]:
    """Return the states of files, None for one that does not exist."""
    states = dict[str, list[int] | None]()
    for path in paths:
        try:
            states[path] = file_state(path)
        except FileNotFoundError:
            states[path] = None
    return states


def _digest(content: bytes, model: str, base: _Base) -> str:
    """Return a digest of everything that the expanded adapter depends on."""
    digest = hashlib.sha256()
    for part in (_VERSION, model.encode("utf-8", "surrogatepass"), *base.state, content):
        digest.update(len(part).to_bytes(8, "little") + part)
    return digest.hexdigest()


# -- The resolver that vLLM asks for unknown adapters, by name ---------------------------------------------------------


_log = logging.getLogger(__name__)

# Names of the environment variables.
ADAPTERS, CACHE, BASE = "TNADAPT_VLLM_ADAPTERS", "TNADAPT_VLLM_CACHE", "TNADAPT_VLLM_BASE"


def vllm_resolver(folder: ServedFolder) -> Any:
    """Return a resolver of vLLM for a folder of adapters.

    Parameters
    ----------
    folder : ServedFolder

    Returns
    -------
    vllm.lora.resolver.LoRAResolver
        Its ``resolve_lora(base_model_name, lora_name)`` expands the adapter in a thread. It returns None for unknown
        names, so that vLLM asks its other resolvers; and for adapters that cannot be served, with the reason in the
        log, as vLLM answers an exception with an internal error.
    """
    from vllm.lora.request import LoRARequest
    from vllm.lora.resolver import LoRAResolver

    class TnadaptResolver(LoRAResolver):  # type: ignore[misc]  # vLLM is not installed where types are checked
        async def resolve_lora(self, base_model_name: str, lora_name: str) -> Any:
            try:
                served = await asyncio.to_thread(folder.find, lora_name, base_model_name)
            except (TnadaptError, OSError) as error:
                _log.error("the adapter %r cannot be served as LoRA: %s", lora_name, error)
                return None
            if served is None:
                return None
            return LoRARequest(lora_name=lora_name, lora_int_id=served.number, lora_path=served.path)

    return TnadaptResolver()


def register_vllm_resolver() -> None:
    """Register the resolver with vLLM if ``TNADAPT_VLLM_ADAPTERS`` names a folder; vLLM calls this when it starts.

    ``TNADAPT_VLLM_CACHE`` is the folder of expanded adapters, by default ``tnadapt/vllm`` in the user's cache.
    ``TNADAPT_VLLM_BASE`` is the path of the base model, if it is neither what vLLM serves nor in the hub's cache.

    Raises
    ------
    FileError
        If the folder does not exist.
    """
    folder = os.environ.get(ADAPTERS)
    if not folder:
        return
    from vllm.lora.resolver import LoRAResolverRegistry

    caches = os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"
    cache = os.environ.get(CACHE) or Path(caches, "tnadapt", "vllm")
    served = ServedFolder(folder, cache, os.environ.get(BASE) or None)
    LoRAResolverRegistry.register_resolver("tnadapt", vllm_resolver(served))
