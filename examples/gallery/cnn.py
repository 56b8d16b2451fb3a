"""A CNN in Flax Linen: convolutions run on integers too, and `jq.explain` shows it.

python examples/gallery/cnn.py
"""

import flax.linen as nn
import jax
import jax.numpy as jnp
from shared import accuracy, cross_entropy, digits, fit, nbytes, sampled, show

import jaxquant as jq

FORMATS = {"int8": jq.int8, "int4": jq.int4}


class Cnn(nn.Module):
    """Three convolutions, one of them strided and one in feature groups, and a dense layer."""

    @nn.compact
    def __call__(self, images):
        x = nn.relu(nn.Conv(16, (3, 3))(images[..., None]))
        x = nn.relu(nn.Conv(32, (3, 3), strides=2)(x))
        x = nn.relu(nn.Conv(32, (3, 3), feature_group_count=4)(x))
        return nn.Dense(10)(x.reshape(len(x), -1))


def main(steps=300):
    """Trains in float, quantizes, explains, and counts the digits that are recognized."""
    train, test = digits()
    model = Cnn()

    def loss(params, images, labels):
        return cross_entropy(model.apply(params, images), labels)

    params = fit(loss, jax.jit(model.init)(jax.random.key(0), jnp.zeros((1, 8, 8))), sampled(train, steps))

    results = {"float32": (accuracy(jax.jit(model.apply), params, test), nbytes(params))}
    quantized = jax.jit(jq.quantized(model.apply))
    for name, format in FORMATS.items():
        qparams = jq.quantize_params(params, format)
        results[name] = accuracy(quantized, qparams, test), nbytes(qparams)

    # One row for each matmul and convolution: what was multiplied with what, in which arithmetic, and why.
    print(jq.explain(model.apply, qparams, test[0]))
    return show("accuracy", results)


if __name__ == "__main__":
    main()
