"""A matmul by a weight whose inputs lie last, on a CPU: a line holds the weights of one output.

    out[:, lines]  =  ( decode(q[lines]) x^T )^T                    floats, so many lines decoded at a time
    out[n]  =  sum_g scale[n, g] sum_p sum_k codes[n, g, p, k] c[g, p, k]   a row of codes, pieces p of a group

What `matmul.blocks` says of blocks holds here too. Lines lie together in memory, and decoded they are the left operand
as it lies. A byte of packed codes holds neighbouring inputs: each place in it meets the inputs that lie there. Zero
points come after, as a product of one number for each group, which is cheaper than an addition for each weight.
"""

import dataclasses
import functools
import operator
from collections.abc import Callable

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int8, Int16, Int32

from jaxquant.matmul.blocks import is_alone, is_large
from jaxquant.packed import bytes_of, places_of, unpacked
from jaxquant.qtensor import QTensor, centre, decode

# Lines of a block, and how many blocks there should be, so that one is decoded while another is in a cache.
_LINES, _BLOCKS = (512, 256, 128, 64), 8
# A piece is twice so many codes side by side, of which LLVM makes vector instructions. A row meets so many blocks of
# lines, one after the other: in one product XLA would compute its codes anew for each output.
_SIDE_BY_SIDE, _PASSES = (32, 16), (4, 2, 1)
# From so many weights on XLA's library is faster for a single row too.
_MANY = 2**25
# Beyond so many rows a weight that stays in the caches is decoded as fast as a whole.
_MANY_ROWS = 64


def by_lines(rows: int, q: QTensor) -> Callable[[Array, QTensor], Array] | None:
    """The product `(x, q) -> out` of floats and decoded lines; None where that does not pay.

    Args:
      rows: the tokens.
      q: the weight, `[B, K, N]`, whose inputs lie last.
    """
    (_, inputs, outputs), groups = q.shape, q.scale.shape[1]
    # A byte belongs to one group.
    whole = groups > 0 and inputs // groups % places_of(q.codes.dtype) == 0
    pays = rows <= _MANY_ROWS or is_large(q)
    return _by_lines if whole and pays and is_alone(q) and outputs % _LINES[-1] == 0 else None


def _by_lines(x: Float[Array, "1 M K"], q: QTensor) -> Float[Array, "1 M N"]:
    n, places, rows = q.shape[2], places_of(q.codes.dtype), x[0].astype(jnp.float32)
    lines = next((size for size in _LINES if n % size == 0 and size * _BLOCKS <= n), _LINES[-1])
    codes, scale, zero = jax.tree.map(lambda part: jnp.swapaxes(part[0], 0, 1), (q.codes, q.scale, q.zero))
    scale = jnp.broadcast_to(scale, (n, scale.shape[1]))
    blocks = jax.tree.map(lambda part: part.reshape(-1, lines, part.shape[1]), (bytes_of(codes), scale))
    apart = jnp.moveaxis(rows.reshape(rows.shape[0], -1, places), 2, 0)
    symmetric = dataclasses.replace(q, zero=None, dtype=jnp.dtype(jnp.float32))

    def one(block: tuple[Array, Array]) -> Float[Array, "lines M"]:
        held, scale = block
        parts = (unpacked(held, place, places) for place in range(places))
        weights = (decode(dataclasses.replace(symmetric, codes=part, scale=scale)) for part in parts)
        return functools.reduce(operator.add, (weight @ x.T for weight, x in zip(weights, apart, strict=True)))

    out = jax.lax.map(one, blocks).reshape(n, -1)
    if zero is not None:
        sums = jnp.sum(rows.reshape(rows.shape[0], scale.shape[1], -1), axis=-1)
        out = out - (zero.astype(jnp.float32) * scale) @ sums.T
    return out.T[None]


def by_row(q: QTensor) -> Callable[[Array, QTensor], Array] | None:
    """The product `(codes, q) -> out` of a row or two of int8 codes; None where that does not pay.

    Args:
      q: the weight, `[B, K, N]`, in integer codes whose inputs lie last.
    """
    (_, inputs, outputs), groups = q.shape, q.scale.shape[1]
    member = inputs // max(groups, 1)
    fit = [side for side in _SIDE_BY_SIDE if member and member % (2 * side) == 0]
    pays = places_of(q.codes.dtype) == 1 and inputs * outputs < _MANY
    return functools.partial(_by_row, side=fit[0]) if fit and pays and is_alone(q) else None


def _by_row(x: Int8[Array, "1 M K"], q: QTensor, side: int) -> Float[Array, "1 M N"]:
    rows, n, groups = x.shape[1], q.shape[2], q.scale.shape[1]
    codes, scale, zero = jax.tree.map(lambda part: jnp.swapaxes(part[0], 0, 1), (q.codes, q.scale, q.zero))
    passes = next(count for count in _PASSES if n % count == 0)
    blocks = codes.reshape(passes, n // passes, -1, 2, side)
    # With the other sign two products fit in 16 bits, whatever the codes: -2 x 128 x 128 = -2^15, but not 2^15.
    opposite = -x.reshape(rows, 1, -1, 2, side).astype(jnp.int16)

    def one(lines: Int8[Array, "lines pieces 2 side"]) -> Int32[Array, "M lines pieces"]:
        def of(row: Int16[Array, "1 pieces 2 side"]) -> Int32[Array, "lines pieces"]:
            first, second = (lines[:, :, half].astype(jnp.int16) * row[:, :, half] for half in range(2))
            return jnp.sum((first + second).astype(jnp.int32), axis=-1)

        return jnp.stack([of(row) for row in opposite])

    sums = -jnp.sum(jnp.moveaxis(jax.lax.map(one, blocks), 1, 0).reshape(rows, n, groups, -1), axis=-1)
    if zero is not None:
        zero = centre(dataclasses.replace(q, zero=zero[None]))
        inputs = jnp.sum(x.reshape(rows, 1, groups, -1), axis=-1, dtype=jnp.int32)
        sums = sums.astype(zero.dtype) - zero * inputs.astype(zero.dtype)
    return jnp.sum(sums.astype(jnp.float32) * scale[None], axis=-1)[None]
