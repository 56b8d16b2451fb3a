"""Two models in several formats against float32 and against other libraries: an MLP, and SmolLM2-135M with its cache.

python benchmarks/models.py
python benchmarks/models.py mlp --runs 5
python benchmarks/models.py smollm2 --runs 3

The MLP is 4 x (1024 -> 4096 -> 1024) in Flax, and Qwix quantizes the same module. SmolLM2 reads 494 tokens of
documentation at once, for the logits of the last, and then decodes 64 one after the other in a loop on the device, as
`examples/smollm2.py` does. Qwix quantizes the blocks of that model; llama.cpp does the same with the file those weights
are from, and with that file's weights written as Q8_0 and Q4_0, on as many threads.
"""

import argparse
import functools
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import measure
import peers
from gguf import GGMLQuantizationType, GGUFReader, GGUFValueType, GGUFWriter
from gguf.quants import dequantize, quantize
from measure import ROUNDING
from rich.console import Console
from rich.progress import track
from rich.table import Table

sys.path.insert(0, str(Path(__file__).parent.parent / "examples"))

from generation import generate, generate_step
from llama import KVCache, LayerCache, Llama, fused, is_kernel
from llama_gguf import fetch_smollm2, load_llama, load_tokenizer
from smollm2 import ARITHMETIC, held_out_text

import jaxquant as jq

ROWS = (1, 8, 64, 512)
WIDTH, HIDDEN, BLOCKS = 1024, 4096, 4
CASES = {
    "W8A8": (jq.int8, jq.int8),
    "W8": (jq.int8, None),
    "W4A8 g128": (jq.int4(group=128), jq.int8),
    "W4 g128": (jq.int4(group=128), None),
}
# Rounding adds up over eight matmuls.
MLP_BOUNDS = measure.BOUNDS | {"W4": 0.5}
PROMPT, STEPS = 494, 64
# Of the last token's logits, which have a mean of their own to be taken away first.
LOGIT_BOUNDS = {"float32": 1e-3, "bf16": 0.1, "W8": 0.3, "W4": 0.8, "Q8_0": 0.1, "Q4_1": 0.1, "Q4_0": 0.6}
RUNS, SECONDS = 9, 150.0


class MLP(nn.Module):
    """Dense layers and nothing else."""

    @nn.compact
    def __call__(self, x):
        for _ in range(BLOCKS):
            x = nn.Dense(WIDTH)(nn.relu(nn.Dense(HIDDEN)(x)))
        return x


def mlp(options: argparse.Namespace, console: Console) -> list[dict[str, Any]]:
    """The MLP at every number of rows."""
    model, key = MLP(), jax.random.key(0)
    params = model.init(key, jnp.ones((1, WIDTH)))
    int8 = jq.turned(jq.quantize_params(params, jq.int8))
    models = {
        "float32": (model.apply, params),
        "bf16": (lambda params, x: model.apply(params, x.astype(jnp.bfloat16)), half(params)),
        **{
            name: (jq.quantized(model.apply, activations=activations), jq.quantize_params(params, format))
            for name, (format, activations) in CASES.items()
        },
        "W8A8 turned": (jq.quantized(model.apply), int8),
        f"W8 turned, {ROUNDING}": (rounding(jq.quantized(model.apply, activations=None)), int8),
        **peers.present({"Qwix": peers.qwix_models}, console, model, params, jnp.ones((1, WIDTH)), 128),
    }
    compiled = {name: functools.partial(jax.jit(apply), params) for name, (apply, params) in models.items()}
    records = []
    for rows in track(ROWS, "MLP", transient=True):
        x = jax.random.normal(key, (rows, WIDTH))
        calls = {name: functools.partial(run, x) for name, run in compiled.items()}
        errors, times = measure.errors(calls, MLP_BOUNDS), measure.medians(calls, options.runs, options.seconds)
        records += measure.records(errors, times, rows=rows)
    console.print(measure.table(f"{BLOCKS} x ({WIDTH} -> {HIDDEN} -> {WIDTH})", records))
    measure.print_against_others(records, console)
    return records


def rounding(apply: Callable[..., Any]) -> Callable[..., Any]:
    """A function whose products of floats may round them to bfloat16 first."""

    @functools.wraps(apply)
    def run(*args: Any) -> Any:
        with jax.default_matmul_precision(ROUNDING):
            return apply(*args)

    return run


def half(params: Any) -> Any:
    """Parameters in bfloat16."""
    return jax.tree.map(lambda array: array.astype(jnp.bfloat16), params)


def requantized(path: Path, kind: GGMLQuantizationType) -> Path:
    """A GGUF file with its blocks' matrices in another of llama.cpp's types, made once and kept beside the first."""
    target = path.with_name(path.name.replace("Q4_1", kind.name))
    if target.exists():
        return target
    reader, partial = GGUFReader(path), target.with_suffix(".part")
    writer = GGUFWriter(partial, "llama")
    for name, field in reader.fields.items():
        if not name.startswith("GGUF.") and name != "general.architecture":
            sub_type = field.types[-1] if field.types[0] == GGUFValueType.ARRAY else None
            writer.add_key_value(name, field.contents(), field.types[0], sub_type)
    for tensor in reader.tensors:
        data, type = tensor.data, tensor.tensor_type
        if type == GGMLQuantizationType.Q4_1:
            data, type = quantize(dequantize(data, type), kind), kind
        writer.add_tensor(tensor.name, data, raw_dtype=type)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    partial.replace(target)
    return target


