"""Rotation: inputs are mixed by a signed Hadamard matrix, so that no weight and no activation is an outlier."""

import dataclasses

import jax
import jax.numpy as jnp

from jaxquant.errors import OptionError
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
      block: the longest a block may be, a power of two; None for no limit. Where inputs are heads,
        `[heads, head, out]`, a block has to divide a head, or to be several whole ones.

    Raises:
      OptionError: `block` is no power of two.
    """

    seed: int = 0
    block: int | None = None

    def __post_init__(self):
        super().__post_init__()
        if self.block is not None and (type(self.block) is not int or self.block < 2 or self.block.bit_count() > 1):
            raise OptionError(f"rotated(block={self.block!r}): a block is a power of two, such as 32, or None.")

    def __call__(self, w: Matrix, stats: Stats | None) -> QTensor:
        """The codes of one matrix."""
        inputs = w.shape[0]
        signs = jax.random.rademacher(jax.random.key(self.seed), (inputs, 1), jnp.int8)
        longest = block_length(inputs)
        length = min(longest, self.block or longest)  # of two powers of two the smaller one divides the other
        signs = signs if length > 1 else jnp.ones_like(signs)
        rotation = Rotation(signs, jnp.zeros((inputs // length, 1), bool))
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
