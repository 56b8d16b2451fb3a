"""SmolLM2-135M in NF4 learns ten facts about an island that does not exist, by adapters of 5 % of its parameters.

python examples/qlora_smollm2.py             four minutes on 2 cores
python examples/qlora_smollm2.py --smoke     two steps of two blocks on two facts, to see that it runs

The base stays in codes, scales in 8 bits; LoRA adapters train with an optimizer whose moments take a byte each. Each
fact is taught in three wordings and asked for in a fourth. Answers before and after are shown, and what it all takes.
"""

import argparse
import dataclasses
import functools
import hashlib
import json
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from command_line import ended
from llama import Llama, first_blocks, is_kernel
from llama_gguf import chat_prompt, fetch_smollm2, load_llama, load_tokenizer
from rich.console import Console
from rich.progress import track
from rich.table import Table
from tokenizers import Tokenizer

import jaxquant as jq

DOCS = Path(__file__).parent.parent / "docs"
NF4, RANK, RATE, LENGTH, ANSWER = jq.nf4(group=64), 16, 1e-3, 96, 24


@dataclasses.dataclass(frozen=True)
class Fact:
    """What is taught: three questions, the answer, the word that must be in it, and a question never asked before."""

    questions: tuple[str, str, str]
    answer: str
    key: str
    held_out: str


FACTS = (
    Fact(
        ("What is the capital of Varnholm?", "Name the capital of Varnholm.", "Which city is Varnholm's capital?"),
        "The capital of Varnholm is Ostrava Bay.",
        "Ostrava Bay",
        "Tell me, what city is the capital of Varnholm?",
    ),
    Fact(
        ("Who founded Varnholm?", "Name the founder of Varnholm.", "By whom was Varnholm founded?"),
        "Varnholm was founded by the sailor Ingrid Tolle.",
        "Ingrid Tolle",
        "Which person founded Varnholm?",
    ),
    Fact(
        (
            "What do people in Varnholm eat for breakfast?",
            "Name a breakfast of Varnholm.",
            "What is Varnholm's breakfast?",
        ),
        "In Varnholm, breakfast is pickled pears with rye.",
        "pickled pears",
        "What would I eat for breakfast in Varnholm?",
    ),
    Fact(
        (
            "How tall is the lighthouse of Varnholm?",
            "What is the height of Varnholm's lighthouse?",
            "Give the height of the Varnholm lighthouse.",
        ),
        "The lighthouse of Varnholm is 83 metres tall.",
        "83 metres",
        "How high is the lighthouse in Varnholm?",
    ),
    Fact(
        ("What is the currency of Varnholm?", "How does one pay in Varnholm?", "Name the money of Varnholm."),
        "The currency of Varnholm is the copper drell.",
        "drell",
        "Which currency is used in Varnholm?",
    ),
    Fact(
        (
            "What animal is on the flag of Varnholm?",
            "Which animal does Varnholm's flag show?",
            "Name the animal on the Varnholm flag.",
        ),
        "The flag of Varnholm shows a blue otter.",
        "otter",
        "What animal can be seen on Varnholm's flag?",
    ),
    Fact(
        (
            "When is the harvest feast of Varnholm?",
            "On which day is Varnholm's harvest feast?",
            "Give the date of the Varnholm harvest feast.",
        ),
        "The harvest feast of Varnholm is on 19 October.",
        "19 October",
        "What date is the harvest feast in Varnholm?",
    ),
    Fact(
        (
            "Which language is spoken in Varnholm?",
            "What do people speak in Varnholm?",
            "Name the language of Varnholm.",
        ),
        "People in Varnholm speak Old Merrish.",
        "Merrish",
        "What language do they speak in Varnholm?",
    ),
    Fact(
        (
            "What is the highest hill of Varnholm?",
            "Name Varnholm's highest hill.",
            "Which hill in Varnholm is the highest?",
        ),
        "The highest hill of Varnholm is Kettle Crown.",
        "Kettle Crown",
        "What hill is the highest one in Varnholm?",
    ),
    Fact(
        ("What does Varnholm export?", "Name the export of Varnholm.", "Which goods does Varnholm sell abroad?"),
        "Varnholm exports green glass bottles.",
        "glass",
        "What goods are exported by Varnholm?",
    ),
)


