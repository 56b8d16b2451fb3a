"""Rounding at random: up with the probability of the fraction, so that the mean over keys is the number itself."""

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Key


def round_at_random(ratio: Float[Array, "..."], key: Key[Array, ""]) -> Float[Array, "..."]:
    """`floor(ratio + u)`, u uniform in [0, 1).

    The key is folded with the first number, so that arrays that share a key have noise of their own.
    """
    first = jax.lax.bitcast_convert_type(ratio[(slice(1),) * ratio.ndim].sum(), jnp.uint32)
    return jnp.floor(ratio + jax.random.uniform(jax.random.fold_in(key, first), ratio.shape))
