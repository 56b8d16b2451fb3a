"""One matmul in every format against float32 and against other libraries, in one run, as speed-ups over float32.

python benchmarks/matmul.py
python benchmarks/matmul.py --shapes 1024x4096,576x1536 --rows 1,8 --runs 5

W4A8 g64 is 4-bit weights in groups of 64 and int8 activations, W4 the same with float activations and a scale for each
output. Weights and activations are drawn from N(0, 1). Other libraries take part where they are installed
(`pip install -r benchmarks/requirements.txt`), on as many threads as JAX.
"""

import functools
import re
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import measure
import peers
from rich.console import Console
from rich.progress import track

import jaxquant as jq

ROWS = (1, 2, 8, 64, 512)
# The matrices of SmolLM2-135M, the last of them its head, and two of larger models.
SHAPES = ("576x576", "576x192", "576x1536", "1536x576", "576x49152", "1024x4096", "4096x14336")
CASES = {
    "W8A8": (jq.int8, jq.int8),
    "W8": (jq.int8, None),
    "W4A8 g32": (jq.int4(group=32), jq.int8),
    "W4A8 g64": (jq.int4(group=64), jq.int8),
    "W4A8 g128": (jq.int4(group=128), jq.int8),
    "W4": (jq.int4, None),
    "W4 g64": (jq.int4(group=64), None),
    "NF4 g64": (jq.nf4, None),
}
TURNED = ("W8A8", "W8", "W4A8 g64", "W4 g64", "NF4 g64")
RUNS, SECONDS = 15, 6.0


def multiply(w: Any, x: jax.Array) -> jax.Array:
    """The matmul that is timed."""
    return x @ w


def in_floats(dtype: Any) -> Callable[..., Any]:
    """A contender with weights and activations of a float dtype."""
    run = jax.jit(multiply)

    def prepare(w: jax.Array) -> Callable[..., Any]:
        w = w.astype(dtype)
        return lambda x: functools.partial(run, w, x.astype(dtype))

    return prepare


def in_codes(format: jq.Format, activations: jq.Format | None, store: Callable[..., Any]) -> Callable[..., Any]:
    """A contender of ours, and how it stores the weight."""
    run = jax.jit(jq.quantized(multiply, activations=activations))

    def prepare(w: jax.Array) -> Callable[..., Any]:
        q = store(jq.quantize(w, format))
        return lambda x: functools.partial(run, q, x)

    return prepare


def contenders() -> dict[str, Callable[..., Any]]:
    """Float32, bfloat16 and every case: each takes a weight, then activations, and gives what is to be timed."""
    floats = {"float32": in_floats(jnp.float32), "bf16": in_floats(jnp.bfloat16)}
    ours = {name: in_codes(*case, lambda q: q) for name, case in CASES.items()}
    turned = {f"{name} turned": in_codes(*CASES[name], jq.turned) for name in TURNED}
    return floats | ours | turned


def fits(name: str, inputs: int) -> bool:
    """Whether a contender's groups, if its name has any, divide the inputs."""
    group = re.search(r" g(\d+)", name)
    return group is None or inputs % int(group[1]) == 0


def measured(shape: str, rows: list[int], others: dict[str, Any], runs: int, seconds: float) -> list[dict[str, Any]]:
    """Every contender at every number of rows, for one shape."""
    inputs, outputs = map(int, shape.split("x"))
    key_w, key_x = jax.random.split(jax.random.key(0))
    w = jax.random.normal(key_w, (inputs, outputs))
    ready = {name: prepare(w) for name, prepare in (contenders() | others).items() if fits(name, inputs)}
    records = []
    for count in track(rows, f"{inputs} x {outputs}", transient=True):
        x = jax.random.normal(key_x, (count, inputs))
        calls = {name: at(x) for name, at in ready.items()}
        errors, times = measure.errors(calls), measure.medians(calls, runs, seconds)
        records += measure.records(errors, times, shape=shape, rows=count)
    return records


def main() -> None:
    """Prints a table for every shape, and the cells where another library is faster at the same arithmetic."""
    parser = measure.options(__doc__, "matmul", RUNS, SECONDS)
    parser.add_argument("--shapes", default=",".join(SHAPES), metavar="A,B", help="inputs x outputs, as 576x1536")
    parser.add_argument("--rows", default=",".join(map(str, ROWS)), metavar="A,B", help="tokens at once")
    options, console = parser.parse_args(), Console()
    rows = [int(count) for count in options.rows.split(",")]
    others = peers.present(peers.MATMULS, console)
    records = []
    for shape in options.shapes.split(","):
        of_shape = measured(shape, rows, others, options.runs, options.seconds)
        console.print(measure.table(shape.replace("x", " x "), of_shape))
        records += of_shape
    measure.print_against_others(records, console)
    measure.write(options.json, records, console)


if __name__ == "__main__":
    main()
