"""Where a step of decoding goes: SmolLM2 at one token, whole, and cut down to its parts.

python benchmarks/decoding.py

The parts are programs of their own: all linear layers one after the other, with a sum between them that uses all they
give, and attention alone over a cache of the same length. What is left is norms, rotations, residuals, writing the
cache, and dispatching every operation that XLA did not fuse.
"""

import functools
import re
import sys
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import measure
from rich.console import Console
from rich.table import Table

sys.path.insert(0, str(Path(__file__).parent.parent / "examples"))

from generation import generate, generate_step
from llama import KVCache, Llama, LlamaConfig, attend, fused
from llama_gguf import fetch_smollm2, load_llama

import jaxquant as jq

LENGTH, AT_ONCE, RUNS, SECONDS = 640, 8, 31, 60

IN_A_LOOP = "step of a loop on the device"


def linear_layers(config: LlamaConfig, params: Any, x: jax.Array) -> jax.Array:
    """Every matmul of a step, each on something that depends on all that the one before it gave."""

    def narrowed(x: jax.Array, width: int) -> jax.Array:
        return x[..., :width] + jnp.sum(x[..., width:], axis=-1, keepdims=True)

    tree = params["params"]
    for layer in range(config.layers):
        attention, mlp = tree[f"block_{layer}"]["attention"], tree[f"block_{layer}"]["mlp"]
        x = narrowed(x @ attention["query_key_value"]["kernel"], config.width) @ attention["output"]["kernel"]
        x = narrowed(x @ mlp["gate_up"]["kernel"], config.hidden) @ mlp["down"]["kernel"]
    return x @ tree["embed"]["embedding"].T


def attentions(config: LlamaConfig, cache: KVCache, queries: jax.Array) -> jax.Array:
    """The attention of every layer, each with what the one before it gave."""
    for layer in cache.layers:
        queries = attend(queries, layer.keys, layer.values, cache.position)
    return queries


def operations(compiled: Any) -> int:
    """The operations of a compiled program that are dispatched one by one."""
    entry = compiled.as_text().split("ENTRY")[1]
    names = re.findall(r"^\s+(?:ROOT )?%\S+ = .*? ([\w-]+)\(", entry, flags=re.MULTILINE)
    free = {"parameter", "constant", "bitcast", "tuple", "get-tuple-element"}
    return sum(name not in free for name in names)


def parts(config: LlamaConfig, params: Any, serve: Any) -> dict[str, tuple[Any, tuple[Any, ...]]]:
    """The compiled programs of one way to serve the model, with their arguments."""
    model, cache = serve(Llama(config).apply), KVCache.empty(config, 1, LENGTH)
    token, x = jnp.zeros((1, 1), jnp.int32), jnp.ones((1, config.width))
    queries = jnp.ones((1, 1, config.heads, config.head_width))
    programs = {
        "whole step": (functools.partial(generate_step, model), (params, token, cache)),
        IN_A_LOOP: (functools.partial(generate, model, count=AT_ONCE), (params, token, cache)),
        "linear layers": (serve(functools.partial(linear_layers, config)), (params, x)),
        "attention": (functools.partial(attentions, config), (cache, queries)),
    }
    return {name: (jax.jit(fn).lower(*args).compile(), args) for name, (fn, args) in programs.items()}


def main() -> None:
    """Prints milliseconds and operations of each part."""
    options, console = measure.options(__doc__, "decoding", RUNS, SECONDS).parse_args(), Console()
    config, params = fused(*load_llama(fetch_smollm2()))
    served = {
        "float32": parts(config, params, lambda fn: fn),
        "W8A8 turned": parts(config, jq.turned(jq.quantize_params(params)), jq.quantized),
    }
    calls = {
        f"{name}, {part}": functools.partial(program, *args)
        for name, programs in served.items()
        for part, (program, args) in programs.items()
    }
    times = measure.medians(calls, options.runs, options.seconds)
    times = {name: seconds / (AT_ONCE if name.endswith(IN_A_LOOP) else 1) for name, seconds in times.items()}
    counts = {f"{name}, {part}": operations(served[name][part][0]) for name in served for part in served[name]}
    shown = Table("one token", title=measure.title(f"SmolLM2-135M, a cache of {LENGTH}"))
    for heading in ("ms", "operations"):
        shown.add_column(heading, justify="right")
    for name, seconds in times.items():
        shown.add_row(name, f"{1e3 * seconds:.2f}", str(counts[name]))
    console.print(shown)
    found = [{"part": name, "milliseconds": 1e3 * times[name], "operations": counts[name]} for name in times]
    measure.write(options.json, found, console)


if __name__ == "__main__":
    main()
