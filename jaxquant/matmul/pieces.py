"""A few rows by a weight in integer codes whose inputs lie last, on a CPU: a line holds the weights of one output.

    out[n] = sum_p scale[n, p] s[p] ( sum_k codes[n, p, k] X[p, k]  -  zero[n, p] sum_k X[p, k] )     pieces p of inputs

Both kinds of activations are integers `X` here. Those in codes have 9 bits once their zero point is taken off. Those in
floats are written in integers too, with a scale for each piece and as wide as 32 bits hold the sum of a piece: 18 bits
against codes of 8, 23 against codes of 4, 25, which is a float32, against codes of 2. They come in two digits, so that
every product fits 16 bits. Of just these sums LLVM makes vector instructions, and XLA shares them out among the cores.

Two things keep XLA from undoing that: the digits leave a branch, or they would be computed anew for each output; and
lines begin where only the run shows, or a loop over tokens would widen all codes before it starts, and keep them wide.
"""

import dataclasses
import functools
import operator
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int16, Int32

from jaxquant.encode import positive
from jaxquant.finite import are_finite
from jaxquant.matmul.blocks import is_alone
from jaxquant.matmul.integers import LONGEST
from jaxquant.matmul.lines import Lines, block_of, lines_of, never_after
from jaxquant.matmul.tokens import Tokens
from jaxquant.packed import places_of, unpacked
from jaxquant.qtensor import QTensor, centre
from jaxquant.trace.views import expand

# The inputs of a piece.
_PIECES = (64, 32)


def in_pieces(q: QTensor) -> bool:
    """Whether a weight `[B, K, N]`, whose inputs lie last, can be taken in pieces, and 32 bits hold sums of a group."""
    inputs, groups = q.shape[1], q.scale.shape[1]
    return q.is_integer and is_alone(q) and groups > 0 and inputs <= groups * LONGEST and _piece(q) > 0


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
    digits = _written([codes], never)

    def one(lines: Lines, row: Sequence[Array], inputs: Int32[Array, " groups"]) -> Float[Array, " N"]:
        total = _products(lines, row[0], q)
        of_pieces = jnp.sum(total, axis=-1).reshape(len(total), groups, -1)
        # A product, because XLA would make one sum of two, too long for vector instructions.
        sums = of_pieces @ jnp.ones(of_pieces.shape[-1], jnp.int32)
        if lines.zero is not None:
            sums = sums.astype(lines.zero.dtype) - lines.zero * inputs[None].astype(lines.zero.dtype)
        return jnp.sum(sums.astype(jnp.float32) * lines.scale, axis=-1)

    wide = q if q.zero is None else dataclasses.replace(q, zero=centre(q))
    return tokens.scale * _by_rows(one, lines_of(wide), never, digits, inputs)


def floats_in_pieces(x: Float[Array, "1 M K"], q: QTensor) -> Float[Array, "1 M N"]:
    """The product of activations in floats, which are rounded at the bits above.

    Args:
      x: the activations.
      q: the weight, of which `in_pieces` holds.
    """
    rows, (bits, low) = x.shape[1], _widths(q)
    pieces = x[0].astype(jnp.float32).reshape(rows, -1, _piece(q))
    finite = are_finite(pieces, -1)
    top = jnp.max(jnp.abs(pieces), axis=-1, keepdims=True)
    largest = min(2**bits, (2 ** (low - 1)) << low) - 2**low
    scale = positive(top / largest, top)
    whole = jnp.clip(jnp.round(pieces / scale), -largest, largest).astype(jnp.int32)
    # With a lower digit of up to +2^(low - 1), not -2^(low - 1), which times the lowest code would be +2^15.
    higher = (whole + (2 ** (low - 1) - 1)) >> low
    never = never_after(scale)
    digits = _written([digit.astype(jnp.int16).reshape(rows, -1) for digit in (higher, whole - (higher << low))], never)

    def one(lines: Lines, row: Sequence[Array], inputs: Array, scale: Float[Array, " pieces"]) -> Float[Array, " N"]:
        total = (_products(lines, row[0], q) << low) + _products(lines, row[1], q)
        sums = jnp.sum(total, axis=-1).astype(jnp.float32)
        if lines.zero is not None:
            zero = expand(lines.zero, sums.shape).astype(jnp.float32)
            sums = sums - zero * inputs[None].astype(jnp.float32)
        return jnp.sum(sums * (expand(lines.scale, sums.shape) * scale[None]), axis=-1)

    inputs, scale = jnp.sum(whole, axis=-1), jnp.where(finite, scale, jnp.nan)[..., 0]
    return _by_rows(one, lines_of(q), never, digits, inputs, scale)


def _written(digits: list[Int16[Array, "M K"]], never: Bool[Array, ""]) -> list[Int16[Array, "M K"]]:
    """The digits, written down."""
    return jax.lax.cond(never, lambda some: [0 * digit for digit in some], lambda same: same, digits)


def _by_rows(
    one: Callable[..., Float[Array, " N"]], lines: Lines, never: Bool[Array, ""], *of_rows: Any
) -> Float[Array, "1 M N"]:
    """`one(lines, ...)` of each row of `of_rows`, some lines after the other."""
    count = 2 if len(lines.held) % 2 == 0 else 1
    leaves, treedef = jax.tree.flatten(of_rows)
    rows = [treedef.unflatten(row) for row in zip(*leaves, strict=True)]
    parts = [block_of(lines, block, count, never) for block in range(count)]
    blocks = [jnp.stack([one(part, *row) for row in rows]) for part in parts]
    return jnp.concatenate(blocks, axis=-1)[None]


def _products(lines: Lines, row: Int16[Array, " K"], q: QTensor) -> Int32[Array, "N pieces side"]:
    """The products of a digit with the codes of every piece, several of them added up."""
    places = places_of(q.codes.dtype)
    halves = 2 if places == 1 else 1
    side = _piece(q) // (halves * places)
    held = lines.held.reshape(len(lines.held), -1, halves, side).astype(jnp.int16)
    lying = row.reshape(1, -1, halves, side, places)
    products = (
        (unpacked(held[:, :, half], place, places) * lying[:, :, half, :, place]).astype(jnp.int32)
        for half in range(halves)
        for place in range(places)
    )
    return functools.reduce(operator.add, products)


def _piece(q: QTensor) -> int:
    """The inputs of a piece, which no group is cut by; 0 where there are none."""
    member = q.shape[1] // q.scale.shape[1]
    return next((size for size in _PIECES if member and member % size == 0), 0)


def _widths(q: QTensor) -> tuple[int, int]:
    """For activations in floats, the bits of their size beside the sign and those of the lower digit.

    A sum of 64 products with codes of `b` bits, each at most `2^(b - 1)`, stays below `2^31`, and one product with a
    digit of `17 - b` bits within 16.
    """
    container = 8 // places_of(q.codes.dtype)
    return 26 - container, 17 - container
