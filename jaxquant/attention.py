"""Causal attention to keys and values in parts, each of every P-th number of a head: those at one place of a byte.

    softmax(sum_p q[p::P] k[p]^T) v        the mixed values put together again, so that no key or value ever is

Neighbouring query heads share a head of keys and values. Scores and sums are float32.
"""

import functools
import math
import operator
from collections.abc import Sequence

import jax
import jax.numpy as jnp
import numpy as np
from jax.typing import ArrayLike
from jaxtyping import Array, Float, Int

Heads = Float[Array, "batch time heads width"]
Part = Float[Array, "batch length kv_heads part"]
Position = Int[ArrayLike, ""]

# So many numbers of a head are multiplied side by side.
_LANES = 16


def attend(queries: Heads, keys: Sequence[Part], values: Sequence[Part], position: Position) -> Heads:
    """The mixed values of queries that begin at `position`.

    Args:
      queries: float32, divided by the square root of the width.
      keys, values: their parts.
      position: of the first query.
    """
    # Of several parts XLA would decode each anew for every query that shares it. GPUs have no such copy to save, and
    # several of them, which share out the heads, would exchange what they have.
    if queries.shape[1] == len(keys) == 1:
        operands = queries, keys, values, jnp.asarray(position)
        return jax.lax.platform_dependent(*operands, cpu=_in_order, default=_head_by_head)
    return _head_by_head(queries, keys, values, position)


def _head_by_head(queries: Heads, keys: Sequence[Part], values: Sequence[Part], position: Position) -> Heads:
    """One product for each head of keys, and one for each of values."""
    batch, time, heads, width = queries.shape
    length, kv_heads = keys[0].shape[1:3]
    # The queries that share a key become more rows of one product.
    rows = queries.swapaxes(1, 2).reshape(batch, kv_heads, heads // kv_heads * time, width)
    # Keys as the left operand, because XLA on CPU packs the right one anew at every call.
    scores = _added([jnp.einsum("bskd,bkrd->bksr", part, rows[..., p :: len(keys)]) for p, part in enumerate(keys)])
    visible = jnp.arange(length)[None, :] <= jnp.asarray(position) + jnp.arange(time)[:, None]
    weights = _softmax(scores.swapaxes(2, 3), jnp.tile(visible, (heads // kv_heads, 1)))
    mixed = jnp.stack([jnp.einsum("bkrs,bskd->bkrd", weights, part) for part in values], axis=-1)
    return mixed.reshape(batch, heads, time, width).swapaxes(1, 2)


def _in_order(query: Heads, whole_keys: Sequence[Part], whole_values: Sequence[Part], position: Position) -> Heads:
    """One query, in the order of memory: for a product of each head XLA on CPU would copy all, to put heads first."""
    (keys,), (values,) = whole_keys, whole_values
    (batch, _, heads, width), (length, kv_heads) = query.shape, keys.shape[1:3]
    groups = query.reshape(batch, 1, kv_heads, heads // kv_heads, width)
    scores = jnp.stack([_products(groups[:, :, :, index], keys) for index in range(groups.shape[3])], axis=-1)
    weights = _softmax(scores.reshape(batch, length, heads).swapaxes(1, 2), jnp.arange(length) <= position)
    # The weights of all heads by the values of all, of which each head takes its own.
    mixed = jnp.einsum("bhs,bsc->bhc", weights, values.reshape(batch, length, -1))
    mixed = mixed.reshape(batch, kv_heads, -1, kv_heads, width)
    return jnp.stack([mixed[:, head, :, head] for head in range(kv_heads)], axis=1).reshape(query.shape)


def _products(query: Float[Array, "batch 1 kv_heads width"], keys: Part) -> Float[Array, "batch length kv_heads"]:
    """Products written out term by term: vector instructions, which XLA on CPU does not make of a sum along an axis."""
    *heads, width = keys.shape
    lanes = math.gcd(width, _LANES)
    pieces = (slice(start, start + lanes) for start in range(0, width, lanes))
    terms = _added([keys[..., piece] * query[..., piece] for piece in pieces])
    return (terms.reshape(-1, lanes) @ np.ones(lanes, np.float32)).reshape(heads)


def _softmax(scores: Float[Array, "..."], visible: Array) -> Float[Array, "..."]:
    return jax.nn.softmax(jnp.where(visible, scores, -jnp.inf))


def _added(parts: Sequence[Array]) -> Array:
    return functools.reduce(operator.add, parts)
