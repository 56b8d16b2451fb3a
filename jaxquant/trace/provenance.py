"""Which part of a parameter a view shows: where each axis of the view lies in the parameter it came from.

An axis of a view is a tuple of *factors*, outermost first: `(axis of the parameter, stride, size)`. A transpose
permutes axes, a reshape joins and splits factors, a slice makes one smaller, a loop or an index takes one away:

    parameter (30, 576, 9, 64)   scan over 0, transpose, reshape   view (576, 576)
    axes of the view: ((2, 1, 9), (3, 1, 64)), ((1, 1, 576),)      taken by the loop: 0
"""

import dataclasses
import math
from collections.abc import Sequence
from typing import NamedTuple

import jax.numpy as jnp
from jaxtyping import Array

from jaxquant.trace.views import Shape, pair_axes

NO_AXIS = -1  # of a factor that a broadcast or an index array made


class Factor(NamedTuple):
    """A piece of an axis of a parameter."""

    axis: int
    stride: int
    size: int


@dataclasses.dataclass(frozen=True)
class Origin:
    """Where a view comes from.

    Args:
      shape: of the parameter.
      axes: the factors of each axis of the view.
      looped: `(loop, axis)` for each axis that a loop runs over, the outermost loop first.
      taken: `(axis, index)` for each axis that a fixed index was taken of.
      indexed: the axis that an index known only when running was taken of, or None.
    """

    shape: Shape
    axes: tuple[tuple[Factor, ...], ...]
    looped: tuple[tuple[int, int], ...] = ()
    taken: tuple[tuple[int, int], ...] = ()
    indexed: int | None = None

    @classmethod
    def of(cls, shape: Shape) -> "Origin":
        """That of a whole parameter."""
        return cls(shape, tuple(_factor(axis, 1, n) for axis, n in enumerate(shape)))

    @property
    def view(self) -> Shape:
        """The shape of the view."""
        return tuple(math.prod(f.size for f in axis) for axis in self.axes)

    def transpose(self, permutation: Sequence[int]) -> "Origin":
        """Permutes the axes."""
        return self._with([self.axes[axis] for axis in permutation])

    def reshape(self, new: Shape) -> "Origin | None":
        """Joins and splits axes; None where a factor would be cut at an odd place."""
        axes: list[tuple[Factor, ...]] = []
        for old, sizes in pair_axes(self.view, new):
            pieces = _split([f for axis in old for f in self.axes[axis]], sizes)
            if pieces is None:
                return None
            axes += pieces
        return self._with(axes)

    def broadcast(self, new: Shape, dimensions: Sequence[int]) -> "Origin":
        """New axes come from nowhere."""
        axes = [_factor(NO_AXIS, 1, n) for n in new]
        for axis, dimension in enumerate(dimensions):
            if self.view[axis] == new[dimension]:
                axes[dimension] = self.axes[axis]
        return self._with(axes)

    def cut(self, starts: Sequence[int | None], sizes: Sequence[int]) -> "Origin | None":
        """Keeps `sizes` elements of each axis, from a start that is None where it is known only when running."""
        result = self
        for axis, (start, size) in enumerate(zip(starts, sizes, strict=True)):
            result = result and result._cut_one(axis, start, size)
        return result

    def loop(self, loop: int) -> "Origin | None":
        """One element of the leading axis, which a loop runs over; None where it is no whole axis."""
        axis = self.whole(0)
        return None if axis is None else self._with(self.axes[1:], looped=(*self.looped, (loop, axis)))

    def index(self, axis: int, shape: Shape) -> "Origin | None":
        """The axis of the view becomes the axes of an array of indices, known only when running."""
        whole = self.whole(axis)
        if whole is None or self.indexed is not None:
            return None
        new = [_factor(NO_AXIS, math.prod(shape[i + 1 :]), n) for i, n in enumerate(shape)]
        return self._with([*self.axes[:axis], *new, *self.axes[axis + 1 :]], indexed=whole)

    def restore(self, view: Array) -> Array | None:
        """The parameter from a view that shows all of it, but for the axes taken away; the inverse of `show`."""
        order, sizes = self._fine(), [f.size for axis in self.axes for f in axis]
        left = [n for axis, n in enumerate(self.shape) if axis not in self.away]
        if math.prod(sizes) != math.prod(left) or any(f.axis == NO_AXIS for axis in self.axes for f in axis):
            return None
        return jnp.transpose(view.reshape(sizes), order).reshape(left)

    def show(self, parameter: Array) -> Array:
        """The view of a parameter (without the axes taken away) that shows all of it."""
        order, sizes = self._fine(), [f.size for axis in self.axes for f in axis]
        fine = parameter.reshape([sizes[i] for i in order])
        return jnp.transpose(fine, [order.index(i) for i in range(len(order))]).reshape(self.view)

    @property
    def away(self) -> tuple[int, ...]:
        """The axes of the parameter that loops and indices took away."""
        by_loop, by_index = (axis for _, axis in self.looped), (axis for axis, _ in self.taken)
        return (*by_loop, *by_index, *(() if self.indexed is None else (self.indexed,)))

    def _fine(self) -> list[int]:
        """The order of the view's factors in the parameter."""
        factors = [f for axis in self.axes for f in axis]
        return sorted(range(len(factors)), key=lambda i: (factors[i].axis, -factors[i].stride))

    def _cut_one(self, axis: int, start: int | None, size: int) -> "Origin | None":
        if size == self.view[axis]:
            return self
        whole = self.whole(axis)
        if size != 1 or whole is None:
            factors = self.axes[axis]
            return self._replaced(axis, (factors[0]._replace(size=size),)) if len(factors) == 1 and size > 1 else None
        if start is not None:
            return self._replaced(axis, (), taken=(*self.taken, (whole, start)))
        return None if self.indexed is not None else self._replaced(axis, (), indexed=whole)

    def whole(self, axis: int) -> int | None:
        """The axis of the parameter that an axis of the view is all of."""
        factors = self.axes[axis]
        if len(factors) == 1 and factors[0].axis != NO_AXIS and factors[0].size == self.shape[factors[0].axis]:
            return factors[0].axis
        return None

    def _replaced(self, axis: int, factors: tuple[Factor, ...], **changes) -> "Origin":
        return self._with([*self.axes[:axis], factors, *self.axes[axis + 1 :]], **changes)

    def _with(self, axes: Sequence[tuple[Factor, ...]], **changes) -> "Origin":
        return dataclasses.replace(self, axes=tuple(axes), **changes)


def _factor(axis: int, stride: int, size: int) -> tuple[Factor, ...]:
    """An axis of one factor; of none where its size is 1."""
    return (Factor(axis, stride, size),) if size != 1 else ()


def _split(factors: list[Factor], sizes: Sequence[int]) -> list[tuple[Factor, ...]] | None:
    """Deals factors out to axes of the given sizes, from the last."""
    left, axes = list(factors), []
    for size in reversed(sizes):
        taken: list[Factor] = []
        while size > 1:
            f = left.pop()
            part = math.gcd(f.size, size)
            if part not in (f.size, size):
                return None
            left += _factor(f.axis, f.stride * part, f.size // part)
            taken.insert(0, Factor(f.axis, f.stride, part))
            size //= part
        axes.append(_joined(taken))
    return axes[::-1]


def _joined(factors: Sequence[Factor]) -> tuple[Factor, ...]:
    """Neighbouring pieces of one axis become one again."""
    result: list[Factor] = []
    for f in factors:
        outer = result[-1] if result else None
        if outer and outer.axis == f.axis and outer.stride == f.stride * f.size:
            result[-1] = Factor(f.axis, f.stride, outer.size * f.size)
        else:
            result.append(f)
    return tuple(result)