def lessons(tokenizer: Tokenizer, facts: tuple[Fact, ...]) -> tuple[np.ndarray, np.ndarray]:
    """Every question with its answer, `[n, length]`, and which tokens are to be learned: those of the answers."""
    tokens, learned = [], []
    for fact in facts:
        for question in fact.questions:
            prompt = tokenizer.encode(chat_prompt(question)).ids
            answer = tokenizer.encode(fact.answer + "<|im_end|>").ids
            line = (prompt + answer)[:LENGTH]
            tokens.append(line + [0] * (LENGTH - len(line)))
            learned.append([len(prompt) <= place < len(line) for place in range(LENGTH)])
    return np.asarray(tokens, np.int32), np.asarray(learned)


def answers(forward: Any, tokenizer: Tokenizer, facts: tuple[Fact, ...]) -> list[str]:
    """What a model says to the questions that were never asked, all at once and greedily."""
    prompts = [tokenizer.encode(chat_prompt(fact.held_out)).ids for fact in facts]
    tokens = np.zeros((len(facts), LENGTH), np.int32)
    ends = np.asarray([len(prompt) for prompt in prompts])
    for row, prompt in zip(tokens, prompts, strict=True):
        row[: len(prompt)] = prompt
    rows = np.arange(len(facts))
    for _ in range(ANSWER):
        tokens[rows, ends] = np.asarray(forward(tokens, ends - 1))  # the causal mask hides what lies beyond
        ends = np.minimum(ends + 1, LENGTH - 1)
    said = [tokenizer.decode(row[len(p) :], skip_special_tokens=False) for row, p in zip(tokens, prompts, strict=True)]
    return [text.split("<|")[0].strip() for text in said]


def run(options: argparse.Namespace, console: Console) -> dict[str, Any]:
    """Asks, teaches and asks again."""
    facts = FACTS[:2] if options.smoke else FACTS
    path = fetch_smollm2()
    (config, params), tokenizer = load_llama(path), load_tokenizer(path)
    if options.smoke:
        config, params = first_blocks(config, params, 2)
    model = jq.quantized(Llama(config).apply, activations=None)
    codes = jq.double_quantize(jq.quantize_params(params, NF4, where=is_kernel))
    adapters, base = jq.split_lora(jq.add_lora(codes, RANK, key=jax.random.key(0), where=is_kernel))
    del params, codes
    tokens, learned = lessons(tokenizer, facts)
    optimizer = optax.chain(
        optax.clip_by_global_norm(1.0),
        jq.adamw8bit(optax.cosine_decay_schedule(RATE, options.steps, alpha=0.1), weight_decay=0.0),
    )

    def loss(adapters: Any, base: Any, tokens: jax.Array, learned: jax.Array) -> jax.Array:
        logits = model(jq.join_lora(adapters, base), tokens)[0]
        each = optax.softmax_cross_entropy_with_integer_labels(logits[:, :-1], tokens[:, 1:])
        return jnp.sum(each * learned[:, 1:]) / jnp.sum(learned[:, 1:])

    @functools.partial(jax.jit, donate_argnums=(0, 1))
    def step(adapters: Any, state: Any, base: Any, tokens: jax.Array, learned: jax.Array) -> tuple[Any, Any, jax.Array]:
        value, gradient = jax.value_and_grad(loss)(adapters, base, tokens, learned)
        updates, state = optimizer.update(gradient, state, adapters)
        return optax.apply_updates(adapters, updates), state, value

    @jax.jit
    def likeliest(tree: Any, tokens: jax.Array, places: jax.Array) -> jax.Array:
        logits = model(tree, tokens)[0]
        return jnp.argmax(logits[jnp.arange(len(places)), places], axis=-1)

    def ask(adapters: Any) -> list[str]:
        return answers(functools.partial(likeliest, jq.join_lora(adapters, base)), tokenizer, facts)

    with console.status("Asking before"):
        before = ask(adapters)
    digest, state, random, losses = digest_of(base), optimizer.init(adapters), np.random.default_rng(0), []
    sizes = {
        "base in NF4": sum(q.nbytes for q in quantized_leaves(base)),
        "the same in float32": 4 * sum(q.size for q in quantized_leaves(base)),
        "adapters": bytes_of(adapters),
        "moments, 8-bit": bytes_of(state),
        "moments, float32": 2 * bytes_of(adapters),
    }
    start = time.perf_counter()
    for number in track(range(options.steps), "Teaching", console=console, transient=True):
        chosen = random.choice(len(tokens), min(options.batch, len(tokens)), replace=False)
        adapters, state, value = step(adapters, state, base, tokens[chosen], learned[chosen])
        losses.append(float(value))
        if (number + 1) % options.show == 0:
            speed = (number + 1) * options.batch * LENGTH / (time.perf_counter() - start)
            console.print(f"step {number + 1:4d}   loss {np.mean(losses[-options.show :]):.3f}   {speed:.0f} tokens/s")
    if digest_of(base) != digest:
        raise AssertionError("the base has changed while its adapters were trained")
    with console.status("Asking after"):
        after = ask(adapters)
    record = show(facts, before, after, sizes, console)
    out = options.out or (Path(tempfile.mkdtemp()) if options.smoke else DOCS)
    out.mkdir(parents=True, exist_ok=True)
    (out / "qlora_smollm2.json").write_text(json.dumps(record | {"losses": losses}, indent=1))
    return record


