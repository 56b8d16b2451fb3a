"""What `quantized` adds to tracing: medians over alternating runs, as a ratio to the plain function's trace.

python benchmarks/tracing.py
"""

import statistics
import time

import flax.linen as nn
import jax
import jax.numpy as jnp

import jaxquant as jq

LAYERS, WIDTH, RUNS = 12, 64, 9


class Transformer(nn.Module):
    """Twelve unrolled layers, as a model that traces slowly has."""

    @nn.compact
    def __call__(self, tokens):
        embed = nn.Embed(128, WIDTH)
        x = embed(tokens)
        for _ in range(LAYERS):
            x = x + nn.MultiHeadDotProductAttention(4)(nn.LayerNorm()(x))
            x = x + nn.Dense(WIDTH)(nn.gelu(nn.Dense(4 * WIDTH)(nn.LayerNorm()(x))))
        return embed.attend(nn.LayerNorm()(x))


def seconds(fn, *args) -> float:
    """One trace, of a function JAX has not seen before."""
    start = time.perf_counter()
    jax.jit(lambda *inputs: fn(*inputs)).trace(*args)
    return time.perf_counter() - start


def main() -> None:
    """Prints one line per format."""
    model, tokens = Transformer(), jnp.zeros((1, 16), jnp.int32)
    params = model.init(jax.random.key(0), tokens)
    print(f"{LAYERS} layers, {RUNS} runs, jax {jax.__version__}; ratios to the plain function's trace")
    for format in (jq.int8, jq.int4(group=16), jq.nf4(group=16)):
        qparams = jq.quantize_params(params, format)
        ours = jq.quantized(model.apply)
        pairs = [(seconds(ours, qparams, tokens), seconds(model.apply, params, tokens)) for _ in range(RUNS)]
        ratio = statistics.median(mine / theirs for mine, theirs in pairs)
        plain = statistics.median(theirs for _, theirs in pairs)
        print(f"{format!s:<20} {ratio:.2f}   (plain: {1e3 * plain:.0f} ms)")


if __name__ == "__main__":
    main()
