"""Haiku: `hk.transform` makes the function of parameters that `jq.quantized` wants, recurrent cores and all.

python examples/gallery/haiku_gru.py
"""

import haiku as hk
import jax
import jax.numpy as jnp
from shared import cross_entropy, fit, nbytes, sampled, show, text

import jaxquant as jq

FORMATS = {"int8": jq.int8, "int4": jq.int4(group=32, symmetric=False)}


def model(tokens):
    """Characters to the logits of the characters that follow, as Haiku code is written."""
    core = hk.GRU(128)
    x = hk.Embed(128, 64)(tokens)
    x, _ = hk.dynamic_unroll(core, x, core.initial_state(len(tokens)), time_major=False)
    return hk.nets.MLP([128, 128], activation=jax.nn.gelu)(hk.LayerNorm(-1, True, True)(x))


def main(steps=400):
    """Trains in float, quantizes, and measures the perplexity of held-out text."""
    train, test = text()
    init, apply = hk.without_apply_rng(hk.transform(model))

    def loss(params, tokens):
        return cross_entropy(apply(params, tokens)[:, :-1], tokens[:, 1:])

    params = fit(loss, jax.jit(init)(jax.random.key(0), test[:1]), sampled((train,), steps, batch=16), rate=1e-2)

    def perplexity(forward, params):
        return jq.perplexity(lambda tokens: forward(params, tokens), [jnp.asarray(test)])

    results = {"float32": (perplexity(jax.jit(apply), params), nbytes(params))}
    quantized = jax.jit(jq.quantized(apply))
    for name, format in FORMATS.items():
        qparams = jq.quantize_params(params, format)
        print(qparams["gru"]["w_h"])  # codes that stay outside of the loop over time
        results[name] = perplexity(quantized, qparams), nbytes(qparams)
    return show("perplexity", results)


if __name__ == "__main__":
    main()
