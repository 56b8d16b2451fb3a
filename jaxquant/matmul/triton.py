"""A GPU kernel for activations times codes of any width, which never writes the decoded weight (Pallas, Triton).

    out[m, n] = sum_g slope[g, n] sum_k x[m, k] value(codes[k, n])  -  offset[g, n] sum_k x[m, k]

with the scale as the slope, and the scale times the zero point as the offset where there is one. A program takes a tile
of rows and columns, loads the bytes that the codes lie in, unpacks them in registers, and hands them to the tensor
cores: int8 x int8 -> int32 for activations in codes, bfloat16 or float otherwise.
"""

import dataclasses
import functools
import math
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import triton
from jaxtyping import Array, Float, Int8, Shaped

from jaxquant.matmul.integers import LONGEST
from jaxquant.packed import bytes_of, places_of, unpacked
from jaxquant.values import look_up, of_float8

# How many programs keep every core of a large GPU busy: below that the sum over inputs is split among several.
_PROGRAMS = 128


@dataclasses.dataclass(frozen=True)
class Coding:
    """How codes stand for numbers, as hashable data.

    Args:
      dtype: of the codes.
      levels: the codebook, or None.
      precision: at which the numbers are multiplied; XLA traces what a device does long after the product is asked for.
    """

    dtype: Any
    levels: tuple[float, ...] | None
    precision: jax.lax.Precision

    @property
    def packed(self) -> int:
        """How many codes lie in a byte."""
        return places_of(self.dtype)

    def values(self, held: Int8[Array, "..."], place: int, dtype: Any) -> Shaped[Array, "..."]:
        """The numbers at one place of the bytes that hold the codes, without their scale."""
        if jnp.issubdtype(self.dtype, jnp.floating):
            return of_float8(held, self.dtype).astype(dtype)
        return self.numbers(unpacked(held, place, self.packed), dtype)

    def numbers(self, codes: Shaped[Array, "..."], dtype: Any) -> Shaped[Array, "..."]:
        """The numbers that codes stand for, without their scale."""
        return codes.astype(dtype) if self.levels is None else look_up(codes, self.levels).astype(dtype)


@dataclasses.dataclass(frozen=True)
class Tiles:
    """How the work is cut: rows, bytes of outputs and inputs of a tile, and the pieces the inputs are split into."""

    rows: int
    columns: int
    inputs: int
    pieces: int


