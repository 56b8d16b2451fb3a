"""What statistics and options a quantizer cannot use get: a defined result, or an error by name before any work.

Each test is a row of the contract ("Algorithms" in what bad input gets). A result is defined when it is finite and no
worse than nearest rounding; where the statistics say nothing at all, it is nearest rounding, code for code.
"""

import dataclasses
import functools
import hashlib
import math
import os

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from processes import QUICK, found, started
from tables import as_shipped, same, table

import jaxquant as jq
from jaxquant.errors import OptionError, ShapeError, StatsError
from jaxquant.stats import Stats, observe

TOKENS, K, N = 64, 32, 6
FORMAT = jq.int4(group=16)

ROUNDED = jq.rtn(FORMAT)
KEPT = functools.partial(jq.outliers, block=16)
PLAIN = {
    "least_squares": jq.rtn(FORMAT, jq.least_squares),
    "hqq": jq.hqq(FORMAT),
    "gptq": jq.gptq(FORMAT),
    "awq": jq.awq(ROUNDED, steps=4),
    "smoothquant": jq.smoothquant(ROUNDED),
    "rotated": jq.rotated(ROUNDED),
    "outliers": KEPT(ROUNDED),
    "outliers(gptq)": KEPT(jq.gptq(FORMAT, jq.absmax)),
    "rotated(awq(gptq))": jq.rotated(jq.awq(jq.gptq(FORMAT, jq.absmax), steps=2)),
}
# All that compare errors of the output; SmoothQuant's objective is the activations'.
COMPARING = {name: quantizer for name, quantizer in PLAIN.items() if name != "smoothquant"}
RESCALING = {"smoothquant": jq.smoothquant(jq.rtn(jq.int8)), "awq": jq.awq(jq.rtn(jq.int8), steps=4)}


@pytest.fixture(scope="module", autouse=True)
def quick_compilation():
    """It is not the compiled program that matters here, and compiling takes nearly all of the time."""
    jax.config.update("jax_disable_most_optimizations", True)
    yield
    jax.config.update("jax_disable_most_optimizations", False)


def problem(tokens: int = TOKENS) -> tuple[np.ndarray, np.ndarray]:
    rng = np.random.default_rng(0)
    x = rng.standard_normal((tokens, K)) @ (rng.standard_normal((K, K)) / 4 + np.eye(K))
    return x.astype(np.float32), rng.standard_normal((K, N)).astype(np.float32)


X, W = problem()


def stats_of(x: np.ndarray) -> Stats:
    return observe(jnp.asarray(x, jnp.float32))


def with_gram(gram: np.ndarray) -> Stats:
    """Statistics of some inputs with another Gram matrix."""
    return dataclasses.replace(stats_of(X), gram=jnp.asarray(gram, jnp.float32))


@functools.cache
def compiled(quantizer: jq.Quantizer):
    return jax.jit(lambda w, stats: quantizer(w, stats))


def exact(array) -> np.ndarray:
    return np.asarray(array).astype(np.float64)


def decoded(q: jq.QTensor) -> np.ndarray:
    return exact(jq.dequantize(q))


def is_nearest(q: jq.QTensor) -> bool:
    """Whether codes and scales are those of nearest rounding, and neither a transform nor a kept row does a thing."""
    nearest = jq.quantize(W, FORMAT)
    return same(q.core, nearest) and np.array_equal(decoded(q), decoded(nearest))


def output_error(q: jq.QTensor, x: np.ndarray) -> float:
    return np.sum((exact(x) @ (exact(W) - decoded(q))) ** 2)


def mirrored() -> np.ndarray:
    """Symmetric, with ones on its diagonal and large numbers beside it; the zero matrix looks best to it."""
    noise = np.random.default_rng(1).standard_normal((K, K)) * 1e4
    gram = np.triu(noise, 1) + np.triu(noise, 1).T
    return np.eye(K) - gram * np.sign(np.sum(exact(W) * (gram @ W)))


def one_huge() -> np.ndarray:
    x = X.copy()
    x[:, 5] *= np.float32(1e25)
    return x


# What no quantizer can compare errors by, and what GPTQ alone cannot use.
USELESS = {
    "NaN": with_gram(np.full((K, K), np.nan)),
    "one NaN": with_gram(np.where(np.arange(K * K).reshape(K, K) == 40, np.nan, X.T @ X)),
    "infinite": with_gram(np.full((K, K), np.inf)),
    "overflown": stats_of(one_huge()),
}
UNFACTORED = {"indefinite": with_gram(mirrored()), "negative": with_gram(-X.T @ X)}
NOTHING_SEEN = jax.tree.map(jnp.zeros_like, stats_of(X))


