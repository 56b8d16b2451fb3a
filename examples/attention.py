"""Causal softmax attention on a CPU, where query heads that are neighbours share a head of keys and values.

    softmax(q k^T / sqrt(head_width)) v

of a few tokens to all keys of a cache, of a whole text to itself, and of a single token, in the order of memory.
"""

import functools
import math
import operator

import jax
import jax.numpy as jnp
from jax.typing import ArrayLike
from jaxtyping import Array, Float, Int

HeadArray = Float[Array, "batch time heads head_width"]

# Queries of a prompt that are taken together, at least, and the most such blocks, each of which is compiled.
QUERY_BLOCK, MOST_BLOCKS = 128, 8
# So many numbers of a head are multiplied side by side.
LANES = 16


def attend(q: HeadArray, k: HeadArray, v: HeadArray, position: Int[ArrayLike, ""]) -> HeadArray:
    """Attention of queries that begin at `position`."""
    batch, time, heads, head_width = q.shape
    length, kv_heads = k.shape[1:3]
    shared = heads // kv_heads
    # The queries that share a key become more rows of one matrix product, so that no key is copied.
    rows = q.swapaxes(1, 2).reshape(batch, kv_heads, shared * time, head_width)
    # Keys as the left operand, because XLA on CPU packs the right one anew at every call.
    scores = jnp.einsum("bskd,bkrd->bksr", k, rows).swapaxes(2, 3) * head_width**-0.5
    visible = jnp.arange(length)[None] <= position + jnp.arange(time)[:, None]
    visible = jnp.tile(visible, (shared, 1))[None, None]
    weights = jax.nn.softmax(jnp.where(visible, scores, -jnp.inf))
    mixed = jnp.einsum("bkrs,bskd->bkrd", weights, v)
    return mixed.reshape(batch, heads, time, head_width).swapaxes(1, 2)


def attend_to_itself(q: HeadArray, k: HeadArray, v: HeadArray) -> HeadArray:
    """Attention of a text that nothing came before: blocks of queries, each to no later keys than its last's."""
    size = max(QUERY_BLOCK, -(-q.shape[1] // MOST_BLOCKS))
    ends = [(start, start + size) for start in range(0, q.shape[1], size)]
    return jnp.concatenate([attend(q[:, a:b], k[:, :b], v[:, :b], a) for a, b in ends], axis=1)


def attend_from_one(q: HeadArray, k: HeadArray, v: HeadArray, position: Int[ArrayLike, ""]) -> HeadArray:
    """Attention of a single query, at `position`.

    As products of matrices, one for each head, XLA on CPU copies keys and values to put heads first, which takes longer
    than to read them.
    """
    batch, _, heads, head_width = q.shape
    length, kv_heads = k.shape[1:3]
    queries = q.reshape(batch, 1, kv_heads, heads // kv_heads, head_width).astype(jnp.float32) * head_width**-0.5
    scores = jnp.stack([products(queries[:, :, :, i], k) for i in range(queries.shape[3])], axis=-1)
    scores = scores.reshape(batch, length, heads).swapaxes(1, 2)
    weights = jax.nn.softmax(jnp.where(jnp.arange(length) <= position, scores, -jnp.inf))
    # The weights of all heads by the values of all, of which each head takes its own.
    mixed = jnp.einsum("bhs,bsc->bhc", weights.astype(v.dtype), v.reshape(batch, length, -1))
    mixed = mixed.reshape(batch, kv_heads, -1, kv_heads, head_width)
    return jnp.stack([mixed[:, i, :, i] for i in range(kv_heads)], axis=1).reshape(q.shape)


def products(q: HeadArray, k: HeadArray) -> Float[Array, "batch time heads"]:
    """Products of keys with one query for each head, term by term: vector instructions, unlike a sum along an axis."""
    *heads, head_width = k.shape
    lanes = math.gcd(head_width, LANES)
    pieces = (slice(start, start + lanes) for start in range(0, head_width, lanes))
    terms = [k[..., piece].astype(jnp.float32) * q[..., piece] for piece in pieces]
    return (functools.reduce(operator.add, terms).reshape(-1, lanes) @ jnp.ones(lanes)).reshape(heads)
