"""`report`: bits, bytes, errors and fallbacks of every parameter, against the same numbers computed by hand."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from models import MODELS, normal, weight
from tables import SAMPLE

import jaxquant as jq
from jaxquant.errors import NoMatchError
from jaxquant.files.gguf.blocks import BLOCKS

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


@pytest.mark.parametrize("name", SAMPLE)
def test_nearest_rounding_is_all_of_itself(name):
    row = rows(jq.quantize_params(PARAMS, SAMPLE[name]))["up"]
    assert row.of_nearest == pytest.approx(1, abs=1e-4) and row.notes == "nearest rounding is kept"


# Eight levels that reach neither end alike, and the codebooks of files: wider than [-1, 1], or with two zeros.
UNEVEN = (-1.0, -0.5, -0.3125, -0.0625, 0.0, 0.125, 0.375, 0.75)
FP4 = (0.0, 0.0052, 0.1667, 0.25, 0.3333, 0.5, 0.6667, 1.0)
CODEBOOKS = {kind: BLOCKS[kind].levels for kind in ("IQ4_NL", "MXFP4")} | {"FP4": (*(-x for x in FP4[::-1]), *FP4)}


@pytest.mark.parametrize("levels", CODEBOOKS.values(), ids=CODEBOOKS)
def test_codebooks_of_files_are_compared_with_their_own_nearest_levels(levels):
    """Against float64: every number to the nearest level, the largest of a block at the level that reaches furthest."""
    draw = np.random.default_rng(0)
    codes = jnp.asarray(draw.integers(-8, 8, (N, K)), jnp.int4)
    scale = jnp.asarray(draw.uniform(0.01, 0.02, (N, K // 32)), jnp.float32)
    q = jq.QTensor(codes, scale, None, jnp.dtype(jnp.float32), 4, levels)
    w = jq.dequantize(q) + 0.05 * normal(N, K)
    blocks, at = np.asarray(w, np.float64).reshape(N, K // 32, 32), np.asarray(levels)
    away = blocks[..., None] - at * np.max(np.abs(blocks), -1, keepdims=True)[..., None] / np.max(np.abs(at))
    expected = np.sum(np.asarray(w - jq.dequantize(q), np.float64) ** 2) / np.sum(np.min(np.abs(away), -1) ** 2)
    (row,) = jq.report(fn, {"w": w}, {"w": q}).rows
    assert row.of_nearest == pytest.approx(expected, rel=1e-4) and row.format == "codebook4 g32"


def test_a_row_does_not_tell_how_a_codebook_is_written():
    """Law: levels 8 times as large under an eighth of the scale, or each of them twice, have the same errors."""
    qparams = jq.quantize_params(PARAMS, jq.gptq(jq.Format(bits=3, group=16, levels=UNEVEN)), stats=STATS)
    q = qparams["up"]
    wide = dataclasses.replace(q, levels=tuple(8 * level for level in UNEVEN), scale=q.scale / 8)
    index = 2 * (q.codes.astype(jnp.int8) + 4) + jnp.arange(N, dtype=jnp.int8)[None] % 2
    levels = tuple(level for level in UNEVEN for _ in range(2))
    twice = dataclasses.replace(q, codes=(index - 8).astype(jnp.int4), bits=4, levels=levels)
    expected = rows(qparams)["up"]
    assert expected.of_nearest < 1
    assert rows(qparams | {"up": wide})["up"] == expected
    assert rows(qparams | {"up": twice})["up"] == dataclasses.replace(expected, format="codebook4 g16")


@pytest.mark.parametrize("quantizer", [jq.int8, jq.rotated(jq.gptq(G16))], ids=["int8", "rotated"])
def test_an_adapter_is_no_part_of_a_row(quantizer):
    """Law: a row is that of the base, turned or not, whatever stands beside it, and of its own float base."""
    qparams = jq.quantize_params(PARAMS, quantizer, stats=STATS)
    adapted = jq.add_lora(qparams, 2, key=jax.random.key(0))
    later = jq.join_lora(jq.split_lora(adapted)[0], jq.turned(qparams))
    expected = jq.report(fn, PARAMS, qparams, STATS, X, activations=jq.int8)
    for floats in (PARAMS, jq.add_lora(PARAMS, 2, key=jax.random.key(0))):
        for tree in (adapted, later):
            assert jq.report(fn, floats, tree, STATS, X, activations=jq.int8) == expected


def test_what_is_worse_than_nearest_rounding_is_not_called_that():
    """Codes that somebody else chose, in a file, may be."""
    qparams = jq.quantize_params(PARAMS, G16)
    row = rows(qparams | {"up": dataclasses.replace(qparams["up"], scale=1.1 * qparams["up"].scale)})["up"]
    assert row.of_nearest > 1.5 and row.notes == ""


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
