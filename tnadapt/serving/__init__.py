"""Serving adapters: a folder of adapter files, each expanded to LoRA on request.

:class:`ServedFolder` expands files of this library to PEFT's LoRA, and keeps the result in a cache. vLLM finds
:func:`register_vllm_resolver` by its entry point, and asks the resolver for adapters by name.
"""

from typing import TYPE_CHECKING

from tnadapt.lazy_names import lazy_names

if TYPE_CHECKING:
    from ._served_folder import ServedFolder, register_vllm_resolver, vllm_resolver

__all__ = ["ServedFolder", "register_vllm_resolver", "vllm_resolver"]

# Imported on first use: vLLM imports this package in every process, and most do not serve adapters.
_LAZY = {
    "ServedFolder": "_served_folder",
    "register_vllm_resolver": "_served_folder",
    "vllm_resolver": "_served_folder",
}


__getattr__, __dir__ = lazy_names(__name__, _LAZY)
