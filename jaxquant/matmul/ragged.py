"""`ragged_dot`, the matmul of a mixture of experts, with the experts' weights in codes.

out[m] = x[m] @ w[e(m)],    e(m) the expert whose group the row m lies in
"""

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from jaxquant.format import Format
from jaxquant.matmul.arithmetic import FLOAT, INTEGER, WEIGHT_ONLY, quantize_tokens
from jaxquant.qtensor import QTensor, decode


@dataclasses.dataclass(frozen=True)
class Ragged:
    """One `ragged_dot` of tokens `[M, K]` with experts `[E, K, N]` in codes, as hashable data."""

    activations: Format | None
    precision: Any
    dtype: Any

    def arithmetic(self, q: QTensor) -> tuple[str, str]:
        """How this will be computed, and why not in integers."""
        if not q.is_integer:
            return WEIGHT_ONLY, "its codes are not integers"
        if q.scale.shape[1] != 1 or q.scale.shape[2] not in (1, q.shape[2]) or q.scale.shape[0] not in (1, q.shape[0]):
            return FLOAT, "its scales have groups"
        return (INTEGER, "") if self.activations is not None else (WEIGHT_ONLY, "activations=None")

    def forward(self, x: Float[Array, "M K"], q: QTensor, sizes: Int[Array, " E"]) -> Float[Array, "M N"]:
        """The product in the best arithmetic for the experts' format."""
        if self.activations is None or self.arithmetic(q)[0] != INTEGER:
            return self.reference(x, q, sizes)
        codes, of_token = quantize_tokens(x, self.activations)
        total = jax.lax.ragged_dot(codes, q.codes.astype(jnp.int8), sizes, preferred_element_type=jnp.int32)
        expert = jnp.searchsorted(jnp.cumsum(sizes), jnp.arange(x.shape[0], dtype=sizes.dtype), side="right")
        if q.zero is not None:
            inside = (expert < q.shape[0])[:, None]
            zero = jnp.where(inside, _of_expert(q.zero, expert).astype(jnp.int32), 0)
            total = total - zero * jnp.sum(codes, axis=-1, dtype=jnp.int32, keepdims=True)
        return (total.astype(jnp.float32) * of_token * _of_expert(q.scale, expert)).astype(self.dtype)

    def reference(self, x: Float[Array, "M K"], q: QTensor, sizes: Int[Array, " E"]) -> Float[Array, "M N"]:
        """The product with the decoded experts."""
        return jax.lax.ragged_dot(x, decode(q), sizes, precision=self.precision, preferred_element_type=self.dtype)


def _of_expert(part: Array, expert: Int[Array, " M"]) -> Array:
    """Each token's scale or zero point `[M, N]`; a part shared by all experts serves every token."""
    return part[:, 0] if part.shape[0] == 1 else part[jnp.minimum(expert, part.shape[0] - 1), 0]
