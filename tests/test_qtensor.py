"""A QTensor is a tree of arrays that tells the truth: every transformation of JAX commutes with decoding it.

Truth       shape, dtype, size, bytes and granularity are read off the arrays, and the bytes are those XLA takes
Stacks      slicing leading axes of the QTensor is slicing the decoded array
Transforms  jit, vmap, grad, scan, donation, eval_shape, device_put do to a QTensor what they do to its arrays
"""

import dataclasses
import functools
import subprocess
import sys

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from jax.sharding import Mesh, NamedSharding, PartitionSpec, SingleDeviceSharding
from tables import DTYPES, FORMATS, SAMPLE, SHAPE, block, normal, same, spread, table

import jaxquant as jq
from jaxquant.errors import ClosureError, ShapeError

STACK = (3, 2, 32, 5)

INDICES = {
    "first": 0,
    "last": -1,
    "slice": slice(1, 3),
    "strided": slice(None, None, 2),
    "reversed": slice(None, None, -1),
    "empty": slice(0, 0),
    "pair": (1, 0),
    "both": (slice(0, 2), 1),
    "array": np.array([2, 0, 2]),
    "mask": np.array([True, False, True]),
}


@functools.cache
def quantized(name: str, shape=SHAPE, dtype=jnp.float32, **kwargs) -> jq.QTensor:
    return jq.quantize(normal(shape, dtype), FORMATS[name], **kwargs)


def xla_bytes(tree) -> int:
    """What a compiled program takes for the arrays of a tree."""
    return jax.jit(lambda x: x).lower(tree).compile().memory_analysis().argument_size_in_bytes


