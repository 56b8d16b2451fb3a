"""Writing an array in codes: `quantize`, and `fake_quantize` for training.

encode   codes = clamp(round(w / scale) + zero, qmin, qmax)
"""

import dataclasses
import functools
import itertools
import operator
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jax.custom_derivatives import SymbolicZero
from jax.typing import ArrayLike
from jaxtyping import Array, Float, Shaped

from jaxquant.errors import NotQuantizableError, ShapeError
from jaxquant.finite import check_finite
from jaxquant.format import Format, int8
from jaxquant.qtensor import QTensor, decode
from jaxquant.trace.views import expand
from jaxquant.values import look_up

Axes = int | Sequence[int]


def quantize(w: ArrayLike | QTensor, format: Format = int8, *, axis: Axes = -2, clip: ArrayLike = 1.0) -> QTensor:
    """Writes an array in the codes of a format.

        scale = clip * max|w| / qmax                                symmetric, floats and codebooks
        scale = clip * (max(w, 0) - min(w, 0)) / (qmax - qmin)      affine
        zero = round(qmin - clip * min(w, 0) / scale)
        codes = clamp(round(w / scale) + zero, qmin, qmax)

    Statistics and quotient are float32 whatever the dtype. A channel of zeros gets scale 1 and codes that decode to 0.

    Args:
      w: a float array of any shape.
      format: which codes, and how many weights share a scale.
      axis: the contracted axis or axes (the inputs of a matmul), which share a scale; -2 for a matrix `[in, out]`.
        Ignored where the format is per tensor.
      clip: the share of the range that is kept; what lies beyond saturates. Broadcasts against the scale.

    Returns:
      A `QTensor` whose scale is 1 along `axis` (or counts the groups along its last axis) and full along the others.

    Raises:
      NotQuantizableError: `w` is not a float array, or is a `QTensor` already.
      NonFiniteError: `w` has a NaN or an infinity.
      ShapeError: `axis` is out of range or the group does not divide it.
    """
    array, axes = _checked(w, format, axis)
    return _quantize(array, jnp.asarray(clip, jnp.float32), format, axes)


def fake_quantize(
    w: ArrayLike | QTensor, format: Format = int8, *, axis: Axes = -2, clip: ArrayLike = 1.0
) -> Float[Array, "..."]:
    """Quantizes and decodes at once, with the straight-through gradient.

        y = decode(quantize(w)),    dy/dw = 1 inside the clipping range, 0 outside

    Args, Returns and Raises are those of `quantize`, but for an array of the shape and dtype of `w`. The scale is a
    constant to the gradient (Bengio et al., arXiv:1308.3432).
    """
    array, axes = _checked(w, format, axis)
    return _fake_quantize(array, jnp.asarray(clip, jnp.float32), format, axes)


@functools.partial(jax.jit, static_argnums=(2, 3))
def _fake_quantize(w: Array, clip: Array, format: Format, axes: tuple[int, ...]) -> Array:
    grid = jax.lax.stop_gradient(fit(w, format, axes, clip))
    return decode(with_master(write(w, *grid, format), w, *grid, format))


def _checked(w: ArrayLike | QTensor, format: Format, axis: Axes) -> tuple[Array, tuple[int, ...]]:
    """A float array that can be quantized, and the axes that share a scale."""
    if isinstance(w, QTensor):
        raise NotQuantizableError(f"{w!r} is quantized already; quantize jq.dequantize(q) if that is what you want.")
    try:
        array = jnp.asarray(w)
    except (TypeError, ValueError):
        raise NotQuantizableError(f"{w!r} was given: only floating-point arrays are quantized.") from None
    if not jnp.issubdtype(array.dtype, jnp.floating):
        raise NotQuantizableError(f"an array of {array.dtype} was given: only floating-point arrays are quantized.")
    axes = _contracted(array.shape, format, axis)
    check_finite({"w": array})
    return array, axes


