"""Activations by decoded weights on a CPU, the weights of some outputs at a time: a line holds those of one output.

    out[:, lines]  =  x decode(q[lines])^T                 so many lines decoded at a time

XLA on CPU writes a decoded weight to memory as a whole and reads it again, which takes several times as long as reading
its codes. A block of lines stays in a cache, and blocks come one after the other. Lines lie together in memory where
inputs lie last, and decoded they are the left operand of a few rows as they lie; else they are columns. A byte of
packed codes holds neighbours: inputs, which are products to be added up, or outputs, whose products lie side by side.
"""

import dataclasses
import functools
import operator
from collections.abc import Callable, Sequence
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int8, Shaped

from jaxquant.matmul.arithmetic import scale_comes_after
from jaxquant.matmul.blocks import is_alone
from jaxquant.packed import bytes_of, places_of, unpacked
from jaxquant.qtensor import QTensor, decode

# A block is as large as the caches hold, decoded, and but for the last a multiple of what a core adds at once; there
# are no more of them than this. Of few rows there are at least two, unless the whole, decoded, has so few bytes.
_CACHE, _MULTIPLE, _MOST, _WHOLE = 2**23, 8, 16, 2**21
# From this many rows on it costs less to pack each block, as the right operand, than to pack the rows for all blocks.
# In float32 nothing comes after a product of so many: another pass over it costs more than decoding in full.
_MANY_ROWS = 96


class Lines(NamedTuple):
    """Some outputs of a weight as they lie: their codes in bytes, their scales, and their zero points or None.

    Bytes of float8 too, of which XLA on CPU would first make float16 wherever they are taken from.

    Here and below outputs come first, or last in columns.
    """

    held: Int8[Array, "N bytes"]
    scale: Float[Array, "N groups"]
    zero: Shaped[Array, "N groups"] | None


def lines_of(q: QTensor, columns: bool = False) -> Lines:
    """All lines of a weight `[1, K, N]` whose inputs lie last, or all its columns."""
    codes, scale, zero = jax.tree.map(lambda part: part[0] if columns else part[0].T, (q.codes, q.scale, q.zero))

    def full(part: Array) -> Array:
        return jnp.broadcast_to(part, (part.shape[0], q.shape[2]) if columns else (q.shape[2], part.shape[1]))

    return Lines(bytes_of(codes), *jax.tree.map(full, (scale, zero)))


def never_after(x: Float[Array, "..."]) -> Bool[Array, ""]:
    """False, which XLA does not know before `x` is there: 0 times a number is 0, and times infinity NaN.

    That no absolute value is negative it does know: asked so, every block was decoded before the first product.
    """
    return 0 * jnp.sum(x[(slice(1),) * x.ndim]) > 1


