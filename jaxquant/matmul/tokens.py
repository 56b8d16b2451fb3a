"""Activations in codes: each token with a scale of its own, and its largest numbers beside them in float.

x[m, k] = scale[m] * (codes[m, k] - zero[m])  +  the outliers of token m
"""

import functools
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int, Int8

from jaxquant.encode import Axes, extremes, fit_range, write
from jaxquant.errors import FormatError
from jaxquant.finite import are_finite, greatest
from jaxquant.format import Format
from jaxquant.qtensor import QTensor

# Up to this many numbers one pass over their bits is faster than three of XLA's library over the numbers themselves.
_FEW = 2**16


class Tokens(NamedTuple):
    """Activations in codes: `x = (codes - zero) * scale`, a scale and a zero point for each token."""

    codes: Int8[Array, "*rows K"]
    scale: Float[Array, "*ones"]
    zero: Float[Array, "*ones"] | None


def check_activations(activations: Format | None, outliers: int) -> None:
    """Raises for a format or a number of outliers that activations cannot have."""
    if type(outliers) is not int or outliers < 0:
        raise FormatError(f"outliers={outliers!r}: how many of a token's activations stay in float, 0 or more.")
    if activations is None:
        return
    if not isinstance(activations, Format):
        raise FormatError(f"activations={activations!r}: give a format, such as jq.int8, or None.")
    if not activations.is_integer or activations.group is not None or not activations.per_channel:
        raise FormatError(
            f"activations={activations}: activations are quantized to integers per token (jq.int8, "
            "jq.int8(symmetric=False), jq.int4, ...), or kept in floating point with activations=None."
        )


def quantize_tokens(
    x: Float[Array, "..."], activations: Format, axis: Axes = -1, bound: Float[Array, "..."] | None = None
) -> Tokens:
    """Quantizes activations along `axis`; NaN is the scale of a token that has a NaN or an infinity.

    A `bound` found beforehand, which broadcasts against `x`, makes them saturate there, and needs no zero point.
    """
    low, high, finite = _range(x, axis, activations.symmetric or bound is not None)
    if bound is not None:
        scale = jnp.where(bound > 0, bound, 1) / activations.qmax
        codes = jnp.clip(jnp.round(x.astype(jnp.float32) / scale), -activations.qmax, activations.qmax)
        return Tokens(codes.astype(jnp.int8), jnp.where(finite, scale, jnp.nan), None)
    q = write(x, *fit_range(low, high, activations), activations)
    zero = None if q.zero is None else q.zero.astype(jnp.float32)
    return Tokens(q.codes.astype(jnp.int8), jnp.where(finite, q.scale, jnp.nan), zero)


def _range(x: Float[Array, "..."], axis: Axes, symmetric: bool) -> tuple[Array, Array, Bool[Array, "..."]]:
    """The least and the largest number of each token, or 0, in float32, and whether all of them are finite.

    For symmetric codes both are as large as its largest in size, where that is cheaper.
    """
    if x.size > _FEW:
        low, high = extremes(x, axis)
        return low.astype(jnp.float32), high.astype(jnp.float32), are_finite(x, axis)
    high = greatest(jnp.abs(x) if symmetric else x, axis)
    low = high if symmetric else greatest(-x, axis)
    return -low, high, jnp.isfinite(low) & jnp.isfinite(high)


def say(x: Float[Array, "B M K"], q: QTensor, activations: Format, outliers: int) -> Float[Array, "B M K"]:
    """What the codes of activations say: the numbers that `arithmetic.integer` multiplies, as floats."""
    rest, largest = split_outliers(x, min(outliers, x.shape[-1]))
    tokens = quantize_tokens(rest, activations, bound=q.input_bound)
    centred = tokens.codes.astype(jnp.float32)
    said = tokens.scale * (centred if tokens.zero is None else centred - tokens.zero)
    return functools.reduce(lambda y, one: jnp.where(_is_at(one[0], y.shape[-1]), y + one[1], y), largest, said)


def split_outliers(x: Float[Array, "B M K"], count: int) -> tuple[Array, list[tuple[Array, Array]]]:
    """The activations without the `count` largest of each token, and those: index `[B, M]` and value `[B, M, 1]`.

    A few inputs hundreds of times the others are what int8 activations of language models suffer from
    (Dettmers et al., LLM.int8(), arXiv:2208.07339); without them the scale of the rest is several times finer.
    """
    rest, largest = x.astype(jnp.float32), []
    for _ in range(count):
        index, value = _largest(rest)
        largest.append((index, value))
        rest = jnp.where(_is_at(index, rest.shape[-1]), 0.0, rest)
    return rest, largest


def _largest(x: Float[Array, "B M K"]) -> tuple[Int[Array, "B M"], Float[Array, "B M 1"]]:
    """Where the first of each token's largest numbers is, and that number; of a token with a NaN any other will do.

    Two reductions of vector instructions, where XLA on CPU has none for an argmax.
    """
    inputs, size = x.shape[-1], jnp.abs(x)
    places = jnp.where(size == jnp.max(size, axis=-1, keepdims=True), jnp.arange(inputs), inputs - 1)
    index = jnp.min(places, axis=-1)
    if index.size == 1 or jax.device_count() > 1:
        # Of one token a sum is fused with what comes after it, and among devices it gathers no activations.
        return index, jnp.sum(jnp.where(_is_at(index, inputs), x, 0.0), axis=-1, keepdims=True)
    return index, jnp.take_along_axis(x, index[..., None], axis=-1, mode="clip")


def _is_at(index: Int[Array, "B M"], inputs: int) -> Bool[Array, "B M K"]:
    return jnp.arange(inputs)[None, None] == index[..., None]
