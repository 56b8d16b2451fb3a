"""Matmuls, convolutions and look-ups in codes are those of the decoded numbers: NumPy float64 is the oracle.

    x ~= (codes - zero) * scale, a scale and a zero point for each token;   w ~= (codes - zero) * scale
    out = x @ w, in exact integers up to the rounding of the float32 scales

Where all scales are powers of two nothing is rounded at all, and the results are equal bit for bit.
"""

import dataclasses
import functools
import itertools
import math
import operator
import re
from pathlib import Path

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from hypothesis import given
from hypothesis import strategies as st
from models import quickly_jitted
from tables import SAMPLE, as_shipped, exactly, table

import jaxquant as jq
from jaxquant.errors import FormatError
from jaxquant.finite import greatest
from jaxquant.matmul import choice, lines
from jaxquant.matmul.arithmetic import grouped_dot
from jaxquant.matmul.blocks import _by_inputs
from jaxquant.matmul.integers import integer_dot
from jaxquant.matmul.machine import multiplies_bfloats
from jaxquant.matmul.precision import level
from jaxquant.matmul.terms import codes_in_terms, floats_in_terms, terms_of
from jaxquant.matmul.tokens import Tokens, quantize_tokens, split_outliers
from jaxquant.packed import places_of

INTEGER = "int8 x int8 -> int32"

# name: einsum, shapes of the activations and of the weight, and which of the two comes first.
SPECS = {
    "matrix": ("bk,kn->bn", (3, 32), (32, 24), False),
    "matrix-many-rows": ("bk,kn->bn", (40, 32), (32, 24), False),
    "one-row": ("bk,kn->bn", (1, 32), (32, 24), False),
    "vector": ("k,kn->n", (32,), (32, 24), False),
    "weight-first": ("nk,kb->nb", (32, 3), (24, 32), True),
    "transposed": ("bk,nk->bn", (3, 32), (24, 32), False),
    "heads-out": ("btd,dhk->bthk", (2, 2, 32), (32, 3, 16), False),
    "heads-in": ("bthk,hkd->btd", (2, 2, 3, 16), (3, 16, 24), False),
    "rank-4": ("btd,dghk->btghk", (2, 2, 32), (32, 2, 3, 16), False),
    "batched": ("ebk,ekn->ebn", (4, 3, 32), (4, 32, 24), False),
    "batched-weight-first": ("enk,ekb->enb", (4, 32, 3), (4, 24, 32), True),
    "experts": ("td,edf->tef", (3, 32), (4, 32, 24), False),
}
WEIGHTS = {
    "tensor": jq.int8(per_channel=False),
    "channel": jq.int8,
    "group": jq.int8(group=8),
    "int4-group": jq.int4(group=8),
    "affine": jq.int8(symmetric=False),
    "int4-group-affine": jq.int4(group=8, symmetric=False),
}
ACTIVATIONS = {"int8": jq.int8, "int8-affine": jq.int8(symmetric=False), "int4": jq.int4}

every_weight = pytest.mark.parametrize("weights", WEIGHTS)


def normal(shape, seed=0):
    """N(0, 1) in float32."""
    return np.random.default_rng(seed).standard_normal(shape).astype(np.float32)


def axes_of(spec):
    """The contracted axes of the activations and of the weight."""
    equation, _, _, weight_first = SPECS[spec]
    inputs, output = equation.split("->")
    x, w = inputs.split(",")[::-1] if weight_first else inputs.split(",")
    gone = set(x) & set(w) - set(output)
    return tuple(i for i, a in enumerate(x) if a in gone), tuple(i for i, a in enumerate(w) if a in gone)


def contract(spec, x, w, module=jnp):
    """The einsum of a row of the table."""
    equation, _, _, weight_first = SPECS[spec]
    return module.einsum(equation, w, x) if weight_first else module.einsum(equation, x, w)


def rounded(x, activations, axis):
    """Activations as their codes stand for them, in float64: one scale and zero point per token."""
    low, high = x.min(axis, keepdims=True, initial=0), x.max(axis, keepdims=True, initial=0)
    top = 2 ** (activations.bits - 1) - 1
    if activations.symmetric:
        scale = np.maximum(-low, high) / np.float32(top)
        return np.clip(np.round(x / scale), -top, top).astype(np.float64) * scale
    scale = (high / 2 - low / 2) / np.float32((2 * top + 1) / 2)
    zero = np.clip(np.round(-top - 1 - low / scale), -top - 1, top)
    return (np.clip(np.round(x / scale) + zero, -top - 1, top).astype(np.float64) - zero) * scale


