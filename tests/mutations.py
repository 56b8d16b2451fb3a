"""Files near a valid one, for the tests that read them."""

import struct
from collections.abc import Iterator

import numpy as np


def mutations(seed: int, data: bytes, count: int) -> Iterator[bytes]:
    """Files near a valid one: bits flipped, numbers replaced by extreme ones, pieces cut out, doubled or swapped."""
    rng = np.random.default_rng(seed)
    extremes = [0, 1, 2**7, 2**31, 2**32 - 1, 2**62, 2**63, 2**64 - 1]
    for _ in range(count):
        at, size = int(rng.integers(len(data))), int(rng.integers(1, 17))
        match int(rng.integers(5)):
            case 0:
                yield data[:at] + bytes([data[at] ^ 1 << int(rng.integers(8))]) + data[at + 1 :]
            case 1:
                number = struct.pack("<Q", extremes[int(rng.integers(len(extremes)))])[: 4 if rng.integers(2) else 8]
                yield data[:at] + number + data[at + len(number) :]
            case 2:
                yield data[:at] + data[at + size :]
            case 3:
                yield data[: at + size] + data[at:]
            case 4:
                yield data[:at] + rng.bytes(size) + data[at + size :]
