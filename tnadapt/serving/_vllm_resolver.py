"""The resolver of vLLM, which asks it for adapters that it does not know, by name."""

from __future__ import annotations

import asyncio
import logging
import os
from pathlib import Path
from typing import Any

from tnadapt.errors import TnadaptError

from ._served_folder import ServedFolder

__all__ = ["register_vllm_resolver", "vllm_resolver"]

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
                found = await asyncio.to_thread(folder.find, lora_name, base_model_name)
            except (TnadaptError, OSError) as error:
                _log.error("the adapter %r cannot be served as LoRA: %s", lora_name, error)
                return None
            if found is None:
                return None
            return LoRARequest(lora_name=lora_name, lora_int_id=found.number, lora_path=found.path)

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

    cache = os.environ.get(CACHE) or _user_cache()
    served = ServedFolder(folder, cache, os.environ.get(BASE) or None)
    LoRAResolverRegistry.register_resolver("tnadapt", vllm_resolver(served))


def _user_cache() -> Path:
    root = os.environ.get("XDG_CACHE_HOME")
    return (Path(root) if root else Path.home() / ".cache") / "tnadapt" / "vllm"
