"""`Adapted`: a weight and a low-rank correction beside it, the leaf that LoRA trains.

    w ~= base + scaling * sum_r a[r] * b[r],      x @ w ~= x @ base + scaling * (x @ A) @ B       arXiv:2106.09685

Every `a[r]` is full along the stack and the inputs and 1 along the outputs, every `b[r]` full along the stack and the
outputs: their axes divide those of the weight as a scale's do, so that they follow transposes, slices and loops alike.
"""

import dataclasses
import functools
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from jaxquant.errors import ClosureError, FormatError
from jaxquant.format import holds
from jaxquant.qtensor import decode, is_qtensor
from jaxquant.turned import is_in_codes, is_turned, upright


@functools.partial(jax.tree_util.register_dataclass, data_fields=["a", "b"], meta_fields=["scaling"])
@dataclasses.dataclass(frozen=True)
class Adapter:
    """What is trained.

    Args:
      a: float32 `[rank, *shape]`, 1 along the outputs.
      b: float32 `[rank, *shape]`, 1 along the inputs; zeros at first.
      scaling: static; alpha / rank.
    """

    a: Any
    b: Any
    scaling: float

    @property
    def product(self) -> Float[Array, "..."]:
        """The correction as an array."""
        return self.scaling * jnp.sum(self.a * self.b, axis=0)


@functools.partial(jax.tree_util.register_dataclass, data_fields=["base", "adapter"], meta_fields=[])
@dataclasses.dataclass(frozen=True)
class Adapted:
    """A weight, in float or in codes, with an adapter; it stands for an array as a `QTensor` does."""

    base: Any
    adapter: Adapter

    @property
    def shape(self) -> tuple[int, ...]:
        """The shape of the array this stands for."""
        return self.base.shape

    @property
    def ndim(self) -> int:
        """Its rank."""
        return len(self.base.shape)

    @property
    def dtype(self) -> Any:
        """The dtype of the array this stands for."""
        return self.base.dtype

    def __jax_array__(self):
        raise ClosureError(
            f"a weight of shape {self.shape} with an adapter was used as an array: call jq.quantized(fn) with the "
            "tree as an argument, or jq.merge_lora(tree) first."
        )


@functools.partial(jax.tree_util.register_dataclass, data_fields=["base", "a", "b"], meta_fields=["scaling"])
@dataclasses.dataclass(frozen=True)
class Sides:
    """An `Adapted` on its way through a function: a bundle of parts that all have the weight's rank."""

    base: Any
    a: tuple[Any, ...]
    b: tuple[Any, ...]
    scaling: float

    @classmethod
    def of(cls, leaf: Adapted) -> "Sides":
        """The adapter taken apart."""
        rank = leaf.adapter.a.shape[0]
        a, b = (tuple(part[r] for r in range(rank)) for part in (leaf.adapter.a, leaf.adapter.b))
        return cls(leaf.base, a, b, leaf.adapter.scaling)

    @property
    def shape(self) -> tuple[int, ...]:
        """The shape of the array this stands for."""
        return self.base.shape

    @property
    def ndim(self) -> int:
        """Its rank."""
        return len(self.base.shape)

    @property
    def dtype(self) -> Any:
        """Its dtype."""
        return self.base.dtype

    @property
    def blocks(self) -> tuple[int, ...]:
        """The lengths that a slice must leave whole: those of the base."""
        return getattr(self.base, "blocks", (1,) * self.ndim)

    @property
    def description(self) -> str:
        """Its format in words."""
        base = getattr(self.base, "description", jnp.dtype(self.base.dtype).name)
        return f"{base} + rank {len(self.a)}"

    def astype(self, dtype: Any) -> "Sides":
        """The same in another dtype."""
        return dataclasses.replace(self, base=self.base.astype(dtype))

    def decode(self) -> Float[Array, "..."]:
        """The array this stands for."""
        base = decode(self.base) if is_qtensor(self.base) else self.base
        product = sum(a.astype(jnp.float32) * b for a, b in zip(self.a, self.b, strict=True))
        return (base.astype(jnp.float32) + self.scaling * product).astype(self.dtype)


def is_adapted(leaf: Any) -> bool:
    """Whether a leaf is a weight with an adapter, for the `is_leaf` of `jax.tree.map`."""
    return isinstance(leaf, Adapted)


def entered(leaf: Any) -> Any:
    """A leaf as a walk takes it: an adapter taken apart, a turned weight as it is stored, scales in codes decoded.

    Raises:
      FormatError: the codes were cast to another dtype.
    """
    if is_turned(leaf):
        return entered(leaf.stored)
    if is_adapted(leaf):
        return Sides.of(dataclasses.replace(leaf, base=entered(upright(leaf.base))))
    if is_qtensor(leaf) and not holds(leaf.codes.dtype, leaf.bits):
        raise FormatError(
            f"a QTensor of shape {leaf.shape} has its {leaf.bits}-bit codes in {leaf.codes.dtype}: a cast of the whole "
            "tree casts codes too. Map over `is_leaf=lambda leaf: isinstance(leaf, jq.QTensor)`; its own `astype` "
            "says what it decodes to."
        )
    return leaf.settled if is_qtensor(leaf) else leaf


def is_leaf(leaf: Any) -> bool:
    """Whether a leaf is more than an array, for the `is_leaf` of `jax.tree.map`."""
    return is_adapted(leaf) or is_in_codes(leaf)
