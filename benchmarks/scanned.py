"""A model whose layers are one `lax.scan` over stacked weights, in several formats against float32.

python benchmarks/scanned.py
python benchmarks/scanned.py --rows 1 --runs 5

Eight residual blocks of 1024 -> 4096 -> 1024 in Flax, by `nn.scan`, which makes one array of the weights of all layers.
XLA writes what enters a loop in the order of its axes, and reads arrays of 4 bits and of float8 slowly: how codes enter
decides what the model takes.
"""

import functools
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import measure
from rich.console import Console
from rich.progress import track

import jaxquant as jq

LAYERS, WIDTH, HIDDEN, GROUP = 8, 1024, 4096, 64
ROWS = (1, 8, 64)
CASES = {
    "W8A8": (jq.int8, jq.int8),
    "W8": (jq.int8, None),
    "W4 g64": (jq.int4(group=GROUP), None),
    "NF4 g64": (jq.nf4(group=GROUP), None),
    "fp8": (jq.fp8, None),
}
# Rounding adds up over sixteen matmuls.
BOUNDS = measure.BOUNDS | {"W4": 0.5, "NF4": 0.5, "fp8": 0.1}
RUNS, SECONDS = 15, 10.0


class Block(nn.Module):
    """A residual block, as `nn.scan` wants it."""

    @nn.compact
    def __call__(self, x, _):
        return x + nn.Dense(WIDTH)(nn.relu(nn.Dense(HIDDEN)(nn.LayerNorm()(x)))), None


class Scanned(nn.Module):
    """All blocks in one loop."""

    @nn.compact
    def __call__(self, x):
        blocks = nn.scan(Block, variable_axes={"params": 0}, split_rngs={"params": True}, length=LAYERS)
        return blocks()(x, None)[0]


def contenders(model: nn.Module, params: Any) -> dict[str, tuple[Any, Any]]:
    """Functions of parameters and activations, and their parameters."""
    found = {"float32": (model.apply, params)}
    for name, (format, activations) in CASES.items():
        run, stacks = jq.quantized(model.apply, activations=activations), jq.quantize_params(params, format)
        found[name] = run, stacks
        turned = jq.turned(stacks)
        if jax.tree.structure(turned) != jax.tree.structure(stacks):
            found[f"{name} turned"] = run, turned
    return found


def main() -> None:
    """Prints a table of speed-ups by rows."""
    parser = measure.options(__doc__, "scanned", RUNS, SECONDS)
    parser.add_argument("--rows", default=",".join(map(str, ROWS)), metavar="A,B", help="tokens at once")
    options, console = parser.parse_args(), Console()
    model = Scanned()
    params = model.init(jax.random.key(0), jnp.ones((1, WIDTH)))
    ready = {name: (jax.jit(run), tree) for name, (run, tree) in contenders(model, params).items()}
    records = []
    for rows in track([int(count) for count in options.rows.split(",")], "rows", transient=True):
        x = jax.random.normal(jax.random.key(1), (rows, WIDTH))
        calls = {name: functools.partial(run, tree, x) for name, (run, tree) in ready.items()}
        errors = measure.errors(calls, BOUNDS)
        records += measure.records(errors, measure.medians(calls, options.runs, options.seconds), rows=rows)
    console.print(measure.table(f"{LAYERS} x ({WIDTH} -> {HIDDEN} -> {WIDTH}) in one scan", records))
    measure.write(options.json, records, console)


if __name__ == "__main__":
    main()
