"""Whether an array is finite, and where it is not: found where the array lies, which may be on many devices."""

from collections.abc import Sequence

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


def are_finite(w: Float[Array, "..."], axis: int | Sequence[int] | None) -> Bool[Array, "..."]:
    """Whether the numbers along the axes, which stay as 1, are all finite.

    `w - w` is NaN where `w` is not finite, and so is a sum of it. XLA's library on CPU adds numbers several times as
    fast as a loop puts truth values together; its maximum may swallow a NaN.
    """
    return jnp.sum(w - w, axis=axis, keepdims=True) == 0


def greatest(x: Float[Array, "..."], axis: int | Sequence[int]) -> Float[Array, "..."]:
    """The greatest number along the axes, which stay as 1, in float32, or 0 where none is above it.

    Positive floats have the order of their bits, and after them come infinity and NaN, so that the greatest tells
    whether all are finite; a NaN with its sign set counts as below 0. Of a few numbers one such pass is cheaper than a
    maximum of floats and a sum.
    """
    bits = jax.lax.bitcast_convert_type(x.astype(jnp.float32), jnp.int32)
    return jax.lax.bitcast_convert_type(jnp.max(bits, axis, keepdims=True, initial=0), jnp.float32)


@jax.jit
def _all_finite(w: Float[Array, "..."]) -> Bool[Array, ""]:
    return jnp.squeeze(are_finite(w, None))


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
