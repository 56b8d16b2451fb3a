"""Convolutions with a kernel in codes: integer arithmetic where the kernel has one scale per output channel."""

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from jaxquant.encode import quantize
from jaxquant.format import Format
from jaxquant.matmul.arithmetic import FLOAT, INTEGER, WEIGHT_ONLY
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
        if not q.is_integer:
            return WEIGHT_ONLY, "its codes are not integers"
        if any(n != 1 for axis, n in enumerate(q.scale.shape) if axis != outputs):
            return FLOAT, "its scales vary along the kernel's inputs"
        if dict(self.geometry)["batch_group_count"] != 1:
            return FLOAT, "it groups the batch"
        return (INTEGER, "") if self.activations is not None else (WEIGHT_ONLY, "activations=None")

    def forward(self, x: Float[Array, "..."], q: QTensor) -> Float[Array, "..."]:
        """The convolution in the best arithmetic for the kernel's format."""
        if self.activations is None or self.arithmetic(q)[0] != INTEGER:
            return self.reference(x, q)
        numbers = self._numbers()
        example = tuple(axis for axis in range(x.ndim) if axis != numbers.lhs_spec[0])
        codes = quantize(x, self.activations, axis=example)
        finite = jnp.all(jnp.isfinite(x), axis=example, keepdims=True)
        of_example = jnp.where(finite, codes.scale, jnp.nan).reshape(-1)
        image, kernel = codes.codes.astype(jnp.int8), q.codes.astype(jnp.int8)
        total = self._convolve(image, kernel, jnp.int32) - self._of_zero(image, q)
        out = total.astype(jnp.float32) * _along(of_example, numbers.out_spec[0], x.ndim)
        return (out * _along(q.scale.reshape(-1), numbers.out_spec[1], x.ndim)).astype(self.dtype)

    def reference(self, x: Float[Array, "..."], q: QTensor) -> Float[Array, "..."]:
        """The convolution with the decoded kernel."""
        return self._convolve(x, decode(q), None).astype(self.dtype)

    def _of_zero(self, image: Array, q: QTensor) -> Array:
        """What the zero points add: `zero * (the image under a kernel of ones)`, one such sum per feature group."""
        if q.zero is None:
            return jnp.zeros((), jnp.int32)
        numbers, groups = self._numbers(), dict(self.geometry)["feature_group_count"]
        ones = list(q.shape)
        ones[numbers.rhs_spec[0]] = groups
        sums = self._convolve(image, jnp.ones(ones, jnp.int8), jnp.int32)
        outputs = q.shape[numbers.rhs_spec[0]]
        sums = jnp.repeat(sums, outputs // groups, axis=numbers.out_spec[1], total_repeat_length=outputs)
        return sums * _along(q.zero.reshape(-1), numbers.out_spec[1], image.ndim).astype(jnp.int32)

    def _convolve(self, x: Array, kernel: Array, dtype) -> Array:
        return jax.lax.conv_general_dilated(x, kernel, **dict(self.geometry), preferred_element_type=dtype)

    def _numbers(self) -> jax.lax.ConvDimensionNumbers:
        return dict(self.geometry)["dimension_numbers"]


def _along(vector: Float[Array, " n"], axis: int, rank: int) -> Array:
    """A vector laid along one axis of an array of a rank."""
    return vector.reshape([vector.size if a == axis else 1 for a in range(rank)])
