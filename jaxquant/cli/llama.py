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


def read(file: Gguf) -> tuple[Shape, dict[str, Any]]:
    """The shape and the weights of the Llama that a GGUF file holds, in the codes they have there.

    Raises:
      FileError: it holds another model, or not all of one.
    """
    architecture = file.metadata.get("general.architecture")
    if architecture != "llama":
        raise FileError(f"its model is of the architecture {architecture!r}; only 'llama' can be evaluated.")

    def number(key: str, default: float | None = None) -> Any:
        value = file.metadata.get(f"llama.{key}", default)
        if isinstance(value, bool) or not isinstance(value, int | float):
            raise FileError(f"its field 'llama.{key}' is {value!r}, not a number.")
        return value

    def count(key: str, default: int | None = None) -> int:
        value = number(key, default)
        if type(value) is not int or value < 1:
            raise FileError(f"its field 'llama.{key}' is {value!r}, not a positive whole number.")
        return value

    heads, layers = count("attention.head_count"), count("block_count")
    if layers > len(file.entries):  # before the names of all their tensors are listed
        raise FileError(f"its field 'llama.block_count' is {layers}, and it has {len(file.entries)} tensors.")
    shape = Shape(
        layers,
        heads,
        count("attention.head_count_kv", heads),
        number("rope.freq_base", 1e4),
        number("attention.layer_norm_rms_epsilon"),
    )
    blocks = [f"blk.{layer}.{part}.weight" for layer in range(shape.layers) for part in _BLOCK]
    needed = {"token_embd.weight", "output_norm.weight", *blocks}
    allowed = {*needed, "output.weight", _FACTORS}
    wrong = sorted((needed - set(file.entries)) | (set(file.entries) - allowed))
    if wrong:
        raise FileError(f"it lacks, or has beyond what a dense Llama without biases has, {', '.join(wrong[:8])}.")
    return shape, {name: _float32(file.tensors[name]) for name in file.entries}


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
