"""Llama in Flax Linen, with nothing of quantization in it: RMSNorm, grouped-query attention, SwiGLU and a KV cache.

Two ways to call the model, with the same parameters:

    logits, _ = model.apply(params, tokens)             a whole text under a causal mask
    logits, cache = model.apply(params, tokens, cache)  a few more tokens after those the cache holds
"""

import dataclasses
import functools
import itertools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import linen as nn
from jax.typing import ArrayLike
from jaxtyping import Array, Float, Int

HeadArray = Float[Array, "batch time heads head_width"]

# Queries of a prompt that are taken together, at least, and the most such blocks, each of which is compiled.
QUERY_BLOCK, MOST_BLOCKS = 128, 8


@dataclasses.dataclass(frozen=True)
class LlamaConfig:
    """The shape of a Llama.

    Args:
      vocab: number of tokens.
      width: length of the vector that runs through the layers.
      hidden: inner width of the feed-forward layers.
      layers: number of blocks.
      heads: number of query heads.
      kv_heads: number of key and value heads; each serves `heads / kv_heads` query heads.
      head_width: length of one head's vectors.
      rope_base: the base of the rotary frequencies.
      rope_factors: what each rotary frequency is divided by, or None (Llama 3.1 stretches its context this way).
      norm_eps: what RMSNorm adds to the mean square.
      tied: whether the output head is the embedding.
      fused: whether the matrices that read the same vector are one, as `fused` makes them.
    """

    vocab: int
    width: int
    hidden: int
    layers: int
    heads: int
    kv_heads: int
    head_width: int
    rope_base: float = 1e4
    rope_factors: tuple[float, ...] | None = None
    norm_eps: float = 1e-5
    tied: bool = True
    fused: bool = False


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class LayerCache:
    """The keys and values of one layer, in float."""

    keys: HeadArray
    values: HeadArray

    @classmethod
    def empty(cls, batch: int, length: int, heads: int, width: int, dtype: Any = jnp.float32) -> "LayerCache":
        """Zeros, every buffer its own, so that the cache can be donated."""
        return cls(*(jnp.zeros((batch, length, heads, width), dtype) for _ in range(2)))

    def append(self, keys: HeadArray, values: HeadArray, position: Int[Array, ""]) -> "LayerCache":
        """Writes those of some tokens from `position` on."""
        put = lambda old, new: jax.lax.dynamic_update_slice(old, new, (0, position, 0, 0))  # noqa: E731
        return LayerCache(put(self.keys, keys), put(self.values, values))

    def attend(self, queries: HeadArray, position: Int[Array, ""]) -> HeadArray:
        """Attention of queries that begin at `position`."""
        keys, values, time = self.keys, self.values, queries.shape[1]
        if time == 1:
            return attend(queries, keys, values, position)
        return jax.lax.cond(
            position == 0,
            lambda first: attend_to_itself(first, keys[:, :time], values[:, :time]),
            lambda later: attend(later, keys, values, position),
            queries,
        )

    @property
    def length(self) -> int:
        """How many tokens it has room for."""
        return self.keys.shape[1]


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class KVCache:
    """What every layer remembers of the tokens so far, of a length fixed in advance.

    XLA on CPU updates each of them in place; a stack of layers, or heads before time, it would copy on every step.
    """

    layers: tuple[Any, ...]
    position: Int[Array, ""]

    @classmethod
    def empty(
        cls, config: LlamaConfig, batch: int, length: int, layer: Callable[..., Any] = LayerCache.empty
    ) -> "KVCache":
        """A cache with room for `length` tokens. What is written past its end overwrites the last, rotated as the last.

        Args:
          config: of the model.
          batch, length: how many texts, and of how many tokens.
          layer: `(batch, length, heads, width)` to what one layer remembers, which has `length`, `append`, `attend`.
        """
        layers = tuple(layer(batch, length, config.kv_heads, config.head_width) for _ in range(config.layers))
        return cls(layers, jnp.zeros((), jnp.int32))