def _contracted(shape: tuple[int, ...], format: Format, axis: Axes) -> tuple[int, ...]:
    """The axes that share a scale, as sorted non-negative numbers."""
    rank = len(shape)
    if not format.per_channel:
        return tuple(range(rank))
    axes = (axis,) if isinstance(axis, int) else tuple(axis)
    if any(not -rank <= a < rank for a in axes):
        raise ShapeError(
            f"axis={axis} is out of range for shape {shape}: name the contracted axes, or use a scale for the whole "
            "array with format(per_channel=False)."
        )
    return tuple(sorted({a % rank for a in axes}))


def group_sizes(n: int) -> list[int]:
    """The group sizes that divide `n` inputs, from 8 up where there are any."""
    divisors = [d for d in range(1, n + 1) if n % d == 0]
    return [d for d in divisors if 8 <= d < n] or divisors


@functools.partial(jax.jit, static_argnums=(2, 3))
def _quantize(w: Array, clip: Array, format: Format, axes: tuple[int, ...]) -> QTensor:
    return write(w, *fit(w, format, axes, clip), format)


def write(w: Float[Array, "..."], scale: Float[Array, "..."], zero: Float[Array, "..."], format: Format) -> QTensor:
    """The codes nearest to an array, for scales and zero points that divide its axes, found by whatever means."""
    return assemble(encode(w, scale, zero, format), scale, zero, w.dtype, format)


def assemble(codes: Array, scale: Array, zero: Array, dtype: Any, format: Format) -> QTensor:
    """A `QTensor` of codes, scales and zero points given as float32 numbers."""
    kept = None if format.symmetric else zero.astype(format.container)
    return QTensor(codes.astype(format.container), scale, kept, dtype, format.bits, format.levels)


def fit(
    w: Float[Array, "..."], format: Format, axes: tuple[int, ...], clip: ArrayLike = 1.0
) -> tuple[Float[Array, "..."], Float[Array, "..."]]:
    """The scale and zero point of each group's range, in float32; zero is 0 for a symmetric format."""
    # Extremes are exact in any dtype, and a float32 copy of the whole array here would be kept for the quotient too.
    members, over = _grouped(w, format, axes if format.per_channel else tuple(range(w.ndim)))
    # Sizes take one reduction where extremes take two, but those of groups, or of another dtype, XLA on CPU would first
    # write to memory.
    if format.symmetric and members is w and w.dtype == jnp.float32:
        high = jnp.max(jnp.abs(w), over, initial=0.0, keepdims=True)
        low = -high
    else:
        low, high = extremes(members, over)
    last = (axes[-1] + 1,) if format.group and axes else ()
    low, high = (jnp.asarray(clip) * jnp.squeeze(bound, last).astype(jnp.float32) for bound in (low, high))
    return fit_range(low, high, format)


def extremes(w: Float[Array, "..."], axes: Axes) -> tuple[Float[Array, "..."], Float[Array, "..."]]:
    """The least and the greatest number along the axes, which stay as 1, or 0, in the dtype of the array."""
    return jnp.min(w, axes, initial=0.0, keepdims=True), jnp.max(w, axes, initial=0.0, keepdims=True)


def fit_range(low: Float[Array, "..."], high: Float[Array, "..."], format: Format) -> tuple[Array, Array]:
    """The scale and zero point of ranges from `low <= 0` to `high >= 0`; zero is 0 for a symmetric format."""
    if format.symmetric:
        scale = jnp.maximum(-low, high) / format.qmax
        return positive(scale, high - low), jnp.zeros_like(scale)
    # Halves, because max - min of +-3e38 is beyond float32.
    scale = positive((high / 2 - low / 2) / ((format.qmax - format.qmin) / 2), high - low)
    return scale, jnp.clip(jnp.round(format.qmin - low / scale), format.qmin, format.qmax)


def positive(scale: Float[Array, "..."], spread: Float[Array, "..."]) -> Float[Array, "..."]:
    """1 where there is nothing but zeros, never a denormal, which XLA would flush to zero, and NaN where a NaN is."""
    return jnp.where(spread == 0, 1.0, jnp.maximum(scale, jnp.finfo(jnp.float32).tiny))


