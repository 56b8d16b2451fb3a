"""Measures: perplexity and divergence are the formulas, on toy language models whose probabilities are known."""

import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from models import normal

import jaxquant as jq
from jaxquant.errors import CalibrationError

VOCABULARY = 7


def tokens(seed: int, batch: int = 2, time: int = 5):
    return jnp.asarray(np.random.default_rng(seed).integers(0, VOCABULARY, (batch, time)), jnp.int32)


def bigram(seed: int):
    """A model that looks one token back: logits are a row of a table."""
    table = normal(VOCABULARY, VOCABULARY, seed=seed)
    return lambda t: table[t]


BATCHES = [tokens(0), tokens(1, batch=3), tokens(2, batch=1, time=9)]


def by_hand(model, batches):
    """Log probabilities of each sequence, in float64."""
    rows = []
    for batch in batches:
        logits = np.asarray(model(batch), np.float64)
        logs = logits - np.log(np.exp(logits).sum(-1, keepdims=True))
        rows += list(zip(logs, np.asarray(batch), strict=True))
    return rows


def losses(rows):
    return np.array([-np.mean([p[t, s[t + 1]] for t in range(len(s) - 1)]) for p, s in rows])


def test_a_uniform_model_is_as_perplexed_as_its_vocabulary_is_large():
    uniform = lambda t: jnp.zeros((*t.shape, VOCABULARY))  # noqa: E731
    assert jq.perplexity(uniform, BATCHES) == pytest.approx(VOCABULARY, rel=1e-6)


def test_perplexity_is_its_formula_with_equal_weight_for_each_sequence():
    expected = math.exp(losses(by_hand(bigram(0), BATCHES)).mean())
    assert jq.perplexity(jax.jit(bigram(0)), BATCHES) == pytest.approx(expected, rel=1e-5)


def test_divergence_is_its_formula():
    p, q = by_hand(bigram(0), BATCHES), by_hand(bigram(1), BATCHES)
    found = jq.divergence(bigram(0), bigram(1), BATCHES)
    kl = np.array([np.mean(np.sum(np.exp(a) * (a - b), -1)) for (a, _), (b, _) in zip(p, q, strict=True)])
    agreement = [np.mean(a.argmax(-1) == b.argmax(-1)) for (a, _), (b, _) in zip(p, q, strict=True)]
    gaps = losses(q) - losses(p)
    assert found.sequences == len(kl)
    assert found.kl == pytest.approx(kl.mean(), rel=1e-4)
    assert found.kl_error == pytest.approx(1.96 * kl.std(ddof=1) / math.sqrt(len(kl)), rel=1e-4)
    assert found.agreement == pytest.approx(np.mean(agreement))
    assert found.loss_gap == pytest.approx(gaps.mean(), rel=1e-4)
    assert found.loss_gap_error == pytest.approx(1.96 * gaps.std(ddof=1) / math.sqrt(len(kl)), rel=1e-4)
    assert math.log(found.perplexity / found.reference_perplexity) == pytest.approx(found.loss_gap, rel=1e-4)


def test_a_model_does_not_diverge_from_itself():
    found = jq.divergence(bigram(0), bigram(0), BATCHES)
    assert (found.kl, found.agreement, found.loss_gap, found.loss_gap_error) == (0, 1, 0, 0)


def test_one_sequence_has_no_interval():
    assert jq.divergence(bigram(0), bigram(1), [tokens(0, batch=1)]).kl_error == math.inf


def test_progress_wraps_the_batches_and_none_is_an_error():
    seen = []
    jq.perplexity(bigram(0), BATCHES, progress=lambda batches: (seen.append(b) or b for b in batches))
    assert len(seen) == len(BATCHES)
    for measure in (lambda: jq.perplexity(bigram(0), []), lambda: jq.divergence(bigram(0), bigram(1), [])):
        with pytest.raises(CalibrationError, match="no batch"):
            measure()
