"""What quantization does to a real model: size, quality and speed of SmolLM2-135M-Instruct in several formats.

python examples/smollm2.py
python examples/smollm2.py --formats int8,int4 --prompt "Why is the sky blue?" --text book.txt
"""

import argparse
import dataclasses
import functools
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from pydoc_data.topics import topics
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from command_line import ended
from generation import generate, generate_step
from llama import KVCache, LayerCache, Llama, LlamaConfig, fused
from llama_gguf import InputError, chat_prompt, fetch_smollm2, load_llama, load_tokenizer, stream
from rich.console import Console, Group
from rich.live import Live
from rich.progress import Progress, track
from rich.table import Table
from tokenizers import Tokenizer

import jaxquant as jq

FORMATS = {
    "float32": None,
    "int8": jq.int8,
    "int4": jq.int4(group=64, symmetric=False),
    "int3": jq.int3(group=64, symmetric=False),
    "nf4": jq.nf4,
    "fp8": jq.fp8,
}
# A few inputs of a Llama's layers are many times the others, and far to one side: with a zero point, and the largest
# input of each token in float, int8 stays within 1 % of float's perplexity; without, it is 4 % above.
ARITHMETIC = {"activations": jq.int8(symmetric=False), "outliers": 1}
WINDOW = 512
CACHE = 640
# What a layer remembers keys and values in.
CACHES = {
    "float32": LayerCache.empty,
    "int8": functools.partial(jq.KVCache.empty, format=jq.int8),
    "int4": functools.partial(jq.KVCache.empty, format=jq.int4(group=16, symmetric=False)),
}
ANSWER = 100
# How many tokens are decoded before the next look at them, and how often that is timed.
AT_ONCE, TIMED = 8, 4


@dataclasses.dataclass(frozen=True)
class Contender:
    """The model in one format, ready to run.

    Args:
      name: the format's name.
      params: the parameters, quantized or not.
      forward: `model.apply`, quantized or not, compiled.
      read: `generate_step` of the same, compiled, with the cache updated in place.
      decode: `generate` of the same, likewise.
      empty_cache: makes a cache for them.
      decode_speed: tokens a second, one at a time.
    """

    name: str
    params: Any
    forward: Callable[..., Any]
    read: Callable[..., Any]
    decode: Callable[..., Any]
    empty_cache: Callable[[], KVCache]
    decode_speed: float

    @property
    def megabytes(self) -> float:
        """What the parameters take, QTensors counted with their scales."""
        leaves = jax.tree.leaves(self.params, is_leaf=lambda leaf: isinstance(leaf, jq.QTensor | jq.Turned))
        return sum(leaf.nbytes for leaf in leaves) / 1e6


@dataclasses.dataclass(frozen=True)
class Score:
    """How one format did on one window: means over its tokens, and the seconds its forward took."""

    nll: float
    kl: float
    agreement: float
    seconds: float


def prepare(name: str, config: LlamaConfig, params: Any, layer: Callable[..., Any]) -> Contender:
    """Quantizes the model, compiles its two programs (a whole window, some tokens one by one) and times the second."""
    whole, last = Llama(config).apply, Llama(config, last=True).apply
    if (chosen := FORMATS[name]) is not None:
        whole, last = (jq.quantized(apply, **ARITHMETIC) for apply in (whole, last))
        # Turned: in the order in memory that a CPU reads int8 fastest.
        params = jq.turned(jq.quantize_params(params, chosen))
    forward = jax.jit(whole)
    read = jax.jit(functools.partial(generate_step, last), donate_argnums=2)
    decode = jax.jit(functools.partial(generate, last, count=AT_ONCE), donate_argnums=2)

    def empty_cache() -> KVCache:
        return KVCache.empty(config, 1, CACHE, layer)

    jax.block_until_ready(forward(params, jnp.zeros((1, WINDOW), jnp.int32)))
    tokens, cache = decode(params, jnp.zeros((1, 1), jnp.int32), empty_cache())
    seconds = []
    for _ in range(TIMED):
        start = time.perf_counter()
        tokens, cache = jax.block_until_ready(decode(params, tokens[:, -1:], cache))
        seconds.append(time.perf_counter() - start)
    return Contender(name, params, forward, read, decode, empty_cache, AT_ONCE / float(np.median(seconds)))


@jax.jit
def compare(reference: jax.Array, logits: jax.Array, tokens: jax.Array) -> tuple[jax.Array, ...]:
    """The mean loss of `logits`, their KL from the reference's, and how often both choose the same token."""
    reference, log_probs = jax.nn.log_softmax(reference), jax.nn.log_softmax(logits)
    loss = -jnp.take_along_axis(log_probs[:, :-1], tokens[:, 1:, None], axis=-1).mean()
    kl = jnp.sum(jnp.exp(reference) * (reference - log_probs), axis=-1).mean()
    return loss, kl, jnp.mean(reference.argmax(-1) == log_probs.argmax(-1))


def score_window(contenders: list[Contender], tokens: jax.Array) -> Iterator[Score]:
    """Scores every format on one window against the first, whose logits are kept no longer than that."""
    reference = None
    for contender in contenders:
        start = time.perf_counter()
        logits, _ = jax.block_until_ready(contender.forward(contender.params, tokens))
        seconds = time.perf_counter() - start
        reference = logits if reference is None else reference
        yield Score(*(float(value) for value in compare(reference, logits, tokens)), seconds)