@functools.cache
def rotations(config: LlamaConfig, length: int) -> Float[np.ndarray, "2 length pairs"]:
    """The cosine and the sine of position * base^(-2i / head_width), for every position and pair i.

    Constants of the program, because XLA would compute them anew in every layer.
    """
    pairs = config.head_width // 2
    frequencies = config.rope_base ** (-np.arange(pairs) / pairs)
    if config.rope_factors is not None:
        frequencies = frequencies / np.asarray(config.rope_factors)
    angles = np.outer(np.arange(length), frequencies)
    turns = np.stack([np.cos(angles), np.sin(angles)]).astype(np.float32)
    turns.setflags(write=False)
    return turns


def rope(x: HeadArray, turns: Float[Array, "2 time pairs"]) -> HeadArray:
    """Rotates neighbouring pairs (x[2i], x[2i+1]), as GGUF files order them, by the angles of their positions."""
    cos, sin = turns[:, None, :, None]
    even, odd = x[..., 0::2], x[..., 1::2]
    return jnp.stack([even * cos - odd * sin, even * sin + odd * cos], axis=-1).reshape(x.shape).astype(x.dtype)


def attend(q: HeadArray, k: HeadArray, v: HeadArray, position: Int[ArrayLike, ""]) -> HeadArray:
    """Causal softmax attention of queries that begin at `position`; neighbouring query heads share a KV head."""
    batch, time, heads, head_width = q.shape
    length, kv_heads = k.shape[1:3]
    shared = heads // kv_heads
    # The queries that share a key become more rows of one matrix product, so that no key is copied.
    rows = q.swapaxes(1, 2).reshape(batch, kv_heads, shared * time, head_width)
    # Keys as the left operand, because XLA on CPU packs the right one anew at every call.
    scores = jnp.einsum("bskd,bkrd->bksr", k, rows).swapaxes(2, 3) * head_width**-0.5
    visible = jnp.arange(length)[None] <= position + jnp.arange(time)[:, None]
    visible = jnp.tile(visible, (shared, 1))[None, None]
    weights = nn.softmax(jnp.where(visible, scores, -jnp.inf))
    mixed = jnp.einsum("bkrs,bskd->bkrd", weights, v)
    return mixed.reshape(batch, heads, time, head_width).swapaxes(1, 2)


