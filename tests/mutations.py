"""Files near a valid one, for the tests that read them."""

import copy
import json
import struct
from collections.abc import Iterator
from typing import Any

import numpy as np

STRANGE = (
    None,
    True,
    -1,
    0,
    1.5,
    2**31,
    2**64,
    10**40,
    float("nan"),
    "",
    "../a",
    "int8",
    [],
    {},
    [2**62, 4],
    [0, 2**40],
)


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


def edits(seed: int, text: str, count: int) -> Iterator[str]:
    """JSON near a valid one: parts replaced by one another or by what does not belong there, or taken out."""
    rng = np.random.default_rng(seed)
    for _ in range(count):
        whole = [json.loads(text)]
        for _ in range(int(rng.integers(1, 4))):
            places = list(_places(whole))
            (holder, key), (other, at) = (places[int(rng.integers(len(places)))] for _ in range(2))
            match int(rng.integers(3)):
                case 0:
                    holder[key] = copy.deepcopy(other[at])
                case 1:
                    holder[key] = copy.deepcopy(STRANGE[int(rng.integers(len(STRANGE)))])
                case 2 if holder is not whole:
                    del holder[key]
        yield json.dumps(whole[0])


def _places(node: Any) -> Iterator[tuple[Any, Any]]:
    """Where the parts of JSON stand: what holds each, and under which key or number."""
    children = node.items() if isinstance(node, dict) else enumerate(node) if isinstance(node, list) else ()
    for key, child in children:
        yield node, key
        yield from _places(child)
