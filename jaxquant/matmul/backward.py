"""The backward matmuls in integers: what a dot with a weight in codes sends back, for training at int8 speed.

    dx = dy @ w^T       dy * scale, a scale per token and rounded at random,  int8 x int8 -> int32,  the codes of w
    dw = x^T @ dy       x with a scale per input, dy with one per output, over all tokens

Rounding at random keeps the gradient unbiased (Banner et al., arXiv:1805.11046; AQT). Where a weight has groups, a zero
point, or a transform of its inputs, the backward pass stays in float.
"""

import dataclasses
import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Key

from jaxquant.finite import are_finite
from jaxquant.format import Format
from jaxquant.matmul.derivative import apply
from jaxquant.matmul.dot import Dot
from jaxquant.matmul.integers import LONGEST
from jaxquant.matmul.tokens import quantize_tokens
from jaxquant.noise import round_at_random
from jaxquant.qtensor import QTensor


@dataclasses.dataclass(frozen=True)
class Backward:
    """How gradients are quantized.

    Args:
      format: of the incoming gradients, integers.
      key: of the noise that rounds them.
    """

    format: Format
    key: Any


def apply_with(dot: Dot, backward: Backward, x: Float[Array, "..."], q: QTensor) -> Float[Array, "..."]:
    """The product, whose derivative is taken in integers where that is possible."""
    if q.master is None or not _is_plain(dot, x, q):
        return apply(dot, x, q)
    codes = dataclasses.replace(q, master=None)
    return _product(dot, backward.format, x, q.master, codes, backward.key)


def _is_plain(dot: Dot, x: Array, q: QTensor) -> bool:
    """Whether all sums are of whole numbers that an int32 can hold, with scales that stay outside of them."""
    if not q.is_integer or q.zero is not None or q.transform or q.kept is not None:
        return False
    weight, rows = jax.eval_shape(dot.matrices, q), jax.eval_shape(dot.tokens, x).shape[1]
    return weight is not None and weight.scale.shape[1] == 1 and max(rows, weight.shape[2]) <= LONGEST


@functools.partial(jax.custom_vjp, nondiff_argnums=(0, 1))
def _product(dot: Dot, format: Format, x: Array, master: Array, q: QTensor, key: Key[Array, ""]) -> Array:
    del format, master, key
    return apply(dot, x, q)


def _forward(dot: Dot, format: Format, x: Array, master: Array, q: QTensor, key: Key[Array, ""]) -> tuple[Array, Any]:
    return _product(dot, format, x, master, q, key), (x, q, key)


def _backward(dot: Dot, format: Format, kept: Any, dy: Array) -> tuple[Array, Array, None, None]:
    x, q, key = kept
    weight = dot.matrices(q)
    assert weight is not None
    tokens, to_x = _laid_out(dot.tokens, x)
    _, to_master = _laid_out(functools.partial(_as_matrices, dot, q), q.codes.astype(q.dtype))
    shape = jax.ShapeDtypeStruct((*tokens.shape[:2], weight.shape[2]), dy.dtype)
    (into,) = jax.linear_transpose(lambda out: dot.assembled(out, x.shape, q.shape), shape)(dy)
    into = into.astype(jnp.float32)  # [B, M, N]
    by_token, by_output = jax.random.split(key)
    # A scale per output is folded into the gradient, so that the sum over outputs is one of whole numbers.
    folded = _rounded(into * weight.scale, format, 2, by_token)
    dx = _integer_dot(folded, (weight.codes.astype(jnp.int8), jnp.ones((1, 1, 1), jnp.float32)), axis=2)
    of_inputs = _rounded(tokens.astype(jnp.float32), format, 1)
    dw = _integer_dot(of_inputs, _rounded(into, format, 1, by_output), axis=1)
    return to_x(dx), to_master(dw), None, None


def _as_matrices(dot: Dot, q: QTensor, master: Array) -> Array:
    """A master in the axes `[B, K, N]`."""
    moved = dot.matrices(dataclasses.replace(q, master=master))
    assert moved is not None
    return moved.master


def _laid_out(layout: Callable[[Array], Array], x: Array) -> tuple[Array, Callable[[Array], Array]]:
    """An array in the axes of matrices, and the way back for its gradient."""
    back = jax.linear_transpose(layout, jax.ShapeDtypeStruct(x.shape, x.dtype))
    return layout(x), lambda moved: back(moved.astype(x.dtype))[0]


# Compiled, because it is called for every matmul of a step.
_product.defvjp(_forward, jax.jit(_backward, static_argnums=(0, 1)))

Codes = tuple[Array, Float[Array, "..."]]


def _rounded(x: Float[Array, "B M K"], format: Format, axis: int, key: Key[Array, ""] | None = None) -> Codes:
    """Symmetric codes with one scale along an axis, to nearest or, given a key, up or down at random."""
    if key is None:
        nearest = quantize_tokens(x, format, axis=axis)
        return nearest.codes, nearest.scale
    scale = jnp.max(jnp.abs(x), axis=axis, keepdims=True, initial=0.0) / format.qmax
    scale = jnp.where(scale > 0, scale, 1)
    moved = round_at_random(x / scale, key)
    codes = jnp.clip(moved, format.qmin, format.qmax).astype(jnp.int8)
    return codes, jnp.where(are_finite(x, axis), scale, jnp.nan)


def _integer_dot(left: Codes, right: Codes, axis: int) -> Float[Array, "B R C"]:
    """The product of codes along an axis that both have, times their scales."""
    (a, scale_a), (b, scale_b) = left, right
    numbers, precision = (((axis,), (axis,)), ((0,), (0,))), jax.lax.Precision.DEFAULT
    out = jax.lax.dot_general(a, b, numbers, precision, preferred_element_type=jnp.int32)
    rows, columns = scale_a.reshape(len(scale_a), -1, 1), scale_b.reshape(len(scale_b), 1, -1)
    return out.astype(jnp.float32) * rows * columns
