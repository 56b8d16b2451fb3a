"""One array on its way to disk and back: packed where a byte is more than an element needs, with a checksum."""

import dataclasses
import hashlib
import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Shaped

from jaxquant.errors import ChecksumError, FileError
from jaxquant.files.container import DTYPES, Container, contiguous
from jaxquant.files.packing import packed, packed_size, unpacked

_NATIVE = {np.dtype(dtype) for dtype in DTYPES.values()}
_OTHERS = (
    *(jnp.int4, jnp.int2, jnp.uint4, jnp.uint2, np.complex128),
    *(jnp.float8_e4m3b11fnuz, jnp.float8_e4m3fnuz, jnp.float8_e5m2fnuz),
    *(jnp.float8_e3m4, jnp.float8_e4m3, jnp.float8_e8m0fnu, jnp.float4_e2m1fn),
)
_BY_NAME = {np.dtype(dtype).name: np.dtype(dtype) for dtype in (*DTYPES.values(), *_OTHERS)}


@dataclasses.dataclass(frozen=True)
class Stored:
    """An array that is to be written, and the bits of one element where it is a number of fewer than eight."""

    array: Any
    width: int | None


def on_disk(stored: Stored) -> Shaped[np.ndarray, "..."]:
    """The array as it is written: itself, its packed codes, or its bytes where safetensors has no name for its type."""
    array = contiguous(np.asarray(stored.array))
    if stored.width is not None:
        # Only the low bits are taken, and they are the same in every dtype of one byte.
        return packed(array.view(np.int8) if array.itemsize == 1 else array.astype(np.int8), stored.width)
    return array if array.dtype in _NATIVE else array.reshape(-1).view(np.uint8)


def stored_size(stored: Stored) -> int:
    """The bytes that will take."""
    size = math.prod(stored.array.shape)
    return packed_size(size, stored.width) if stored.width is not None else size * stored.array.dtype.itemsize


def in_parts(sizes: Mapping[str, int], most: int) -> list[list[str]]:
    """Names in order, cut where the sizes of a part would be more than `most`; there is always one part."""
    parts: list[list[str]] = [[]]
    filled = 0
    for name, size in sizes.items():
        if parts[-1] and filled + size > most:
            parts.append([])
            filled = 0
        parts[-1].append(name)
        filled += size
    return parts


def entry_of(stored: Stored, array: Shaped[np.ndarray, "..."]) -> dict[str, Any]:
    """What the description says of an array, `array` being what is written of it."""
    return {
        "dtype": stored.array.dtype.name,
        "shape": list(stored.array.shape),
        "width": stored.width,
        "sha256": _digest(array),
    }


def _digest(array: Shaped[np.ndarray, "..."]) -> str:
    return hashlib.sha256(array.reshape(-1).view(np.uint8).data).hexdigest()


def array_of(name: str, entry: Any, container: Container) -> Array | Shaped[np.ndarray, "..."]:
    """Reads an array back; of a type that JAX holds only in 64-bit mode it stays an array of numpy.

    Raises:
      ChecksumError: its bytes are not those that were written.
      FileError: its entry in the description is none.
    """
    dtype, shape, width, digest = _fields(name, entry, container.path)
    size = math.prod(shape)
    written = container.read(name)
    expected = _expected(dtype, shape, size, width)
    if (written.dtype, written.shape) != expected:
        raise ChecksumError(
            f"{container.path}: tensor {name!r} is {written.dtype}{list(written.shape)}, and was written as "
            f"{expected[0]}{list(expected[1])}. The file is damaged."
        )
    if _digest(written) != digest:
        raise ChecksumError(f"{container.path}: the bytes of tensor {name!r} are not those that were written.")
    if width is not None:
        return jnp.asarray(unpacked(written, width, size).reshape(shape)).astype(dtype)
    values = np.array(written).view(dtype).reshape(shape)  # a copy, which does not keep the file mapped
    return jnp.asarray(values) if jax.dtypes.canonicalize_dtype(dtype) == dtype else values


def _expected(dtype: np.dtype, shape: tuple[int, ...], size: int, width: int | None) -> tuple[np.dtype, tuple]:
    if width is not None:
        return np.dtype(np.uint8), (packed_size(size, width),)
    return (dtype, shape) if dtype in _NATIVE else (np.dtype(np.uint8), (size * dtype.itemsize,))


def _fields(name: str, entry: Any, file: Path) -> tuple[np.dtype, tuple[int, ...], int | None, str]:
    match entry:
        case {"dtype": str(kind), "shape": [*shape], "width": None | int() as width, "sha256": str(digest)}:
            if all(type(n) is int and n >= 0 for n in shape) and width in (None, *range(1, 8)):
                return dtype_of(kind, file), tuple(shape), width, digest
    raise FileError(f"{file}: its description says {str(entry)[:80]} of tensor {name[:80]!r}, which is nothing.")


def dtype_of(name: str, file: Path) -> np.dtype:
    """The dtype of a name that stands in a file.

    Raises:
      FileError: there is none of that name.
    """
    if name not in _BY_NAME:
        raise FileError(f"{file}: its description names a dtype {name[:80]!r}; numbers are {', '.join(_BY_NAME)}.")
    return _BY_NAME[name]
