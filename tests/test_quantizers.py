"""Laws of the quantizers, over one table of quantizers, formats and data.

Never worse   tr(D^T H D) <= tr(R^T H R),  D the error of the result and R that of nearest rounding
GPTQ          the published recursion, row by row in NumPy float64, gives the same codes
Scaling       2^k w has the codes of w and 2^k its scales; 2^k x changes nothing
Identity      a wrapper whose transform is the identity is what it wraps
Placement     vmap, jit and stacks in a tree give the codes of one matrix at a time
Meaning       x @ q ~= T(x) @ c, through every view of q: x @ dequantize(q) in float, what the codes say in integers

Every algorithm is compiled once, mapped over a stack of data: correlated inputs of which a few are large; the same
problem with w * 2^5 and x / 2^3; inputs and outputs that are dead; fewer tokens than inputs; weights with heavy tails.
Bounds are what rounding of float32 sums can do, K eps sum |a| |b|, and no more.
"""

import dataclasses
import functools
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from tables import limits, oracle_scale, spread, table

import jaxquant as jq
from jaxquant import inputs
from jaxquant.errors import OptionError, ShapeError
from jaxquant.qtensor import Kept
from jaxquant.quantizers.quantizer import check_format
from jaxquant.stats import Stats, observe, output_error, quantile, rescale

TOKENS, K, N, EPS = 96, 48, 12, 2.0**-23
PLAIN, SCALED, DEAD, FEW, TAILS = range(5)

FORMATS = {
    "int8": jq.int8,
    "int8-tensor": jq.int8(per_channel=False),
    "int4-group": jq.int4(group=16),
    "int4-group-affine": jq.int4(group=16, symmetric=False),
    "int3-affine": jq.int3(symmetric=False),
    "nf4-group": jq.nf4(group=16),
    "fp8": jq.fp8,
}
KEPT = functools.partial(jq.outliers, block=16)
AWQ = functools.partial(jq.awq, steps=4)
ORDERED = functools.partial(jq.gptq, by_activity=False)
# How each is made of a format, and which formats it meets: the fast ones all, the others each kind once.
QUANTIZERS = {
    "rtn": (jq.rtn, FORMATS),
    "least_squares": (lambda f: jq.rtn(f, jq.least_squares), ("int8-tensor", "int4-group-affine", "nf4-group", "fp8")),
    "hqq": (jq.hqq, ("int8-tensor", "int4-group", "int3-affine")),
    "gptq": (jq.gptq, ("int3-affine", "nf4-group")),
    "gptq in order": (ORDERED, ("int4-group-affine",)),
    "gptq absmax": (lambda f: jq.gptq(f, jq.absmax), ("int4-group",)),
    "gptq refresh": (lambda f: ORDERED(f, jq.absmax, refresh=True), ("int4-group-affine",)),
    "awq": (lambda f: AWQ(jq.rtn(f)), ("int3-affine",)),
    "smoothquant": (lambda f: jq.smoothquant(jq.rtn(f)), ("int8", "int4-group-affine")),
    "rotated": (lambda f: jq.rotated(jq.rtn(f)), ("int4-group", "nf4-group")),
    "outliers": (lambda f: KEPT(jq.rtn(f)), ("int4-group-affine", "nf4-group")),
    "rotated(gptq)": (lambda f: jq.rotated(jq.gptq(f)), ("int4-group",)),
    "awq(rotated)": (lambda f: AWQ(jq.rotated(jq.rtn(f))), ("int4-group",)),
    "awq(gptq)": (lambda f: AWQ(jq.gptq(f)), ("int3-affine",)),
    "outliers(gptq)": (lambda f: KEPT(jq.gptq(f, jq.absmax)), ("int3-affine",)),
    "rotated(outliers)": (lambda f: jq.rotated(KEPT(jq.rtn(f))), ("int4-group",)),
    "rotated(awq(gptq))": (lambda f: jq.rotated(AWQ(jq.gptq(f, jq.absmax))), ("int4-group-affine",)),
}
TABLE = [(name, format) for name, (_, formats) in QUANTIZERS.items() for format in formats]
every = pytest.mark.parametrize("name, format", TABLE, ids=[f"{name}-{format}" for name, format in TABLE])


@pytest.fixture(scope="module", autouse=True)
def quick_compilation():
    """It is not the compiled program that matters here, and compiling takes nearly all of the time."""
    jax.config.update("jax_disable_most_optimizations", True)
    yield
    jax.config.update("jax_disable_most_optimizations", False)


