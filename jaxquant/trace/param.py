"""`Param`: a parameter on its way through a function, whatever arrays it is made of; `Plain`, of one array."""

import dataclasses
import functools
from collections.abc import Callable, Sequence
from typing import Any

import jax
import numpy as np

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

    @property
    def laid(self) -> "Param":
        """The same parameter as it lies in memory: in the order of its axes there, and `in_bytes`."""
        param = self if self.memory is None else self.transposed(self.memory)
        return dataclasses.replace(param, value=getattr(param.value, "in_bytes", param.value))

    def seen(self, memory: Sequence[int] | None) -> "Param":
        """What was `laid`, as it was before.

        Args:
          memory: that of the parameter before.
        """
        param = dataclasses.replace(self, value=getattr(self.value, "unpacked", self.value))
        return param if memory is None else param.transposed(np.argsort(memory).tolist())


def as_they_lie(values: Sequence) -> tuple[list, Callable[[Sequence], list]]:
    """Values with their parameters as they lie in memory, and what makes of those again what they were.

    For loops and branches: whatever enters one XLA writes in the order of its axes, so that a parameter which was
    transposed before would be copied, at every call; one that is transposed inside is read where it lies.
    """

    def back(laid: Sequence) -> list:
        pairs = zip(laid, values, strict=True)
        return [now.seen(before.memory) if isinstance(before, Param) else now for now, before in pairs]

    return [value.laid if isinstance(value, Param) else value for value in values], back


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
