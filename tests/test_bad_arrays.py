"""What bad arrays get: a clear error that names the path and the value, or a defined result; never a silent change.

The rows of the contract, first for one array (`quantize`, `fake_quantize`), then for a tree (`quantize_params`).
"""

import warnings

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tables import DTYPES, FORMATS, SAMPLE, SHAPE, as_shipped, block, limits, normal, same, spread, table

import jaxquant as jq
from jaxquant.errors import FormatError, NoMatchError, NonFiniteError, NotQuantizableError, ShapeError

AFFINE = {name: FORMATS[name] for name in ("int8-affine-channel", "int4-affine-group", "int2-affine-tensor")}
# The fewer the codes, the larger the scale: that of two bits is the largest weight itself.
EXTREME = SAMPLE | AFFINE | {name: FORMATS[name] for name in ("int2-channel", "int3-tensor")}
INTEGER = {name: format for name, format in SAMPLE.items() if format.is_integer}
# Rounding of a quotient of at most 256 steps to float32, in steps.
ROUNDING = 256 * 2.0**-23
TOP = {"f32": 3e38, "bf16": 3e38, "f16": 6e4}

# Leaves that have no quantized form.
OTHER = {
    "int32": np.arange(16, dtype=np.int32).reshape(4, 4),
    "bool": np.eye(4, dtype=bool),
    "complex": np.ones((4, 4), np.complex64),
    "key": jax.random.split(jax.random.key(0), (4, 4)),
    "text": "a name",
    "none": None,
    "strings": np.array([["a", "b"]]),
    "object": np.array([[None, 1]], object),
}


def decode(q) -> np.ndarray:
    return np.asarray(jq.dequantize(q)).astype(np.float64)