def problem(seed: int, tokens: int = TOKENS, width: int = K, outputs: int = N) -> tuple[np.ndarray, np.ndarray]:
    """Correlated inputs `[tokens, width]`, every eighth of them 20 times as large, and a matrix."""
    rng = np.random.default_rng(seed)
    x = rng.standard_normal((tokens, width)) @ (rng.standard_normal((width, width)) / 8 + np.eye(width))
    x[:, 3::8] *= 20
    return x.astype(np.float32), rng.standard_normal((width, outputs)).astype(np.float32)


@functools.cache
def data() -> tuple[np.ndarray, np.ndarray, Stats]:
    """The stack of inputs, of matrices, and their statistics."""
    xs, ws = (np.stack(part) for part in zip(*(problem(seed) for seed in (0, 0, 1, 2, 3)), strict=True))
    xs[SCALED], ws[SCALED] = xs[SCALED] / 8, ws[SCALED] * 32
    xs[DEAD, :, ::7], ws[DEAD, :, 5], ws[DEAD, 9] = 0, 0, 0
    xs[FEW, 5:] = 0
    ws[TAILS] = np.random.default_rng(4).standard_t(3, ws[TAILS].shape)
    return xs, ws, jax.jit(observe)(jnp.asarray(xs))


def make(name: str, format: str) -> jq.Quantizer:
    return QUANTIZERS[name][0](FORMATS[format])


@functools.cache
def mapped(name: str, format: str):
    return jax.jit(jax.vmap(make(name, format)))


@functools.cache
def results(name: str, format: str) -> jq.QTensor:
    """The whole stack in codes."""
    return mapped(name, format)(*data()[1:])


def at(tree, i: int):
    return jax.tree.map(lambda part: part[i], tree)


def exact(array) -> np.ndarray:
    return np.asarray(array).astype(np.float64)


def decoded(q: jq.QTensor) -> np.ndarray:
    return exact(jq.dequantize(q))


def hessian(i: int) -> np.ndarray:
    x = exact(data()[0][i])
    return x.T @ x / TOKENS


def loss(d: np.ndarray, h: np.ndarray) -> tuple[float, float]:
    """`tr(D^T H D)` in float64, and how far from it a float32 evaluation may be."""
    return np.sum(d * (h @ d)), 2 * K * EPS * np.sum(np.abs(d) * (np.abs(h) @ np.abs(d)))


def losses(name: str, format: str, i: int, h: np.ndarray) -> list[tuple[float, float]]:
    """Those of a result and of nearest rounding."""
    w = data()[1][i]
    both = (decoded(results(name, format))[i], decoded(jq.quantize(w, FORMATS[format])))
    return [loss(exact(w) - one, h) for one in both]


@every
def test_no_quantizer_is_worse_than_nearest_rounding(name, format):
    """Law: tr(D^T H D) is at most that of nearest rounding whatever the data, and less somewhere; dead is exactly 0."""
    q, shares = results(name, format), []
    assert np.all(np.isfinite(decoded(q))) and np.all(decoded(q)[DEAD, :, 5] == 0)
    for i in range(5):
        (ours, slack), (nearest, more) = losses(name, format, i, hessian(i))
        assert name == "smoothquant" or ours <= nearest + slack + more, i
        shares.append(ours / nearest)
    assert name == "rtn" or min(shares) < 0.999
    assert q[0].scale.shape == jq.quantize(data()[1][0], FORMATS[format]).scale.shape


def same_codes(a: jq.QTensor, b: jq.QTensor, bound: float) -> bool:
    """Whether two have the same codes and zero points, and scales that are equal up to a bound."""
    codes = [np.array_equal(exact(x), exact(y)) for x, y in ((a.codes, b.codes), (a.zero, b.zero)) if x is not None]
    return all(codes) and a.scale.shape == b.scale.shape and np.allclose(a.scale, b.scale, rtol=bound, atol=0)


@pytest.mark.parametrize("format", FORMATS)
def test_rtn_is_quantize(format):
    """Law: rtn(format) is `quantize`, matrix by matrix, granularity included."""
    assert same_codes(results("rtn", format)[0], jq.quantize(data()[1][0], FORMATS[format]), 2 * EPS)


@pytest.mark.parametrize("format", ["int4-group-affine", "nf4-group"])
def test_least_squares_is_the_best_range_of_each_group(format):
    """Law: sum_k E[x_k^2] d_k^2 of every group is at most that of any share of its range in steps of 3 %."""
    _, ws, stats = data()
    square = np.diagonal(exact(stats.gram), axis1=1, axis2=2) / TOKENS
    # With a diagonal H the error of the output is the sum over groups, so that nearest rounding never comes back.
    apart = dataclasses.replace(stats, gram=jnp.asarray(square[:, :, None] * np.eye(K) * TOKENS, jnp.float32))

    def of_groups(q):
        error = square[:, :, None] * (exact(ws) - decoded(q)) ** 2
        return error.reshape(5, -1, 16, N).sum(2)

    found = of_groups(mapped("least_squares", format)(ws, apart))
    for share in 1 - 0.03 * np.arange(24):
        assert np.all(found <= of_groups(jq.quantize(ws, FORMATS[format], clip=share)) * (1 + 1e-5)), share


