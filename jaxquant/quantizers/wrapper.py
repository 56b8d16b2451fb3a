"""What the quantizers that take another one have in common."""

import dataclasses

from jaxquant.format import Format
from jaxquant.quantizers.quantizer import Quantizer
from jaxquant.quantizers.rtn import as_quantizer


@dataclasses.dataclass(frozen=True)
class Wrapper:
    """Holds the inner quantizer; a format in its place means nearest rounding, so that equal ones are equal.

    Args:
      inner: the quantizer.
    """

    inner: Quantizer | Format

    def __post_init__(self):
        object.__setattr__(self, "inner", as_quantizer(self.inner))

    @property
    def quantizer(self) -> Quantizer:
        """The inner quantizer."""
        return as_quantizer(self.inner)

    @property
    def format(self) -> Format:
        """That of the inner quantizer."""
        return self.quantizer.format
