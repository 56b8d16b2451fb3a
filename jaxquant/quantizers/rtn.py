"""Nearest rounding: every weight to its nearest code, in a range that may be searched."""

import dataclasses

import jax.numpy as jnp

from jaxquant.encode import write
from jaxquant.errors import OptionError
from jaxquant.format import Format
from jaxquant.qtensor import QTensor
from jaxquant.quantizers.quantizer import Matrix, Quantizer, check_format, never_worse
from jaxquant.quantizers.ranges import Range, absmax
from jaxquant.stats import Stats, mean_square


@dataclasses.dataclass(frozen=True)
class rtn:
    """Rounds to nearest: `codes = round(w / scale) + zero` in the range that `range` chooses.

    Args:
      format: of the codes.
      range: `absmax`, or `least_squares`, which clips where that lowers the squared error; it weighs inputs by E[x^2]
        when there are statistics with a Gram matrix.
    """

    format: Format
    range: Range = absmax

    def __post_init__(self):
        check_format("rtn", self.format)

    def __call__(self, w: Matrix, stats: Stats | None) -> QTensor:
        """The codes of one matrix."""
        scale, zero = self.range(w, self.format, mean_square(stats, w.shape[0]))
        q = write(w.astype(jnp.float32), scale, zero, self.format).astype(w.dtype)
        return q if self.range is absmax else never_worse(w, q, stats, self.format)


def as_quantizer(chosen: Quantizer | Format) -> Quantizer:
    """A quantizer; a format means nearest rounding.

    Raises:
      OptionError: it is neither.
    """
    if not isinstance(chosen, Format | Quantizer):
        raise OptionError(f"{chosen!r} is no quantizer: give a format such as jq.int4, or jq.gptq(jq.int4), ...")
    return rtn(chosen) if isinstance(chosen, Format) else chosen
