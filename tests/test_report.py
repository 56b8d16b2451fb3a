"""`report`: bits, bytes, errors and fallbacks of every parameter, against the same numbers computed by hand."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from models import MODELS, normal, weight

import jaxquant as jq
from jaxquant.errors import NoMatchError

K, N = 64, 16
G16 = jq.int4(group=16, symmetric=False)


def fn(params, x):
    return jnp.tanh(x @ params["up"]) @ params["down"]


PARAMS = {"up": weight(K, N), "down": weight(N, K, seed=1), "bias": normal(N)}
X = normal(32, K) * jnp.where(jnp.arange(K) == 3, 30.0, 1.0)[None]
STATS = jq.calibrate(fn, PARAMS, [X])


def rows(qparams, stats=STATS, *args, **options):
    return {row.path: row for row in jq.report(fn, PARAMS, qparams, stats, *args, **options).rows}


def test_errors_are_those_of_the_weight_and_of_the_output():
    qparams = jq.quantize_params(PARAMS, jq.gptq(G16), stats=STATS)
    row = rows(qparams)["up"]
    w, d = PARAMS["up"], PARAMS["up"] - jq.dequantize(qparams["up"])
    nearest = PARAMS["up"] - jq.dequantize(jq.quantize(PARAMS["up"], G16))
    decibels = lambda signal, error: 10 * np.log10(np.sum(signal**2) / np.sum(error**2))  # noqa: E731
    assert row.sqnr == pytest.approx(decibels(w, d), rel=1e-4)
    assert row.output_sqnr == pytest.approx(decibels(X @ w, X @ d), rel=1e-3)
    assert row.of_nearest == pytest.approx(float(jnp.sum((X @ d) ** 2) / jnp.sum((X @ nearest) ** 2)), rel=1e-3)
    assert row.of_nearest < 1 and row.notes == ""


def test_bits_are_true_ones():
    row = rows(jq.quantize_params(PARAMS, G16))["up"]
    assert row.nbytes == K * N // 2 + (K // 16) * N * (4 + 0.5)
    assert row.bits == pytest.approx(8 * row.nbytes / (K * N))
    assert jq.report(fn, PARAMS, jq.quantize_params(PARAMS, G16)).nbytes == sum(
        r.nbytes for r in rows(jq.quantize_params(PARAMS, G16)).values()
    )


def test_nearest_rounding_is_told_where_an_algorithm_fell_back_on_it():
    broken = {path: jax.tree.map(lambda part: part, stats) for path, stats in STATS.items()}
    gram = jnp.full((K, K), jnp.nan)
    broken["up"] = jax.tree_util.tree_map(lambda part: gram if part.shape == (K, K) else part, broken["up"])
    qparams = jq.quantize_params(PARAMS, jq.gptq(G16), stats=broken)
    found = rows(qparams)
    assert found["up"].of_nearest == 1 and "nearest rounding is kept" in found["up"].notes
    assert found["down"].of_nearest < 1 and not found["down"].notes


def test_arithmetic_and_reasons_come_with_arguments():
    qparams = jq.quantize_params(PARAMS, jq.int8)
    assert rows(qparams)["up"].arithmetic == ""
    assert rows(qparams, STATS, X, activations=jq.int8)["up"].arithmetic == "int8 x int8 -> int32"
    assert rows(qparams, None, X)["up"].notes == "activations=None"


def test_it_prints_a_line_for_each_parameter_and_colours_what_fell_back():
    report = jq.report(fn, PARAMS, jq.quantize_params(PARAMS, jq.rotated(jq.gptq(G16)), stats=STATS), STATS)
    header, *lines = str(report).splitlines()
    assert header.split()[0] == "parameter" and [line.split()[0] for line in lines] == ["down", "up"]
    assert report.__rich__().count("[green]") + report.__rich__().count("[yellow]") == 2
    assert report.records[1]["path"] == "up"


@pytest.mark.parametrize("name", ["plain_scan", "equinox_cnn", "plain_ragged_moe"])
def test_every_kind_of_parameter_has_a_row(name):
    """Stacks, attention kernels of rank 3, convolutions, experts, weights on the left."""
    model = MODELS[name]()
    stats = jq.calibrate(model.fn, model.params, [model.args])
    qparams = jq.quantize_params(model.params, jq.int4(group=8), stats=stats)
    report = jq.report(model.fn, model.params, qparams, stats, *model.args)
    assert {row.path for row in report.rows} == set(stats)
    assert all(row.of_nearest <= 1 + 1e-6 and row.output_sqnr > 5 for row in report.rows)


@pytest.mark.parametrize("name", ["plain_scan", "plain_moe"])
def test_a_turned_weight_has_the_row_of_the_upright_one(name):
    """Law: shape, format, bytes, errors, arithmetic and notes do not tell how a weight is stored."""
    model = MODELS[name]()
    stats = jq.calibrate(model.fn, model.params, [model.args])
    qparams = jq.quantize_params(model.params, jq.int8, stats=stats)
    turned = jq.turned(qparams)
    assert any(isinstance(leaf, jq.Turned) for leaf in jax.tree.leaves(turned, is_leaf=lambda leaf: leaf is not turned))
    for given in ((stats, *model.args), (None,)):
        found, expected = (jq.report(model.fn, model.params, tree, *given).rows for tree in (turned, qparams))
        assert found == expected


def test_trees_that_do_not_belong_together_are_an_error():
    with pytest.raises(NoMatchError, match="no QTensor"):
        jq.report(fn, PARAMS, PARAMS)
    with pytest.raises(NoMatchError, match="other paths"):
        jq.report(fn, {"up": PARAMS["up"]}, jq.quantize_params(PARAMS))
