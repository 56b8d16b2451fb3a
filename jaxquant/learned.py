"""Weights whose ranges training moves: leaves in the place of float arrays, made before training by a function each.

Stepped    scale is a parameter of its own                        LSQ, arXiv:1902.08153
Clipped    scale = clip * (that of the whole range)               the share of the range that is kept, as in PACT
"""

import dataclasses
import functools
import math
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from jaxquant.adapter import is_adapted
from jaxquant.encode import with_master, write
from jaxquant.errors import ClosureError, OptionError
from jaxquant.format import Format
from jaxquant.qtensor import QTensor

Grid = tuple[Float[Array, "..."], Float[Array, "..."]]


@functools.partial(jax.tree_util.register_dataclass, data_fields=["weight", "scale", "zero"], meta_fields=[])
@dataclasses.dataclass(frozen=True)
class Stepped:
    """A weight with learned step sizes.

    The gradient of a step is divided by `sqrt(members * qmax)`, so that steps and weights learn at one rate.

    Args:
      weight: the float array.
      scale: float32; each axis divides the same axis of `weight`.
      zero: float32 of that shape; it does not learn.
    """

    weight: Any
    scale: Any
    zero: Any

    def __jax_array__(self):
        _used_as_array(self)

    def grid(self, q: QTensor, format: Format) -> Grid:
        """The scale, whatever the quantizer would choose."""
        del q
        members = math.prod(self.weight.shape) / max(math.prod(self.scale.shape), 1)
        pace = 1 / math.sqrt(members * format.qmax)
        still = jax.lax.stop_gradient(self.scale)
        scale = still + pace * (self.scale - still)
        return jnp.maximum(jnp.abs(scale), jnp.finfo(jnp.float32).tiny), jax.lax.stop_gradient(self.zero)


@functools.partial(jax.tree_util.register_dataclass, data_fields=["weight", "clip"], meta_fields=[])
@dataclasses.dataclass(frozen=True)
class Clipped:
    """A weight with a learned share of its range, beyond which codes saturate.

    Args:
      weight: the float array.
      clip: float32 of the shape of the scale, 1 for the range that the quantizer would choose.
    """

    weight: Any
    clip: Any

    def __jax_array__(self):
        _used_as_array(self)

    def grid(self, q: QTensor, format: Format) -> Grid:
        """A share of the scale that the quantizer chooses for the weights as they are now."""
        del format
        scale, zero = jax.lax.stop_gradient(_grid_of(q))
        return jnp.maximum(jnp.abs(self.clip), 1e-3) * scale, zero


def _used_as_array(leaf: "Stepped | Clipped"):
    raise ClosureError(
        f"a weight of shape {leaf.weight.shape} with a learned range was used as an array: train it with "
        "jq.qat(fn, format), and serve jq.quantize_params(tree, format) with jq.quantized(fn)."
    )


def stepped(weight: Float[Array, "..."], q: QTensor) -> Stepped:
    """A weight that starts from the steps of its codes."""
    _check_own(q)
    return Stepped(weight, *_grid_of(q))


def clipped(weight: Float[Array, "..."], q: QTensor) -> Clipped:
    """A weight that starts from the range of its codes."""
    _check_own(q)
    return Clipped(weight, jnp.ones_like(q.scale))


def _check_own(q: QTensor) -> None:
    if q.transform or q.kept is not None:
        raise OptionError(f"{q!r}: ranges are learned of a weight itself, not of a rotated, rescaled or split one.")


def is_learned(leaf: Any) -> bool:
    """Whether a leaf is a weight with parameters of its range, for the `is_leaf` of `jax.tree.map`."""
    return isinstance(leaf, Stepped | Clipped)


def plain(leaf: Any) -> Any:
    """The array of a leaf that is to be written in codes, without what is beside it."""
    if is_adapted(leaf):
        return leaf.base
    return leaf.weight if is_learned(leaf) else leaf


def rewritten(leaf: Any, q: QTensor, format: Format) -> Any:
    """A leaf in codes: in its own range, where it has one, or beside its adapter; otherwise as they were given."""
    if is_adapted(leaf):
        return dataclasses.replace(leaf, base=q)
    if not is_learned(leaf):
        return q
    _check_own(q)
    scale, zero = leaf.grid(q, format)
    return write(leaf.weight.astype(jnp.float32), scale, zero, format).astype(q.dtype)


def trained(leaf: Any, q: QTensor, format: Format) -> QTensor:
    """Codes with a master: gradients go to the array, and to the parameters of its range where it has some.

    Where the input of a weight is transformed, its codes are not those of the array, and nothing counts as clipped.
    Codes cannot hold a NaN and a maximum may swallow it: the scales of an array that is not finite are NaN.
    """
    finite = jnp.all(jnp.isfinite(plain(leaf)))
    q = _mastered(leaf, q, format)
    return dataclasses.replace(q, scale=jnp.where(finite, q.scale, jnp.nan))


def _mastered(leaf: Any, q: QTensor, format: Format) -> QTensor:
    if is_learned(leaf):
        scale, zero = leaf.grid(q, format)
        return with_master(rewritten(leaf, q, format), leaf.weight, scale, zero, format)
    if q.transform or q.kept is not None:
        return dataclasses.replace(jax.lax.stop_gradient(q), master=leaf)
    scale, zero = jax.lax.stop_gradient(_grid_of(q))
    return with_master(q, leaf, scale, zero, format)


def _grid_of(q: QTensor) -> Grid:
    """The scale and zero point of codes that are those of the weight itself."""
    return q.scale, jnp.zeros_like(q.scale) if q.zero is None else q.zero.astype(jnp.float32)
