"""One safetensors file: a header that is checked before it is believed, tensors that stay on disk until they are read.

    8 bytes n   n bytes of JSON {name: {dtype, shape, data_offsets}}   the tensors, one after the other

The safetensors package checks offsets, sizes and types; duplicate names, which its map swallows, are found here.
Source: https://github.com/huggingface/safetensors#format
"""

import contextlib
import dataclasses
import json
import mmap
import os
import secrets
from collections.abc import Iterator, Mapping
from pathlib import Path
from types import ModuleType
from typing import Any

import jax.numpy as jnp
import numpy as np
from jaxtyping import Shaped

from jaxquant.errors import FileError
from jaxquant.optional import optional

FIX = "pip install 'jaxquant[files]'"
_LONGEST_HEADER = 100_000_000  # bytes, as in the package
DTYPES = {
    "F64": np.float64,
    "F32": np.float32,
    "F16": np.float16,
    "BF16": jnp.bfloat16,
    "F8_E4M3": jnp.float8_e4m3fn,
    "F8_E5M2": jnp.float8_e5m2,
    "I64": np.int64,
    "I32": np.int32,
    "I16": np.int16,
    "I8": np.int8,
    "U64": np.uint64,
    "U32": np.uint32,
    "U16": np.uint16,
    "U8": np.uint8,
    "BOOL": np.bool_,
    "C64": np.complex64,
}


@dataclasses.dataclass(frozen=True)
class Tensor:
    """Where one tensor lies in a file: its type as the file spells it, its shape, and its bytes `[start, stop)`."""

    dtype: str
    shape: tuple[int, ...]
    start: int
    stop: int


@dataclasses.dataclass(frozen=True)
class Container:
    """A safetensors file whose header has been read.

    Args:
      path: of the file.
      tensors: by name.
      metadata: the texts beside them.
      mapped: all its bytes, mapped into memory: those of this file even after another has taken its place.
    """

    path: Path
    tensors: Mapping[str, Tensor]
    metadata: Mapping[str, str]
    mapped: mmap.mmap = dataclasses.field(repr=False)

    @property
    def names(self) -> tuple[str, ...]:
        """Of the tensors, in the order of the file."""
        return tuple(self.tensors)

    def read(self, name: str) -> Shaped[np.ndarray, "..."]:
        """A tensor as a read-only array that shares the memory of the file's pages.

        Raises:
          FileError: there is no such tensor, or its type has no array.
        """
        tensor = self.tensors.get(name)
        if tensor is None:
            raise FileError(f"{self.path}: it has no tensor {name!r}; it has {', '.join(self.names[:40])}.")
        if tensor.dtype not in DTYPES:
            known = ", ".join(DTYPES)
            raise FileError(f"{self.path}: tensor {name!r} is of type {tensor.dtype}, which is not one of {known}.")
        bytes_ = np.frombuffer(self.mapped, np.uint8)[tensor.start : tensor.stop]
        return bytes_.view(DTYPES[tensor.dtype]).reshape(tensor.shape)

    def release(self) -> None:
        """Lets the pages that were read leave memory; those that are read again come from the disk again."""
        if hasattr(mmap, "MADV_DONTNEED"):  # there is none on Windows
            self.mapped.madvise(mmap.MADV_DONTNEED)


def open_container(path: str | os.PathLike) -> Container:
    """Reads the header of a safetensors file.

    Raises:
      FileError: it is no such file; the message says what is wrong with it.
      OSError: it cannot be read.
    """
    path = Path(path)
    with path.open("rb") as file:
        size = os.fstat(file.fileno()).st_size
        length = int.from_bytes(file.read(8), "little")
        if size < 8 or length > min(size - 8, _LONGEST_HEADER):
            raise FileError(
                f"{path}: its first 8 bytes announce a header of {length} bytes; the file has {size}, and a header at "
                f"most {_LONGEST_HEADER}. It is cut short, or no safetensors file."
            )
        text = file.read(length)
        mapped = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)
    header = _parsed(path, text)
    _validate(path)
    metadata = header.pop("__metadata__", None) or {}
    tensors = {name: _tensor(entry, 8 + length) for name, entry in header.items()}
    return Container(path, dict(sorted(tensors.items(), key=lambda item: item[1].start)), metadata, mapped)


