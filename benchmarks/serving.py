"""GGUF files that jaxquant writes, answered from by llama.cpp and by jaxquant: do both read the same model?

pip install xllamacpp
python benchmarks/serving.py

SmolLM2-135M is quantized to Q8_0, Q4_0 and Q4_1 and saved. llama.cpp answers a few questions greedily, and jaxquant, in
float arithmetic (`activations=None`), says what it thinks likely after every part of the answers:

- of the file as llama.cpp's own package decodes it, where both compute in float32;
- of the file as it is, where llama.cpp rounds activations to 8 bits in blocks of 32.

That rounding is why the second answers are not the same to the last token. How far it moves a model, jaxquant says of
itself: it rounds as llama.cpp does, and then once more after every input was made larger by a millionth. The two differ
by as much as from no rounding at all, so nobody's rounded model can be met more closely than that.
"""

import argparse
import functools
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import gguf
import jax
import jax.numpy as jnp
import measure
import numpy as np
import xllamacpp
from flax import linen as nn
from rich.console import Console
from rich.table import Table

sys.path.insert(0, str(Path(__file__).parent.parent / "examples"))

from llama import Llama, LlamaConfig
from llama_gguf import chat_prompt, fetch_smollm2, load_codes, load_llama, load_tokenizer, place

import jaxquant as jq
from jaxquant.quantizers.half_scales import half_scales

STEPS, LENGTH, LIKELIEST, BLOCK = 32, 80, 40, 32  # tokens of an answer and of a text, tokens compared, inputs a scale
MILLIONTH = 1e-6
# By name: the format of every matrix, and llama.cpp's number for a model that is mostly of that type.
KINDS = {
    "Q8_0": (jq.int8(group=BLOCK), 7),
    "Q4_0": (jq.int4(group=BLOCK), 2),
    "Q4_1": (jq.int4(group=BLOCK, symmetric=False), 3),
}
QUESTIONS = (
    "What is the capital of France?",
    "Name three colours of the rainbow.",
    "Write one sentence about the sea.",
    "What is two plus three?",
    "Why is the sky blue?",
    "Who wrote Hamlet?",
    "How do I boil an egg?",
    "Tell me a short story about a fox.",
)

# What one model says at every step of an answer: log-probabilities of some tokens, and which of all is the likeliest.
Said = tuple[np.ndarray, np.ndarray]
Answer = tuple[list[int], np.ndarray, Said]  # the text, the tokens that are compared at every step, and what was said


def write(path: Path, format: jq.Format, file_type: int) -> None:
    """SmolLM2 in a format, as the GGUF file of a model that is otherwise the one that was downloaded."""
    source = fetch_smollm2()
    qparams = jq.quantize_params(load_llama(source)[1], half_scales(format))
    original, tensors = jq.load_gguf(source), {}
    for name in original.entries:
        *parents, last = place(name)
        leaf = functools.reduce(lambda node, key: node[key], (*parents, last), qparams["params"])
        tensors[name] = jax.tree.map(jnp.transpose, leaf) if last == "kernel" else leaf
    jq.save_gguf(path, tensors, {**original.metadata, "general.file_type": file_type})


def decoded(path: Path) -> Path:
    """The same file in float32, its tensors decoded by llama.cpp's package."""
    target = path.with_suffix(".float32.gguf")
    tensors = {one.name: gguf.quants.dequantize(one.data, one.tensor_type) for one in gguf.GGUFReader(path).tensors}
    jq.save_gguf(target, tensors, {**jq.load_gguf(path).metadata, "general.file_type": 0})
    return target


def theirs(path: Path) -> Callable[[list[int]], Answer]:
    """Greedy answers of llama.cpp, whose cache and attention are in float32."""
    options = xllamacpp.CommonParams()
    options.model.path = str(path)
    options.n_ctx, options.n_parallel, options.warmup, options.verbosity = LENGTH, 1, False, 0
    options.cache_type_k = options.cache_type_v = xllamacpp.ggml_type.GGML_TYPE_F32
    options.flash_attn_type = xllamacpp.llama_flash_attn_type.LLAMA_FLASH_ATTN_TYPE_DISABLED
    options.cpuparams.n_threads = options.cpuparams_batch.n_threads = measure.threads()
    server = xllamacpp.Server(options)

    def answer(prompt: list[int]) -> Answer:
        asked = {"prompt": prompt, "n_predict": STEPS, "temperature": 0.0, "logprobs": LIKELIEST}
        steps = server.handle_completions(asked)["choices"][0]["logprobs"]["content"]
        chosen = [step["id"] for step in steps]
        likeliest = [[(one["id"], one["logprob"]) for one in step["top_logprobs"]] for step in steps]
        tokens, logs = np.moveaxis(np.array(likeliest), -1, 0)
        return [*prompt, *chosen], tokens.astype(int), (logs, np.array(chosen))

    return answer


