"""GGUF, the files of llama.cpp: read without a detour through floats, and written so that llama.cpp reads the same.

file = jq.load_gguf("model.gguf")
file.metadata["general.architecture"], file.entries, file.tensors["blk.0.attn_q.weight"]
"""

import dataclasses
import math
import os
from collections.abc import Iterator, Mapping
from pathlib import Path
from types import ModuleType
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Shaped, UInt8

from jaxquant.errors import FileError, FormatError
from jaxquant.files.container import FIX, replacing
from jaxquant.files.gguf.blocks import BLOCKS, check_finite, unpacked
from jaxquant.files.gguf.header import LONGEST_NAME, MOST_AXES, Entry, alignment_of, header_bytes, padded, read_header
from jaxquant.files.gguf.packed import kind_of, packed
from jaxquant.optional import optional
from jaxquant.qtensor import QTensor

Tensor = QTensor | Shaped[Array, "..."] | Shaped[np.ndarray, "..."]

_ARRAYS = {
    "F32": np.float32,
    "F16": np.float16,
    "BF16": jnp.bfloat16,
    "F64": np.float64,
    "I8": np.int8,
    "I16": np.int16,
    "I32": np.int32,
    "I64": np.int64,
}
_KINDS = {np.dtype(dtype): kind for kind, dtype in _ARRAYS.items()}
_BLOCKS_KEY, _BLOCKS_VERSION = "general.quantization_version", 2  # GGUF asks for it where there are blocks


@dataclasses.dataclass(frozen=True, eq=False)
class Tensors(Mapping):  # its items are not said here, so that no type checker reads one to see
    """The tensors of a GGUF file by name; each is read when it is asked for, and not kept.

    Args:
      path: of the file.
      entries: what its header says of each.
    """

    path: Path
    entries: Mapping[str, Entry]

    def __getitem__(self, name: str) -> Tensor:
        """A tensor, in codes where its ggml type is one of `blocks.BLOCKS`.

        Raises:
          FileError: its type has no decoder, or a block is broken.
        """
        return _read(self.entries[name], self.path, f"{self.path}: tensor {name!r}")

    def __contains__(self, name: object) -> bool:
        return name in self.entries

    def __iter__(self) -> Iterator[str]:
        return iter(self.entries)

    def __len__(self) -> int:
        return len(self.entries)


@dataclasses.dataclass(frozen=True)
class Gguf:
    """A GGUF file whose header is read and whose tensors are on disk.

    Args:
      metadata: its values by key: text, booleans and numbers, lists of text, NumPy arrays of numbers. A number is a
        plain one if `save_gguf` would write it in the type it has in the file, else a NumPy scalar of that type.
      entries: what the header says of each tensor: its ggml type, shape and place. Listing them reads nothing.
      tensors: the tensors.
    """

    metadata: Mapping[str, Any]
    entries: Mapping[str, Entry]
    tensors: Tensors


def load_gguf(path: str | os.PathLike) -> Gguf:
    """Opens a GGUF file.

        codes [out, in],  scale [out, in / 32],  w = (codes - zero) * scale

    Axes come in NumPy's order, so a matrix is `[out, in]`; `jax.tree.map(jnp.transpose, q)` makes it `[in, out]`.

        Q8_0, Q4_0, Q5_0, Q3_K, Q6_K    a `QTensor` that decodes to the bits of llama.cpp's own floats
        IQ4_NL, MXFP4                   likewise, its codes being indices into `levels`
        Q4_1, Q5_1, Q2_K, Q4_K, Q5_K    a `QTensor` with a float32 zero point, exact to a rounding of it
        F32, F16, BF16, I8, I16, I32    an array;  F64 and I64 a NumPy array, because JAX would narrow them
        any other type of `gguf`        a float32 array
        a type that `gguf` cannot read  is listed, and an error only when it is asked for

    Args:
      path: of the file.

    Raises:
      FileError: it is no GGUF file, or is cut short or damaged; the message says where.
      MissingPackageError: `gguf` is not installed.
      OSError: it cannot be read.
    """
    metadata, entries = read_header(path, _types())
    return Gguf(metadata, entries, Tensors(Path(path), entries))


def _types() -> dict[int, tuple[str, int, int]]:
    """The name, the elements and the bytes of a block of each ggml type."""
    sizes = _package().GGML_QUANT_SIZES
    return {int(kind): (kind.name, *block) for kind, block in sizes.items()}


def _package() -> ModuleType:
    return optional("gguf", FIX)


