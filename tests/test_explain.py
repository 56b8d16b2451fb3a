"""`explain` tells what `quantized` does: every operation that meets a parameter, in words that are true.

That its promises of integer arithmetic are what the jaxpr has is proved over the zoo, in `test_models.py`.
"""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from rich.text import Text

import jaxquant as jq

INTEGER, WEIGHT_ONLY, FLOAT, LOOK_UP = "int8 x int8 -> int32", "weight-only", "float", "look-up"


def normal(*shape, seed=0):
    """N(0, 1) in float32."""
    return np.random.default_rng(seed).standard_normal(shape).astype(np.float32)


X, W = normal(6, 16), normal(16, 8, seed=1)


def rows(fn, params, *args, **options):
    """`(path, operation, arithmetic)` of each row."""
    meetings = jq.explain(fn, params, *args, **options).meetings
    return [(row.path, row.operation, row.arithmetic) for row in meetings]


def matmul(params, x):
    """One matmul."""
    return x @ params["w"]


# The weight, the format of activations, the arithmetic, and a word of the reason.
ARITHMETIC = {
    "int8": (jq.quantize(W), jq.int8, INTEGER, ""),
    "int4": (jq.quantize(W, jq.int4), jq.int8, INTEGER, ""),
    "affine": (jq.quantize(W, jq.int8(symmetric=False)), jq.int8(symmetric=False), INTEGER, ""),
    "weight-only": (jq.quantize(W), None, WEIGHT_ONLY, "activations=None"),
    "nf4": (jq.quantize(W, jq.nf4(group=8)), jq.int8, WEIGHT_ONLY, "not integers"),
    "fp8": (jq.quantize(W, jq.fp8), jq.int8, WEIGHT_ONLY, "not integers"),
    "many rows with groups": (jq.quantize(W, jq.int4(group=8)), jq.int8, FLOAT, "groups"),
    "unquantized": (jnp.asarray(W), jq.int8, FLOAT, "not quantized"),
}


@pytest.mark.parametrize("w, activations, arithmetic, reason", ARITHMETIC.values(), ids=ARITHMETIC)
def test_the_arithmetic_and_the_reason(w, activations, arithmetic, reason):
    """Law: one row per matmul, with a reason if and only if it is not integer arithmetic."""
    (row,) = jq.explain(matmul, {"w": w}, X, activations=activations).meetings
    assert (row.path, row.operation, row.arithmetic) == ("w", "dot_general", arithmetic)
    assert reason in row.reason and bool(row.reason) == (arithmetic != INTEGER)
    assert (row.activations, row.weight) == (X.shape, W.shape)


def test_the_formats_in_words():
    """Law: the weight's format and what the activations become are named."""
    (row,) = jq.explain(matmul, {"w": jq.quantize(W, jq.int4(group=8, symmetric=False))}, X[:2]).meetings
    assert (row.weight_format, row.activation_format) == ("int4 g8 affine", "int8 per-token")
    (row,) = jq.explain(matmul, {"w": jq.quantize(W)}, X, activations=jq.int4).meetings
    assert (row.weight_format, row.activation_format) == ("int8 per-channel", "int4 per-token")
    (row,) = jq.explain(matmul, {"w": jq.quantize(W)}, X, activations=None).meetings
    assert row.activation_format == "float32"


def test_every_matmul_has_a_row():
    """Law: a weight that is used twice outside a loop has two rows, alike as they may be; a loop's body has one."""
    q = jq.quantize(normal(16, 16))
    assert rows(lambda params, x: (x @ params["w"]) @ params["w"], {"w": q}, X) == [("w", "dot_general", INTEGER)] * 2

    def loop(params, x):
        return jax.lax.scan(lambda x, _: (x @ params["w"], None), x, None, length=3)[0]

    assert rows(loop, {"w": q}, X) == [("w", "dot_general", INTEGER)]


def test_a_row_for_each_way_a_parameter_is_met():
    """Law: look-ups, integer matmuls and fallbacks of one parameter each have their row, in the program's order."""

    def tied(params, ids):
        x = params["embedding"][ids]
        return x @ params["embedding"].T, jnp.sin(params["embedding"])

    q = {"embedding": jq.quantize(W, axis=1)}
    path = "embedding"
    assert rows(tied, q, jnp.array([1, 2])) == [
        (path, "gather", LOOK_UP),
        (path, "dot_general", INTEGER),
        (path, "sin", FLOAT),
    ]