def rounded(x: jax.Array) -> jax.Array:
    """Activations as llama.cpp rounds them: blocks of 32 in 8 bits, each with a scale in float16."""
    blocks = x.reshape(*x.shape[:-1], -1, BLOCK)
    largest = jnp.abs(blocks).max(axis=-1, keepdims=True)
    codes = jnp.round(blocks * jnp.where(largest > 0, 127 / largest, 0))
    return (codes * (largest / 127).astype(jnp.float16).astype(jnp.float32)).reshape(x.shape)


def logprobs(config: LlamaConfig, inputs: Callable[[jax.Array], jax.Array], params: Any, text: jax.Array) -> jax.Array:
    """Log-probabilities after every token of a text, with something done to the inputs of every matrix."""

    def call(method: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any], context: Any) -> Any:
        if isinstance(context.module, nn.Dense) or context.method_name == "attend":
            args = (inputs(args[0]), *args[1:])
        return method(*args, **kwargs)

    with nn.intercept_methods(call):
        return jax.nn.log_softmax(Llama(config).apply(params, text[None])[0][0])


@functools.partial(jax.jit, static_argnums=0)
def rounding(config: LlamaConfig, larger: float, params: Any, text: jax.Array) -> jax.Array:
    """The same where inputs are made larger and rounded."""
    return logprobs(config, lambda x: rounded(x * larger), params, text)


def said(model: Callable[[np.ndarray], jax.Array], answers: list[Answer]) -> list[Said]:
    """What one of our models says where llama.cpp gave its answers."""

    def one(text: list[int], tokens: np.ndarray) -> Said:
        padded = np.pad(text, (0, LENGTH - len(text)))
        logs = np.asarray(model(padded))[len(text) - len(tokens) - 1 : len(text) - 1]
        return np.take_along_axis(logs, tokens, axis=1), logs.argmax(axis=1)

    return [one(text, tokens) for text, tokens, _ in answers]


def compared(some: list[Said], others: list[Said]) -> dict[str, Any]:
    """How near two models are over the same answers."""
    pairs = list(zip(some, others, strict=True))
    same = [a[1] == b[1] for a, b in pairs]
    distances = np.concatenate([np.abs(a[0] - b[0]).max(axis=1) for a, b in pairs])
    gaps = np.concatenate([np.sort(b[0], axis=1)[:, -1] - np.sort(b[0], axis=1)[:, -2] for _, b in pairs])
    parted = gaps[~np.concatenate(same)]
    return {
        "steps": len(distances),
        "steps_alike": int(np.concatenate(same).sum()),
        "answers": len(pairs),
        "answers_alike": sum(bool(one.all()) for one in same),
        "median_distance": float(np.median(distances)),
        "largest_distance": float(distances.max()),
        "largest_gap_where_parted": float(parted.max()) if parted.size else None,
    }


def measured(path: Path, prompts: list[list[int]]) -> dict[str, dict[str, Any]]:
    """All comparisons of a file."""
    config, qparams = load_codes(path)
    run = jax.jit(jq.quantized(functools.partial(logprobs, config, lambda x: x), activations=None))
    ours, floats = functools.partial(run, qparams), jq.dequantize(qparams)
    in_float, served = ([answer(prompt) for prompt in prompts] for answer in map(theirs, (decoded(path), path)))
    once, twice = (said(functools.partial(rounding, config, by, floats), served) for by in (1.0, 1 + MILLIONTH))
    return {
        "llama.cpp, decoded": compared(said(ours, in_float), [given for _, _, given in in_float]),
        "llama.cpp, as it is": compared(said(ours, served), [given for _, _, given in served]),
        "ours, rounding": compared(said(ours, served), once),
        "ours, rounding, a millionth off": compared(twice, once),
    }


def main() -> None:
    """Prints and saves the table."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--json", type=Path, default=measure.RESULTS / "serving.json", metavar="PATH")
    arguments, console, results = parser.parse_args(), Console(), {}
    tokenizer = load_tokenizer(fetch_smollm2())
    prompts = [tokenizer.encode(chat_prompt(question), add_special_tokens=False).ids for question in QUESTIONS]
    shown = Table("type", "against", title=measure.title(f"SmolLM2-135M, {len(prompts)} answers"))
    for heading in ("tokens alike", "answers alike", "median distance", "largest", "gap where parted"):
        shown.add_column(heading, justify="right")
    with tempfile.TemporaryDirectory() as folder:
        for kind, (format, file_type) in KINDS.items():
            path = Path(folder) / f"{kind}.gguf"
            write(path, format, file_type)
            results[kind] = measured(path, prompts)
            for name, found in results[kind].items():
                shown.add_row(kind, name, *cells(found))
            shown.add_section()
    console.print(shown)
    measure.write(arguments.json, results, console)


def cells(found: dict[str, Any]) -> tuple[str, ...]:
    """What a table shows of a comparison."""
    gap = found["largest_gap_where_parted"]
    return (
        f"{found['steps_alike']} of {found['steps']}",
        f"{found['answers_alike']} of {found['answers']}",
        f"{found['median_distance']:.2g}",
        f"{found['largest_distance']:.2g}",
        "" if gap is None else f"{gap:.2g}",
    )


if __name__ == "__main__":
    main()