def _read(entry: Entry, path: Path, name: str) -> Tensor:
    if entry.nbytes is None:
        raise FileError(f"{name} is of ggml {entry.kind}, which is not known: a newer gguf package may know it.")
    with path.open("rb") as file:
        file.seek(entry.start)
        data = np.frombuffer(file.read(entry.nbytes), np.uint8)
    if data.size < entry.nbytes:
        raise FileError(f"{name} ends at byte {entry.start + entry.nbytes}, and the file has become shorter than that.")
    if entry.kind in _ARRAYS:
        array = data.view(_ARRAYS[entry.kind]).reshape(entry.shape)
        return array.copy() if array.dtype.itemsize == 8 else jnp.array(array)
    blocks = data.reshape(math.prod(entry.shape) // entry.block, -1)
    if entry.kind in BLOCKS:
        return unpacked(entry.kind, blocks, entry.shape, name)
    return _decoded(entry, blocks, name)


def _decoded(entry: Entry, blocks: UInt8[np.ndarray, "blocks _"], name: str) -> Array:
    """The floats of a type that only the package decodes."""
    package = _package()
    try:
        with np.errstate(all="ignore"):
            floats = optional("gguf.quants", FIX).dequantize(blocks, package.GGMLQuantizationType[entry.kind])
    except NotImplementedError as error:
        raise FileError(f"{name} is {entry.kind}, which the gguf package cannot decode. Convert the model.") from error
    check_finite(floats, entry.kind, name)
    return jnp.array(floats.reshape(entry.shape))


def save_gguf(path: str | os.PathLike, tensors: Mapping[str, Tensor], metadata: Mapping[str, Any]) -> None:
    """Writes a GGUF file whole, or not at all, in which no number differs from those given.

        int8 codes, groups of 32, scales in float16     Q8_0
        codes of 4, 3 or 2 bits, likewise               Q4_0, with a zero point Q4_1
        arrays                                          F32, F16, BF16, F64, I8, I16, I32, I64

    `jq.half_scales(jq.int4(group=32))` quantizes so that nothing has to be rounded here. A scale for several times 32
    inputs is written several times.

    Args:
      path: of the file; one that is there is replaced.
      tensors: by the names of llama.cpp, a matrix as `[out, in]`: `jax.tree.map(jnp.transpose, q)` of `[in, out]`.
      metadata: what the model is, by llama.cpp's keys, as `load_gguf` gives it: text, booleans, numbers, lists of
        either. Whole numbers are written in 32 bits where they fit, unsigned if they can be, lists of them signed, and
        floats as float32, as llama.cpp wants them; a NumPy scalar or array says another type.

    Raises:
      FormatError: no ggml type that is written holds a tensor; the message says why.
      FileError: a name, a shape or a value has no place in such a file.
      MissingPackageError: `gguf` is not installed.
      OSError: the disk is full, or the folder may not be written to.
    """
    path = Path(path)
    kinds = {name: _kind_to_write(name, tensor, path) for name, tensor in tensors.items()}
    if not set(kinds.values()) <= set(_ARRAYS):
        metadata = {**metadata, _BLOCKS_KEY: metadata.get(_BLOCKS_KEY, _BLOCKS_VERSION)}
    alignment = alignment_of(path, metadata)
    places = {name: (tensors[name].shape, *_numbered(kind, tensors[name].shape)) for name, kind in kinds.items()}
    header = header_bytes(metadata, places, alignment)
    with replacing(path) as temporary, temporary.open("wb") as file:
        file.write(header)
        for name, kind in kinds.items():
            data = _data(tensors[name], kind, f"{path}: tensor {name!r}")
            file.write(data)
            file.write(bytes(padded(len(data), alignment) - len(data)))


def _kind_to_write(name: str, tensor: Any, path: Path) -> str:
    """The ggml type a tensor is written in."""
    what = f"{path}: tensor {name!r}"
    if not isinstance(tensor, QTensor | jax.Array | np.ndarray):
        raise FormatError(f"{what} is {type(tensor).__name__}: a GGUF file holds arrays and `QTensor`s.")
    if len(name.encode()) > LONGEST_NAME:
        raise FileError(f"{what}: its name is longer than the {LONGEST_NAME} bytes that llama.cpp reads.")
    if not 1 <= tensor.ndim <= MOST_AXES or 0 in tensor.shape:
        raise FileError(f"{what} has the shape {tensor.shape}: a tensor has 1 to {MOST_AXES} axes, none of length 0.")
    if isinstance(tensor, QTensor):
        return kind_of(tensor, what)
    if tensor.dtype not in _KINDS:
        raise FormatError(f"{what} is of {tensor.dtype}; arrays are written as {', '.join(map(str, _KINDS))}.")
    return _KINDS[np.dtype(tensor.dtype)]


def _numbered(kind: str, shape: tuple[int, ...]) -> tuple[int, int]:
    """The number of a type, and the bytes of a tensor of it."""
    number, (_, block, width) = next(item for item in _types().items() if item[1][0] == kind)
    return number, math.prod(shape) // block * width


def _data(tensor: Tensor, kind: str, name: str) -> bytes:
    return packed(tensor, kind, name).tobytes() if isinstance(tensor, QTensor) else np.asarray(tensor).tobytes()
