"""A few rows by a weight whose inputs lie last, on a CPU, as a sum that is written out term by term.

    out[n] = sum_l sum_g scale[n, g] sum_t codes[n, g, t, l] x[g, t, l]  -  sum_g scale[n, g] zero[n, g] sum_k x[g, k]

with groups g, the terms t of a group, and lanes l side by side.

Of a sum of floats along an axis LLVM makes no vector instructions, because they would add in another order. Terms that
are added one after the other are vectors already: codes are read, widened and multiplied lane by lane, in one pass that
writes a few numbers for each output, and those are a product with ones.

Activations in codes, which floats hold, are multiplied so too. Where no scale comes between, each lane's sum is a whole
number below 2^24, which is exact, and lanes are added up in 32 bits.
"""

import functools
import operator
from collections.abc import Iterator, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float, Int8, Shaped

from jaxquant.matmul.blocks import is_alone
from jaxquant.matmul.integers import LONGEST
from jaxquant.matmul.lines import Lines, lines_of, never_after
from jaxquant.matmul.tokens import Tokens
from jaxquant.packed import places_of, unpacked
from jaxquant.qtensor import QTensor
from jaxquant.trace.views import expand
from jaxquant.values import values_of

# LLVM makes vectors of up to so many terms, of fewer where each is of several groups with their scales, and of fewer
# still where codes are floats, which take more to decode; lanes are a multiple of the smallest vector.
_MOST, _MOST_SCALED, _MOST_OF_FLOATS, _MULTIPLE = 64, 32, 8, 8
# Of fewer terms with more lanes than this many to a term, there would be as much to add up as to multiply.
_WIDEST = 32
# So many numbers are added up in a row: in a longer sum each addition would wait for the one before it.
_IN_A_ROW = 4


def terms_of(q: QTensor) -> int | None:
    """How many terms a weight `[B, K, N]` whose inputs lie last is taken in, or None.

    As many as may be, each of one group or of a few whole ones, and as wide as the others. None of a codebook, whose
    entries take so much to look up that each is faster written out before a product.
    """
    inputs, groups, places = q.shape[1], q.scale.shape[1], places_of(q.codes.dtype)
    if inputs > groups * LONGEST or q.levels is not None or not is_alone(q):
        return None
    most = _MOST if q.is_integer else _MOST_OF_FLOATS

    def fits(terms: int) -> bool:
        lanes, rest = divmod(inputs, terms * places)
        # No term is of parts of groups, and no byte of two.
        several = terms <= _MOST_SCALED and groups % terms == 0 and lanes % (groups // terms) == 0
        return (terms % groups == 0 or several) and rest == lanes % _MULTIPLE == 0 and lanes <= _WIDEST * terms

    return next(filter(fits, range(most, 0, -1)), None)


def floats_in_terms(x: Float[Array, "1 M K"], q: QTensor, terms: int) -> Float[Array, "1 M N"]:
    """The product of activations in floats, in float32.

    Args:
      x: the activations.
      q: the weight.
      terms: how many to take it in.
    """
    return _by_rows(x[0].astype(jnp.float32), q, terms, jnp.float32)[None]


def codes_in_terms(tokens: Tokens, q: QTensor, terms: int) -> Float[Array, "1 M N"]:
    """The product of activations in codes.

    Args:
      tokens: the activations, `[1, M, K]`.
      q: the weight.
      terms: how many to take it in.
    """
    codes = tokens.codes[0].astype(jnp.float32)
    codes = codes if tokens.zero is None else codes - tokens.zero[0]
    return tokens.scale * _by_rows(codes, q, terms, jnp.int32 if q.scale.shape[1] == 1 else jnp.float32)[None]


def _by_rows(rows: Float[Array, "M K"], q: QTensor, terms: int, dtype: Any) -> Float[Array, "M N"]:
    """The product of each row with all lines, whose lanes are added up in `dtype`."""
    lines, never = lines_of(q), never_after(rows)
    laid = jnp.moveaxis(rows.reshape(len(rows), terms, -1, places_of(q.codes.dtype)), 3, 2)
    # Two things keep XLA from undoing it. The rows leave a branch, or they would be computed anew for each output; and
    # terms begin where only the run shows, or a loop over tokens would widen all codes before it starts.
    written = jax.lax.cond(never, jnp.zeros_like, lambda same: same, laid)
    sums = jnp.sum(rows.reshape(len(rows), q.scale.shape[1], -1), axis=-1)
    outs = [
        _whole(_lanes(lines, q, row, never).astype(dtype), lines, of_row)
        for row, of_row in zip(written, sums, strict=True)
    ]
    return jnp.stack(outs)


def _whole(lanes: Shaped[Array, "N lanes"], lines: Lines, sums: Float[Array, " G"]) -> Float[Array, " N"]:
    """All lanes together with what zero points take off, which is one number for each group, and the scales."""
    total, zero = lanes @ np.ones(lanes.shape[1], lanes.dtype), lines.zero
    if lines.scale.shape[1] > 1:
        return total if zero is None else total - (zero.astype(jnp.float32) * lines.scale) @ sums
    if zero is not None:
        total = total - zero[:, 0].astype(total.dtype) * sums[0].astype(total.dtype)
    return total.astype(jnp.float32) * lines.scale[:, 0]


def _lanes(
    lines: Lines, q: QTensor, row: Float[Array, "terms places lanes"], never: Bool[Array, ""]
) -> Float[Array, "N lanes"]:
    """The sum of all terms in each lane, without zero points, and with scales where they are those of groups."""
    (terms, places, lanes), groups = row.shape, lines.scale.shape[1]
    # Terms of one group are added up before its scale comes.
    together = max(1, terms // groups)
    scale = lines.scale.reshape(len(lines.held), terms // together, -1)

    def products(term: int) -> Iterator[Float[Array, "N lanes"]]:
        held = jax.lax.dynamic_slice_in_dim(lines.held, never.astype(jnp.int32) + term * lanes, lanes, 1)
        for place in range(places):
            yield values_of(_codes_at(held, place, q), q.levels) * row[term, place][None]

    def of_some(index: int) -> Float[Array, "N lanes"]:
        some = range(index * together, (index + 1) * together)
        total = _added([product for term in some for product in products(term)])
        return total if groups == 1 else total * expand(scale[:, index], total.shape)

    return _added([of_some(index) for index in range(terms // together)])


def _codes_at(held: Int8[Array, "N lanes"], place: int, q: QTensor) -> Shaped[Array, "N lanes"]:
    """The codes at one place of bytes, those of whole numbers in 32 bits, in which one is shifted without a mask."""
    if jnp.issubdtype(q.codes.dtype, jnp.integer):
        return unpacked(held.astype(jnp.int32), place, places_of(q.codes.dtype))
    return held.view(q.codes.dtype)


def _added(parts: Sequence[Array]) -> Array:
    """The sum of arrays, some and then those sums."""
    starts = range(0, len(parts), _IN_A_ROW)
    return functools.reduce(operator.add, [functools.reduce(operator.add, parts[at : at + _IN_A_ROW]) for at in starts])
