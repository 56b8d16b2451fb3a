"""Plain JAX: a dictionary of arrays is quantized, and a function of it runs on the codes.

python examples/gallery/plain_mlp.py
"""

import jax
import jax.numpy as jnp
from shared import accuracy, cross_entropy, digits, fit, nbytes, sampled, show

import jaxquant as jq

FORMATS = {"int8": jq.int8, "int4": jq.int4(group=32, symmetric=False)}


def init(key):
    """Two matrices and their biases: the parameters are nothing but a dictionary."""
    up, down = jax.random.split(key)
    return {
        "up": jax.random.normal(up, (64, 128)) / 8,
        "up_bias": jnp.zeros(128),
        "down": jax.random.normal(down, (128, 10)) / 11,
        "down_bias": jnp.zeros(10),
    }


def forward(params, images):
    """Logits of ten digits."""
    hidden = jax.nn.relu(images.reshape(-1, 64) @ params["up"] + params["up_bias"])
    return hidden @ params["down"] + params["down_bias"]


def main(steps=600):
    """Trains in float, quantizes, and counts the digits that are recognized."""
    train, test = digits()
    loss = lambda params, images, labels: cross_entropy(forward(params, images), labels)  # noqa: E731
    params = fit(loss, init(jax.random.key(0)), sampled(train, steps))

    results = {"float32": (accuracy(jax.jit(forward), params, test), nbytes(params))}
    quantized = jax.jit(jq.quantized(forward))
    for name, format in FORMATS.items():
        qparams = jq.quantize_params(params, format)
        print(qparams["up"])
        results[name] = accuracy(quantized, qparams, test), nbytes(qparams)
    return show("accuracy", results)


if __name__ == "__main__":
    main()
