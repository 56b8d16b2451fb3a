"""`Quantizer`: the one shape of an algorithm, and the law that none of them ends worse than nearest rounding.

tr(D^T H D) <= tr(R^T H R)      D = w - decode(quantizer(w, stats)),  R = w - decode(quantize(w, format)),
                                H = E[x x^T], or 1 where there are no statistics
"""

import dataclasses
from typing import Protocol, runtime_checkable

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from jaxquant.encode import quantize
from jaxquant.errors import OptionError
from jaxquant.format import Format
from jaxquant.qtensor import QTensor, decode
from jaxquant.stats import Stats, output_error

Matrix = Float[Array, "in out"]


@runtime_checkable
class Quantizer(Protocol):
    """A frozen value that writes one matrix in codes; it is pure, so it jits and vmaps over stacks of matrices.

    Its `format` is that of the codes. A quantizer that wraps another one puts the transform of the input that it
    needs before those of the inner one.
    """

    @property
    def format(self) -> Format:
        """The format of the codes."""
        ...

    def __call__(self, w: Matrix, stats: Stats | None) -> QTensor:
        """Codes for `w[in, out]`, given the statistics of its inputs, or None."""
        ...


def check_format(quantizer: str, format: object) -> None:
    """Checks that what a quantizer was given for a format is one.

    Raises:
      OptionError: it is another quantizer, a text, a dtype.
    """
    if not isinstance(format, Format):
        raise OptionError(f"{quantizer}({format!r}): give it the format of the codes, such as jq.int4(group=64).")


def loss(w: Matrix, q: QTensor, stats: Stats | None) -> Float[Array, ""]:
    """`tr(D^T H D)` of a quantized matrix, in float32."""
    return output_error(w.astype(jnp.float32) - decode(q.astype(jnp.float32)), stats)


def never_worse(w: Matrix, q: QTensor, stats: Stats | None, format: Format) -> QTensor:
    """The better one of a result and nearest rounding, which gets the structure of the result, doing nothing."""
    nearest = quantize(w.astype(jnp.float32), format).astype(w.dtype)
    idle = tuple(transform.identity() for transform in q.transform)
    none_kept = q.kept and dataclasses.replace(q.kept, mask=jnp.zeros_like(q.kept.mask))
    nearest = dataclasses.replace(nearest, transform=idle, kept=none_kept)
    keep = loss(w, q, stats) < loss(w, nearest, stats)  # what is not finite loses
    return jax.tree.map(lambda ours, plain: jnp.where(keep, ours, plain), q, nearest)
