"""The low-rank correction of a matmul: `x @ (sum_r a[r] * b[r])` as two thin matmuls, in any dimension numbers."""

from collections.abc import Sequence
from typing import Any

import jax.numpy as jnp
from jaxtyping import Array, Float

from jaxquant.adapter import Sides
from jaxquant.matmul.dot import DimensionNumbers
from jaxquant.matmul.precision import float_dot


def correction(
    x: Float[Array, "..."], sides: Sides, numbers: DimensionNumbers, weight_first: bool, precision: Any
) -> Float[Array, "..."] | None:
    """What `dot_general` of the correction alone would give; None where a side spans inputs and outputs.

    Args:
      x: the activations.
      sides: the weight.
      numbers: those of `dot_general`, of its operands in their order.
      weight_first: whether the weight is the left operand.
      precision: that of `dot_general`.
    """
    contracted, batch = ((pair[1], pair[0]) if weight_first else pair for pair in numbers)
    taken = {*contracted[1], *batch[1]}
    outputs = [axis for axis in range(sides.ndim) if axis not in taken]
    down, up = sides.a, sides.b
    if not (_is_flat(down, outputs) and _is_flat(up, contracted[1])):
        down, up = up, down  # the weight is met the other way round, as a tied head is
    if not (_is_flat(down, outputs) and _is_flat(up, contracted[1])):
        return None
    stacks = tuple(range(len(batch[1])))
    along = tuple(range(len(stacks), len(stacks) + len(contracted[1])))
    first = _thin(down, (*batch[1], *contracted[1]))  # [*batch, *contracted, rank]
    inner = float_dot(
        x.astype(first.dtype), first, ((contracted[0], along), (batch[0], stacks)), precision
    )  # [*batch, *rest, rank]
    outer = _thin(up, (*batch[1], *outputs))  # [*batch, *outputs, rank]
    left, right = (outer, inner) if weight_first else (inner, outer)
    ranks = ((left.ndim - 1,), (right.ndim - 1,))
    return sides.scaling * float_dot(left, right, (ranks, (stacks, stacks)), precision)


def _is_flat(parts: Sequence[Array], axes: Sequence[int]) -> bool:
    return all(parts[0].shape[axis] == 1 for axis in axes)


def _thin(parts: Sequence[Array], order: Sequence[int]) -> Float[Array, "..."]:
    """Some axes of the parts in an order, and the rank last; the other axes are 1."""
    rank = parts[0].ndim
    left = [axis for axis in range(rank) if axis not in order]
    moved = [jnp.transpose(part, (*order, *left)).reshape([part.shape[axis] for axis in order]) for part in parts]
    return jnp.stack(moved, axis=-1)
