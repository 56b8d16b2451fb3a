"""Outliers: the inputs with the largest statistics keep their weights in float, beside the codes of the others."""

import dataclasses

import jax.numpy as jnp
from jaxtyping import Array, Bool

from jaxquant.errors import OptionError, StatsError
from jaxquant.qtensor import Kept, QTensor
from jaxquant.quantizers.quantizer import Matrix, never_worse
from jaxquant.quantizers.wrapper import Wrapper
from jaxquant.stats import Stats


@dataclasses.dataclass(frozen=True)
class outliers(Wrapper):
    """Keeps one input of each block of inputs in float (LLM.int8(), arXiv:2208.07339, with the outliers spread evenly).

        x w  ~=  x_kept w_kept + x_rest decode(inner(w_rest))

    Which one is kept is decided by `max|x|`. One of each block, because then the kept rows divide the inputs as scales
    do, and follow the weight through slices and transposes.

    Args:
      inner: the quantizer of the other inputs.
      block: the length of a block; it divides the inputs. 64 keeps 1.6 % of them.
    """

    block: int = 64

    def __post_init__(self):
        super().__post_init__()
        if type(self.block) is not int or self.block < 2:
            raise OptionError(f"outliers(block={self.block!r}): one of each block is kept; a block has 2 or more.")

    def __call__(self, w: Matrix, stats: Stats | None) -> QTensor:
        """The codes of one matrix.

        Raises:
          StatsError: there are no statistics.
          OptionError: the block does not divide the inputs, or the inner quantizer transforms them.
        """
        if stats is None:
            raise StatsError("outliers needs the largest size of each input: calibrate(fn, params, batches).")
        inputs = w.shape[0]
        if inputs % self.block:
            raise OptionError(f"outliers(block={self.block}) does not divide the {inputs} inputs of {w.shape}.")
        blocks = stats.absmax.reshape(-1, self.block)
        member = jnp.argmax(blocks, axis=1)
        mask = (jnp.arange(self.block)[None] == member[:, None]).reshape(inputs, 1)
        rows = jnp.take_along_axis(w.astype(jnp.float32).reshape(-1, self.block, w.shape[1]), member[:, None, None], 1)
        q = self.quantizer(jnp.where(mask, 0, w), without(stats, ~mask[:, 0]))
        if q.transform or q.kept is not None:
            raise OptionError("outliers(...) goes inside rotations and rescalings: rotated(outliers(inner)).")
        return never_worse(w, dataclasses.replace(q, kept=Kept(mask, rows[:, 0])), stats, self.format)


def without(stats: Stats, rest: Bool[Array, " in"]) -> Stats:
    """The statistics of the inputs where `rest` is 1, with zeros for the others."""
    rest = rest.astype(jnp.float32)
    gram = None if stats.gram is None else stats.gram * rest[:, None] * rest[None, :]
    return dataclasses.replace(stats, absmax=stats.absmax * rest, abssum=stats.abssum * rest, gram=gram)
