"""Floats by a weight whose inputs lie last, on a CPU: a line holds the weights of one output.

    out[:, lines]  =  ( decode(q[lines]) x^T )^T                    so many lines decoded at a time

What `matmul.blocks` says of what is decoded holds here too, but blocks come one after the other without a loop, which
would copy their results. Lines lie together in memory, and decoded they are the left operand as it lies. A byte of
packed codes holds neighbouring inputs: each place in it meets the inputs that lie there. Zero points come after, as a
product of one number for each group, which is cheaper than an addition for each weight.
"""

import dataclasses
import functools
import operator
from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Shaped

from jaxquant.matmul.blocks import is_alone
from jaxquant.packed import bytes_of, places_of, unpacked
from jaxquant.qtensor import QTensor, decode

# A block is as large as the caches hold, decoded, a multiple of what a core adds at once, and not the whole; there are
# no more of them than this.
_CACHE, _MULTIPLE, _MOST = 2**23, 8, 16
# From this many rows on it costs less to pack each block, as the right operand, than to pack the rows for all blocks.
# So many blocks at least, then: their results are put together row by row.
_MANY_ROWS, _FEWEST = 192, 4


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


def never_after(x: Float[Array, "..."]) -> Bool[Array, ""]:
    """False, which XLA does not know before `x` is there: 0 times a number is 0, and times infinity NaN.

    That no absolute value is negative it does know: asked so, every block was decoded before the first product.
    """
    return 0 * jnp.sum(x[(slice(1),) * x.ndim]) > 1


def block_of(lines: Lines, block: int, count: int, never: Bool[Array, ""]) -> Lines:
    """One of `count` blocks of lines.

    It begins where only the run shows. Else XLA would decode, or widen, the codes of all weights of a program before it
    multiplies by the first, and those of a loop over tokens before the loop, and keep them so.
    """
    size = len(lines.held) // count
    start = never.astype(jnp.int32) + block * size
    return jax.tree.map(lambda part: jax.lax.dynamic_slice_in_dim(part, start, size), lines)


def by_lines(rows: int, q: QTensor) -> Callable[[Array, QTensor], Array] | None:
    """The product `(x, q) -> out` of floats and decoded lines; None where lines cannot be taken in blocks.

    Args:
      rows: the tokens.
      q: the weight, `[B, K, N]`, whose inputs lie last.
    """
    (_, inputs, outputs), groups = q.shape, q.scale.shape[1]
    # A byte belongs to one group.
    whole = groups > 0 and inputs // groups % places_of(q.codes.dtype) == 0
    many = rows >= _MANY_ROWS
    fit = [count for count in range(_FEWEST if many else 2, _MOST + 1) if outputs % (count * _MULTIPLE) == 0]
    count = next((count for count in fit if 4 * inputs * outputs <= _CACHE * count), max(fit, default=None))
    if not whole or count is None or not is_alone(q):
        return None
    return functools.partial(_by_lines, count=count, many=many)


def _by_lines(x: Float[Array, "1 M K"], q: QTensor, count: int, many: bool) -> Float[Array, "1 M N"]:
    lines, places, rows = lines_of(q), places_of(q.codes.dtype), x[0].astype(jnp.float32)
    apart = jnp.moveaxis(rows.reshape(len(rows), x.shape[2] // places, places), 2, 0)
    symmetric = dataclasses.replace(q, zero=None, dtype=jnp.dtype(jnp.float32))

    def one(block: Lines) -> Float[Array, "..."]:
        parts = (unpacked(block.held, place, places) for place in range(places))
        weights = (decode(dataclasses.replace(symmetric, codes=part, scale=block.scale)) for part in parts)
        products = (x @ weight.T if many else weight @ x.T for weight, x in zip(weights, apart, strict=True))
        return functools.reduce(operator.add, products)

    outs = []
    for block in range(count):
        # After the block before it, which leaves its place in memory to this one.
        never = never_after(outs[-1] if outs else rows)
        outs.append(one(block_of(lines._replace(zero=None), block, count, never)))
    out = jnp.concatenate(outs, axis=1) if many else jnp.concatenate(outs).T
    if lines.zero is not None:
        groups = lines.scale.shape[1]
        sums = jnp.sum(rows.reshape(len(rows), groups, x.shape[2] // groups), axis=-1)
        out = out - sums @ (lines.zero.astype(jnp.float32) * lines.scale).T
    return out[None]