@pytest.mark.parametrize("quantizer", **table(COMPARING))
@pytest.mark.parametrize("stats", **table(USELESS))
def test_a_useless_gram_matrix_leaves_nearest_rounding(stats, quantizer):
    """Row: an error of the output that is not a number: nearest rounding is kept, whatever wraps it."""
    assert is_nearest(compiled(quantizer)(W, stats))


@pytest.mark.parametrize("stats", **table(UNFACTORED))
def test_a_gram_matrix_that_cannot_be_factored_leaves_nearest_rounding(stats):
    """Row: Cholesky NaN (JAX does not raise), also after damping: nearest rounding for that weight."""
    assert is_nearest(compiled(PLAIN["gptq"])(W, stats))


def test_the_report_says_where_nearest_rounding_is_kept():
    """Row: nearest rounding for that weight, reported by path."""
    params, by_path = {"block": {"up": jnp.asarray(W)}}, {"block/up": USELESS["NaN"]}
    q = jq.quantize_params(params, PLAIN["gptq"], stats=by_path)
    (row,) = jq.report(lambda params, x: x @ params["block"]["up"], params, q, by_path).rows
    assert row.path == "block/up" and "nearest rounding is kept" in row.notes


@pytest.mark.parametrize("name", PLAIN)
def test_statistics_of_no_token_are_as_no_statistics(name):
    """Row: nothing was seen (calibration on shapes alone): what needs no data is as it is without statistics."""
    q = compiled(PLAIN[name])(W, NOTHING_SEEN)
    if name in ("least_squares", "hqq", "rotated", "gptq"):
        expected = compiled(PLAIN["least_squares" if name == "gptq" else name])(W, None)
        assert same(q.core, expected.core) and np.array_equal(decoded(q), decoded(expected))
    ours, nearest = (np.sum((exact(W) - decoded(one)) ** 2) for one in (q, jq.quantize(W, FORMAT)))
    assert ours <= nearest * (1 + 1e-6) or (name == "smoothquant" and np.isfinite(ours))


@pytest.mark.parametrize("by_activity", [True, False])
def test_gptq_keeps_the_nearest_codes_of_dead_inputs(by_activity):
    """Row: an input that was never active (H_ii = 0): its codes are the nearest, and nobody makes up for them."""
    dead, x = np.arange(K) % 5 == 2, X.copy()
    x[:, dead] = 0
    q, nearest = compiled(jq.gptq(FORMAT, jq.absmax, by_activity=by_activity))(W, stats_of(x)), jq.quantize(W, FORMAT)
    assert np.array_equal(exact(q.codes)[dead], exact(nearest.codes)[dead])
    assert not np.array_equal(exact(q.codes), exact(nearest.codes))
    assert output_error(q, x) < output_error(nearest, x)
    turned = compiled(jq.gptq(FORMAT, jq.absmax, by_activity=by_activity))(np.where(dead[:, None], -W, W), stats_of(x))
    assert np.array_equal(exact(turned.codes)[~dead], exact(q.codes)[~dead])


@pytest.mark.parametrize("tokens", [1, 3])
@pytest.mark.parametrize("damping", [1e-2, 1e-38])
def test_fewer_tokens_than_inputs_are_enough(tokens, damping):
    """Row: a rank-deficient Gram matrix, also with next to no damping: escalated, finite, and no worse than nearest."""
    x, _ = problem(tokens)
    q, nearest = compiled(jq.gptq(FORMAT, damping=damping))(W, stats_of(x)), jq.quantize(W, FORMAT)
    assert np.all(np.isfinite(decoded(q))) and np.all(np.abs(exact(q.codes)) <= 7)
    ours, plain = output_error(q, x), output_error(nearest, x)
    # A float32 sum of K terms, squared, is what the two are compared by.
    assert ours <= plain * (1 + 1e-5) and (damping < 1e-2 or ours < plain)


def spoilt(**columns: float) -> np.ndarray:
    """The inputs with some columns multiplied."""
    x = X.copy()
    for column, factor in columns.items():
        x[:, int(column[1:])] *= np.float32(factor)
    return x


CHANNELS = {
    "zero": spoilt(_3=0, _17=0),
    "huge": spoilt(_3=1e12),
    "huge and zero": spoilt(_3=1e15, _17=0),
    "tiny": spoilt(_3=1e-15, _17=1e-35),
    "all zero": 0 * X,
    "all but one zero": spoilt(**{f"_{i}": 0 for i in range(1, K)}),
    "all huge": X * np.float32(1e18),
    "all tiny": X * np.float32(1e-30),
}