def step(q) -> np.ndarray:
    """The scale of each weight."""
    return spread(q.scale, tuple(n // s for n, s in zip(q.shape, q.scale.shape, strict=True)))


# One array: zeros and constants.


@pytest.mark.parametrize("format", **table(FORMATS))
def test_a_tensor_of_zeros_decodes_to_zeros(format):
    """Row: all-zero tensor: scale 1, codes that decode to exactly 0, no NaN and no warning."""
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        q = jq.quantize(np.zeros(SHAPE, np.float32), format)
        assert np.all(np.asarray(q.scale) == 1) and np.all(decode(q) == 0)
        assert format.levels is not None or np.all(np.asarray(q.codes) == (0 if q.zero is None else spread_zero(q)))


def spread_zero(q) -> np.ndarray:
    return spread(q.zero, tuple(n // s for n, s in zip(q.shape, q.scale.shape, strict=True)))


@pytest.mark.parametrize("format", **table({k: f for k, f in SAMPLE.items() if f.per_channel}))
def test_a_block_of_zeros_among_others_changes_none_of_them(format):
    """Row: one all-zero channel or group among normal ones: scale 1 there, and the others as without it."""
    w, size = normal(SHAPE), block(format, SHAPE)
    holed = w.copy()
    holed[: size[0], 2] = 0
    q, whole = jq.quantize(holed, format), jq.quantize(w, format)
    zero, others = (0, 2), np.ones(q.scale.shape, bool)
    others[zero] = False
    assert q.scale[zero] == 1 and np.all(decode(q)[: size[0], 2] == 0)
    assert np.array_equal(np.asarray(q.scale)[others], np.asarray(whole.scale)[others])
    assert np.array_equal(decode(q)[spread(others, size) > 0], decode(whole)[spread(others, size) > 0])


@pytest.mark.parametrize("format", **table(AFFINE))
@pytest.mark.parametrize("value", [3.7, -3.7, 1e-30, -1e30])
def test_a_constant_affine_tensor_has_zero_in_its_range(format, value):
    """Row: constant non-zero tensor, asymmetric: the range includes 0, error <= scale/2, zero within the codes."""
    w = np.full(SHAPE, value, np.float32)
    q, (qmin, qmax) = jq.quantize(w, format), limits(format)
    np.testing.assert_allclose(np.asarray(q.scale), abs(value) / (qmax - qmin), rtol=1e-6)
    assert np.all(np.asarray(q.zero).astype(int) == (qmin if value > 0 else qmax))
    assert np.all(np.abs(decode(q) - w.astype(np.float64)) <= 1e-6 * abs(value))


@pytest.mark.parametrize("format", **table(SAMPLE))
@pytest.mark.parametrize("fill", [0.0, 2.5], ids=["zero", "constant"])
def test_the_gradient_of_constant_rows_is_finite(format, fill):
    """Row: QAT of constant and all-zero rows: finite gradients, which are 1 as everywhere inside the range."""
    w = jnp.full(SHAPE, fill, jnp.float32)
    assert np.all(np.asarray(jax.grad(lambda w: jq.fake_quantize(w, format).sum())(w)) == 1)


# One array: what is not finite, and what is at the ends of the floats.


@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf], ids=["nan", "inf", "-inf"])
@pytest.mark.parametrize("dtype", **table(DTYPES))
@pytest.mark.parametrize("make", [jq.quantize, jq.fake_quantize])
def test_a_value_that_is_not_finite_is_named_with_its_index(make, bad, dtype):
    """Row: NaN or +-Inf in a weight: an error that names the first index and the value, also among larger numbers."""
    w = normal((4, 3), dtype)
    w[2, 1] = w[3, 0] = bad
    with pytest.raises(NonFiniteError) as error:
        make(w)
    assert "[2, 1]" in str(error.value) and str(np.float32(bad)) in str(error.value)


@pytest.mark.parametrize("format", **table(SAMPLE))
def test_under_jit_a_nan_makes_what_shares_its_scale_nan(format):
    """Row: NaN where no error can be raised: all weights of its scale are NaN, and no other changes."""
    w, at = normal(SHAPE), (37, 5)
    spoiled, sizes = w.copy(), block(format, SHAPE)
    spoiled[at] = np.nan
    shared = np.zeros(SHAPE, bool)
    shared[tuple(slice(a - a % n, a - a % n + n) for a, n in zip(at, sizes, strict=True))] = True
    got = decode(jax.jit(lambda w: jq.quantize(w, format))(spoiled))
    assert np.array_equal(got, np.where(shared, np.nan, decode(jq.quantize(w, format))), equal_nan=True)


@pytest.mark.parametrize("format", **table(SAMPLE))
def test_codes_that_were_cast_along_with_a_tree_are_refused(format):
    """Row: codes in another dtype: an error that says what happened."""
    q = jq.quantize(normal(SHAPE), format)
    run = jq.quantized(lambda q, x: x @ q)
    with pytest.raises(FormatError, match="codes in bfloat16: a cast of the whole tree casts codes too"):
        run(jax.tree.map(lambda part: part.astype(jnp.bfloat16), q), normal((2, SHAPE[0])))


@pytest.mark.parametrize("format", **table(SAMPLE))
@pytest.mark.parametrize("value, dtype", [(1e-40, "f32"), (1e-45, "f32"), (1e-38, "bf16"), (6e-8, "f16")])
def test_denormals_have_a_finite_scale_and_decode_within_half_of_it(format, value, dtype):
    """Row: denormal-only tensor: finite positive scale, finite decode, error within half a step."""
    w = np.where(normal(SHAPE) > 0, value, -value).astype(DTYPES[dtype])
    q = jq.quantize(w, format)
    assert np.all((np.asarray(q.scale) > 0) & np.isfinite(np.asarray(q.scale)))
    assert np.all(np.abs(decode(q) - w.astype(np.float64)) <= 0.5 * step(q))


@pytest.mark.parametrize("format", **table(EXTREME))
def test_a_huge_range_keeps_its_large_and_loses_its_small(format):
    """Row: 1e38 beside 1e-38: finite, the large within half a step and the small exactly 0."""
    w = np.full(SHAPE, 1e-38, np.float32)
    w[::16] = 1e38
    values = decode(jq.quantize(w, format))
    assert np.all(np.isfinite(values)) and np.all(values[1:16] == 0)
    assert np.all(np.abs(values - w.astype(np.float64)) <= (0.5 + ROUNDING) * step(jq.quantize(w, format)))


@pytest.mark.parametrize("format", **table(EXTREME))
@pytest.mark.parametrize("dtype", TOP)
def test_a_range_beyond_the_floats_is_finite(format, dtype):
    """Row: max - min overflows (+-3e38; +-6e4 of float16): finite scale, finite decode, error within half a step."""
    w = np.where(normal(SHAPE) > 0, TOP[dtype], -TOP[dtype]).astype(DTYPES[dtype])
    q = jq.quantize(w, format)
    assert np.all(np.isfinite(np.asarray(q.scale))) and np.all(np.isfinite(decode(q)))
    assert np.all(np.abs(decode(q.astype(jnp.float32)) - w.astype(np.float64)) <= (0.5 + ROUNDING) * step(q))


@pytest.mark.parametrize("format", **table(EXTREME))
@pytest.mark.parametrize("dtype", TOP)
def test_the_largest_floats_decode_to_finite_ones(format, dtype):
    """Row: the same at the very end of each dtype: what is finite decodes to what is finite."""
    largest = jnp.finfo(DTYPES[dtype]).max
    w = np.where(normal(SHAPE) > 0, largest, -largest).astype(DTYPES[dtype])
    assert np.all(np.isfinite(decode(jq.quantize(w, format))))


@pytest.mark.parametrize("dtype", **table(DTYPES))
@pytest.mark.parametrize("format", **table(SAMPLE))
def test_scales_are_float32_whatever_the_dtype(dtype, format):
    """Row: bf16/f16 parameters: scales in float32, computed as for the same numbers in float32; decode as asked."""
    w = normal(SHAPE, dtype)
    q, wide = jq.quantize(w, format), jq.quantize(w.astype(np.float32), format)
    assert same(q.scale, wide.scale) and same(q.codes, wide.codes)
    assert jq.dequantize(q).dtype == dtype and jq.dequantize(q.astype(jnp.float32)).dtype == jnp.float32


# One array: shapes.


@pytest.mark.parametrize("shape", [(0, 16), (16, 0), (0, 0), (2, 0, 16)])
@pytest.mark.parametrize("format", **table(SAMPLE))
def test_an_empty_array_goes_and_comes_back(shape, format):
    """Row: empty: it round-trips, with no bytes of codes."""
    q = jq.quantize(np.zeros(shape, np.float32), format)
    assert q.shape == shape and jq.dequantize(q).shape == shape and q.size == 0
    assert jq.fake_quantize(np.zeros(shape, np.float32), format).shape == shape


@pytest.mark.parametrize("shape", [(), (1,), (7,)])
@pytest.mark.parametrize("bits", [8, 4, 3, 2])
def test_a_scalar_or_vector_is_quantized_per_tensor_when_asked(shape, bits):
    """Row: scalar and 1-D: quantizable per tensor; the largest is kept up to rounding."""
    format, w = jq.Format(bits=bits, per_channel=False), normal(shape)
    q = jq.quantize(w, format)
    assert q.scale.shape == (1,) * len(shape)
    np.testing.assert_allclose(np.abs(decode(q)).max(), np.abs(w).max(), rtol=1e-6)


@pytest.mark.parametrize("shape, axis", [((), -2), ((7,), -2), ((4, 4), 2), ((4, 4), -3), ((4, 4), (0, 5))])
def test_an_axis_the_array_does_not_have_is_refused(shape, axis):
    """Row: scalar and 1-D per channel: an error that names the shape, the axis and the way out."""
    with pytest.raises(ShapeError) as error:
        jq.quantize(normal(shape), axis=axis)
    assert all(word in str(error.value) for word in (str(shape), str(axis), "per_channel=False"))


def divisors(n: int) -> list[int]:
    return [d for d in range(1, n + 1) if n % d == 0]


@given(st.integers(1, 600), st.integers(1, 700))
@settings(deadline=None, max_examples=40, derandomize=True)
def test_a_group_that_does_not_divide_is_refused_with_those_that_do(inputs, group):
    """Row: K < group, K % group != 0: an error whose suggestions all divide K, whatever the numbers."""
    if inputs % group == 0:
        return
    with pytest.raises(ShapeError) as error:
        jax.eval_shape(lambda: jq.quantize(jnp.ones((inputs, 2), jnp.float32), jq.int4(group=group)))
    suggested = [int(n) for n in str(error.value).split("[")[-1].split("]")[0].split(",")]
    assert suggested and set(suggested) <= set(divisors(inputs))
    assert all(str(n) in str(error.value) for n in (inputs, group))


@pytest.mark.parametrize("name", ["int8-channel", "int4-group", "nf4-group"])
def test_the_memory_of_the_input_does_not_matter(name, tmp_path):
    """Row: transposed, sliced, read-only or memory-mapped input: as a contiguous copy, and never mutated."""
    w = normal((32, 8))
    expected = jq.quantize(w, FORMATS[name])
    for label, view in views(w, tmp_path).items():
        before = np.array(view)
        assert same(jq.quantize(view, FORMATS[name]), expected), label
        assert np.array_equal(before, view), label


def views(w: np.ndarray, folder) -> dict:
    """The same numbers in all kinds of memory."""
    wide = np.zeros((2 * w.shape[0], 3 * w.shape[1]), w.dtype)
    wide[::2, 1::3] = w
    frozen = w.copy()
    frozen.flags.writeable = False
    mapped = np.memmap(folder / "w.bin", w.dtype, "w+", shape=w.shape)
    mapped[:] = w
    mapped.flush()
    return {
        "transposed": np.ascontiguousarray(w.T).T,
        "sliced": wide[::2, 1::3],
        "reversed": np.ascontiguousarray(w[::-1])[::-1],
        "read-only": frozen,
        "mapped": np.memmap(folder / "w.bin", w.dtype, "r", shape=w.shape),
        "copy on write": np.memmap(folder / "w.bin", w.dtype, "c", shape=w.shape),
        "jax": jnp.asarray(w),
    }


# One array: what has no quantized form.


@pytest.mark.parametrize("leaf", **table(OTHER))
@pytest.mark.parametrize("make", [jq.quantize, jq.fake_quantize])
def test_what_is_no_float_array_is_refused_when_asked_for_directly(make, leaf):
    """Row: integer, bool, complex, key, string: an error by name, and not one of JAX's or NumPy's."""
    with as_shipped(), pytest.raises(NotQuantizableError):
        make(leaf)


@pytest.mark.parametrize("make", [jq.quantize, jq.fake_quantize])
def test_a_qtensor_is_not_quantized_again(make):
    """Row: quantizing a QTensor again: an error, never double quantization."""
    with as_shipped(), pytest.raises(NotQuantizableError, match="quantized already"):
        make(jq.quantize(normal((4, 3))))


# A tree.


def params() -> dict:
    """A small tree with a leaf of every kind."""
    return {
        "dense": {"kernel": jnp.asarray(normal((32, 8))), "bias": jnp.asarray(normal(8))},
        "head": {"kernel": jnp.asarray(normal((48, 8), seed=1))},
        "step": jnp.asarray(3, jnp.int32),
        "gain": jnp.asarray(2.0, jnp.float32),
    }


def is_quantized(tree) -> list[str]:
    leaves = jax.tree_util.tree_leaves_with_path(tree, is_leaf=lambda leaf: isinstance(leaf, jq.QTensor))
    return [jax.tree_util.keystr(p, simple=True, separator="/") for p, x in leaves if isinstance(x, jq.QTensor)]


def test_rank_below_two_is_left_alone_by_default():
    """Row: scalar, 1-D: untouched (the same objects) by default, per tensor where `where` asks for them."""
    tree = params()
    q = jq.quantize_params(tree)
    assert is_quantized(q) == ["dense/kernel", "head/kernel"]
    assert q["dense"]["bias"] is tree["dense"]["bias"] and q["gain"] is tree["gain"] and q["step"] is tree["step"]
    asked = jq.quantize_params(tree, jq.int8(per_channel=False), where=lambda path, leaf: leaf.ndim < 2)
    assert is_quantized(asked) == ["dense/bias", "gain"]
    assert asked["dense"]["kernel"] is tree["dense"]["kernel"]


@pytest.mark.parametrize("leaf", **table(OTHER))
def test_leaves_that_are_no_floats_pass_untouched(leaf):
    """Row: integer, bool, complex, PRNG-key and string leaves: the same objects come out, whatever `where` says."""
    tree = params() | {"other": {"kernel": leaf}}
    for where in (None, lambda path, array: path.endswith("kernel")):
        q = jq.quantize_params(tree, where=where)
        assert q["other"]["kernel"] is leaf
        assert is_quantized(q) == ["dense/kernel", "head/kernel"]


def test_where_sees_floating_arrays_and_their_paths():
    """Row: `where` is asked about every floating array, by path, and nothing else is chosen."""
    seen = {}
    q = jq.quantize_params(params(), where=lambda path, leaf: seen.setdefault(path, leaf).shape == (48, 8))
    assert set(seen) == {"dense/kernel", "dense/bias", "head/kernel", "gain"}
    assert is_quantized(q) == ["head/kernel"]


@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf], ids=["nan", "inf", "-inf"])
@pytest.mark.parametrize("dtype", **table(DTYPES))
def test_a_leaf_that_is_not_finite_is_named_with_path_and_index(bad, dtype):
    """Row: NaN or +-Inf in a weight: an error naming the path and the first index, in a stack as in a matrix."""
    tree, w = params(), normal((3, 32, 8), dtype)
    w[1, 2, 5] = w[2, 0, 0] = bad
    tree["blocks"] = {"kernel": jnp.asarray(w)}
    with pytest.raises(NonFiniteError) as error:
        jq.quantize_params(tree)
    assert "blocks/kernel" in str(error.value) and "[1, 2, 5]" in str(error.value)


