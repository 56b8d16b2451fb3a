"""Nearest rounding at a width that is an array: one compiled step sweeps widths, or lowers them while it trains."""

import dataclasses

import jax.numpy as jnp
from jax.typing import ArrayLike

from jaxquant.encode import fit, write
from jaxquant.errors import FormatError
from jaxquant.format import Format, int8
from jaxquant.qtensor import QTensor
from jaxquant.quantizers.quantizer import Matrix, check_format
from jaxquant.stats import Stats


@dataclasses.dataclass(frozen=True)
class at_bits:
    """Rounds to the `2^bits - 1` codes around zero, in the container of a wider format.

        qmax = 2^(bits - 1) - 1,    scale = max|w| / qmax,    codes = round(w / scale)

    Codes and scales are those of `rtn` at that width, to a rounding of the scale.

    Args:
      bits: a number or a traced array; 2 up to the width of the format.
      format: the container and the groups, of symmetric integers.
    """

    bits: ArrayLike
    format: Format = int8

    def __post_init__(self):
        check_format("at_bits", self.format)
        if not (self.format.is_integer and self.format.symmetric):
            raise FormatError(f"at_bits({self.format}): a width is varied within symmetric integers.")
        if isinstance(self.bits, int) and not 2 <= self.bits <= self.format.bits:
            raise FormatError(f"at_bits({self.bits}): a width is from 2 to the {self.format.bits} bits of the format.")

    def __call__(self, w: Matrix, stats: Stats | None) -> QTensor:
        """The codes of one matrix."""
        del stats
        qmax = jnp.exp2(jnp.asarray(self.bits, jnp.float32) - 1) - 1
        scale, zero = fit(w, self.format, (0,), self.format.qmax / qmax)
        return write(w.astype(jnp.float32), scale, zero, self.format).astype(w.dtype)
