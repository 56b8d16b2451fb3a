"""Stochastic rounding: up or down at random, so that the mean over keys is the weight itself."""

import dataclasses

import jax.numpy as jnp
from jaxtyping import Array, Float, Key, Shaped

from jaxquant.encode import assemble
from jaxquant.errors import FormatError
from jaxquant.format import Format
from jaxquant.noise import round_at_random
from jaxquant.qtensor import QTensor
from jaxquant.quantizers.quantizer import Matrix, check_format
from jaxquant.quantizers.ranges import Range, absmax
from jaxquant.stats import Stats, mean_square
from jaxquant.trace.views import expand


@dataclasses.dataclass(frozen=True)
class stochastic:
    """Rounds up with the probability of the fraction: `codes = floor(w / scale + u) + zero`, u uniform in [0, 1).

    E[decode(codes)] = w inside the range, so that small updates of a weight are not lost in training (Gupta et al.,
    arXiv:1502.02551). Every matrix has noise of its own, folded out of the key and its first number.

    Args:
      format: of the codes, integers.
      key: of the noise; another one for every step.
      range: as of `rtn`.
    """

    format: Format
    key: Key[Array, ""]
    range: Range = absmax

    def __post_init__(self):
        check_format("stochastic", self.format)
        if not self.format.is_integer:
            raise FormatError(f"stochastic({self.format}): only integer codes are rounded up or down.")

    def __call__(self, w: Matrix, stats: Stats | None) -> QTensor:
        """The codes of one matrix."""
        scale, zero = self.range(w, self.format, mean_square(stats, w.shape[0]))
        return assemble(self._codes(w.astype(jnp.float32), scale, zero), scale, zero, w.dtype, self.format)

    def _codes(self, w: Matrix, scale: Float[Array, "..."], zero: Float[Array, "..."]) -> Shaped[Array, "in out"]:
        codes = round_at_random(w / expand(scale, w.shape), self.key) + expand(zero, w.shape)
        return jnp.clip(codes, self.format.qmin, self.format.qmax)
