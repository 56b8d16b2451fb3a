"""AWQ: inputs that carry much are given a finer grid by scaling their weights up and them down."""

import dataclasses

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from jaxquant.errors import OptionError
from jaxquant.inputs import Rescale
from jaxquant.qtensor import QTensor
from jaxquant.quantizers.quantizer import Matrix, Quantizer, loss, never_worse
from jaxquant.quantizers.ranges import least_squares
from jaxquant.quantizers.rtn import rtn
from jaxquant.quantizers.wrapper import Wrapper
from jaxquant.stats import Stats, need_gram, rescale

# Beyond this ratio of the largest to the smallest factor nothing is gained and float32 suffers.
_WIDEST = 1e4


@dataclasses.dataclass(frozen=True)
class awq(Wrapper):
    """Activation-aware quantization (Lin et al., arXiv:2306.00978): `x w = (x / s) (s w)` with a good s.

        s = E|x|^a,    a = argmin over [0, 1] of  tr(D^T H D)  for nearest rounding of `s w`

    a is searched against the error of the output, with the range of each group searched too (the paper's clipping).

    Args:
      inner: the quantizer of the rescaled matrix.
      steps: how many exponents are tried.
    """

    steps: int = 20

    def __post_init__(self):
        super().__post_init__()
        if type(self.steps) is not int or self.steps < 1:
            raise OptionError(f"awq(steps={self.steps!r}): how many exponents are tried, 1 or more.")

    def __call__(self, w: Matrix, stats: Stats | None) -> QTensor:
        """The codes of one matrix.

        Raises:
          StatsError: there is no Gram matrix.
        """
        need_gram(stats, "awq")
        assert stats is not None
        w32, nearest = w.astype(jnp.float32), rtn(self.format, least_squares)

        def attempt(exponent: Array) -> Array:
            s = factors(stats.abssum, exponent)
            return loss(w32, rescaled(w32, nearest, stats, s), stats)

        exponents = jnp.arange(self.steps, dtype=jnp.float32) / self.steps
        best = exponents[jnp.argmin(jax.lax.map(attempt, exponents))]
        q = rescaled(w32, self.quantizer, stats, factors(stats.abssum, best)).astype(w.dtype)
        return never_worse(w, q, stats, self.format)


def factors(size: Float[Array, " in"], exponent: Array) -> Float[Array, " in"]:
    """`size^exponent` around 1, within bounds; 1 for inputs that were never active."""
    power = jnp.power(jnp.maximum(size, 1e-12 * jnp.max(size) + 1e-30), exponent)
    centred = power / (jnp.sqrt(jnp.max(power)) * jnp.sqrt(jnp.min(power)))
    return jnp.where(size > 0, jnp.clip(centred, _WIDEST**-0.5, _WIDEST**0.5), 1.0)


def rescaled(w: Matrix, inner: Quantizer, stats: Stats | None, s: Float[Array, " in"]) -> QTensor:
    """`s w` by another quantizer, with `x / s` for its inputs."""
    q = inner(w.astype(jnp.float32) * s[:, None], None if stats is None else rescale(stats, s))
    return dataclasses.replace(q, transform=(Rescale(1 / s[:, None]), *q.transform))
