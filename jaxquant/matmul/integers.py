"""Exact integer matmuls of codes, in the forms that XLA has fast kernels for.

    sums = x @ w      int8 x int8 -> int32 in every group of every matrix

XLA on CPU reaches its library only where both sides of an int8 product have two rows or more, and unpacks 4- and 2-bit
arrays an element at a time. There a single row is padded to two, and packed codes are read as bytes: a byte holds
neighbouring outputs, which two shifts tell apart.
"""

import jax
import jax.numpy as jnp
from jaxtyping import Array, Int8, Int32, Shaped

from jaxquant.packed import bytes_of, places_of, unpacked

# |activation code| <= 128 and |code - zero| <= 255: longer sums could overflow an int32.
LONGEST = (2**31 - 1) // (128 * 255)
# A matmul for each place in a byte pays from this many outputs on.
_WIDE = 256
# Up to this many rows the weight is the left operand where it can be: of more rows the product would have to be turned.
_SHORT = 64


def integer_dot(
    x: Int8[Array, "B G M k"], w: Shaped[Array, "B G k N"], inputs_last: bool = False
) -> Int32[Array, "B G M N"]:
    """The product of the codes of activations and those of weights in any integer container.

    Args:
      x: the activations.
      w: the weights.
      inputs_last: whether their inputs are what lies together in memory.
    """
    if inputs_last:
        return jax.lax.platform_dependent(x, w, cpu=_turned, default=_widened)
    rows, packed = x.shape[2], places_of(w.dtype)
    by_bytes = packed > 1 and w.shape[-1] % packed == 0 and w.shape[-1] >= packed * _WIDE
    if rows > 1 and not by_bytes:
        return _widened(x, w)

    def on_cpu(x, w):
        x = jnp.pad(x, ((0, 0), (0, 0), (0, 1), (0, 0))) if rows == 1 else x
        return (_by_bytes if by_bytes else _widened)(x, w)[:, :, :rows]

    return jax.lax.platform_dependent(x, w, cpu=on_cpu, default=_widened)


def _widened(x: Int8[Array, "B G M k"], w: Shaped[Array, "B G k N"]) -> Int32[Array, "B G M N"]:
    return batched_dot(x, w.astype(jnp.int8), jnp.int32)


def _turned(x: Int8[Array, "B G M k"], w: Shaped[Array, "B G k N"]) -> Int32[Array, "B G M N"]:
    """The weight as it lies, `[N, k]`, and the left operand of a few rows: the right one the library packs anew."""
    rows = x.shape[2]
    padded = jnp.pad(x, ((0, 0), (0, 0), (0, max(0, 2 - rows)), (0, 0)))
    x2, w2 = _plain(padded), _plain(w.astype(jnp.int8))
    # Turned after the reshape, where XLA sees that a transpose of a transpose is nothing, and held, or it would fold
    # one of them into the matmul, which then is not one for the library.
    lies = jax.lax.optimization_barrier(jnp.swapaxes(w2, -1, -2))
    last, batch = x2.ndim - 1, tuple(range(x2.ndim - 2))
    operands = (lies, x2) if rows <= _SHORT else (x2, lies)
    out = jax.lax.dot_general(*operands, (((last,), (last,)), (batch, batch)), preferred_element_type=jnp.int32)
    if rows <= _SHORT:
        out = jnp.swapaxes(jax.lax.optimization_barrier(out), -1, -2)  # or XLA swaps the operands back
    return out.reshape(*padded.shape[:3], w.shape[3])[:, :, :rows]


def _by_bytes(x: Int8[Array, "B G M k"], w: Shaped[Array, "B G k N"]) -> Int32[Array, "B G M N"]:
    """Packed codes as the bytes they lie in, one matmul for each place in a byte."""
    packed, held = places_of(w.dtype), bytes_of(w)
    outs = [batched_dot(x, unpacked(held, place, packed), jnp.int32) for place in range(packed)]
    return jnp.stack(outs, axis=-1).reshape(*x.shape[:3], w.shape[-1])


def batched_dot(x: Array, w: Array, dtype) -> Array:
    """`x[B, G, M, k] @ w[B, G, k, N]`, in the form of `_plain`."""
    x2, w2 = _plain(x), _plain(w)
    batch = tuple(range(x2.ndim - 2))
    numbers = (((x2.ndim - 1,), (x2.ndim - 2,)), (batch, batch))
    out = jax.lax.dot_general(x2, w2, numbers, preferred_element_type=dtype)
    return out.reshape(*x.shape[:3], w.shape[3])


def _plain(matrices: Array) -> Array:
    """Without the two batch axes where they are 1: XLA's fast paths look for plain matrices."""
    return matrices.reshape(*[n for n in matrices.shape[:2] if n != 1], *matrices.shape[2:])
