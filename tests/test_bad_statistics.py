"""What statistics, matrices and options a quantizer cannot use get: a defined result, or an error by name before any work.

Each test is a row of the contract ("Algorithms" in what bad input gets). A result is defined when it is finite and no
worse than nearest rounding; where the statistics say nothing at all, it is nearest rounding, code for code.
"""

import dataclasses
import functools
import hashlib
import math
import os
import subprocess
import sys
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
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
    """Whether the codes and scales are those of nearest rounding, and neither a transform nor a kept row does a thing."""
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


USELESS = {
    "NaN": with_gram(np.full((K, K), np.nan)),
    "one NaN": with_gram(np.where(np.arange(K * K).reshape(K, K) == 40, np.nan, X.T @ X)),
    "infinite": with_gram(np.full((K, K), np.inf)),
    "overflown": stats_of(one_huge()),
    "no Cholesky factor": with_gram(mirrored()),
    "negative": with_gram(-X.T @ X),
}


@pytest.mark.parametrize("quantizer", **table(COMPARING))
@pytest.mark.parametrize("stats", **table(USELESS))
def test_a_useless_gram_matrix_leaves_nearest_rounding(stats, quantizer):
    """Row: Cholesky NaN: nearest rounding, for whatever wraps it; the codes of a matrix that cannot be factored."""
    assert is_nearest(compiled(quantizer)(W, stats))
