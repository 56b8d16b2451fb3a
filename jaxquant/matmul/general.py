"""`jq.dot_general`: the matmul of weights in codes for layers written by hand, and for Flax's hooks."""

from typing import Any

import jax
import jax.numpy as jnp
from jax.typing import ArrayLike
from jaxtyping import Array, Float

from jaxquant.encode import quantize
from jaxquant.format import Format, int8
from jaxquant.matmul.derivative import apply
from jaxquant.matmul.dot import DimensionNumbers, as_it_lies, make_dot
from jaxquant.matmul.tokens import check_activations
from jaxquant.qtensor import QTensor, decode
from jaxquant.turned import Turned, is_in_codes, is_turned, swapped, upright


def dot_general(
    lhs: ArrayLike | QTensor | Turned,
    rhs: ArrayLike | QTensor | Turned,
    dimension_numbers: DimensionNumbers,
    precision: Any = None,
    preferred_element_type: Any = None,
    *,
    out_sharding: Any = None,
    weights: Format | None = None,
    activations: Format | None = int8,
    outliers: int = 0,
) -> Float[Array, "..."]:
    """`jax.lax.dot_general` where one operand may be a `QTensor`; with arrays alone it is that function.

    For layers written by hand, and for Flax's hooks: a Flax layer gives its float kernel, so
    `nn.Dense(64, dot_general=functools.partial(jq.dot_general, weights=jq.int8))` quantizes it on the way in.

    Args:
      lhs, rhs, dimension_numbers, precision, preferred_element_type, out_sharding: as in `jax.lax.dot_general`.
      weights: the format to write a float `rhs` in first; None to leave it as it is.
      activations, outliers: as in `quantized`, for the other operand.

    Raises:
      FormatError: `activations` is not an integer format per token.
      TypeError: the shapes do not match, in the words of `jax.lax.dot_general`.
    """
    check_activations(activations, outliers)
    if weights is not None and not isinstance(rhs, QTensor | Turned):
        rhs = quantize(rhs, weights, axis=tuple(dimension_numbers[0][1]))
    sides: list[Any] = [side if is_in_codes(side) else jnp.asarray(side) for side in (lhs, rhs)]
    left, right = sides
    if is_in_codes(left) and is_in_codes(right):
        left = decode(upright(left))
    first = is_in_codes(left)
    if not (first or is_in_codes(right)):
        options = {} if out_sharding is None else {"out_sharding": out_sharding}
        return jax.lax.dot_general(left, right, dimension_numbers, precision, preferred_element_type, **options)
    x, weight = (right, left) if first else (left, right)
    shapes = [jax.ShapeDtypeStruct(side.shape, side.dtype) for side in sides]
    # For JAX's errors, and for what it makes of the precision.
    plain = jax.make_jaxpr(lambda lhs, rhs: jax.lax.dot_general(lhs, rhs, dimension_numbers, precision))(*shapes)
    precision = plain.eqns[-1].params["precision"]
    memory = swapped(weight.ndim) if is_turned(weight) else tuple(range(weight.ndim))
    q, numbers, memory = as_it_lies(upright(weight).settled, memory, dimension_numbers, first)
    dtype = preferred_element_type or jnp.promote_types(x.dtype, q.dtype)
    q = q.astype(dtype) if jnp.dtype(dtype).itemsize > 4 else q
    out = apply(make_dot(numbers, first, (activations, outliers), precision, dtype, memory), x, q)
    return out if out_sharding is None else jax.lax.with_sharding_constraint(out, out_sharding)
