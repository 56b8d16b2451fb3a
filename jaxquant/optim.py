"""`adamw8bit`: AdamW whose two moments take a byte each, as a transformation that composes with those of optax.

    m = b1 m + (1 - b1) g,   v = b2 v + (1 - b2) g^2,   w -= rate (m' / (sqrt(v') + eps) + decay w)
    m and v are kept as codes between steps: block b of the last axis is levels[codes] * max|block|

The levels are dynamic: they spend their 8 bits on seven decades, dense near the largest (Dettmers et al., 8-bit
Optimizers via Block-wise Quantization, arXiv:2110.02861).
"""

import math
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.typing import ArrayLike
from jaxtyping import Array, Float, Int, PyTree

from jaxquant.errors import OptionError

_BLOCK = 256
# Shorter blocks than this are not worth a scale.
_SHORTEST = 16
_DECADES = 7


class Transformation(NamedTuple):
    """A gradient transformation as optax knows it: `init(params)`, `update(gradients, state, params)`."""

    init: Callable[[PyTree], Any]
    update: Callable[..., tuple[PyTree, Any]]


class Blocks(NamedTuple):
    """A moment in codes.

    Args:
      codes: uint8 `[..., n]`, indices into the levels.
      scale: float32 `[..., n / block]`, the largest size in each block.
    """

    codes: Any
    scale: Any


class Adam8bitState(NamedTuple):
    """The state of `adamw8bit`: the number of steps, and the moments, `Blocks` for each large array."""

    step: Int[Array, ""]
    first: PyTree
    second: PyTree


def adamw8bit(
    learning_rate: float | Callable[[Array], ArrayLike],
    b1: float = 0.9,
    b2: float = 0.999,
    eps: float = 1e-8,
    weight_decay: float = 1e-4,
    *,
    smallest: int = 4096,
) -> Transformation:
    """AdamW with 8-bit states: 2.03 bytes a parameter instead of 8.

    A moment is in codes only between steps; each step computes in float32. Blocks lie along the last axis that is
    longer than 1, so that states shard as parameters do. Use it as any optimizer of optax, alone or in `optax.chain`.

    Args:
      learning_rate: a number or a schedule of the step.
      b1, b2, eps, weight_decay: as in `optax.adamw`.
      smallest: arrays of fewer elements keep their moments in float32, and so do those whose last axis has no divisor
        from 16 to 256.

    Returns:
      A transformation whose `update` needs the parameters.

    Raises:
      OptionError: `update` was called without them.
    """

    def init(params: PyTree) -> Adam8bitState:
        def zeros(levels: tuple[float, ...]) -> PyTree:  # every buffer its own, so that the state can be donated
            return _compressed(jax.tree.map(lambda w: jnp.zeros(w.shape, jnp.float32), params), levels, smallest)

        first, second = zeros(_SIGNED), zeros(_UNSIGNED)
        return Adam8bitState(jnp.zeros((), jnp.int32), first, second)

    def update(gradients: PyTree, state: Adam8bitState, params: PyTree = None) -> tuple[PyTree, Adam8bitState]:
        if params is None:
            raise OptionError("adamw8bit decays parameters: give them, update(gradients, state, params).")
        count = state.step + 1
        rate = jnp.asarray(learning_rate(state.step) if callable(learning_rate) else learning_rate)
        first, second = _expanded(state.first, _SIGNED), _expanded(state.second, _UNSIGNED)
        first = jax.tree.map(lambda m, g: b1 * m + (1 - b1) * g.astype(jnp.float32), first, gradients)
        second = jax.tree.map(lambda v, g: b2 * v + (1 - b2) * jnp.square(g.astype(jnp.float32)), second, gradients)
        passed = count.astype(jnp.float32)
        unbias1, unbias2 = 1 - b1**passed, 1 - b2**passed

        def move(m: Array, v: Array, w: Array) -> Array:
            step = (m / unbias1) / (jnp.sqrt(v / unbias2) + eps) + weight_decay * w.astype(jnp.float32)
            return (-rate * step).astype(w.dtype)

        updates = jax.tree.map(move, first, second, params)
        kept = (_compressed(first, _SIGNED, smallest), _compressed(second, _UNSIGNED, smallest))
        return updates, Adam8bitState(count, *kept)

    return Transformation(init, update)


def _dynamic(bits: int) -> np.ndarray:
    """Sizes in (0, 1]: for each decade half as many as for the one above, evenly spaced in it."""
    sizes = []
    for decade in range(_DECADES):
        count = max(2 ** (bits - 1 - decade), 1)
        edges = np.linspace(0.1, 1, count + 1)
        sizes.append((edges[1:] + edges[:-1]) / 2 * 10.0**-decade)
    return np.concatenate(sizes)


def _levels(signed: bool) -> tuple[float, ...]:
    """Increasing levels up to 1: 255 around 0, or 256 above it.

    There is no 0 for second moments: a small one that became 0 would be divided by.
    """
    sizes = np.sort(_dynamic(7 if signed else 8))[-(126 if signed else 255) :]
    sizes = np.append(sizes, 1.0)
    levels = np.concatenate([-sizes[::-1], [0.0], sizes]) if signed else sizes
    return tuple(levels.astype(np.float32).tolist())


_SIGNED, _UNSIGNED = _levels(True), _levels(False)


def block_of(shape: tuple[int, ...], smallest: int) -> int | None:
    """The length of a block along the last axis; None where an array stays in float."""
    if math.prod(shape) < smallest or not _lined(shape):
        return None
    fits = [n for n in range(_SHORTEST, _BLOCK + 1) if _lined(shape)[-1] % n == 0]
    return max(fits, default=None)


def _lined(shape: tuple[int, ...]) -> tuple[int, ...]:
    """A shape up to its last axis that is longer than 1."""
    ends = [place + 1 for place, size in enumerate(shape) if size > 1]
    return shape[: max(ends, default=0)]


def _compressed(tree: PyTree, levels: tuple[float, ...], smallest: int) -> PyTree:
    def one(moment: Float[Array, "..."]) -> Any:
        block = block_of(moment.shape, smallest)
        return moment if block is None else compress(moment, levels, block)

    return jax.tree.map(one, tree)


def _expanded(tree: PyTree, levels: tuple[float, ...]) -> PyTree:
    return jax.tree.map(
        lambda leaf: expand(leaf, levels) if isinstance(leaf, Blocks) else leaf,
        tree,
        is_leaf=lambda leaf: isinstance(leaf, Blocks),
    )


def compress(moment: Float[Array, "..."], levels: tuple[float, ...], block: int) -> Blocks:
    """The nearest level of each number, relative to the largest of its block."""
    table = jnp.asarray(levels, jnp.float32)
    *lead, last = _lined(moment.shape)
    parts = moment.reshape(*lead, last // block, block)
    scale = jnp.max(jnp.abs(parts), axis=-1, keepdims=True)
    ratio = parts / jnp.where(scale > 0, scale, 1)
    codes = jnp.searchsorted((table[1:] + table[:-1]) / 2, ratio).astype(jnp.uint8)
    return Blocks(codes.reshape(moment.shape), scale[..., 0])


def expand(blocks: Blocks, levels: tuple[float, ...]) -> Float[Array, "..."]:
    """The numbers that codes stand for."""
    values = jnp.take(jnp.asarray(levels, jnp.float32), blocks.codes.astype(jnp.int32), mode="clip")
    parts = values.reshape(*blocks.scale.shape, -1) * blocks.scale[..., None]
    return parts.reshape(blocks.codes.shape)
