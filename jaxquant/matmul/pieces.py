"""A few rows by a weight in integer codes whose inputs lie last, on a CPU: a line holds the weights of one output.

    out[n] = sum_p scale[n, p] s[p] ( sum_k codes[n, p, k] X[p, k]  -  zero[n, p] sum_k X[p, k] )     pieces p of inputs

Both kinds of activations are integers `X` here. Those in codes have 9 bits once their zero point is taken off. Those in
floats are written in integers too, with a scale for each piece, in two digits: of 25 bits, which is a float32, against
packed codes, of 18 against codes of 8 bits. Where they may be rounded it is one digit of 16 bits, which is off by less
for the 64 inputs of a piece together than bfloat16 is for the largest of them alone.

Of just these sums LLVM makes vector instructions, and XLA shares them out among the cores. Two things keep XLA from
undoing that: the digits leave a branch, or they would be computed anew for each output; and lines begin where only the
run shows, or a loop over tokens would widen all codes before it starts, and keep them wide.
"""

import dataclasses
import functools
import itertools
import operator
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int16, Int32

from jaxquant.encode import positive
from jaxquant.finite import greatest
from jaxquant.matmul.blocks import is_alone
from jaxquant.matmul.integers import LONGEST
from jaxquant.matmul.lines import Lines, block_of, lines_of, never_after, spans
from jaxquant.matmul.tokens import Tokens
from jaxquant.packed import places_of, unpacked
from jaxquant.qtensor import QTensor, centre
from jaxquant.trace.views import expand

# The inputs of a piece.
_PIECES = (64, 32)


def in_pieces(q: QTensor) -> bool:
    """Whether a weight `[B, K, N]`, whose inputs lie last, can be taken in pieces, and 32 bits hold sums of a group."""
    inputs, groups = q.shape[1], q.scale.shape[1]
    return q.is_integer and is_alone(q) and inputs <= groups * LONGEST and _piece(q) > 0


def codes_in_pieces(tokens: Tokens, q: QTensor) -> Float[Array, "1 M N"]:
    """The product of activations in codes, each group's sum in int32.

    Args:
      tokens: the activations, `[1, M, K]`.
      q: the weight, of which `in_pieces` holds.
    """
    codes, groups = tokens.codes[0].astype(jnp.int16), q.scale.shape[1]
    codes = codes if tokens.zero is None else codes - tokens.zero[0].astype(jnp.int16)
    inputs = jnp.sum(codes.reshape(len(codes), groups, -1), axis=-1, dtype=jnp.int32)
    never = never_after(tokens.scale)
    digits = _written([codes], never, q)

    def one(lines: Lines, row: Sequence[Array], inputs: Int32[Array, " groups"], scale: Array) -> Float[Array, " N"]:
        total = _products(lines, row[0], q)
        of_pieces = jnp.sum(total, axis=-1).reshape(len(total), groups, -1)
        # A product, because XLA would make one sum of two, too long for vector instructions.
        sums = of_pieces @ jnp.ones(of_pieces.shape[-1], jnp.int32)
        if lines.zero is not None:
            sums = sums.astype(lines.zero.dtype) - lines.zero * inputs[None].astype(lines.zero.dtype)
        return (sums.astype(jnp.float32) * lines.scale) @ jnp.broadcast_to(scale, (groups,))

    wide = q if q.zero is None else dataclasses.replace(q, zero=centre(q))
    return _by_rows(one, lines_of(wide), never, digits, inputs, tokens.scale[0])


def floats_in_pieces(x: Float[Array, "1 M K"], q: QTensor, rounds: bool = False) -> Float[Array, "1 M N"]:
    """The product of activations in floats, which are rounded at the bits above.

    Args:
      x: the activations.
      q: the weight, of which `in_pieces` holds.
      rounds: whether one digit is enough.
    """
    rows, (largest, low) = x.shape[1], _widths(q, rounds)
    pieces = x[0].astype(jnp.float32).reshape(rows, -1, _piece(q))
    top = greatest(jnp.abs(pieces), -1)
    scale = positive(top / largest, top)
    whole = jnp.clip(jnp.round(pieces / scale), -largest, largest).astype(jnp.int32)
    never = never_after(scale)
    digits = _written([digit.reshape(rows, -1) for digit in _digits(whole, low)], never, q)
    widened = rounds and places_of(q.codes.dtype) == 1  # packed codes are shifted, which does as well

    def one(lines: Lines, row: Sequence[Array], inputs: Array, scale: Float[Array, " pieces"]) -> Float[Array, " N"]:
        sums = _sums(_wider(lines, never) if widened else lines, row, q, low)
        if lines.zero is not None:
            zero = expand(lines.zero, sums.shape).astype(jnp.float32)
            sums = sums - zero * inputs[None].astype(jnp.float32)
        return (sums * expand(lines.scale, sums.shape)) @ scale

    inputs, scale = jnp.sum(whole, axis=-1), jnp.where(jnp.isfinite(top), scale, jnp.nan)[..., 0]
    return _by_rows(one, lines_of(q), never, digits, inputs, scale)