def tiles(rows: int, shape: Sequence[int], groups: int, packed: int) -> Tiles | None:
    """The tiles for `rows` tokens and a weight of shape `[K, N]`; None where they do not fit."""
    inputs, outputs = shape
    sizes = [size for size in (128, 64, 32, 16) if size * packed <= 128]
    columns = _divisor(outputs // packed, sizes) if outputs % packed == 0 else None
    step = _divisor(inputs // groups, (128, 64, 32))
    if columns is None or step is None or inputs // groups > LONGEST:
        return None
    height = next((size for size in (16, 32, 64) if rows <= size), 128)
    programs, pieces = math.ceil(rows / height) * (outputs // packed // columns), 1
    # Partial sums, of four bytes, are not to be more than the codes that are read.
    while (
        pieces * programs < _PROGRAMS
        and 4 * height * 2 * pieces <= inputs // packed
        and inputs % (2 * pieces * step) == 0
        and _nest(2 * pieces, groups)
    ):
        pieces *= 2
    return Tiles(height, columns, step, pieces)


def _divisor(length: int, sizes: Sequence[int]) -> int | None:
    return next((size for size in sizes if length % size == 0), None)


def _nest(pieces: int, groups: int) -> bool:
    return groups % pieces == 0 or pieces % groups == 0


def triton_dot(
    x: Shaped[Array, "M K"],
    codes: Shaped[Array, "K N"],
    slopes: Float[Array, "parts G N"],
    coding: Coding,
    cut: Tiles,
    interpret: bool = False,
) -> Float[Array, "M N"]:
    """The product, float32.

    Args:
      x: int8 codes or floats.
      codes, coding: of the weight.
      slopes: those of its groups, and their offsets where it has zero points.
      cut: as `tiles` gives it.
      interpret: run the kernel as JAX operations, on any platform.
    """
    (rows, inputs), outputs = x.shape, codes.shape[1]
    slopes = jnp.repeat(slopes, max(1, cut.pieces // slopes.shape[1]), axis=1)  # a piece of a group is a group
    padded = math.ceil(rows / cut.rows) * cut.rows
    bytes_ = outputs // coding.packed
    part = (inputs // cut.pieces, slopes.shape[1] // cut.pieces)
    parts = slopes.shape[0]
    out = pl.pallas_call(
        functools.partial(_kernel, coding=coding, step=cut.inputs),
        grid=(padded // cut.rows, bytes_ // cut.columns, cut.pieces),
        in_specs=[
            pl.BlockSpec((cut.rows, part[0]), lambda i, j, piece: (i, piece)),
            pl.BlockSpec((part[0], cut.columns), lambda i, j, piece: (piece, j)),
            pl.BlockSpec((parts, part[1], cut.columns, coding.packed), lambda i, j, piece: (0, piece, j, 0)),
        ],
        out_specs=pl.BlockSpec((None, cut.rows, cut.columns, coding.packed), lambda i, j, piece: (piece, i, j, 0)),
        out_shape=jax.ShapeDtypeStruct((cut.pieces, padded, bytes_, coding.packed), jnp.float32),
        compiler_params=triton.CompilerParams(num_warps=8 if cut.rows == 128 else 4, num_stages=3),
        interpret=interpret,
        name=f"dot_{x.dtype}_{codes.dtype}",
    )(jnp.pad(x, ((0, padded - rows), (0, 0))), bytes_of(codes), slopes.reshape(parts, -1, bytes_, coding.packed))
    return jnp.sum(out, axis=0).reshape(padded, outputs)[:rows]


def _kernel(x_ref, held_ref, slopes_ref, out_ref, *, coding: Coding, step: int):
    """One tile of the output, for one piece of the inputs: a sum over groups of sums over their members."""
    (rows, inputs), columns, (parts, groups) = x_ref.shape, held_ref.shape[1], slopes_ref.shape[:2]
    total = jnp.int32 if x_ref.dtype == jnp.int8 else jnp.float32
    places, steps = range(coding.packed), inputs // groups // step

    def of_group(group, outs):
        def add(index, sums):
            there = pl.ds((group * steps + index) * step, step)
            x, held = triton.load(x_ref.at[:, there]), triton.load(held_ref.at[there, :])
            values = [coding.values(held, place, x.dtype) for place in places]
            dots = [jnp.dot(x, value, precision=coding.precision, preferred_element_type=total) for value in values]
            dots += [jnp.sum(x.astype(total), axis=1)] if parts == 2 else []
            return tuple(s + dot for s, dot in zip(sums, dots, strict=True))

        zeros = (*[jnp.zeros((rows, columns), total) for _ in places], *[jnp.zeros(rows, total)] * (parts - 1))
        sums = add(0, zeros) if steps == 1 else jax.lax.fori_loop(0, steps, add, zeros)

        def of_part(part, place):
            return triton.load(slopes_ref.at[jnp.int32(part), group, :, jnp.int32(place)])[None]

        scaled = [sums[place].astype(jnp.float32) * of_part(0, place) for place in places]
        if parts == 2:
            taken = sums[-1].astype(jnp.float32)[:, None]
            scaled = [s - taken * of_part(1, place) for place, s in enumerate(scaled)]
        return tuple(out + s for out, s in zip(outs, scaled, strict=True))

    outs = tuple(jnp.zeros((rows, columns), jnp.float32) for _ in places)
    outs = of_group(jnp.int32(0), outs) if groups == 1 else jax.lax.fori_loop(0, groups, of_group, outs)
    for place in places:
        triton.store(out_ref.at[:, :, jnp.int32(place)], outs[place])
