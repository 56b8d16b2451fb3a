"""Tokens and the parameters they meet: which axes of a parameter a matmul contracts, and statistics along those.

Every matmul is brought to tokens `[*stack, T, in]` in the axes of the parameter itself, however it was sliced, looped
over, transposed or reshaped on the way. Parameters fed by the same array share one record.
"""

import dataclasses
import functools
import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int, PyTree

from jaxquant.errors import UnseenError
from jaxquant.stats import Stats, whole
from jaxquant.trace import Param

Tokens = Float[Array, "*stack tokens in"]
Look = Callable[[Array], Stats]


@functools.partial(jax.tree_util.register_dataclass, data_fields=["stats"], meta_fields=["loops"])
@dataclasses.dataclass(frozen=True)
class Seen:
    """Statistics on their way out of the loops over stacked parameters that they were gathered in."""

    stats: Stats
    loops: tuple[tuple[int, int], ...]

    def merge(self, other: "Seen") -> "Seen":
        """What both saw."""
        return Seen(self.stats.merge(other.stats), self.loops)

    def leave(self, loop: int) -> "Seen":
        """The loop's axis becomes one of the stack where the parameter was sliced by it, and is merged elsewhere."""
        axis = dict(self.loops).get(loop)
        if axis is None:
            return Seen(self.stats.over_stack(), self.loops)
        stats = dataclasses.replace(self.stats, stack=(axis, *self.stats.stack))
        return Seen(stats, tuple(pair for pair in self.loops if pair[0] != loop))


@dataclasses.dataclass(frozen=True)
class Arrangement:
    """How the axes of activations lie with respect to a parameter: those of the stack, of its inputs, and the others.

    Args:
      split: the shape that the activations `(batch, rest, contracted)` are reshaped to.
      order: the permutation that brings it to (stack, tokens, inputs) in the parameter's own order.
      stack, inputs: the parameter's axes.
      shape: `[*stack, tokens, in]`.
    """

    split: tuple[int, ...]
    order: tuple[int, ...]
    stack: tuple[int, ...]
    inputs: tuple[int, ...]
    shape: tuple[int, ...]


def arrange(param: Param, batch: Sequence[int], contracted: Sequence[int], rest: Sequence[int]) -> Arrangement:
    """Finds the arrangement for a matmul along some axes of the view, `rest` the other sizes of the activations.

    Raises:
      UnseenError: the view does not show whole axes of the parameter.
    """
    origin = param.origin
    if origin is None:
        raise UnseenError(_unseen(param, "it was reshaped or sliced in a way that loses its axes"))
    of_batch = [f for axis in batch for f in origin.axes[axis]]
    of_inputs = [f for axis in contracted for f in origin.axes[axis]]
    split = (*(f.size for f in of_batch), *rest, *(f.size for f in of_inputs))
    place = {factor: i for i, factor in enumerate(of_batch) if factor.axis >= 0}
    stack = sorted(place, key=lambda f: (f.axis, -f.stride))
    first = len(split) - len(of_inputs)
    others = [i for i in range(first) if i not in place.values()]
    # The axes of an array of indices in its own order, before all others.
    others.sort(key=lambda i: -of_batch[i].stride if i < len(of_batch) else 0)
    ranked = sorted(range(len(of_inputs)), key=lambda i: (of_inputs[i].axis, -of_inputs[i].stride))
    order = (*(place[f] for f in stack), *others, *(first + i for i in ranked))
    axes = [tuple(dict.fromkeys(f.axis for f in factors)) for factors in (stack, [of_inputs[i] for i in ranked])]
    for axis, factors in [(a, fs) for some, fs in zip(axes, (stack, of_inputs), strict=True) for a in some]:
        if axis < 0 or math.prod(f.size for f in factors if f.axis == axis) != origin.shape[axis]:
            raise UnseenError(_unseen(param, "a matmul meets only a part of its inputs, or they were broadcast"))
    made = math.prod(f.size for f in of_batch if f.axis < 0)
    if origin.indexed is not None and param.index.size not in (1, made):
        raise UnseenError(_unseen(param, "it was broadcast after an index was taken of it"))
    if set(axes[0]) & set(axes[1]):
        raise UnseenError(_unseen(param, "one of its axes is both contracted and a batch"))
    sizes = tuple(origin.shape[a] for a in axes[0])
    shape = (*sizes, math.prod(split[i] for i in others), math.prod(f.size for f in of_inputs))
    return Arrangement(split, order, axes[0], axes[1], shape)