@pytest.mark.parametrize("quantizer", **table(RESCALING))
@pytest.mark.parametrize("x", **table(CHANNELS))
def test_factors_stay_within_bounds_and_the_product_is_preserved(x, quantizer):
    """Row: zero or huge channel statistics: 1e-4 <= s <= 1e4, and w is found again to half a step of s w."""
    q = compiled(quantizer)(W, stats_of(x))
    (step,) = q.transform
    assert np.all((step.factor > 0.99e-4) & (step.factor < 1.01e4))
    assert np.all(np.abs(exact(W) - decoded(q)) <= exact(q.scale) * exact(step.factor) * (0.5 + 2.0**-14))
    run = compiled(quantizer_product)
    wide = np.abs(X * step.factor.T).max() * np.abs(decoded(q.core)).sum(0).max()
    assert np.max(np.abs(run(q, X) - exact(X) @ decoded(q))) <= 2 * K * 2.0**-24 * wide


def quantizer_product(q: jq.QTensor, x: np.ndarray) -> jax.Array:
    return jq.quantized(lambda w, x: x @ w, activations=None)(q, x)


# Options.

OPTIONS = {
    **{f"smoothquant alpha={a}": (lambda a=a: jq.smoothquant(ROUNDED, alpha=a), a) for a in (-0.1, 1.5, math.nan)},
    **{f"gptq damping={d}": (lambda d=d: jq.gptq(FORMAT, damping=d), d) for d in (0, 0.0, -0.5, math.nan, math.inf)},
    "gptq refresh by activity": (lambda: jq.gptq(FORMAT, refresh=True), "by_activity=False"),
    "gptq refresh without groups": (lambda: jq.gptq(jq.int4, by_activity=False, refresh=True), "groups"),
    **{f"awq steps={n}": (lambda n=n: jq.awq(ROUNDED, steps=n), n) for n in (0, -3, 1.5, True)},
    **{f"outliers block={n}": (lambda n=n: jq.outliers(ROUNDED, block=n), n) for n in (1, 0, -8, 2.5)},
    **{f"hqq p={p}": (lambda p=p: jq.hqq(FORMAT, p=p), p) for p in (0, -1.0, 1.5, math.nan)},
    **{f"hqq rounds={n}": (lambda n=n: jq.hqq(FORMAT, rounds=n), n) for n in (0, -1, 2.5)},
    "hqq nf4": (lambda: jq.hqq(jq.nf4), "nf4"),
    "hqq fp8": (lambda: jq.hqq(jq.fp8), "float8_e4m3fn"),
}


@pytest.mark.parametrize("make, value", **table(OPTIONS))
def test_an_option_that_cannot_be_meant_is_refused_at_construction(make, value):
    """Row: alpha outside [0, 1], damping <= 0, and the like: an error at construction that names the value."""
    with as_shipped(), pytest.raises(OptionError) as error:
        make()
    assert str(value) in str(error.value)


@pytest.mark.parametrize("alpha", [0.0, 1.0])
def test_the_ends_of_a_range_belong_to_it(alpha):
    """Row: what lies in [0, 1] is fine, its ends included."""
    assert jq.smoothquant(ROUNDED, alpha=alpha).alpha == alpha and jq.hqq(FORMAT, p=1.0, rounds=1).p == 1


# A tree: errors name the path, and come before anything is lost.


def refusal(quantizer: jq.Quantizer, stats: Stats | None, error: type[Exception], w=W) -> str:
    """The message of the error that the second leaf of a tree gets, with all leaves alive after it."""
    params = {"block": {"down": jnp.asarray(W), "up": jnp.asarray(w)}}
    known = {"block/down": stats_of(X)} | ({} if stats is None else {"block/up": stats})
    with pytest.raises(error) as caught:
        jq.quantize_params(params, quantizer, stats=known, donate=True)
    assert not any(leaf.is_deleted() for leaf in jax.tree.leaves(params))
    assert "block/up" in str(caught.value)
    return str(caught.value)


NEEDS_STATS = ("smoothquant", "outliers", "gptq", "awq", "outliers(gptq)", "rotated(awq(gptq))")


@pytest.mark.parametrize("name", NEEDS_STATS)
def test_statistics_that_are_missing_are_missed_by_path(name):
    """Row: no statistics for one leaf: an error naming it and the way to get them."""
    assert "calibrate" in refusal(PLAIN[name], None, StatsError)


@pytest.mark.parametrize("name", NEEDS_STATS[2:])
def test_gram_matrices_that_are_missing_are_missed_by_path(name):
    """Row: statistics without the Gram matrix that is needed: an error naming the path and the option."""
    blind = dataclasses.replace(stats_of(X), gram=None)
    assert "gram=True" in refusal(PLAIN[name], blind, StatsError)