@pytest.mark.parametrize("of", [np.asarray, jnp.asarray], ids=["numpy", "jax"])
def test_of_leaves_that_are_not_finite_the_first_is_named_and_none_is_released(of):
    """Row: what is wrong with one leaf is said before any other is touched."""
    fills = {"w0": 1.0, "w1": np.inf, "w2": np.nan}
    leaves = {name: of(np.full((4, 2), fill, np.float32)) for name, fill in fills.items()}
    with pytest.raises(NonFiniteError, match=r"^w1\[0, 0\] is inf"):
        jq.quantize_params(leaves, donate=True)
    assert np.all(np.asarray(leaves["w0"]) == 1)


def test_a_constant_of_a_jitted_function_that_is_not_finite_is_named():
    """Row: the same of what the host holds while a function is traced, where no array may be looked at but it."""
    leaves = {"w": np.array([[1, np.nan]], np.float32)}
    with pytest.raises(NonFiniteError, match=r"^w\[0, 1\] is nan"):
        jax.jit(lambda x: jq.dequantize(jq.quantize_params(leaves))["w"] * x)(1.0)


def test_a_group_that_does_not_divide_guessed_inputs_says_what_knows_them():
    """Row: K % group != 0 along an axis that a name chose, in a kernel of rank 3: shapes alone tell the right one."""
    tree, x = {"up": {"kernel": jnp.asarray(normal((64, 4, 8)))}}, jax.ShapeDtypeStruct((2, 64), jnp.float32)
    with pytest.raises(ShapeError, match=r"up/kernel: group=32 .* guessed from its name: `stats=jq\.calibrate"):
        jq.quantize_params(tree, jq.int4(group=32))
    stats = jq.calibrate(lambda params, x: jnp.tensordot(x, params["up"]["kernel"], 1), tree, [x])
    q = jq.quantize_params(tree, jq.int4(group=32), stats=stats)["up"]["kernel"]
    assert q.scale.shape == (2, 4, 8)


