"""SmolLM2-135M learns to live with 3-bit or 2-bit weights and int8 activations, taught by its float self.

python examples/qat_smollm2.py               3 bits in groups of 32; a quarter of an hour on 2 cores
python examples/qat_smollm2.py --bits 2      2 bits
python examples/qat_smollm2.py --steps 2000 --accumulate 4 --window 512 --remat      hours, and better
python examples/qat_smollm2.py --smoke       two steps of two blocks on a few tokens

    loss = KL( softmax(float logits) || softmax(logits of the quantized model) )      over CPython's documentation

Weights start in the range of the least squared error and train through the rounding, and so do the steps of their
codes. A checkpoint is written now and then; the same command goes on from it.
"""

import argparse
import dataclasses
import functools
import json
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import matplotlib.pyplot as plt
import numpy as np
import optax
import orbax.checkpoint as ocp
import texts
from command_line import ended
from flax import linen as nn
from llama import Block, Llama, first_blocks, is_kernel
from llama_gguf import fetch_smollm2, load_llama, load_tokenizer
from rich.console import Console
from rich.progress import track
from rich.table import Table

import jaxquant as jq

DOCS = Path(__file__).parent.parent / "docs"
CACHE = Path.home() / ".cache" / "jaxquant"
GROUP, CALIBRATION = 32, 16
# Learning rates of weights and of steps: what two bits can be moved by is more than three bits can bear.
RATES = {3: (3e-5, 1e-4), 2: (1e-4, 3e-4)}


def only_learned(path: str, array: Any) -> bool:
    """Nothing but the leaves whose steps are learned, which are quantized in any case."""
    del path, array
    return False


@dataclasses.dataclass(frozen=True)
class Task:
    """The float model, what it is taught and scored on, and the format it is brought to."""

    params: Any
    apply: Callable[..., jax.Array]
    lessons: np.ndarray
    scored: dict[str, np.ndarray]
    format: jq.Format


def prepare(options: argparse.Namespace) -> Task:
    """Loads the model and the texts."""
    path = fetch_smollm2()
    (config, params), tokenizer = load_llama(path), load_tokenizer(path)
    if options.smoke:
        config, params = first_blocks(config, params, 2)
    model = Llama(config, nn.remat(Block) if options.remat else Block)
    held_out, lessons = texts.documentation(tokenizer)
    count, length = (1, 64) if options.smoke else (texts.HELD_OUT, texts.WINDOW)
    kinds = {"in domain": held_out, "other kind": texts.encyclopedia(tokenizer)}
    scored = {kind: windows[:count, None, :length] for kind, windows in kinds.items()}
    format = jq.Format(options.bits, group=GROUP, symmetric=False)
    return Task(params, lambda params, tokens: model.apply(params, tokens)[0], lessons, scored, format)


def score(task: Task, qparams: Any) -> dict[str, dict[str, float]]:
    """The quantized model beside the float one, on every kind of text."""
    teacher, student = jax.jit(task.apply), jax.jit(jq.quantized(task.apply))
    models = functools.partial(teacher, task.params), functools.partial(student, qparams)
    return {kind: dataclasses.asdict(jq.divergence(*models, windows)) for kind, windows in task.scored.items()}


