"""`Param`: a parameter on its way through a function, whatever arrays it is made of; `Plain`, of one array."""

import dataclasses
import functools
from collections.abc import Sequence
from typing import Any

import jax

from jaxquant.trace import views
from jaxquant.trace.provenance import Origin


@functools.partial(
    jax.tree_util.register_dataclass, data_fields=["value", "index"], meta_fields=["path", "memory", "origin"]
)
@dataclasses.dataclass(frozen=True)
class Param:
    """A parameter on its way through the function: a bundle with `.shape` and `.dtype`, and where it came from.

    Args:
      value: the bundle.
      path: of the parameter in the arguments.
      memory: the permutation that brings it back to the order it lies in memory, where it was only transposed.
      origin: which part of the parameter this view shows; None where that was lost.
      index: what was taken along `origin.indexed`, known only when running.
    """

    value: Any
    path: str
    memory: tuple[int, ...] | None = None
    origin: Origin | None = None
    index: Any = None

    @classmethod
    def whole(cls, value, path: str) -> "Param":
        """A parameter as it enters the function."""
        return cls(value, path, None, Origin.of(value.shape))

    def view(self, value, origin: Origin | None, index: Any = None) -> "Param":
        """The same parameter seen through a view."""
        return Param(value, self.path, None, origin, self.index if index is None else index)

    def transposed(self, permutation: Sequence[int]) -> "Param":
        """The same parameter with its axes permuted."""
        place = {axis: new for new, axis in enumerate(permutation)}
        memory = tuple(place[axis] for axis in (self.memory or range(len(place))))
        origin = self.origin and self.origin.transpose(permutation)
        return Param(views.transpose(self.value, permutation), self.path, memory, origin, self.index)


@functools.partial(jax.tree_util.register_dataclass, data_fields=["array"], meta_fields=[])
@dataclasses.dataclass(frozen=True)
class Plain:
    """A float array that is followed as a parameter is: the bundle of one part."""

    array: Any

    @property
    def shape(self) -> tuple[int, ...]:
        """The array's shape."""
        return self.array.shape

    @property
    def ndim(self) -> int:
        """Its rank."""
        return len(self.array.shape)

    @property
    def dtype(self):
        """Its dtype."""
        return self.array.dtype

    def astype(self, dtype) -> "Plain":
        """The array in another dtype."""
        return Plain(self.array.astype(dtype))