def attend_to_itself(q: HeadArray, k: HeadArray, v: HeadArray) -> HeadArray:
    """Attention of a text that nothing came before: blocks of queries, each to no later keys than its last's."""
    size = max(QUERY_BLOCK, -(-q.shape[1] // MOST_BLOCKS))
    ends = [(start, start + size) for start in range(0, q.shape[1], size)]
    return jnp.concatenate([attend(q[:, a:b], k[:, :b], v[:, :b], a) for a, b in ends], axis=1)


def projections(x: Array, widths: dict[str, int], fused: bool) -> list[Array]:
    """The products of a vector with several matrices, or with all of them side by side in one, inside a module."""
    if not fused:
        return [nn.Dense(width, use_bias=False, name=name)(x) for name, width in widths.items()]
    together = nn.Dense(sum(widths.values()), use_bias=False, name="_".join(widths))(x)
    return jnp.split(together, list(itertools.accumulate(widths.values()))[:-1], axis=-1)


class Attention(nn.Module):
    """Grouped-query attention with rotary positions."""

    config: LlamaConfig

    @nn.compact
    def __call__(self, x, past, position):
        c = self.config
        batch, time, _ = x.shape
        counts = {"query": c.heads, "key": c.kv_heads, "value": c.kv_heads}
        widths = {name: count * c.head_width for name, count in counts.items()}
        q, k, v = (y.reshape(batch, time, -1, c.head_width) for y in projections(x, widths, c.fused))
        table = rotations(c, time if past is None else past.length)
        turns = jax.lax.dynamic_slice_in_dim(table, position, time, axis=1)
        q, k = rope(q, turns), rope(k, turns)
        past = None if past is None else past.append(k, v, position)
        mixed = attend_to_itself(q, k, v) if past is None else past.attend(q, position)
        return nn.Dense(c.width, use_bias=False, name="output")(mixed.reshape(batch, time, -1)), past


class MLP(nn.Module):
    """SwiGLU: down(silu(gate(x)) * up(x))."""

    config: LlamaConfig

    @nn.compact
    def __call__(self, x):
        c = self.config
        gate, up = projections(x, {"gate": c.hidden, "up": c.hidden}, c.fused)
        return nn.Dense(c.width, use_bias=False, name="down")(nn.silu(gate) * up)


class Block(nn.Module):
    """Attention, then the feed-forward layer, each on a normed copy of the stream and added to it."""

    config: LlamaConfig

    @nn.compact
    def __call__(self, x, past, position):
        eps = self.config.norm_eps
        normed = nn.RMSNorm(eps, name="attention_norm")(x)
        mixed, present = Attention(self.config, name="attention")(normed, past, position)
        x = x + mixed
        return x + MLP(self.config, name="mlp")(nn.RMSNorm(eps, name="mlp_norm")(x)), present


class Llama(nn.Module):
    """A Llama of any size: tokens to the logits of the tokens that follow them.

    The layers are unrolled: on CPU, `lax.scan` over stacked layers would copy each layer's weights on every step.
    `block=nn.remat(Block)` keeps no activations inside the layers for the backward pass; `last=True` gives the logits
    after the last token only, which is all that a prompt is read for.
    """

    config: LlamaConfig
    block: type[nn.Module] = Block
    last: bool = False

    @nn.compact
    def __call__(
        self, tokens: Int[Array, "batch time"], cache: KVCache | None = None
    ) -> tuple[Float[Array, "batch time vocab"], KVCache | None]:
        c = self.config
        embed = nn.Embed(c.vocab, c.width, name="embed")
        x = embed(tokens)
        position = jnp.zeros((), jnp.int32) if cache is None else cache.position
        presents = []
        for layer in range(c.layers):
            past = None if cache is None else cache.layers[layer]
            x, present = self.block(c, name=f"block_{layer}")(x, past, position)
            presents.append(present)
        x = nn.RMSNorm(c.norm_eps, name="norm")(x[:, -1:] if self.last else x)
        logits = embed.attend(x) if c.tied else nn.Dense(c.vocab, use_bias=False, name="head")(x)
        if cache is not None:
            cache = KVCache(tuple(presents), position + tokens.shape[1])
        return logits, cache


def is_kernel(path: str, array: Any) -> bool:
    """The matrices of the blocks, for `where`: not the embedding, and no norm."""
    del array
    return "kernel" in path


def fused(config: LlamaConfig, params: Any) -> tuple[LlamaConfig, Any]:
    """The same model with query, key and value in one matrix, and gate and up: fewer products, for serving."""

    def joined(tree: dict[str, Any], *names: str) -> dict[str, Any]:
        kernel = jnp.concatenate([tree[name]["kernel"] for name in names], axis=1)
        return {key: value for key, value in tree.items() if key not in names} | {"_".join(names): {"kernel": kernel}}

    def block(tree: dict[str, Any]) -> dict[str, Any]:
        attention, mlp = joined(tree["attention"], "query", "key", "value"), joined(tree["mlp"], "gate", "up")
        return tree | {"attention": attention, "mlp": mlp}

    tree = params["params"]
    blocks = {name: block(part) for name, part in tree.items() if name.startswith("block_")}
    return dataclasses.replace(config, fused=True), {"params": tree | blocks}


def first_blocks(config: LlamaConfig, params: Any, count: int) -> tuple[LlamaConfig, Any]:
    """The model cut off after some blocks: nonsense of the right shapes, for a quick look at what runs on it."""
    later = {f"block_{layer}" for layer in range(count, config.layers)}
    kept = {name: tree for name, tree in params["params"].items() if name not in later}
    return dataclasses.replace(config, layers=count), {"params": kept}
