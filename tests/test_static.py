"""Fixed ranges for activations: found by the estimator's formula, used by the matmul, moved with the weight."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from models import MODELS, normal, weight
from tables import same

import jaxquant as jq
from jaxquant.errors import OptionError, StatsError
from jaxquant.stats import observe

K, N = 32, 8
PARAMS = {"w": weight(K, N)}
X = normal(64, K)


def fn(params, x):
    return x @ params["w"]


QPARAMS = jq.quantize_params(PARAMS)
STATS = jq.calibrate(fn, QPARAMS, [X], gram=False)


def test_the_matmul_uses_the_bound_for_every_token():
    """codes = clamp(round(x 127 / bound)), so a token of small numbers keeps few codes, and a large one saturates."""
    fixed = jq.static(QPARAMS, STATS)
    bound = float(jnp.max(jnp.abs(X)))
    x = X * jnp.linspace(0.01, 2, len(X))[:, None]
    step = bound / 127
    expected = jnp.clip(jnp.round(x / step), -127, 127) * step @ jq.dequantize(QPARAMS["w"])
    np.testing.assert_allclose(jq.quantized(fn)(fixed, x), expected, rtol=1e-4, atol=1e-5)


def test_fewer_bits_reach_as_far():
    fixed, bound = jq.static(QPARAMS, STATS), float(jnp.max(jnp.abs(X)))
    expected = jnp.clip(jnp.round(X * 7 / bound), -7, 7) * (bound / 7) @ jq.dequantize(QPARAMS["w"])
    np.testing.assert_allclose(jq.quantized(fn, activations=jq.int4)(fixed, X), expected, rtol=1e-4, atol=1e-5)


def test_without_quantized_activations_it_is_not_used():
    fixed = jq.static(QPARAMS, STATS)
    plain, run = QPARAMS, jq.quantized(fn, activations=None)
    assert jnp.array_equal(run(fixed, X), run(plain, X))


def test_percentile_is_within_a_quarter_of_an_octave_and_never_beyond_the_largest():
    for percent in (50, 90, 99, 100):
        exact = np.percentile(np.abs(X), percent)
        found = float(jq.percentile(percent)(observe(X)))
        assert exact * (1 - 1e-6) <= found <= exact * 2**0.25 * (1 + 1e-6) or found == np.abs(X).max()


def test_least_error_is_no_worse_than_any_other_threshold():
    """Against the squared error itself, within what a quarter of an octave blurs."""
    x = X.at[0, 5].set(40.0)
    for bits in (8, 4):
        top = 2 ** (bits - 1) - 1
        error = lambda bound, top=top: float(  # noqa: E731
            jnp.sum((jnp.clip(jnp.round(x * top / bound), -top, top) * bound / top - x) ** 2)
        )
        best = min(error(bound) for bound in np.geomspace(0.5, 40, 60))
        assert error(float(jq.least_error(bits)(observe(x)))) <= 1.2 * best


@pytest.mark.parametrize("name", ["plain_scan", "linen_transformer", "equinox_cnn", "plain_ragged_moe", "plain_moe"])
def test_it_follows_stacks_views_convolutions_and_experts(name):
    """One bound a matrix: the model's output stays as near as with a range per token, within a factor."""
    model = MODELS[name]()
    qparams = jq.quantize_params(model.params)
    stats = jq.calibrate(model.fn, qparams, [model.args], gram=False)
    fixed = jq.static(qparams, stats)
    first = lambda out: jax.tree.leaves(out)[0]  # noqa: E731
    exact = first(model.fn(jq.dequantize(qparams), *model.args))
    out = first(jq.quantized(model.fn)(fixed, *model.args))
    assert float(jnp.linalg.norm(out - exact) / jnp.linalg.norm(exact)) < 0.05
    bounds = [
        q.input_bound.size
        for q in jax.tree.leaves(fixed, is_leaf=lambda q: isinstance(q, jq.QTensor))
        if isinstance(q, jq.QTensor)
    ]
    assert bounds == [
        int(np.prod([1, *found.count.shape]))
        for found in (stats[path] for path in sorted(stats, key=list(stats).index))
    ] or sum(bounds) == sum(found.count.size for found in stats.values())


def test_statistics_have_to_be_those_behind_the_transform():
    before = jq.calibrate(fn, PARAMS, [X])
    smooth = jq.quantize_params(PARAMS, jq.smoothquant(jq.rtn(jq.int8)), stats=before)
    with pytest.raises(StatsError, match="w transforms its inputs"):
        jq.static(smooth, before)
    after = jq.calibrate(fn, smooth, [X], gram=False)
    factor = smooth["w"].transform[0].factor[:, 0]
    np.testing.assert_allclose(after["w"].absmax, before["w"].absmax * factor, rtol=1e-6)
    exact, out = fn(jq.dequantize(smooth), X), jq.quantized(fn)(jq.static(smooth, after), X)
    assert float(jnp.linalg.norm(out - exact) / jnp.linalg.norm(exact)) < 0.02


@pytest.mark.parametrize("bound", [jq.largest, jq.percentile(99)], ids=["largest", "percentile"])
def test_a_turned_weight_has_the_bound_of_the_upright_one(bound):
    """Law: `static` and `turned` commute, of matrices and of stacks of them, and serve the same numbers."""
    params = {"deep": weight(3, K, K), "last": weight(K, N)}

    def run(params, x):
        return jax.lax.scan(lambda x, w: (jnp.tanh(x @ w), None), x, params["deep"])[0] @ params["last"]

    qparams = jq.quantize_params(params)
    stats = jq.calibrate(run, qparams, [X], gram=False)
    before, after = jq.static(jq.turned(qparams), stats, bound), jq.turned(jq.static(qparams, stats, bound))
    assert isinstance(before["deep"], jq.Turned) and same(before, after)
    assert before["deep"].upright.input_bound.shape == (3, 1, 1)
    found, expected = (jq.quantized(run)(tree, X) for tree in (before, jq.static(qparams, stats, bound)))
    np.testing.assert_allclose(found, expected, rtol=1e-5, atol=1e-5)
    with pytest.raises(StatsError, match=r"^static: deep has no statistics"):
        jq.static(jq.turned(qparams), {"last": stats["last"]})


@pytest.mark.parametrize("turn", [lambda tree: tree, jq.turned], ids=["upright", "turned"])
def test_an_adapter_stays_beside_a_base_with_a_bound(turn):
    """Law: `static` and `join_lora` commute, and a fresh adapter changes no number."""
    params = PARAMS | {"float": weight(N, N)}
    run = lambda params, x: fn(params, x) @ params["float"]  # noqa: E731
    qparams = jq.quantize_params(params, where=lambda path, _: path == "w")
    adapters, base = jq.split_lora(jq.add_lora(qparams, 2, key=jax.random.key(0)))
    fixed = jq.static(jq.join_lora(adapters, turn(base)), STATS)
    assert same(fixed, jq.join_lora(adapters, turn(jq.static(qparams, STATS))))
    expected = jq.quantized(run)(jq.static(qparams, STATS), X)
    np.testing.assert_allclose(jq.quantized(run)(fixed, X), expected, rtol=1e-5, atol=1e-5)
    with pytest.raises(StatsError, match=r"^static: w has no statistics"):
        jq.static(fixed, {})


def test_bad_options_and_missing_statistics_are_errors():
    with pytest.raises(StatsError, match="w has no statistics"):
        jq.static(QPARAMS, {})
    for make in (lambda: jq.percentile(0), lambda: jq.percentile(101), lambda: jq.least_error(bits=9)):
        with pytest.raises(OptionError):
            make()
