"""What `quantized` adds before a function's first call: the time to trace and to compile, as ratios to the plain one.

python benchmarks/tracing.py
"""

import functools
import gc
import time
from collections.abc import Callable
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import measure
from rich.console import Console
from rich.table import Table

import jaxquant as jq

LAYERS, WIDTH = 12, 64
STAGES = ("trace", "compile")
RUNS, SECONDS = 9, 120.0
CASES = {
    "W8A8": (jq.int8, jq.int8),
    "W8": (jq.int8, None),
    "W4A8 g16": (jq.int4(group=16), jq.int8),
    "NF4 g16": (jq.nf4(group=16), None),
}


class Transformer(nn.Module):
    """Twelve unrolled layers, as a model that traces slowly has."""

    @nn.compact
    def __call__(self, tokens):
        embed = nn.Embed(128, WIDTH)
        x = embed(tokens)
        for _ in range(LAYERS):
            x = x + nn.MultiHeadDotProductAttention(4)(nn.LayerNorm()(x))
            x = x + nn.Dense(WIDTH)(nn.gelu(nn.Dense(4 * WIDTH)(nn.LayerNorm()(x))))
        return embed.attend(nn.LayerNorm()(x))


def stages(fn: Callable[..., Any], *args: Any) -> dict[str, float]:
    """The seconds to trace, and to lower and compile, a function JAX has not seen before."""
    gc.collect()  # now, rather than in whichever stage it would fall
    start = time.perf_counter()
    traced = jax.jit(lambda *inputs: fn(*inputs)).trace(*args)
    middle = time.perf_counter()
    traced.lower().compile()
    return dict(zip(STAGES, (middle - start, time.perf_counter() - middle), strict=True))


def main() -> None:
    """Prints one line per format."""
    options, console = measure.options(__doc__, "tracing", RUNS, SECONDS).parse_args(), Console()
    model, tokens = Transformer(), jnp.zeros((1, 16), jnp.int32)
    params = model.init(jax.random.key(0), tokens)
    passes = {"float32": functools.partial(stages, model.apply, params, tokens)}
    for name, (format, activations) in CASES.items():
        ours, qparams = jq.quantized(model.apply, activations=activations), jq.quantize_params(params, format)
        passes[name] = functools.partial(stages, ours, qparams, tokens)
    measure.turns(passes, 1)
    times = measure.turns(passes, options.runs, options.seconds)
    shown = Table("before the first call", title=measure.title(f"{LAYERS} layers of a transformer"))
    for part in STAGES:
        shown.add_column(f"{part}, ms", justify="right")
        shown.add_column("of plain", justify="right")
    for name, parts in times.items():
        ratios = {part: parts[part] / times["float32"][part] for part in STAGES}
        shown.add_row(name, *(cell for part in STAGES for cell in (f"{1e3 * parts[part]:.0f}", f"{ratios[part]:.2f}")))
    console.print(shown)
    measure.write(options.json, times, console)


if __name__ == "__main__":
    main()
