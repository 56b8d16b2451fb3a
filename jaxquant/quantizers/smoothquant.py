"""SmoothQuant: what is hard to quantize in the activations is moved into the weights."""

import dataclasses

import jax.numpy as jnp

from jaxquant.errors import OptionError, StatsError
from jaxquant.qtensor import QTensor
from jaxquant.quantizers.awq import factors, rescaled
from jaxquant.quantizers.quantizer import Matrix
from jaxquant.quantizers.wrapper import Wrapper
from jaxquant.stats import Stats


@dataclasses.dataclass(frozen=True)
class smoothquant(Wrapper):
    """SmoothQuant (Xiao et al., arXiv:2211.10438): `x w = (x / s) (s w)`, for int8 activations and weights.

        s_k = max|x_k|^alpha / max|w_k|^(1 - alpha)

    Args:
      inner: the quantizer of the rescaled matrix.
      alpha: how much of the activations' spread goes into the weights, in [0, 1].
    """

    alpha: float = 0.5

    def __post_init__(self):
        super().__post_init__()
        if not 0 <= self.alpha <= 1:
            raise OptionError(f"smoothquant(alpha={self.alpha}): alpha lies in [0, 1].")

    def __call__(self, w: Matrix, stats: Stats | None) -> QTensor:
        """The codes of one matrix.

        Raises:
          StatsError: there are no statistics.
        """
        if stats is None:
            raise StatsError("smoothquant needs the largest size of each input: calibrate(fn, params, batches).")
        of_x, of_w = stats.absmax, jnp.max(jnp.abs(w.astype(jnp.float32)), axis=1)
        s = factors(of_x, jnp.asarray(self.alpha)) / factors(of_w, jnp.asarray(1 - self.alpha))
        return rescaled(w, self.quantizer, stats, s).astype(w.dtype)
