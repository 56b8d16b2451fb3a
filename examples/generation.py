"""Tokens from a Llama, or from anything that is called like one: the next one, or many without leaving the device."""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Int
from llama import KVCache


def generate_step(
    forward: Callable[..., Any],
    params: Any,
    tokens: Int[Array, "batch time"],
    cache: KVCache,
    temperature: float = 0.0,
    key: Array | None = None,
) -> tuple[Int[Array, "batch 1"], KVCache]:
    """Reads `tokens` and chooses the next one: the likeliest, or a sample if a temperature and a key are given.

    Args:
      forward: `model.apply`, or anything that is called like it; of a model with `last=True`, if a prompt is long.
      params: the parameters `forward` takes.
      tokens: a whole prompt, or the token chosen by the step before.
      cache: what came before; jit this with the cache donated and it is updated in place.
      temperature: static; 0 is greedy.
      key: a random key, needed when the temperature is not 0.

    Returns:
      The next token, ready to be fed to the next step, and the cache with `tokens` in it.
    """
    logits, cache = forward(params, tokens, cache)
    last = logits[:, -1:]
    if temperature == 0.0:
        return jnp.argmax(last, axis=-1).astype(jnp.int32), cache
    return jax.random.categorical(key, last / temperature).astype(jnp.int32), cache


def generate(
    forward: Callable[..., Any],
    params: Any,
    token: Int[Array, "batch 1"],
    cache: KVCache,
    count: int,
    temperature: float = 0.0,
    keys: Array | None = None,
) -> tuple[Int[Array, "batch count"], KVCache]:
    """Chooses `count` tokens, each fed to the next step on the device: no call and no copy comes between them.

    Args:
      forward, params, cache, temperature: as for `generate_step`.
      token: the last one chosen, which the cache does not hold yet.
      count: static.
      keys: a random key for each token, needed when the temperature is not 0.

    Returns:
      The tokens, the last of which the cache does not hold, and the cache.
    """

    def step(state: tuple[Array, KVCache], key: Array | None) -> tuple[tuple[Array, KVCache], Array]:
        token, cache = generate_step(forward, params, *state, temperature, key)
        return (token, cache), token[:, 0]

    (_, cache), tokens = jax.lax.scan(step, (token, cache), keys, length=count)
    return tokens.T, cache
