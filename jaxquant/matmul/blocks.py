"""Packed codes meet codes on a CPU a block of inputs at a time, so that what is unpacked of a weight stays in a cache.

    out = sum_block product(x[:, block], q[block])         in integers

XLA on CPU writes an unpacked weight to memory as a whole and reads it again, which takes several times as long as
reading its codes. In a loop every block is written to the same place. Codes below a byte are read as the bytes they lie
in, one product for each place in a byte: codes of four bits XLA would widen before the loop, an element at a time. No
group is cut by a block.
"""

import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Shaped

from jaxquant.packed import bytes_of, places_of, unpacked
from jaxquant.qtensor import QTensor

Product = Callable[[Array, QTensor], Array]

# From this many bytes on a decoded weight does not stay in the caches of all cores together.
_LARGE = 2**24
# Up to this many packed codes without groups are one product as a whole, which no scale comes between.
_WHOLE = 2**23
# Up to this many rows packed codes are worth unpacking in blocks in smaller weights too, from this many on.
_FEW_ROWS, _SMALL = 8, 2**18
# The fewest inputs that make a block and the most, and the rows beyond which a weight is decoded as fast as a whole.
_SHORTEST, _LONGEST, _MANY_ROWS = 32, 128, 128


def by_inputs(rows: int, q: QTensor) -> Callable[[Product], Product] | None:
    """What makes a product `(codes, q) -> out` one of block after block; None where that does not pay.

    Args:
      rows: the tokens.
      q: the weight, `[B, K, N]`, in integer codes.
    """
    (_, inputs, outputs), places = q.shape, places_of(q.codes.dtype)
    groups = q.scale.shape[1]
    member = inputs // groups
    block = max(size for size in range(1, min(member, _LONGEST) + 1) if member % size == 0)
    few = rows <= _FEW_ROWS and inputs * outputs >= _SMALL
    large = rows <= _MANY_ROWS and 4 * inputs * outputs >= _LARGE
    pays = (few or large) and (groups > 1 or inputs * outputs >= _WHOLE)
    if not is_alone(q) or places == 1 or outputs % places or block < _SHORTEST or not pays:
        return None
    return lambda product: functools.partial(_by_inputs, product=product, block=block)


def is_alone(q: QTensor) -> bool:
    """Whether a weight `[B, K, N]` is one matrix on one device.

    Among several devices it may be cut, and a loop over blocks would make each gather the whole.
    """
    return q.shape[0] == 1 and jax.device_count() == 1


def _by_inputs(x: Shaped[Array, "1 M K"], q: QTensor, product: Product, block: int) -> Float[Array, "1 M N"]:
    """The product as the sum of those with so many inputs each, one after the other."""
    (_, k, n), places = q.shape, places_of(q.codes.dtype)
    count = k // block
    # Without the axis of 1, around which XLA would copy the codes to another layout.
    held, rows = bytes_of(q.codes).reshape(count, block, -1), jnp.moveaxis(x.reshape(-1, count, block), 1, 0)
    parts = jax.tree.map(lambda part: jnp.repeat(part[0], count // part.shape[1], axis=0), (q.scale, q.zero))

    def add(totals: tuple[Array, ...], one: Any) -> tuple[tuple[Array, ...], None]:
        some, codes, parts = one

        def of(part: Array, place: int) -> Array:
            return part[None, None] if part.shape[-1] == 1 else part.reshape(1, 1, -1, places)[..., place]

        def at(place: int) -> QTensor:
            scale, zero = jax.tree.map(lambda part: of(part, place), parts)
            return QTensor(unpacked(codes, place, places)[None], scale, zero, q.dtype, q.bits)

        return tuple(total + product(some[None], at(place)) for place, total in enumerate(totals)), None

    start = (jnp.zeros((1, x.shape[1], n // places), jnp.float32),) * places
    totals, _ = jax.lax.scan(add, start, (rows, held, parts))
    return jnp.stack(totals, axis=-1).reshape(1, -1, n)
