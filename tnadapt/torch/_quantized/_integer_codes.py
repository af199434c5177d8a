"""Small integers that are packed into words of 32 bits, as GPTQ and AWQ store codes and zero points."""

from __future__ import annotations

import torch
from torch import Tensor

__all__ = ["crossing", "planar", "unpacked"]


def unpacked(words: Tensor, bits: int, count: int, axis: int) -> Tensor:
    """Return the integers that words hold along an axis, the lowest bits of the first word first.

    Parameters
    ----------
    words : Tensor, int32, 2-D
    bits : int
        Width of each integer; it may cross from one word to the next, as 3 bits do.
    count : int
        Number of integers along the axis; the rest is padding.
    axis : int

    Returns
    -------
    Tensor, int32

    Examples
    --------
    >>> unpacked(torch.tensor([[0x76543210]], dtype=torch.int32), 4, 8, axis=1)
    tensor([[0, 1, 2, 3, 4, 5, 6, 7]], dtype=torch.int32)
    """
    words = words.movedim(axis, -1)
    found = _aligned(words, bits, count) if 32 % bits == 0 else crossing(words, bits, count)
    return found.movedim(-1, axis)


def planar(words: Tensor, bits: int, count: int, axis: int) -> Tensor:
    """Return the integers that words hold along an axis in planes: each 32 integers are in ``bits`` words.

    First come the words of the lowest bits of all 32, then those of the next. The widths of these planes are the powers
    of two that make up ``bits``, the largest first: 4, 2 and 1 for 7 bits. None crosses from one word to the next.

    Parameters
    ----------
    words : Tensor, int32, 2-D
    bits : int
    count : int
        Number of integers along the axis; the rest is padding.
    axis : int

    Returns
    -------
    Tensor, int32

    Examples
    --------
    >>> low, high = [0xC, 0], [0x1]  # 2 bits each of the first 16 and the last, and the third bit of all
    >>> planar(torch.tensor([low + high], dtype=torch.int32), 3, 4, axis=1)
    tensor([[4, 3, 0, 0]], dtype=torch.int32)
    """
    words = words.movedim(axis, -1)
    blocks = words.reshape(*words.shape[:-1], -1, bits)
    found = torch.zeros(*blocks.shape[:-1], 32, dtype=torch.int32, device=words.device)
    low = 0
    for width in (8, 4, 2, 1):
        if bits & width:
            found |= _aligned(blocks[..., low : low + width], width, 32) << low
            low += width
    return found.flatten(-2)[..., :count].movedim(-1, axis)


def _aligned(words: Tensor, bits: int, count: int) -> Tensor:
    """Return the integers along the last axis, where each is in one word."""
    shifts = torch.arange(0, 32, bits, dtype=torch.int32, device=words.device)
    # The shift fills with the sign, which the mask cuts off.
    return ((words.unsqueeze(-1) >> shifts) & ((1 << bits) - 1)).flatten(-2)[..., :count]


def crossing(words: Tensor, bits: int, count: int) -> Tensor:
    """Return the integers along the last axis, which may begin in one word and end in the next."""
    words = words.to(torch.int64) & 0xFFFFFFFF
    first = torch.arange(count, device=words.device) * bits
    place, shift = first // 32, first % 32
    # The word behind the last one is only read with a shift that leaves nothing of it.
    low = words[..., place] >> shift
    high = words[..., (place + 1).clamp_max(words.shape[-1] - 1)] << (32 - shift)
    return ((low | high) & ((1 << bits) - 1)).to(torch.int32)
