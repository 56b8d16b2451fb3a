"""From parameters of any rank to the matrices `[in, out]` that a quantizer sees, and back.

w[30, 9, 64, 576]  --take-->  [30] x [576, 576]  --vmap(quantizer)-->  [30] x QTensor  --give-->  QTensor
"""

import dataclasses
import math
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from jaxquant.encode import group_sizes
from jaxquant.errors import ShapeError
from jaxquant.qtensor import QTensor
from jaxquant.quantizers import Quantizer
from jaxquant.stats import Stats
from jaxquant.trace import views


@dataclasses.dataclass(frozen=True)
class Matrices:
    """Which axes of an array are a stack of matrices, which their inputs, and which their outputs."""

    stack: tuple[int, ...]
    inputs: tuple[int, ...]
    outputs: tuple[int, ...]

    @classmethod
    def of(cls, rank: int, stack: Sequence[int], inputs: Sequence[int]) -> "Matrices":
        """All other axes are outputs."""
        return cls(tuple(stack), tuple(inputs), tuple(a for a in range(rank) if a not in (*stack, *inputs)))

    @property
    def order(self) -> tuple[int, ...]:
        """The permutation that brings an array to (stack, inputs, outputs)."""
        return (*self.stack, *self.inputs, *self.outputs)

    def sizes(self, shape: Sequence[int]) -> tuple[int, ...]:
        """The shape `[*stack, in, out]` of an array."""
        return (
            *(shape[a] for a in self.stack),
            math.prod(shape[a] for a in self.inputs),
            math.prod(shape[a] for a in self.outputs),
        )

    def take(self, w: Array) -> Float[Array, "*stack in out"]:
        """The array as matrices."""
        return jnp.transpose(w, self.order).reshape(self.sizes(w.shape))

    def give(self, q: QTensor, shape: Sequence[int]) -> QTensor:
        """Matrices as the array they came from.

        Raises:
          ShapeError: groups or blocks of inputs do not divide the last axis of the inputs.
        """
        moved = tuple(shape[a] for a in self.order)
        whole = views.reshape(q, q.shape, moved)
        if whole is None:
            last = moved[len(self.stack) + len(self.inputs) - 1]
            inputs = f"the {last} inputs along axis {self.inputs[-1]} of shape {tuple(shape)}"
            if views.reshape(q.core, q.shape, moved) is None:
                raise ShapeError(
                    f"the groups of {q.description} do not divide {inputs}; groups that do: {group_sizes(last)}."
                )
            raise ShapeError(
                f"{q.description}: its blocks of {_block(q)} inputs do not divide {inputs}; give a smaller `block` to "
                "the quantizer that rotates or keeps inputs, or leave the parameter out with `where`."
            )
        return views.transpose(whole, [self.order.index(axis) for axis in range(len(shape))])


def _block(q: QTensor) -> int:
    """The longest block of inputs that is mixed, or that one is kept of."""
    kept = 1 if q.kept is None else q.shape[-2] // q.kept.rows.shape[-2]
    return max(q.blocks[-2], kept)


def write(w: Float[Array, "..."], stats: Stats | None, *, quantizer: Quantizer, axes: Matrices) -> QTensor:
    """An array in codes: a quantizer mapped over the matrices in it and their statistics."""
    # A quantizer that holds an array (a key, a traced width) cannot be a static argument.
    run = _jitted if _is_static(quantizer) else _write
    return run(w, stats, quantizer=quantizer, axes=axes)


def _is_static(value: Any) -> bool:
    """Whether a quantizer, with those it wraps, is a plain value, equal to another one that does the same."""
    if isinstance(value, jax.Array):
        return False
    parts = dataclasses.fields(value) if dataclasses.is_dataclass(value) else ()
    return all(_is_static(getattr(value, part.name)) for part in parts)


def _write(w: Float[Array, "..."], stats: Stats | None, *, quantizer: Quantizer, axes: Matrices) -> QTensor:
    one = lambda matrix, stats: quantizer(matrix, stats)  # noqa: E731
    for _ in axes.stack:
        one = jax.vmap(one)
    return axes.give(one(axes.take(w), stats), w.shape)


_jitted = jax.jit(_write, static_argnames=("quantizer", "axes"))
