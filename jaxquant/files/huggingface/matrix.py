"""A weight as the layouts of others see it, and as a `QTensor`.

    w[o, i] ~= (codes[o, i] - zero[o, g(i)]) * scale[o, g(i)]

With act-order g is any function that makes groups of one size. A `QTensor` has its groups next to each other, so there
the inputs are permuted: by group, and within a group in the order they had.
"""

import dataclasses
from collections.abc import Collection
from typing import Any

import jax.numpy as jnp
import numpy as np
from jaxtyping import Int32, Shaped

from jaxquant.errors import FileError
from jaxquant.inputs import Permutation
from jaxquant.qtensor import QTensor


@dataclasses.dataclass(frozen=True)
class Matrix:
    """The arrays of a weight, inputs in the order of the activations.

    Args:
      codes: int8 numbers around zero, or float8; `[*stack, outputs, inputs]`.
      scale: floats, each axis of which divides the same axis of `codes`.
      zero: int8, of the shape of `scale`; None for all zeros.
      bits: the width of a code.
      group_of: the group of each input, where groups are not next to each other.
      levels: the codebook that codes, shifted by half its length, are indices into; or None.
    """

    codes: Shaped[np.ndarray, "..."]
    scale: Shaped[np.ndarray, "..."]
    zero: Shaped[np.ndarray, "..."] | None
    bits: int
    group_of: Int32[np.ndarray, " inputs"] | None = None
    levels: tuple[float, ...] | None = None


def to_qtensor(matrix: Matrix, dtype: Any) -> QTensor:
    """The `QTensor` of a matrix: the same codes, and scales in float32, which holds them exactly.

    Args:
      matrix: whose shapes have been checked.
      dtype: of the decoded weight; None for that of the scales.
    """
    integers = np.issubdtype(matrix.codes.dtype, np.integer)
    container = jnp.dtype(f"int{matrix.bits}") if integers else matrix.codes.dtype
    codes, transform = matrix.codes, ()
    if matrix.group_of is not None and np.any(np.diff(matrix.group_of) < 0):
        order = np.argsort(matrix.group_of, kind="stable").astype(np.int32)
        codes, transform = codes[..., order], (_permutation(order, codes.ndim),)
    zero = None if matrix.zero is None or not matrix.zero.any() else jnp.asarray(matrix.zero.astype(container))
    scale = jnp.asarray(matrix.scale.astype(np.float32))
    dtype = jnp.dtype(dtype or matrix.scale.dtype)
    return QTensor(jnp.asarray(codes.astype(container)), scale, zero, dtype, matrix.bits, matrix.levels, transform)


def _permutation(order: Int32[np.ndarray, " inputs"], rank: int) -> Permutation:
    along = (*(1,) * (rank - 1), len(order))
    labels = jnp.arange(len(order), dtype=jnp.int32).reshape(along)
    return Permutation(labels, jnp.asarray(order.reshape(along)), jnp.zeros((1,) * rank, bool))


def to_matrix(q: QTensor) -> Matrix:
    """The matrix of a `QTensor` that `check` has let through, the inverse of `to_qtensor`."""
    q = q.settled
    codes, scale = np.asarray(q.codes), np.asarray(q.scale)
    codes = codes.astype(np.int8) if q.is_integer else codes
    group_of = None
    if q.transform:
        step = q.transform[0]
        assert isinstance(step, Permutation)
        labels, rows = np.asarray(step.inputs).reshape(-1), np.asarray(step.codes).reshape(-1)
        back = np.argsort(rows)[labels]  # the row of codes of each input
        codes, group_of = codes[:, back], (back // (codes.shape[1] // scale.shape[1])).astype(np.int32)
    zero = None if q.zero is None else np.asarray(q.zero).astype(np.int8)
    return Matrix(codes, scale, zero, q.bits, group_of)


def check(name: str, q: QTensor, kinds: Collection[str]) -> None:
    """Raises if a layout would not hold the same numbers.

    Args:
      name: of the weight, for errors.
      q: of shape `[outputs, inputs]`.
      kinds: the types of codes that the layout has, such as `int4`.

    Raises:
      FileError: saying what it would not hold.
    """

    def fail(what: str) -> FileError:
        return FileError(f"{name}: {q!r} {what}")

    if q.ndim != 2 or not name.endswith("weight"):
        raise fail("is not a matrix [outputs, inputs] named `weight`: unstack, transpose and rename it as torch does.")
    if q.codes.dtype.name not in kinds or q.levels is not None or q.bits != _width(q.codes.dtype):
        raise fail(f"has codes that this layout does not have; it has {', '.join(sorted(kinds))}. Quantize to those.")
    steps = q.transform
    whole = all(isinstance(step, Permutation) and step.blocks(2) == (1, q.shape[1]) for step in steps)
    if q.kept is not None or len(steps) > 1 or not whole:
        raise fail("does something to its inputs first that this layout has no place for: quantize without it.")
    if q.input_bound is not None or q.master is not None:
        raise fail("has a fixed range for its inputs, or a float master, which this layout has no place for: drop it.")
    rows, columns = q.scale.shape
    if rows != q.shape[0] and (rows, columns) != (1, 1):
        raise fail("shares scales among some of its outputs: quantize it per channel or in groups.")
    if q.zero is not None and not np.array_equal(np.asarray(q.zero).astype(np.int8), np.asarray(q.zero)):
        raise fail("has zero points that are no integers. Write jq.dequantize(q), or quantize it anew.")


def _width(dtype: Any) -> int:
    return (jnp.iinfo if jnp.issubdtype(dtype, jnp.integer) else jnp.finfo)(dtype).bits