def _widths(q: QTensor, rounds: bool) -> tuple[int, int]:
    """For activations in floats, the largest integer, and the bits of its lower digit, 0 where it has only one.

    A digit is within 16 bits, and of two that meet codes of 8 so is each product, and the sum of both within 32.
    """
    if rounds:
        return 2**15 - 1, 0
    return (2**17 - 2**9, 9) if places_of(q.codes.dtype) == 1 else (2**24 - 2**12, 12)


def _digits(whole: Int32[Array, "..."], low: int) -> list[Int32[Array, "..."]]:
    """An integer as `(higher << low) + lower`, or as it is."""
    if low == 0:
        return [whole]
    # With a lower digit of up to +2^(low - 1), not -2^(low - 1), which times the lowest code would be +2^15.
    higher = (whole + (2 ** (low - 1) - 1)) >> low
    return [higher, whole - (higher << low)]


def _written(digits: list[Array], never: Bool[Array, ""], q: QTensor) -> list[Int16[Array, "M places bytes"]]:
    """The digits, written down as they meet the codes: those for the same place of a byte side by side."""
    places = places_of(q.codes.dtype)
    laid = [jnp.swapaxes(digit.astype(jnp.int16).reshape(len(digit), -1, places), 1, 2) for digit in digits]
    return jax.lax.cond(never, lambda some: [0 * digit for digit in some], lambda same: same, laid)


def _by_rows(
    one: Callable[..., Float[Array, " N"]], lines: Lines, never: Bool[Array, ""], *of_rows: Any
) -> Float[Array, "1 M N"]:
    """`one(lines, ...)` of each row of `of_rows`, some lines after the other."""
    leaves, treedef = jax.tree.flatten(of_rows)
    rows = [treedef.unflatten(row) for row in zip(*leaves, strict=True)]
    parts = [block_of(lines, span, never) for span in spans(len(lines.held), 2)]
    blocks = [jnp.stack([one(part, *row) for row in rows], axis=-1) for part in parts]
    return jnp.concatenate(blocks).T[None]


def _sums(lines: Lines, digits: Sequence[Array], q: QTensor, low: int) -> Float[Array, "N pieces"]:
    """The sums of pieces of floats, of all their digits."""
    products = [_products(lines, digit, q) for digit in digits]
    if low and places_of(q.codes.dtype) == 1:  # 32 bits hold both digits, and one sum is cheaper than two
        products = [functools.reduce(lambda higher, lower: (higher << low) + lower, products)]
    each = [jnp.sum(product, axis=-1).astype(jnp.float32) for product in products]
    return functools.reduce(lambda higher, lower: higher * 2.0**low + lower, each)


def _products(lines: Lines, digit: Int16[Array, "places bytes"], q: QTensor) -> Int32[Array, "N pieces side"]:
    """The products of a digit with the codes of every piece, several of them added up.

    LLVM multiplies 16 bits by 16 and adds neighbours in one instruction where something is done to codes in 16 bits. Of
    those that are just widened it makes none, and within 16 bits they are multiplied fastest.
    """
    places = places_of(q.codes.dtype)
    halves, narrow = 2 if places == 1 else 1, places == 1 and lines.held.dtype == jnp.int8
    held = lines.held.astype(jnp.int16).reshape(len(lines.held), -1, halves, _piece(q) // (halves * places))
    laid = digit.reshape(places, 1, *held.shape[1:])

    def product(half: int, place: int) -> Int32[Array, "N pieces side"]:
        code, row = unpacked(held[:, :, half], place, places), laid[place, :, :, half]
        return (code * row).astype(jnp.int32) if narrow else code.astype(jnp.int32) * row.astype(jnp.int32)

    return functools.reduce(operator.add, itertools.starmap(product, itertools.product(range(halves), range(places))))


def _wider(lines: Lines, never: Bool[Array, ""]) -> Lines:
    """Bytes in 16 bits, in a way that LLVM does not see through."""
    return lines._replace(held=lines.held.astype(jnp.int16) ^ never.astype(jnp.int16))


def _piece(q: QTensor) -> int:
    """The inputs of a piece, which no group is cut by; 0 where each would be."""
    member = q.shape[1] // q.scale.shape[1]
    return next((size for size in _PIECES if member % size == 0), 0)
