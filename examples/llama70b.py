"""Which card does Llama-3-70B fit on? Compiles decoding and prefill of Llama-3-8B and 70B for GPUs, from shapes alone.

python examples/llama70b.py                      the whole table: about ten minutes, and no GPU
python examples/llama70b.py --models 70B --weights "int2 g64" --cards rtx4090
python examples/llama70b.py --json docs/llama70b.json --plot docs/llama70b.png

No weight exists here and nothing runs: XLA compiles the programs, and says what they take. It needs
pip install '.[gpu,examples]' and pip install --no-deps -r examples/requirements-gpu.txt.
"""

import argparse
import dataclasses
import functools
import json
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import matplotlib.pyplot as plt
from command_line import ended
from jax.experimental.custom_partitioning import custom_partitioning
from jax.experimental.layout import Layout, with_layout_constraint
from jax.sharding import PartitionSpec as P
from llama import Block, LayerCache, LlamaConfig
from rich.console import Console
from rich.progress import track
from rich.table import Table
from wheels import InputError

import jaxquant as jq

CONTEXT = 4096
CHUNK = 256  # tokens that prefill reads at once
ROPE = {"rope_base": 5e5, "tied": False}
MODELS = {
    "8B": LlamaConfig(128256, 4096, 14336, layers=32, heads=32, kv_heads=8, head_width=128, **ROPE),
    "70B": LlamaConfig(128256, 8192, 28672, layers=80, heads=64, kv_heads=8, head_width=128, **ROPE),
}
CARDS = (("rtx4090", 1), ("a100", 1), ("h100", 1), ("h100", 2), ("h100", 4), ("h100", 8))
# How the weights are cut on several cards: outputs where a matmul is followed by one that is cut along its inputs.
SPECS = {
    "query": P(None, None, "model"),
    "key": P(None, None, "model"),
    "value": P(None, None, "model"),
    "gate": P(None, None, "model"),
    "up": P(None, None, "model"),
    "output": P(None, "model"),
    "down": P(None, "model"),
    "embed": P(None, "model"),
    "head": P(None, "model"),
}


@dataclasses.dataclass(frozen=True)
class Weights:
    """One way to store the model.

    Args:
      format: of the matrices of the blocks; the embedding and the head are int8 then. None: all is bfloat16.
      activations: of `quantized`.
      cache: `(batch, length, heads, width)` to the keys and values of one layer.
    """

    format: jq.Format | None
    activations: jq.Format | None
    cache: Callable[..., Any]


BF16_CACHE = functools.partial(LayerCache.empty, dtype=jnp.bfloat16)
INT8_CACHE = functools.partial(jq.KVCache.empty, dtype=jnp.bfloat16)
WEIGHTS = {
    "bf16": Weights(None, None, BF16_CACHE),
    "int8": Weights(jq.int8, jq.int8, BF16_CACHE),
    "int4 g128": Weights(jq.int4(group=128), None, BF16_CACHE),
    "int2 g64": Weights(jq.int2(group=64), None, INT8_CACHE),
}


def parameters(config: LlamaConfig) -> dict[str, Any]:
    """The float model: the blocks stacked, as `lax.scan` runs them."""
    dtype = jnp.bfloat16
    x, position = jnp.zeros((1, 1, config.width), dtype), jnp.zeros((), jnp.int32)
    block = Block(config).init(jax.random.key(0), x, None, position)["params"]
    return {
        "embed": jnp.zeros((config.vocab, config.width), dtype),
        "blocks": jax.tree.map(lambda w: jnp.zeros((config.layers, *w.shape), dtype), block),
        "norm": jnp.zeros((config.width,), dtype),
        "head": jnp.zeros((config.width, config.vocab), dtype),
    }


def stored(params: dict[str, Any], weights: Weights) -> dict[str, Any]:
    """The parameters in a format, with scales in bfloat16: of 2-bit groups, float32 ones would be a sixth of all."""
    if weights.format is None:
        return params

    def written(w: jax.Array, format: jq.Format) -> jq.QTensor:
        q = jq.quantize(w, format)
        return dataclasses.replace(q, scale=q.scale.astype(jnp.bfloat16))

    blocks = jax.tree.map(lambda w: written(w, weights.format) if w.ndim == 3 else w, params["blocks"])
    return {**params, "blocks": blocks, **{name: written(params[name], jq.int8) for name in ("embed", "head")}}


