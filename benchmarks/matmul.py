"""Matmuls in every format against float32 and against other libraries, in one run, as speed-ups over float32.

python benchmarks/matmul.py
python benchmarks/matmul.py --shapes 1024x4096,576x1536 --rows 1,8 --runs 5

W4A8 g64 is 4-bit weights in groups of 64 and int8 activations, W4 the same with float activations and a scale for each
output; with bf16, weights and activations come in bfloat16, and with BF16_BF16_F32 in float32, and JAX is allowed to
round them. A time is that of one of some matmuls in a program, by weights that no cache holds
(`chains.py`). Other libraries take part where they are installed (`pip install -r benchmarks/requirements.txt`), on as
many threads as JAX.
"""

import re
from collections.abc import Callable
from typing import Any

import chains
import jax
import jax.numpy as jnp
import measure
import peers
from chains import Contender
from measure import ROUNDING
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
HALVES = ("W8A8", "W8", "W4A8 g64", "W4 g64")
ROUNDED = ("W8", "W4A8 g64", "W4 g64", "NF4 g64")
RUNS, SECONDS = 15, 6.0


def multiply(x: jax.Array, w: Any) -> jax.Array:
    """The matmul that is timed."""
    return x @ w


def summed_in_float32(x: jax.Array, w: jax.Array) -> jax.Array:
    """The same with a result in float32, rounded afterwards."""
    return jnp.matmul(x, w, preferred_element_type=jnp.float32).astype(x.dtype)


def rounded(x: jax.Array, w: Any) -> jax.Array:
    """The same of floats that may be rounded to bfloat16 before they are multiplied."""
    return jnp.matmul(x, w, precision=ROUNDING)


def in_floats(dtype: Any) -> Contender:
    """A contender with weights and activations of a float dtype."""
    return Contender(lambda w: w.astype(dtype), multiply, take=lambda x: x.astype(dtype))


def in_codes(
    format: jq.Format,
    activations: jq.Format | None,
    order: Callable[[Any], Any],
    dtype: Any = jnp.float32,
    multiply: Callable[[jax.Array, Any], jax.Array] = multiply,
) -> Contender:
    """A contender of ours, the order in memory that its weights are stored in, and the dtype it quantizes."""
    run = jq.quantized(multiply, activations=activations)
    return Contender(lambda w: order(jq.quantize(w.astype(dtype), format)), run, take=lambda x: x.astype(dtype))


def contenders() -> dict[str, Contender]:
    """Float32 at both precisions, bfloat16 in both ways that XLA multiplies it, and every case."""
    half = in_floats(jnp.bfloat16)
    wide = half._replace(multiply=summed_in_float32)
    full = in_floats(jnp.float32)
    floats = {
        "float32": full,
        f"float32, {ROUNDING}": full._replace(multiply=rounded),
        "bf16": half,
        "bf16 by float32": wide,
    }
    ours = {name: in_codes(*case, lambda q: q) for name, case in CASES.items()}
    turned = {f"{name} turned": in_codes(*CASES[name], jq.turned) for name in TURNED}
    halves = {f"{name} turned, bf16": in_codes(*CASES[name], jq.turned, jnp.bfloat16) for name in HALVES}
    rounding = {f"{name} turned, {ROUNDING}": in_codes(*CASES[name], jq.turned, multiply=rounded) for name in ROUNDED}
    return floats | ours | turned | halves | rounding


def fits(name: str, inputs: int) -> bool:
    """Whether a contender's groups, if its name has any, divide the inputs."""
    group = re.search(r" g(\d+)", name)
    return group is None or inputs % int(group[1]) == 0


def measured(shape: str, rows: list[int], others: dict[str, Any], runs: int, seconds: float) -> list[dict[str, Any]]:
    """Every contender at every number of rows, for one shape."""
    inputs, outputs = map(int, shape.split("x"))
    drawn = chains.weights(inputs, outputs)
    present = {name: one for name, one in (contenders() | others).items() if fits(name, inputs)}
    ready = {name: chains.in_chains(one, drawn) for name, one in track(present.items(), shape, transient=True)}
    records = []
    for count in track(rows, shape, transient=True):
        x = jax.random.normal(jax.random.key(1), (count, inputs))
        pairs = {name: at(x) for name, at in ready.items()}
        errors = measure.errors({name: lambda first=first: first()[-1] for name, (first, _) in pairs.items()})
        times = measure.medians({name: call for name, (_, call) in pairs.items()}, runs, seconds)
        each = {name: time / len(drawn[0]) for name, time in times.items()}
        records += measure.records(errors, each, shape=shape, rows=count)
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
