"""`half_scales`: codes whose scales a GGUF file can hold."""

import dataclasses

import jax
import jax.numpy as jnp

from jaxquant.errors import OptionError
from jaxquant.qtensor import QTensor
from jaxquant.quantizers.quantizer import Matrix, loss
from jaxquant.quantizers.wrapper import Wrapper
from jaxquant.stats import Stats
from jaxquant.trace.views import expand

MIDDLE = 8  # what llama.cpp adds to a 4-bit code, so that it is not negative
_SMALLEST, _LARGEST = 2.0**-24, 65504.0  # positive numbers of float16


@dataclasses.dataclass(frozen=True)
class half_scales(Wrapper):
    """Rounds the scales of another quantizer to float16 before the codes are chosen, as llama.cpp's blocks keep them.

        scale' = float16(scale),    zero' = -(8 + float16(-(8 + zero) * scale) / scale')

    The codes are those nearest to the weights on these scales, or the inner quantizer's own, whichever have the lower
    `tr(D^T H D)`. A zero point is a float32, so that `-(8 + zero) * scale`, which llama.cpp adds, is a float16.

    Args:
      inner: a format of integers or a quantizer of one, such as `jq.int4(group=32)` or `jq.gptq(jq.int4(group=32))`.

    Raises:
      OptionError: the inner quantizer transforms the input or keeps weights in float, or its codes are no integers.
    """

    def __call__(self, w: Matrix, stats: Stats | None) -> QTensor:
        """The codes of one matrix."""
        q = self.quantizer(w, stats)
        if not q.is_integer or q.transform or q.kept is not None:
            raise OptionError(
                f"half_scales({self.inner}): it wraps plain integer codes, and these are {q.description}."
            )
        ours = _in_half(q.settled)
        nearest = dataclasses.replace(ours, codes=self._nearest(w, ours))
        keep = loss(w, ours, stats) < loss(w, nearest, stats)
        return jax.tree.map(lambda a, b: jnp.where(keep, a, b), ours, nearest)

    def _nearest(self, w: Matrix, q: QTensor):
        ratio = w.astype(jnp.float32) / expand(q.scale, w.shape)
        shifted = ratio if q.zero is None else ratio + expand(q.zero, w.shape)
        codes = jnp.clip(jnp.round(shifted), self.format.qmin, self.format.qmax)
        return codes.astype(q.codes.dtype)


def _in_half(q: QTensor) -> QTensor:
    scale = _half(jnp.clip(q.scale, _SMALLEST, _LARGEST))
    if q.zero is None:
        return dataclasses.replace(q, scale=scale)
    offset = _half(jnp.clip(-(MIDDLE + q.zero.astype(jnp.float32)) * q.scale, -_LARGEST, _LARGEST))
    return dataclasses.replace(q, scale=scale, zero=-(MIDDLE + offset / scale))


def _half(values):
    return values.astype(jnp.float16).astype(jnp.float32)