def spread(part, shape):
    """A scale or zero point repeated to the shape of the codes, in float64."""
    part = np.asarray(part).astype(np.float64)
    for axis, n in enumerate(shape):
        part = np.repeat(part, n // part.shape[axis], axis)
    return part


def decoded(q):
    """The weight in float64."""
    zero = 0 if q.zero is None else spread(q.zero, q.shape)
    return (np.asarray(q.codes).astype(np.float64) - zero) * spread(q.scale, q.shape)


def close(got, expected, bound=1e-6):
    """Within float32 rounding of the largest number."""
    got, expected = np.asarray(got).astype(np.float64), np.asarray(expected).astype(np.float64)
    assert got.shape == expected.shape
    return np.max(np.abs(got - expected)) <= bound * np.max(np.abs(expected))


# Every layout with int8 tokens, and every kind of tokens with the layouts that differ in what they need of them.
DIFFERENT = ("matrix", "matrix-many-rows", "weight-first", "heads-in", "experts")
EVERY_LAYOUT = [(spec, weights, "int8") for spec in SPECS for weights in WEIGHTS]
EVERY_TOKEN = [
    (spec, weights, activations)
    for spec in DIFFERENT
    for weights in ("channel", "int4-group-affine")
    for activations in ACTIVATIONS
]


@pytest.mark.parametrize("spec, weights, activations", EVERY_TOKEN)
def test_a_matmul_is_that_of_the_codes(spec, weights, activations):
    """Law: the result is the oracle's, wherever the axes are and however the scales are laid out."""
    _, x_shape, w_shape, _ = SPECS[spec]
    x_axes, w_axes = axes_of(spec)
    x, q = normal(x_shape), jq.quantize(normal(w_shape, 1), WEIGHTS[weights], axis=w_axes)
    out = jax.jit(jq.quantized(lambda q, x: contract(spec, x, q), activations=ACTIVATIONS[activations]))(q, x)
    assert close(out, contract(spec, rounded(x, ACTIVATIONS[activations], x_axes), decoded(q), np), 2e-6)


def exact(shape, format, axes, seed):
    """Weights (or tokens) of which every block holds the ends of the format's range, times a power of two each."""
    rng, top = np.random.default_rng(seed), 2 ** (format.bits - 1) - 1
    low, high = (-top, top) if format.symmetric else (-top + 2, top + 3)
    codes = rng.integers(low, high + 1, shape)
    moved = np.moveaxis(codes, axes[-1], 0)
    moved[:: format.group or shape[axes[-1]]], moved[1 :: format.group or shape[axes[-1]]] = high, low
    blocks = [1 if a in axes else n for a, n in enumerate(shape)]
    if format.group:
        blocks = [n // format.group if a == axes[-1] else n for a, n in enumerate(shape)]
    blocks = blocks if format.per_channel else [1] * len(shape)
    return (codes * spread(2.0 ** rng.integers(-2, 3, blocks), shape)).astype(np.float32)


@pytest.mark.parametrize(
    "spec, weights, activations", EVERY_LAYOUT + [row for row in EVERY_TOKEN if row[2] == "int8-affine"]
)
def test_with_scales_that_are_powers_of_two_it_is_exact(spec, weights, activations):
    """Law 1: bit for bit the float matmul of the decoded weight, because no step rounds."""
    _, x_shape, w_shape, _ = SPECS[spec]
    x_axes, w_axes = axes_of(spec)
    # One scale per token: along all the contracted axes.
    x, w = exact(x_shape, ACTIVATIONS[activations], x_axes, 0), exact(w_shape, WEIGHTS[weights], w_axes, 1)
    q = jq.quantize(w, WEIGHTS[weights], axis=w_axes)
    assert np.array_equal(jq.dequantize(q), w)
    out = jax.jit(jq.quantized(lambda q, x: contract(spec, x, q), activations=ACTIVATIONS[activations]))(q, x)
    assert np.array_equal(out, contract(spec, x.astype(np.float64), w.astype(np.float64), np))


@every_weight
def test_one_row_is_the_first_of_many(weights):
    """Law: W8A8 treats tokens apart, so a row alone has the bits it has among others of the same formulation."""
    x, q = normal((4, 32)), jq.quantize(normal((32, 24), 1), WEIGHTS[weights])
    run = jax.jit(jq.quantized(lambda q, x: x @ q))
    assert np.array_equal(run(q, x[:1]), run(q, x)[:1])


def test_one_row_is_never_an_integer_mat_vec_on_cpu():
    """Law: XLA's CPU code multiplies a row by a matrix of int8 as two rows, the kind its library kernel takes."""
    x, q = normal((1, 256)), jq.quantize(normal((256, 512), 1))
    text = jax.jit(jq.quantized(lambda q, x: x @ q)).lower(q, x).compile().as_text()
    assert set(re.findall(r"s32\[([\d,]+)\]\S* dot\(", text)) == {"2,512"}


@given(st.lists(st.floats(width=32, allow_subnormal=False), min_size=1))
def test_the_greatest_number_is_that_of_the_greatest_bits(numbers):
    """Law: it is the greatest or 0; what is not finite shows in that of the sizes, and in that of one of two signs."""
    x = np.array(numbers, np.float32)
    of_sizes, of_signs = greatest(jnp.abs(x), 0), [greatest(jnp.asarray(signed), 0) for signed in (x, -x)]
    if np.isfinite(x).all():
        assert of_sizes == np.abs(x).max() and of_signs == [max(0, *x), max(0, *-x)]
    else:
        assert not np.isfinite(of_sizes) and not np.isfinite(of_signs).all()


@pytest.mark.parametrize("rows", [4, 2**16 // 40 + 1], ids=["few", "many"])
@pytest.mark.parametrize("dtype", [np.float32, jnp.bfloat16])
@pytest.mark.parametrize("format", [jq.int8, jq.int8(symmetric=False), jq.int4], ids=str)
def test_tokens_have_the_codes_of_an_array(format, dtype, rows):
    """Law: a token is quantized as a row of weights is, whichever way its range is found."""
    x = jnp.asarray(normal((rows, 40)), dtype).at[0].set(0).at[1].apply(jnp.abs).at[2].apply(lambda x: -jnp.abs(x))
    tokens, q = jax.jit(quantize_tokens, static_argnums=1)(x, format), jq.quantize(x, format, axis=-1)
    zero = None if q.zero is None else q.zero.astype(jnp.float32)
    assert np.array_equal(tokens.codes, q.codes) and np.array_equal(tokens.scale, q.scale)
    assert (tokens.zero is None and zero is None) or np.array_equal(tokens.zero, zero)


@every_weight
@pytest.mark.parametrize("activations", [jq.int8, jq.int8(symmetric=False)], ids=["symmetric", "affine"])
@pytest.mark.parametrize("rows", [4, 9, 2**16 // 32 + 1])
def test_a_bad_token_spoils_only_itself(weights, rows, activations):
    """Law: NaN or infinity in a token gives NaN there, and every other token keeps its bits."""
    x, q = normal((rows, 32)), jq.quantize(normal((32, 520), 1), WEIGHTS[weights])
    run = jax.jit(jq.quantized(lambda q, x: x @ q, activations=activations))
    clean = np.asarray(run(q, x))
    for bad in (np.nan, -np.nan, np.inf, -np.inf):
        spoilt = x.copy()
        spoilt[1, 5] = bad
        out = np.asarray(run(q, spoilt))
        assert np.isnan(out[1]).all()
        assert np.array_equal(np.delete(out, 1, 0), np.delete(clean, 1, 0))


@pytest.mark.parametrize("rows", [1, 3, 12])
@pytest.mark.parametrize("bad", [np.nan, np.inf])
def test_a_bad_token_spoils_only_itself_with_float_activations(rows, bad):
    """Law: with `activations=None` too, whichever formulation the number of rows chooses."""
    x, q = normal((rows + 1, 32)), jq.quantize(normal((32, 520), 1))
    spoilt = x.copy()
    spoilt[0, 5] = bad
    run = jax.jit(jq.quantized(lambda q, x: x @ q, activations=None))
    clean, out = np.asarray(run(q, x)), np.asarray(run(q, spoilt))
    assert not np.isfinite(out[0]).any()
    assert np.array_equal(out[1:], clean[1:])


@pytest.mark.parametrize("dtype", [jnp.bfloat16, jnp.float16])
@pytest.mark.parametrize("activations", [jq.int8, None], ids=["int8", "float"])
def test_half_precision(dtype, activations):
    """Law: 16-bit models give 16-bit results, off the oracle by no more than their own rounding."""
    x, w = jnp.asarray(normal((3, 32)), dtype), jnp.asarray(normal((32, 24), 1), dtype)
    q = jq.quantize(w)
    out = jax.jit(jq.quantized(lambda q, x: x @ q, activations=activations))(q, x)
    assert out.dtype == dtype
    wide = np.asarray(x).astype(np.float32)
    tokens = wide if activations is None else rounded(wide, jq.int8, (1,))
    # Half an ulp for the result; the decoded weight is rounded to 16 bits too where the matmul is a float one.
    assert close(out, tokens @ decoded(q), 2 * float(jnp.finfo(dtype).eps))


@pytest.mark.parametrize("large", [2**23, 0], ids=["small", "large"])
@pytest.mark.parametrize("rows", [1, 2, 8, 9])
@pytest.mark.parametrize("format", [jq.int8, jq.int4(group=32)], ids=["int8", "int4-group"])
def test_float_activations_lose_nothing(format, rows, large, monkeypatch):
    """Law: with `activations=None` a huge number beside small ones costs what float32 costs, in digits or decoded."""
    monkeypatch.setattr(choice, "_LARGE", large)
    jax.clear_caches()
    x, q = normal((rows, 64)), jq.quantize(normal((64, 4096), 1), format)
    x[:, 0] *= 1000
    out = jax.jit(jq.quantized(lambda q, x: x @ q, activations=None))(q, x)
    assert close(out, x.astype(np.float64) @ decoded(q))


def test_a_scale_for_each_input_is_folded_into_the_activations():
    """Law: `x @ (s * codes) == (x * s) @ codes`: still integer arithmetic, on tokens scaled before they are rounded."""
    x, w = normal((3, 24)), jq.quantize(normal((24, 32), 1), axis=1)
    assert w.scale.shape == (24, 1)
    out = jax.jit(jq.quantized(lambda q, x: x @ q))(w, x)
    scaled = x * np.asarray(w.scale)[:, 0]
    assert close(out, rounded(scaled, jq.int8, (1,)) @ np.asarray(w.codes).astype(np.float64))
    assert jq.explain(lambda q, x: x @ q, w, x).meetings[0].arithmetic == INTEGER


def test_scales_that_do_not_follow_the_axes_of_a_matmul_say_what_does():
    """Law: inputs guessed from a name may be others, and then it is a float matmul; `stats` make it an integer one."""
    x, params = normal((3, 32)), {"up": {"kernel": normal((32, 4, 8), 1)}}
    fn = lambda params, x: jnp.tensordot(x, params["up"]["kernel"], 1)  # noqa: E731
    guessed, known = (jq.quantize_params(params, stats=stats) for stats in (None, jq.calibrate(fn, params, [x])))
    (row,), (other,) = (jq.explain(fn, qparams, x).meetings for qparams in (guessed, known))
    assert row.arithmetic == "float" and "its scales do not follow the axes" in row.reason and "`stats`" in row.reason
    assert other.arithmetic == INTEGER and other.reason == ""


def split_largest(x, count, axes):
    """The `count` largest numbers of each token and the rest, each in the shape of `x`."""
    tokens = np.moveaxis(x, axes, range(-len(axes), 0))
    flat = tokens.reshape(*tokens.shape[: x.ndim - len(axes)], -1)
    largest = np.zeros(flat.shape, bool)
    np.put_along_axis(largest, np.argsort(-np.abs(flat), -1)[..., :count], True, -1)
    largest = np.moveaxis(largest.reshape(tokens.shape), range(-len(axes), 0), axes)
    return np.where(largest, x, 0), np.where(largest, 0, x)


@pytest.mark.parametrize("spec", DIFFERENT)
@pytest.mark.parametrize(
    "weights, activations, outliers",
    [("tensor", "int8", 1), ("channel", "int8-affine", 3), ("int4-group-affine", "int8", 2)],
)
def test_outliers_are_multiplied_in_float_and_the_rest_in_codes(spec, weights, activations, outliers):
    """Law: each token's largest activations are exact, and the scale of the others is theirs alone."""
    _, x_shape, w_shape, _ = SPECS[spec]
    x_axes, w_axes = axes_of(spec)
    x, q = normal(x_shape) ** 5, jq.quantize(normal(w_shape, 1), WEIGHTS[weights], axis=w_axes)
    options = {"activations": ACTIVATIONS[activations], "outliers": outliers}
    out = jax.jit(jq.quantized(lambda q, x: contract(spec, x, q), **options))(q, x)
    largest, rest = split_largest(x, outliers, x_axes)
    tokens = largest + rounded(rest, ACTIVATIONS[activations], x_axes)
    assert close(out, contract(spec, tokens, decoded(q), np), 2e-6)


@pytest.mark.parametrize("rows", [1, 5])
def test_of_activations_equally_large_the_first_is_the_outlier(rows):
    """Law: an outlier is taken once, and is the one that an argmax would find."""
    x = np.random.default_rng(0).integers(-2, 3, (1, rows, 24)).astype(np.float32)
    rest, ((index, value),) = jax.jit(functools.partial(split_outliers, count=1))(x)
    first = np.argmax(np.abs(x), axis=-1)
    assert np.array_equal(index, first)
    assert np.array_equal(value, np.take_along_axis(x, first[..., None], -1))
    assert np.array_equal(x - np.asarray(rest), np.where(np.arange(24) == first[..., None], x, 0))


@pytest.mark.parametrize("weights", ["channel", "affine", "int4-group"])
def test_with_every_activation_an_outlier_nothing_is_rounded(weights):
    """Law: as many outliers as inputs, or more, is the float matmul."""
    x, q = normal((3, 16)), jq.quantize(normal((16, 24), 1), WEIGHTS[weights])
    for outliers in (16, 99):
        out = jax.jit(jq.quantized(lambda q, x: x @ q, outliers=outliers))(q, x)
        assert close(out, x.astype(np.float64) @ decoded(q))


@pytest.mark.parametrize("weights", ["channel", "group"])
@pytest.mark.parametrize("rows", [3, 9])
def test_a_bad_token_spoils_only_itself_with_outliers(weights, rows):
    """Law: also where the bad number is the outlier, and where there are more of them than outliers."""
    x, q = normal((rows, 32)), jq.quantize(normal((32, 520), 1), WEIGHTS[weights])
    run = jax.jit(jq.quantized(lambda q, x: x @ q, outliers=2))
    clean = np.asarray(run(q, x))
    for bad, count in itertools.product((np.nan, np.inf), (1, 3)):
        spoilt = x.copy()
        spoilt[1, :count] = bad
        out = np.asarray(run(q, spoilt))
        assert not np.isfinite(out[1]).any()
        assert np.array_equal(np.delete(out, 1, 0), np.delete(clean, 1, 0))


@pytest.mark.parametrize("outliers", [-1, 1.0, True, "1", None])
def test_a_number_of_outliers_that_cannot_be(outliers):
    """Law: refused by name when `quantized` is called."""
    with as_shipped(), pytest.raises(FormatError, match="outliers="):
        jq.quantized(jnp.matmul, outliers=outliers)


INVALID = {
    "fp8": jq.fp8,
    "nf4": jq.nf4,
    "groups": jq.int8(group=8),
    "per-tensor": jq.int8(per_channel=False),
}


@pytest.mark.parametrize("format", INVALID.values(), ids=INVALID)
def test_formats_that_activations_cannot_have(format):
    """Law: refused when `quantized` is called, before anything runs, naming what is valid."""
    x, w = jnp.ones((2, 8)), jnp.ones((8, 8))
    numbers = (((1,), (0,)), ((), ()))
    for run in (
        lambda: jq.quantized(jnp.matmul, activations=format),
        lambda: jq.explain(jnp.matmul, w, x, activations=format),
        lambda: jq.dot_general(x, jq.quantize(w), numbers, activations=format),
    ):
        with pytest.raises(FormatError, match=r"activations=.*per token"):
            run()


@pytest.mark.parametrize("wrong", [jnp.int8, 8, "int8"], ids=["dtype", "number", "text"])
def test_what_is_no_format_of_activations_is_refused(wrong):
    """Law: refused by what it is when `quantized` is called, naming a format."""
    with as_shipped(), pytest.raises(FormatError, match=re.escape(f"activations={wrong!r}: ") + r".*jq\.int8"):
        jq.quantized(jnp.matmul, activations=wrong)


# Convolutions and ragged_dot


def naive_conv(x, w, stride, groups):
    """`[b, h, w, c]` by `[h, w, c / groups, out]`, "SAME" as XLA pads it, in float64."""
    (b, height, width, _), (kh, kw, inner, outer) = x.shape, w.shape
    out_h, out_w = -(-height // stride), -(-width // stride)
    pads = [max((o - 1) * stride + k - n, 0) for o, k, n in ((out_h, kh, height), (out_w, kw, width))]
    x = np.pad(x, ((0, 0), *((p // 2, p - p // 2) for p in pads), (0, 0)))
    out = np.zeros((b, out_h, out_w, outer))
    for i, j, group in np.ndindex(out_h, out_w, groups):
        window = x[:, i * stride : i * stride + kh, j * stride : j * stride + kw, group * inner : (group + 1) * inner]
        part = slice(group * outer // groups, (group + 1) * outer // groups)
        out[:, i, j, part] = np.einsum("bhwc,hwco->bo", window, w[..., part])
    return out


def conv(x, w, stride, groups):
    """The same by XLA."""
    numbers = ("NHWC", "HWIO", "NHWC")
    return jax.lax.conv_general_dilated(
        x, w, (stride, stride), "SAME", dimension_numbers=numbers, feature_group_count=groups
    )


every_conv = pytest.mark.parametrize("stride, groups", [(1, 1), (2, 1), (2, 4)])
KERNELS = [("tensor", "int8"), ("channel", "int8"), ("affine", "int8"), ("affine", "int8-affine"), ("channel", "int4")]


@every_conv
@pytest.mark.parametrize("weights, activations", KERNELS)
def test_a_convolution_is_that_of_the_codes(stride, groups, weights, activations):
    """Law: with a scale per image and per output channel, at the borders too, where the padding is a true zero."""
    x, w = normal((2, 6, 5, 8)) + 1, normal((3, 3, 8 // groups, 12), 1)
    q = jq.quantize(w, WEIGHTS[weights], axis=(0, 1, 2))
    run = jq.quantized(lambda q, x: conv(x, q, stride, groups), activations=ACTIVATIONS[activations])
    expected = naive_conv(rounded(x, ACTIVATIONS[activations], (1, 2, 3)), decoded(q), stride, groups)
    assert close(jax.jit(run)(q, x), expected, 2e-6)


@every_conv
@pytest.mark.parametrize("weights, activations", KERNELS[:4])
def test_a_convolution_with_scales_that_are_powers_of_two_is_exact(stride, groups, weights, activations):
    """Law 1, bit for bit."""
    x = exact((2, 6, 5, 8), ACTIVATIONS[activations], (1, 2, 3), 0)
    w = exact((3, 3, 8 // groups, 12), WEIGHTS[weights], (0, 1, 2), 1)
    q = jq.quantize(w, WEIGHTS[weights], axis=(0, 1, 2))
    run = jq.quantized(lambda q, x: conv(x, q, stride, groups), activations=ACTIVATIONS[activations])
    expected = naive_conv(x.astype(np.float64), w.astype(np.float64), stride, groups)
    assert np.array_equal(jax.jit(run)(q, x), expected)


SIZES = np.array([2, 0, 3, 1], np.int32)


def naive_ragged(x, w, sizes):
    """Each row by the matrix of its own group; zeros beyond the groups."""
    out, start = np.zeros((x.shape[0], w.shape[2])), 0
    for expert, size in enumerate(sizes):
        out[start : start + size] = x[start : start + size] @ w[expert]
        start += size
    return out


@pytest.mark.parametrize("rows", [6, 8])
@pytest.mark.parametrize("weights", ["tensor", "channel", "affine", "group"])
@pytest.mark.parametrize("activations", ["int8", "int8-affine"])
def test_ragged_dot_with_scales_that_are_powers_of_two_is_exact(rows, weights, activations):
    """Law 1, bit for bit, also for tokens that no expert serves."""
    x, w = exact((rows, 32), ACTIVATIONS[activations], (1,), 0), exact((4, 32, 24), WEIGHTS[weights], (1,), 1)
    q = jq.quantize(w, WEIGHTS[weights], axis=1)
    run = jax.jit(jq.quantized(jax.lax.ragged_dot, activations=ACTIVATIONS[activations]))
    assert np.array_equal(run(x, q, SIZES), naive_ragged(x, w, SIZES))


@pytest.mark.parametrize("weights", ["tensor", "channel", "affine"])
@pytest.mark.parametrize("activations", ACTIVATIONS)
def test_ragged_dot_is_that_of_the_codes(weights, activations):
    """Law: the result is the oracle's."""
    x, q = normal((6, 32)), jq.quantize(normal((4, 32, 24), 1), WEIGHTS[weights], axis=1)
    out = jax.jit(jq.quantized(jax.lax.ragged_dot, activations=ACTIVATIONS[activations]))(x, q, SIZES)
    assert close(out, naive_ragged(rounded(x, ACTIVATIONS[activations], (1,)), decoded(q), SIZES), 2e-6)


# Derivatives


@pytest.mark.parametrize("spec", ["matrix", "weight-first", "heads-in", "experts"])
@pytest.mark.parametrize("weights", ["channel", "int4-group-affine"])
@pytest.mark.parametrize("activations", [jq.int8, None], ids=["int8", "float"])
def test_derivatives_are_those_of_the_decoded_matmul(spec, weights, activations):
    """Law: backward in the input and in the scale, and forward: the decoded matmul's, straight through rounding."""
    _, x_shape, w_shape, _ = SPECS[spec]
    x, q = normal(x_shape), jq.quantize(normal(w_shape, 1), WEIGHTS[weights], axis=axes_of(spec)[1])
    run = jq.quantized(lambda q, x: contract(spec, x, q), activations=activations)

    def plain(q, x):
        return contract(spec, x, jq.dequantize(q))

    weighing = normal(jax.eval_shape(run, q, x).shape, 2)

    def gradients(fn):
        loss = lambda q, x: jnp.sum(fn(q, x) * weighing)  # noqa: E731
        dq, dx = quickly_jitted(jax.grad(loss, argnums=(0, 1), allow_int=True))(q, x)
        return dq.scale, dx

    for got, expected in zip(gradients(run), gradients(plain), strict=True):
        assert close(got, expected, 1e-5)
    towards = normal(x_shape, 3)
    got, expected = (
        quickly_jitted(lambda x, fn=fn: jax.jvp(lambda x: fn(q, x), (x,), (towards,)))(x) for fn in (run, plain)
    )
    assert close(got[1], expected[1], 1e-5)
    assert close(got[0], quickly_jitted(run)(q, x))


def test_derivatives_of_convolution_and_ragged_dot():
    """Law: as for matmuls."""
    kernel, experts = jq.quantize(normal((3, 3, 8, 12)), axis=(0, 1, 2)), jq.quantize(normal((4, 32, 24)))
    cases = [
        (lambda q, x: conv(x, q, 1, 1), kernel, normal((2, 6, 5, 8))),
        (lambda q, x: jax.lax.ragged_dot(x, q, jnp.asarray(SIZES)), experts, normal((6, 32))),
    ]
    for fn, q, x in cases:
        got = quickly_jitted(jax.grad(lambda x, fn=fn, q=q: jnp.sum(jq.quantized(fn)(q, x))))(x)
        expected = quickly_jitted(jax.grad(lambda x, fn=fn, q=q: jnp.sum(fn(jq.dequantize(q), x))))(x)
        assert close(got, expected, 1e-5)


# jq.dot_general

NUMBERS = (((1,), (0,)), ((), ()))


def test_dot_general_of_arrays_is_that_of_jax():
    """Law: with no QTensor it is `jax.lax.dot_general`, in its results, dtypes and options."""
    x, w = jnp.asarray(normal((3, 32)), jnp.bfloat16), jnp.asarray(normal((32, 24), 1), jnp.bfloat16)
    for options in ({}, {"preferred_element_type": jnp.float32}, {"precision": jax.lax.Precision.HIGHEST}):
        got, expected = jq.dot_general(x, w, NUMBERS, **options), jax.lax.dot_general(x, w, NUMBERS, **options)
        assert got.dtype == expected.dtype and np.array_equal(got, expected)


@pytest.mark.parametrize("activations", [jq.int8, None], ids=["int8", "float"])
def test_dot_general_is_what_quantized_does(activations):
    """Law: `jq.dot_general(x, q) == quantized(lax.dot_general)(x, q)`, with the QTensor on either side."""
    x, q = jnp.asarray(normal((3, 32))), jq.quantize(normal((32, 24), 1))
    run = jq.quantized(lambda a, b, numbers: jax.lax.dot_general(a, b, numbers), activations=activations)
    for a, b, numbers in ((x, q, NUMBERS), (q, x, (((0,), (1,)), ((), ())))):
        assert np.array_equal(jq.dot_general(a, b, numbers, activations=activations), run(a, b, numbers))


def test_dot_general_reads_the_precision_as_jax_does(monkeypatch):
    """Law: given by name or by the function around it, floats are rounded only where the precision allows it."""
    monkeypatch.setattr(choice, "multiplies_bfloats", lambda: True)
    jax.clear_caches()
    x, q = normal((40, 64)), jq.turned(jq.quantize(normal((64, 36), 1), jq.int8))
    product = functools.partial(jq.dot_general, x, q, NUMBERS, activations=None)
    expected = np.asarray(x, np.float64) @ np.asarray(jq.dequantize(q), np.float64)

    def off(found):
        return np.abs(found - expected).max() / np.abs(expected).max()

    with jax.default_matmul_precision(PRESET):
        around, inside = off(product()), off(product(precision="highest"))
    kept = max(inside, *(off(product(precision=name)) for name in ("highest", "high", None)))
    assert kept < 2.0**-20 < min(around, off(product(precision=PRESET)))


@pytest.mark.parametrize("rows", [1, 2])
def test_at_the_highest_precision_floats_are_not_written_in_digits(rows):
    """Law: what is taken off a large number is not lost, as it would be in integers of a scale for the whole token."""
    x, q = normal((rows, 64)), exactly(jq.quantize(normal((64, 36), 1), jq.int8))
    x[:, 0] = 2.0**30
    weight = np.asarray(jq.dequantize(q), np.float64)
    weight[0] = 0
    q = dataclasses.replace(q, codes=q.codes.at[0].set(0))
    found = jax.jit(jq.quantized(lambda q, x: jnp.dot(x, q, precision="highest"), activations=None))(q, x)
    assert close(found, np.asarray(x, np.float64) @ weight)


def test_an_algorithm_without_a_name_has_all_bits():
    """Law: JAX's names say how exact they are; of any other algorithm that is not known."""
    algorithm = jax.lax.DotAlgorithm(np.float32, np.float32, np.float32)
    assert level(algorithm) == level((algorithm, algorithm)) == jax.lax.Precision.HIGHEST


def test_dot_general_of_two_qtensors_decodes_the_left():
    """Law: two weights in codes mean the product of what they stand for, the left one taken as activations."""
    a, b = jq.quantize(normal((3, 32)), axis=1), jq.quantize(normal((32, 24), 1))
    assert close(jq.dot_general(a, b, NUMBERS, activations=None), decoded(a) @ decoded(b))


# name: the shapes of the activations and of the weight, and dimension numbers that are none of theirs.
MISMATCHED = {
    "inputs": ((3, 16), (32, 24), NUMBERS),
    "batches": ((2, 3, 32), (4, 32, 24), (((2,), (1,)), ((0,), (0,)))),
    "an axis more": ((3, 32), (32, 24), (((0, 1), (0,)), ((), ()))),
    "an axis twice": ((3, 32), (32, 24), (((1,), (0,)), ((1,), (0,)))),
    "no such axis": ((32,), (32, 24), NUMBERS),
    "from the end": ((3, 32), (32, 24), (((-1,), (0,)), ((), ()))),
}


@pytest.mark.parametrize("turn", [lambda q: q, jq.turned], ids=["upright", "turned"])
@pytest.mark.parametrize("x_shape, w_shape, numbers", MISMATCHED.values(), ids=MISMATCHED)
def test_shapes_that_do_not_match_are_jaxs_errors(x_shape, w_shape, numbers, turn):
    """Law: what `jax.lax.dot_general` says of the decoded weight, on either side."""
    x, q = jnp.asarray(normal(x_shape)), jq.quantize(normal(w_shape, 1))
    swapped = tuple(pair[::-1] for pair in numbers)
    for weight_first, numbers_ in ((False, numbers), (True, swapped)):
        messages = []
        for product, w in ((jax.lax.dot_general, jq.dequantize(q)), (jq.dot_general, turn(q))):
            with pytest.raises(TypeError) as error:
                product(*((w, x) if weight_first else (x, w)), numbers_)
            messages.append(str(error.value))
        assert messages[0] == messages[1]


@pytest.mark.parametrize("weights", [jq.int8, jq.int4(group=8)], ids=str)
def test_flax_hooks_are_what_quantized_does(weights):
    """Law: a Flax layer with the hook, over its float kernel, equals the plain layer over the quantized kernel."""
    x, hook = normal((3, 32)), functools.partial(jq.dot_general, weights=weights)
    plain = nn.Dense(24)
    params = plain.init(jax.random.key(0), x)
    expected = jq.quantized(plain.apply)(jq.quantize_params(params, weights), x)
    assert np.array_equal(nn.Dense(24, dot_general=hook).apply(params, x), expected)
    assert np.array_equal(nn.Dense(24, dot_general_cls=lambda: hook).apply(params, x), expected)

    layer = nnx.Linear(32, 24, rngs=nnx.Rngs(0))
    graphdef, state = nnx.split(layer)
    expected = jq.quantized(lambda state, x: nnx.merge(graphdef, state)(x))(jq.quantize_params(state, weights), x)
    assert np.array_equal(nnx.Linear(32, 24, dot_general=hook, rngs=nnx.Rngs(0))(x), expected)


# Look-ups

LOOK_UPS = {
    "rows": lambda q, i: jnp.take(q, i, axis=0),
    "clipped": lambda q, i: jnp.take(q, i, axis=0, mode="clip"),
    "wrapped": lambda q, i: jnp.take(q, i, axis=0, mode="wrap"),
    "columns": lambda q, i: jnp.take(q, i, axis=1),
    "indexed": lambda q, i: q[i],
    "tables": lambda q, i: q[i[:, :1], i[:, 1:]],
    "one by one": lambda q, i: jax.vmap(lambda k: q[k])(i),
}


TABLES = [(jq.int8, 0), (jq.int4(group=8, symmetric=False), 1), (jq.nf4(group=8), 0), (jq.fp8, 1)]


@pytest.mark.parametrize("pick", LOOK_UPS.values(), ids=LOOK_UPS)
@pytest.mark.parametrize("format, axis", TABLES, ids=lambda value: str(value))
def test_a_look_up_is_that_of_the_decoded_table(pick, format, axis):
    """Law: bit for bit, with negative indices counted from the end and NaN where an index is out of range."""
    q = jq.quantize(normal((24, 16)), format, axis=axis)
    indices = jnp.array([[0, 5, 23], [-1, -24, 24], [100, -25, 7]], jnp.int32)
    got, expected = jq.quantized(pick)(q, indices), pick(jq.dequantize(q), indices)
    assert np.array_equal(got, expected, equal_nan=True)


EACH_ALONE = {
    "rows": lambda q, i: jax.vmap(lambda k: q[k])(i.reshape(-1)),
    "rows of rows": lambda q, i: jax.vmap(jax.vmap(lambda k: q[k]))(i),
    "columns": lambda q, i: jax.vmap(lambda k: q[:, k])(i.reshape(-1)),
    "slices": lambda q, i: jax.vmap(lambda k: jax.lax.dynamic_slice(q, (k, 0), (1, q.shape[1])))(i.reshape(-1)),
}


@pytest.mark.parametrize("pick", EACH_ALONE.values(), ids=EACH_ALONE)
@pytest.mark.parametrize("format, axis", TABLES, ids=lambda value: str(value))
def test_a_look_up_for_each_token_alone_is_that_of_the_decoded_table(pick, format, axis):
    """Law: so is an index under `vmap`, of which JAX clips what is out of range, and only what it picks is decoded."""
    q = jq.quantize(normal((24, 16)), format, axis=axis)
    indices = jnp.array([[0, 5, 15], [-1, -16, 100]], jnp.int32)
    assert np.array_equal(jq.quantized(pick)(q, indices), pick(jq.dequantize(q), indices))
    assert [row.arithmetic for row in jq.explain(pick, q, indices).meetings] == ["look-up"]


@pytest.mark.parametrize("format", [jq.int8, jq.int4(group=8)], ids=str)
def test_picked_matrices_stay_in_codes(format):
    """Law: experts that are picked are weights still, and one out of range gives NaN to its own tokens."""
    q, x, chosen = jq.quantize(normal((3, 32, 24)), format), normal((4, 32), 1), jnp.array([2, 0, 5, -1], jnp.int32)

    def fn(q, chosen, x):
        return jnp.einsum("td,tdf->tf", x, jnp.take(q, chosen, axis=0))

    out = jq.quantized(fn)(q, chosen, x)
    served, experts = [0, 1, 3], decoded(q)[[2, 0, 2]]
    assert np.isnan(out[2]).all()
    assert close(out[np.array(served)], np.einsum("td,tdf->tf", rounded(x[served], jq.int8, (1,)), experts), 2e-6)
    assert [row.arithmetic for row in jq.explain(fn, q, chosen, x).meetings] == [INTEGER]


@pytest.mark.parametrize("format", [jq.int8, jq.int4(group=8)], ids=str)
def test_matrices_picked_by_each_token_alone_are_those_picked_together(format):
    """Law: `E[i]` under `vmap` is `E[indices]`: the same numbers in codes, and the same statistics."""
    experts, x, chosen = normal((3, 32, 24)), normal((4, 32), 1), jnp.array([2, 0, -3, -1], jnp.int32)
    q = jq.quantize(experts, format)
    together = lambda w, chosen, x: jnp.einsum("td,tdf->tf", x, w[chosen])  # noqa: E731
    alone = lambda w, chosen, x: jax.vmap(lambda i, x: x @ w[i])(chosen, x)  # noqa: E731
    assert np.array_equal(*(jq.quantized(fn)(q, chosen, x) for fn in (alone, together)))
    assert [row.arithmetic for row in jq.explain(alone, q, chosen, x).meetings] == [INTEGER]
    found, expected = (jq.calibrate(fn, experts, [(chosen, x)]) for fn in (alone, together))
    assert jax.tree.structure(found) == jax.tree.structure(expected)
    assert all(map(np.array_equal, jax.tree.leaves(found), jax.tree.leaves(expected)))


@pytest.mark.parametrize("rows", [1, 3])
@pytest.mark.parametrize("dtype, outputs", [(jnp.int8, 64), (jnp.int4, 512), (jnp.int4, 515), (jnp.int2, 1024)])
@pytest.mark.parametrize("groups", [1, 4])
def test_products_of_packed_codes_are_exact(rows, dtype, outputs, groups):
    """Law: read as bytes or unpacked, padded or not, the sums are those of whole numbers."""
    info, random = jnp.iinfo(dtype), np.random.default_rng(0)
    x = random.integers(-127, 128, (2, groups, rows, 24))
    w = random.integers(int(info.min), int(info.max) + 1, (2, groups, 24, outputs))
    found = jax.jit(integer_dot)(jnp.asarray(x, jnp.int8), jnp.asarray(w, jnp.int8).astype(dtype))
    assert np.array_equal(found, np.einsum("bgmk,bgkn->bgmn", x, w))


@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16])
@pytest.mark.parametrize("rows", [3, 200])
@pytest.mark.parametrize("inputs_last", [True, False], ids=["lines", "columns"])
@pytest.mark.parametrize("format", **table(SAMPLE))
def test_in_lines_it_is_the_same_product(format, inputs_last, rows, dtype, monkeypatch):
    """Law: each code meets its input, scale and zero point; whole numbers to 256 round nothing, in bfloat16 either."""
    monkeypatch.setattr(lines, "_CACHE", 2**15)  # several blocks, where so small a weight would be one
    x = np.random.default_rng(0).integers(-9, 10, (1, rows, 64)).astype(np.float32)
    q = exactly(jax.vmap(lambda w: jq.quantize(w, format))(normal((1, 64, 384), 1)))
    product = lines.by_lines(rows, q, inputs_last)
    assert product is not None
    factors = 2.0 ** np.random.default_rng(1).integers(-3, 4, (1, rows, 1))
    expected = (x * factors) @ np.asarray(jq.dequantize(q), np.float64)
    found = jax.jit(product)(jnp.asarray(x, dtype), q, jnp.asarray(factors, jnp.float32))
    # A codebook's levels and fractions of a float8 are no whole numbers.
    bound = 0 if q.is_integer else 1e-6 if dtype == jnp.float32 else 2.0**-8
    assert found.dtype == jnp.float32
    assert np.abs(found - expected).max() <= bound * np.abs(expected).max()


@pytest.mark.parametrize("turn", [lambda q: q, jq.turned], ids=["as it comes", "turned"])
@pytest.mark.parametrize("activations", [jq.int8, jq.int8(symmetric=False)], ids=["symmetric", "affine"])
@pytest.mark.parametrize("format", [jq.int8, jq.int8(symmetric=False), jq.int4], ids=str)
def test_codes_as_bfloat16_are_multiplied_exactly(format, activations, turn, monkeypatch):
    """Law: where a CPU multiplies bfloat16 fastest, many products of codes give what they give as int8."""
    x, q = normal((200, 512), 1), turn(jq.quantize(normal((512, 1024), 2), format))

    def found(narrow):
        monkeypatch.setattr(choice, "multiplies_bfloats", lambda: narrow)
        jax.clear_caches()
        run = jax.jit(jq.quantized(lambda q, x: x @ q, activations=activations)).lower(q, x).compile()
        return run(q, x), "bf16[" in run.as_text()

    (as_floats, narrow), (as_integers, wide) = found(True), found(False)
    assert narrow and not wide
    assert np.abs(as_floats - as_integers).max() <= 2.0**-20 * np.abs(as_integers).max()  # the order of the scales


@pytest.mark.parametrize(
    "told, expected",
    [
        ("avx512_vnni avx512_bf16", True),
        ("avx512_bf16 amx_bf16 amx_int8", False),
        ("avx512_vnni", False),
        (None, False),
    ],
)
def test_a_cpu_is_asked_for_its_instructions(told, expected, monkeypatch):
    """Law: bfloat16 is multiplied where that is known to be fast, and a system that says nothing has none of it."""

    def read(path):
        if told is None:
            raise FileNotFoundError(path)
        return f"processor : 0\nflags\t\t: fpu {told} sse\n"

    monkeypatch.setattr(Path, "read_text", read)
    assert multiplies_bfloats.__wrapped__() is expected


@pytest.mark.parametrize(
    "rows, narrow", [(3, False), (200, False), (200, True)], ids=["few", "in float32", "in bfloat16"]
)
@pytest.mark.parametrize("turn", [lambda q: q, jq.turned], ids=["as it comes", "turned"])
@pytest.mark.parametrize("activations", [None, jq.int8], ids=["float", "int8"])
@pytest.mark.parametrize("format", [jq.int8(symmetric=False), jq.int2(group=32, symmetric=False), jq.fp8], ids=str)
def test_a_bfloat16_model_on_any_cpu(format, activations, turn, rows, narrow, monkeypatch):
    """Law: weights and result are rounded to bfloat16 once at most, by 2^-8, whatever the CPU multiplies fastest."""
    monkeypatch.setattr(choice, "multiplies_bfloats", lambda: narrow)
    jax.clear_caches()
    x, q = normal((rows, 64)).astype(jnp.bfloat16), jq.quantize(normal((64, 384), 1).astype(jnp.bfloat16), format)
    found = jax.jit(jq.quantized(lambda q, x: x @ q, activations=activations))(turn(q), x)
    wide = np.asarray(x, np.float64)
    said = rounded(wide, activations, (1,)) if activations is not None and q.is_integer else wide
    weight = np.asarray(jq.dequantize(q.astype(jnp.float32)), np.float64)
    assert found.dtype == jnp.bfloat16
    error = np.abs(np.asarray(found, np.float64) - said @ weight)
    assert (error <= 2 * 2.0**-8 * (np.abs(said) @ np.abs(weight))).all()


PRESET = "BF16_BF16_F32"
ROUNDED = {
    "W8": (jq.int8, None),
    "W4 affine": (jq.int4(group=32, symmetric=False), None),
    "W4A8": (jq.int4(group=32), jq.int8),
    "NF4": (jq.nf4(group=32), None),
    "float8": (jq.fp8, None),
}


@pytest.mark.parametrize("narrow", [True, False], ids=["bfloat16", "float32"])
@pytest.mark.parametrize("rows", [1, 3, 40])
@pytest.mark.parametrize("turn", [lambda q: q, jq.turned], ids=["as it comes", "turned"])
@pytest.mark.parametrize("name", ROUNDED)
def test_floats_are_rounded_where_the_precision_allows_it(name, turn, rows, narrow, monkeypatch):
    """Law: at BF16_BF16_F32 floats are rounded by 2^-8 at most, and only where bfloat16 is multiplied faster."""
    monkeypatch.setattr(choice, "multiplies_bfloats", lambda: narrow)
    jax.clear_caches()
    format, activations = ROUNDED[name]
    x, q = normal((rows, 64)), jq.quantize(normal((64, 384), 1), format)
    forward = jax.jit(jq.quantized(lambda q, x: x @ q, activations=activations))
    with jax.default_matmul_precision(PRESET):
        found, text = forward(turn(q), x), forward.lower(turn(q), x).as_text()
    said = np.asarray(x, np.float64) if activations is None else rounded(np.asarray(x, np.float64), activations, (1,))
    weight = np.asarray(jq.dequantize(q), np.float64)
    rounds = narrow and rows > 16
    bound = 2 * 2.0**-8 if rounds else 2.0**-17
    assert found.dtype == jnp.float32
    error = np.abs(np.asarray(found, np.float64) - said @ weight)
    assert (error <= bound * (np.abs(said) @ np.abs(weight))).all()
    assert bool(re.search(r"dot_general.*xbf16>, .*xbf16>\) -> .*xf32>", text)) is rounds


@pytest.mark.parametrize("around", [PRESET, "BF16_BF16_F32_X3", "highest"])
@pytest.mark.parametrize("rows", [1, 3, 80])
@pytest.mark.parametrize("batched", [False, True], ids=["alone", "under vmap"])
@pytest.mark.parametrize("turn", [lambda q: q, jq.turned], ids=["as it comes", "turned"])
@pytest.mark.parametrize("format", [jq.int8, jq.int8(symmetric=False), jq.int4], ids=str)
def test_codes_are_multiplied_without_an_algorithm_of_floats(format, turn, batched, rows, around):
    """Law: at any precision the sums of codes are those of whole numbers, and XLA is asked for nothing else."""
    x, q = normal((rows, 64)), turn(jq.quantize(normal((64, 384), 1), format))
    forward = jq.quantized(lambda q, x: x @ q, outliers=1)
    forward = jax.jit(jax.vmap(forward) if batched else forward)
    x, q = jax.tree.map(lambda part: jnp.stack([part, part]), (x, q)) if batched else (x, q)
    with jax.default_matmul_precision(around):
        found, text = forward(q, x), forward.lower(q, x).as_text()
    assert np.abs(found - forward(q, x)).max() <= 2.0**-20 * np.abs(found).max()
    assert not any("algorithm" in line for line in text.splitlines() if "dot_general" in line)


# The axes of the activations, of the weight and of the result.
UNDER_VMAP = ["k,kn->n", "mk,kn->mn", "bmk,bkn->bmn", "bmk,bkn->bnm"]


@pytest.mark.parametrize("activations", [None, jq.int8], ids=["float", "int8"])
@pytest.mark.parametrize("turn", [lambda q: q, jq.turned], ids=["as it comes", "turned"])
@pytest.mark.parametrize("axes", UNDER_VMAP)
def test_a_batch_under_vmap_is_more_rows(axes, turn, activations):
    """Law: `vmap` around a quantized function gives what one call after the other does, and reads the weight once."""
    of_x, of_w, _ = re.split(",|->", axes)
    sizes = {"b": 2, "m": 3, "k": 64, "n": 48}
    x_shape, w_shape = ([sizes[axis] for axis in name] for name in (of_x, of_w))
    weights, xs = normal((5, *w_shape), 1), normal((5, *x_shape), 2)
    qs = [turn(jq.quantize(w, jq.int8)) for w in weights]
    einsum = functools.partial(jnp.einsum, axes, precision="highest")
    forward = jq.quantized(lambda q, x: einsum(x, q), activations=activations)
    both = list(zip(qs, xs, strict=True))
    together = jax.jit(jax.vmap(forward, (None, 0)))
    assert close(together(qs[0], xs), jnp.stack([forward(qs[0], x) for x in xs]))
    assert " gather(" not in together.lower(qs[0], xs).compile().as_text()
    stacked = jax.tree.map(lambda *parts: jnp.stack(parts), *qs)
    assert close(jax.jit(jax.vmap(forward))(stacked, xs), jnp.stack([forward(q, x) for q, x in both]))
    assert close(jax.vmap(forward, (0, None))(stacked, xs[0]), jnp.stack([forward(q, xs[0]) for q in qs]))


STACKED = {
    "W8": (jq.int8, None),
    "W4": (jq.int4(group=16), None),
    "W4A8": (jq.int4(group=16), jq.int8),
    "W4A8 affine": (jq.int4(group=16, symmetric=False), jq.int8),
    "one scale": (jq.int8(per_channel=False), None),
    "NF4": (jq.nf4(group=16), None),
}


@pytest.mark.parametrize("rows", [1, 3, 20])
@pytest.mark.parametrize("inputs_last", [False, True], ids=["as it comes", "inputs last"])
@pytest.mark.parametrize("format, activations", **table(STACKED))
def test_a_stack_is_multiplied_one_matrix_after_the_other(format, activations, inputs_last, rows):
    """Law: an einsum of experts is the matmul of each, and no array is as large as the experts would be as floats."""
    x, w = normal((6, rows, 64)), normal((6, 64, 288), 1)
    q = jq.quantize(np.swapaxes(w, 1, 2), format, axis=-1) if inputs_last else jq.quantize(w, format)
    fn = functools.partial(jnp.einsum, "ebk,enk->ebn" if inputs_last else "ebk,ekn->ebn")
    run = jax.jit(jq.quantized(lambda q, x: fn(x, q), activations=activations)).lower(q, x).compile()
    said = x if activations is None else rounded(x, activations, (2,))
    assert close(run(q, x), np.asarray(fn(said, np.asarray(jq.dequantize(q)))), 1e-5)
    arrays = re.findall(r" f32\[([\d,]+)\]", run.as_text())
    assert max(math.prod(map(int, shape.split(","))) for shape in arrays) < q.size


MADE = {
    "int8": jq.int8,
    "int4 g16 affine": jq.int4(group=16, symmetric=False),
    "rotated": jq.rotated(jq.rtn(jq.int4)),
    "smoothquant": jq.smoothquant(jq.rtn(jq.int8)),
    "outliers": jq.outliers(jq.rtn(jq.int4), block=16),
}


def made(quantizer, xs):
    """Three matrices `[64, 48]` that a quantizer has made for tokens `[3, ..., 64]`."""
    params = {"w": jnp.asarray(normal((3, 64, 48)))}
    stats = jq.calibrate(lambda p, x: jnp.einsum("etk,ekn->etn", x, p["w"]), params, [xs.reshape(3, -1, 64)])
    return jq.quantize_params(params, quantizer, stats=stats)["w"]


@pytest.mark.parametrize("activations", [jq.int8, None], ids=["int8", "float"])
@pytest.mark.parametrize("quantizer", **table(MADE))
def test_vmaps_of_vmaps_and_their_gradients(quantizer, activations):
    """Law: of weights, of tokens, or of both in any order, they are what one call after the other gives."""
    xs = normal((3, 5, 2, 64), 1)
    qs, run = made(quantizer, xs), jq.quantized(lambda q, x: x @ q, activations=activations)
    parts = [jax.tree.map(operator.itemgetter(i), qs) for i in range(3)]
    each = jnp.stack([jnp.stack([run(q, x) for x in of_q]) for q, of_q in zip(parts, xs, strict=True)])
    of_tokens = jax.vmap(run, (None, 0))
    assert close(jax.vmap(of_tokens)(qs, xs), each, 1e-5)
    assert close(jax.vmap(jax.vmap(run), (None, 1), 1)(qs, xs), each, 1e-5)
    assert close(jax.vmap(run, (0, None))(qs, xs[0, 0])[0], each[0, 0], 1e-5)
    slopes = jax.grad(lambda xs: jax.vmap(of_tokens)(qs, xs).sum())(xs)
    expected = jax.grad(lambda xs: jnp.einsum("ebtk,ekn->ebtn", xs, jq.dequantize(qs)).sum())(jnp.asarray(xs))
    assert close(slopes, expected, 1e-5)


def test_a_batch_of_stacks_may_share_what_is_done_to_the_inputs():
    """Law: one factor for all matrices of a stack is that of each, also where `vmap` makes more of them."""
    xs = normal((3, 5, 64), 1)
    q = made(MADE["smoothquant"], xs)
    q = dataclasses.replace(q, transform=jax.tree.map(lambda part: part[:1], q.transform))
    run = jq.quantized(lambda q, x: jnp.einsum("etk,ekn->etn", x, q), activations=None)
    qs, both = jax.tree.map(lambda part: jnp.stack([part, part]), q), np.stack([xs, 2 * xs])
    assert close(jax.vmap(run)(qs, both), jnp.stack([run(q, xs), run(q, 2 * xs)]), 1e-5)


IN_TERMS = {
    f"{name}{' affine' if not symmetric else ''}": format(symmetric=symmetric)
    for name, format in {
        "int8": jq.int8,
        "int8 g32": jq.int8(group=32),
        "int4 g64": jq.int4(group=64),
        "int4": jq.int4,
        "int2 g32": jq.int2(group=32),
    }.items()
    for symmetric in (True, False)
}


def test_digits_follow_what_the_ones_before_them_left():
    """Law: beside a number a million times as large the others keep 12 bits at least of their own."""
    x, w = normal((1, 64)), normal((64, 24), 1)
    x[:, 0], w[0] = 1e6, 0
    q = jq.quantize(w)
    found = jax.jit(jq.quantized(lambda q, x: x @ q, activations=None))(q, x)
    weight = np.asarray(jq.dequantize(q), np.float64)
    assert (np.abs(found - x @ weight) <= 2.0**-12 * (np.abs(x) @ np.abs(weight))).all()


@given(st.integers(1, 2048), st.integers(1, 128), st.sampled_from([jnp.int8, jnp.int4, jnp.int2]))
def test_terms_are_equal_parts_of_a_line_and_cut_no_group(size, groups, dtype):
    """Law: of equal width, each in one group or of whole ones in whole bytes, and neither too many nor too wide."""
    places, inputs = places_of(dtype), size * groups
    q = jq.QTensor(jnp.zeros((1, inputs, 8), dtype), jnp.ones((1, groups, 8)), None, jnp.float32, 8)
    terms = terms_of(q)
    if terms is not None:
        lanes, rest = divmod(inputs, terms * places)
        assert rest == 0 and lanes % 8 == 0
        assert terms % groups == 0 or (groups % terms == 0 and size % places == 0)
        assert terms <= 64 and lanes <= 32 * terms
    elif size % (8 * places) == 0 and groups <= 32:
        assert size // (8 * places) > 32


@pytest.mark.parametrize("format", **table(IN_TERMS))
@pytest.mark.parametrize("rows", [1, 2])
def test_sums_in_terms_are_exact(rows, format):
    """Law: floats hold the products of any codes and the sum of each lane, least ones and zero points too."""
    q = exactly(jax.vmap(lambda w: jq.quantize(w, format))(normal((1, 128, 36), 1)))
    least = int(jnp.iinfo(q.codes.dtype).min)
    row, one = np.random.default_rng(0).integers(-128, 128, (1, rows, 128)), jnp.ones((1, rows, 1))
    run = jax.jit(functools.partial(codes_in_terms, terms=terms_of(q)))
    for codes in (q.codes, jnp.full_like(q.codes, least), jnp.full_like(q.codes, least).at[:, ::2].set(-1 - least)):
        for x in (row, np.full_like(row, -128), np.full_like(row, 127)):
            for zero in (None, 0, 127, -128):
                weight = dataclasses.replace(q, codes=codes)
                tokens = Tokens(jnp.asarray(x, jnp.int8), one, None if zero is None else zero * one)
                centred = (x - (zero or 0)).astype(np.float64)
                expected, found = centred @ decoded(weight), run(tokens, weight)
                assert np.array_equal(found, expected.astype(np.float32))


def test_lanes_of_the_largest_codes_are_added_up_in_whole_numbers():
    """Law: a sum beyond 2^24, which float32 does not hold, is exact until its scale comes."""
    q = jq.QTensor(jnp.full((1, 2048, 3), 127, jnp.int8), jnp.ones((1, 1, 3)), None, jnp.float32, 8)
    x = np.full((1, 1, 2048), 127)
    x[..., -1] = 126
    lanes = codes_in_terms(Tokens(jnp.asarray(x, jnp.int8), jnp.ones((1, 1, 1)), None), q, terms_of(q))
    assert np.array_equal(lanes, np.full((1, 1, 3), np.float32(127 * int(x.sum()))))


@pytest.mark.parametrize("format", **table(IN_TERMS))
@pytest.mark.parametrize("rows", [1, 2])
def test_floats_in_terms_are_float32(rows, format):
    """Law: |x w - found| <= K 2^-24 sum_k |x w|, as of any sum of K products in float32, whatever the codes."""
    q = exactly(jax.vmap(lambda w: jq.quantize(w, format))(normal((1, 128, 36), 1)))
    x = normal((1, rows, 128))
    x[..., 64:] *= 1e-4
    x[..., 3] *= 1e3
    for codes in (q.codes, jnp.full_like(q.codes, jnp.iinfo(q.codes.dtype).min)):
        weight = dataclasses.replace(q, codes=codes)
        w = decoded(weight).astype(np.float64)
        found = jax.jit(functools.partial(floats_in_terms, terms=terms_of(q)))(jnp.asarray(x), weight)
        assert np.all(
            np.abs(found - x.astype(np.float64) @ w) <= 128 * 2.0**-24 * (np.abs(x).astype(np.float64) @ np.abs(w))
        )


@pytest.mark.parametrize("format", [jq.int8, jq.int4(group=32)], ids=str)
def test_a_token_that_is_not_finite_stays_so_in_terms_and_the_others_stay_as_they_are(format):
    """Law: a NaN or an infinity is seen in every output of its token and in no other, whatever the sums are made of."""
    q = jq.turned(jq.quantize(normal((128, 32)), format))
    for activations in (jq.int8, None):
        run = jax.jit(jq.quantized(lambda q, x: x @ q, activations=activations))
        for bad in (np.nan, np.inf, -np.inf):
            x = normal((2, 128))
            x[1, 100] = bad
            assert not np.isfinite(run(q, x[1:])).any()
            assert np.array_equal(np.isfinite(run(q, x)).any(axis=1), [True, False])
            assert np.array_equal(run(q, x)[0], run(q, normal((2, 128)))[0])


@pytest.mark.parametrize("pieces", [1, 4])
@pytest.mark.parametrize("format", **table({name: f for name, f in SAMPLE.items() if f.is_integer}))
def test_in_blocks_of_inputs_it_is_the_same_product(format, pieces):
    """Law: the sum over blocks of inputs, each with the scale and the zero point of its group, is that over all."""
    x = np.random.default_rng(0).integers(-9, 10, (1, 3, 64))
    q = exactly(jax.vmap(lambda w: jq.quantize(w, format))(normal((1, 64, 384), 1)))
    product, block = functools.partial(grouped_dot, inputs_last=False), 64 // q.scale.shape[1] // pieces
    found = jax.jit(functools.partial(_by_inputs, product=product, block=block))(jnp.asarray(x, jnp.int8), q)
    assert np.array_equal(found, x.astype(np.float64) @ np.asarray(jq.dequantize(q), np.float64))


@pytest.mark.parametrize(
    "rows, activations, inputs, outputs",
    [(1, jq.int8, 512, 512), (5, jq.int8, 512, 512), (1, None, 512, 512), (5, None, 1024, 4096)],
    ids=["int8-1", "int8-5", "float-1", "float-5"],
)
def test_packed_codes_are_unpacked_a_block_at_a_time_on_cpu(rows, activations, inputs, outputs):
    """Law: at a few rows a weight larger than a block is nowhere unpacked as a whole, and the product is the same."""
    x, q = normal((rows, inputs)), jq.quantize(normal((inputs, outputs), 1), jq.int4(group=64))
    run = jax.jit(jq.quantized(lambda q, x: x @ q, activations=activations)).lower(q, x).compile()
    arrays = re.findall(r" (?:f32|s32|s8)\[([\d,]+)\]", run.as_text())
    assert max(math.prod(map(int, shape.split(","))) for shape in arrays) < q.size
    assert run.memory_analysis().temp_size_in_bytes < 4 * q.size
    said = x if activations is None else rounded(x, activations, (1,))
    assert close(run(q, x), said @ decoded(q), 2e-6)


@pytest.mark.parametrize("turn", [lambda q: q, jq.turned], ids=["as it comes", "turned"])
@pytest.mark.parametrize("activations", [jq.int8, None], ids=["int8", "float"])
@pytest.mark.parametrize("format", [jq.int8, jq.int8(group=32), jq.int4(group=32), jq.nf4(group=32), jq.fp8], ids=str)
def test_no_rows_give_no_rows(format, activations, turn):
    """Law: an empty batch has an empty product of the same width and dtype, in every form."""
    for outputs in (7, 768):
        q = turn(jq.quantize(normal((64, outputs)), format))
        out = jax.jit(jq.quantized(lambda q, x: x @ q, activations=activations))(q, jnp.zeros((0, 64)))
        assert out.shape == (0, outputs) and out.dtype == jnp.float32