def _grouped(w: Array, format: Format, axes: tuple[int, ...]) -> tuple[Array, tuple[int, ...]]:
    """The array with its groups on an axis of their own, and the axes that share a scale."""
    if not (format.group and axes):
        return w, axes
    last, group = axes[-1], format.group
    if w.shape[last] % group:
        raise ShapeError(
            f"group={group} does not divide the {w.shape[last]} inputs of shape {w.shape} (axis {last}); "
            f"groups that do: {group_sizes(w.shape[last])}."
        )
    return w.reshape(*w.shape[:last], w.shape[last] // group, group, *w.shape[last + 1 :]), (last + 1,)


def _quotient(w: Array, scale: Array) -> Array:
    """`w / scale` in float32; XLA may multiply by `1 / scale`, which it would flush to zero beyond 2^126."""
    shrink = jnp.where(scale > 2.0**100, jnp.float32(2.0**-32), jnp.float32(1))
    return (w.astype(jnp.float32) * shrink) / (scale * shrink)


def encode(
    w: Float[Array, "..."], scale: Float[Array, "..."], zero: Float[Array, "..."], format: Format
) -> Shaped[Array, "..."]:
    """The codes nearest to an array, as numbers, not in their container yet."""
    scale = expand(scale, w.shape)
    if format.levels is not None:
        # Against scaled middles, because a quotient used fifteen times would be kept in memory.
        middles = [(a + b) / 2 for a, b in itertools.pairwise(format.levels)]
        above = [(w.astype(jnp.float32) > middle * scale).astype(jnp.int8) for middle in middles]
        return functools.reduce(operator.add, above) - len(format.levels) // 2
    ratio = _quotient(w, scale)
    if format.dtype is not None:
        return jnp.clip(ratio, format.qmin, format.qmax)
    return jnp.clip(jnp.round(ratio) + expand(zero, w.shape), format.qmin, format.qmax)


def value(
    codes: Shaped[Array, "..."], scale: Float[Array, "..."], zero: Float[Array, "..."], format: Format
) -> Float[Array, "..."]:
    """What codes given as float32 numbers decode to: `decode` without the containers."""
    scale, zero = expand(scale, codes.shape), expand(zero, codes.shape)
    if format.levels is not None:
        return look_up(codes, format.levels) * scale
    if format.dtype is not None:
        return codes.astype(format.dtype).astype(jnp.float32) * scale
    return (codes - zero) * scale


def with_master(q: QTensor, w: Float[Array, "..."], scale: Array, zero: Array, format: Format) -> QTensor:
    """Codes through which gradients go straight to the array and the scale that they were written from.

    dv/dw = 1 inside the clipping range, 0 outside
    dv/dscale = (code - zero) - w / scale inside, code - zero outside          (LSQ, arXiv:1902.08153)
    """
    return dataclasses.replace(jax.lax.stop_gradient(q), master=_master(w, scale, zero, format))


@functools.partial(jax.custom_jvp, nondiff_argnums=(3,))
def _master(w: Array, scale: Array, zero: Array, format: Format) -> Array:
    del scale, zero, format
    return w


@functools.partial(_master.defjvp, symbolic_zeros=True)
def _derivative(format: Format, primals, tangents):
    (w, scale, zero), (dw, dscale, _) = primals, tangents
    ratio = _quotient(w, expand(scale, w.shape))
    code = ratio + expand(zero, w.shape)
    # Half a step of slack on a grid: what still rounds to the outermost code is inside.
    slack = 0.5 if format.is_integer else 1e-3 * format.qmax
    inside = (code >= format.qmin - slack) & (code <= format.qmax + slack)
    moved = jnp.zeros_like(w) if isinstance(dw, SymbolicZero) else jnp.where(inside, dw, 0).astype(w.dtype)
    if not isinstance(dscale, SymbolicZero):
        step = value(encode(w, scale, zero, format), jnp.ones_like(scale), zero, format) - jnp.where(inside, ratio, 0)
        moved += (step * expand(dscale, w.shape)).astype(w.dtype)
    return w, moved
