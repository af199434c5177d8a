"""The array types of libraries, for type checkers. Nothing is imported when a program runs."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, TypeAlias, TypeVar

__all__ = ["ArrayT", "JaxArray", "TorchArray"]

#: The arrays of one library: a function that takes them returns the same type.
ArrayT = TypeVar("ArrayT")

if TYPE_CHECKING:
    import jax
    import torch

    TorchArray: TypeAlias = torch.Tensor
    JaxArray: TypeAlias = jax.Array
else:
    TorchArray = JaxArray = Any
