"""Records: what rules remember of the parameters they met, and how it is put together.

A record is a monoid in the shape of a pytree, so that it can be carried, stacked and switched like any result.
"""

import dataclasses
from collections.abc import Hashable
from typing import Any, Protocol, runtime_checkable

import jax
import jax.numpy as jnp


@dataclasses.dataclass(frozen=True)
class Place:
    """Where in the program an equation is; the same each time a body is traced, so that records are keyed by it.

    Args:
      address: the numbers of the equations that lead to it, and which body of them.
      body: the part of the address that leads to the body of the innermost loop or branch around it.
      depth: how many such bodies are around it.
    """

    address: tuple[Hashable, ...] = ()
    body: tuple[Hashable, ...] = ()
    depth: int = 0

    def equation(self, number: int) -> "Place":
        """An equation here."""
        return Place((*self.address, number), self.body, self.depth)

    def inside(self, body: Hashable) -> "Place":
        """A body of the equation here."""
        address = (*self.address, body)
        return Place(address, address, self.depth + 1)


@runtime_checkable
class Record(Protocol):
    """What a rule records of a meeting: a pytree whose unit is all zeros."""

    def merge(self, other: Any) -> Any:
        """One record of what two of them saw."""
        ...

    def leave(self, loop: int) -> Any:
        """The record outside a loop from its stacked records inside: as they are, or merged over the turns."""
        ...


Records = dict[Hashable, Any]


def merged(records: Records, more: Records) -> Records:
    """The union, with records of one key merged."""
    return records | {key: records[key].merge(new) if key in records else new for key, new in more.items()}


def nothing(records: Records) -> Records:
    """The units of records of given shapes."""
    return jax.tree.map(lambda part: jnp.zeros(part.shape, part.dtype), records)