def make_optimizer(tree: Any, options: argparse.Namespace) -> optax.GradientTransformation:
    """Adam at one rate for weights and one for steps; the tied embedding and the zero points stay."""

    def kind(path: Any, leaf: Any) -> str:
        del leaf
        name = jax.tree_util.keystr(path)
        if "embedding" in name or name.endswith(".zero"):
            return "still"
        return "step" if "kernel" in name and name.endswith(".scale") else "weight"

    def adam(rate: float) -> optax.GradientTransformation:
        updates = max(options.steps // options.accumulate, 1)
        return optax.adam(optax.warmup_cosine_decay_schedule(0.0, rate, updates // 10, updates, 0.05 * rate), b2=0.95)

    weight, step = RATES[options.bits]
    kinds = {"weight": adam(weight), "step": adam(step), "still": optax.set_to_zero()}
    optimizer = optax.multi_transform(kinds, jax.tree_util.tree_map_with_path(kind, tree))
    return optax.MultiSteps(optimizer, options.accumulate).gradient_transformation()


def make_step(task: Task, optimizer: optax.GradientTransformation) -> Callable:
    """`(tree, state, params, tokens) -> (tree, state, loss)`, compiled, in place."""
    student = jq.qat(task.apply, task.format, where=only_learned)

    def loss(tree: Any, params: Any, tokens: jax.Array) -> jax.Array:
        taught = jax.nn.log_softmax(task.apply(params, tokens))
        return jnp.mean(optax.losses.kl_divergence_with_log_targets(jax.nn.log_softmax(student(tree, tokens)), taught))

    @functools.partial(jax.jit, donate_argnums=(0, 1))
    def step(tree: Any, state: Any, params: Any, tokens: jax.Array) -> tuple[Any, Any, jax.Array]:
        value, gradient = jax.value_and_grad(loss)(tree, params, tokens)
        updates, state = optimizer.update(gradient, state, tree)
        return optax.apply_updates(tree, updates), state, value

    return step


def lesson(task: Task, number: int, length: int) -> np.ndarray:
    """The tokens of one step, the same whenever it is taken."""
    random = np.random.default_rng(number)
    window = task.lessons[random.integers(len(task.lessons))]
    start = random.integers(texts.WINDOW - length + 1)
    return window[None, start : start + length]


def train(task: Task, tree: Any, options: argparse.Namespace, console: Console) -> tuple[Any, list[float]]:
    """Takes all steps that no checkpoint has yet; also returns the loss of each."""
    tree = jax.tree.map(jnp.copy, tree)  # which each step consumes; the teacher holds on to the same arrays
    optimizer = make_optimizer(tree, options)
    step, state, losses = make_step(task, optimizer), optimizer.init(tree), np.zeros(options.steps, np.float32)
    name = f"w{options.bits}-{options.steps}x{options.window}x{options.accumulate}"
    folder = (options.checkpoints or CACHE / "qat_smollm2").resolve() / name
    with ocp.CheckpointManager(folder, options=ocp.CheckpointManagerOptions(max_to_keep=1)) as manager:
        begin = manager.latest_step() or 0
        if begin:
            target = jax.tree.map(ocp.utils.to_shape_dtype_struct, (tree, state, losses))
            tree, state, losses = manager.restore(begin, args=ocp.args.StandardRestore(target))
            console.print(f"going on from step {begin} of {folder}")
        losses, start = np.array(losses), time.perf_counter()
        for number in _followed(begin, options.steps, console):
            tree, state, value = step(tree, state, task.params, lesson(task, number, options.window))
            losses[number] = value
            done = number + 1
            if done % options.show == 0:
                speed = (done - begin) * options.window / (time.perf_counter() - start)
                recent = losses[max(done - options.show, 0) : done].mean()
                console.print(f"step {done:5d}   loss {recent:.3f}   {speed:.0f} tokens/s")
            if done % options.save == 0 or done == options.steps:
                manager.save(done, args=ocp.args.StandardSave((tree, state, losses)))
    return tree, losses.tolist()


def _followed(begin: int, end: int, console: Console) -> Iterator[int]:
    return iter(track(range(begin, end), "Training", console=console, transient=True))


def run(options: argparse.Namespace, console: Console) -> None:
    """Rounds, searches ranges, trains; scores each on text that was not trained on."""
    task = prepare(options)
    batches = [
        jnp.asarray(window[None, : options.window]) for window in task.lessons[:: len(task.lessons) // CALIBRATION]
    ]
    batches = batches[:1] if options.smoke else batches
    stats = jq.calibrate(task.apply, task.params, batches, where=is_kernel)
    searched = jq.rtn(task.format, jq.least_squares)
    tree = jq.learn_steps(task.params, searched, stats=stats, where=is_kernel)
    del stats
    rounded = jq.quantize_params(task.params, task.format, where=is_kernel)
    results = {"rounding": score(task, rounded)}
    results["least squares"] = score(task, jq.quantize_params(tree, task.format, where=only_learned))
    start = time.perf_counter()
    tree, losses = train(task, tree, options, console)
    seconds = time.perf_counter() - start
    results["qat"] = score(task, jq.quantize_params(tree, task.format, where=only_learned))
    show(results, console)
    out = options.out or (Path(tempfile.mkdtemp()) if options.smoke else DOCS)
    out.mkdir(parents=True, exist_ok=True)
    settings = {name: getattr(options, name) for name in ("bits", "steps", "window", "accumulate")}
    record = {"settings": settings, "seconds": seconds, "scores": results, "losses": losses}
    (out / f"qat_smollm2_w{options.bits}.json").write_text(json.dumps(record, indent=1))
    plot(losses, options, out / f"qat_smollm2_w{options.bits}.png")


def show(results: dict[str, Any], console: Console) -> None:
    """A table of perplexities, of the share R of rounding's loss gap that is closed, and of divergences."""
    table = Table("weights", *(f"{kind}: {what}" for kind in results["qat"] for what in ("perplexity", "R", "KL")))
    for name, scores in results.items():
        cells = []
        for kind, one in scores.items():
            share = 1 - one["loss_gap"] / results["rounding"][kind]["loss_gap"]
            cells += [f"{one['perplexity']:.2f}", f"{share:.0%}", f"{one['kl']:.3f} ± {one['kl_error']:.3f}"]
        table.add_row(name, *cells)
    floats = ", ".join(f"{one['reference_perplexity']:.2f} {kind}" for kind, one in results["qat"].items())
    console.print(f"perplexity of the float model: {floats}", table)


def plot(losses: list[float], options: argparse.Namespace, path: Path) -> None:
    """Draws the loss of every step, and its running mean."""
    figure, axes = plt.subplots(figsize=(6, 3.2))
    width = max(len(losses) // 12, 1)
    axes.semilogy(losses, color="C0", alpha=0.3)
    axes.semilogy(np.arange(width - 1, len(losses)), np.convolve(losses, np.ones(width) / width, "valid"), color="C0")
    axes.set(xlabel=f"step of {options.window} tokens", ylabel="KL to the float model", title=f"{options.bits} bits")
    figure.tight_layout()
    figure.savefig(path, dpi=110)
    plt.close(figure)


def parse(arguments: list[str] | None = None) -> argparse.Namespace:
    """Reads the command line."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--bits", type=int, choices=sorted(RATES), default=3, help="of the weights (default: 3)")
    parser.add_argument("--steps", type=int, default=240, help="gradients to take (default: 240)")
    parser.add_argument("--window", type=int, default=256, help="tokens in each, up to 512 (default: 256)")
    parser.add_argument("--accumulate", type=int, default=1, help="gradients to each update (default: 1)")
    parser.add_argument("--remat", action="store_true", help="keep no activations inside the layers")
    parser.add_argument("--save", type=int, default=120, help="steps between checkpoints (default: 120)")
    parser.add_argument("--show", type=int, default=20, help="steps between lines of progress (default: 20)")
    parser.add_argument("--checkpoints", type=Path, help="where they are kept (default: ~/.cache/jaxquant)")
    parser.add_argument("--out", type=Path, help="where results are kept (default: docs; of --smoke, nowhere)")
    parser.add_argument(
        "--smoke", action="store_true", help="two steps of two blocks on a few tokens, to see that it runs"
    )
    options = parser.parse_args(arguments)
    if options.smoke:
        options.steps, options.window, options.accumulate, options.show = 2, 32, 2, 1
        options.checkpoints = options.checkpoints or Path(tempfile.mkdtemp())
    return options


if __name__ == "__main__":
    sys.exit(ended(lambda: run(parse(), Console())))
