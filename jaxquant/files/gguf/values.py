"""The values of a GGUF header, and the types that Python's own values have there.

A value that `encoded` would write as it lies in the file is read as a plain Python value: text, a boolean, a uint32, a
negative int32, a float32. A number of any other type is read as the NumPy scalar of it, and an array of numbers as a
NumPy array, so what is read is written again as it was.
"""

import math
from typing import Any

import numpy as np

from jaxquant.errors import FileError

STRING, ARRAY = 8, 9
# The type of each number: uint8, int8, uint16, int16, uint32, int32, float32, bool, uint64, int64, float64.
NUMBERS = {
    kind: np.dtype(name)
    for kind, name in {
        **dict(enumerate(("u1", "i1", "<u2", "<i2", "<u4", "<i4", "<f4", "?"))),
        **dict(enumerate(("<u8", "<i8", "<f8"), start=10)),
    }.items()
}
_KINDS = {dtype: kind for kind, dtype in NUMBERS.items()}


def plain(number: np.generic) -> Any:
    """The Python number that is written as this one; this one where there is none."""
    value = number.item()
    return value if np.asarray(_number(value)).dtype == number.dtype else number


def encoded(key: str, value: Any) -> bytes:
    """The type and the bytes of a value.

    Raises:
      FileError: GGUF has no such value.
    """
    if isinstance(value, str):
        return u32(STRING) + text_bytes(value)
    if isinstance(value, list | tuple) and all(isinstance(one, str) for one in value):
        return _array(STRING, len(value)) + b"".join(map(text_bytes, value))
    array = _numbers(value)
    if array is None or array.dtype not in _KINDS or array.ndim > 1:
        raise FileError(
            f"metadata[{key!r}] is {value!r:.60}, which GGUF has no type for: give text, a number, or a list of either."
        )
    kind = _KINDS[array.dtype]
    return (_array(kind, array.size) if array.ndim else u32(kind)) + array.tobytes()


def text_bytes(text: str) -> bytes:
    """The length of a text, and the text."""
    data = text.encode()
    return u64(len(data)) + data


def _numbers(value: Any) -> np.ndarray | None:
    """Numbers with the type they are written in; None for anything else."""
    if isinstance(value, np.ndarray | np.generic):  # before Python's own, because np.float64 is a float
        return np.asarray(value)
    if isinstance(value, list | tuple):
        return _listed(value)
    number = _number(value) if isinstance(value, bool | int | float) else None
    return None if number is None else np.asarray(number)


def _number(value: bool | int | float) -> np.generic | None:
    """What llama.cpp reads: whole numbers in 32 bits where they fit, unsigned if they can be, and float32."""
    if isinstance(value, bool):
        return np.bool_(value)
    if isinstance(value, float):
        fits = not math.isfinite(value) or abs(value) <= float(np.finfo(np.float32).max)
        return np.float32(value) if fits else np.float64(value)
    for dtype in (np.uint32, np.int32, np.uint64, np.int64):
        if _within(value, dtype):
            return dtype(value)
    return None


def _within(value: int, dtype: Any) -> bool:
    return int(np.iinfo(dtype).min) <= value <= int(np.iinfo(dtype).max)


def _listed(values: list | tuple) -> np.ndarray | None:
    """A list of one kind of number, whole ones as int32 where they fit."""
    kinds = {type(value) for value in values}
    if kinds == {int}:
        fitting = [
            dtype for dtype in (np.int32, np.int64) if _within(min(values), dtype) and _within(max(values), dtype)
        ]
        return np.array(values, fitting[0]) if fitting else None
    return np.array([_number(value) for value in values]) if kinds in ({bool}, {float}) else None


def _array(kind: int, count: int) -> bytes:
    return u32(ARRAY) + u32(kind) + u64(count)


def u32(number: int) -> bytes:
    """A uint32."""
    return number.to_bytes(4, "little")


def u64(number: int) -> bytes:
    """A uint64."""
    return number.to_bytes(8, "little")
