"""A Llama in plain JAX over the tensors of a GGUF file, under the names and in the layout they have there.

x = x + Attention(norm(x));  x = x + W_down (silu(W_gate norm(x)) * W_up norm(x))       every W is [out, in]
"""

import dataclasses
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from jaxquant.errors import FileError
from jaxquant.files.gguf.file import Gguf
from jaxquant.qtensor import is_qtensor

_BLOCK = ("attn_norm", "attn_q", "attn_k", "attn_v", "attn_output", "ffn_norm", "ffn_gate", "ffn_up", "ffn_down")
_FACTORS = "rope_freqs.weight"  # what each rotary frequency is divided by, since Llama 3.1

Hidden = Float[Array, "batch time width"]


@dataclasses.dataclass(frozen=True)
class Shape:
    """What the tensors of a Llama do not say of themselves.

    Args:
      layers: number of blocks.
      heads, kv_heads: number of heads of queries, and of keys and values.
      rope_base: the base of the rotary frequencies.
      epsilon: what RMSNorm adds to the mean square.
    """

    layers: int
    heads: int
    kv_heads: int
    rope_base: float
    epsilon: float


@dataclasses.dataclass(frozen=True)
class _Fields:
    """The numbers that a GGUF file says of its Llama."""

    file: Gguf

    def number(self, key: str, default: float | None = None) -> Any:
        """A number, or the default where there is none."""
        value = self.file.metadata.get(f"llama.{key}", default)
        if isinstance(value, bool) or not isinstance(value, int | float):
            raise self.error(key, f"{value!r:.60}, not a number")
        return value

    def count(self, key: str, default: int | None = None) -> int:
        """A number of things, of which there is at least one."""
        value = self.number(key, default)
        if type(value) is not int or value < 1:
            raise self.error(key, f"{value!r}, not a positive whole number")
        return value

    def error(self, key: str, what: str) -> FileError:
        """An error that names one of the fields."""
        return _error(self.file, f"its field 'llama.{key}' is {what}. Convert the model anew.")


def _error(file: Gguf, what: str) -> FileError:
    return FileError(f"{file.tensors.path}: {what}")


def read(file: Gguf) -> tuple[Shape, dict[str, Any]]:
    """The shape and the weights of the Llama that a GGUF file holds, in the codes they have there.

    Raises:
      FileError: it holds another model, or not all of one; it names the file.
    """
    architecture = file.metadata.get("general.architecture")
    if architecture != "llama":
        what = f"its model is of the architecture {architecture!r:.60}; only 'llama' can be evaluated."
        raise _error(file, f"{what} Choose the file of a Llama.")
    fields = _Fields(file)
    heads, layers = fields.count("attention.head_count"), fields.count("block_count")
    if layers > len(file.entries):  # before the names of all their tensors are listed
        raise fields.error("block_count", f"{layers}, and it has {len(file.entries)} tensors")
    kv_heads = fields.count("attention.head_count_kv", heads)
    base, epsilon = fields.number("rope.freq_base", 1e4), fields.number("attention.layer_norm_rms_epsilon")
    shape = Shape(layers, heads, kv_heads, base, epsilon)
    _check_names(file, shape)
    _check_shapes(file, shape)
    return shape, {name: _float32(file.tensors[name]) for name in file.entries}


def _check_names(file: Gguf, shape: Shape) -> None:
    blocks = [f"blk.{layer}.{part}.weight" for layer in range(shape.layers) for part in _BLOCK]
    needed = {"token_embd.weight", "output_norm.weight", *blocks}
    wrong = sorted((needed - set(file.entries)) | (set(file.entries) - {*needed, "output.weight", _FACTORS}))
    if wrong:
        what = f"it lacks, or has beyond what a dense Llama without biases has, {', '.join(wrong)[:400]}."
        raise _error(file, f"{what} Choose the file of such a Llama.")