def _unseen(param: Param, why: str) -> str:
    return f"{param.path}: its inputs cannot be told, because {why}. Leave it out with `where`."


def record(x: Float[Array, "..."], to: Arrangement, param: Param, look: Look) -> Seen:
    """Statistics of activations `(batch, rest, contracted)`, in the stack and the inputs of the parameter."""
    origin = param.origin
    assert origin is not None

    def tokens(x: Array) -> Tokens:
        return jnp.transpose(x.reshape(to.split), to.order).reshape(to.shape)

    if (axis := origin.indexed) is None:
        stats, stack = whole(lambda x: look(tokens(x)), x), to.stack
    else:
        stats = whole(lambda x, index: _by_index(tokens(x), index, origin.shape[axis], look), x, param.index)
        stack = (axis, *to.stack)
    return Seen(dataclasses.replace(stats, stack=stack, inputs=to.inputs), origin.looped)


def record_experts(x: Float[Array, "..."], to: Arrangement, param: Param, look: Look, sizes: Int[Array, " E"]) -> Seen:
    """Statistics for each expert of a `ragged_dot`, whose tokens are sorted by expert."""
    expert = param.origin.whole(0) if param.origin else None
    if expert is None:
        raise UnseenError(_unseen(param, "the experts were sliced or reshaped"))
    of_token = jnp.searchsorted(jnp.cumsum(sizes), jnp.arange(x.shape[0], dtype=sizes.dtype), side="right")

    def one(i: Array) -> Seen:
        return record(x, to, param, lambda tokens: _of_some(tokens, of_token == i, look))

    seen = jax.lax.map(one, jnp.arange(sizes.shape[0], dtype=of_token.dtype))
    return Seen(dataclasses.replace(seen.stats, stack=(expert, *seen.stats.stack)), seen.loops)


def _by_index(tokens: Tokens, index: Int[Array, "..."], count: int, look: Look) -> Stats:
    """Statistics for each of `count` matrices, of the tokens that picked it; tokens are ordered by `index` first."""
    of_token = jnp.repeat(index.reshape(-1), tokens.shape[-2] // max(index.size, 1))
    places = jnp.arange(count, dtype=of_token.dtype)
    return jax.lax.map(lambda i: _of_some(tokens, of_token == i, look), places)


def _of_some(tokens: Tokens, chosen: Bool[Array, " tokens"], look: Look) -> Stats:
    """Statistics of some of the tokens: the others are zeros, which only `count` sees."""
    stats = look(jnp.where(chosen[:, None], tokens, 0))
    return dataclasses.replace(stats, count=jnp.full_like(stats.count, jnp.sum(chosen)))


def spread_taken(pieces: Mapping[tuple[tuple[int, int], ...], PyTree], shape: tuple[int, ...]) -> tuple[Any, Any]:
    """The whole of a stack from its elements, which were taken by fixed indices; zeros where none was.

    Args:
      pieces: by `((axis, index), ...)`, trees of one structure.
      shape: of the parameter.

    Returns:
      The axes that are stacked in front of the trees' own, and the tree.
    """
    if set(pieces) == {()}:
        return (), pieces[()]
    axis = next(iter(pieces))[0][0] if () not in pieces else -1
    by_index: dict[int, dict] = {}
    for taken, piece in pieces.items():
        if not taken or taken[0][0] != axis:
            raise UnseenError(f"a stack is used as a whole and by its elements, or along several axes: {set(pieces)}.")
        by_index.setdefault(taken[0][1], {})[taken[1:]] = piece
    inner = {index: spread_taken(rest, shape) for index, rest in by_index.items()}
    stacked, first = next(iter(inner.values()))
    nothing = (stacked, jax.tree.map(jnp.zeros_like, first))
    rows = [inner.get(i, nothing)[1] for i in range(shape[axis])]
    return (axis, *stacked), jax.tree.map(lambda *parts: jnp.stack(parts), *rows)
