"""Convolutions with a kernel in codes: integer arithmetic where the kernel has one scale per output channel."""

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Shaped

from jaxquant.format import Format
from jaxquant.matmul.choice import FLOAT, INTEGER, not_in_integers
from jaxquant.matmul.tokens import quantize_tokens
from jaxquant.qtensor import QTensor, decode


@dataclasses.dataclass(frozen=True)
class Conv:
    """One `conv_general_dilated` with a kernel in codes, as hashable data.

    Args:
      geometry: the arguments of `jax.lax.conv_general_dilated` by name, as sorted pairs.
      activations: the format of the activations (a scale per example), or None.
      dtype: the result's.
    """

    geometry: tuple[tuple[str, Any], ...]
    activations: Format | None
    dtype: Any

    def arithmetic(self, q: QTensor) -> tuple[str, str]:
        """How this will be computed, and why not in integers."""
        outputs = self._numbers().rhs_spec[0]
        if known := not_in_integers(q, self.activations, q.size // max(q.shape[outputs], 1)):
            return known
        if any(n != 1 for axis, n in enumerate(q.scale.shape) if axis != outputs):
            return FLOAT, "its scales vary along the kernel's inputs: let `stats` tell them"
        return (FLOAT, "it groups the batch") if dict(self.geometry)["batch_group_count"] != 1 else (INTEGER, "")

    def forward(self, x: Float[Array, "..."], q: QTensor) -> Float[Array, "..."]:
        """The convolution in the best arithmetic for the kernel's format."""
        if self.activations is None or self.arithmetic(q)[0] != INTEGER:
            return self.reference(x, q)
        numbers = self._numbers()
        example = tuple(axis for axis in range(x.ndim) if axis != numbers.lhs_spec[0])
        image = quantize_tokens(x, self.activations, axis=example, bound=q.input_bound)
        sums = self._sums(image.codes, q).astype(jnp.float32)
        if image.zero is not None:
            # The sums of the kernel under the image, which are smaller at the borders: padding is zero, not `zero`.
            one = [1 if axis == numbers.lhs_spec[0] else n for axis, n in enumerate(x.shape)]
            under = self._sums(jnp.ones(one, jnp.int8), q).astype(jnp.float32)
            sums = sums - _along(image.zero.reshape(-1), numbers.out_spec[0], x.ndim) * under
        out = sums * _along(image.scale.reshape(-1), numbers.out_spec[0], x.ndim)
        return (out * _along(q.scale.reshape(-1), numbers.out_spec[1], x.ndim)).astype(self.dtype)

    def reference(self, x: Float[Array, "..."], q: QTensor) -> Float[Array, "..."]:
        """The convolution with the decoded kernel."""
        return self._convolve(x, decode(q), None).astype(self.dtype)

    def _sums(self, image: Array, q: QTensor) -> Array:
        """`image * (codes - zero)` in int32: a zero point is times an image under ones, per feature group."""
        total = self._convolve(image, q.codes.astype(jnp.int8), jnp.int32)
        if q.zero is None:
            return total
        numbers, groups = self._numbers(), dict(self.geometry)["feature_group_count"]
        outputs, ones = q.shape[numbers.rhs_spec[0]], list(q.shape)
        ones[numbers.rhs_spec[0]] = groups
        under = self._convolve(image, jnp.ones(ones, jnp.int8), jnp.int32)
        under = jnp.repeat(under, outputs // groups, axis=numbers.out_spec[1], total_repeat_length=outputs)
        return total - under * _along(q.zero.reshape(-1), numbers.out_spec[1], image.ndim).astype(jnp.int32)

    def _convolve(self, x: Array, kernel: Array, dtype) -> Array:
        return jax.lax.conv_general_dilated(x, kernel, **dict(self.geometry), preferred_element_type=dtype)

    def _numbers(self) -> jax.lax.ConvDimensionNumbers:
        return dict(self.geometry)["dimension_numbers"]


def _along(vector: Shaped[Array, " n"], axis: int, rank: int) -> Array:
    """A vector laid along one axis of an array of a rank."""
    return vector.reshape([vector.size if a == axis else 1 for a in range(rank)])
