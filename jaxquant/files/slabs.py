"""A leaf in codes slab by slab: what lies between its floats and its codes is never there whole.

w[out, in] --cut along an axis that no scale spans--> slabs --quantizer, one by one--> codes, filled into those of all
"""

import functools
import math
from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Shaped

from jaxquant.format import Format
from jaxquant.params import layout
from jaxquant.qtensor import QTensor
from jaxquant.quantizers import Quantizer, absmax, as_quantizer, rtn

_SLAB = 2**21  # bytes of the source; what lies in between is several times as much, in float32


def free_axis(path: str, shape: tuple[int, ...], quantizer: Format | Quantizer) -> int | None:
    """The longest axis along which slabs are quantized as the whole is, or None where none is known.

    Only nearest rounding in the whole range of the weights looks, for each code, at the weights of its own scale alone.
    Any other quantizer may look at all of them, or add them up in an order that follows from the shape.

    Args:
      path: of the leaf, which tells the axes that share a scale.
      shape: of the leaf.
      quantizer: a format or a quantizer, which is not given statistics.
    """
    chosen = as_quantizer(quantizer)
    if type(chosen) is not rtn or chosen.range is not absmax or len(shape) < 2:
        return None
    where = layout(path, len(shape))
    stack = range(len(shape) - where.rank)
    shared = {a % len(shape) for a in where.contracted} if chosen.format.per_channel else {*range(len(shape))}
    free = [axis for axis in range(len(shape)) if axis in stack or axis not in shared]
    return max(free, key=shape.__getitem__, default=None)


def in_slabs(read: Callable[[], Float[np.ndarray, "..."]], axis: int, encode: Callable[[Array], QTensor]) -> QTensor:
    """What `encode` gives of the whole leaf, bit for bit, in arrays of numpy.

    Args:
      read: gives the leaf; it is asked anew for each slab, so that it can let the pages of the last one leave memory.
      axis: an axis that no scale spans.
      encode: the codes of a slab.
    """
    leaf = read()
    length = leaf.shape[axis]
    # Of even lengths, so that few are compiled, and never one row, which XLA might compile to other arithmetic.
    count = max(1, min(math.ceil(leaf.nbytes / _SLAB), length // 2))
    whole = None
    for number in range(count):
        here = (*(slice(None),) * axis, slice(length * number // count, length * (number + 1) // count))
        slab = encode(jnp.asarray(read()[here]))
        if whole is None:
            whole = jax.tree.map(functools.partial(_room, axis=axis, length=length), slab)
        for into, part in zip(jax.tree.leaves(whole), jax.tree.leaves(slab), strict=True):
            into[here] = part
    assert whole is not None
    return whole


def _room(part: Array, axis: int, length: int) -> Shaped[np.ndarray, "..."]:
    """For a part of the codes of all slabs."""
    return np.empty((*part.shape[:axis], length, *part.shape[axis + 1 :]), part.dtype)
