"""How the range of each group is chosen: functions `(w, format, importance) -> (scale, zero)`.

absmax          scale = max|w| / qmax
least_squares   (scale, zero) = argmin sum_k importance_k (w_k - decode(encode(w_k)))^2
"""

import functools
from collections.abc import Callable

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from jaxquant.encode import encode, fit, value
from jaxquant.format import Format
from jaxquant.quantizers.quantizer import Matrix
from jaxquant.trace.views import expand

Grid = tuple[Float[Array, "groups outs"], Float[Array, "groups outs"]]
Range = Callable[[Matrix, Format, Float[Array, " in"]], Grid]

# Shares of the range that are tried; a good one is rarely below a half (two bits: a third).
_SHARES = tuple(1 - 0.03 * i for i in range(24))
_ROUNDS = 3


def absmax(w: Matrix, format: Format, importance: Float[Array, " in"]) -> Grid:
    """The whole range of each group."""
    del importance
    return fit(w, format, (0,))


def least_squares(w: Matrix, format: Format, importance: Float[Array, " in"]) -> Grid:
    """The range with the least squared error, weighted by the importance `E[x^2]` of each input.

    Shares of the whole range are tried, then the scale and zero point are alternately fitted to the codes and the codes
    to them; each group keeps the best it has seen.
    """
    w = w.astype(jnp.float32)
    error = functools.partial(squared_error, w, format=format, importance=importance)

    def better(best, grid):
        (old_error, old), new_error = best, error(*grid)
        keep = new_error < old_error
        return jnp.where(keep, new_error, old_error), jax.tree.map(lambda a, b: jnp.where(keep, a, b), grid, old)

    def narrow(best, share):
        return better(best, fit(w, format, (0,), share)), None

    whole = fit(w, format, (0,))
    best, _ = jax.lax.scan(narrow, (error(*whole), whole), jnp.asarray(_SHARES[1:], jnp.float32))
    if format.is_integer:
        for _ in range(_ROUNDS):
            best = better(best, refit(w, format, best[1], importance))
    return best[1]


def squared_error(
    w: Matrix, scale: Array, zero: Array, *, format: Format, importance: Float[Array, " in"]
) -> Float[Array, "groups outs"]:
    """`sum_k importance_k (w_k - decode(encode(w_k)))^2` of each group."""
    error = w - value(encode(w, scale, zero, format), scale, zero, format)
    return group_sums(importance[:, None] * jnp.square(error), scale)


def refit(w: Matrix, format: Format, grid: Grid, importance: Float[Array, " in"]) -> Grid:
    """The least-squares scale for the codes that a grid gives, and the zero point nearest to its own optimum."""
    codes = encode(w, *grid, format)
    weight, total = importance[:, None], group_sums(jnp.broadcast_to(importance[:, None], w.shape), grid[0])
    scale, zero = grid
    if not format.symmetric:
        shift = group_sums(weight * (codes - w / expand(scale, w.shape)), scale) / jnp.maximum(total, 1e-30)
        zero = jnp.clip(jnp.round(shift), format.qmin, format.qmax)
    steps = codes - expand(zero, w.shape)
    up, down = group_sums(weight * w * steps, scale), group_sums(weight * steps * steps, scale)
    fitted = up / jnp.where(down > 0, down, 1)
    return jnp.where((down > 0) & (fitted > 0), fitted, scale), zero


def group_sums(values: Matrix, like: Float[Array, "groups outs"]) -> Float[Array, "groups outs"]:
    """Sums over what shares a scale."""
    groups, outputs = like.shape
    split = values.reshape(groups, values.shape[0] // max(groups, 1), outputs, values.shape[1] // max(outputs, 1))
    # A product with ones: the order in which XLA adds up the rows of an array depends on the number of threads.
    ones = jnp.ones((split.shape[1], split.shape[3]), values.dtype)
    return jnp.einsum("gkom,km->go", split, ones, precision="highest")
