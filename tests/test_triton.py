"""What runs on a GPU multiplies what the codes stand for: the kernel interpreted, a GPU's choices taken.

    out[m, n] = sum_g scale[g, n] sum_k x[m, k] (codes[k, n] - zero[g, n])

NumPy float64 is the oracle. Whole numbers and scales that are powers of two round nothing, and are equal bit for bit.
"""

import functools

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from models import normal
from tables import FORMATS, exactly

import jaxquant as jq
from jaxquant.matmul import gpu
from jaxquant.matmul.triton import Coding, tiles, triton_dot

SHAPE = (128, 64)
ROWS = (1, 70)


def whole(rows, inputs, dtype, seed=3):
    """Small whole numbers, exact in every dtype."""
    return np.random.default_rng(seed).integers(-9, 10, (rows, inputs)).astype(dtype)


def lines_of(q):
    """The slopes and offsets of a weight `[K, N]`."""
    slope = np.broadcast_to(q.scale, (q.scale.shape[0], q.shape[1])).astype(np.float32)
    return np.stack([slope] if q.zero is None else [slope, slope * np.asarray(q.zero, np.float32)])


def bits(x):
    return np.asarray(x, np.float32).view(np.uint32)


@pytest.fixture
def on_gpu(monkeypatch):
    """Takes the forms of the GPU wherever there is a choice, and interprets the kernel."""
    jax.clear_caches()
    choice = lambda *args, cuda=None, cpu=None, default=None: (cuda or default)(*args)  # noqa: E731
    monkeypatch.setattr(jax.lax, "platform_dependent", choice)
    monkeypatch.setattr(gpu, "triton_dot", functools.partial(triton_dot, interpret=True))
    yield
    jax.clear_caches()


@pytest.mark.parametrize("rows", ROWS)
@pytest.mark.parametrize("format", FORMATS.values(), ids=FORMATS)
def test_every_form_is_the_product(format, rows, monkeypatch):
    """One row in a reduction, more in the kernel, and what does not fit its tiles: with floats and with codes."""
    monkeypatch.setattr(gpu, "triton_dot", functools.partial(triton_dot, interpret=True))
    q = exactly(jq.quantize(normal(*SHAPE), format))
    coding, lines = Coding(q.codes.dtype, q.levels, jax.lax.Precision.DEFAULT), jnp.asarray(lines_of(q))
    for dtype in (np.float32, np.int8) if q.is_integer else (np.float32,):
        x = whole(rows, SHAPE[0], dtype)
        expected = np.asarray(x, np.float64) @ np.asarray(jq.dequantize(q), np.float64)
        for form in (gpu._on_device, gpu._widened):
            found = form(coding, jnp.asarray(x)[None], q.codes[None], lines[None])[0]
            if q.is_integer:
                assert np.array_equal(bits(found), bits(expected)), form
            np.testing.assert_allclose(found, expected, rtol=1e-5, atol=1e-4)


