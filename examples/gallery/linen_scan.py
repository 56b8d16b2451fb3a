"""Flax Linen: a transformer whose layers are stacked and run by `nn.scan`; their codes are stacked the same way.

python examples/gallery/linen_scan.py
"""

import flax.linen as nn
import jax
import jax.numpy as jnp
from shared import cross_entropy, fit, nbytes, sampled, show, text

import jaxquant as jq

WIDTH, HEADS, LAYERS = 64, 2, 2
FORMATS = {"int8": jq.int8, "int4": jq.int4(group=32, symmetric=False)}


class Layer(nn.Module):
    """Causal attention and a feed-forward layer, in the form that `nn.scan` wants."""

    @nn.compact
    def __call__(self, x, _):
        mask = nn.make_causal_mask(x[..., 0])
        x = x + nn.MultiHeadDotProductAttention(num_heads=HEADS)(nn.LayerNorm()(x), mask=mask)
        return x + nn.Dense(WIDTH)(nn.gelu(nn.Dense(4 * WIDTH)(nn.LayerNorm()(x)))), None


class Transformer(nn.Module):
    """Characters to the logits of the characters that follow; the embedding is the output layer too."""

    @nn.compact
    def __call__(self, tokens):
        embed = nn.Embed(128, WIDTH)
        x = nn.Conv(WIDTH, (4,), padding="CAUSAL")(embed(tokens))  # the last four characters, and their order
        stack = nn.scan(Layer, variable_axes={"params": 0}, split_rngs={"params": True}, length=LAYERS)
        x, _ = stack(name="layers")(x, None)
        return embed.attend(nn.LayerNorm()(x))


def main(steps=400):
    """Trains in float, quantizes, and measures the perplexity of held-out text."""
    train, test = text()
    model = Transformer()

    def loss(params, tokens):
        return cross_entropy(model.apply(params, tokens)[:, :-1], tokens[:, 1:])

    params = fit(loss, jax.jit(model.init)(jax.random.key(0), test[:1]), sampled((train,), steps, batch=16), rate=5e-3)

    def perplexity(forward, params):
        return jq.perplexity(lambda tokens: forward(params, tokens), [jnp.asarray(test)])

    results = {"float32": (perplexity(jax.jit(model.apply), params), nbytes(params))}
    quantized = jax.jit(jq.quantized(model.apply))
    for name, format in FORMATS.items():
        qparams = jq.quantize_params(params, format)
        print(qparams["params"]["layers"]["Dense_0"]["kernel"])  # codes [2, 64, 256], scanned layer by layer
        results[name] = perplexity(quantized, qparams), nbytes(qparams)
    return show("perplexity", results)


if __name__ == "__main__":
    main()
