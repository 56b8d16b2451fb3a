"""HQQ: half-quadratic quantization, a range fitted to most weights and not to the few largest, without data."""

import dataclasses

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from jaxquant.encode import encode, fit, write
from jaxquant.errors import OptionError
from jaxquant.format import Format
from jaxquant.qtensor import QTensor
from jaxquant.quantizers.quantizer import Matrix, check_format, never_worse
from jaxquant.quantizers.ranges import Grid, refit
from jaxquant.stats import Stats, mean_square
from jaxquant.trace.views import expand


@dataclasses.dataclass(frozen=True)
class hqq:
    """Half-quadratic quantization (Badri & Shaji 2023, https://mobiusml.github.io/hqq_blog/).

        argmin over scale, zero of  |w - decode(encode(w))|_p^p,   p < 1

    by turns: the error is shrunk to `e = sign(r) max(0, |r| - |r|^(p-1) / beta)`, which leaves the large ones, and the
    scale and zero point are fitted to `w - e` by least squares; beta grows. The zero point stays an integer here, so
    the scale is fitted along with it. It needs no data; the fit weighs inputs by E[x^2] where that is known.

    Args:
      format: of the codes; integers.
      p: the norm, in (0, 1].
      rounds: how many turns are taken.
    """

    format: Format
    p: float = 0.7
    rounds: int = 20

    def __post_init__(self):
        check_format("hqq", self.format)
        if not self.format.is_integer:
            raise OptionError(f"hqq({self.format}): a scale and a zero point are fitted, so codes have to be integers.")
        if not 0 < self.p <= 1 or type(self.rounds) is not int or self.rounds < 1:
            raise OptionError(f"hqq(p={self.p}, rounds={self.rounds}): p lies in (0, 1], and there is a round or more.")

    def __call__(self, w: Matrix, stats: Stats | None) -> QTensor:
        """The codes of one matrix."""
        w32, importance = w.astype(jnp.float32), mean_square(stats, w.shape[0])
        grid = fit(w32, self.format, (0,))
        # In units of each group's scale, so that beta means the same everywhere.
        unit = expand(grid[0], w.shape)

        def turn(i: Array, grid: Grid) -> Grid:
            steps = encode(w32, *grid, self.format) - expand(grid[1], w.shape)
            residual = w32 - steps * expand(grid[0], w.shape)
            target = w32 - unit * _shrink(residual / unit, 2.0 * 1.05 ** i.astype(jnp.float32), self.p)
            return refit(target, self.format, grid, importance)

        scale, zero = jax.lax.fori_loop(0, self.rounds, turn, grid)
        return never_worse(w, write(w32, scale, zero, self.format).astype(w.dtype), stats, self.format)


def _shrink(r: Float[Array, "..."], beta: Float[Array, ""], p: float) -> Float[Array, "..."]:
    """The minimiser of `|e|_p^p + beta / 2 |e - r|^2`, to first order."""
    size = jnp.abs(r)
    return jnp.sign(r) * jnp.maximum(size - jnp.power(size + 1e-8, p - 1) / beta, 0)