def test_what_is_left_alone_may_be_anything():
    """Row: a NaN in a leaf that is not chosen is none of our business."""
    tree = params()
    tree["dense"]["bias"] = jnp.full(8, jnp.nan, jnp.float32)
    assert jq.quantize_params(tree)["dense"]["bias"] is tree["dense"]["bias"]


@pytest.mark.parametrize("group, shape", [(128, (576, 8)), (64, (32, 8)), (7, (48, 8)), (2, (1, 8))])
def test_a_group_that_does_not_divide_names_the_path_and_those_that_do(group, shape):
    """Row: K % group != 0, K < group, dims of 1: an error naming the path and the sizes; nothing changes silently."""
    tree = {"block": {"up": jnp.ones(shape, jnp.float32)}}
    with pytest.raises(ShapeError) as error:
        jq.quantize_params(tree, jq.int4(group=group))
    suggested = [int(n) for n in str(error.value).split("[")[-1].split("]")[0].split(",")]
    assert "block/up" in str(error.value) and f"group={group}" in str(error.value)
    assert suggested and set(suggested) <= set(divisors(shape[0]))
    assert shape[0] != 576 or {32, 64} <= set(suggested)


@pytest.mark.parametrize("shape", [(1, 1), (1, 8), (32, 1), (1, 1, 1), (1, 1, 8, 1)])
def test_dims_of_one_are_dims(shape):
    """Row: dims of 1: quantized and decoded like any other."""
    tree = {"layer": {"kernel": jnp.asarray(normal(shape))}}
    back = jq.dequantize(jq.quantize_params(tree))
    assert back["layer"]["kernel"].shape == shape
    worst = float(np.abs(normal(shape)).max()) / 254 * 1.001
    assert np.all(np.abs(np.asarray(back["layer"]["kernel"]) - normal(shape)) <= worst)