def _parsed(path: Path, text: bytes) -> dict[str, Any]:
    def unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        keys = [key for key, _ in pairs]
        twice = sorted({key for key in keys if keys.count(key) > 1}) if len(set(keys)) < len(keys) else []
        if twice:
            raise FileError(f"{path}: its header names {', '.join(twice[:8])} more than once.")
        return dict(pairs)

    try:
        header = json.loads(text.decode(), object_pairs_hook=unique)
    except FileError:
        raise
    except (ValueError, RecursionError) as error:  # not UTF-8, not JSON, or a number of too many digits
        raise FileError(f"{path}: its header, bytes 8 to {8 + len(text)}, is not JSON: {error}") from error
    if not isinstance(header, dict):
        raise FileError(f"{path}: its header is a JSON {type(header).__name__}, not an object.")
    return header


def _validate(path: Path) -> None:
    safetensors = _package()
    try:
        with safetensors.safe_open(path, framework="numpy"):
            pass
    except safetensors.SafetensorError as error:
        raise FileError(f"{path}: {error}") from error


def _tensor(entry: dict[str, Any], begin: int) -> Tensor:
    start, stop = entry["data_offsets"]
    return Tensor(entry["dtype"], tuple(entry["shape"]), begin + start, begin + stop)


def write_container(
    path: str | os.PathLike, arrays: Mapping[str, Shaped[np.ndarray, "..."]], metadata: Mapping[str, str]
) -> None:
    """Writes a safetensors file whole, or not at all.

    Args:
      path: of the file; one that is there is replaced.
      arrays: by name.
      metadata: texts; the package writes more than one in an order of its own.

    Raises:
      FileError: an array's type has no place in such a file.
      OSError: the disk is full, or the folder may not be written to.
    """
    names = {np.dtype(dtype): name for name, dtype in DTYPES.items()}
    for name, array in arrays.items():
        if array.dtype not in names:
            raise FileError(f"{path}: {name!r} is of type {array.dtype}, which safetensors has no name for.")
    safetensors, numpy = _package(), optional("safetensors.numpy", FIX)
    with replacing(path) as temporary:
        try:
            whole = {name: contiguous(array) for name, array in arrays.items()}
            numpy.save_file(whole, temporary, dict(metadata) or None)
        except safetensors.SafetensorError as error:  # its only errors here are those of the disk
            raise OSError(f"{path}: {error}") from error


def contiguous(array: Shaped[np.ndarray, "..."]) -> Shaped[np.ndarray, "..."]:
    """The array in C order, and of the same shape: numpy gives a number an axis."""
    return np.ascontiguousarray(array).reshape(array.shape)


@contextlib.contextmanager
def replacing(path: str | os.PathLike) -> Iterator[Path]:
    """A new file beside `path`, which takes its place, all at once, when the block ends well.

    A process that is killed leaves the old file as it was, and perhaps a hidden one named `.NAME.random.tmp` beside it.
    """
    path = Path(path)
    temporary = path.with_name(f".{path.name}.{secrets.token_hex(6)}.tmp")
    try:
        temporary.touch()
        mode = temporary.stat().st_mode  # what the user's mask grants; the package's own files nobody else can read
        yield temporary
        temporary.chmod(mode)
        settle(temporary)
        os.replace(temporary, path)
    except BaseException:
        temporary.unlink(missing_ok=True)
        raise
    settle(path.parent)


def settle(path: Path) -> None:
    """Waits until a file, or the names in a folder, are on the disk."""
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def _package() -> ModuleType:
    return optional("safetensors", FIX)
