"""GGUF files that jaxquant writes, generated from by llama.cpp and by jaxquant: the same tokens?

python benchmarks/serving.py

SmolLM2-135M is quantized to Q8_0, Q4_0 and Q4_1, saved, and read back by both. jaxquant answers a few questions
greedily in float arithmetic (`activations=None`), and llama.cpp does; then llama.cpp is asked for the next token after
every part of jaxquant's answers. It rounds activations to 8 bits in blocks of 32, which moves logits by some tenths, so
the two may part where the likeliest tokens are nearer to each other than that: the largest such gap is shown.
"""

import functools
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path

import jax
import jax.numpy as jnp
import measure
import numpy as np
import xllamacpp
from rich.console import Console
from rich.table import Table

sys.path.insert(0, str(Path(__file__).parent.parent / "examples"))

from llama import KVCache, Llama
from llama_gguf import chat_prompt, fetch_smollm2, load_codes, load_llama, load_tokenizer, place

import jaxquant as jq
from jaxquant.quantizers.half_scales import half_scales

STEPS, LENGTH, STOP = 32, 256, 2  # tokens of an answer and of the cache, and the one that ends an answer
# By name: the format of every matrix, and llama.cpp's number for a model that is mostly of that type.
KINDS = {
    "Q8_0": (jq.int8(group=32), 7),
    "Q4_0": (jq.int4(group=32), 2),
    "Q4_1": (jq.int4(group=32, symmetric=False), 3),
}
QUESTIONS = (
    "What is the capital of France?",
    "Name three colours of the rainbow.",
    "Write one sentence about the sea.",
    "What is two plus three?",
)


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


def ours(path: Path) -> Callable[[list[int]], tuple[list[int], list[float]]]:
    """Greedy tokens of jaxquant, and how far the likeliest was ahead of the next one at each."""
    config, qparams = load_codes(path)
    step = jax.jit(jq.quantized(Llama(config).apply, activations=None), donate_argnums=2)

    def generate(prompt: list[int]) -> tuple[list[int], list[float]]:
        read, cache, tokens, gaps = prompt, KVCache.empty(config, 1, LENGTH), [], []
        for _ in range(STEPS):
            logits, cache = step(qparams, jnp.asarray([read]), cache)
            last = np.asarray(logits[0, -1])
            second, first = np.sort(last)[-2:]
            read = [int(last.argmax())]
            tokens.append(read[0])
            gaps.append(float(first - second))
            if read[0] == STOP:
                break
        return tokens, gaps

    return generate


def theirs(path: Path) -> Callable[[list[int], int], list[int]]:
    """Greedy tokens of llama.cpp."""
    options = xllamacpp.CommonParams()
    options.model.path = str(path)
    options.n_ctx, options.n_parallel, options.warmup, options.verbosity = LENGTH, 1, False, 0
    options.cpuparams.n_threads = options.cpuparams_batch.n_threads = measure.threads()
    server = xllamacpp.Server(options)

    def generate(prompt: list[int], steps: int) -> list[int]:
        asked = {"prompt": prompt, "n_predict": steps, "temperature": 0.0, "logprobs": 1}
        (choice,) = server.handle_completions(asked)["choices"]
        tokens = [token["id"] for token in (choice["logprobs"] or {"content": []})["content"]]
        return tokens if len(tokens) == steps or STOP in tokens else [*tokens, STOP]

    return generate


def row(path: Path, prompts: list[list[int]]) -> tuple[str, ...]:
    """How a file is answered from by both."""
    mine, other, whole, gaps, differing = ours(path), theirs(path), 0, [], []
    for prompt in prompts:
        tokens, ahead = mine(prompt)
        whole += tokens == other(prompt, STEPS)
        replies = [other(prompt + tokens[:i], 1)[0] for i in range(len(tokens))]
        gaps += ahead
        differing += [gap for gap, token, reply in zip(ahead, tokens, replies, strict=True) if token != reply]
    alike = f"{len(gaps) - len(differing)} of {len(gaps)}"
    largest = f"{max(differing):.2f}" if differing else "none differs"
    return alike, largest, f"{np.median(gaps):.2f}", f"{whole} of {len(prompts)}"


def main() -> None:
    """Prints the table."""
    tokenizer = load_tokenizer(fetch_smollm2())
    prompts = [tokenizer.encode(chat_prompt(question), add_special_tokens=False).ids for question in QUESTIONS]
    table = Table("type", "next tokens alike", "largest gap of a difference", "median gap", "answers alike", "MB")
    with tempfile.TemporaryDirectory() as folder:
        for kind, (format, file_type) in KINDS.items():
            path = Path(folder) / f"{kind}.gguf"
            write(path, format, file_type)
            table.add_row(kind, *row(path, prompts), f"{path.stat().st_size / 1e6:.1f}")
    Console().print(table)


if __name__ == "__main__":
    main()
