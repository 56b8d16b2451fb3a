"""Rotation: inputs are mixed by a signed Hadamard matrix, so that no weight and no activation is an outlier."""

import dataclasses

import jax
import jax.numpy as jnp

from jaxquant.inputs import Rotation, block_length
from jaxquant.qtensor import QTensor
from jaxquant.quantizers.quantizer import Matrix, never_worse
from jaxquant.quantizers.wrapper import Wrapper
from jaxquant.stats import Stats


@dataclasses.dataclass(frozen=True)
class rotated(Wrapper):
    """Quantizes `R w` by another quantizer, and rotates inputs: `x w = (R x) (R w)`, R orthogonal.

    R multiplies inputs by random signs, then blocks of them by a Hadamard matrix of the largest power of two that
    divides their number (QuIP#, arXiv:2402.04396; QuaRot, arXiv:2404.00456). A matrix of odd width is not rotated.

    Args:
      inner: the quantizer of the rotated matrix.
      seed: of the signs.
    """

    seed: int = 0

    def __call__(self, w: Matrix, stats: Stats | None) -> QTensor:
        """The codes of one matrix."""
        inputs = w.shape[0]
        signs = jax.random.rademacher(jax.random.key(self.seed), (inputs, 1), jnp.int8)
        signs = signs if block_length(inputs) > 1 else jnp.ones_like(signs)
        rotation = Rotation(signs, jnp.zeros((inputs // block_length(inputs), 1), bool))
        turn = lambda rows: jax.tree.map(lambda part: part[None], rotation).apply(rows[None])[0]  # noqa: E731
        q = self.quantizer(turn(w.astype(jnp.float32).T).T, None if stats is None else _turned(stats, turn))
        q = dataclasses.replace(q, transform=(rotation, *q.transform)).astype(w.dtype)
        return never_worse(w, q, stats, self.format)


def _turned(stats: Stats, turn) -> Stats:
    """The statistics of rotated inputs: the Gram matrix, and what Gaussian inputs of those variances would show."""
    count = jnp.maximum(stats.count, 1)
    if stats.gram is None:
        spread = jnp.full_like(stats.absmax, jnp.sqrt(jnp.mean(jnp.square(stats.abssum / count))))
        gram = None
    else:
        gram = turn(turn(stats.gram).T)
        spread = jnp.sqrt(jnp.maximum(jnp.diagonal(gram), 0) / count)
    # A Gaussian's mean size, and its largest of a few thousand.
    return dataclasses.replace(
        stats, abssum=0.8 * spread * count, absmax=4 * spread, above=jnp.zeros_like(stats.above), gram=gram
    )
