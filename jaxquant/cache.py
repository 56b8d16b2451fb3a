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
from jaxtyping import Array, Float

from jaxquant.attention import Heads, Position, attend
from jaxquant.encode import extremes, quantize
from jaxquant.errors import FormatError, ShapeError
from jaxquant.format import Format, int8
from jaxquant.inputs import block_length, hadamard
from jaxquant.packed import Packed, bytes_of, places_of, unpacked
from jaxquant.qtensor import QTensor, decode, true_bytes

# Queries of a prompt that are taken together, at least, and the most such blocks: fewer would meet more keys after
# theirs, which is work for nothing, and each block is one more to compile.
_QUERY_BLOCK, _MOST_BLOCKS = 128, 8


class Held(NamedTuple):
    """The arrays of a `QTensor` that is no weight: `quantized` leaves it to the function it is an argument of.

    All of them in bytes or floats: to write one token into an array of 4 bits, XLA on CPU would rewrite all of it.
    """

    held: Any
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
        return self._coded(self.held_keys)

    @property
    def values(self) -> QTensor:
        """The values `[batch, length, heads, width]` in codes."""
        return self._coded(self.held_values)

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
          ShapeError: the group does not divide the width, or ends within a byte.
        """
        if not format.is_integer or not format.per_channel:
            raise FormatError(
                f"{format}: a cache is in integers with a scale per token and head, such as int8 or int4."
            )

        packed, member = places_of(format.container), format.group or width
        if member % packed:
            raise ShapeError(
                f"{format}: {packed} codes share a byte, which {member} of them would cut; heads are {width} wide: use "
                f"groups of a multiple of {packed}, or int8."
            )

        def blank() -> Held:  # every buffer its own, so that the cache can be donated
            return _held(jnp.zeros((batch, length, heads, width), dtype), format)

        return cls(blank(), blank(), jnp.zeros((batch, 1, heads, width), dtype), format)

    @property
    def length(self) -> int:
        """How many tokens it has room for."""
        return self.held_keys.held.shape[1]

    @property
    def nbytes(self) -> int:
        """The bytes it takes in memory: with heads of 64, 1.06 a number in int8 and 0.56 in int4."""
        return sum(true_bytes(part) for part in jax.tree.leaves(self))

    def append(self, keys: Heads, values: Heads, position: Position) -> "KVCache":
        """Writes the keys and values of some tokens, from `position` on; what lies there is overwritten."""
        if keys.shape[1] == 0:
            return self
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
        if queries.shape[1] == 0:
            return queries
        position, later = jnp.asarray(position), functools.partial(self._mixed, position=position)
        turned = _rotated(queries.astype(jnp.float32)) * queries.shape[-1] ** -0.5
        one = queries.shape[1] == 1
        mixed = later(turned) if one else jax.lax.cond(position == 0, self._mixed_by_itself, later, turned)
        return mixed.astype(queries.dtype)

    def _mixed_by_itself(self, queries: Heads) -> Heads:
        """Attention of a text that nothing came before: blocks of queries, each to no later keys than its last's."""
        time = queries.shape[1]
        size = max(_QUERY_BLOCK, -(-time // _MOST_BLOCKS))
        ends = [(start, min(start + size, time)) for start in range(0, time, size)]
        parts = [self._first(end)._mixed(queries[:, start:end], start) for start, end in ends]
        return jnp.concatenate(parts, axis=1)

    def _first(self, tokens: int) -> "KVCache":
        """The cache of the first tokens."""
        keys, values = jax.tree.map(lambda part: part[:, :tokens], (self.held_keys, self.held_values))
        return dataclasses.replace(self, held_keys=keys, held_values=values)

    def _mixed(self, queries: Heads, position: Position) -> Heads:
        """softmax(q k^T) v for queries that were rotated and scaled, in float32."""
        return attend(queries, self._of_places(self.held_keys), self._of_places(self.held_values), position)

    def _of_places(self, part: Held) -> list[Float[Array, "batch length heads bytes"]]:
        """What the codes at each place of a byte stand for, in float32, shift and rotation not undone."""
        places, held = places_of(self.format.container), part.held.astype(jnp.int16)
        zero = None if part.zero is None else self._zero(part)

        def of(place: int) -> Float[Array, "batch length heads bytes"]:
            return decode(QTensor(unpacked(held, place, places), part.scale, zero, jnp.float32, self.format.bits))

        return [of(place) for place in range(places)]

    def _coded(self, part: Held) -> QTensor:
        """Keys or values as a `QTensor`, whose zero points are fractions."""
        zero = None if part.zero is None else self._zero(part)
        codes = Packed(part.held, self.format.container).codes
        return QTensor(codes, part.scale, zero, self.shift.dtype, self.format.bits)

    def _zero(self, part: Held) -> Float[Array, "batch length heads groups"]:
        """The zero points in steps."""
        return part.zero.astype(jnp.float32) / _fineness(self.format)


def _rotated(heads: Heads) -> Heads:
    """Blocks of the width times a Hadamard matrix, which is its own inverse."""
    return hadamard(heads, 3, block_length(heads.shape[-1]))


def _put(old: Held, new: Heads, *, format: Format, position: Position) -> Held:
    start = (0, position, 0, 0)
    return jax.tree.map(lambda whole, part: jax.lax.dynamic_update_slice(whole, part, start), old, _held(new, format))


def _held(heads: Heads, format: Format) -> Held:
    """Tokens in codes, `x = (codes - zero / fineness) * scale`: a zero point has a byte, and uses all of it.

    A whole one moves both ends of a range by up to half a step: a third of the loss of int4 in groups of 16.
    """
    q = quantize(heads, format, axis=-1)
    if q.zero is None:
        return Held(bytes_of(q.codes), q.scale, None)
    scale, fineness = q.scale[..., None], _fineness(format)
    groups = heads.astype(jnp.float32).reshape(*q.scale.shape, -1)
    low, _ = extremes(groups, -1)
    zero = jnp.round((format.qmin - low / scale) * fineness)
    codes = jnp.clip(jnp.round(groups / scale + zero / fineness), format.qmin, format.qmax).astype(format.container)
    return Held(bytes_of(codes.reshape(heads.shape)), q.scale, zero[..., 0].astype(jnp.int8))


def _fineness(format: Format) -> int:
    """The parts of a step that a zero point is rounded to."""
    return 2 ** (8 - format.bits)
