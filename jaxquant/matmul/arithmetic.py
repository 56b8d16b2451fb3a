"""`x[B, M, K] @ q[B, K, N]`: the ways to multiply by a weight in codes.

With groups g along K, activations in codes `c` and one scale per token:

    out[m, n] = scale_x[m] * sum_g scale[g, n] * ( sum_k c[m, k] codes[k, n]  -  zero[g, n] * sum_k c[m, k] )
                                                   int8 x int8 -> int32: exact

Which of them is taken for a shape or a platform is `matmul.choice`'s to say.
"""

import dataclasses
import functools
import operator
from collections.abc import Callable

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int, Int8, Shaped

from jaxquant.format import Format, int8
from jaxquant.matmul.integers import LONGEST, batched_dot, integer_dot
from jaxquant.matmul.tokens import Tokens, quantize_tokens, split_outliers
from jaxquant.packed import bytes_of, places_of, unpacked
from jaxquant.qtensor import Kept, QTensor, centre, decode

Product = Callable[..., Array]


def integer(
    x: Float[Array, "B M K"],
    q: QTensor,
    product: Callable[[Tokens, QTensor], Array],
    activations: Format,
    outliers: int,
    inputs_last: bool,
) -> Float[Array, "B M N"]:
    """Activations in codes, and beside them those that stay in float.

    Args:
      x: the activations.
      q: the weight.
      product: `(tokens, q) -> out`.
      activations, outliers, inputs_last: as in `choose`.
    """
    rest, largest = split_outliers(x, outliers)
    out = product(quantize_tokens(rest, activations, bound=q.input_bound), q)
    rows = (value * _weight_rows(q, index, inputs_last) for index, value in largest)
    return functools.reduce(operator.add, rows, out)


def of_tokens(tokens: Tokens, q: QTensor, product: Callable[[Array, QTensor], Array]) -> Float[Array, "B M N"]:
    """Codes times codes, scales after; activations with a zero point bring a row of ones, for the column sums.

    Args:
      tokens: the activations.
      q: the weight.
      product: `(codes, q) -> sum_g scale[g] * (codes[g] @ (q.codes[g] - zero[g]))`, each group's sum in int32.
    """
    if tokens.zero is None:
        return tokens.scale * product(tokens.codes, q)
    rows = jnp.concatenate([tokens.codes, jnp.ones_like(tokens.codes[:, :1])], axis=1)
    sums = product(rows, q)
    return tokens.scale * (sums[:, :-1] - tokens.zero * sums[:, -1:])


def of_bfloats(tokens: Tokens, q: QTensor, product: Product) -> Float[Array, "B M N"]:
    """Codes as bfloat16, which holds them and what a zero point makes of them: whole numbers up to 256.

    Args:
      tokens: the activations.
      q: the weight.
      product: `(x, q, scale) -> out * scale`, of floats, with sums in float32.
    """
    codes = tokens.codes.astype(jnp.float32)
    centred = codes if tokens.zero is None else codes - tokens.zero
    return product(centred.astype(jnp.bfloat16), q, tokens.scale)


def folded(x: Float[Array, "B M K"], q: QTensor, run: Callable[[Array, QTensor], Array]) -> Float[Array, "B M N"]:
    """A scale per input goes into the activations before they are quantized: `x @ (s * codes) = (x * s) @ codes`."""
    scaled = x.astype(jnp.float32) * jnp.swapaxes(q.scale, 1, 2)
    return run(scaled, dataclasses.replace(q, scale=jnp.ones((1, 1, 1), jnp.float32)))


def digits(x: Float[Array, "B M K"], q: QTensor, product: Callable[[Array, QTensor], Array]) -> Float[Array, "B M N"]:
    """Float activations against integer codes without decoding them, where that is slow (CPU).

    `x = s1 c1 + s2 c2 + s3 c3` with each digit the int8 code of what the ones before it left, which is exact to
    2^-23 of the largest number of a token; the three rows cost what one does.
    """
    rest, codes, scales = x.astype(jnp.float32), [], []
    for _ in range(3):
        digit = quantize_tokens(rest, int8)
        rest = rest - digit.codes.astype(jnp.float32) * digit.scale
        codes.append(digit.codes)
        scales.append(digit.scale)
    parts = jnp.split(product(jnp.concatenate(codes, 1), q), 3, axis=1)
    return functools.reduce(operator.add, map(operator.mul, scales, parts))


def floats(x: Float[Array, "B M K"], q: QTensor) -> Float[Array, "B M N"]:
    """A float32 matmul with the decoded weight."""
    return batched_dot(x.astype(jnp.float32)[:, None], decode(q.astype(jnp.float32))[:, None], None)[:, 0]