def test_a_parameter_that_meets_no_matmul_in_codes_is_listed():
    """Law: what was quantized for nothing is listed by path, whether it was decoded or not used at all."""
    params = {"used": jq.quantize(W), "decoded": jq.quantize(W), "idle": jq.quantize(W), "float": jnp.ones(3)}
    explanation = jq.explain(lambda params, x: (x @ params["used"], jnp.exp(params["decoded"])), params, X)
    assert explanation.unmet == ("decoded", "idle")
    assert all(any(path in line for line in str(explanation).splitlines()) for path in explanation.unmet)


def test_a_matmul_of_decoded_codes_is_met():
    """Law: a weight whose matmul is float because that is faster did meet a matmul, and is not listed as unmet."""
    explanation = jq.explain(matmul, {"w": jq.quantize(W, jq.int4(group=8))}, X)
    assert [row.arithmetic for row in explanation.meetings] == [FLOAT]
    assert explanation.unmet == ()


def test_nothing_is_computed():
    """Law: shapes are enough, for the parameters and for the arguments, and say the same as arrays."""
    params = {"w": jq.quantize(W)}
    shapes = jax.eval_shape(lambda params, x: (params, x), params, X)
    assert jq.explain(matmul, *shapes) == jq.explain(matmul, params, X)


def test_records_are_the_rows_as_dictionaries():
    """Law: `records` has one dictionary per row with the same fields."""
    explanation = jq.explain(matmul, {"w": jq.quantize(W)}, X)
    assert explanation.records == [dataclasses.asdict(row) for row in explanation.meetings]


def test_the_table_has_every_cell_and_aligned_columns():
    """Law: each row of the table has its record's words, and each column begins where its header does."""
    params = {"w": jq.quantize(W), "deep": {"er": jq.quantize(normal(8, 8), jq.nf4(group=8))}}
    explanation = jq.explain(lambda params, x: (x @ params["w"]) @ params["deep"]["er"], params, X)
    header, *lines = str(explanation).splitlines()
    assert len(lines) == len(explanation.meetings) == 2
    starts = [header.index(name) for name in ("parameter", "operation", "weight", "format", "arithmetic", "why")]
    for line, row in zip(lines, explanation.meetings, strict=True):
        cells = (row.path, row.operation, str(list(row.weight)), row.weight_format, row.arithmetic, row.reason)
        assert all(line[start:].startswith(cell) for start, cell in zip(starts, cells, strict=True))


def test_the_rich_table_is_the_plain_one_in_colour():
    """Law: rich shows the same text, shapes in brackets included, and paints integer arithmetic green."""
    explanation = jq.explain(matmul, {"w": jq.quantize(W), "idle": jq.quantize(W)}, X)
    text = Text.from_markup(explanation.__rich__())
    assert text.plain == str(explanation)
    assert {str(span.style) for span in text.spans} == {"green"}


def test_keyword_arguments_and_later_parameters():
    """Law: parameters are found in every argument, and options of the function reach it."""

    def fn(params, x, *, flag, more):
        return x @ params["w"] if flag else x @ more["u"]

    params, more = {"w": jq.quantize(W)}, {"u": jq.quantize(W)}
    assert rows(fn, params, X, flag=True, more=more) == [("w", "dot_general", INTEGER)]
    (row,) = jq.explain(fn, params, X, flag=False, more=more).meetings
    assert row.path.endswith("u") and row.arithmetic == INTEGER


def test_matmuls_of_activations_are_listed_as_float():
    """Law: every matmul has a row, in the order of the program, also one inside a call that meets no parameter."""

    def attend(params, x):
        q = x @ params["w"]
        return jax.jit(lambda q, k: q @ k.T)(q, x)

    explanation = jq.explain(attend, {"w": jq.quantize(normal(16, 16))}, X)
    assert [(row.path, row.arithmetic) for row in explanation.meetings] == [("w", INTEGER), ("", FLOAT)]
    assert explanation.meetings[1].reason == "both operands are activations"
