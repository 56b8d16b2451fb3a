"""How fast parameters are quantized, next to copying them, and what importing jaxquant takes beyond importing JAX.

python benchmarks/quantizing.py
"""

import functools
import subprocess
import sys
from typing import Any

import jax
import measure
import numpy as np
from rich.console import Console
from rich.table import Table

import jaxquant as jq

# Sixteen matrices of a 1B model's feed-forward layers: 512 MiB.
LAYERS, INPUTS, OUTPUTS = 16, 2048, 4096
FORMATS = {"W8": jq.int8, "W4 g64": jq.int4(group=64), "NF4 g64": jq.nf4}
RUNS, SECONDS = 9, 60.0


def quantizing(options: Any, console: Console) -> list[dict[str, Any]]:
    """Gigabytes of float32 a second, for every format and for two copies that read the same and write it all."""
    keys = jax.random.split(jax.random.key(0), LAYERS)
    params = {f"kernel_{layer}": jax.random.normal(key, (INPUTS, OUTPUTS)) for layer, key in enumerate(keys)}
    arrays, copy = {name: np.array(leaf) for name, leaf in params.items()}, jax.jit(lambda x: x + 0)
    calls = {
        "numpy copy": lambda: jax.tree.map(np.copy, arrays),
        "jitted x + 0": lambda: jax.tree.map(copy, params),
        **{name: functools.partial(jq.quantize_params, params, format) for name, format in FORMATS.items()},
    }
    check(params)
    times = measure.medians(calls, options.runs, options.seconds)
    size = sum(leaf.nbytes for leaf in params.values()) / 1e9
    fastest = min(times["numpy copy"], times["jitted x + 0"])
    shown = Table("quantize_params", title=measure.title(f"{LAYERS} x {INPUTS} x {OUTPUTS} in float32, {size:.2f} GB"))
    for heading in ("GB/s", "of the faster copy"):
        shown.add_column(heading, justify="right")
    for name, seconds in times.items():
        shown.add_row(name, f"{size / seconds:.2f}", f"{fastest / seconds:.2f}", end_section=name == "jitted x + 0")
    console.print(shown)
    return [{"contender": name, "gigabytes_per_second": size / seconds} for name, seconds in times.items()]


def check(params: dict[str, jax.Array]) -> None:
    """That what is timed quantizes: one matrix comes back with the error its format has."""
    leaf = {"kernel_0": params["kernel_0"]}
    back = {name: jq.dequantize(jq.quantize_params(leaf, format))["kernel_0"] for name, format in FORMATS.items()}
    values = {"float32": leaf["kernel_0"]} | back
    measure.errors({name: lambda value=value: value for name, value in values.items()})


def importing(options: Any, console: Console) -> dict[str, float]:
    """Seconds of fresh processes that import one thing, in turns."""
    commands = {"python alone": "", "jax": "import jax", "jaxquant": "import jaxquant"}
    run = functools.partial(subprocess.run, check=True)
    calls = {name: functools.partial(run, [sys.executable, "-c", code]) for name, code in commands.items()}
    times = measure.medians(calls, options.runs)
    shown = Table("a process that imports", title=measure.title("importing"))
    for heading in ("seconds", "of jax alone"):
        shown.add_column(heading, justify="right")
    for name, seconds in times.items():
        shown.add_row(name, f"{seconds:.3f}", f"{seconds / times['jax']:.2f}")
    console.print(shown)
    return times


def main() -> None:
    """Prints both tables."""
    options, console = measure.options(__doc__, "quantizing", RUNS, SECONDS).parse_args(), Console()
    results = {"quantizing": quantizing(options, console), "import_seconds": importing(options, console)}
    measure.write(options.json, results, console)


if __name__ == "__main__":
    main()