@pytest.mark.parametrize("name", FORMATS)
def test_shape_dtype_and_granularity_are_read_off_the_arrays(name):
    """Law: a QTensor says of itself what its array was and how it was written."""
    q, format = quantized(name, dtype=jnp.bfloat16), FORMATS[name]
    assert (q.shape, q.ndim, q.size, q.dtype) == (SHAPE, 2, 64 * 12, jnp.bfloat16)
    assert q.codes.dtype == format.container
    assert q.scale.shape == tuple(n // b for n, b in zip(SHAPE, block(format, SHAPE), strict=True))
    assert q.is_integer == format.is_integer and (q.zero is None) == format.symmetric
    assert q.description == str(format)


@pytest.mark.parametrize("name", FORMATS)
def test_nbytes_is_what_xla_takes(name):
    """Law: nbytes, the arithmetic of bits, and the memory XLA allots are one number."""
    q, format = quantized(name), FORMATS[name]
    width = {8: 8, 4: 4, 3: 4, 2: 2}[format.bits]
    blocks = q.scale.size
    expected = 64 * 12 * width // 8 + 4 * blocks + (0 if format.symmetric else -(-blocks * width // 8))
    assert q.nbytes == expected
    assert name not in SAMPLE or xla_bytes(q) == expected


@given(st.sampled_from(["int4-channel", "int2-channel", "int3-affine-channel"]), st.integers(1, 9), st.integers(1, 9))
@settings(deadline=None, max_examples=8, derandomize=True)
def test_nbytes_rounds_up_what_does_not_fill_a_byte(name, rows, columns):
    """Law: an odd number of packed codes takes one more half-filled byte, as XLA says."""
    q = quantized(name, (rows, columns))
    assert q.nbytes == xla_bytes(q)


@pytest.mark.parametrize("name", SAMPLE)
def test_repr_says_shape_bits_granularity_and_bytes(name):
    """Law: the repr is one readable line, for arrays, for shapes and for tracers alike."""
    q, format = quantized(name), FORMATS[name]
    seen = []
    jax.eval_shape(lambda q: seen.append(repr(q)) or q, q)
    assert seen == [repr(jax.eval_shape(lambda: q))] == [repr(q)]
    assert "\n" not in repr(q)
    words = ("64, 12", "float32", str(format), f"{q.nbytes:,} bytes")
    assert [word for word in words if word not in repr(q)] == []


def test_repr_of_a_tree_of_something_else_does_not_fail():
    """Law: a QTensor of shardings, gradients or None still prints."""
    q = quantized("int8-channel")
    for other in (jax.tree.map(lambda _: None, q), jax.tree.map(lambda a: a.sharding, q), jax.tree.map(id, q)):
        assert repr(other).startswith("QTensor(")


@pytest.mark.parametrize("name", SAMPLE)
def test_it_is_a_pytree(name):
    """Law: flatten and unflatten are inverse, its leaves have names, and equal formats give equal structures."""
    q = quantized(name)
    leaves, treedef = jax.tree.flatten(q)
    assert all(a is b for a, b in zip(leaves, jax.tree.leaves(treedef.unflatten(leaves)), strict=True))
    paths = [jax.tree_util.keystr(path) for path, _ in jax.tree_util.tree_leaves_with_path({"w": q})]
    assert paths == [f"['w'].{field}" for field in ("codes", "scale", *(["zero"] if q.zero is not None else []))]
    assert treedef == jax.tree.structure(jq.quantize(normal(SHAPE, seed=1), FORMATS[name]))
    assert hash(treedef) == hash(jax.tree.structure(jax.eval_shape(lambda: q)))
    with pytest.raises(dataclasses.FrozenInstanceError):
        q.scale = q.scale


@pytest.mark.parametrize("name", SAMPLE)
@pytest.mark.parametrize("index", **table(INDICES))
def test_slicing_a_stack_is_slicing_the_decoded_array(name, index):
    """Law: dequantize(q[i]) == dequantize(q)[i], with the bytes of a stack quantized matrix by matrix."""
    q = quantized(name, STACK)
    part = q[index]
    assert same(np.asarray(jq.dequantize(part)), np.asarray(jq.dequantize(q))[index])
    assert part.shape == np.empty(STACK)[index].shape and part.description.split()[0] == q.description.split()[0]


@pytest.mark.parametrize("axis", [(0, 2), (1, 2), (0, 1, 2)])
def test_slicing_a_stack_that_shares_its_scales(axis):
    """Law: the same where the leading axes are contracted too, so that the stack shares its scales."""
    q = quantized("int8-channel", STACK, axis=axis)
    for index in (0, (1, 1), slice(1, 3)):
        assert same(np.asarray(jq.dequantize(q[index])), np.asarray(jq.dequantize(q))[index])


def test_a_traced_index_slices_a_stack():
    """Law: slicing works with the index of a loop."""
    q = quantized("int4-affine-group", STACK)
    for i in range(3):
        assert same(jax.jit(lambda q, i: jq.dequantize(q[i]))(q, i), jq.dequantize(q)[i])


@pytest.mark.parametrize(
    "shape, index", [(SHAPE, 0), (SHAPE, slice(0, 8)), (STACK, (0, 0, 0)), ((4,), 0)], ids=["row", "rows", "deep", "1d"]
)
def test_a_matrix_is_not_sliced(shape, index):
    """Law: only leading axes of a stack are sliced: cutting into a matrix is refused with what to do instead."""
    with pytest.raises(ShapeError, match="dequantize"):
        quantized("int8-tensor", shape)[index]


@pytest.mark.parametrize("axis", [-1, -2, 0])
@pytest.mark.parametrize(
    "index",
    [(Ellipsis, 20), (Ellipsis, 0, 20), (None, 0), np.eye(32, dtype=bool)],
    ids=["row", "element", "new", "mask"],
)
def test_an_unusual_index_is_right_or_refused(axis, index):
    """Law: no index gives wrong weights: an ellipsis, a new axis and a mask mean what they mean for an array."""
    q = quantized("int4-group", (32, 32, 32), axis=axis)
    try:
        part = q[index]
    except (ShapeError, IndexError):
        return
    assert same(np.asarray(jq.dequantize(part)), np.asarray(jq.dequantize(q))[index])


def test_iterating_a_stack_gives_its_matrices():
    """Law: a loop over a stack is a loop over its slices, and ends."""
    q = quantized("int8-channel", (3, 32, 5))
    assert [same(a, q[i]) for i, a in zip(range(4), q, strict=False)] == [True] * 3


@pytest.mark.parametrize("name", SAMPLE)
def test_jit_takes_and_gives_it_whole(name):
    """Law: a QTensor through a jit is the same QTensor, and its static fields cause no second compilation."""
    traces = []
    through = jax.jit(lambda q: traces.append(1) or q)
    for seed in range(2):
        q = jq.quantize(normal(SHAPE, seed=seed), FORMATS[name])
        assert same(through(q), q)
    assert len(traces) == 1


@pytest.mark.parametrize("name", ["int8-channel", "int4-affine-group", "int2-group", "nf4-group"])
def test_vmap_over_a_stack_decodes_each(name):
    """Law: vmap(dequantize) over the leading axis is dequantize of the stack, and quantize maps back."""
    stack = jax.vmap(lambda w: jq.quantize(w, FORMATS[name]))(jnp.asarray(normal((3, 32, 5))))
    assert same(jax.vmap(jq.dequantize)(stack), jq.dequantize(stack))


@pytest.mark.parametrize("name", ["int8-channel", "int4-affine-group", "int2-group", "nf4-group"])
def test_scan_over_a_stack_is_a_loop_over_decoded_matrices(name):
    """Law: a scan slices the stack as indexing does, and stacks the QTensors that it returns."""
    q = jax.vmap(lambda w: jq.quantize(w, FORMATS[name]))(jnp.asarray(normal((3, 32, 32))))
    rows = jnp.asarray(normal((4, 32)))
    out, back = jax.lax.scan(lambda x, layer: (jnp.tanh(x @ jq.dequantize(layer)), layer), rows, q)
    expected = rows
    for w in jq.dequantize(q):
        expected = jnp.tanh(expected @ w)
    np.testing.assert_allclose(out, expected, rtol=1e-4, atol=1e-5)
    assert same(back, q)


@pytest.mark.parametrize("name", SAMPLE)
def test_the_gradient_flows_through_the_scales(name):
    """Law: d sum(c * decode(q)) / d scale is, of each block, sum(c * (code - zero)): exact where c is an integer.

    The magnitudes are small integers (of a codebook or an 8-bit float, multiples of 2^-24), so float64 has no rounding.
    """
    q = quantized(name)
    c = np.random.default_rng(0).integers(-4, 5, SHAPE).astype(np.float32)
    grad = jax.grad(lambda q: jnp.sum(jq.dequantize(q) * c), allow_int=True)(q)
    ones = dataclasses.replace(q, scale=jnp.ones_like(q.scale))
    terms = np.asarray(jq.dequantize(ones)).astype(np.float64) * c
    size = tuple(n // s for n, s in zip(q.shape, q.scale.shape, strict=True))
    split = [n for pair in zip(q.scale.shape, size, strict=True) for n in pair]
    expected = terms.reshape(split).sum(axis=(1, 3))
    magnitude = np.abs(terms).reshape(split).sum(axis=(1, 3))
    assert np.all(np.abs(np.asarray(grad.scale) - expected) <= 64 * 12 * 2.0**-24 * magnitude)
    assert grad.codes.shape == q.shape
    if q.is_integer:
        assert np.array_equal(np.asarray(grad.scale), expected.astype(np.float32))
        assert grad.codes.dtype == jax.dtypes.float0


@pytest.mark.parametrize("name", ["int8-channel", "int4-affine-group", "nf4-group"])
def test_a_donated_tensor_is_gone_and_its_memory_used(name):
    """Law: donating a QTensor donates each of its arrays."""
    expected = 2 * np.asarray(jq.dequantize(quantized(name)))
    q = jax.tree.map(jnp.copy, quantized(name))
    moved = jax.jit(lambda q: dataclasses.replace(q, scale=q.scale * 2), donate_argnums=0)(q)
    assert all(part.is_deleted() for part in jax.tree.leaves(q))
    assert same(np.asarray(jq.dequantize(moved)), expected)


@pytest.mark.parametrize("name", FORMATS)
def test_eval_shape_knows_everything_but_the_values(name):
    """Law: shapes, dtypes, bytes and description of a quantized array need no array."""
    abstract = jax.eval_shape(lambda w: jq.quantize(w, FORMATS[name]), jax.ShapeDtypeStruct(SHAPE, jnp.bfloat16))
    q = quantized(name, dtype=jnp.bfloat16)
    for field in ("shape", "dtype", "nbytes", "size", "ndim", "description"):
        assert getattr(abstract, field) == getattr(q, field)
    described = jax.tree.map(lambda a: jax.ShapeDtypeStruct(a.shape, a.dtype), q)
    assert jax.tree.leaves(abstract) == jax.tree.leaves(described)
    assert jax.tree.structure(abstract) == jax.tree.structure(q)


@pytest.mark.parametrize("name", ["int8-channel", "int4-affine-group", "nf4-group", "e4m3-tensor"])
def test_device_put_takes_one_sharding_or_one_for_each_array(name):
    """Law: device_put places each array and changes none."""
    q, device = quantized(name), jax.devices()[0]
    mesh = Mesh(np.array([device]), ("x",))
    for sharding in (SingleDeviceSharding(device), NamedSharding(mesh, PartitionSpec(None, "x"))):
        placed = jax.device_put(q, sharding)
        assert same(placed, q) and placed.codes.sharding == sharding
        assert same(jax.device_put(q, jax.tree.map(lambda _, s=sharding: s, q)), q)


SHARDED = """
import jax, jax.numpy as jnp, numpy as np, jaxquant as jq
from jax.sharding import NamedSharding, PartitionSpec as P
jax.config.update("jax_platforms", "cpu")
jax.config.update("jax_num_cpu_devices", 8)
mesh = jax.make_mesh((8,), ("x",), axis_types=(jax.sharding.AxisType.Auto,))
w = jnp.asarray(np.random.default_rng(0).standard_normal((64, 32)), jnp.float32)
for format in (jq.int8, jq.int4(group=8, symmetric=False), jq.nf4(group=8)):
    q = jq.quantize(w, format)
    for spec in (P(None, "x"), P("x", None)) if format.group else (P(None, "x"),):
        placed = jax.device_put(q, NamedSharding(mesh, spec))
        assert not placed.codes.sharding.is_fully_replicated
        assert {s.data.size for s in placed.codes.addressable_shards} == {64 * 32 // 8}
        decoded = jax.jit(jq.dequantize)(placed)
        assert decoded.sharding.spec == spec, (format, decoded.sharding)
        assert np.array_equal(decoded, jq.dequantize(q)), format
        again = jax.jit(lambda w: jq.quantize(w, format))(jax.device_put(w, NamedSharding(mesh, spec)))
        assert all(np.array_equal(a, b) for a, b in zip(jax.tree.leaves(again), jax.tree.leaves(q))), format
print("sharded")
"""


@pytest.mark.devices
def test_shards_over_eight_devices_decode_to_the_same_bits():
    """Law: codes and scales cut along outputs, or along inputs between groups, decode and encode as the whole does."""
    run = subprocess.run([sys.executable, "-c", SHARDED], capture_output=True, text=True, timeout=120)
    assert (run.returncode, run.stdout.strip()) == (0, "sharded"), run.stderr[-2000:]


@pytest.mark.parametrize("dtype", **table(DTYPES))
def test_astype_decodes_to_another_dtype_from_the_same_codes(dtype):
    """Law: the dtype is a label: changing it touches no array, and decoding rounds once."""
    q = quantized("int4-group")
    assert q.astype(dtype).codes is q.codes and q.astype(dtype).scale is q.scale
    assert same(np.asarray(jq.dequantize(q.astype(dtype))), np.asarray(jq.dequantize(q)).astype(dtype))


@pytest.mark.parametrize(
    "use",
    [jnp.asarray, jnp.sum, lambda q: jnp.add(q, 1), lambda q: jnp.ones((2, 64), jnp.float32) @ q, np.asarray, np.abs],
    ids=["asarray", "sum", "add", "matmul", "numpy", "numpy's abs"],
)
def test_using_it_as_an_array_says_what_to_do(use):
    """Law: a QTensor is no array: an operation that meets one names it and the two ways out."""
    with pytest.raises(ClosureError) as error:
        use(quantized("int8-channel"))
    assert all(word in str(error.value) for word in ("64, 12", "quantized(fn)", "dequantize"))


@pytest.mark.parametrize(
    "make, way_out",
    [
        (jq.learn_steps, "qat(fn, format)"),
        (jq.learn_clips, "qat(fn, format)"),
        (lambda tree: jq.add_lora(tree, 2, key=jax.random.key(0)), "quantized(fn)"),
    ],
    ids=["steps", "clips", "adapters"],
)
def test_using_what_trains_beside_a_weight_as_an_array_says_what_to_do(make, way_out):
    """Law: neither is a weight with a learned range or an adapter."""
    tree = make({"kernel": jnp.asarray(normal(SHAPE))})
    with pytest.raises(ClosureError) as error:
        jnp.ones((2, 64), jnp.float32) @ tree["kernel"]
    assert "64, 12" in str(error.value) and way_out in str(error.value)


def test_dequantize_decodes_the_qtensors_of_a_tree_and_nothing_else():
    """Law: dequantize maps over a tree, whose other leaves stay the very same objects."""
    q, bias, key = quantized("int8-channel"), jnp.ones(3, jnp.float32), jax.random.key(0)
    tree = {"a": [q, bias], "b": (key, "name", None, 7), "c": {"d": q}}
    out = jq.dequantize(tree)
    assert same(out["a"][0], jq.dequantize(q)) and same(out["c"]["d"], jq.dequantize(q))
    assert out["a"][1] is bias and out["b"][0] is key and out["b"][1:] == ("name", None, 7)


def test_a_scale_of_any_divisor_is_a_granularity():
    """Law: shapes are the configuration: blocks over both axes decode as NumPy's repeat says, with no other field."""
    codes = np.random.default_rng(0).integers(-7, 8, (8, 6)).astype(np.int8)
    for shape in ((1, 1), (2, 1), (4, 3), (8, 6), (1, 2)):
        scale = normal(shape)
        q = jq.QTensor(jnp.asarray(codes), jnp.asarray(scale), None, np.dtype("float32"), 8)
        size = tuple(n // s for n, s in zip(codes.shape, shape, strict=True))
        assert same(np.asarray(jq.dequantize(q)), (codes * spread(scale, size).astype(np.float32)).astype(np.float32))


@pytest.mark.parametrize("dtype", [jnp.float8_e4m3fn, jnp.float8_e5m2])
def test_every_float8_is_the_number_its_bits_say(dtype):
    """Law: all 256 decode to what ml_dtypes says, subnormals, infinities and NaN included."""
    codes = np.arange(256, dtype=np.uint8).view(dtype).reshape(16, 16)
    q = jq.QTensor(jnp.asarray(codes), jnp.ones((1, 1)), None, jnp.float32, 8)
    for found in (jq.dequantize(q), jax.jit(jq.dequantize)(q)):
        assert np.array_equal(found, codes.astype(np.float32), equal_nan=True)


@pytest.mark.parametrize("bits", [2, 3, 4])
def test_every_index_is_looked_up(bits):
    """Law: a signed code is the entry that comes half their count after it, whatever the container."""
    levels = tuple(np.linspace(-1, 1, 2**bits).round(3).tolist())
    codes = np.arange(2**bits) - 2 ** (bits - 1)
    for dtype in (jnp.int8, jnp.int4) if bits > 2 else (jnp.int8, jnp.int4, jnp.int2):
        q = jq.QTensor(jnp.asarray(codes[None], dtype), jnp.ones((1, 1)), None, jnp.float32, bits, levels)
        assert np.array_equal(jq.dequantize(q), np.asarray([levels], np.float32))
