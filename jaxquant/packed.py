"""Codes of less than a byte, and of float8, and the bytes they lie in.

    byte = codes[place 0] | codes[place 1] << bits | ...        neighbours along the last axis

XLA on CPU reads bytes fast, arrays of 4 and 2 bits an element at a time, and those of float8 once it has made float16
of all of them: whoever is in a hurry takes the bytes, and the codes out of them with two shifts.
"""

import dataclasses
import functools
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Shaped


@functools.partial(jax.tree_util.register_dataclass, data_fields=["held"], meta_fields=["dtype"])
@dataclasses.dataclass(frozen=True)
class Packed:
    """Codes held as bytes, which a program that asks for their bytes reads without taking them apart.

    Args:
      held: the bytes, int8.
      dtype: static; of the codes.
    """

    # Any, because a tree may also hold shapes or shardings in the place of arrays.
    held: Any
    dtype: Any

    @classmethod
    def of(cls, codes: Shaped[Array, "*rows N"]) -> "Packed":
        """The bytes that codes lie in."""
        return cls(bytes_of(codes), codes.dtype)

    @property
    def shape(self) -> tuple[int, ...]:
        """The shape of the codes."""
        *rows, held = self.held.shape
        return (*rows, held * places_of(self.dtype))

    @property
    def codes(self) -> Shaped[Array, "*rows N"]:
        """The codes themselves; `bytes_of` them is `held` again, which XLA knows."""
        return jax.lax.bitcast_convert_type(self.held, self.dtype).reshape(self.shape)


def places_of(dtype: Any) -> int:
    """How many codes of a dtype lie in a byte."""
    return 8 // jnp.iinfo(dtype).bits if jnp.issubdtype(dtype, jnp.integer) else 1


def is_float8(dtype: Any) -> bool:
    """Whether a dtype is a float of 8 bits."""
    return jnp.issubdtype(dtype, jnp.floating) and jnp.dtype(dtype).itemsize == 1


def hides_bytes(dtype: Any) -> bool:
    """Whether codes of a dtype are others than the bytes they lie in: several to a byte, or float8."""
    return places_of(dtype) > 1 or is_float8(dtype)


def bytes_of(codes: Shaped[Array, "*rows N"]) -> Shaped[Array, "*rows bytes"]:
    """The bytes that codes lie in, of float8 too; int8 codes as they are."""
    packed = places_of(codes.dtype)
    if packed > 1:
        codes = codes.reshape(*codes.shape[:-1], codes.shape[-1] // packed, packed)
    return codes if codes.dtype == jnp.int8 else jax.lax.bitcast_convert_type(codes, jnp.int8)


def unpacked(held: Shaped[Array, "..."], place: int | Shaped[Array, "..."], packed: int) -> Shaped[Array, "..."]:
    """The signed codes at one place of bytes that hold `packed` of them; codes of a byte as they are.

    The bytes may come as wider integers, which a CPU shifts faster; so may places, one for each byte.
    """
    if packed == 1:
        return held
    bits, width = 8 // packed, jnp.iinfo(held.dtype).bits
    # The place's bits to the top of the integer, and back down with their sign.
    return (held << (width - bits * (place + 1))) >> (width - bits)