@pytest.mark.parametrize(
    "stats",
    **table(
        {
            "inputs": stats_of(X[:, :-8]),
            "outputs": dataclasses.replace(stats_of(X), inputs=(1,)),
            "rank": dataclasses.replace(stats_of(X), inputs=(2,)),
            "stack": dataclasses.replace(stats_of(np.stack([X[:, :N]] * K)), stack=(0,), inputs=(2,)),
            "gram": dataclasses.replace(stats_of(X), gram=jnp.eye(K - 8, dtype=jnp.float32)),
        }
    ),
)
@pytest.mark.parametrize("name", ["gptq", "smoothquant"])
def test_statistics_of_another_shape_are_refused_by_path(stats, name):
    """Row: statistics of other inputs, other axes, another rank, or of a stack: an error naming the path."""
    if name == "smoothquant" and stats.gram.shape[-1] == K - 8 and stats.absmax.shape == (K,):
        return  # it has no use for a Gram matrix
    refusal(PLAIN[name], stats, StatsError)


@pytest.mark.parametrize("name", [name for name in PLAIN if not name.startswith("outliers")])
def test_a_group_that_does_not_divide_is_refused_by_path(name):
    """Row: K % group != 0: an error naming the path and the groups that divide, whichever quantizer was asked."""
    message = refusal(PLAIN[name], stats_of(X[:, :24]), ShapeError, W[:24])
    assert "group=16" in message and "[8, 12]" in message


def test_a_block_that_does_not_divide_is_refused_by_path():
    """Row: the same for the blocks that `outliers` keeps one input of."""
    message = refusal(KEPT(jq.rtn(jq.int4)), stats_of(X[:, :24]), OptionError, W[:24])
    assert "block=16" in message and "24 inputs" in message


@pytest.mark.parametrize(
    "inner", [jq.rotated(ROUNDED), jq.awq(ROUNDED), KEPT(ROUNDED)], ids=["rotated", "awq", "twice"]
)
def test_outliers_go_inside_of_transforms(inner):
    """Row: a composition that has no meaning: an error naming the path and the one that has."""
    with pytest.raises(OptionError, match=r"^block/up: .*rotated\(outliers\(inner\)\)"):
        jq.quantize_params({"block": {"up": W}}, KEPT(inner), stats={"block/up": stats_of(X)})


@pytest.mark.parametrize("shape", [(32, 0), (0, 6), (0, 0)])
@pytest.mark.parametrize("name", ["least_squares", "gptq", "awq", "rotated", "outliers"])
def test_an_empty_matrix_goes_and_comes_back(name, shape):
    """Row: empty: it round-trips, as it does with a format."""
    stats = {"w": stats_of(np.zeros((4, shape[0])))}
    q = jq.quantize_params({"w": np.zeros(shape, np.float32)}, PLAIN[name], stats=stats)["w"]
    assert q.shape == shape and jq.dequantize(q).shape == shape


@pytest.mark.parametrize("name", ["outliers(gptq)", "rotated(awq(gptq))"])
def test_bfloat16_weights_are_quantized_as_the_numbers_they_are(name):
    """Row: bf16 parameters: codes and float32 scales of the same numbers in float32; decoded as they came."""
    w = W.astype(jnp.bfloat16)
    found, wide = (compiled(PLAIN[name])(one, stats_of(X)) for one in (w, w.astype(np.float32)))
    assert same(found.codes, wide.codes) and same(found.scale, wide.scale) and found.scale.dtype == jnp.float32
    assert jq.dequantize(found).dtype == jnp.bfloat16


# The same bytes.


def fingerprint() -> str:
    """A digest of every byte that quantizing a small tree gives."""
    jax.config.update("jax_disable_most_optimizations", True)
    quantizer = jq.rotated(jq.awq(jq.gptq(FORMAT), steps=2), seed=3)
    q = jq.quantize_params({"a": W, "b": W[::-1]}, quantizer, stats={"a": stats_of(X), "b": stats_of(X[:, ::-1])})
    leaves = jax.tree_util.tree_leaves_with_path(q)
    text = [(jax.tree_util.keystr(path), str(leaf.dtype), np.asarray(leaf).tobytes()) for path, leaf in leaves]
    return hashlib.sha256(repr(text).encode()).hexdigest()


def test_the_same_input_gives_the_same_bytes_in_another_process():
    """Row: same seed, same input: same bytes, across processes, whatever the hashes of strings are."""
    program = "import json, test_bad_statistics; print(json.dumps(test_bad_statistics.fingerprint()))"
    flags = os.environ.get("XLA_FLAGS", QUICK)  # bytes of this process are those of its compiler (conftest.py)
    assert found(started(program, PYTHONHASHSEED="7", XLA_FLAGS=flags)) == [fingerprint()]
