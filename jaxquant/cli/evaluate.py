"""`jaxquant eval`: the perplexity of a Llama in a GGUF file, as it is and quantized anew."""

import functools
import pydoc_data.topics
from pathlib import Path

import jax
import numpy as np

from jaxquant import table
from jaxquant.cli.llama import logits, read
from jaxquant.cli.tokenizer import tokenizer_of
from jaxquant.errors import FileError, OptionError
from jaxquant.evaluate import divergence
from jaxquant.files import load_gguf
from jaxquant.files.gguf.file import Gguf
from jaxquant.format import Format
from jaxquant.params import quantize_params
from jaxquant.transforms.quantized import quantized
from jaxquant.turned import dequantize

_WINDOW = 512  # tokens


def evaluate(path: Path, text: Path | None, windows: int, format: Format) -> None:
    """Prints the perplexity of the model, and that of its weights in `format`, on the same tokens.

    Raises:
      FileError: the file holds no such model, or is damaged.
      OptionError: the text is too short.
      OSError: a file cannot be read.
    """
    file = load_gguf(path)
    shape, weights = read(file)
    words = _text(text) if text else "\n".join(pydoc_data.topics.topics.values())
    batches = _windows(_tokens(file, words), windows)
    floats = dequantize(weights)
    codes = quantize_params(floats, format, where=lambda _, w: w.ndim == 2)
    forward = jax.jit(functools.partial(logits, shape))
    rounded = jax.jit(quantized(functools.partial(logits, shape), activations=None))
    measured = divergence(
        functools.partial(forward, floats), functools.partial(rounded, codes), [window[None] for window in batches]
    )
    rows = [
        ("as it is", f"{measured.reference_perplexity:.3f}", ""),
        (str(format), f"{measured.perplexity:.3f}", f"{measured.kl:.4f}"),
    ]
    print("\n".join(table.lines(("weights", "perplexity", "KL"), rows)))
    print(f"on {windows} x {_WINDOW} tokens; activations in float")


def _text(path: Path) -> str:
    try:
        return path.read_bytes().decode()
    except UnicodeDecodeError as error:
        raise FileError(f"{path}: it is not UTF-8: {error}. Give a text as --text.") from error


def _tokens(file: Gguf, words: str) -> list[int]:
    path, embedding = file.tensors.path, file.entries["token_embd.weight"]
    tokens = tokenizer_of(file.metadata, str(path)).encode(words).ids
    last = max(tokens, default=0)
    if last >= embedding.shape[0]:  # JAX would take the last row in its place
        what = f"its tokenizer gives token {last}, and 'token_embd.weight' has {embedding.shape[0]} rows"
        raise FileError(f"{path}: {what}. Convert the model anew.")
    return tokens


def _windows(tokens: list[int], windows: int) -> np.ndarray:
    if windows < 1 or len(tokens) < windows * _WINDOW:
        raise OptionError(f"--windows {windows}: the text has {len(tokens) // _WINDOW} windows of {_WINDOW} tokens.")
    return np.asarray(tokens[: windows * _WINDOW], np.int32).reshape(windows, _WINDOW)
