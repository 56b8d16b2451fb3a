"""The numbers that codes stand for, before their scale: whole numbers, entries of a codebook, or floats of 8 bits."""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int, Shaped

from jaxquant.packed import bytes_of


def values_of(codes: Shaped[Array, "..."], levels: tuple[float, ...] | None) -> Float[Array, "..."]:
    """The numbers that codes stand for, in float32.

    Args:
      codes: integers, float8 numbers, or signed indices into `levels`.
      levels: the codebook, or None.
    """
    if levels is not None:
        return look_up(codes, levels)
    if jnp.issubdtype(codes.dtype, jnp.integer):
        return codes.astype(jnp.float32)
    return of_float8(bytes_of(codes), codes.dtype)


def look_up(codes: Shaped[Array, "..."], levels: tuple[float, ...]) -> Float[Array, "..."]:
    """`levels[codes + count / 2]` as selects, by one bit after the other: a gather is slow on every backend."""
    wide, half = codes.astype(jnp.int32), len(levels) // 2
    # In the order of the lowest bits of a signed code, which start with those of 0.
    values: list[Any] = [np.float32(levels[index ^ half]) for index in range(len(levels))]
    while len(values) > 1:
        odd, wide = wide & 1 == 1, wide >> 1
        values = [jnp.where(odd, second, first) for first, second in zip(values[::2], values[1::2], strict=True)]
    return values[0]


def of_float8(bits: Int[Array, "..."], dtype: jnp.dtype) -> Float[Array, "..."]:
    """The numbers of float8 bits, in float32: not every GPU converts them, and XLA on CPU does so slowly.

    The bits of e5m2 are the upper half of a float16; those of e4m3 are one in the wrong place, with a bias of 7 for 15,
    and NaN where all of them are set.
    """
    wide = bits.astype(jnp.int16)
    if jnp.finfo(dtype).nmant == 2:
        return jax.lax.bitcast_convert_type(wide << 8, jnp.float16).astype(jnp.float32)
    size = wide & 127
    moved = jax.lax.bitcast_convert_type(((wide << 8) & -32768) | (size << 7), jnp.float16)
    return jnp.where(size == 127, jnp.nan, moved.astype(jnp.float32) * 2.0**8)
