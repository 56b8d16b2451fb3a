"""One matmul in every format against float32, in one run: medians of alternating calls, as speed-ups over float32.

python benchmarks/matmul.py
python benchmarks/matmul.py --shape 1024x4096
"""

import argparse
import statistics
import time

import jax
import jax.numpy as jnp
from rich.console import Console
from rich.table import Table

import jaxquant as jq

ROWS = (1, 2, 8, 64, 512)
CASES = {
    "int8, int8 activations": (jq.int8, jq.int8),
    "int8, weight-only": (jq.int8, None),
    "int4, int8 activations": (jq.int4, jq.int8),
    "int4 g64, int8 activations": (jq.int4(group=64), jq.int8),
    "int4 g64, weight-only": (jq.int4(group=64), None),
    "nf4 g64, weight-only": (jq.nf4, None),
    "fp8, weight-only": (jq.fp8, None),
}
RUNS = 15


def multiply(w, x):
    """The matmul that is timed."""
    return x @ w


def medians(calls: dict) -> dict[str, float]:
    """The median seconds of each call, all of them taking turns."""
    for call in calls.values():
        jax.block_until_ready(call())
    seconds = {name: [] for name in calls}
    for _ in range(RUNS):
        for name, call in calls.items():
            start = time.perf_counter()
            jax.block_until_ready(call())
            seconds[name].append(time.perf_counter() - start)
    return {name: statistics.median(times) for name, times in seconds.items()}


def calls_for(w, x) -> dict:
    """Float32 and every case, compiled, on the same weight and activations."""

    def prepared(format, activations):
        q, run = jq.quantize(w, format), jax.jit(jq.quantized(multiply, activations=activations))
        return lambda: run(q, x)

    plain = jax.jit(multiply)
    return {"float32": lambda: plain(w, x)} | {name: prepared(*case) for name, case in CASES.items()}


def main() -> None:
    """Prints the table for one shape."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--shape", default="576x1536", help="inputs x outputs (default: 576x1536, of SmolLM2)")
    inputs, outputs = map(int, parser.parse_args().shape.split("x"))
    w = jax.random.normal(jax.random.key(0), (inputs, outputs))
    results = [medians(calls_for(w, jnp.ones((rows, inputs)))) for rows in ROWS]
    table = Table(
        "speed-up over float32", title=f"{inputs} x {outputs}, {jax.default_backend()}, jax {jax.__version__}"
    )
    for rows in ROWS:
        table.add_column(f"{rows} rows", justify="right")
    for name in CASES:
        table.add_row(name, *(f"{result['float32'] / result[name]:.2f}" for result in results))
    table.add_row("float32, ms", *(f"{1e3 * result['float32']:.2f}" for result in results))
    Console().print(table)


if __name__ == "__main__":
    main()