@pytest.mark.parametrize("donate", [False, True])
def test_a_tied_embedding_is_one_qtensor(donate):
    """Row: one array on two paths: one QTensor on both, and donating it releases it once."""
    table_ = jnp.asarray(normal((32, 8)))
    expected = decode(jq.quantize_params({"embed": {"embedding": table_ + 0}})["embed"]["embedding"])
    tree = {"embed": {"embedding": table_}, "head": {"embedding": table_}}
    q = jq.quantize_params(tree, donate=donate)
    assert q["embed"]["embedding"] is q["head"]["embedding"]
    assert np.array_equal(decode(q["head"]["embedding"]), expected)
    assert table_.is_deleted() == donate


def test_a_tied_array_that_is_kept_on_one_path_survives_donation():
    """Row: one array on two paths, one of them chosen: the other keeps its floats."""
    table_ = jnp.asarray(normal((32, 8)))
    tree = {"embed": table_, "head": table_}
    q = jq.quantize_params(tree, where=lambda path, leaf: path == "head", donate=True)
    assert q["embed"] is table_ and not table_.is_deleted() and is_quantized(q) == ["head"]


def test_donation_releases_what_was_quantized_and_nothing_else():
    """Row: `donate=True` gives the same codes, releases the chosen leaves, and leaves the others alive."""
    kept, donated = params(), params()
    expected, q = jq.quantize_params(kept), jq.quantize_params(donated, donate=True)
    assert all(same(a, b) for a, b in zip(jax.tree.leaves(q), jax.tree.leaves(expected), strict=True))
    released = {jax.tree_util.keystr(p, simple=True, separator="/"): leaf.is_deleted() for p, leaf in paths(donated)}
    assert {path for path, gone in released.items() if gone} == {"dense/kernel", "head/kernel"}
    assert not any(leaf.is_deleted() for _, leaf in paths(kept))


