"""The header of a GGUF file, read and written: its values, and where its tensors lie.

    "GGUF"   version   counts   {key: type, value}   {name: shape, type, offset}   padding   the tensors, each padded

Nothing in it is believed before it is held against the size of the file, in Python's integers.
Source: https://github.com/ggml-org/ggml/blob/master/docs/gguf.md
"""

import dataclasses
import math
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from jaxquant.errors import FileError
from jaxquant.files.gguf.reader import Reader
from jaxquant.files.gguf.values import ARRAY, NUMBERS, STRING, encoded, plain, text_bytes, u32, u64

MAGIC, VERSION = b"GGUF", 3
ALIGNMENT_KEY, ALIGNMENT = "general.alignment", 32
LONGEST_NAME, MOST_AXES = 63, 4  # of llama.cpp

# (name, elements of a block, bytes of a block) of a ggml type by its number.
Types = Mapping[int, tuple[str, int, int]]
# The shape, the number of the type and the offset of a tensor.
_Announced = tuple[tuple[int, ...], int, int]


@dataclasses.dataclass(frozen=True)
class Entry:
    """One tensor of a GGUF file.

    Args:
      kind: the name of its ggml type, such as `Q4_K`; `type 99` for one that is not known.
      shape: in NumPy's order, the inputs of a matrix last.
      block: how many neighbours of the last axis are written together.
      start: its first byte in the file.
      nbytes: its bytes there; None where the type is not known.
    """

    kind: str
    shape: tuple[int, ...]
    block: int
    start: int
    nbytes: int | None


def read_header(path: str | os.PathLike, types: Types) -> tuple[dict[str, Any], dict[str, Entry]]:
    """Reads what a GGUF file holds, without its tensors.

    Args:
      path: of the file.
      types: the ggml types that are known.

    Returns:
      Its values by key, and its tensors by name in the order of the header.

    Raises:
      FileError: it is no such file; the message says what is wrong, and at which byte.
      OSError: it cannot be read.
    """
    path = Path(path)
    with path.open("rb") as file:
        reader = Reader(path, file, os.fstat(file.fileno()).st_size)
        _check_start(reader)
        tensors, values = reader.number(8, "the number of tensors"), reader.number(8, "the number of values")
        reader.demand(13 * values, f"the values, {values} of them,")
        metadata = _read_values(reader, values)
        reader.demand(32 * tensors, f"the list of tensors, {tensors} of them,")
        announced = _read_announced(reader, tensors)
        alignment = alignment_of(path, metadata)
        begin = padded(file.tell(), alignment)
    entries = {name: _entry(reader, name, told, begin, alignment, types) for name, told in announced.items()}
    _check_apart(reader, entries)
    return metadata, entries


def _check_start(reader: Reader) -> None:
    magic = reader.take(4, "the word 'GGUF'")
    if magic != MAGIC:
        raise reader.error(f"it begins with {magic!r}, not with {MAGIC!r}: it is no GGUF file.")
    version = reader.number(4, "the version")
    if version & 0xFFFF == 0 and version:
        raise reader.error("its numbers are big-endian. Convert it with gguf-convert-endian, of the gguf package.")
    if version not in (2, VERSION):
        fix = "A newer jaxquant may read it." if version > VERSION else "Convert the model anew."
        raise reader.error(f"it is of GGUF version {version} (bytes 4 to 8); versions 2 and 3 are read. {fix}")


def _read_values(reader: Reader, count: int) -> dict[str, Any]:
    metadata: dict[str, Any] = {}
    for index in range(count):
        key = reader.text(f"the key of value {index}")
        if key in metadata:
            raise reader.error(f"it has the key {key!r} more than once, again before byte {reader.file.tell()}.")
        metadata[key] = _read_value(reader, f"the value of {key!r}")
    return metadata


def _read_value(reader: Reader, what: str) -> Any:
    kind = reader.number(4, what)
    if kind == STRING:
        return reader.text(what)
    if kind in NUMBERS:
        return plain(reader.numbers(kind, 1, what)[0])
    inner = reader.number(4, what) if kind == ARRAY else None
    if inner is not None and (inner == STRING or inner in NUMBERS):
        count = reader.number(8, what)
        if inner in NUMBERS:
            return reader.numbers(inner, count, what)
        reader.demand(8 * count, what)
        return [reader.text(what) for _ in range(count)]
    kinds = "an array of " if inner is not None else ""
    raise reader.error(f"{what}, before byte {reader.file.tell()}, is {kinds}type {inner or kind}, which is not known.")


