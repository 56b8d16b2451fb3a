"""Whether an array is finite, and where it is not: found where the array lies, which may be on many devices."""

from collections.abc import Mapping, Sequence

import jax
import jax.numpy as jnp
from jax.core import Tracer
from jax.typing import ArrayLike
from jaxtyping import Array, Bool, Float, Int

from jaxquant.errors import NonFiniteError


def check_finite(arrays: Mapping[str, ArrayLike]) -> None:
    """Checks named arrays, all of them before an answer is waited for; one that is being traced counts as finite.

    Raises:
      NonFiniteError: names the first that is not, and where.
    """
    known = {name: w for name, w in arrays.items() if not isinstance(w, Tracer)}
    with jax.ensure_compile_time_eval():  # a constant of a function that is being traced is known
        answers = {name: _answer(w) for name, w in known.items()}
        for name, finite in answers.items():
            if not finite:
                raise NonFiniteError(_first(jnp.asarray(known[name]), name))


def _answer(w: ArrayLike) -> Bool[Array, ""]:
    """Whether an array is finite; one that the host has is copied to the device, and only one at a time."""
    answer = _all_finite(w)
    return answer if isinstance(w, jax.Array) else jax.block_until_ready(answer)


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


def _first(w: Float[Array, "..."], name: str) -> str:
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