def paths(tree) -> list:
    return jax.tree_util.tree_leaves_with_path(tree)


@pytest.mark.parametrize("error, spoil", [(NonFiniteError, jnp.nan), (ShapeError, None)], ids=["nan", "group"])
def test_an_error_comes_before_any_leaf_is_released(error, spoil):
    """Contract: an error is raised before any work is lost: a donated tree is whole after it."""
    tree = params()
    if spoil is None:
        format, tree["zz"] = jq.int4(group=16), jnp.ones((20, 8), jnp.float32)
    else:
        format, tree["zz"] = jq.int8, jnp.full((32, 8), spoil, jnp.float32)
    with pytest.raises(error, match="zz"):
        jq.quantize_params(tree, format, donate=True)
    assert [jax.tree_util.keystr(path) for path, leaf in paths(tree) if leaf.is_deleted()] == []


@pytest.mark.parametrize("where", [None, lambda path, leaf: True], ids=["default", "all"])
def test_a_tree_is_not_quantized_twice(where):
    """Row: quantizing a QTensor again: an error that names its path."""
    tree = {"a": {"kernel": jnp.asarray(normal((32, 8)))}, "b": {"kernel": jq.quantize(normal((32, 8)))}}
    with pytest.raises(NotQuantizableError, match="b/kernel"):
        jq.quantize_params(tree, where=where)