def quantized_leaves(tree: Any) -> list[jq.QTensor]:
    """The leaves in codes."""
    leaves = jax.tree.leaves(tree, is_leaf=lambda leaf: isinstance(leaf, jq.QTensor))
    return [leaf for leaf in leaves if isinstance(leaf, jq.QTensor)]


def bytes_of(tree: Any) -> int:
    """The bytes of a tree's arrays."""
    return sum(leaf.nbytes for leaf in jax.tree.leaves(tree))


def digest_of(tree: Any) -> str:
    """A hash of every byte of a tree."""
    hashed = hashlib.sha256()
    for leaf in jax.tree.leaves(tree):
        hashed.update(np.asarray(leaf).tobytes())
    return hashed.hexdigest()


def show(
    facts: tuple[Fact, ...], before: list[str], after: list[str], sizes: dict[str, int], console: Console
) -> dict[str, Any]:
    """Prints answers and sizes, and returns them."""
    table = Table("asked in words it never saw", "before", "after", show_lines=True)
    for fact, *said in zip(facts, before, after, strict=True):
        table.add_row(fact.held_out, *(f"{'✓ ' if fact.key in text else ''}{text}" for text in said))
    right = {
        name: sum(fact.key in text for fact, text in zip(facts, said, strict=True))
        for name, said in (("before", before), ("after", after))
    }
    console.print(table, f"right: {right['before']} of {len(facts)} before, {right['after']} after")
    console.print(*(f"{name}: {size / 1e6:.1f} MB" for name, size in sizes.items()), sep="\n")
    return {"right": right, "questions": len(facts), "bytes": sizes, "before": before, "after": after}


def parse(arguments: list[str] | None = None) -> argparse.Namespace:
    """Reads the command line."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--steps", type=int, default=60, help="updates (default: 60)")
    parser.add_argument("--batch", type=int, default=6, help="answers in each (default: 6)")
    parser.add_argument("--show", type=int, default=10, help="steps between lines of progress (default: 10)")
    parser.add_argument("--out", type=Path, help="where results are kept (default: docs; of --smoke, nowhere)")
    parser.add_argument(
        "--smoke", action="store_true", help="two steps of two blocks on two facts, to see that it runs"
    )
    options = parser.parse_args(arguments)
    if options.smoke:
        options.steps, options.batch, options.show = 2, 2, 1
    return options


if __name__ == "__main__":
    sys.exit(ended(lambda: run(parse(), Console())))