def smollm2(options: argparse.Namespace, console: Console) -> list[dict[str, Any]]:
    """SmolLM2, its prompt and its decoding."""
    path = fetch_smollm2()
    config, params = fused(*load_llama(path))
    tokens = load_tokenizer(path).encode(held_out_text(), add_special_tokens=False).ids[:PROMPT]
    prompt = jnp.asarray([tokens], jnp.int32)

    def contender(apply: Callable[..., Any], params: Any, layer: Callable[..., Any] = LayerCache.empty) -> tuple:
        read = jax.jit(functools.partial(generate_step, apply), donate_argnums=2)
        decode = jax.jit(functools.partial(generate, apply, count=STEPS), donate_argnums=2)
        logits = jax.jit(lambda params, tokens: apply(params, tokens)[0][0, -1])

        def one() -> dict[str, float]:
            empty = jax.block_until_ready(KVCache.empty(config, 1, PROMPT + STEPS, layer))
            state, reading = measure.timed(lambda: read(params, prompt, empty))
            return {"prompt": reading, "decode": measure.timed(lambda: decode(params, *state))[1]}

        return one, lambda: logits(params, prompt)

    model, in_half = Llama(config, last=True), functools.partial(LayerCache.empty, dtype=jnp.bfloat16)
    apply = model.apply
    weight_only, int8 = jq.quantized(apply, activations=None), jq.quantize_params(params, jq.int8)
    # The head stays in int8, as it does in the file that llama.cpp reads.
    int4 = jq.quantize_params(jq.quantize_params(params, jq.int4(group=64), where=is_kernel), jq.int8, where=is_table)
    kinds = (GGMLQuantizationType.Q8_0, GGMLQuantizationType.Q4_0)
    files = {"Q4_1": path} | {kind.name: requantized(path, kind) for kind in kinds}
    # Qwix cannot quantize its embedding, which is the head too, in Flax.
    of_qwix = peers.present({"Qwix": peers.qwix_models}, console, model, params, prompt, 64, "block_.*")
    runners = {
        "float32": contender(apply, params),
        "bf16": contender(apply, half(params), in_half),
        "W8A8": contender(jq.quantized(apply), int8),
        "W8A8 turned": contender(jq.quantized(apply), jq.turned(int8)),
        "W8A8 turned, cache int8": contender(jq.quantized(apply), jq.turned(int8), jq.KVCache.empty),
        "W8A8 turned, bf16": contender(
            jq.quantized(apply), jq.turned(jq.quantize_params(half(params), jq.int8)), in_half
        ),
        "W8A8 turned, affine, one outlier": contender(jq.quantized(apply, **ARITHMETIC), jq.turned(int8)),
        "W8 turned": contender(weight_only, jq.turned(int8)),
        f"W8 turned, {ROUNDING}": contender(rounding(weight_only), jq.turned(int8)),
        "W4A8 g64 turned, head W8A8": contender(jq.quantized(apply), jq.turned(int4)),
        f"W4A8 g64 turned, head W8A8, {ROUNDING}": contender(rounding(jq.quantized(apply)), jq.turned(int4)),
        "W4 g64 turned, head W8": contender(weight_only, jq.turned(int4)),
        f"W4 g64 turned, head W8, {ROUNDING}": contender(rounding(weight_only), jq.turned(int4)),
        **{name: contender(*quantized) for name, quantized in of_qwix.items()},
        **peers.present({"llama.cpp": peers.llama_cpp_models}, console, files, tokens, STEPS),
    }
    with console.status("Checking every contender's logits"):
        calls = {name: lambda logits=logits: centred(logits()) for name, (_, logits) in runners.items()}
        errors = measure.errors(calls, LOGIT_BOUNDS)
    with console.status("Reading and decoding"):
        passes = {name: one for name, (one, _) in runners.items()}
        measure.turns(passes, 1)
        times = measure.turns(passes, options.runs, options.seconds)
    speeds = {
        name: {"prompt": PROMPT / time["prompt"], "decode": STEPS / time["decode"]} for name, time in times.items()
    }
    console.print(speeds_table(speeds, errors))
    return [{"contender": name, "tokens_per_second": speeds[name], "error": errors[name]} for name in speeds]


def is_table(path: str, array: Any) -> bool:
    """The embedding, for `where`."""
    del array
    return path.endswith("embedding")


def centred(logits: Any) -> jax.Array:
    """Logits that add up to nothing."""
    logits = jnp.asarray(logits, jnp.float32)
    return logits - logits.mean()


def speeds_table(speeds: dict[str, dict[str, float]], errors: dict[str, float]) -> Table:
    """Tokens a second, and as ratios to float32."""
    shown = Table("tokens a second", title=measure.title(f"SmolLM2-135M, {PROMPT} tokens read, {STEPS} decoded"))
    for heading in ("prompt", "of float32", "decode", "of float32", "error"):
        shown.add_column(heading, justify="right")
    for name, speed in speeds.items():
        ratios = {part: value / speeds["float32"][part] for part, value in speed.items()}
        cells = [cell for part in speed for cell in (f"{speed[part]:.1f}", f"{ratios[part]:.2f}")]
        shown.add_row(name, *cells, f"{errors[name]:.4f}")
    return shown


BENCHMARKS = {"mlp": mlp, "smollm2": smollm2}


def main() -> None:
    """Prints both tables, or the one that is named."""
    parser = measure.options(__doc__, "models", RUNS, SECONDS)
    parser.add_argument("models", nargs="*", choices=[*BENCHMARKS, []], default=[], help="which (default: both)")
    options, console = parser.parse_args(), Console()
    results = {name: BENCHMARKS[name](options, console) for name in options.models or BENCHMARKS}
    measure.write(options.json, results, console)


if __name__ == "__main__":
    main()
