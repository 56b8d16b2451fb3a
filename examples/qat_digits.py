"""Real images at 2 and 3 bits: a Flax NNX network in float, rounded after training, and trained through the rounding.

python examples/qat_digits.py            half a minute on 2 cores; shows accuracies, writes docs/qat_digits.*
python examples/qat_digits.py --smoke    a few steps, to see that it runs
"""

import argparse
import dataclasses
import functools
import json
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import matplotlib
import numpy as np
import optax
from flax import nnx
from rich.console import Console
from rich.progress import track
from rich.table import Table
from sklearn.datasets import load_digits

import jaxquant as jq

matplotlib.use("Agg")
from matplotlib import pyplot

DOCS = Path(__file__).parent.parent / "docs"
WEIGHTS = {"int3": jq.int3, "int2": jq.int2}
ACTIVATIONS = jq.int4
BATCH, FLOAT_EPOCHS, QAT_EPOCHS, FLOAT_RATE, QAT_RATE = 64, 30, 30, 2e-3, 1e-3


class Cnn(nnx.Module):
    """Two convolutions, a pool and two dense layers on images of 8 x 8."""

    def __init__(self, rngs: nnx.Rngs):
        self.conv1 = nnx.Conv(1, 16, (3, 3), rngs=rngs)
        self.conv2 = nnx.Conv(16, 32, (3, 3), rngs=rngs)
        self.hidden = nnx.Linear(512, 64, rngs=rngs)
        self.out = nnx.Linear(64, 10, rngs=rngs)

    def __call__(self, x: jax.Array) -> jax.Array:
        """Logits of ten digits for `x[batch, 8, 8, 1]`."""
        x = nnx.relu(self.conv1(x))
        x = nnx.max_pool(nnx.relu(self.conv2(x)), (2, 2), (2, 2))
        return self.out(nnx.relu(self.hidden(x.reshape(len(x), -1))))


@dataclasses.dataclass(frozen=True)
class Digits:
    """Images `[n, 8, 8, 1]` from 0 to 1, and what they show; a fifth is held out."""

    train: tuple[np.ndarray, np.ndarray]
    test: tuple[np.ndarray, np.ndarray]


def digits() -> Digits:
    """The 1797 handwritten digits of scikit-learn, in a fixed random order."""
    images, labels = load_digits(return_X_y=True)
    order = np.random.default_rng(0).permutation(len(images))
    images, labels = images[order].reshape(-1, 8, 8, 1).astype(np.float32) / 16, labels[order].astype(np.int32)
    held_out = len(images) // 5
    return Digits((images[held_out:], labels[held_out:]), (images[:held_out], labels[:held_out]))


def batches(data: tuple[np.ndarray, np.ndarray], epochs: int, seed: int = 1):
    """Shuffled minibatches of equal size."""
    images, labels = data
    random = np.random.default_rng(seed)
    for _ in range(epochs):
        order = random.permutation(len(images))
        for start in range(0, len(images) - BATCH + 1, BATCH):
            chosen = order[start : start + BATCH]
            yield images[chosen], labels[chosen]


