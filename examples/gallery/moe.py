"""A mixture of experts: `ragged_dot` over stacked matrices, each calibrated on the tokens that it sees, for GPTQ.

python examples/gallery/moe.py
"""

import jax
import jax.numpy as jnp
import numpy as np
from shared import cross_entropy, fit, nbytes, sampled, show, text

import jaxquant as jq

BEFORE, EMBED, WIDTH, EXPERTS = 8, 16, 128, 4
INT2 = jq.int2(group=32, symmetric=False)
QUANTIZERS = {"int8": jq.int8, "int2": INT2, "int2 gptq": jq.gptq(INT2)}


def init(key):
    """An embedding, a router, experts `[expert, in, out]` and a head."""
    keys = iter(jax.random.split(key, 5))
    matrix = lambda *shape: jax.random.normal(next(keys), shape) / np.sqrt(shape[-2])  # noqa: E731
    return {
        "embedding": jax.random.normal(next(keys), (128, EMBED)),
        "router": matrix(WIDTH, EXPERTS),
        "experts": {"up": matrix(EXPERTS, WIDTH, 2 * WIDTH), "down": matrix(EXPERTS, 2 * WIDTH, WIDTH)},
        "head": matrix(WIDTH, 128),
    }


def experts(params, x, chosen):
    """Sorts tokens by expert, sends each through its own, and puts them back."""
    order = jnp.argsort(chosen)
    sizes = jnp.bincount(chosen, length=EXPERTS).astype(jnp.int32)
    hidden = jax.nn.silu(jax.lax.ragged_dot(x[order], params["up"], sizes))
    return jax.lax.ragged_dot(hidden, params["down"], sizes)[jnp.argsort(order)]


def model(params, tokens):
    """Characters to the logits of the characters that follow, each told from the last eight; and who was chosen."""
    padded = jnp.pad(tokens, ((0, 0), (BEFORE - 1, 0)))
    last = jnp.stack([padded[:, i : i + tokens.shape[1]] for i in range(BEFORE)], axis=-1)
    x = params["embedding"][last].reshape(-1, WIDTH)
    shares = jax.nn.softmax(x @ params["router"])
    chosen = jnp.argmax(shares, -1)
    x = x + experts(params["experts"], x, chosen) * jnp.max(shares, -1, keepdims=True)
    return (x @ params["head"]).reshape(*tokens.shape, 128), shares, chosen


def forward(params, tokens):
    """The logits alone."""
    return model(params, tokens)[0]


def loss(params, tokens):
    """The loss of the text, and that of an uneven load: experts * sum(share of tokens * share of the router)."""
    logits, shares, chosen = model(params, tokens)
    load = jnp.mean(jax.nn.one_hot(chosen, EXPERTS), 0) @ jnp.mean(shares, 0)
    return cross_entropy(logits[:, :-1], tokens[:, 1:]) + 0.1 * EXPERTS * load


def main(steps=400):
    """Trains in float, calibrates, quantizes, and measures the perplexity of held-out text."""
    train, test = text()
    params = fit(loss, init(jax.random.key(0)), sampled((train,), steps, batch=16), rate=1e-2)

    def perplexity(forward, params):
        return jq.perplexity(lambda tokens: forward(params, tokens), [jnp.asarray(test)])

    are_experts = lambda path, w: path.startswith("experts/")  # nine tenths of the weights  # noqa: E731
    stats = jq.calibrate(forward, params, sampled((train,), 8)[0], where=are_experts)
    print("tokens that each expert was calibrated on:", stats["experts/up"].count)
    results = {"float32": (perplexity(jax.jit(forward), params), nbytes(params))}
    quantized = jax.jit(jq.quantized(forward))
    for name, quantizer in QUANTIZERS.items():
        qparams = jq.quantize_params(params, quantizer, stats=stats, where=are_experts)
        results[name] = perplexity(quantized, qparams), nbytes(qparams)
    return show("perplexity", results)


if __name__ == "__main__":
    main()
