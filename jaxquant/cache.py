"""`KVCache`: the keys and values of an attention in codes, one or a few scales for each token and head.

cache = KVCache.empty(batch, length, heads, width)
cache = cache.append(keys, values, position)           quantized as they come, once
mixed = cache.attend(queries, position)                softmax(q k^T / sqrt(width)) v over what the cache holds

Keys have large inputs that all tokens share. What is the same in all keys moves all scores of a query alike, which
softmax does not see: the mean of the first keys is taken off before rounding (as SageAttention does, arXiv:2410.02367).
What is large in some is spread by a Hadamard matrix, which queries get too (QuaRot, arXiv:2404.00456).
"""

import dataclasses
import functools
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.typing import ArrayLike
from jaxtyping import Array, Float, Int

from jaxquant.encode import quantize
from jaxquant.errors import FormatError
from jaxquant.format import Format, int8
from jaxquant.inputs import block_length, hadamard
from jaxquant.qtensor import QTensor, decode

Heads = Float[Array, "batch time heads width"]
Position = Int[ArrayLike, ""]


class Held(NamedTuple):
    """The arrays of a `QTensor` that is no weight: `quantized` leaves it to the function it is an argument of."""

    codes: Any
    scale: Any
    zero: Any


@functools.partial(
    jax.tree_util.register_dataclass, data_fields=["held_keys", "held_values", "shift"], meta_fields=["format"]
)
@dataclasses.dataclass(frozen=True)
class KVCache:
    """The keys and values of one layer: a pytree that is carried through loops, donated and sharded like any other.

    Args:
      held_keys, held_values: the arrays of `keys` and `values`.
      shift: float `[batch, 1, heads, width]`, the mean of the keys that were appended at position 0.
      format: static; of both.
    """

    # Any, because a tree may also hold shapes or shardings in the place of arrays.
    held_keys: Any
    held_values: Any
    shift: Any
    format: Format

    @property
    def keys(self) -> QTensor:
        """The keys `[batch, length, heads, width]` in codes, without `shift`, and rotated."""
        return QTensor(*self.held_keys, dtype=self.shift.dtype, bits=self.format.bits)

    @property
    def values(self) -> QTensor:
        """The values `[batch, length, heads, width]` in codes."""
        return QTensor(*self.held_values, dtype=self.shift.dtype, bits=self.format.bits)

    @classmethod
    def empty(
        cls, batch: int, length: int, heads: int, width: int, format: Format = int8, dtype: Any = jnp.float32
    ) -> "KVCache":
        """A cache of zeros with room for `length` tokens.

        Args:
          batch, length, heads, width: its shape; `heads` are those of keys and values.
          format: of the codes, integers with a scale for each token and head, or for groups of its width.
          dtype: what is read from it.

        Raises:
          FormatError: another kind of format.
          ShapeError: the group does not divide the width.
        """
        if not format.is_integer or not format.per_channel:
            raise FormatError(
                f"{format}: a cache is in integers with a scale per token and head, such as int8 or int4."
            )

        def blank() -> Held:  # every buffer its own, so that the cache can be donated
            return _held(jnp.zeros((batch, length, heads, width), dtype), format)

        return cls(blank(), blank(), jnp.zeros((batch, 1, heads, width), dtype), format)

    @property
    def nbytes(self) -> int:
        """The bytes it takes in memory: with heads of 64, 1.06 a number in int8 and 0.56 in int4."""
        return self.keys.nbytes + self.values.nbytes + self.shift.nbytes

    def append(self, keys: Heads, values: Heads, position: Position) -> "KVCache":
        """Writes the keys and values of some tokens, from `position` on; what lies there is overwritten."""
        keys = keys.astype(self.shift.dtype)
        first = jnp.mean(keys, axis=1, keepdims=True)
        shift = jnp.where(jnp.asarray(position) == 0, first, self.shift)
        put = functools.partial(_put, format=self.format, position=position)
        values = values.astype(self.shift.dtype)
        return KVCache(put(self.held_keys, _rotated(keys - shift)), put(self.held_values, values), shift, self.format)

    def read(self) -> tuple[Heads, Heads]:
        """The keys and values that the codes stand for."""
        return _rotated(decode(self.keys)) + self.shift, decode(self.values)

    def attend(self, queries: Heads, position: Position) -> Heads:
        """Causal attention of the tokens from `position` on to all that the cache holds up to each of them.

            softmax(q k^T / sqrt(width)) v in float32,    neighbouring queries share a head of keys and values

        Args:
          queries: of the newest tokens, whose keys were appended already.
          position: of the first of them.

        Returns:
          The mixed values, of the shape of the queries.
        """
        newest = jnp.asarray(position) + jnp.arange(queries.shape[1])
        visible = jnp.arange(self.keys.shape[1])[None, :] <= newest[:, None]
        keys, values = (decode(q.astype(jnp.float32)) for q in (self.keys, self.values))
        turned = _rotated(queries.astype(jnp.float32))
        mixed = jax.nn.dot_product_attention(turned, keys, values, mask=visible[None, None])
        return mixed.astype(queries.dtype)


def _rotated(heads: Heads) -> Heads:
    """Blocks of the width times a Hadamard matrix, which is its own inverse."""
    return hadamard(heads, 3, block_length(heads.shape[-1]))


def _put(old: Held, new: Heads, *, format: Format, position: Position) -> Held:
    start = (0, position, 0, 0)
    return jax.tree.map(lambda whole, part: jax.lax.dynamic_update_slice(whole, part, start), old, _held(new, format))


def _held(heads: Heads, format: Format) -> Held:
    q = quantize(heads, format, axis=-1)
    return Held(q.codes, q.scale, q.zero)
