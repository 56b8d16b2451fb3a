"""Look-ups in a parameter in codes: rows of an embedding come out as floats, whole matrices stay in codes."""

from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
from jax.lax import GatherScatterMode
from jaxtyping import Array, Int

from jaxquant.qtensor import QTensor


def picked_axis(shape: tuple[int, ...], params: Mapping[str, Any]) -> int | None:
    """The one axis a `gather` picks whole slices along; None for any other kind of gather."""
    numbers, sizes = params["dimension_numbers"], params["slice_sizes"]
    if len(numbers.start_index_map) != 1 or numbers.operand_batching_dims:
        return None
    (axis,) = numbers.start_index_map
    whole = all(size == n for a, (size, n) in enumerate(zip(sizes, shape, strict=True)) if a != axis)
    plain_fill = params["fill_value"] is None or params["fill_value"] != params["fill_value"]  # NaN
    picks = tuple(numbers.collapsed_slice_dims) == (axis,) and sizes[axis] == 1
    return axis if whole and picks and plain_fill and shape[axis] > 0 else None


def pick(q: QTensor, indices: Int[Array, "... 1"], axis: int, params: Mapping[str, Any]) -> QTensor:
    """The slices of `q` at `indices` along `axis`; NaN where `jnp.take` would fill in NaN.

    Integer codes cannot hold a NaN, so the scale of a slice out of range does.
    """
    n = q.shape[axis]
    safe = jnp.clip(indices, 0, n - 1)

    def part(array: Array) -> Array:
        sizes = tuple(1 if a == axis else size for a, size in enumerate(array.shape))
        index = safe // (n // array.shape[axis])
        return jax.lax.gather(array, index, params["dimension_numbers"], sizes, mode="clip")

    picked = jax.tree.map(part, q)
    if params["mode"] != GatherScatterMode.FILL_OR_DROP:
        return picked
    outside = (indices != safe)[..., 0]
    offsets = params["dimension_numbers"].offset_dims
    mask = jnp.expand_dims(outside, tuple(offsets))
    absent = [picked.scale] + ([] if picked.kept is None else [picked.kept.rows])
    return jax.tree.map(lambda a: jnp.where(mask, jnp.nan, a) if any(a is b for b in absent) else a, picked)
