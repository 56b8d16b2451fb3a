"""GPTQ: inputs are rounded one by one, and what rounding each costs is made up for by those that are still to come."""

import dataclasses
import functools
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax.scipy.linalg import solve_triangular
from jaxtyping import Array, Bool, Float

from jaxquant.encode import assemble, encode, value
from jaxquant.errors import OptionError
from jaxquant.format import Format
from jaxquant.qtensor import QTensor
from jaxquant.quantizers.quantizer import Matrix, check_format, never_worse
from jaxquant.quantizers.ranges import Range, least_squares
from jaxquant.stats import Stats, mean_square, need_gram

_BLOCK = 128
# What damping is multiplied by where the matrix cannot be factored, and how often.
_ESCALATION, _ESCALATIONS = 10.0, 4


@dataclasses.dataclass(frozen=True)
class gptq:
    """GPTQ (Frantar et al., arXiv:2210.17323): minimises `tr(D^T H D)` greedily, row by row of `w[in, out]`.

        H = E[x x^T] + damping * mean(diag H),     U^T U = H^-1,  U upper triangular
        for k in order:   c_k = encode(w_k),   e_k = (w_k - decode(c_k)) / U_kk,   w_j -= U_kj e_k   for j > k

    Inputs that were never active keep their nearest codes. Where H cannot be factored, damping is escalated by tens;
    where that does not help either, nearest rounding stays (`jq.report` shows it).

    Args:
      format: of the codes.
      range: chooses the ranges of the groups before the first row is rounded.
      damping: a share of the mean of H's diagonal, positive.
      by_activity: whether the most active inputs come first (act-order); the groups stay where they are.
      refresh: whether each group's range is chosen anew when its first row comes, from the weights as they are then;
        the rows then have to come in order.
    """

    format: Format
    range: Range = least_squares
    damping: float = 0.01
    by_activity: bool = True
    refresh: bool = False

    def __post_init__(self):
        check_format("gptq", self.format)
        if not 0 < self.damping < float("inf"):
            raise OptionError(f"gptq(damping={self.damping}): damping is a positive share of the mean of diag(H).")
        if self.refresh and (self.by_activity or self.format.group is None):
            raise OptionError("gptq(refresh=True): rows have to come in order (by_activity=False), and in groups.")

    def __call__(self, w: Matrix, stats: Stats | None) -> QTensor:
        """The codes of one matrix.

        Raises:
          StatsError: there is no Gram matrix.
        """
        gram = need_gram(stats, "gptq")
        assert stats is not None
        hessian = gram / jnp.maximum(stats.count, 1)
        w32, activity = w.astype(jnp.float32), jnp.diagonal(hessian)
        grid = self.range(w32, self.format, mean_square(stats, w.shape[0]))
        order = jnp.argsort(-activity) if self.by_activity else jnp.arange(w.shape[0])
        factor = factored(hessian[order][:, order], self.damping)
        rows = Rows(w32[order], *(expand_rows(part, w.shape[0])[order] for part in grid))
        codes, rows = round_rows(rows, factor, self.format, self.range if self.refresh else None)
        place = jnp.argsort(order)
        if self.refresh:
            first = jnp.arange(0, w.shape[0], self.format.group)
            grid = (rows.scale[first], rows.zero[first])
        # Codes cannot be NaN; a scale that is loses against nearest rounding.
        scale = jnp.where(jnp.all(jnp.isfinite(factor)), grid[0], jnp.nan)
        q = assemble(codes[place], scale, grid[1], w.dtype, self.format)
        return never_worse(w, q, stats, self.format)


class Rows(NamedTuple):
    """A matrix in the order its rows are rounded, with the scale and zero point of every weight."""

    w: Float[Array, "in out"]
    scale: Float[Array, "in out"]
    zero: Float[Array, "in out"]


