"""The one table of formats, dtypes and indices that the laws run over, and an oracle in NumPy float64.

The oracle knows one thing only: the *block* of weights that share a scale. A block is a shape that divides the array's,
so the statistics are reductions over blocks and the scale has one element per block.
"""

import contextlib
import dataclasses
import itertools

import jax
import jax.numpy as jnp
import jaxtyping
import ml_dtypes
import numpy as np

import jaxquant as jq

GRANULARITIES = {"tensor": {"per_channel": False}, "channel": {"group": None}, "group": {"group": 16}}

_KINDS = {
    **{f"int{bits}": jq.Format(bits=bits) for bits in (8, 4, 3, 2)},
    **{f"int{bits}-affine": jq.Format(bits=bits, symmetric=False) for bits in (8, 4, 3, 2)},
    "e4m3": jq.fp8,
    "e5m2": jq.Format(dtype=jnp.float8_e5m2),
    "nf4": jq.nf4(group=None),
}

FORMATS = {
    f"{kind}-{name}": format(**granularity)
    for (kind, format), (name, granularity) in itertools.product(_KINDS.items(), GRANULARITIES.items())
}
SYMMETRIC = {name: format for name, format in FORMATS.items() if format.symmetric}
INTEGERS = {name: format for name, format in FORMATS.items() if format.dtype is None and format.levels is None}
# One or two of each kind, for laws of JAX's transformations, which compile anew for each.
SAMPLE = {
    name: FORMATS[name]
    for name in (
        *("int8-channel", "int8-tensor", "int4-group", "int4-affine-group", "int3-affine-channel"),
        *("int2-group", "e4m3-channel", "e5m2-group", "nf4-group"),
    )
}
DTYPES = {"f32": jnp.float32, "bf16": jnp.bfloat16, "f16": jnp.float16}

SHAPE = (64, 12)

# What the 8-bit floats can hold: mantissa bits and the smallest subnormal.
FLOATS = {
    np.dtype(ml_dtypes.float8_e4m3fn): (3, 2.0**-9, 448.0),
    np.dtype(ml_dtypes.float8_e5m2): (2, 2.0**-16, 57344.0),
}


def table(rows: dict) -> dict:
    """The arguments of `pytest.mark.parametrize` for one table of rows."""
    return {"argvalues": list(rows.values()), "ids": list(rows)}


@contextlib.contextmanager
def as_shipped():
    """Switches the tests' own type checks off, which users do not have: the library must refuse by itself."""
    jaxtyping.config.update("jaxtyping_disable", True)
    try:
        yield
    finally:
        jaxtyping.config.update("jaxtyping_disable", False)


def normal(shape, dtype=jnp.float32, seed: int = 0) -> np.ndarray:
    """N(0, 1) in one of the float dtypes."""
    return np.random.default_rng(seed).standard_normal(shape).astype(dtype)


def block(format: jq.Format, shape: tuple[int, ...], axis=-2) -> tuple[int, ...]:
    """The shape of the weights that share a scale."""
    if not format.per_channel:
        return tuple(shape)
    axes = sorted(a % len(shape) for a in ((axis,) if isinstance(axis, int) else axis))
    if format.group is None:
        return tuple(n if i in axes else 1 for i, n in enumerate(shape))
    return tuple(format.group if i == axes[-1] else 1 for i, n in enumerate(shape))


def reduce_blocks(reduction, w, size: tuple[int, ...]) -> np.ndarray:
    """One number for each block."""
    split = itertools.chain(*((n // b, b) for n, b in zip(w.shape, size, strict=True)))
    return reduction(w.reshape(tuple(split)), axis=tuple(range(1, 2 * w.ndim, 2)))


def spread(part, size: tuple[int, ...]) -> np.ndarray:
    """The number of each block, on all of its weights."""
    part = np.asarray(part).astype(np.float64)
    for axis, n in enumerate(size):
        part = np.repeat(part, n, axis)
    return part


def exactly(q: jq.QTensor) -> jq.QTensor:
    """The same codes with scales that are powers of two, so that products of whole numbers round nothing."""
    return dataclasses.replace(q, scale=jnp.exp2(jnp.round(jnp.log2(q.scale))))


def limits(format: jq.Format) -> tuple[float, float]:
    """The smallest and largest code, written out independently of `Format`."""
    if format.levels is not None:
        return -1.0, 1.0
    if format.dtype is not None:
        top = FLOATS[np.dtype(format.dtype)][2]
        return -top, top
    top = 2.0 ** (format.bits - 1) - 1
    return (-top if format.symmetric else -top - 1), top


def ranges(w, format: jq.Format, axis=-2) -> tuple[np.ndarray, np.ndarray]:
    """The range of each block in float64, always with zero inside."""
    w, size = np.asarray(w).astype(np.float64), block(format, np.shape(w), axis)
    return np.minimum(reduce_blocks(np.min, w, size), 0), np.maximum(reduce_blocks(np.max, w, size), 0)


def oracle_scale(w, format: jq.Format, axis=-2) -> np.ndarray:
    """`max|r| / qmax`, or `(max(r, 0) - min(r, 0)) / (qmax - qmin)`, in float64."""
    (low, high), (qmin, qmax) = ranges(w, format, axis), limits(format)
    return np.maximum(-low, high) / qmax if format.symmetric else (high - low) / (qmax - qmin)


def half_step(ratio, format: jq.Format) -> np.ndarray:
    """Half the distance between the codes on either side of a weight, in units of the scale."""
    if format.levels is not None:
        levels = np.asarray(format.levels, np.float32).astype(np.float64)
        above = np.clip(np.searchsorted(levels, ratio), 1, len(levels) - 1)
        return (levels[above] - levels[above - 1]) / 2
    if format.dtype is not None:
        mantissa, subnormal, _ = FLOATS[np.dtype(format.dtype)]
        return np.maximum(np.abs(ratio) * 2.0 ** -(mantissa + 1), subnormal / 2)
    return np.full(np.shape(ratio), 0.5)


def bits_of(array) -> np.ndarray:
    """The bytes of an array, for equality that also tells NaN from NaN and 0 from -0."""
    array = np.asarray(array)
    return np.frombuffer(array.tobytes(), np.uint8)


def same(a, b) -> bool:
    """Whether two arrays, QTensors or trees are the same bit for bit, dtypes, shapes and static fields included."""
    if not hasattr(a, "shape"):
        pairs = zip(jax.tree.leaves(a), jax.tree.leaves(b), strict=True)
        return jax.tree.structure(a) == jax.tree.structure(b) and all(same(x, y) for x, y in pairs)
    if isinstance(a, jq.QTensor):
        statics = (a.dtype, a.bits, a.levels) == (b.dtype, b.bits, b.levels)
        parts = [(a.codes, b.codes), (a.scale, b.scale), (a.zero, b.zero)]
        return statics and all((x is None and y is None) or same(x, y) for x, y in parts)
    return a.shape == b.shape and a.dtype == b.dtype and np.array_equal(bits_of(a), bits_of(b))