def table(contenders: list[Contender], scores: dict[str, list[Score]]) -> Table:
    """One row per format, over the windows scored so far."""
    shown = Table("format")
    for heading in ("MB", "perplexity", "KL", "top-1 agreement", "prompt tok/s", "decode tok/s"):
        shown.add_column(heading, justify="right")
    for contender in contenders:
        if not (done := scores[contender.name]):
            continue
        loss, kl, agreement, _ = np.mean([dataclasses.astuple(score) for score in done], axis=0)
        prompt_speed = WINDOW / np.median([score.seconds for score in done])
        shown.add_row(
            contender.name,
            f"{contender.megabytes:.1f}",
            f"{np.exp(loss):.2f}",
            f"{kl:.4f}",
            f"{agreement:.1%}",
            f"{prompt_speed:.0f}",
            f"{contender.decode_speed:.1f}",
        )
    return shown


def show_table(contenders: list[Contender], windows: jax.Array, console: Console) -> None:
    """Scores every format on every window, in a table that fills while one watches."""
    scores: dict[str, list[Score]] = {contender.name: [] for contender in contenders}
    progress = Progress(console=console)
    task = progress.add_task("Scoring", total=len(windows) * len(contenders))
    with Live(progress, console=console) as live:
        for window in windows:
            for contender, score in zip(contenders, score_window(contenders, window[None]), strict=True):
                scores[contender.name].append(score)
                progress.advance(task)
                live.update(Group(table(contenders, scores), progress))
        live.update(table(contenders, scores))
    console.print(f"{len(windows)} windows of {WINDOW} tokens; KL and agreement are against float32.", style="dim")
    if "int3" in scores:
        console.print("int3: in memory a 3-bit code takes 4 bits.", style="dim")


def answer(contender: Contender, tokenizer: Tokenizer, prompt: str, console: Console) -> Iterator[int]:
    """The tokens of a greedy answer to a chat prompt, one by one."""
    tokens = tokenizer.encode(chat_prompt(prompt), add_special_tokens=False).ids
    if len(tokens) + ANSWER > CACHE:
        raise InputError(f"the prompt is {len(tokens)} tokens long; at most {CACHE - ANSWER} fit. Shorten it.")
    with console.status(f"Reading {len(tokens)} tokens"):
        state = contender.read(contender.params, jnp.asarray([tokens]), contender.empty_cache())
        chosen, cache = jax.block_until_ready(state)
    stop = tokenizer.token_to_id("<|im_end|>")
    for _ in range(ANSWER // AT_ONCE):
        for token in chosen[0].tolist():
            if token == stop:
                return
            yield token
        chosen, cache = contender.decode(contender.params, chosen[:, -1:], cache)


def text_windows(tokenizer: Tokenizer, text: str, count: int) -> jax.Array:
    """The first `count` windows of a text, as many as it has."""
    tokens = tokenizer.encode(text, add_special_tokens=False).ids
    if not (count := min(count, len(tokens) // WINDOW)):
        raise InputError(f"the text is {len(tokens)} tokens long, less than one window of {WINDOW}. Give a longer one.")
    return jnp.asarray(tokens[: count * WINDOW], jnp.int32).reshape(count, WINDOW)


def held_out_text() -> str:
    """The help texts that every Python carries."""
    return "\n".join(topics[key] for key in sorted(topics))


def parse(arguments: list[str] | None = None) -> argparse.Namespace:
    """Reads the command line."""

    def formats(value: str) -> list[str]:
        names = value.split(",")
        if unknown := [name for name in names if name not in FORMATS]:
            raise argparse.ArgumentTypeError(f"{unknown[0]!r} is no format; choose from {', '.join(FORMATS)}")
        return ["float32", *(name for name in names if name != "float32")]

    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", type=Path, metavar="FILE", help="another Llama-architecture GGUF file")
    parser.add_argument("--text", type=Path, metavar="FILE", help="what to score on (default: pydoc_data.topics)")
    parser.add_argument("--windows", type=int, default=8, metavar="N", help=f"of {WINDOW} tokens each (default: 8)")
    parser.add_argument("--cache", choices=CACHES, default="float32", help="the cache's format (default: float32)")
    parser.add_argument("--prompt", default="What is quantization good for?", help="what to ask the int8 model")
    parser.add_argument(
        "--formats", type=formats, default=list(FORMATS), metavar="A,B", help=f"some of {', '.join(FORMATS)}"
    )
    return parser.parse_args(arguments)


def run(options: argparse.Namespace, console: Console) -> None:
    """Loads the model, shows the table, streams the answer."""
    text = options.text.read_text(encoding="utf-8") if options.text else held_out_text()
    path = options.model or fetch_smollm2()
    config, params = fused(*load_llama(path))
    with console.status("Building the tokenizer"):
        tokenizer = load_tokenizer(path)
    windows = text_windows(tokenizer, text, options.windows)
    names = track(options.formats, "Quantizing and compiling", console=console, transient=True)
    contenders = [prepare(name, config, params, CACHES[options.cache]) for name in names]
    show_table(contenders, windows, console)
    speaker = next((contender for contender in contenders if contender.name == "int8"), contenders[-1])
    console.print(f"\n[bold]{options.prompt}[/bold]  [dim]({speaker.name})[/dim]")
    for piece in stream(tokenizer, answer(speaker, tokenizer, options.prompt, console)):
        print(piece, end="", flush=True)
    print()


if __name__ == "__main__":
    sys.exit(ended(lambda: run(parse(), Console())))