def in_own_width(
    x: Float[Array, "B M K"], q: QTensor, wide: Product, narrow: Product | None, rounds: bool
) -> Float[Array, "B M N"]:
    """A product of floats that are bfloat16 where that loses nothing or is allowed, and float32 else.

    Args:
      x: the activations.
      q: the weight; bfloat16 holds codes whose scale comes after the product, and numbers whose dtype it is.
      wide, narrow: `(x, q) -> out` of float32 and of bfloat16, which may be missing.
      rounds: whether activations may be rounded.
    """
    held = q.dtype == jnp.bfloat16 or scale_comes_after(q)
    if narrow and held and (rounds or x.dtype == jnp.bfloat16):
        return narrow(x.astype(jnp.bfloat16), q)
    return wide(x.astype(jnp.float32), q)


def scale_comes_after(q: QTensor) -> bool:
    """Whether the scales of a weight come onto the product with its codes: whole numbers with one for each output."""
    return q.is_integer and q.scale.shape[1] == 1


def split_kept(x: Float[Array, "B M K"], kept: Kept | None) -> tuple[Array, Float[Array, "B M N"] | None]:
    """The activations without the inputs whose weights are kept in float, and the product of those."""
    if kept is None:
        return x, None
    mask, blocks = jnp.swapaxes(kept.mask, 1, 2), kept.rows.shape[1]
    taken = jnp.where(mask, x, 0.0).reshape(*x.shape[:2], blocks, x.shape[2] // blocks).sum(-1)
    rows = jnp.broadcast_to(kept.rows, (x.shape[0], *kept.rows.shape[1:]))
    return jnp.where(mask, 0.0, x), batched_dot(taken[:, None], rows[:, None], jnp.float32)[:, 0]


def _weight_rows(q: QTensor, index: Int[Array, "B M"], inputs_last: bool) -> Float[Array, "B M N"]:
    """The decoded weights of one input for each token."""
    places = places_of(q.codes.dtype)
    if inputs_last and places > 1 and q.shape[1] % places == 0:
        # As bytes, because XLA would first take all codes apart.
        held = jnp.swapaxes(bytes_of(jnp.swapaxes(q.codes, 1, 2)), 1, 2)
        codes = unpacked(_at(held, index // places), (index % places).astype(jnp.int8)[..., None], places)
    else:
        codes = _at(q.codes, index)

    def of_group(part: Array) -> Float[Array, "B M N"]:
        return _at(part, index // (q.shape[1] // part.shape[1])).astype(jnp.float32)

    centred = codes.astype(jnp.float32) if q.zero is None else codes.astype(jnp.float32) - of_group(centre(q))
    return centred * of_group(q.scale)


def _at(rows: Shaped[Array, "b K N"], index: Int[Array, "B M"]) -> Shaped[Array, "B M N"]:
    """The row at each index; of one index a slice, which XLA reads where it is used."""
    if index.size == 1:
        return jax.lax.dynamic_index_in_dim(rows, index[0, 0], axis=1)
    every = jnp.broadcast_to(rows, (index.shape[0], *rows.shape[1:]))
    return jnp.take_along_axis(every, index[..., None], axis=1, mode="clip")


def grouped_dot(codes: Int8[Array, "B M K"], q: QTensor, inputs_last: bool) -> Float[Array, "B M N"]:
    """`sum_g scale[g] * (codes[g] @ (q.codes[g] - zero[g]))`, each group's sum in int32."""
    codes, q = split_long(codes, q)
    (b, m, k), n, groups = codes.shape, q.shape[2], q.scale.shape[1]
    x = jnp.swapaxes(codes.reshape(b, m, groups, k // groups), 1, 2)
    total = integer_dot(x, q.codes.reshape(b, groups, k // groups, n), inputs_last)
    if q.zero is not None:
        zero = centre(q)[:, :, None, :]
        total = total.astype(zero.dtype) - zero * jnp.sum(x, axis=-1, dtype=jnp.int32, keepdims=True).astype(zero.dtype)
    return jnp.sum(total.astype(jnp.float32) * q.scale[:, :, None, :], axis=1)


def split_long(codes: Int8[Array, "B M K"], q: QTensor) -> tuple[Array, QTensor]:
    """Cuts groups too long for an int32 sum into equal shorter ones, padded with zeros, of the same scale."""
    (b, m, k), groups = codes.shape, q.scale.shape[1]
    member = k // groups
    if member <= LONGEST:
        return codes, q
    pieces = -(-member // LONGEST)
    padding = -member % pieces
    grouped = jnp.pad(codes.reshape(b, m, groups, member), ((0, 0), (0, 0), (0, 0), (0, padding)))
    weights = q.codes.reshape(b, groups, member, q.shape[2])
    weights = jnp.pad(weights, ((0, 0), (0, 0), (0, padding), (0, 0))).reshape(b, -1, q.shape[2])
    scale, zero = jax.tree.map(lambda part: jnp.repeat(part, pieces, axis=1), (q.scale, q.zero))
    longer = grouped.reshape(b, m, groups * (member + padding))
    return longer, dataclasses.replace(q, codes=weights, scale=scale, zero=zero)
