"""Whether an array is finite, and where it is not: found where the array lies, which may be on many devices."""

import jax
import jax.numpy as jnp
from jax.core import Tracer
from jax.typing import ArrayLike
from jaxtyping import Array, Bool, Float, Int


def is_finite(w: ArrayLike) -> bool:
    """Whether an array is finite; one that is being traced counts as such."""
    if isinstance(w, Tracer):
        return True
    with jax.ensure_compile_time_eval():  # a constant of a function that is being traced is known
        return bool(_all_finite(w))


@jax.jit
def _all_finite(w: Float[Array, "..."]) -> Bool[Array, ""]:
    return jnp.all(jnp.isfinite(w))


def first_nonfinite(w: Float[Array, "..."], name: str) -> str:
    """Says where an array has its first NaN or infinity, and what to do about it."""
    index, value = _find(w)
    return f"{name}{[int(i) for i in index]} is {value}: mend the weights, or leave this array out (`where=`)."


@jax.jit
def _find(w: Float[Array, "..."]) -> tuple[list[Int[Array, ""]], Float[Array, ""]]:
    """The first index, axis after axis, and what is there: by reductions alone, so that no device gathers the array."""
    there, index = ~jnp.isfinite(w), []
    for axis, size in enumerate(w.shape):
        others = tuple(other for other in range(w.ndim) if other != axis)
        index.append(jnp.argmax(jnp.any(there, others)))
        there &= jnp.expand_dims(jnp.arange(size) == index[-1], others)
    return index, jnp.sum(jnp.where(there, w, 0).astype(jnp.float32))
