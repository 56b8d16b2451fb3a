"""Look-ups in a parameter in codes: rows of an embedding come out as floats, whole matrices stay in codes."""

from collections.abc import Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.lax import GatherDimensionNumbers, GatherScatterMode
from jaxtyping import Array, Int

from jaxquant.packed import Packed, bytes_of, hides_bytes, places_of
from jaxquant.trace import Param
from jaxquant.trace.views import Bundle


class Pick(NamedTuple):
    """A `gather` of whole slices along one axis.

    Attributes:
      indices: of the slices.
      axis: the axis.
      params: those of the `gather`.
    """

    indices: Int[Array, "... 1"]
    axis: int
    params: Mapping[str, Any]


def picked(bundle: Bundle, indices: Int[Array, "... axes"], params: Mapping[str, Any]) -> Pick | None:
    """A `gather` of whole slices along one axis, none of which a transform mixes with others; None for any other."""
    indices, params = _without_idle(bundle.shape, indices, params)
    axis = _axis_of(bundle.shape, params)
    blocks = getattr(bundle, "blocks", (1,) * bundle.ndim)
    return None if axis is None or blocks[axis] > 1 else Pick(indices, axis, params)


def _without_idle(
    shape: tuple[int, ...], indices: Int[Array, "... axes"], params: Mapping[str, Any]
) -> tuple[Int[Array, "... picked"], Mapping[str, Any]]:
    """A `gather` without its indices along axes that it takes whole: clipped, they are 0 whatever they say.

    `jax.vmap(lambda i: w[i])`, which is how Equinox looks up rows, has such ones.
    """
    numbers, sizes = params["dimension_numbers"], params["slice_sizes"]
    used = [i for i, axis in enumerate(numbers.start_index_map) if sizes[axis] != shape[axis]]
    if params["mode"] != GatherScatterMode.CLIP or not used:
        return indices, params
    numbers = numbers._replace(start_index_map=tuple(numbers.start_index_map[i] for i in used))
    return indices[..., np.array(used)], {**params, "dimension_numbers": numbers}


def _axis_of(shape: tuple[int, ...], params: Mapping[str, Any]) -> int | None:
    """The one axis a `gather` picks whole slices along; None for any other kind of gather."""
    numbers, sizes = params["dimension_numbers"], params["slice_sizes"]
    if len(numbers.start_index_map) != 1 or numbers.operand_batching_dims:
        return None
    (axis,) = numbers.start_index_map
    whole = all(size == n for a, (size, n) in enumerate(zip(sizes, shape, strict=True)) if a != axis)
    plain_fill = params["fill_value"] is None or params["fill_value"] != params["fill_value"]  # NaN
    picks = tuple(numbers.collapsed_slice_dims) in ((axis,), ()) and sizes[axis] == 1
    return axis if whole and picks and plain_fill and shape[axis] > 0 else None


def pick_matrices(param: Any, indices: Any, params: Mapping[str, Any]) -> Param | None:
    """The matrices that a `gather` picks of a stack (experts), still a parameter; None where it picks others."""
    if not isinstance(param, Param) or isinstance(indices, Param):
        return None
    found, rank = picked(param.value, indices, params), param.value.ndim
    if found is None or rank < 3:
        return None
    indices, axis, params = found
    numbers = params["dimension_numbers"]
    batch = indices.shape[:-1]
    picks = batch if numbers.collapsed_slice_dims else (*batch, 1)
    in_place = tuple(numbers.offset_dims) == (*range(axis), *range(axis + len(batch), rank - 1 + len(picks)))
    origin = param.origin.index(axis, picks) if param.origin and in_place else None
    index = jnp.clip(indices[..., 0], 0, param.value.shape[axis] - 1)
    return param.view(slices(param.value, found), origin, index if origin else None)


def slices(bundle: Bundle, pick: Pick) -> Bundle:
    """The slices of a bundle; NaN where `jnp.take` would fill in NaN.

    Codes cannot hold a NaN, so the scale of a slice out of range does.
    """
    indices, axis, params = pick
    n = bundle.shape[axis]
    safe = jnp.clip(indices, 0, n - 1)

    def part(array: Array) -> Array:
        return _taken(array, safe // (n // array.shape[axis]), axis, params["dimension_numbers"])

    taken = jax.tree.map(part, bundle)
    if params["mode"] != GatherScatterMode.FILL_OR_DROP:
        return taken
    outside = (indices != safe)[..., 0]
    mask = jnp.expand_dims(outside, tuple(params["dimension_numbers"].offset_dims))

    def fill(array: Array) -> Array:
        wide = jnp.issubdtype(array.dtype, jnp.floating) and array.dtype.itemsize > 1  # narrow floats are codes
        return jnp.where(mask, jnp.nan, array) if wide else array

    return jax.tree.map(fill, taken)


def _taken(array: Array, index: Int[Array, "... 1"], axis: int, numbers: GatherDimensionNumbers) -> Array:
    """Slices of one array along an axis; rows of codes as their bytes, which a loop over tokens leaves as they are."""
    if hides_bytes(array.dtype) and axis == 0 and array.ndim == 2 and array.shape[1] % places_of(array.dtype) == 0:
        # Two of them where there is one: for a slice XLA on CPU would pack all bytes, for a gather those it reads.
        indices = jnp.stack([index] * (2 if index.size == 1 else 1))
        held = jax.vmap(lambda index: _taken(bytes_of(array), index, axis, numbers))(indices)
        return Packed(held[0], array.dtype).codes
    sizes = tuple(1 if a == axis else size for a, size in enumerate(array.shape))
    return jax.lax.gather(array, index, numbers, sizes, mode="clip")
