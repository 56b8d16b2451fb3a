"""A matmul on a CPU a block of outputs at a time, so that what is unpacked or decoded of a weight stays in a cache.

    out[:, block] = product(x, q[:, block])

XLA on CPU writes a decoded weight to memory as a whole and reads it again, which takes several times as long as reading
its codes. In a loop every block is written to the same place. Codes below a byte are read as the bytes they lie in, one
product for each place in a byte: codes of four bits XLA would widen before the loop, an element at a time.
"""

import dataclasses
import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Shaped

from jaxquant.matmul.integers import bytes_of, places_of, unpacked
from jaxquant.qtensor import QTensor

Product = Callable[[Array, QTensor], Array]

# Bytes of each row of codes that make a block: a multiple of what a core adds at once, as many as its cache holds.
_COLUMNS, _CACHE = range(128, 0, -16), 2**20
# From this many bytes on a decoded weight does not stay in the caches of all cores together.
_LARGE = 2**25
# Up to this many rows packed codes are worth unpacking in blocks in smaller weights too, from this many on.
_FEW_ROWS, _SMALL = 8, 2**18


def in_blocks(rows: int, q: QTensor) -> Callable[[Product], Product] | None:
    """What makes a product `(x, q) -> out` one of block after block; None where that does not pay.

    Args:
      rows: the tokens.
      q: the weight, `[B, K, N]`. Where there are several devices it may be cut among them, and a loop over blocks would
        make each gather the whole.
    """
    batch, inputs, outputs = q.shape
    places, size = places_of(q.codes.dtype), inputs * outputs
    packed = q.is_integer and places > 1
    pays = 4 * size >= _LARGE or (packed and rows <= _FEW_ROWS and size >= _SMALL)
    fit = [columns for columns in _COLUMNS if outputs % (columns * places) == 0]
    columns = next((columns for columns in fit if 4 * inputs * columns <= _CACHE), min(fit, default=None))
    if batch != 1 or not pays or columns is None or jax.device_count() > 1:
        return None
    return lambda product: functools.partial(_by_columns, product=product, columns=columns)


def _by_columns(x: Shaped[Array, "1 M K"], q: QTensor, product: Product, columns: int) -> Float[Array, "1 M N"]:
    """The product, blocks of so many bytes of each row of codes one after the other."""
    (_, k, n), places = q.shape, places_of(q.codes.dtype)
    held = bytes_of(q.codes).reshape(1, k, -1, columns)

    def one(index: Array) -> Array:
        codes = jax.lax.dynamic_index_in_dim(held, index, axis=2, keepdims=False)
        return jnp.stack([product(x, _block(q, codes, index, place)) for place in range(places)], axis=-1)

    out = jax.lax.map(one, jnp.arange(n // (columns * places)))
    return jnp.moveaxis(out, 0, 2).reshape(1, -1, n)


def _block(q: QTensor, held: Array, index: Array, place: int) -> QTensor:
    """The weights at one place of the bytes of a block."""
    places = places_of(q.codes.dtype)

    def lines(part: Any) -> Any:
        if part.shape[-1] == 1:
            return part
        parts = part.reshape(*part.shape[:-1], -1, held.shape[-1], places)[..., place]
        return jax.lax.dynamic_index_in_dim(parts, index, axis=2, keepdims=False)

    scale, zero = jax.tree.map(lines, (q.scale, q.zero))
    codes = unpacked(held, place, places) if places > 1 else held
    return dataclasses.replace(q, codes=codes, scale=scale, zero=zero, master=None)