def train(
    forward: Callable,
    params: Any,
    data: Digits,
    epochs: int,
    rate: float,
    title: str,
    console: Console,
    adamw: Callable = optax.adamw,
) -> tuple[Any, list[float]]:
    """Minimises the cross entropy of `forward(params, images, key)` with AdamW; also returns the loss of each step."""
    steps = epochs * (len(data.train[0]) // BATCH)
    optimizer = adamw(optax.cosine_decay_schedule(rate, steps), weight_decay=1e-4)

    def loss(params: Any, images: jax.Array, labels: jax.Array, key: jax.Array) -> jax.Array:
        return optax.softmax_cross_entropy_with_integer_labels(forward(params, images, key), labels).mean()

    @jax.jit
    def step(params: Any, state: Any, images: jax.Array, labels: jax.Array, key: jax.Array) -> tuple[Any, Any, Any]:
        value, gradient = jax.value_and_grad(loss)(params, images, labels, key)
        updates, state = optimizer.update(gradient, state, params)
        return optax.apply_updates(params, updates), state, value

    state, losses = optimizer.init(params), []
    key = jax.random.key(0)
    for images, labels in track(batches(data.train, epochs), title, steps, console=console, transient=True):
        key, now = jax.random.split(key)
        params, state, value = step(params, state, images, labels, now)
        losses.append(value)
    return params, [float(value) for value in losses]


def accuracy(forward: Callable, params: Any, data: tuple[np.ndarray, np.ndarray]) -> float:
    """The share of images whose largest logit is the right one."""
    images, labels = data
    return float(jnp.mean(jnp.argmax(jax.jit(forward)(params, images), -1) == labels))


def run(options: argparse.Namespace, console: Console) -> dict[str, Any]:
    """Trains, rounds, trains through the rounding, and shows how much of what rounding lost came back."""
    data = digits()
    float_epochs, qat_epochs = (1, 1) if options.smoke else (FLOAT_EPOCHS, QAT_EPOCHS)
    graph, params = nnx.split(Cnn(nnx.Rngs(0)))

    def apply(params: nnx.State, images: jax.Array) -> jax.Array:
        return nnx.merge(graph, params)(images)

    def in_integers(params: nnx.State, images: jax.Array, key: jax.Array) -> jax.Array:
        return jq.qat(apply, jq.int8, gradients=jq.int8, key=key)(params, images)

    def ignoring_key(forward: Callable) -> Callable:
        return lambda params, images, key: forward(params, images)

    fresh = functools.partial(train, params=params, data=data, epochs=float_epochs, rate=FLOAT_RATE, console=console)
    integers, int8_losses = fresh(in_integers, title="int8")
    small, small_losses = fresh(ignoring_key(apply), title="adamw8bit", adamw=jq.adamw8bit)
    params, losses = fresh(ignoring_key(apply), title="float")
    curves = {"float": losses, "int8 forward and backward": int8_losses, "float, adamw8bit": small_losses}
    kernels = {"float": np.asarray(params["conv2"]["kernel"][...])}
    results: dict[str, Any] = {"float": accuracy(apply, params, data.test)}
    results["adamw8bit"] = accuracy(apply, small, data.test)
    results["int8"] = accuracy(jq.quantized(apply), jq.quantize_params(integers), data.test)
    for name, format in WEIGHTS.items():
        quantizer = jq.rtn(format, jq.least_squares)
        serve = jq.quantized(apply, activations=ACTIVATIONS)
        nearest = accuracy(serve, jq.quantize_params(params, format), data.test)
        searched = accuracy(serve, jq.quantize_params(params, quantizer), data.test)
        forward = jq.qat(apply, quantizer, activations=ACTIVATIONS)
        tuned, losses = train(ignoring_key(forward), params, data, qat_epochs, QAT_RATE, f"{name} qat", console)
        curves[f"{name} weights, through the rounding"] = losses
        kernels[name] = np.asarray(tuned["conv2"]["kernel"][...])
        served = accuracy(serve, jq.quantize_params(tuned, quantizer), data.test)
        results[name] = {"nearest": nearest, "searched range": searched, "qat": served}
    show(results, console)
    out = options.out or (Path(tempfile.mkdtemp()) if options.smoke else DOCS)
    out.mkdir(parents=True, exist_ok=True)
    (out / "qat_digits.json").write_text(json.dumps(results, indent=1))
    plot(curves, kernels, out / "qat_digits.png")
    return results


def show(results: dict[str, Any], console: Console) -> None:
    """Prints the accuracies."""
    table = Table("weights, 4-bit activations", "nearest", "searched range", "qat", "qat recovers")
    for name, row in results.items():
        if name in WEIGHTS:
            lost, back = results["float"] - row["searched range"], row["qat"] - row["searched range"]
            recovered = f"{back / lost:.0%} of what the searched range lost" if lost > 0 else "nothing was lost"
            table.add_row(name, *(f"{share:.1%}" for share in row.values()), recovered)
    console.print(f"float: {results['float']:.1%} of the held-out digits are recognized", table)
    console.print(f"trained from the start with int8 matmuls forward and backward: {results['int8']:.1%}")
    console.print(f"trained in float with adamw8bit: {results['adamw8bit']:.1%}")


def plot(curves: dict[str, list[float]], kernels: dict[str, np.ndarray], path: Path) -> None:
    """Draws the losses, and the weights of one convolution before and after."""
    figure, (left, *others) = pyplot.subplots(1, 1 + len(kernels), figsize=(4 * (1 + len(kernels)), 3.2))
    for name, losses in curves.items():
        smooth = np.convolve(losses, np.ones(20) / 20, mode="valid") if len(losses) > 40 else losses
        left.semilogy(smooth, label=name)
    left.set(xlabel="step", ylabel="cross entropy, mean of 20 steps")
    left.legend(fontsize=7)
    for axes, (name, kernel) in zip(others, kernels.items(), strict=True):
        scaled = kernel / np.abs(kernel).max((0, 1, 2))  # each output channel by its largest weight
        axes.hist(scaled.ravel(), bins=101, color="C0" if name == "float" else "C1")
        axes.set(title=f"conv2, {'float training' if name == 'float' else f'after {name} qat'}", xlabel="w / max|w|")
    figure.tight_layout()
    figure.savefig(path, dpi=110)
    pyplot.close(figure)


def parse(arguments: list[str] | None = None) -> argparse.Namespace:
    """Reads the command line."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path, help="where results are kept (default: docs; of --smoke, nowhere)")
    parser.add_argument("--smoke", action="store_true", help="a few steps, to see that it runs")
    return parser.parse_args(arguments)


if __name__ == "__main__":
    run(parse(), Console())