def spans(outputs: int, count: int, multiple: int = 1) -> tuple[slice, ...]:
    """So many blocks, or a few less, of equal size but for the last, which is no multiple where `outputs` is none."""
    size = multiple * -(-outputs // (count * multiple))
    return tuple(slice(start, min(start + size, outputs)) for start in range(0, outputs, size))


def block_of(lines: Lines, span: slice, never: Bool[Array, ""], columns: bool = False) -> Lines:
    """A block of lines.

    Its codes begin where only the run shows. Else XLA would decode, or widen, those of all weights of a program before
    it multiplies by the first, and those of a loop over tokens before the loop, and keep them so.
    """
    axis = 1 if columns else 0
    places = lines.scale.shape[axis] // lines.held.shape[axis]
    start, size = never.astype(jnp.int32) + span.start // places, (span.stop - span.start) // places
    if size == lines.held.shape[axis]:  # where a slice of all of them begins is no secret
        return lines._replace(held=jnp.where(never, jnp.zeros_like(lines.held), lines.held))
    held = jax.lax.dynamic_slice_in_dim(lines.held, start, size, axis)
    some = functools.partial(jax.lax.slice_in_dim, start_index=span.start, limit_index=span.stop, axis=axis)
    return Lines(held, *jax.tree.map(some, (lines.scale, lines.zero)))


def by_lines(rows: int, q: QTensor, inputs_last: bool) -> Callable[..., Array] | None:
    """The product `(x, q, scale=None) -> out * scale` of activations and decoded lines; None where bytes would be cut.

    So it is for several matrices, and on several devices.

    Weights are decoded to the dtype of the activations, and sums are float32: of codes in bfloat16, which holds whole
    numbers up to 256, each product and each sum below 2^24 is exact.

    Args:
      rows: the tokens.
      q: the weight, `[B, K, N]`.
      inputs_last: whether its inputs are what lies together in memory.
    """
    (_, inputs, outputs), groups, places = q.shape, q.scale.shape[1], places_of(q.codes.dtype)
    many = rows >= _MANY_ROWS or not inputs_last
    bytes_ = 4 * inputs * outputs
    count = max(1 if many or bytes_ <= _WHOLE else 2, -(-bytes_ // _CACHE))
    blocks = spans(outputs, min(count, _MOST), _MULTIPLE if inputs_last else _MULTIPLE * places)
    # A byte belongs to one group, and to one block.
    whole = (inputs // groups if inputs_last else outputs) % places == 0
    if not whole or not is_alone(q):
        return None
    return functools.partial(_by_lines, blocks=blocks, columns=not inputs_last, many=many)


def _by_lines(
    x: Float[Array, "1 M K"],
    q: QTensor,
    scale: Float[Array, "1 M 1"] | None = None,
    *,
    blocks: Sequence[slice],
    columns: bool,
    many: bool,
) -> Float[Array, "1 M N"]:
    of_block = _of_columns if columns else functools.partial(_of_lines, many=many)
    lines, rows = lines_of(q, columns), x[0]
    outs, before = [], rows
    for span in blocks:
        # After the block before it, which leaves its place in memory to this one.
        block = block_of(lines, span, never_after(before), columns)
        before = of_block(rows, block, q)
        outs.append(_completed(before, rows, block, q, scale, columns, many))
    return (_side_by_side(outs, blocks) if many else jnp.concatenate(outs).T)[None]


def _side_by_side(parts: Sequence[Float[Array, "M _"]], blocks: Sequence[slice]) -> Float[Array, "M N"]:
    """Results of blocks, each written to its place: concatenated, XLA keeps them all and copies them on one core."""
    if len(parts) == 1:
        return parts[0]
    out = jnp.zeros((len(parts[0]), blocks[-1].stop), parts[0].dtype)
    for part, span in zip(parts, blocks, strict=True):
        out = jax.lax.dynamic_update_slice_in_dim(out, part, span.start, axis=1)
    return out


def _of_lines(rows: Float[Array, "M K"], block: Lines, q: QTensor, many: bool) -> Float[Array, "..."]:
    """The product with some lines, without what comes after it, `[M, N]` of many rows and `[N, M]` of few."""
    (count, inputs), places = rows.shape, places_of(q.codes.dtype)
    apart = jnp.moveaxis(rows.reshape(count, inputs // places, places), 2, 0)

    def of(place: int) -> Float[Array, "..."]:
        weight = _decoded(block._replace(held=unpacked(block.held, place, places)), q, rows)
        return _dot(apart[place], weight, 1) if many else _dot(weight, apart[place], 1)

    return functools.reduce(operator.add, map(of, range(places)))


def _of_columns(rows: Float[Array, "M K"], block: Lines, q: QTensor) -> Float[Array, "M N"]:
    """The product with some columns, without what comes after it."""
    places = places_of(q.codes.dtype)

    def of(place: int) -> Float[Array, "M N"]:
        scale, zero = jax.tree.map(lambda part: part[:, place::places], (block.scale, block.zero))
        return _dot(rows, _decoded(Lines(unpacked(block.held, place, places), scale, zero), q, rows), 0)

    return jnp.stack([of(place) for place in range(places)], axis=-1).reshape(len(rows), block.scale.shape[1])


def _dot(left: Float[Array, "M K"], right: Float[Array, "..."], axis: int) -> Float[Array, "M N"]:
    """The product in float32, along an axis of the right operand.

    Both are held as they are: a transpose that XLA folds into a product of bfloat16 makes it one that it cannot run.
    """
    held = jax.lax.optimization_barrier((left, right))
    return jax.lax.dot_general(held[0], held[1], (((1,), (axis,)), ((), ())), preferred_element_type=jnp.float32)


def _decoded(part: Lines, q: QTensor, rows: Float[Array, "M K"]) -> Float[Array, "..."]:
    """Codes of a byte with their scales and zero points, without those that come after the product."""
    scale_after, zero_after = _after(q, rows)
    zero = None if zero_after else part.zero
    scale = jnp.ones_like(part.scale) if scale_after else part.scale
    codes = part.held if jnp.issubdtype(q.codes.dtype, jnp.integer) else part.held.view(q.codes.dtype)
    return decode(dataclasses.replace(q, codes=codes, scale=scale, zero=zero, dtype=rows.dtype))


def _completed(
    total: Array, rows: Float[Array, "M K"], block: Lines, q: QTensor, scale: Array | None, columns: bool, many: bool
) -> Float[Array, "..."]:
    """A product with zero points and scales, here, while it is in a cache: XLA would go through all blocks once more.

    A zero point comes as a product of one number for each group, which is cheaper than an addition for each weight.
    """
    scale_after, zero_after = _after(q, rows)
    if block.zero is not None and zero_after:
        groups = q.scale.shape[1]
        zero = block.zero.astype(jnp.float32) * (1 if scale_after else block.scale)
        sums = jnp.sum(rows.reshape(len(rows), groups, rows.shape[1] // groups), axis=-1, dtype=jnp.float32)
        zero = zero if columns else zero.T
        total = total - (sums @ zero if many else (sums @ zero).T)
    if scale_after:
        total = total * (block.scale.T if many and not columns else block.scale)
    return total if scale is None else total * (scale[0] if many else scale[0].T)


def _after(q: QTensor, rows: Float[Array, "M K"]) -> tuple[bool, bool]:
    """Whether the scales, and the zero points, come after a product.

    Scales where a product has one for each output, zero points where that of code and scale is not rounded, and neither
    after many rows of float32.
    """
    wide = rows.dtype == jnp.float32
    if wide and len(rows) >= _MANY_ROWS:
        return False, False
    scale = scale_comes_after(q)
    return scale, scale or wide
