"""`ragged_dot`, the matmul of a mixture of experts, with the experts' weights in codes.

out[m] = x[m] @ w[e(m)],    e(m) the expert whose group the row m lies in
"""

import dataclasses
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from jaxquant.format import Format
from jaxquant.matmul.choice import FLOAT, INTEGER, not_in_integers
from jaxquant.matmul.tokens import quantize_tokens
from jaxquant.qtensor import QTensor, decode


@dataclasses.dataclass(frozen=True)
class Ragged:
    """One `ragged_dot` of tokens `[M, K]` with experts `[E, K, N]` in codes, as hashable data."""

    activations: Format | None
    precision: Any
    dtype: Any

    def arithmetic(self, q: QTensor) -> tuple[str, str]:
        """How this will be computed, and why not in integers."""
        if known := not_in_integers(q, self.activations, q.shape[1]):
            return known
        in_groups = q.scale.shape[1] != 1 or any(q.scale.shape[axis] not in (1, q.shape[axis]) for axis in (0, 2))
        return (FLOAT, "its scales have groups") if in_groups else (INTEGER, "")

    def forward(self, x: Float[Array, "M K"], q: QTensor, sizes: Int[Array, " E"]) -> Float[Array, "M N"]:
        """The product in the best arithmetic for the experts' format."""
        if self.activations is None or self.arithmetic(q)[0] != INTEGER:
            return self.reference(x, q, sizes)
        ends = jnp.cumsum(sizes)
        expert = jnp.searchsorted(ends, jnp.arange(x.shape[0], dtype=sizes.dtype), side="right")
        fixed = None if q.input_bound is None else _of_expert(q.input_bound, expert)
        tokens = quantize_tokens(x, self.activations, bound=fixed)
        weights = q.codes.astype(jnp.int8)
        precision = jax.lax.Precision.DEFAULT
        sums = jax.lax.ragged_dot(tokens.codes, weights, sizes, precision, preferred_element_type=jnp.int32)
        columns = jnp.sum(weights, axis=1, dtype=jnp.int32, keepdims=True)
        if q.zero is not None:
            zero = q.zero.astype(jnp.int32)
            columns = columns - zero * q.shape[1]
            sums = sums - _of_expert(zero, expert) * jnp.sum(tokens.codes, axis=-1, dtype=jnp.int32, keepdims=True)
        out = sums.astype(jnp.float32)
        if tokens.zero is not None:
            out = out - tokens.zero * _of_expert(columns, expert).astype(jnp.float32)
        served = (jnp.arange(x.shape[0], dtype=sizes.dtype) < ends[-1])[:, None]
        return jnp.where(served, out * tokens.scale * _of_expert(q.scale, expert), 0).astype(self.dtype)

    def reference(self, x: Float[Array, "M K"], q: QTensor, sizes: Int[Array, " E"]) -> Float[Array, "M N"]:
        """The product with the decoded experts."""
        return jax.lax.ragged_dot(x, decode(q), sizes, precision=self.precision, preferred_element_type=self.dtype)


def is_plain(params: Mapping[str, Any]) -> bool:
    """Whether a `ragged_dot_general` is a `ragged_dot`: rows in groups, one matrix `[K, N]` for each group."""
    numbers = params["ragged_dot_dimension_numbers"]
    contracted, batch = numbers.dot_dimension_numbers
    plain = [tuple(map(tuple, contracted)), tuple(map(tuple, batch))] == [((1,), (1,)), ((), ())]
    plain = plain and tuple(numbers.lhs_ragged_dimensions) == (0,) and tuple(numbers.rhs_group_dimensions) == (0,)
    return plain and params["group_offset"] is None


def _of_expert(part: Array, expert: Int[Array, " M"]) -> Array:
    """Each token's scale or zero point `[M, N]`; a part shared by all experts serves every token."""
    return part[:, 0] if part.shape[0] == 1 else part[jnp.minimum(expert, part.shape[0] - 1), 0]