def test_the_rest_of_a_partly_quantized_tree_can_be_chosen():
    """Row: what is a QTensor already is left alone where `where` leaves it out."""
    once = jq.quantize_params(params(), where=lambda path, leaf: path == "head/kernel")
    twice = jq.quantize_params(once, jq.int4, where=lambda path, leaf: path == "dense/kernel")
    assert is_quantized(twice) == ["dense/kernel", "head/kernel"]
    assert same(twice["head"]["kernel"], once["head"]["kernel"])


def test_a_rule_that_chooses_nothing_lists_what_it_could_have():
    """Row: a predicate that matches no parameter: an error listing the paths."""
    with pytest.raises(NoMatchError) as error:
        jq.quantize_params(params(), where=lambda path, leaf: "attention" in path)
    assert all(path in str(error.value) for path in ("dense/kernel", "dense/bias", "head/kernel", "gain"))
    assert "step" not in str(error.value)


@pytest.mark.parametrize("tree", [{}, {"bias": jnp.ones(3, jnp.float32)}, {"ids": jnp.arange(4)}, [None, "text"]])
def test_a_tree_with_nothing_to_quantize_is_refused(tree):
    """Row: the default rule that matches nothing is an error too."""
    with pytest.raises(NoMatchError):
        jq.quantize_params(tree)


@pytest.mark.parametrize("name", ["int8-channel", "int4-group", "nf4-group"])
def test_a_tree_of_any_memory_is_as_one_of_contiguous_copies(name, tmp_path):
    """Row: memory-mapped, read-only, transposed and sliced leaves: as contiguous copies, and never mutated."""
    w = normal((32, 8))
    tree = views(w, tmp_path)
    before = {label: np.array(view) for label, view in tree.items()}
    q = jq.quantize_params(tree, FORMATS[name])
    expected = jq.quantize_params({"w": w}, FORMATS[name])["w"]
    assert [label for label in tree if not same(q[label], expected)] == []
    assert [label for label in tree if not np.array_equal(before[label], tree[label])] == []


@pytest.mark.parametrize("format", **table(INTEGER))
def test_a_tree_is_quantized_as_its_leaves_are(format):
    """Contract: a tree transform is the array transform leaf by leaf, eagerly and in a jit."""
    tree = params()
    q = jq.quantize_params(tree, format)
    for layer in ("dense", "head"):
        assert same(q[layer]["kernel"], jq.quantize(tree[layer]["kernel"], format))
    jitted = jax.jit(lambda tree: jq.quantize_params(tree, format))(tree)
    assert all(same(a, b) for a, b in zip(jax.tree.leaves(jitted), jax.tree.leaves(q), strict=True))
