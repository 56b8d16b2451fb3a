"""Equations that only move data: which view of a parameter each one takes.

A missing rule here means a silently decoded weight, so `explain` lists every parameter that was decoded and by what.
"""

from collections.abc import Sequence
from itertools import accumulate
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.extend.core import JaxprEqn

from jaxquant.trace import views
from jaxquant.trace.param import Param
from jaxquant.trace.provenance import Origin


def result_of(eqn: JaxprEqn) -> jax.ShapeDtypeStruct:
    """The shape and dtype of an equation's first result."""
    aval: Any = eqn.outvars[0].aval
    return jax.ShapeDtypeStruct(aval.shape, aval.dtype)


def _if_taken(param: Param, bundle, origin: Origin | None) -> Param | None:
    """The parameter through a view that may not exist."""
    return None if bundle is None else param.view(bundle, origin)


def _ints(values: Sequence) -> tuple[int, ...]:
    """Equation parameters as Python numbers: NumPy's come along from models that compute their shapes with it."""
    return tuple(map(int, values))


def _convert(eqn: JaxprEqn, param: Param) -> Param | None:
    dtype = eqn.params["new_dtype"]
    return param.view(param.value.astype(dtype), param.origin) if jnp.issubdtype(dtype, jnp.floating) else None


def _transpose(eqn: JaxprEqn, param: Param) -> Param:
    return param.transposed(_ints(eqn.params["permutation"]))


def _reshape(eqn: JaxprEqn, param: Param) -> Param | None:
    """`reshape`, `squeeze` and `expand_dims` alike: the result's shape says it all."""
    if eqn.params.get("dimensions") is not None and eqn.primitive.name == "reshape":
        return None
    new = result_of(eqn).shape
    return _if_taken(
        param, views.reshape(param.value, param.value.shape, new), param.origin and param.origin.reshape(new)
    )


def _broadcast(eqn: JaxprEqn, param: Param) -> Param:
    new, dimensions = _ints(eqn.params["shape"]), _ints(eqn.params["broadcast_dimensions"])
    origin = param.origin and param.origin.broadcast(new, dimensions)
    return param.view(views.broadcast(param.value, param.value.shape, new, dimensions), origin)


def _slice(eqn: JaxprEqn, param: Param) -> Param | None:
    shape, start, limit = param.value.shape, _ints(eqn.params["start_indices"]), _ints(eqn.params["limit_indices"])
    strides = _ints(eqn.params["strides"] or (1,) * len(shape))
    return _cut(param, start, limit, strides)


def _cut(param: Param, start: Sequence[int], limit: Sequence[int], strides: Sequence[int]) -> Param | None:
    sizes = [-((a - b) // step) for a, b, step in zip(start, limit, strides, strict=True)]
    bundle = views.cut(param.value, param.value.shape, tuple(start), tuple(limit), tuple(strides))
    return _if_taken(param, bundle, param.origin and param.origin.cut(start, sizes))


def _dynamic_slice(eqn: JaxprEqn, param: Param, *starts) -> Param | None:
    shape, sizes = param.value.shape, _ints(eqn.params["slice_sizes"])
    known = [int(start) if isinstance(start, int | np.integer) else None for start in starts]
    bundle = views.dynamic_cut(param.value, shape, starts, sizes)
    origin, before = param.origin and param.origin.cut(known, sizes), param.origin
    if bundle is None or origin is None or before is None or origin.indexed == before.indexed:
        return _if_taken(param, bundle, origin)
    (axis,) = [a for a, size in enumerate(sizes) if size == 1 != shape[a] and known[a] is None]
    return param.view(bundle, origin, jnp.clip(starts[axis], 0, shape[axis] - 1))


def _constraint(eqn: JaxprEqn, param: Param) -> Param:
    sharding = eqn.params["sharding"]
    pin = lambda part: jax.lax.with_sharding_constraint(part, sharding)  # noqa: E731
    return param.view(views.constrain(param.value, param.value.shape, pin), param.origin)


def _copy(eqn: JaxprEqn, param: Param) -> Param:
    del eqn
    return param


def _split(eqn: JaxprEqn, param: Param) -> list | None:
    shape, axis, sizes = param.value.shape, eqn.params["axis"], _ints(eqn.params["sizes"])
    ends = accumulate(sizes)
    pieces = [_part(param, shape, axis, end - size, end) for size, end in zip(sizes, ends, strict=True)]
    return None if any(piece is None for piece in pieces) else pieces


def _part(param: Param, shape, axis: int, begin: int, end: int) -> Param | None:
    start, limit = [0] * len(shape), list(shape)
    start[axis], limit[axis] = begin, end
    return _cut(param, start, limit, (1,) * len(shape))


def _barrier(eqn: JaxprEqn, *operands) -> list:
    del eqn
    return list(jax.lax.optimization_barrier(operands))


_VIEWS = {
    "convert_element_type": _convert,
    "transpose": _transpose,
    "reshape": _reshape,
    "squeeze": _reshape,
    "expand_dims": _reshape,
    "broadcast_in_dim": _broadcast,
    "slice": _slice,
    "dynamic_slice": _dynamic_slice,
    "sharding_constraint": _constraint,
    "copy": _copy,
    "split": _split,
    "optimization_barrier": _barrier,
}


def moved(eqn: JaxprEqn, inputs: Sequence) -> list | None:
    """The results of an equation that moves a parameter; None where it does not, or where no view can be taken."""
    view = _VIEWS.get(eqn.primitive.name)
    if view is None or (view is not _barrier and not isinstance(inputs[0], Param)):
        return None
    if any(isinstance(x, Param) for x in inputs[1:]) and view is not _barrier:
        return None
    result = view(eqn, *inputs)
    return result if result is None or isinstance(result, list) else [result]
