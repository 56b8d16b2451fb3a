"""A few rows by a weight whose inputs lie last, on a CPU, as a sum that is written out term by term.

    out[n] = sum_l sum_t scale[n, g] codes[n, t, l] x[t, l]  -  sum_g scale[n, g] zero[n, g] sum_k x[g, k]

with lanes l side by side, terms t, and g the group of both.

Of a sum of floats along an axis LLVM makes no vector instructions, because they would add in another order. Terms that
are added one after the other are vectors already: codes are read, widened and multiplied lane by lane, in one pass that
writes a few numbers for each output, and those are a product with ones.

Activations in codes, which floats hold, are multiplied so too. Where no scale comes between, each lane's sum is a whole
number below 2^24, which is exact, and lanes are added up in 32 bits.
"""

import functools
import operator
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float, Shaped

from jaxquant.matmul.blocks import is_alone
from jaxquant.matmul.integers import LONGEST
from jaxquant.matmul.lines import Lines, lines_of, never_after
from jaxquant.matmul.tokens import Tokens
from jaxquant.packed import places_of, unpacked
from jaxquant.qtensor import QTensor
from jaxquant.trace.views import expand

# Lanes of a group; as many terms as LLVM makes the best code of, and so many that it still makes vectors.
_LANES, _BEST_TERMS, _MOST_TERMS = (32, 16, 8), 32, 64


class Cut(NamedTuple):
    """How the bytes of a line are cut: into `terms` of some chunks side by side, of so many `lanes` of one group."""

    terms: int
    chunks: int
    lanes: int


def cut_of(q: QTensor) -> Cut | None:
    """The cut for a weight `[B, K, N]` in integer codes whose inputs lie last; None where it cannot be taken so."""
    inputs, groups, places = q.shape[1], q.scale.shape[1], places_of(q.codes.dtype)
    lanes = next((size for size in _LANES if inputs % (groups * size * places) == 0), 0)
    if not lanes or inputs > groups * LONGEST or not is_alone(q):
        return None
    chunks = inputs // (places * lanes)
    even = [count for count in range(1, _MOST_TERMS + 1) if chunks % count == 0]
    terms = min(even, key=lambda count: abs(count - _BEST_TERMS))
    # Of few terms of many lanes there would be as much to add up as to multiply.
    return Cut(terms, chunks // terms, lanes) if terms**2 >= chunks else None


def floats_in_terms(x: Float[Array, "1 M K"], q: QTensor, cut: Cut) -> Float[Array, "1 M N"]:
    """The product of activations in floats, in float32.

    Args:
      x: the activations.
      q: the weight.
      cut: how to cut it.
    """
    return _by_rows(x[0].astype(jnp.float32), q, cut, jnp.float32)[None]


def codes_in_terms(tokens: Tokens, q: QTensor, cut: Cut) -> Float[Array, "1 M N"]:
    """The product of activations in codes.

    Args:
      tokens: the activations, `[1, M, K]`.
      q: the weight.
      cut: how to cut it.
    """
    codes = tokens.codes[0].astype(jnp.float32)
    codes = codes if tokens.zero is None else codes - tokens.zero[0]
    return tokens.scale * _by_rows(codes, q, cut, jnp.int32 if q.scale.shape[1] == 1 else jnp.float32)[None]


def _by_rows(rows: Float[Array, "M K"], q: QTensor, cut: Cut, dtype: Any) -> Float[Array, "M N"]:
    """The product of each row with all lines, whose lanes are added up in `dtype`."""
    lines, never = lines_of(q), never_after(rows)
    laid = jnp.moveaxis(rows.reshape(len(rows), *cut, places_of(q.codes.dtype)), 4, 2)
    # Two things keep XLA from undoing it. The rows leave a branch, or they would be computed anew for each output; and
    # terms begin where only the run shows, or a loop over tokens would widen all codes before it starts.
    written = jax.lax.cond(never, jnp.zeros_like, lambda same: same, laid)
    sums = jnp.sum(rows.reshape(len(rows), q.scale.shape[1], -1), axis=-1)
    outs = [
        _whole(_lanes(lines, row, never, cut).astype(dtype), lines, of_row)
        for row, of_row in zip(written, sums, strict=True)
    ]
    return jnp.stack(outs)


def _whole(lanes: Shaped[Array, "N side"], lines: Lines, sums: Float[Array, " G"]) -> Float[Array, " N"]:
    """All lanes together with what zero points take off, which is one number for each group, and the scales."""
    total, zero = lanes @ np.ones(lanes.shape[1], lanes.dtype), lines.zero
    if lines.scale.shape[1] > 1:
        return total if zero is None else total - (zero.astype(jnp.float32) * lines.scale) @ sums
    if zero is not None:
        total = total - zero[:, 0].astype(total.dtype) * sums[0].astype(total.dtype)
    return total.astype(jnp.float32) * lines.scale[:, 0]


def _lanes(
    lines: Lines, row: Float[Array, "terms places chunks lanes"], never: Bool[Array, ""], cut: Cut
) -> Float[Array, "N side"]:
    """The sum of all terms in each lane, without zero points, and with scales where they are those of groups."""
    places, count = row.shape[1], len(lines.held)
    wide, grouped = cut.chunks * cut.lanes, lines.scale.shape[1] > 1
    scale = expand(lines.scale, (count, cut.terms * cut.chunks)).reshape(count, -1, cut.chunks) if grouped else None

    def term(index: int) -> Float[Array, "N chunks lanes"]:
        start = never.astype(jnp.int32) + index * wide
        held = jax.lax.dynamic_slice_in_dim(lines.held, start, wide, 1).reshape(count, cut.chunks, cut.lanes)
        # In 32 bits, in which a code is shifted without a mask.
        codes = [unpacked(held.astype(jnp.int32), place, places) for place in range(places)]
        products = [code.astype(jnp.float32) * row[index, place][None] for place, code in enumerate(codes)]
        total = functools.reduce(operator.add, products)
        return total if scale is None else total * scale[:, index, :, None]

    return functools.reduce(operator.add, map(term, range(cut.terms))).reshape(count, wide)
