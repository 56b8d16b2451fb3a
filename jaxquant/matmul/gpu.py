"""What a GPU does with activations and codes: one row in a reduction, more in a kernel, on one device or on many.

    out[m, n] = sum_g slope[g, n] sum_k x[m, k] value(codes[k, n])  -  offset[g, n] sum_k x[m, k]

with the scale as the slope, and the scale times the zero point as the offset where there is one. Both read the codes
where they lie and never write a decoded weight. One row is bound by memory and needs no tensor cores, and XLA fuses a
reduction with the slice of a stack of layers; from two rows on the kernel of `triton` multiplies on them.

XLA cannot cut a kernel into shards by itself, so it is told here how: every device multiplies what it has of the
weight, and where inputs are split the results are added up.
"""

import functools
import math
from typing import Any

import jax
import jax.numpy as jnp
from jax.experimental.custom_partitioning import custom_partitioning
from jax.experimental.layout import Layout, with_layout_constraint
from jax.lax import Precision
from jax.sharding import Mesh, NamedSharding, PartitionSpec
from jaxtyping import Array, Float, Shaped

from jaxquant.matmul.triton import Coding, tiles, triton_dot
from jaxquant.qtensor import QTensor

# XLA writes the terms of longer sums out, to cut them.
_TERMS = 128


def gpu_dot(x: Shaped[Array, "B M K"], q: QTensor, precision: Precision = Precision.DEFAULT) -> Float[Array, "B M N"]:
    """`x @ decode(q)` in float32, of `x` in int8 codes or floats, without decoding."""
    slope = jnp.broadcast_to(q.scale.astype(jnp.float32), (q.shape[0], q.scale.shape[1], q.shape[2]))
    slopes = [slope] if q.zero is None else [slope, slope * q.zero.astype(jnp.float32)]
    coding, operands = Coding(q.codes.dtype, q.levels, precision), (x, q.codes, jnp.stack(slopes, axis=1))
    product = functools.partial(_on_devices, coding)
    explicit = jax.sharding.get_abstract_mesh().explicit_axes
    if not explicit:
        return product(*operands)
    batch, rows, _, outputs = _placed(*map(jax.typeof, operands[:2]))
    spec = PartitionSpec(batch, rows, outputs)
    return jax.sharding.auto_axes(axes=explicit, out_sharding=spec)(product)(*operands)


def gpu_dot_floats(x: Float[Array, "B M K"], q: QTensor, precision: Precision) -> Float[Array, "B M N"]:
    """The same in the dtype of the weight, so that a bfloat16 model multiplies in bfloat16."""
    return gpu_dot(x.astype(q.dtype), q, precision)


@functools.partial(custom_partitioning, static_argnums=(0,))
def _on_devices(coding: Coding, x, codes, slopes) -> Float[Array, "B M N"]:
    return _on_device(coding, x, codes, slopes)


def _partition(coding: Coding, mesh: Mesh, arguments, result):
    del result
    batch, rows, inputs, outputs = _placed(*arguments[:2])
    groups, shards = arguments[2].shape[2], math.prod(mesh.shape[name] for name in _names(inputs))
    if groups > 1 and groups % shards:
        inputs = None  # a group would be cut
    specs = [(batch, rows, inputs), (batch, inputs, outputs), (batch, None, None if groups == 1 else inputs, outputs)]

    def local(x, codes, slopes):
        with jax.sharding.use_abstract_mesh(jax.sharding.AbstractMesh((), ())):  # a shard has no mesh
            out = _on_device(coding, x, codes, slopes)
        return jax.lax.psum(out, _names(inputs)) if inputs else out

    *placed, assembled = [NamedSharding(mesh, PartitionSpec(*spec)) for spec in [*specs, (batch, rows, outputs)]]
    return mesh, local, assembled, tuple(placed)


_on_devices.def_partition(
    partition=_partition,
    sharding_rule="b m k, b k n, b p g n -> b m n",
    reduction_factors=("k",),
    need_replication_factors=("p", "g"),
)


def _placed(x: Any, codes: Any) -> tuple[Any, Any, Any, Any]:
    """The mesh axes of the batch, the rows, the inputs and the outputs: where the weight is, tokens go to it."""
    (_, rows, _), (batch, inputs, outputs) = _axes(x), _axes(codes)
    taken = {*_names(batch), *_names(inputs), *_names(outputs)}
    return batch, None if taken.intersection(_names(rows)) else rows, inputs, outputs


def _axes(argument: Any) -> tuple[Any, ...]:
    spec = tuple(argument.sharding.spec)
    return spec + (None,) * (len(argument.shape) - len(spec))


def _names(axis: Any) -> tuple[str, ...]:
    return () if axis is None else axis if isinstance(axis, tuple) else (axis,)


def _on_device(coding: Coding, x, codes, slopes) -> Float[Array, "B M N"]:
    """The product of what one device has."""
    if x.shape[1] == 1 and x.size:
        return _reduced(coding, x, codes, slopes)
    cut = tiles(x.shape[1], codes.shape[1:], slopes.shape[2], coding.packed)
    if cut is None or not x.size:
        return _widened(coding, x, codes, slopes)
    return jax.vmap(lambda x, codes, slopes: triton_dot(x, codes, slopes, coding, cut))(x, codes, slopes)


def _reduced(coding: Coding, x, codes, slopes) -> Float[Array, "B 1 N"]:
    """Multiplies and adds up, in the order the codes lie in memory: XLA would rather write them out in another."""
    (b, _, k), n, groups, exact = x.shape, codes.shape[2], slopes.shape[2], _exact(x)
    pieces = k // groups // math.gcd(k // groups, _TERMS)  # of a group
    rows = x.reshape(b, groups, pieces, -1, 1).astype(exact)
    products = rows * coding.numbers(codes, exact).reshape(b, groups, pieces, -1, n)
    sums = jnp.sum(with_layout_constraint(products, Layout((0, 1, 2, 3, 4))), axis=3)
    sums = jax.lax.optimization_barrier(sums)  # or the two sums become one again
    taken = jnp.sum(rows, axis=(2, 3))
    return jnp.sum(_scaled(jnp.sum(sums, axis=2), taken, slopes), axis=1, keepdims=True)


def _widened(coding: Coding, x, codes, slopes) -> Float[Array, "B M N"]:
    """Where the tiles do not fit, or nothing is there: a matmul for each group, and the scales after it."""
    (b, m, k), groups, exact = x.shape, slopes.shape[2], _exact(x)
    values = coding.numbers(codes, x.dtype).reshape(b, groups, k // groups, codes.shape[2])
    rows = jnp.swapaxes(x.reshape(b, m, groups, k // groups), 1, 2)
    sums = jnp.matmul(rows, values, precision=coding.precision, preferred_element_type=exact)
    taken = jnp.sum(rows, axis=3, dtype=exact, keepdims=True)
    return jnp.sum(_scaled(sums, taken, slopes[:, :, :, None]), axis=1)


def _scaled(sums: Array, taken: Array, slopes: Array) -> Array:
    scaled = sums.astype(jnp.float32) * slopes[:, 0]
    return scaled if slopes.shape[1] == 1 else scaled - taken.astype(jnp.float32) * slopes[:, 1]


def _exact(x: Array) -> Any:
    return jnp.int32 if x.dtype == jnp.int8 else jnp.float32
