"""Measures of a language model: its perplexity, and how far a quantized one is from the one it was made of.

perplexity = exp(mean over tokens of -log p(next token))
KL = mean over tokens of sum_v p(v) (log p(v) - log q(v))        p the reference, q the candidate
"""

import dataclasses
import math
from collections.abc import Callable, Iterable

import jax
import jax.numpy as jnp
import numpy as np
from jax.typing import ArrayLike
from jaxtyping import Array, Float, Int

from jaxquant.errors import CalibrationError

# Tokens [batch, time] to logits [batch, time, vocab]; sizes may differ from batch to batch.
Forward = Callable[[Array], Array]
# Half of a 95 % interval of a mean, in standard errors.
_NORMAL = 1.96


@dataclasses.dataclass(frozen=True)
class Divergence:
    """How far a candidate is from a reference on the same tokens.

    Args:
      kl: mean Kullback-Leibler divergence of the candidate from the reference, in nats a token.
      kl_error: half the 95 % confidence interval of `kl`.
      agreement: share of the tokens after which both find the same next token likeliest.
      perplexity, reference_perplexity: of both.
      loss_gap: mean difference of their losses, in nats a token; paired, so far surer than either loss.
      loss_gap_error: half the 95 % confidence interval of `loss_gap`.
      sequences: how many were compared; the intervals are over their means, since tokens of one depend on each other.
    """

    kl: float
    kl_error: float
    agreement: float
    perplexity: float
    reference_perplexity: float
    loss_gap: float
    loss_gap_error: float
    sequences: int

    def __str__(self) -> str:
        return (
            f"KL {self.kl:.4f} ± {self.kl_error:.4f}, top-1 agreement {self.agreement:.1%}, perplexity "
            f"{self.perplexity:.2f} (reference {self.reference_perplexity:.2f}), loss {self.loss_gap:+.4f} ± "
            f"{self.loss_gap_error:.4f}"
        )


def perplexity(
    forward: Forward, batches: Iterable[ArrayLike], *, progress: Callable[[Iterable], Iterable] = iter
) -> float:
    """The perplexity of a language model: `exp` of the mean loss of each token given those before it.

    Args:
      forward: tokens to the logits of the tokens that follow them, such as `lambda t: model(params, t)`; jit it.
      batches: token ids, of equal weight for each sequence.
      progress: wraps the iteration, for example `rich.progress.track`.

    Raises:
      CalibrationError: there was no batch.
    """
    arrays = map(jnp.asarray, progress(batches))
    losses = [np.asarray(_losses(forward(tokens), tokens)) for tokens in arrays]
    return math.exp(float(np.mean(np.concatenate(_some(losses)))))


def divergence(
    reference: Forward,
    candidate: Forward,
    batches: Iterable[ArrayLike],
    *,
    progress: Callable[[Iterable], Iterable] = iter,
) -> Divergence:
    """Compares two language models token by token.

    Args:
      reference, candidate: tokens to logits, both over one vocabulary; jit them.
      batches: token ids. One sequence each is enough, and takes the least memory.
      progress: wraps the iteration, for example `rich.progress.track`.

    Raises:
      CalibrationError: there was no batch.
    """
    arrays = map(jnp.asarray, progress(batches))
    rows = [np.stack(_compared(reference(tokens), candidate(tokens), tokens), 1) for tokens in arrays]
    kl, agreement, loss, reference_loss = np.concatenate(_some(rows)).T
    return Divergence(
        kl=float(np.mean(kl)),
        kl_error=_half_interval(kl),
        agreement=float(np.mean(agreement)),
        perplexity=math.exp(float(np.mean(loss))),
        reference_perplexity=math.exp(float(np.mean(reference_loss))),
        loss_gap=float(np.mean(loss - reference_loss)),
        loss_gap_error=_half_interval(loss - reference_loss),
        sequences=len(kl),
    )


def _some(rows: list) -> list:
    if not rows:
        raise CalibrationError("there was no batch: give an iterable of arrays of token ids.")
    return rows


def _half_interval(means: np.ndarray) -> float:
    return _NORMAL * float(np.std(means, ddof=1)) / math.sqrt(len(means)) if len(means) > 1 else math.inf


@jax.jit
def _losses(logits: Float[Array, "batch time vocab"], tokens: Int[Array, "batch time"]) -> Float[Array, " batch"]:
    """The mean loss of each sequence."""
    return _loss(jax.nn.log_softmax(logits.astype(jnp.float32)), tokens)


def _loss(log_probs: Float[Array, "batch time vocab"], tokens: Int[Array, "batch time"]) -> Float[Array, " batch"]:
    return -jnp.take_along_axis(log_probs[:, :-1], tokens[:, 1:, None], axis=-1).mean((1, 2))


@jax.jit
def _compared(
    reference: Float[Array, "batch time vocab"],
    candidate: Float[Array, "batch time vocab"],
    tokens: Int[Array, "batch time"],
) -> tuple[Float[Array, " batch"], ...]:
    """KL, agreement and both losses of each sequence."""
    p, q = (jax.nn.log_softmax(logits.astype(jnp.float32)) for logits in (reference, candidate))
    kl = jnp.sum(jnp.exp(p) * (p - q), axis=-1).mean(-1)
    agreement = jnp.mean(p.argmax(-1) == q.argmax(-1), axis=-1)
    return kl, agreement, _loss(q, tokens), _loss(p, tokens)
