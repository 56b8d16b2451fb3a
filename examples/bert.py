"""BERT in Flax Linen, with nothing of quantization in it, under the names that PyTorch checkpoints of it use.

    embeddings = Bert(MINILM).apply(params, tokens, mask)       one unit vector for each sentence

So a checkpoint `encoder.layer.0.attention.self.query.weight` is read without a table of names: `from_torch` puts it at
`encoder/layer_0/attention/self/query/kernel`, transposed.
"""

import dataclasses
import re
from collections.abc import Mapping
from typing import Any

import jax.numpy as jnp
import numpy as np
from flax import linen as nn
from jaxtyping import Array, Bool, Float, Int

Stream = Float[Array, "batch time width"]


@dataclasses.dataclass(frozen=True)
class BertConfig:
    """The shape of a BERT.

    Args:
      vocab: number of tokens.
      width: length of the vector that runs through the layers.
      hidden: inner width of the feed-forward layers.
      layers: number of layers.
      heads: number of attention heads.
      positions: the longest text.
      norm_eps: what LayerNorm adds to the variance.
    """

    vocab: int = 30522
    width: int = 384
    hidden: int = 1536
    layers: int = 6
    heads: int = 12
    positions: int = 512
    norm_eps: float = 1e-12


MINILM = BertConfig()


class Embeddings(nn.Module):
    """What a token is, where it is, and that it is of the first of two texts."""

    config: BertConfig

    @nn.compact
    def __call__(self, tokens: Int[Array, "batch time"]) -> Stream:
        c = self.config
        x = nn.Embed(c.vocab, c.width, name="word_embeddings")(tokens)
        x = x + nn.Embed(c.positions, c.width, name="position_embeddings")(jnp.arange(tokens.shape[1]))[None]
        x = x + nn.Embed(2, c.width, name="token_type_embeddings")(jnp.zeros_like(tokens))
        return nn.LayerNorm(c.norm_eps, name="LayerNorm")(x)


class SelfAttention(nn.Module):
    """Softmax attention of every token to those that are no padding."""

    config: BertConfig

    @nn.compact
    def __call__(self, x: Stream, mask: Bool[Array, "batch time"]) -> Stream:
        c = self.config

        def heads(name: str) -> Array:
            return nn.Dense(c.width, name=name)(x).reshape(*x.shape[:2], c.heads, c.width // c.heads)

        q, k, v = heads("query"), heads("key"), heads("value")
        mixed = nn.dot_product_attention(q, k, v, mask=mask[:, None, None, :])
        return mixed.reshape(x.shape)


class Output(nn.Module):
    """A dense layer, added to the stream, and normed."""

    config: BertConfig

    @nn.compact
    def __call__(self, x: Array, stream: Stream) -> Stream:
        y = nn.Dense(self.config.width, name="dense")(x)
        return nn.LayerNorm(self.config.norm_eps, name="LayerNorm")(y + stream)


class Attention(nn.Module):
    """Attention and what is done with it."""

    config: BertConfig

    @nn.compact
    def __call__(self, x: Stream, mask: Bool[Array, "batch time"]) -> Stream:
        mixed = SelfAttention(self.config, name="self")(x, mask)
        return Output(self.config, name="output")(mixed, x)


class Intermediate(nn.Module):
    """The wide layer."""

    config: BertConfig

    @nn.compact
    def __call__(self, x: Stream) -> Array:
        return nn.gelu(nn.Dense(self.config.hidden, name="dense")(x), approximate=False)


class Layer(nn.Module):
    """Attention, then the feed-forward layer."""

    config: BertConfig

    @nn.compact
    def __call__(self, x: Stream, mask: Bool[Array, "batch time"]) -> Stream:
        x = Attention(self.config, name="attention")(x, mask)
        return Output(self.config, name="output")(Intermediate(self.config, name="intermediate")(x), x)


class Encoder(nn.Module):
    """The layers, one after the other."""

    config: BertConfig

    @nn.compact
    def __call__(self, x: Stream, mask: Bool[Array, "batch time"]) -> Stream:
        for layer in range(self.config.layers):
            x = Layer(self.config, name=f"layer_{layer}")(x, mask)
        return x


class Bert(nn.Module):
    """A sentence encoder: the mean of BERT's last layer over the tokens of a sentence, at length 1."""

    config: BertConfig

    @nn.compact
    def __call__(
        self, tokens: Int[Array, "batch time"], mask: Bool[Array, "batch time"]
    ) -> Float[Array, "batch width"]:
        x = Encoder(self.config, name="encoder")(Embeddings(self.config, name="embeddings")(tokens), mask)
        mean = jnp.mean(x, axis=1, where=mask[..., None])
        return mean / jnp.linalg.norm(mean, axis=-1, keepdims=True)


def from_torch(tensors: Mapping[str, np.ndarray]) -> dict[str, Any]:
    """A PyTorch checkpoint's tensors as the variables of `Bert`: dense weights `[out, in]` become kernels `[in, out]`.

    Args:
      tensors: by their dotted names. The pooler on the first token, which sentence encoders do not use, is left out,
        and so is the table of the numbers from 0 to 511.
    """
    tree: dict[str, Any] = {}
    for name, tensor in tensors.items():
        if name.startswith("pooler.") or name.endswith("position_ids"):
            continue
        *parents, leaf = re.sub(r"\blayer\.(\d+)", r"layer_\1", name).split(".")
        node = tree
        for parent in parents:
            node = node.setdefault(parent, {})
        if leaf == "weight":
            parent = parents[-1]
            leaf = "scale" if parent == "LayerNorm" else "embedding" if parent.endswith("embeddings") else "kernel"
        node[leaf] = jnp.asarray(tensor.T if leaf == "kernel" else tensor)
    return {"params": tree}
