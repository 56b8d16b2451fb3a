"""What a cache of keys and values in codes costs SmolLM2-135M: perplexity, bytes and speed, against one in float32.

python benchmarks/cache.py

Perplexity is of 16 x 512 tokens of CPython's documentation, read through the cache 256 at a time, so that the second
half of each window attends to keys and values that were rounded; weights stay in float32.
"""

import functools
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from rich.console import Console
from rich.progress import track
from rich.table import Table

sys.path.insert(0, str(Path(__file__).parent.parent / "examples"))

import measure
import texts
from generation import generate
from llama import KVCache, LayerCache, Llama
from llama_gguf import fetch_smollm2, load_llama, load_tokenizer

import jaxquant as jq

HALF, AT_ONCE, RUNS = 256, 8, 24
CACHES = {
    "float32": LayerCache.empty,
    "int8": functools.partial(jq.KVCache.empty, format=jq.int8),
    "int4 affine": functools.partial(jq.KVCache.empty, format=jq.int4(symmetric=False)),
    "int4 g32 affine": functools.partial(jq.KVCache.empty, format=jq.int4(group=32, symmetric=False)),
    "int4 g16 affine": functools.partial(jq.KVCache.empty, format=jq.int4(group=16, symmetric=False)),
}


def losses(apply: Callable[..., Any], params: Any, windows: np.ndarray, empty: Callable[[], KVCache]) -> list[float]:
    """The mean loss of every window, read in two halves."""

    @jax.jit
    def read(params: Any, tokens: jax.Array, cache: KVCache) -> tuple[jax.Array, KVCache]:
        logits, cache = apply(params, tokens, cache)
        return jax.nn.log_softmax(logits), cache

    found = []
    for window in track(windows, "Reading", transient=True):
        cache, logs = empty(), []
        for half in (window[:HALF], window[HALF:]):
            log, cache = read(params, half[None], cache)
            logs.append(log[0])
        log = jnp.concatenate(logs)[:-1]
        found.append(-float(jnp.mean(jnp.take_along_axis(log, jnp.asarray(window[1:, None]), axis=-1))))
    return found


def decoder(apply: Callable[..., Any], params: Any, empty: Callable[[], KVCache]) -> measure.Call:
    """A call that decodes some tokens more in one go, the cache updated in place."""
    decode = jax.jit(functools.partial(generate, apply, count=AT_ONCE), donate_argnums=2)
    state = [decode(params, jnp.zeros((1, 1), jnp.int32), empty())]

    def more() -> jax.Array:
        tokens, cache = state.pop()
        state.append(decode(params, tokens[:, -1:], cache))
        return state[0][0]

    return more


def main() -> None:
    """Prints the table."""
    path = fetch_smollm2()
    (config, params), tokenizer = load_llama(path), load_tokenizer(path)
    apply, windows = Llama(config).apply, texts.documentation(tokenizer)[0]
    empties = {name: functools.partial(KVCache.empty, config, 1, texts.WINDOW, layer) for name, layer in CACHES.items()}
    perplexity = {name: np.exp(np.mean(losses(apply, params, windows, empty))) for name, empty in empties.items()}
    seconds = measure.medians({name: decoder(apply, params, empty) for name, empty in empties.items()}, RUNS)
    table = Table("cache", "bytes a token", "perplexity", "of float", "tokens/s")
    for name, empty in empties.items():
        size = sum(
            part.nbytes
            for part in jax.tree.leaves(empty().layers, is_leaf=lambda x: isinstance(x, jq.QTensor | jq.KVCache))
        )
        ratio = f"{perplexity[name] / perplexity['float32']:.4f} x"
        speed = f"{AT_ONCE / seconds[name]:.1f}"
        table.add_row(name, f"{size / texts.WINDOW:,.0f}", f"{perplexity[name]:.3f}", ratio, speed)
    Console().print(table)


if __name__ == "__main__":
    main()