def in_order(part: jax.Array) -> jax.Array:
    """Keeps an array as it lies in memory, or XLA would turn the stack of all layers to what one attention likes.

    On several devices too: a constraint alone would be met by gathering the array.
    """

    def local(part: jax.Array) -> jax.Array:
        return with_layout_constraint(part, Layout(tuple(range(part.ndim))))

    anywhere = custom_partitioning(local)
    anywhere.def_partition(
        partition=lambda mesh, args, result: (mesh, local, args[0].sharding, (args[0].sharding,)),
        sharding_rule="b t h d -> b t h d",
    )
    return anywhere(part)


def forward(config: LlamaConfig, params: dict[str, Any], tokens: jax.Array, caches: Any, position: jax.Array) -> tuple:
    """The logits of the last token, and the caches with the tokens in them."""
    x = params["embed"][tokens]

    def layer(carry, block):
        x, caches, index = carry
        past = jax.tree.map(lambda every: jax.lax.dynamic_index_in_dim(every, index, keepdims=False), caches)
        past = jax.tree.map(in_order, past)
        x, present = Block(config).apply({"params": block}, x, past, position)
        put = functools.partial(jax.lax.dynamic_update_index_in_dim, index=index, axis=0)
        caches = jax.tree.map(lambda every, new: put(every, new), caches, present)
        return (x, caches, index + 1), None

    (x, caches, _), _ = jax.lax.scan(layer, (x, caches, jnp.zeros((), jnp.int32)), params["blocks"])
    x = nn.RMSNorm(config.norm_eps).apply({"params": {"scale": params["norm"]}}, x[:, -1:])
    return x @ params["head"], caches


def serve(model: str, name: str, *args: Any) -> tuple:
    """One step, on parameters stored in a format."""
    step, weights = functools.partial(forward, MODELS[model]), WEIGHTS[name]
    return (step if weights.format is None else jq.quantized(step, activations=weights.activations))(*args)


def compiled(model: str, name: str, tokens: int, card: str, devices: int) -> jq.Program:
    """One step of a model, for a number of cards with tensor parallelism."""
    config, weights = MODELS[model], WEIGHTS[name]
    params = jax.eval_shape(lambda: stored(parameters(config), weights))
    step = functools.partial(serve, model, name)
    words = jax.ShapeDtypeStruct((1, tokens), jnp.int32)
    position = jax.ShapeDtypeStruct((), jnp.int32)
    cut = jax.tree_util.tree_map_with_path(_spec, params)
    specs = (cut, P(), P(None, None, None, "model"), P())
    return jq.lower_for(
        card, step, params, words, caches(model, name), position, devices=devices, specs=specs, donate=(2,)
    )


def _spec(path: Any, leaf: Any) -> P:
    del leaf
    names = [str(getattr(key, "key", "")) for key in path]
    return next((SPECS[name] for name in names if name in SPECS), P())


def caches(model: str, name: str) -> Any:
    """The shapes of the keys and values of all layers."""
    config = MODELS[model]
    one = jax.eval_shape(lambda: WEIGHTS[name].cache(1, CONTEXT, config.kv_heads, config.head_width))
    return jax.tree.map(lambda part: jax.ShapeDtypeStruct((config.layers, *part.shape), part.dtype), one)


def rows(models: list[str], names: list[str], cards: list[str]) -> Iterator[dict[str, Any]]:
    """One record for each model, format and set of cards, of decoding and of prefill."""
    chosen = [(m, n, c, d) for m in models for n in names for c, d in CARDS if c in cards]
    for model, name, card, devices in track(chosen, description="compiling", transient=True):
        decode, prefill = (compiled(model, name, tokens, card, devices) for tokens in (1, CHUNK))
        cache = sum(part.size * part.dtype.itemsize for part in jax.tree.leaves(caches(model, name))) // devices
        yield {
            "model": model,
            "weights": name,
            "card": card,
            "devices": devices,
            "weight_bytes": decode.argument_bytes - cache,
            "cache_bytes": cache,
            "decode_temp_bytes": decode.temp_bytes,
            "prefill_temp_bytes": prefill.temp_bytes,
            "total_bytes": max(decode.total_bytes, prefill.total_bytes),
            "memory_bytes": decode.memory_bytes,
            "fits": decode.fits and prefill.fits,
            "tensor_cores": sorted(prefill.tensor_cores),
            "collectives": [f"{one.count} {one.kind} {one.shape}" for one in decode.collectives],
        }


