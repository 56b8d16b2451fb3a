"""Flax NNX: split the module, quantize its state, merge inside the function. The `Param` boxes stay, and hold codes.

python examples/gallery/nnx_classifier.py
"""

import jax
from flax import nnx
from shared import accuracy, cross_entropy, digits, fit, nbytes, sampled, show

import jaxquant as jq

FORMATS = {"int8": jq.int8, "int4": jq.int4(group=32, symmetric=False)}


class Classifier(nnx.Module):
    """Two dense layers around a norm."""

    def __init__(self, rngs: nnx.Rngs):
        self.up = nnx.Linear(64, 128, rngs=rngs)
        self.norm = nnx.LayerNorm(128, rngs=rngs)
        self.down = nnx.Linear(128, 10, rngs=rngs)

    def __call__(self, images):
        """Logits of ten digits."""
        return self.down(nnx.relu(self.norm(self.up(images.reshape(-1, 64)))))


def main(steps=600):
    """Trains in float, quantizes, and counts the digits that are recognized."""
    train, test = digits()
    graph, state = nnx.split(Classifier(nnx.Rngs(0)))

    def forward(state, images):
        return nnx.merge(graph, state)(images)

    state = fit(
        lambda state, images, labels: cross_entropy(forward(state, images), labels), state, sampled(train, steps)
    )

    results = {"float32": (accuracy(jax.jit(forward), state, test), nbytes(state))}
    quantized = jax.jit(jq.quantized(forward))
    for name, format in FORMATS.items():
        qstate = jq.quantize_params(state, format)
        results[name] = accuracy(quantized, qstate, test), nbytes(qstate)

    # A module with codes in it is a module like any other: its layers are there, and it splits and merges.
    model = nnx.merge(graph, qstate)
    print(type(model.up.kernel).__name__, "of", model.up.kernel.get_value())
    return show("accuracy", results)


if __name__ == "__main__":
    main()
