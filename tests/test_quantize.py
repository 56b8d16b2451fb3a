"""Laws of writing an array in codes, over one table of formats and dtypes, against an oracle in NumPy float64.

Error      |w - decode(encode(w))| <= half the distance between neighbouring codes, inside the range
Formulas   scale, zero and codes are those of the equations
Fixpoint   encode(decode(q)) == q
Scaling    quantize(2^k w) is quantize(w) with 2^k scale
Placement  jit, vmap, an axis moved and rows apart give the same bits
Gradient   fake_quantize is dequantize(quantize(.)), with derivative 1 inside the clipping range and 0 outside

The quotient w / scale is rounded to float32 once, by 2^-24, and the scale at most thrice: bounds carry that and no
more. Where the scale is a power of two nothing is rounded, and equality is demanded.
"""

import dataclasses
import itertools

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tables import (
    DTYPES,
    FORMATS,
    INTEGERS,
    SAMPLE,
    SHAPE,
    block,
    half_step,
    limits,
    normal,
    oracle_scale,
    ranges,
    reduce_blocks,
    same,
    spread,
    table,
)

import jaxquant as jq

EPS = 2.0**-23
# max - min, the reciprocal of qmax - qmin (which XLA may multiply by), and their product are rounded: half an EPS each.
SCALE = 1.5 * EPS
AFFINE = {name: format for name, format in INTEGERS.items() if not format.symmetric}
PER_AXIS = {name: format for name, format in SAMPLE.items() if format.per_channel}

quick = settings(deadline=None, max_examples=12, derandomize=True)

# Arrays whose contracted axes are not the default: an attention's heads, a convolution's window, a transposed matrix.
LAYOUTS = {
    "in-out": ((32, 6), -2),
    "out-in": ((6, 32), -1),
    "vector": ((32,), 0),
    "experts": ((3, 32, 6), -2),
    "heads": ((2, 16, 6), (0, 1)),
    "heads apart": ((16, 3, 4), (0,)),
    "conv": ((3, 2, 16, 5), (0, 1, 2)),
    "ones": ((1, 16, 1), 1),
}


@st.composite
def arrays(draw):
    """A format, an array of rank 1 to 4 that it divides, and the contracted axes."""
    format = draw(st.sampled_from(list(FORMATS.values())))
    shape = draw(st.lists(st.integers(1, 5), min_size=1, max_size=4))
    axes = draw(st.lists(st.integers(0, len(shape) - 1), min_size=1, unique=True))
    if format.group:
        shape[max(axes)] *= format.group
    dtype = draw(st.sampled_from(list(DTYPES.values())))
    return format, normal(shape, dtype, seed=draw(st.integers(0, 99))), tuple(axes)


def exact(array) -> np.ndarray:
    return np.asarray(array).astype(np.float64)