@given(
    st.integers(1, 300),
    st.integers(1, 80).map(lambda n: 32 * n),
    st.integers(1, 90).map(lambda n: 8 * n),
    st.sampled_from((32, 64, 96, 128, None)),
    st.sampled_from((1, 2, 4)),
)
def test_tiles_cover_the_product_once(rows, inputs, outputs, group, packed):
    """Law: tiles divide outputs and groups, pieces and groups nest, and partial sums are not more than the codes."""
    groups = 1 if group is None or inputs % group else inputs // group
    cut = tiles(rows, (inputs, outputs), groups, packed)
    if cut is None:
        assert outputs % (16 * packed) or (inputs // groups) % 32
        return
    assert outputs % (cut.columns * packed) == 0
    assert (inputs // groups) % cut.inputs == 0
    assert inputs % (cut.pieces * cut.inputs) == 0
    assert groups % cut.pieces == 0 or cut.pieces % groups == 0
    assert cut.pieces == 1 or 4 * cut.rows * cut.pieces <= inputs // packed


@pytest.mark.parametrize("dtype", [ml_dtypes.float8_e4m3fn, ml_dtypes.float8_e5m2])
def test_float8_is_read_from_its_bits(dtype):
    """All of its numbers, subnormal ones and signs of zero too."""
    every = np.arange(256, dtype=np.uint8)
    numbers = every.view(dtype).astype(np.float32)
    held = jnp.asarray(every[np.isfinite(numbers)].view(np.int8))
    found = Coding(jnp.dtype(dtype), None, jax.lax.Precision.DEFAULT).values(held, 0, jnp.float32)
    assert np.array_equal(bits(found), bits(numbers[np.isfinite(numbers)]))


WEIGHTS = {
    "int8": jq.int8,
    "int8-affine": jq.int8(symmetric=False),
    "int4-group": jq.int4(group=32),
    "int4-group-affine": jq.int4(group=32, symmetric=False),
    "int3": jq.int3,
    "int2-group": jq.int2(group=32),
    "nf4": jq.nf4(group=32),
    "fp8": jq.fp8,
}


@pytest.mark.parametrize("activations", [jq.int8, jq.int8(symmetric=False), None], ids=["int8", "affine", "float"])
@pytest.mark.parametrize("weights", WEIGHTS.values(), ids=WEIGHTS)
@pytest.mark.parametrize("rows", [1, 5])
def test_a_gpu_computes_what_a_cpu_does(rows, weights, activations, on_gpu):
    """A function with two matmuls, one of them with the weight transposed, of which both take the choice of the GPU."""
    del on_gpu
    q = jq.quantize_params({"a": normal(*SHAPE), "b": normal(64, 128, seed=1)}, weights)
    x = normal(rows, 128, seed=2)

    def fn(params, x):
        return jnp.tanh(x @ params["a"] / 16) @ params["b"]

    found = jq.quantized(fn, activations=activations)(q, x)
    expected = fn(jq.dequantize(q), x)
    spread = float(jnp.std(expected))
    np.testing.assert_allclose(found, expected, atol=(1e-4 if activations is None else 0.08) * spread * 4)


@pytest.mark.parametrize(("rows", "inputs", "outputs"), [(0, 128, 64), (1, 0, 64), (3, 128, 0)])
def test_nothing_is_multiplied_to_nothing(rows, inputs, outputs, on_gpu):
    del on_gpu
    q = jq.quantize(jnp.zeros((inputs, outputs)), jq.int8)
    found = jq.quantized(lambda q, x: x @ q)(q, jnp.ones((rows, inputs)))
    assert np.array_equal(found, np.zeros((rows, outputs)))


def test_a_batch_is_more_rows_or_more_matrices(on_gpu):
    """Law: `vmap` over activations, over weights, and over both, is what each gives alone."""
    del on_gpu
    x, w = normal(3, 2, 128), normal(3, 128, 64, seed=1)
    q = jq.quantize(w, jq.int4(group=32, symmetric=False))
    run = jq.quantized(lambda q, x: x @ q, activations=None)
    each = jnp.stack([run(q[i], x[i]) for i in range(3)])
    np.testing.assert_allclose(jax.vmap(run)(q, x), each, rtol=1e-5, atol=1e-4)
    np.testing.assert_allclose(jax.vmap(run, (None, 0))(q[0], x)[1], run(q[0], x[1]), rtol=1e-5, atol=1e-4)
    np.testing.assert_allclose(jax.vmap(run, (0, None))(q, x[0])[1], run(q[1], x[0]), rtol=1e-5, atol=1e-4)


def test_a_gradient_does_not_go_through_the_kernel(on_gpu):
    """The derivative is that of the product with the decoded weight, whatever multiplied forward."""
    del on_gpu
    q, x = jq.quantize(normal(*SHAPE), jq.int4(group=32)), normal(4, 128, seed=1)
    found = jax.grad(lambda x: jq.quantized(lambda q, x: (x @ q).sum(), activations=None)(q, x))(x)
    np.testing.assert_allclose(found, jax.grad(lambda x: (x @ jq.dequantize(q)).sum())(x), rtol=1e-5, atol=1e-5)