def _read_announced(reader: Reader, count: int) -> dict[str, _Announced]:
    found: dict[str, _Announced] = {}
    for index in range(count):
        name = reader.text(f"the name of tensor {index}")
        if name in found:
            raise reader.error(f"it has tensor {name!r} more than once, again before byte {reader.file.tell()}.")
        axes = reader.number(4, f"the number of axes of tensor {name!r}")
        if not 1 <= axes <= MOST_AXES:
            at = reader.file.tell() - 4
            raise reader.error(f"tensor {name!r} has {axes} axes (byte {at}); a tensor has 1 to {MOST_AXES}.")
        shape = tuple(reader.number(8, f"the shape of tensor {name!r}") for _ in range(axes))[::-1]
        what = f"the place of tensor {name!r}"
        found[name] = shape, reader.number(4, what), reader.number(8, what)
    return found


def alignment_of(path: Path, metadata: Mapping[str, Any]) -> int:
    """What every tensor's first byte is a multiple of.

    Raises:
      FileError: the file's own value for it is no power of two.
    """
    alignment = metadata.get(ALIGNMENT_KEY, ALIGNMENT)
    if type(alignment) is not int or alignment < 1 or alignment & (alignment - 1):
        raise FileError(f"{path}: {ALIGNMENT_KEY!r} is {alignment!r}, not a power of two in a uint32.")
    return alignment


def padded(count: int, alignment: int) -> int:
    """The next multiple of the alignment."""
    return -(-count // alignment) * alignment


def _entry(reader: Reader, name: str, announced: _Announced, begin: int, alignment: int, types: Types) -> Entry:
    shape, number, offset = announced
    start = begin + offset
    if 0 in shape:
        raise reader.error(f"tensor {name!r} has the shape {shape}, which holds nothing.")
    if offset % alignment:
        raise reader.error(f"tensor {name!r} is at offset {offset}, which is no multiple of {alignment}.")
    kind, block, width = types.get(number, (f"type {number}", 1, 0))
    if shape[-1] % block:
        raise reader.error(f"tensor {name!r} is {kind}, in blocks of {block}, which do not divide its shape {shape}.")
    nbytes = math.prod(shape) // block * width
    if start + nbytes > reader.size:
        raise reader.error(
            f"tensor {name!r}, {kind} of shape {shape}, lies in bytes {start} to {start + nbytes}; the file ends at "
            f"byte {reader.size}. It is cut short or damaged: fetch it again."
        )
    return Entry(kind, shape, block, start, nbytes or None)


def _check_apart(reader: Reader, entries: Mapping[str, Entry]) -> None:
    end, before = 0, ""
    for name, entry in sorted(entries.items(), key=lambda item: item[1].start):
        if entry.start < end:
            raise reader.error(f"tensors {before!r} and {name!r} overlap, at byte {entry.start}.")
        end, before = entry.start + (entry.nbytes or 0), name


def header_bytes(
    metadata: Mapping[str, Any], tensors: Mapping[str, tuple[tuple[int, ...], int, int]], alignment: int
) -> bytes:
    """The header of a file, with its padding; the tensors follow, in this order, each padded.

    Args:
      metadata: the values by key.
      tensors: the shape, the number of the type and the bytes of each.
      alignment: what every tensor's first byte is a multiple of.
    """
    parts, offset = [MAGIC, u32(VERSION), u64(len(tensors)), u64(len(metadata))], 0
    for key, value in metadata.items():
        parts += [text_bytes(key), encoded(key, value)]
    for name, (shape, number, nbytes) in tensors.items():
        sizes = b"".join(map(u64, reversed(shape)))
        parts += [text_bytes(name), u32(len(shape)), sizes, u32(number), u64(offset)]
        offset += padded(nbytes, alignment)
    header = b"".join(parts)
    return header.ljust(padded(len(header), alignment), b"\0")