def values(q: jq.QTensor) -> np.ndarray:
    """What the codes say in float64, before the scale."""
    if q.levels is not None:
        return np.asarray(q.levels, np.float32)[np.asarray(q.codes).astype(int) + len(q.levels) // 2].astype(np.float64)
    zero = 0 if q.zero is None else spread(q.zero, block_of(q))
    return exact(q.codes) - zero


def block_of(q: jq.QTensor) -> tuple[int, ...]:
    return tuple(n // s for n, s in zip(q.shape, q.scale.shape, strict=True))


def check_error(w, format, axis):
    """The law of the error, in units of the scale: half a step, and two roundings to float32 of the quotient."""
    q = jq.quantize(w, format, axis=axis)
    assert (q.shape, q.dtype) == (w.shape, w.dtype)
    assert block_of(q) == block(format, w.shape, axis)
    ratio = exact(w) / spread(q.scale, block_of(q))
    error = np.abs(ratio - values(q))
    assert np.all(error <= half_step(ratio, format) + EPS * (np.abs(ratio) + 1))


@pytest.mark.parametrize("format", **table(FORMATS))
@pytest.mark.parametrize("dtype", **table(DTYPES))
def test_the_error_is_half_a_step(format, dtype):
    """Law: no weight is further from its code than half the distance between codes, whatever the format and dtype."""
    check_error(normal(SHAPE, dtype), format, -2)


@given(arrays())
@quick
def test_the_error_is_half_a_step_for_any_shape_and_axes(case):
    """Law: the same for any rank and any contracted axes, dims of 1 included."""
    format, w, axes = case
    check_error(w, format, axes)


@pytest.mark.parametrize("format", **table({k: f for k, f in FORMATS.items() if f.is_integer}))
def test_on_the_grid_of_a_power_of_two_the_error_is_exactly_bounded(format):
    """Law: |w - decode(encode(w))| <= scale / 2 to the last bit, where the scale makes every operation exact."""
    qmin, qmax = limits(format)
    w = np.random.default_rng(0).integers(qmin * 256, qmax * 256, SHAPE, endpoint=True).astype(np.float32) / 64
    w[::16], w[1::16] = qmin * 4, qmax * 4
    q = jq.quantize(w, format)
    assert np.all(exact(q.scale) == 4.0)
    assert np.all(np.abs(exact(w) - exact(jq.dequantize(q))) <= 2.0)


@pytest.mark.parametrize("format", **table(FORMATS))
@pytest.mark.parametrize("dtype", **table(DTYPES))
def test_the_formulas_are_those_of_the_oracle(format, dtype):
    """Law: s = max|r| / qmax or (max - min) / (qmax - qmin), z = round(qmin - min / s), q = clamp(round(r / s) + z)."""
    w = normal(SHAPE, dtype, seed=1)
    q, (qmin, qmax) = jq.quantize(w, format), limits(format)
    assert q.scale.dtype == jnp.float32
    np.testing.assert_allclose(exact(q.scale), oracle_scale(w, format), rtol=SCALE, atol=0)
    ratio = exact(w) / spread(q.scale, block_of(q))
    if not format.is_integer:
        return check_nearest(ratio, q, format)
    zero = check_zero(w, q, format) if not format.symmetric else 0
    expected = np.clip(np.rint(ratio) + zero, qmin, qmax)
    tie = np.abs(np.abs(ratio - np.floor(ratio)) - 0.5) <= EPS * np.abs(ratio)
    assert np.array_equal(exact(q.codes)[~tie], expected[~tie])
    assert tie.mean() < 0.1


def check_zero(w, q, format) -> np.ndarray:
    """The zero point of the oracle where the quotient is no tie, and an integer of the codes' range everywhere."""
    (low, _), (qmin, qmax) = ranges(w, format), limits(format)
    start = qmin - low / exact(q.scale)
    assert q.zero.dtype == q.codes.dtype and q.zero.shape == q.scale.shape
    assert np.all((exact(q.zero) >= qmin) & (exact(q.zero) <= qmax))
    tie = np.abs(np.abs(start - np.floor(start)) - 0.5) <= 2 * EPS * np.abs(qmin)
    assert np.array_equal(exact(q.zero)[~tie], np.rint(start)[~tie])
    return spread(q.zero, block_of(q))


def check_nearest(ratio, q, format):
    """Floats are those of ml_dtypes, which rounds to nearest even; a codebook's level has none that is nearer."""
    if format.dtype is not None:
        rounded = ratio.astype(np.float32).clip(*limits(format)).astype(ml_dtypes.finfo(format.dtype).dtype)
        quotient = (ratio * (1 + EPS), ratio * (1 - EPS))
        sure = np.equal(*(x.astype(np.float32).astype(rounded.dtype).astype(np.float32) for x in quotient))
        assert np.array_equal(exact(q.codes)[sure], exact(rounded)[sure]) and sure.mean() > 0.9
    else:
        levels = np.asarray(format.levels, np.float32).astype(np.float64)
        nearest = np.abs(ratio[..., None] - levels).min(-1)
        assert np.all(np.abs(ratio - values(q)) <= nearest + EPS)


@pytest.mark.parametrize("shape, axis", **table(LAYOUTS))
@pytest.mark.parametrize("name", ["int8-channel", "int4-affine-group", "nf4-tensor"])
def test_the_contracted_axes_share_a_scale(shape, axis, name):
    """Law: a scale belongs to one block: whole contracted axes, a group of the last of them, or the whole array."""
    format, w = FORMATS[name], normal(shape, seed=2)
    q = jq.quantize(w, format, axis=axis)
    assert block_of(q) == block(format, shape, axis)
    np.testing.assert_allclose(exact(q.scale), oracle_scale(w, format, axis), rtol=SCALE, atol=0)
    assert same(q, jq.quantize(w, format, axis=np.atleast_1d(axis).tolist()))


def filled_codes(format, rng) -> jq.QTensor:
    """A QTensor whose blocks use both ends of their range, with scales that are powers of two."""
    size = block(format, SHAPE)
    count = tuple(n // b for n, b in zip(SHAPE, size, strict=True))
    qmin, qmax = limits(format)
    scale = (2.0 ** rng.integers(-3, 4, count)).astype(np.float32)
    if format.levels is not None:
        numbers, ends = rng.integers(-8, 8, SHAPE), (-8, 7)
    elif format.dtype is not None:
        numbers, ends = (rng.standard_normal(SHAPE) * 20).astype(np.float32).astype(format.dtype), (qmin, qmax)
    else:
        numbers, ends = rng.integers(qmin, qmax, SHAPE, endpoint=True), (qmin, qmax)
    numbers[::16], numbers[1::16] = ends
    zero = None if format.symmetric else jnp.asarray(rng.integers(qmin, qmax, count, endpoint=True), format.container)
    codes = jnp.asarray(numbers, format.container)
    return jq.QTensor(codes, jnp.asarray(scale), zero, np.dtype("float32"), format.bits, format.levels)


@pytest.mark.parametrize("format", **table(FORMATS))
@pytest.mark.parametrize("seed", range(2))
def test_any_codes_that_fill_their_range_are_found_again(format, seed):
    """Law: quantize(dequantize(q)) == q, bit for bit, for any q with power-of-two scales and any zero point."""
    q = filled_codes(format, np.random.default_rng(seed))
    assert same(jq.quantize(jq.dequantize(q), format), q)


@pytest.mark.parametrize("format", **table(FORMATS))
@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16], ids=["f32", "bf16"])
def test_quantizing_what_was_decoded_changes_no_code(format, dtype):
    """Law: encode(decode(q)) == q for any scale, which may itself be rounded once more.

    An affine block whose zero point was a tie leaves its last code unused, so that what it decodes to has a smaller
    range: those blocks, which only weights of few digits have, are not of the law.
    """
    q = jq.quantize(normal(SHAPE, dtype, seed=3), format).astype(jnp.float32)
    again = jq.quantize(jq.dequantize(q), format)
    codes, size = exact(q.codes), block_of(q)
    filled = reduce_blocks(np.ptp, codes, size) == np.ptp(limits(format)) if not format.symmetric else True
    filled = np.broadcast_to(filled, q.scale.shape)
    assert filled.all() or dtype == jnp.bfloat16
    assert np.array_equal(codes[spread(filled, size) > 0], exact(again.codes)[spread(filled, size) > 0])
    assert q.zero is None or np.array_equal(exact(q.zero)[filled], exact(again.zero)[filled])
    np.testing.assert_allclose(exact(again.scale)[filled], exact(q.scale)[filled], rtol=2 * EPS, atol=0)


@pytest.mark.parametrize("format", **table(FORMATS))
@pytest.mark.parametrize("dtype, power", [("f32", -40), ("f32", 60), ("bf16", -40), ("bf16", 60), ("f16", 9)])
def test_a_power_of_two_moves_into_the_scale(format, dtype, power):
    """Law: quantize(2^k w) has the codes and zero points of quantize(w), and 2^k times its scale."""
    w = normal(SHAPE, DTYPES[dtype], seed=4)
    scaled = np.ldexp(w.astype(np.float32), power).astype(DTYPES[dtype])
    q, moved = jq.quantize(w, format), jq.quantize(scaled, format)
    assert same(moved, dataclasses.replace(q, scale=q.scale * jnp.float32(2.0**power)))


@given(arrays(), st.integers(-30, 30))
@quick
def test_negating_a_symmetric_array_negates_its_codes(case, power):
    """Law: a symmetric integer format is odd: the codes of -w are minus the codes of w, under the same scale."""
    format, w, axes = case
    format = format(dtype=None, levels=None, symmetric=True)
    q, negated = jq.quantize(w, format, axis=axes), jq.quantize(-w, format, axis=axes)
    assert same(q.scale, negated.scale)
    assert np.array_equal(exact(q.codes), -exact(negated.codes))


@pytest.mark.parametrize("group, expected", [(32, 0.0677), (64, 0.0728), (128, 0.0768)])
def test_nf4_has_the_error_of_bitsandbytes(group, expected):
    """Law: the mean absolute error of NF4 on N(0, 1) is the one bitsandbytes publishes, to the digits it gives.

    The bound is half the last digit and three standard errors of the mean over columns, which are independent.
    """
    w = normal((2048, 512))
    error = np.abs(exact(jq.dequantize(jq.quantize(w, jq.nf4(group=group)))) - exact(w)).mean(0)
    assert abs(error.mean() - expected) < 5e-5 + 3 * error.std() / np.sqrt(error.size)


@pytest.mark.parametrize("bits", [2, 3, 4, 8])
def test_finer_granularity_has_no_larger_scale(bits):
    """Law: a block inside a block has a range inside its range: group <= channel <= tensor, element by element."""
    w = normal(SHAPE, seed=5)
    formats = (jq.Format(bits=bits, group=16), jq.Format(bits=bits), jq.Format(bits=bits, per_channel=False))
    scales = [spread(q.scale, block_of(q)) for q in (jq.quantize(w, format) for format in formats)]
    assert all(np.all(fine <= coarse) for fine, coarse in itertools.pairwise(scales))


@pytest.mark.parametrize("name", ["int8-channel", "int4-affine-group", "nf4-tensor"])
@pytest.mark.parametrize("clip", [0.5, 0.75])
def test_clip_keeps_a_share_of_the_range(name, clip):
    """Law: `clip` multiplies the scale; codes beyond saturate; within, the error is half a step."""
    format, w = FORMATS[name], normal(SHAPE, seed=6)
    q = jq.quantize(w, format, clip=clip)
    np.testing.assert_allclose(exact(q.scale), oracle_scale(w, format) * clip, rtol=SCALE + EPS, atol=0)
    low, high = (spread(bound, block_of(q)) * clip for bound in ranges(w, format))
    reach = np.maximum(-low, high)
    inside = (np.abs(w) <= reach) if format.symmetric else (w >= low) & (w <= high)
    ratio = exact(w) / spread(q.scale, block_of(q))
    assert np.all((np.abs(ratio - values(q)) <= half_step(ratio, format) + 1e-4)[inside])
    assert not inside.all()


def test_clip_may_differ_from_block_to_block():
    """Law: an array of clips of the scale's shape clips each block by its own."""
    w, clip = normal(SHAPE, seed=7), np.linspace(0.5, 1, 48, dtype=np.float32).reshape(4, 12)
    q, format = jq.quantize(w, FORMATS["int4-group"], clip=clip), FORMATS["int4-group"]
    np.testing.assert_allclose(exact(q.scale), oracle_scale(w, format) * clip, rtol=SCALE + EPS, atol=0)


@pytest.mark.parametrize("format", **table(FORMATS))
def test_jit_is_eager(format):
    """Law: the bits do not depend on what is compiled together: no rounding is skipped inside a jit."""

    def compute(w):
        q = jq.quantize((w * jnp.float32(1.1)).astype(jnp.bfloat16), format)
        return q, jq.dequantize(q)

    w = jnp.asarray(normal(SHAPE, seed=8))
    assert all(same(a, b) for a, b in zip(jax.jit(compute)(w), compute(w), strict=True))


@pytest.mark.parametrize("format", **table(PER_AXIS))
def test_a_stack_is_quantized_matrix_by_matrix(format):
    """Law: quantize(stack) == vmap(quantize)(stack) == the stack of quantize of each."""
    stack = jnp.asarray(normal((3, 32, 5), seed=9))
    q = jq.quantize(stack, format)
    assert same(jax.vmap(lambda w: jq.quantize(w, format))(stack), q)
    assert same(jax.tree.map(lambda *parts: jnp.stack(parts), *(jq.quantize(w, format) for w in stack)), q)


@pytest.mark.parametrize("format", **table(PER_AXIS))
def test_moving_the_contracted_axis_moves_the_codes(format):
    """Law: quantize(w.T, axis=-1) is the transpose of quantize(w, axis=-2)."""
    w = normal(SHAPE, seed=10)
    turned = jq.quantize(np.ascontiguousarray(w.T), format, axis=-1)
    assert same(jax.tree.map(jnp.transpose, turned), jq.quantize(w, format, axis=-2))


@pytest.mark.parametrize("format", **table(FORMATS))
def test_decode_is_the_equation(format):
    """Law: decode is (codes - zero) * scale or levels[codes] * scale in float32, rounded once to the dtype asked."""
    q = jq.quantize(normal(SHAPE, jnp.bfloat16, seed=11), format)
    product = values(q).astype(np.float32) * spread(q.scale, block_of(q)).astype(np.float32)
    for dtype in DTYPES.values():
        assert same(np.asarray(jq.dequantize(q.astype(dtype))), product.astype(dtype))


# The straight-through estimator.


@pytest.mark.parametrize("format", **table(FORMATS))
@pytest.mark.parametrize("dtype", **table(DTYPES))
def test_fake_quantize_is_dequantize_of_quantize(format, dtype):
    """Law: what training sees is what serving does, bit for bit."""
    w = jnp.asarray(normal(SHAPE, dtype, seed=12))
    assert same(jq.fake_quantize(w, format), jq.dequantize(jq.quantize(w, format)))


@pytest.mark.parametrize("format", **table(SAMPLE))
@pytest.mark.parametrize("clip", [1.0, 0.6])
def test_fake_quantize_keeps_its_value_under_transformations(format, clip):
    """Law: the same bits jitted, and as the primal of a derivative."""
    w = jnp.asarray(normal(SHAPE, jnp.bfloat16, seed=12))
    expected = jq.dequantize(jq.quantize(w, format, clip=clip))
    assert same(jax.jit(lambda w: jq.fake_quantize(w, format, clip=clip))(w), expected)
    assert same(
        jax.jit(lambda w: jax.jvp(lambda w: jq.fake_quantize(w, format, clip=clip), (w,), (w,))[0])(w), expected
    )


def clipping(w, format, clip: float) -> tuple[np.ndarray, np.ndarray]:
    """Which weights are inside the clipping range, and which are beyond it by more than rounding can bring back.

    Between the two, by up to half the outermost step, a weight still rounds to the outermost code.
    """
    low, high = (clip * bound for bound in ranges(w, format))
    scale, size = clip * oracle_scale(w, format), block(format, w.shape)
    if format.symmetric:
        low, high = -np.maximum(-low, high), np.maximum(-low, high)
    low, high, scale = (spread(part, size) for part in (low, high, scale))
    qmin, qmax = limits(format)
    # An integer zero point moves an affine range by up to half a step more.
    moved = 0.0 if format.symmetric else 0.5
    above = (half_step(np.float64(qmax), format) + moved + 1e-4) * scale
    below = (half_step(np.float64(qmin), format) + moved + 1e-4) * scale
    shrink = (moved + 1e-4) * scale
    return (w >= low + shrink) & (w <= high - shrink), (w < low - below) | (w > high + above)


@pytest.mark.parametrize("format", **table(FORMATS))
@pytest.mark.parametrize("clip", [1.0, 0.4])
def test_the_gradient_is_one_inside_the_clipping_range_and_zero_outside(format, clip):
    """Law: the cotangent passes unchanged inside the clipping range and is stopped outside it."""
    w = normal(SHAPE, seed=13)
    cotangent = normal(SHAPE, seed=14)
    _, pull = jax.vjp(lambda w: jq.fake_quantize(w, format, clip=clip), jnp.asarray(w))
    (gradient,) = pull(jnp.asarray(cotangent))
    inside, outside = clipping(exact(w), format, clip)
    assert np.array_equal(np.asarray(gradient)[inside], cotangent[inside]) and inside.any()
    assert np.all(np.asarray(gradient)[outside] == 0) and (clip == 1 or format.bits < 4 or outside.any())
    if clip == 1:
        assert same(np.asarray(gradient), cotangent)


@pytest.mark.parametrize("name", ["int8-channel", "int4-affine-group", "nf4-group", "e4m3-tensor"])
@pytest.mark.parametrize("dtype", **table(DTYPES))
def test_forward_and_reverse_derivatives_agree(name, dtype):
    """Law: the derivative is one diagonal matrix: jvp and vjp apply the same one, in the weight's dtype."""
    w, v = jnp.asarray(normal(SHAPE, dtype, seed=15)), jnp.asarray(normal(SHAPE, dtype, seed=16))

    def f(w):
        return jq.fake_quantize(w, FORMATS[name], clip=0.5)

    tangent = jax.jit(lambda w, v: jax.jvp(f, (w,), (v,))[1])(w, v)
    assert tangent.dtype == w.dtype
    assert same(jax.vjp(f, w)[1](v)[0], tangent)


@pytest.mark.parametrize("name", ["int8-channel", "int4-affine-group", "nf4-group"])
def test_fake_quantize_maps_over_a_stack(name):
    """Law: vmap of the value and of the gradient is the value and the gradient of each."""
    stack = jnp.asarray(normal((3, 32, 5), seed=17))

    @jax.jit
    def both(w):
        y, pull = jax.vjp(lambda w: jq.fake_quantize(w, FORMATS[name], clip=0.5), w)
        return y, pull(jnp.ones_like(y))[0]

    for mapped, each in zip(jax.jit(jax.vmap(both))(stack), zip(*map(both, stack), strict=True), strict=True):
        assert same(mapped, jnp.stack(each))


@pytest.mark.parametrize("format", **table(AFFINE))
def test_an_affine_range_has_zero_in_it(format):
    """Law: zero decodes to exactly zero, also where all weights lie on one side of it."""
    for sign in (1, -1):
        w = sign * np.abs(normal(SHAPE, seed=18)) + np.float32(sign)
        w[::16] = 0
        q = jq.quantize(w, format)
        assert np.all(np.asarray(jq.dequantize(q))[::16] == 0)
        used = reduce_blocks(np.min if sign > 0 else np.max, exact(q.codes), block_of(q))
        assert np.array_equal(used, exact(q.zero))
