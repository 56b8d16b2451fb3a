"""Floats by a weight whose inputs lie last, on a CPU: a line holds the weights of one output.

    out[:, lines]  =  ( decode(q[lines]) x^T )^T                    so many lines decoded at a time

What `matmul.blocks` says of blocks holds here too. Lines lie together in memory, and decoded they are the left operand
as it lies. A byte of packed codes holds neighbouring inputs: each place in it meets the inputs that lie there. Zero
points come after, as a product of one number for each group, which is cheaper than an addition for each weight.
"""

import dataclasses
import functools
import operator
from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Shaped

from jaxquant.matmul.blocks import is_alone
from jaxquant.packed import bytes_of, places_of, unpacked
from jaxquant.qtensor import QTensor, decode

# A block is as large as the caches hold, decoded, a multiple of what a core adds at once, and not the whole.
_CACHE, _MULTIPLE = 2**23, 8


class Lines(NamedTuple):
    """Some outputs of a weight as they lie: their codes in bytes, their scales, and their zero points or None."""

    held: Shaped[Array, "N bytes"]
    scale: Float[Array, "N groups"]
    zero: Shaped[Array, "N groups"] | None


def lines_of(q: QTensor) -> Lines:
    """All lines of a weight `[1, K, N]` whose inputs lie last."""
    codes, scale, zero = jax.tree.map(lambda part: jnp.swapaxes(part[0], 0, 1), (q.codes, q.scale, q.zero))
    scale, zero = jax.tree.map(lambda part: jnp.broadcast_to(part, (len(codes), part.shape[1])), (scale, zero))
    return Lines(bytes_of(codes), scale, zero)


def by_lines(q: QTensor) -> Callable[[Array, QTensor], Array] | None:
    """The product `(x, q) -> out` of floats and decoded lines; None where lines cannot be taken in blocks.

    Args:
      q: the weight, `[B, K, N]`, whose inputs lie last.
    """
    (_, inputs, outputs), groups = q.shape, q.scale.shape[1]
    # A byte belongs to one group.
    whole = groups > 0 and inputs // groups % places_of(q.codes.dtype) == 0
    fit = (outputs // count for count in range(2, outputs // _MULTIPLE + 1) if outputs % (count * _MULTIPLE) == 0)
    lines = next((lines for lines in fit if 4 * inputs * lines <= _CACHE), None)
    if not whole or lines is None or not is_alone(q):
        return None
    return functools.partial(_by_lines, lines=lines)


def _by_lines(x: Float[Array, "1 M K"], q: QTensor, lines: int) -> Float[Array, "1 M N"]:
    whole, places, rows = lines_of(q), places_of(q.codes.dtype), x[0].astype(jnp.float32)
    blocks = jax.tree.map(lambda part: part.reshape(-1, lines, part.shape[1]), whole._replace(zero=None))
    apart = jnp.moveaxis(rows.reshape(len(rows), x.shape[2] // places, places), 2, 0)
    symmetric = dataclasses.replace(q, zero=None, dtype=jnp.dtype(jnp.float32))

    def one(block: Lines) -> Float[Array, "lines M"]:
        parts = (unpacked(block.held, place, places) for place in range(places))
        weights = (decode(dataclasses.replace(symmetric, codes=part, scale=block.scale)) for part in parts)
        return functools.reduce(operator.add, (weight @ x.T for weight, x in zip(weights, apart, strict=True)))

    out = jax.lax.map(one, blocks).reshape(q.shape[2], len(rows))
    if whole.zero is not None:
        groups = whole.scale.shape[1]
        sums = jnp.sum(rows.reshape(len(rows), groups, x.shape[2] // groups), axis=-1)
        out = out - (whole.zero.astype(jnp.float32) * whole.scale) @ sums.T
    return out.T[None]
