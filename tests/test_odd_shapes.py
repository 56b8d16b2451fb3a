"""Shapes that fill no byte, no block and no int32, or nothing at all, mean what every other shape means.

Whole numbers whose largest is 127 are their own int8 codes, and with scales that are powers of two nothing is rounded:
what is multiplied in integers is equal bit for bit.
"""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from tables import exactly, normal

import jaxquant as jq
from jaxquant.matmul.lines import spans

FLOAT_OR_CODES = pytest.mark.parametrize("activations", [None, jq.int8], ids=["float", "int8"])


def whole(rows: int, inputs: int) -> np.ndarray:
    """Whole numbers, a 127 in every row."""
    x = np.random.default_rng(0).integers(-20, 21, (rows, inputs)).astype(np.float32)
    x[:, 0] = 127
    return x


def off(found, x, weight, axis=0) -> float:
    """How far a product is from that in float64, of what it would be were there no signs."""
    wide, weight = np.asarray(x, np.float64), np.moveaxis(np.asarray(weight, np.float64), axis, 0)
    assert found.shape == (len(wide), weight.shape[1])
    return np.max(np.abs(np.asarray(found, np.float64) - wide @ weight) / (np.abs(wide) @ np.abs(weight)))


@given(st.integers(1, 5000), st.integers(1, 16), st.integers(1, 16))
def test_blocks_of_lines_are_all_lines(outputs, count, multiple):
    """Law: one after the other they are the whole, no more than was asked for, and all but the last a multiple."""
    blocks = spans(outputs, count, multiple)
    assert [line for span in blocks for line in range(outputs)[span]] == list(range(outputs))
    assert len(blocks) <= count and len({span.stop - span.start for span in blocks[:-1]}) <= 1
    assert all((span.stop - span.start) % multiple == 0 for span in blocks[:-1])


@FLOAT_OR_CODES
@pytest.mark.parametrize("rows", [1, 2, 9, 20, 200])
@pytest.mark.parametrize("turn", [lambda q: q, jq.turned], ids=["as it comes", "turned"])
@pytest.mark.parametrize("format", [jq.int8, jq.int4(group=64), jq.int2(group=64), jq.int4, jq.nf4], ids=str)
def test_outputs_that_fill_no_byte_and_no_block(format, turn, rows, activations):
    """Law: 1035 outputs, enough of them to be taken in blocks, are multiplied as any number is."""
    x, q = whole(rows, 512), exactly(jq.quantize(normal((512, 1035), seed=1), format))
    found = jax.jit(jq.quantized(lambda q, x: x @ q, activations=activations))(turn(q), x)
    assert off(found, x, jq.dequantize(q)) <= (0 if activations and q.is_integer else 2.0**-18)


@pytest.mark.parametrize("outliers", [0, 1])
@pytest.mark.parametrize("rows", [1, 4])
@pytest.mark.parametrize("format, inputs", [(jq.int4, 15), (jq.int4(group=5), 15), (jq.int2, 50)], ids=str)
def test_inputs_that_fill_no_byte(format, inputs, rows, outliers):
    """Law: packed codes whose inputs lie last may end within a byte, also where a token's largest meets its weights."""
    x, q = whole(rows, inputs), exactly(jq.quantize(normal((6, inputs), seed=1), format, axis=-1))
    if outliers:  # without its outlier a token is its own codes again
        x[:, :2] = 512, 127
    found = jax.jit(lambda x, q: jq.dot_general(x, q, (((1,), (1,)), ((), ())), outliers=outliers))(x, q)
    assert off(found, x, jq.dequantize(q), axis=1) == 0


@FLOAT_OR_CODES
def test_a_stack_whose_inputs_fill_no_byte(activations):
    """Law: packed codes that are no whole bytes go through a loop over matrices as they are, or meet codes at once."""
    x, q = whole(4, 15), exactly(jq.quantize(normal((3, 1200, 15), seed=1), jq.int4, axis=-1))
    fn = lambda q, x: jnp.einsum("ebk,enk->ebn", x, q)  # noqa: E731
    xs = jnp.stack([x, 2 * x, -x])
    run = jax.jit(jq.quantized(fn, activations=activations))
    found, expected = run(q, xs), fn(jq.dequantize(q), xs)
    assert ("while" in run.lower(q, xs).as_text()) is (activations is None)
    assert np.abs(found - expected).max() <= 2.0**-18 * np.abs(expected).max()


LONG = 140_000  # 127 * 127 * LONG > 2^31


