"""Equinox: a module is a pytree with functions among its leaves, so it is partitioned before it is jitted.

An LSTM reads each digit from top to bottom, a row of pixels at a time.

python examples/gallery/equinox_lstm.py
"""

import equinox as eqx
import jax
import jax.numpy as jnp
from shared import accuracy, cross_entropy, digits, fit, nbytes, sampled, show

import jaxquant as jq

FORMATS = {"int8": jq.int8, "int4": jq.int4(symmetric=False)}


class Reader(eqx.Module):
    """An LSTM and a head on its last state."""

    cell: eqx.nn.LSTMCell
    head: eqx.nn.MLP

    def __init__(self, key):
        cell, head = jax.random.split(key)
        self.cell = eqx.nn.LSTMCell(8, 64, key=cell)
        self.head = eqx.nn.MLP(64, 10, 64, 1, activation=jax.nn.silu, key=head)

    def __call__(self, image):
        """Logits of ten digits for one image."""
        step = lambda state, row: (self.cell(row, state), None)  # noqa: E731
        (hidden, _), _ = jax.lax.scan(step, (jnp.zeros(64), jnp.zeros(64)), image)
        return self.head(hidden)


def forward(model, images):
    """All images, each read alone under `vmap`."""
    return jax.vmap(model)(images)


def main(steps=600):
    """Trains in float, quantizes, and counts the digits that are recognized."""
    train, test = digits()
    arrays, static = eqx.partition(Reader(jax.random.key(0)), eqx.is_array)

    def loss(arrays, images, labels):
        return cross_entropy(forward(eqx.combine(arrays, static), images), labels)

    model = eqx.combine(fit(loss, arrays, sampled(train, steps), rate=1e-2), static)

    results = {"float32": (accuracy(eqx.filter_jit(forward), model, test), nbytes(model))}
    quantized = eqx.filter_jit(jq.quantized(forward))
    for name, format in FORMATS.items():
        qmodel = jq.quantize_params(model, format)  # a Reader whose weights are QTensors
        results[name] = accuracy(quantized, qmodel, test), nbytes(qmodel)
    return show("accuracy", results)


if __name__ == "__main__":
    main()
