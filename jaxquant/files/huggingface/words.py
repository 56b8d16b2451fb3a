"""Codes in 32-bit words, as GPTQ, AWQ and compressed-tensors pack them: the first code in the lowest bits.

    word = sum_i field_i 2^(width i),    field = code + 2^(width - 1)

Adding half the range flips the top bit of a code in two's complement, so the bytes are those of `packing` but for that.
"""

import math

import numpy as np
from jaxtyping import Int8, Int32

from jaxquant.files.packing import packed, unpacked


def from_words(words: Int32[np.ndarray, "..."], width: int, axis: int) -> Int8[np.ndarray, "..."]:
    """Takes the codes out of words.

    Args:
      words: which follow each other along `axis`.
      width: the bits of a code: 2, 4 or 8.
      axis: the one that grows by `32 // width`.

    Returns:
      Codes between `-2^(width - 1)` and `2^(width - 1) - 1`.
    """
    rows = np.moveaxis(words, axis, -1)
    flipped = np.ascontiguousarray(rows).view(np.uint32) ^ _everywhere(2 ** (width - 1), width)
    codes = unpacked(flipped.reshape(-1).view(np.uint8), width, words.size * (32 // width))
    return np.moveaxis(codes.reshape(*rows.shape[:-1], rows.shape[-1] * (32 // width)), -1, axis)


def to_words(codes: Int8[np.ndarray, "..."], width: int, axis: int) -> Int32[np.ndarray, "..."]:
    """Puts codes into words, the inverse of `from_words`; what is left of the last word is 0."""
    rows = np.moveaxis(codes, axis, -1)
    count = words_for(rows.shape[-1], width)
    whole = np.full((*rows.shape[:-1], count * (32 // width)), -(2 ** (width - 1)), np.int8)
    whole[..., : rows.shape[-1]] = rows
    words = packed(whole, width).view(np.uint32) ^ _everywhere(2 ** (width - 1), width)
    return np.moveaxis(words.view(np.int32).reshape(*rows.shape[:-1], count), -1, axis)


def plus_one(words: Int32[np.ndarray, "..."], width: int) -> Int32[np.ndarray, "..."]:
    """Adds 1 to every field of words at once, carries and all, as those who subtracted it did."""
    return (np.ascontiguousarray(words).view(np.uint32) + _everywhere(1, width)).view(np.int32)


def words_for(count: int, width: int) -> int:
    """How many words hold a number of codes."""
    return math.ceil(count * width / 32)


def _everywhere(field: int, width: int) -> np.uint32:
    """The word that has the same number in every field."""
    return np.uint32(sum(field << start for start in range(0, 32, width)))