@FLOAT_OR_CODES
@pytest.mark.parametrize("rows", [1, 3])
@pytest.mark.parametrize("format", [jq.int8, jq.int8(symmetric=False), jq.int8(group=LONG // 2)], ids=str)
def test_sums_longer_than_an_int32_are_split(format, rows, activations):
    """Law: K beyond the reach of an int32 sum equals the int64 oracle, at the codes that reach farthest."""
    x, w = np.full((rows, LONG), 127, np.float32), np.full((LONG, 2), -127, np.float32)
    found = jax.jit(jq.quantized(lambda q, x: x @ q, activations=activations))(jq.quantize(w, format), x)
    # Floats are added up in float32.
    assert off(found, x, w) <= (1e-5 if activations else LONG * 2.0**-24)


def test_blocks_of_inputs_are_cut_where_the_weight_is():
    """Law: packed codes that are unpacked a block at a time need no split, however long their sums are."""
    x, q = whole(3, LONG), exactly(jq.quantize(np.full((LONG, 64), -7, np.float32), jq.int4))
    assert off(jax.jit(jq.quantized(lambda q, x: x @ q))(q, x), x, jq.dequantize(q)) <= 2.0**-20


def test_sums_longer_than_an_int32_are_float_in_ragged_dot():
    """Law: experts with so many inputs are decoded, and a float32 sum of K terms is right to K * 2^-24."""
    x, w = np.full((2, LONG), 127, np.float32), np.full((LONG, 2), -127, np.float32)
    found = jax.jit(jq.quantized(jax.lax.ragged_dot))(x, jq.quantize(w[None]), jnp.array([2], jnp.int32))
    assert off(found, x, w) <= LONG * 2**-24


def test_sums_longer_than_an_int32_are_float_in_convolutions():
    """Law: as above, for a kernel with many input channels."""
    x, w = np.full((1, LONG, 1), 127, np.float32), np.full((2, LONG, 1), -127, np.float32)
    found = jax.jit(jq.quantized(lambda q, x: jax.lax.conv(x, q, (1,), "VALID")))(jq.quantize(w, axis=(1, 2)), x)
    assert off(found[..., 0], x[..., 0], w[..., 0], axis=1) <= LONG * 2**-24


@FLOAT_OR_CODES
@pytest.mark.parametrize("shape", [(0, 8), (8, 0), (0, 0)], ids=str)
@pytest.mark.parametrize("format", [jq.int8, jq.int4(group=4), jq.nf4(group=4)], ids=str)
def test_a_weight_without_elements(format, shape, activations):
    """Law: a sum of nothing is zero, in groups too, and `explain` says why there is no integer arithmetic."""
    x, q = np.ones((2, shape[0]), np.float32), jq.quantize(jnp.zeros(shape), format)
    fn = lambda q, x: x @ q["w"]  # noqa: E731
    found = jax.jit(jq.quantized(fn, activations=activations))({"w": q}, x)
    assert np.array_equal(found, np.zeros((2, shape[1])))
    assert "it has no elements" in str(jq.explain(fn, {"w": q}, x, activations=activations))


def test_a_convolution_of_an_empty_batch():
    """Law: no images are no images, also where activations have a zero point."""
    q = jq.quantize(normal((3, 3, 3, 4)), axis=(0, 1, 2))
    numbers = ("NHWC", "HWIO", "NHWC")
    fn = lambda q, x: jax.lax.conv_general_dilated(x, q, (1, 1), "SAME", dimension_numbers=numbers)  # noqa: E731
    found = jq.quantized(fn, activations=jq.int8(symmetric=False))(q, jnp.zeros((0, 8, 8, 3)))
    assert found.shape == (0, 8, 8, 4)


@pytest.mark.parametrize("rows", [1, 3, 9])
@pytest.mark.parametrize("turn", [lambda q: q, jq.turned], ids=["as it comes", "turned"])
def test_a_model_in_float64_is_multiplied_in_float64(turn, rows):
    """Law: floats against codes lose nothing that a float64 holds, whatever the number of rows."""
    with jax.enable_x64(True):
        x, q = normal((rows, 64), np.float64), jq.quantize(normal((64, 40), np.float64, seed=1))
        found = jax.jit(jq.quantized(lambda q, x: x @ q, activations=None))(turn(q), x)
        assert found.dtype == jnp.float64 and off(found, x, jq.dequantize(q)) <= 2.0**-50
        narrow = jq.quantize(normal((64, 40), seed=1))
        with jax.numpy_dtype_promotion("standard"):
            found = jq.dot_general(x, turn(narrow), (((1,), (0,)), ((), ())), activations=None)
        assert found.dtype == jnp.float64 and off(found, x, jq.dequantize(narrow)) <= 2.0**-50