def factored(hessian: Float[Array, "in in"], damping: float) -> Float[Array, "in in"]:
    """The upper triangular U with `U^T U = (H + damping * mean(diag H))^-1`; NaN where nothing helped."""
    diagonal = jnp.diagonal(hessian)
    dead = diagonal <= 0
    # A dead input has zeros in its row and column: with 1 on the diagonal it is on its own.
    alive = hessian + jnp.diag(dead.astype(jnp.float32))
    mean = jnp.sum(diagonal) / jnp.maximum(jnp.sum(~dead, dtype=jnp.float32), 1)
    unit = jnp.eye(hessian.shape[0], dtype=jnp.float32)

    def attempt(share: Array) -> Array:
        # H = L' L'^T with L' upper triangular: the Cholesky factor of H read backwards.
        lower = jnp.linalg.cholesky((alive + share * mean * unit)[::-1, ::-1])
        return solve_triangular(lower[::-1, ::-1], unit, lower=False)

    def fails(state: tuple[Array, Array, Array]) -> Bool[Array, ""]:
        tries, _, factor = state
        return (tries <= _ESCALATIONS) & ~jnp.all(jnp.isfinite(factor))  # JAX's Cholesky returns NaN

    def escalate(state: tuple[Array, Array, Array]) -> tuple[Array, Array, Array]:
        tries, share, _ = state
        return tries + 1, share * _ESCALATION, attempt(share)

    first = (jnp.asarray(0), jnp.asarray(damping, jnp.float32), jnp.full_like(hessian, jnp.nan))
    return jax.lax.while_loop(fails, escalate, first)[2]


def round_rows(
    rows: Rows, factor: Float[Array, "in in"], format: Format, refresh: Range | None
) -> tuple[Float[Array, "in out"], Rows]:
    """Rounds row after row; the rows after a block hear of its errors all at once.

    Returns:
      The codes, and the rows with the scales and zero points that were used.
    """
    inputs = rows.w.shape[0]
    size = format.group if refresh else block_size(inputs)
    assert size is not None

    def block(b: Array, state: tuple[Rows, Array]) -> tuple[Rows, Array]:
        (w, scale, zero), codes = state
        part = functools.partial(jax.lax.dynamic_slice_in_dim, start_index=b * size, slice_size=size)
        now = Rows(part(w), part(scale), part(zero))
        if refresh:
            grid = refresh(now.w, format(group=None), jnp.ones((size,), jnp.float32))
            now = Rows(now.w, *(expand_rows(one, size) for one in grid))
        across = part(factor)
        done, errors = _round_block(now, part(across, axis=1), format)
        later = jnp.where(jnp.arange(inputs)[None, :] >= (b + 1) * size, across, 0)
        w = w - jnp.matmul(later.T, errors, precision="highest")
        put = lambda whole, new: jax.lax.dynamic_update_slice_in_dim(whole, new, b * size, 0)  # noqa: E731
        return Rows(w, put(scale, now.scale), put(zero, now.zero)), put(codes, done)

    rows, codes = jax.lax.fori_loop(0, inputs // size, block, (rows, jnp.zeros_like(rows.w)))
    return codes, rows


def _round_block(rows: Rows, factor: Float[Array, "b b"], format: Format) -> tuple[Array, Array]:
    """The codes of a block of rows, and the error of each divided by its `U_kk`."""
    place = jnp.arange(rows.w.shape[0])

    def one(k: Array, state: tuple[Array, Array, Array]) -> tuple[Array, Array, Array]:
        w, codes, errors = state
        pick = lambda matrix: jax.lax.dynamic_slice_in_dim(matrix, k, 1)  # noqa: E731
        code = encode(pick(w), pick(rows.scale), pick(rows.zero), format).astype(jnp.float32)
        along = pick(factor)[0]
        error = (pick(w) - value(code, pick(rows.scale), pick(rows.zero), format)) / along[k]
        w = w - jnp.where(place > k, along, 0)[:, None] * error
        put = lambda whole, row: jax.lax.dynamic_update_slice_in_dim(whole, row, k, 0)  # noqa: E731
        return w, put(codes, code), put(errors, error)

    blank = jnp.zeros_like(rows.w)
    _, codes, errors = jax.lax.fori_loop(0, rows.w.shape[0], one, (rows.w, blank, blank))
    return codes, errors


def block_size(inputs: int) -> int:
    """How many rows hear of each other's errors at once: the largest divisor that is not too large."""
    return max(d for d in range(1, min(inputs, _BLOCK) + 1) if inputs % d == 0)


def expand_rows(part: Float[Array, "groups outs"], inputs: int) -> Float[Array, "in outs"]:
    """A scale or zero point for every row."""
    return jnp.repeat(part, inputs // part.shape[0], axis=0)
