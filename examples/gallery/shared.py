"""What the examples of the gallery share: two data sets that need no download, a training loop, and measures."""

from collections.abc import Callable
from pydoc_data.topics import topics
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from sklearn.datasets import load_digits

import jaxquant as jq

TIME = 64


def digits() -> tuple[tuple[np.ndarray, np.ndarray], tuple[np.ndarray, np.ndarray]]:
    """The 1797 handwritten digits of scikit-learn, `[n, 8, 8]` from 0 to 1, and what they are; 360 are held out."""
    images, labels = load_digits(return_X_y=True)
    order = np.random.default_rng(0).permutation(len(images))
    images, labels = images[order].reshape(-1, 8, 8).astype(np.float32) / 16, labels[order].astype(np.int32)
    return (images[360:], labels[360:]), (images[:360], labels[:360])


def text() -> tuple[np.ndarray, np.ndarray]:
    """The help texts that every Python carries, as windows `[n, 64]` of ASCII codes; the last 64 are held out."""
    whole = "\n".join(topics[key] for key in sorted(topics)).encode("ascii", "ignore")
    codes = np.frombuffer(whole[: len(whole) // TIME * TIME], np.uint8).astype(np.int32).reshape(-1, TIME)
    return codes[:-64], codes[-64:]


def sampled(data: tuple[np.ndarray, ...], steps: int, batch: int = 64) -> tuple[np.ndarray, ...]:
    """Random batches, one for each step: `[steps, batch, ...]`."""
    chosen = np.random.default_rng(1).integers(0, len(data[0]), (steps, batch))
    return tuple(array[chosen] for array in data)


def fit(loss: Callable[..., jax.Array], params: Any, batches: tuple[np.ndarray, ...], rate: float = 3e-3) -> Any:
    """Minimises `loss(params, *batch)` with Adam, a step for each batch, the rate falling to zero."""
    optimizer = optax.adam(optax.cosine_decay_schedule(rate, len(batches[0])))

    @jax.jit
    def step(params: Any, state: Any, *batch: jax.Array) -> tuple[Any, Any]:
        updates, state = optimizer.update(jax.grad(loss)(params, *batch), state, params)
        return optax.apply_updates(params, updates), state

    state = jax.jit(optimizer.init)(params)
    for batch in zip(*batches, strict=True):
        params, state = step(params, state, *batch)
    return params


def cross_entropy(logits: jax.Array, labels: jax.Array) -> jax.Array:
    """The mean of `-log p(label)`."""
    return optax.softmax_cross_entropy_with_integer_labels(logits, labels).mean()


def accuracy(forward: Callable[..., jax.Array], params: Any, data: tuple[np.ndarray, np.ndarray]) -> float:
    """The share of images whose largest logit is the right one."""
    images, labels = data
    return float(jnp.mean(jnp.argmax(forward(params, images), -1) == labels))


def nbytes(params: Any) -> int:
    """What parameters take, QTensors counted with their scales."""
    leaves = jax.tree.leaves(params, is_leaf=lambda leaf: isinstance(leaf, jq.QTensor))
    return sum(leaf.nbytes for leaf in leaves if hasattr(leaf, "nbytes"))


def show(measure: str, results: dict[str, tuple[float, int]]) -> dict[str, tuple[float, int]]:
    """Prints a number and the bytes of the parameters for each format, and returns them."""
    for name, (number, size) in results.items():
        print(f"{name:12} {measure} {number:.3f}, {size:,} bytes")
    return results
