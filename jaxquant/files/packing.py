"""Codes of a few bits as a stream of bytes, little-endian: code i takes the bits `[width i, width (i + 1))`.

At four bits that is what XLA holds in memory, the even code in the low half of a byte.
"""

import numpy as np
from jaxtyping import Int8, UInt8

_CHUNK = 8 * 2**13  # codes at a time, so that what is in between stays in the processor's cache


def packed(codes: Int8[np.ndarray, "..."], width: int) -> UInt8[np.ndarray, " bytes"]:
    """Eight codes become `width` bytes, `sum_i (code_i mod 2^width) 2^(width i)`; the last bits that are left are 0."""
    flat = codes.reshape(-1).view(np.uint8)
    stream = np.empty(packed_size(flat.size, width), np.uint8)
    for start in range(0, flat.size, _CHUNK):
        chunk = flat[start : start + _CHUNK]
        words = np.zeros(-(-chunk.size // 8), "<u8")
        for place in range(8):
            each = chunk[place::8] & np.uint8(2**width - 1)
            words[: each.size] |= each.astype(np.uint64) << np.uint64(width * place)
        part = stream[start // 8 * width :]
        whole = words.view(np.uint8).reshape(-1, 8)[:, :width].reshape(-1)[: part.size]
        part[: whole.size] = whole
    return stream


def unpacked(stream: UInt8[np.ndarray, " bytes"], width: int, size: int) -> Int8[np.ndarray, " size"]:
    """The first `size` codes of a stream, each between `-2^(width - 1)` and `2^(width - 1) - 1`."""
    codes = np.empty(size, np.int8)
    for start in range(0, size, _CHUNK):
        part = stream[start // 8 * width :][: _CHUNK // 8 * width]
        whole = np.zeros(-(-part.size // width) * width, np.uint8)
        whole[: part.size] = part
        words = np.zeros((whole.size // width, 8), np.uint8)
        words[:, :width] = whole.reshape(-1, width)
        chunk = codes[start : start + _CHUNK]
        for place in range(8):
            # Shifted to the top of a byte and back down, which extends the sign.
            top = (words.view("<u8")[:, 0] >> np.uint64(width * place) << np.uint64(8 - width)).astype(np.uint8)
            each = chunk[place::8]
            each[:] = (top.view(np.int8) >> np.int8(8 - width))[: each.size]
    return codes


def packed_size(size: int, width: int) -> int:
    """The bytes that `size` codes take."""
    return -(-size * width // 8)