def _check_shapes(file: Gguf, shape: Shape) -> None:
    """Raises if a tensor has not the shape that the fields, the embedding and the first block ask of it."""
    embedding, queries, hidden = (
        file.entries[name].shape for name in ("token_embd.weight", "blk.0.attn_q.weight", "blk.0.ffn_gate.weight")
    )
    vocabulary, width, head = embedding[0], embedding[-1], queries[0] // shape.heads
    if queries[0] % (2 * shape.heads) or shape.heads % shape.kv_heads:
        what = f"{queries[0]} queries do not make {shape.heads} heads of an even width, in {shape.kv_heads} groups."
        raise _error(file, f"its {what} Convert the model anew.")
    q, kv = shape.heads * head, shape.kv_heads * head
    inner = {"attn_q": (q, width), "attn_k": (kv, width), "attn_v": (kv, width), "attn_output": (width, q)}
    inner |= {"ffn_gate": (hidden[0], width), "ffn_up": (hidden[0], width), "ffn_down": (width, hidden[0])}
    outer = {"token_embd.weight": (vocabulary, width), "output.weight": (vocabulary, width), _FACTORS: (head // 2,)}
    for name, entry in file.entries.items():
        part = name.removesuffix(".weight").rpartition(".")[2]
        asked = outer[name] if name in outer else inner.get(part, (width,))
        if entry.shape != asked:
            what = f"tensor {name!r} has the shape {entry.shape}, and the others ask for {asked}."
            raise _error(file, f"{what} Convert the model anew.")


def _float32(tensor: Any) -> Any:
    return tensor.astype(jnp.float32) if is_qtensor(tensor) else jnp.asarray(tensor, jnp.float32)


def logits(
    shape: Shape, weights: Mapping[str, Any], tokens: Int[Array, "batch time"]
) -> Float[Array, "batch time vocabulary"]:
    """The logits of the token after each."""
    embedding = weights["token_embd.weight"]
    x = embedding[tokens]
    pairs = weights["blk.0.attn_q.weight"].shape[0] // shape.heads // 2
    factors = weights.get(_FACTORS, jnp.ones(pairs))
    for layer in range(shape.layers):
        block = {part: weights[f"blk.{layer}.{part}.weight"] for part in _BLOCK}
        x = x + _attention(shape, block, factors, _norm(shape, x, block["attn_norm"]))
        x = x + _feed_forward(block, _norm(shape, x, block["ffn_norm"]))
    return _norm(shape, x, weights["output_norm.weight"]) @ weights.get("output.weight", embedding).T


def _norm(shape: Shape, x: Hidden, gain: Float[Array, " width"]) -> Hidden:
    mean = jnp.mean(jnp.square(x), axis=-1, keepdims=True)
    return x * jax.lax.rsqrt(mean + shape.epsilon) * gain[None, None]


def _feed_forward(block: Mapping[str, Any], x: Hidden) -> Hidden:
    return (jax.nn.silu(x @ block["ffn_gate"].T) * (x @ block["ffn_up"].T)) @ block["ffn_down"].T


def _attention(shape: Shape, block: Mapping[str, Any], factors: Float[Array, " pairs"], x: Hidden) -> Hidden:
    def heads(weight: Any, count: int) -> Float[Array, "batch time heads width"]:
        return (x @ weight.T).reshape(*x.shape[:2], count, -1)

    q = _rope(shape, factors, heads(block["attn_q"], shape.heads))
    k = _rope(shape, factors, heads(block["attn_k"], shape.kv_heads))
    mixed = jax.nn.dot_product_attention(q, k, heads(block["attn_v"], shape.kv_heads), is_causal=True)
    return mixed.reshape(*x.shape[:2], -1) @ block["attn_output"].T


def _rope(
    shape: Shape, factors: Float[Array, " pairs"], x: Float[Array, "batch time heads width"]
) -> Float[Array, "batch time heads width"]:
    """Rotates neighbouring pairs, as GGUF files order them, by position * base^(-2i / width) / factor."""
    pairs = x.shape[-1] // 2
    frequencies = shape.rope_base ** (-jnp.arange(pairs, dtype=jnp.float32) / pairs) / factors
    angles = jnp.outer(jnp.arange(x.shape[1], dtype=jnp.float32), frequencies)[None, :, None]
    even, odd = x[..., 0::2], x[..., 1::2]
    turned = (even * jnp.cos(angles) - odd * jnp.sin(angles), even * jnp.sin(angles) + odd * jnp.cos(angles))
    return jnp.stack(turned, axis=-1).reshape(x.shape)