def test_outliers_keeps_the_largest_input_of_each_block_and_quantizes_the_rest():
    """Law: x w = x_kept w_kept + x_rest decode(inner(w_rest)), kept by max|x|, exact to float32."""
    (_, ws, stats), q = data(), results("outliers", "int4-group-affine")
    sizes = exact(stats.absmax).reshape(5, K // 16, 16, 1)
    mask = (np.arange(16)[:, None] == sizes.argmax(2, keepdims=True)).reshape(5, K, 1)
    assert np.array_equal(q.kept.mask, mask) and np.array_equal(decoded(q)[mask[..., 0]], ws[mask[..., 0]])
    rest = jq.quantize(np.where(mask, 0, ws), FORMATS["int4-group-affine"])
    assert same_codes(q.core, rest, 2 * EPS)


def test_gptq_loses_on_the_weights_and_wins_on_the_output():
    """Law: the paper's claim, with the ranges of nearest rounding so that only the rounding differs."""
    (ours, _), (nearest, _) = losses("gptq absmax", "int4-group", PLAIN, np.eye(K))
    assert ours > nearest
    (ours, _), (nearest, _) = losses("gptq absmax", "int4-group", PLAIN, hessian(PLAIN))
    assert ours < 0.7 * nearest


def check_gptq(w, h, q: jq.QTensor, quantizer: jq.gptq):
    """Algorithm 1 of arXiv:2210.17323 with act-order, on the grid of `q`, or with a grid anew at each group.

    Where the quotient is a tie to float32 both codes are right, and the one that was taken is followed.
    """
    format, size = quantizer.format, q.shape[0] // q.scale.shape[0]
    scale, zero = (spread(0 * q.scale if part is None else part, (size, 1)) for part in (q.scale, q.zero))
    order = np.argsort(-np.diag(h), kind="stable") if quantizer.by_activity else np.arange(len(w))
    damped = h + quantizer.damping * np.mean(np.diag(h)) * np.eye(len(w))
    upper = np.linalg.cholesky(np.linalg.inv(damped[order][:, order])).T
    w, codes, ties = exact(w)[order], exact(q.codes)[order], 0
    for k, row in enumerate(order):
        if quantizer.refresh and k % size == 0:
            expected = oracle_scale(w[k : k + size], format(group=None))[0]
            np.testing.assert_allclose(q.scale[k // size], expected, rtol=1e-3)
        ratio = w[k] / scale[row]
        tie = np.abs(ratio - np.floor(ratio) - 0.5) < 2e-3
        nearest = np.clip(np.rint(ratio) + zero[row], *limits(format))
        assert np.array_equal(codes[k][~tie], nearest[~tie]), k
        w[k + 1 :] -= np.outer(upper[k, k + 1 :], w[k] - (codes[k] - zero[row]) * scale[row]) / upper[k, k]
        ties += np.sum(tie)
    assert ties < 0.01 * w.size


GPTQ = [(name, format) for name, format in TABLE if name.startswith("gptq") and not format.startswith("nf4")]


@pytest.mark.parametrize("name, format", GPTQ)
@pytest.mark.parametrize("i", [PLAIN, TAILS])
def test_gptq_is_the_published_algorithm(name, format, i):
    """Law: the codes of the recursion in NumPy float64, in either order, with a zero point or without."""
    check_gptq(data()[1][i], hessian(i), results(name, format)[i], make(name, format))


def test_gptq_in_several_blocks_is_the_published_algorithm():
    """Law: the same where rows hear of the errors of others a block at a time: 192 rows in blocks of 96."""
    x, w = problem(5, tokens=384, width=192, outputs=3)
    quantizer = jq.gptq(jq.int4, jq.absmax)
    check_gptq(w, exact(x).T @ exact(x) / 384, jax.jit(quantizer)(w, observe(jnp.asarray(x))), quantizer)


@every
def test_powers_of_two_change_no_code(name, format):
    """Law: for 2^5 w and x / 2^3 the codes are those of w and x, and the scales are 2^5 times those."""
    plain, scaled = (results(name, format)[i] for i in (PLAIN, SCALED))
    # The powers that AWQ and SmoothQuant take of statistics are not exact.
    bound = 1e-5 if any(isinstance(step, inputs.Rescale) for step in plain.transform) else 0
    assert same_codes(scaled, dataclasses.replace(plain, scale=32 * plain.scale), bound)


def test_smoothquant_splits_the_spread_and_divides_what_it_multiplies():
    """Law: max|x_k / s_k| is max|s_k w_k| but for one factor (alpha = 1/2); decode(q) is w to half a step of s w."""
    q, (xs, ws, _) = results("smoothquant", "int8"), data()
    factor = exact(q.transform[0].factor)
    for i in (PLAIN, TAILS):
        ratio = np.abs(xs[i] * factor[i].T).max(0) / np.abs(ws[i] / factor[i]).max(1)
        np.testing.assert_allclose(ratio, ratio[0], rtol=1e-5)
    assert np.all(np.abs(exact(ws) - decoded(q)) <= exact(q.scale) * factor * (0.5 + 256 * EPS))


@pytest.mark.parametrize("format", ["int4-group", "int3-affine"])
def test_hqq_lowers_the_norm_it_is_about(format):
    """Law: |w - decode(q)|_p^p, p = 0.7, is below that of nearest rounding, for weights with heavy tails too."""
    ws, apart = data()[1], dataclasses.replace(data()[2], gram=jnp.stack([jnp.eye(K, dtype=jnp.float32)] * 5))
    found, nearest = mapped("hqq", format)(ws, apart), jq.quantize(ws, FORMATS[format])
    ours, plain = (np.sum(np.abs(exact(ws) - decoded(q)) ** 0.7, axis=(1, 2)) for q in (found, nearest))
    assert np.all(ours < plain)


def signs(tokens: int = TOKENS, width: int = K) -> np.ndarray:
    return np.random.default_rng(6).choice(np.array([-1, 1], np.float32), (tokens, width))


WRAPPERS = {"awq": (AWQ, signs()), "one step": (lambda f: jq.awq(f, 1), None), "smoothquant": (jq.smoothquant, signs())}


@pytest.mark.parametrize("wrapper, x", **table(WRAPPERS))
def test_factors_of_one_change_nothing(wrapper, x):
    """Law: where all inputs (and, for SmoothQuant, rows of w) are of one size, or one power is tried, it is the 0th."""
    w, inner = data()[1][0].copy(), jq.rtn(jq.int4(group=16))
    w[:, 0] = 8
    stats = observe(jnp.asarray(data()[0][0] if x is None else x))
    q, expected = jax.jit(lambda w, stats: (wrapper(inner)(w, stats), inner(w, stats)))(w, stats)
    np.testing.assert_allclose(q.transform[0].factor, 1, rtol=2 * EPS)
    assert same_codes(q, expected, 4 * EPS)


@pytest.mark.parametrize("width, format", [(1, "int8"), (45, "int3-affine")])
def test_a_matrix_of_odd_width_is_not_rotated(width, format):
    """Law: `rotated` leaves odd widths as they are: the numbers are those of the inner quantizer."""
    w, inner = problem(7, width=width)[1], jq.rtn(FORMATS[format])
    both = jax.jit(lambda w: (jq.rotated(inner)(w, None), inner(w, None)))(w)
    assert np.array_equal(*map(decoded, both))


def attention(number, head, out):
    """The kernels that take inputs to heads, and heads to outputs: `[heads, head, out]`."""
    shapes = {"query": (out, number, head), "out": (number, head, out)}
    draw = np.random.default_rng(0)
    return {name: {"kernel": jnp.asarray(draw.normal(size=shape), jnp.float32)} for name, shape in shapes.items()}


def test_a_limited_block_rotates_inputs_that_are_heads():
    """Law: blocks of 8 rotate [2, 24, out] as they rotate [48, out]; blocks of 16 cut a head, which is an error."""
    params, inner = attention(2, 24, 16), jq.rtn(jq.int4(group=8))
    for quantizer in (jq.rotated(inner), jq.rotated(inner, block=16)):
        with pytest.raises(ShapeError, match=r"^out/kernel: int4 g8 rotated: its blocks of 16 inputs.*24.*`block`"):
            jq.quantize_params(params, quantizer)
    q = jq.quantize_params(params, jq.rotated(inner, block=8))["out"]["kernel"]
    w = params["out"]["kernel"]
    flat = jax.jit(jq.rotated(inner, block=8))(w.reshape(48, 16), None)
    assert q.blocks == (1, 8, 1) and flat.blocks == (8, 1)
    np.testing.assert_allclose(jq.dequantize(q).reshape(48, 16), jq.dequantize(flat), rtol=1e-5, atol=1e-6)
    x, fn = jnp.asarray(problem(1, 3)[0]), lambda w, x: heads(w, x, 2)
    served = jq.quantized(fn, activations=None)(q, x)
    rounding = 8 * K * EPS * np.max(np.abs(x) @ np.abs(w.reshape(48, 16)))  # a rotated number is up to 4 times as large
    np.testing.assert_allclose(served, fn(jq.dequantize(q), x), rtol=0, atol=rounding)


def test_kept_inputs_of_heads_need_a_block_that_divides_them():
    stats = {"out/kernel": dataclasses.replace(observe(jnp.ones((4, 48))), inputs=(0, 1))}
    where = lambda path, _: path == "out/kernel"  # noqa: E731
    with pytest.raises(ShapeError, match=r"^out/kernel: int8 per-channel outliers: its blocks of 16 inputs"):
        jq.quantize_params(attention(2, 24, 16), jq.outliers(jq.int8, block=16), stats=stats, where=where)


@pytest.mark.parametrize("block", [0, 1, 3, 12, True])
def test_a_block_is_a_power_of_two(block):
    with pytest.raises(OptionError, match=rf"rotated\(block={block}\)"):
        jq.rotated(jq.int8, block=block)


@pytest.mark.parametrize("block", [2, 8, 64, 1024])
def test_a_block_limits_what_is_mixed(block):
    """Law: blocks are the shorter of the limit and what divides the inputs, and no limit is that of any length."""
    w = problem(7, width=96)[1]
    q = jax.jit(jq.rotated(jq.rtn(jq.int8), block=block))(w, None)
    assert q.blocks == (min(block, 32), 1)
    if block >= 32:
        assert np.array_equal(decoded(q), decoded(jax.jit(jq.rotated(jq.rtn(jq.int8)))(w, None)))


@pytest.mark.parametrize(
    "name, format", [("hqq", "int3-affine"), ("gptq absmax", "int4-group"), ("awq", "int3-affine")]
)
def test_a_stack_is_quantized_matrix_by_matrix(name, format):
    """Law: vmap over a stack is a loop over it."""
    (_, ws, stats), q, one = data(), results(name, format), jax.jit(make(name, format))
    assert all(same_codes(one(ws[i], at(stats, i)), q[i], 1e-5) for i in range(5))


@pytest.mark.parametrize("name, format", [("rtn", "int3-affine"), ("hqq", "int4-group"), ("outliers", "nf4-group")])
def test_jit_is_eager(name, format):
    """Law: the codes do not depend on what is compiled together."""
    _, ws, stats = data()
    assert same_codes(make(name, format)(jnp.asarray(ws[0]), at(stats, 0)), results(name, format)[0], 1e-5)


@pytest.mark.parametrize("wrong", ["int4", jnp.int4, jq.gptq(jq.int4)], ids=["text", "dtype", "quantizer"])
def test_what_is_no_format_is_refused_where_it_is_given(wrong):
    """Law: what an algorithm calls first names what it was given. (Type checks are faster in the tests themselves.)"""
    with pytest.raises(OptionError, match=r"gptq\(.*\): give it the format of the codes, such as jq.int4"):
        check_format("gptq", wrong)


def test_a_stack_in_a_tree_is_quantized_as_its_matrices_are():
    """Law: `quantize_params` maps a quantizer over stacks, with the statistics of each; transforms are stacked too."""
    (_, ws, stats), quantizer = data(), make("rotated(outliers)", "int4-group")
    stacked = dataclasses.replace(stats, stack=(0,), inputs=(1,))
    q = jq.quantize_params({"w": ws}, quantizer, stats={"w": stacked})["w"]
    each = {f"layer{i}": at(stats, i) for i in range(5)}
    alone = jq.quantize_params(dict(zip(each, ws, strict=True)), quantizer, stats=each)
    for found, expected in zip(q, alone.values(), strict=True):
        assert jax.tree.structure(found) == jax.tree.structure(expected) and same_codes(found, expected, 1e-5)
        np.testing.assert_allclose(decoded(found), decoded(expected), rtol=1e-5, atol=1e-5)


@every
def test_a_quantizer_is_a_value(name, format):
    """Law: hashable, equal to its copy and to none other, of the format of its codes, and named by its repr."""
    one, two = make(name, format), make(name, format)
    assert one == two and hash(one) == hash(two) and isinstance(one, jq.Quantizer) and one.format == FORMATS[format]
    assert len({make(*row) for row in TABLE}) == len(TABLE)
    words = re.findall(r"\w+", name.replace("least_squares", "rtn").split(" ")[0])
    found = [repr(one).find(f"{word}(") for word in words]
    assert found == sorted(found) and -1 not in found
    # A wrapper's transform comes before those of what it wraps.
    steps = {"rotated": inputs.Rotation, "awq": inputs.Rescale, "smoothquant": inputs.Rescale}
    assert [type(step) for step in results(name, format).transform] == [steps[word] for word in words if word in steps]


# Meaning.

# name: f(w, x), and what it is in terms of p = (x -> x @ w).
FOLLOWED = {
    "matmul": (lambda w, x: x @ w, lambda p, x: p(x)),
    "transposed": (lambda w, x: (w.T @ x.T).T, lambda p, x: p(x)),
    "columns": (lambda w, x: x @ w[:, 3:9], lambda p, x: p(x)[:, 3:9]),
    "rows": (lambda w, x: x[:, 16:] @ w[16:], lambda p, x: p(np.where(np.arange(K) < 16, 0, x))),
    "heads of outputs": (lambda w, x: heads(w.reshape(K, 3, 4), x, 1), lambda p, x: p(x).reshape(-1, 3, 4)),
    "heads of inputs": (lambda w, x: heads(w.reshape(3, 16, N), x, 2), lambda p, x: p(x)),
    "heads in a block": (lambda w, x: heads(w.reshape(6, 8, N), x, 2), lambda p, x: p(x)),
    "einsum": (lambda w, x: jnp.einsum("thd,hdn->tn", x.reshape(-1, 3, 16), w.reshape(3, 16, N)), lambda p, x: p(x)),
}
# What may cut through groups and blocks, and is decoded then; or is never a matmul.
DECODED = {
    "crooked rows": (lambda w, x: x[:, 8:24] @ w[8:24], lambda w, x: x[:, 8:24] @ w[8:24]),
    "crooked heads": (lambda w, x: heads(w.reshape(2, 24, N), x, 2), lambda w, x: x @ w),
    "of outputs": (lambda w, x: x[:, :N] @ w.T, lambda w, x: x[:, :N] @ w.T),
    "look-up": (lambda w, x: w[jnp.arange(9) * 5], lambda w, x: w[::5][:9]),
    "look-up of columns": (lambda w, x: w.T[jnp.arange(5) * 2], lambda w, x: w.T[:9:2]),
    "gradient": (lambda w, x: jax.grad(lambda x: jnp.sum((x @ w) ** 2) / 1024)(x), lambda w, x: x @ w @ w.T / 512),
}
# f(stack, x), and which of its matrices meet x.
STACKED = {
    "scan": (lambda ws, x: jax.lax.scan(lambda carry, w: (carry, x @ w), 0, ws)[1], range(5)),
    "vmap": (lambda ws, x: jax.vmap(jnp.matmul)(jnp.stack([x] * 5), ws), range(5)),
    "index": (lambda ws, x: (x @ ws[3])[None], [3]),
    "dynamic index": (lambda ws, x: (x @ jax.lax.dynamic_index_in_dim(ws, x.shape[0] - 3, 0, False))[None], [2]),
    "gather": (lambda ws, x: jnp.stack([x] * 2) @ ws[jnp.asarray([4, 1])], [4, 1]),
}


def heads(w: jax.Array, x: jax.Array, axes: int) -> jax.Array:
    """Inputs of the shape of the first axes of `w` times `w`, as an attention's projections are written."""
    return jnp.tensordot(x.reshape(-1, *w.shape[:axes]), w, axes)


def spoken(q: jq.QTensor, activations: jq.Format | None):
    """`x -> x @ q` in float64, with the decoded weight or what int8 codes say of T(x), and a bound for float32."""
    turn = exact(inputs.adjoint(q.transform, jnp.eye(K, dtype=jnp.float32)))
    core = exact(jq.dequantize(q.core))
    mask = np.zeros((K, 1), bool) if q.kept is None else np.asarray(q.kept.mask)
    kept = np.zeros_like(core) if q.kept is None else spread(q.kept.rows, (16, 1))

    def product(x):
        turned = exact(x) @ turn
        rest = np.where(mask.T, 0, turned)
        if activations is not None:
            step = np.abs(rest).max(1, keepdims=True) / 127
            rest = np.rint(rest / step) * step
        return rest @ core + np.where(mask.T, turned, 0) @ np.where(mask, kept, 0)

    size = np.abs(exact(data()[0][PLAIN][:5])) @ np.abs(turn)
    weights = np.abs(core) + np.where(mask, np.abs(kept), 0)
    return product, 2 * K * EPS * np.max(size @ weights) + 2 * EPS * np.max(size) * np.max(np.sum(weights, 0))


@functools.partial(jax.jit, static_argnums=0)
def seen(activations, q, qs, x):
    """Every view of a matrix and of a stack at once."""
    views = FOLLOWED if activations else FOLLOWED | DECODED
    of_one = lambda w, x: {view: fn(w, x) for view, (fn, _) in views.items()}  # noqa: E731
    of_stack = lambda ws, x: {view: fn(ws, x) for view, (fn, _) in STACKED.items()}  # noqa: E731
    return [jq.quantized(fn, activations=activations)(w, x) for fn, w in ((of_one, q), (of_stack, qs))]


MEANING = [
    ("awq", "int3-affine", jq.int8),
    ("rotated", "nf4-group", None),
    ("outliers", "int4-group-affine", jq.int8),
    ("rotated(awq(gptq))", "int4-group-affine", jq.int8),
    ("rotated(outliers)", "int4-group", None),
    ("rotated(outliers)", "int4-group", jq.int8),
]


@pytest.mark.parametrize("name, format, activations", MEANING, ids=[f"{n}-{f}-{a or 'float'}" for n, f, a in MEANING])
def test_a_transformed_weight_means_its_decoded_one(name, format, activations):
    """Law: x @ q is x @ dequantize(q) to float tolerance, or with int8 activations what their codes say of T(x)."""
    qs, x = results(name, format), data()[0][PLAIN][:5]
    q, w = qs[PLAIN], decoded(qs[PLAIN])
    product, bound = spoken(q, None)
    assert np.all(np.abs(product(x) - exact(x) @ w) <= bound)
    product, bound = spoken(q, activations)
    of_one, of_stack = seen(activations, q, qs, jnp.asarray(x))
    wrong = []
    for view, out in of_one.items():
        expected = FOLLOWED[view][1](product, x) if view in FOLLOWED else DECODED[view][1](w, exact(x))
        wrong += [view] if np.max(np.abs(exact(out) - expected)) > bound else []
    for view, out in of_stack.items():
        for found, i in zip(out, STACKED[view][1], strict=True):
            product, bound = spoken(qs[i], activations)
            wrong += [(view, i)] if np.max(np.abs(exact(found) - product(x))) > bound else []
    assert wrong == []


@pytest.mark.parametrize("steps", ["rescaled", "rotated", "rotated rescaled kept"])
@pytest.mark.parametrize("rows", [5, 20])
@pytest.mark.parametrize("activations", [None, jq.int8], ids=["float", "int8"])
def test_powers_of_two_make_transforms_exact(steps, rows, activations):
    """Law: with scales, factors and Hadamard blocks of 16 = 4^2 nothing is rounded: equal to float64, bit for bit."""
    rng = np.random.default_rng(8)
    power = lambda *shape: jnp.asarray(2.0 ** rng.integers(-2, 3, shape), jnp.float32)  # noqa: E731
    turn = inputs.Rotation(jnp.asarray(signs(1).T, jnp.int8), jnp.zeros((3, 1), bool))
    known = {"rescaled": inputs.Rescale(power(K, 1)), "rotated": turn}
    transform = tuple(known[step] for step in steps.split() if step in known)
    mask, values = jnp.arange(K)[:, None] % 16 == 5, jnp.asarray(rng.integers(-9, 9, (3, N)), jnp.float32)
    codes = jnp.asarray(rng.integers(-7, 8, (K, N)), jnp.int4)
    kept = Kept(mask, values) if "kept" in steps else None
    q = jq.QTensor(codes, power(1, N), None, jnp.dtype("float32"), 4, None, transform, kept)
    # Inputs whose transform is whole numbers up to 127.
    said = rng.integers(-126, 127, (rows, K)).astype(np.float32)
    said[:, 0] = 127
    inverse = np.linalg.inv(exact(inputs.adjoint(transform, jnp.eye(K, dtype=jnp.float32))))
    x = said @ inverse
    assert np.array_equal(x, x.astype(np.float32))
    out = jax.jit(jq.quantized(lambda w, x: x @ w, activations=activations))(q, jnp.asarray(x, jnp.float32))
    assert np.array_equal(exact(out), x @ decoded(q))


# The inputs' transforms.


@pytest.mark.parametrize("length", [1, 2, 8, 32, 64, 128, 512, 1024])
def test_hadamard_is_orthogonal_symmetric_and_its_own_inverse(length):
    """Law: H_2n = [[H, H], [H, -H]] / sqrt 2, so H = H^T and H H = 1, along any axis, block by block."""
    h = functools.reduce(np.kron, [np.array([[1.0, 1], [1, -1]])] * (length.bit_length() - 1), np.eye(1))
    h, axis = h / np.sqrt(length), length % 3
    assert np.array_equal(h, h.T) and np.allclose(h @ h, np.eye(length))
    x = np.random.default_rng(9).standard_normal((2, length, 2 * length)).astype(np.float32)[:, :3]
    expected = (exact(x).reshape(-1, length) @ h).reshape(x.shape)
    found = inputs.hadamard(jnp.moveaxis(jnp.asarray(x), 2, axis), axis, length)
    np.testing.assert_allclose(np.moveaxis(found, axis, 2), expected, atol=64 * EPS)


@pytest.mark.parametrize("n, length", [(1, 1), (7, 1), (48, 16), (576, 64), (1024, 1024), (1536, 512)])
def test_blocks_are_the_largest_power_of_two_that_divides(n, length):
    """Law: n = odd * length."""
    assert inputs.block_length(n) == length and n // length % 2 == 1


@pytest.mark.parametrize("split", [(3, 16), (6, 8), (48, 1), (3, 4, 4)])
def test_a_rotation_reshaped_is_the_rotation_of_the_flat_axis(split):
    """Law: H_ab = H_a (x) H_b: the shapes of the parts are all that a reshaped rotation has to know."""
    w, flat = problem(10)[1], inputs.Rotation(jnp.asarray(signs(1).T, jnp.int8), jnp.zeros((3, 1), bool))
    seams = jnp.zeros((3, *(1,) * len(split)), bool)
    turned = inputs.Rotation(flat.signs.reshape(*split, 1), seams).adjoint(jnp.asarray(w).reshape(*split, N))
    np.testing.assert_allclose(turned.reshape(K, N), flat.adjoint(jnp.asarray(w)), atol=16 * EPS)


# Statistics.


def whole(seed: int, tokens: int = 7) -> jax.Array:
    """Whole numbers, of which float32 sums are exact."""
    return jnp.asarray(np.random.default_rng(seed).integers(-9, 10, (tokens, K)), jnp.float32)


def equal(a: Stats, b: Stats) -> bool:
    return jax.tree.structure(a) == jax.tree.structure(b) and jax.tree.all(jax.tree.map(np.array_equal, a, b))


@pytest.mark.parametrize("gram", [True, False])
def test_statistics_are_a_commutative_monoid(gram):
    """Law: observe(concat) == merge(observe, observe), in any order and grouping, and zeros are the unit."""
    look = jax.jit(functools.partial(observe, gram=gram))
    x, y, z = whole(0), whole(1), whole(2)
    a, b, c = look(x), look(y), look(z)
    assert equal(look(jnp.concatenate([x, y])), a.merge(b)) and equal(a.merge(b), b.merge(a))
    assert equal(a.merge(b).merge(c), a.merge(b.merge(c)))
    assert equal(a.merge(jax.tree.map(jnp.zeros_like, a)), a)
    stack = jax.jit(functools.partial(observe, gram=gram))(jnp.stack([x, y, z]))
    assert equal(stack.over_stack(), a.merge(b).merge(c))


def test_rescaled_statistics_are_those_of_rescaled_inputs():
    """Law: rescale(observe(x), s) == observe(x / s), exactly for powers of two, but for the distribution."""
    s = jnp.asarray(2.0 ** np.random.default_rng(11).integers(-3, 4, K), jnp.float32)
    expected = observe(whole(4) / s[None])
    found = rescale(observe(whole(4)), s)
    assert equal(found, dataclasses.replace(expected, above=jnp.zeros_like(expected.above)))


@pytest.mark.parametrize("i", range(5))
def test_the_output_error_is_that_of_the_output(i):
    """Law: output_error(D) is the mean of |x D|^2 over the tokens, and |D|^2 where there is no Gram matrix."""
    xs, ws, stats = data()
    one = at(stats, i)
    expected = np.mean(np.sum((exact(xs[i]) @ exact(ws[i])) ** 2, axis=1))
    np.testing.assert_allclose(output_error(jnp.asarray(ws[i]), one), expected, rtol=TOKENS * EPS)
    for blind in (None, dataclasses.replace(one, gram=None)):
        np.testing.assert_allclose(output_error(jnp.asarray(ws[i]), blind), np.sum(exact(ws[i]) ** 2), rtol=1e-5)


@pytest.mark.parametrize("size", [-40, -8, 0, 8, 40])
def test_a_quantile_is_at_most_a_quarter_of_an_octave_too_large(size):
    """Law: v <= quantile < 2^(1/4) v, v that of NumPy, for sizes from 2^-16 to 2^16; beyond, v <= quantile <= max."""
    x = data()[0][PLAIN] * np.float32(2.0**size)
    stats = observe(jnp.asarray(x))
    for share in (0.25, 0.5, 0.75, 0.96875, 1.0):
        found, v = float(quantile(stats, share)), np.quantile(np.abs(x), share, method="inverted_cdf")
        assert v <= found <= np.abs(x).max(), share
        assert abs(size) > 8 or found <= v * 2**0.25 * (1 + EPS), share