def table(records: list[dict[str, Any]]) -> Table:
    """The records, in GB of one card."""
    columns = (
        "model",
        "weights",
        "cards",
        "weights GB",
        "cache GB",
        "temp GB, decode",
        "prefill",
        "of GB",
        "fits",
        "communication",
    )
    shown = Table(*columns, title=f"{CONTEXT} tokens of context, prefill {CHUNK} at a time, jax {jax.__version__}")
    for row in records:
        sizes = [
            f"{row[key] / 1e9:.2f}"
            for key in ("weight_bytes", "cache_bytes", "decode_temp_bytes", "prefill_temp_bytes")
        ]
        cards = f"{row['devices']} x {row['card']}"
        room = f"{row['memory_bytes'] / 1e9:.1f}"
        talk = ", ".join(row["collectives"]) or "-"
        shown.add_row(row["model"], row["weights"], cards, *sizes, room, "yes" if row["fits"] else "no", talk)
    return shown


def plot(records: list[dict[str, Any]], path: Path) -> None:
    """What one card holds, as bars against its memory."""
    figure, axes = plt.subplots(1, len({row["model"] for row in records}), figsize=(13, 6), squeeze=False)
    for axis, model in zip(axes[0], dict.fromkeys(row["model"] for row in records), strict=True):
        mine = [row for row in records if row["model"] == model]
        names = [f"{row['weights']}, {row['devices']} x {row['card']}" for row in mine]
        left = [0.0] * len(mine)
        for part in ("weight_bytes", "cache_bytes", "prefill_temp_bytes"):
            sizes = [row[part] / 1e9 for row in mine]
            axis.barh(names, sizes, left=left, label=part.removesuffix("_bytes").replace("_", " "))
            left = [a + b for a, b in zip(left, sizes, strict=True)]
        for place, row in enumerate(mine):
            memory = row["memory_bytes"] / 1e9
            axis.plot([memory, memory], [place - 0.4, place + 0.4], color="black")
        axis.set(title=f"Llama-3-{model}, GB of one card; the line is what it has")
        axis.invert_yaxis()
        axis.legend()
    figure.tight_layout()
    figure.savefig(path, dpi=90)


def arguments() -> argparse.Namespace:
    """What to compile, and where to write it."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--models", default=",".join(MODELS), help=f"of {', '.join(MODELS)}")
    parser.add_argument("--weights", default=",".join(WEIGHTS), help=f"of {', '.join(WEIGHTS)}")
    parser.add_argument("--cards", default="rtx4090,a100,h100", help="of rtx4090, a100, h100")
    parser.add_argument("--json", type=Path, help="write the records there")
    parser.add_argument("--plot", type=Path, help="draw them there")
    return parser.parse_args()


def chosen(text: str, known: Any, option: str) -> list[str]:
    """The names of a list with commas between.

    Raises:
      InputError: one is not known.
    """
    names = [name.strip() for name in text.split(",")]
    if unknown := [name for name in names if name not in known]:
        raise InputError(f"--{option}: {unknown[0]!r} is none of {', '.join(known)}.")
    return names


def main() -> None:
    """Compiles, and prints, writes and draws what came out."""
    args = arguments()
    cards = chosen(args.cards, {card for card, _ in CARDS}, "cards")
    records = list(rows(chosen(args.models, MODELS, "models"), chosen(args.weights, WEIGHTS, "weights"), cards))
    Console().print(table(records))
    if args.json:
        args.json.write_text(json.dumps(records, indent=1) + "\n")
    if args.plot:
        plot(records, args.plot)


if __name__ == "__main__":
    raise SystemExit(ended(main))
