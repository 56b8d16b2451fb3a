"""How data movement moves a parameter that is made of several arrays.

A *bundle* is a pytree of arrays of one rank that stand together for one array of shape `shape`: every axis of every
part divides the same axis of `shape`. Codes are full; a scale is 1 along the axes it is shared over, or counts its
groups. A view moves all parts of a bundle at once, so nothing is decoded; where a part cannot follow (a slice that
cuts through a group, a reshape that would mix groups), the view is None and the caller decodes. A bundle may name
`blocks`, the length along each axis of what a slice has to leave whole, and a form `in_bytes` to enter loops and
branches in, which is `unpacked` there.

    shape  (576, 9, 64)      transpose (1, 0, 2)      (9, 576, 64)
    codes  (576, 9, 64)  ---------------------------> (9, 576, 64)
    scale  (  9, 1, 64)      groups of 64, per head   (1,   9, 64)
"""

import math
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Shaped

Bundle = Any
Shape = tuple[int, ...]


def expand(part: Shaped[Array, "..."], shape: Shape) -> Shaped[Array, "..."]:
    """Repeats a part's groups so that it broadcasts against `shape`; axes of size 1 are left to broadcasting."""
    if all(p in (1, n) for p, n in zip(part.shape, shape, strict=True)):
        return part
    split, wide, full = [], [], []
    for p, n in zip(part.shape, shape, strict=True):
        member = n // p if p not in (1, n) else 1
        split += [p, 1] if member > 1 else [p]
        wide += [p, member] if member > 1 else [p]
        full.append(p * member)
    return jnp.broadcast_to(part.reshape(split), wide).reshape(full)


def transpose(bundle: Bundle, permutation: Sequence[int]) -> Bundle:
    """Permutes the axes of every part."""
    return jax.tree.map(lambda part: jax.lax.transpose(part, tuple(permutation)), bundle)


def reshape(bundle: Bundle, shape: Shape, new: Shape) -> Bundle | None:
    """Reshapes every part; None where a part's groups would not stay groups of consecutive elements."""
    blocks = pair_axes(shape, new)
    if not all(_stay_together(axes, _blocks_of(bundle, shape), shape) for axes, _ in blocks):
        return None
    parts, treedef = jax.tree.flatten(bundle)
    shapes = [_reshaped(part.shape, shape, blocks) for part in parts]
    if any(s is None for s in shapes):
        return None
    return treedef.unflatten([part.reshape(s) for part, s in zip(parts, shapes, strict=True)])


def broadcast(bundle: Bundle, shape: Shape, new: Shape, dimensions: Sequence[int]) -> Bundle:
    """Broadcasts every part: new axes, and axes of size 1 that grow, grow in all of them."""

    def one(part):
        target = list(new)
        for axis, dimension in enumerate(dimensions):
            target[dimension] = part.shape[axis] if shape[axis] == new[dimension] else new[dimension]
        return jax.lax.broadcast_in_dim(part, target, tuple(dimensions))

    return jax.tree.map(one, bundle)


def cut(bundle: Bundle, shape: Shape, start: Shape, limit: Shape, strides: Shape) -> Bundle | None:
    """Slices every part; None where a cut goes through a group."""
    edges = zip(_blocks_of(bundle, shape), start, limit, strides, strict=True)
    if any(block > 1 and (step != 1 or a % block or b % block) for block, a, b, step in edges):
        return None

    def bounds(size, axis):
        n, a, b, step = shape[axis], start[axis], limit[axis], strides[axis]
        if size == n:
            return a, b, step
        group = n // size
        if (a, b, step) == (0, n, 1):
            return 0, size, 1
        if b > a and a // group == (b - 1) // group:
            return a // group, a // group + 1, 1
        if step == 1 and a % group == 0 and b % group == 0:
            return a // group, b // group, 1
        return None

    return _each_axis(bundle, bounds, lambda part, triples: jax.lax.slice(part, *zip(*triples, strict=True)))


def dynamic_cut(bundle: Bundle, shape: Shape, starts: Sequence, sizes: Shape) -> Bundle | None:
    """Slices every part at traced positions, clamped to the array as `jax.lax.dynamic_slice` does."""
    if any(block > 1 and width != n for block, n, width in zip(_blocks_of(bundle, shape), shape, sizes, strict=True)):
        return None

    def bounds(size, axis):
        n, width = shape[axis], sizes[axis]
        if size == n or width == n:
            return starts[axis], width if size == n else size
        if size == 1:
            return 0, 1
        if width == 1:
            return jnp.clip(starts[axis], 0, n - 1) // (n // size), 1
        return None

    def apply(part, pairs):
        begin, width = zip(*pairs, strict=True)
        return jax.lax.dynamic_slice(part, begin, width)

    return _each_axis(bundle, bounds, apply)


def constrain(bundle: Bundle, shape: Shape, constraint) -> Bundle:
    """Applies a constraint on the whole array to the parts that have its full shape, and leaves the others."""
    return jax.tree.map(lambda part: constraint(part) if part.shape == shape else part, bundle)


def fill_leading(bundle: Bundle, shape: Shape) -> Bundle:
    """Gives every part the full leading axis, so that slicing the stack is slicing its parts."""
    return jax.tree.map(lambda part: _fill(part, shape[0]), bundle)


def _fill(part, n: int):
    return part if part.shape[0] == n else jnp.repeat(part, n // part.shape[0], axis=0, total_repeat_length=n)


def _blocks_of(bundle: Bundle, shape: Shape) -> Shape:
    return getattr(bundle, "blocks", (1,) * len(shape))


def _each_axis(bundle, bounds, apply):
    """Applies a slice whose bounds are found axis by axis; None where one axis of one part has none."""
    parts, treedef = jax.tree.flatten(bundle)
    found = [[bounds(size, axis) for axis, size in enumerate(part.shape)] for part in parts]
    if any(b is None for part in found for b in part):
        return None
    return treedef.unflatten([apply(part, b) if b else part for part, b in zip(parts, found, strict=True)])


def _stay_together(axes: range, lengths: Shape, shape: Shape) -> bool:
    """Whether merging axes leaves the elements of a block next to each other: nothing but blocks after a block."""
    merged = [axis for axis in axes if shape[axis] != 1]
    first = next((i for i, axis in enumerate(merged) if lengths[axis] > 1), len(merged))
    return all(lengths[axis] == shape[axis] for axis in merged[first + 1 :])


def pair_axes(old: Shape, new: Shape) -> list[tuple[range, Shape]]:
    """Pairs runs of old axes with runs of new sizes of equal product, each as short as it can be."""
    if 0 in old:
        return [(range(len(old)), new)]
    blocks, i, j = [], 0, 0
    while i < len(old) or j < len(new):
        a, b, i0, j0 = 1, 1, i, j
        while i == i0 or j == j0 or a != b:
            if i < len(old) and (a <= b or j == len(new)):
                a, i = a * old[i], i + 1
            elif j < len(new):
                b, j = b * new[j], j + 1
            else:
                break
        blocks.append((range(i0, i), new[j0:j]))
    return blocks


def _reshaped(part: Shape, shape: Shape, blocks) -> Shape | None:
    result: Shape = ()
    for axes, sizes in blocks:
        merged = _merged([part[a] for a in axes], [shape[a] for a in axes])
        piece = None if merged is None else _split(merged, math.prod(shape[a] for a in axes), sizes)
        if piece is None:
            return None
        result += piece
    return result


def _merged(part: Sequence[int], full: Sequence[int]) -> int | None:
    """The size of several axes of a part seen as one: whole axes, then at most one of groups, then shared ones."""
    shared = False
    for p, n in zip(part, full, strict=True):
        if n == 1:
            continue
        if shared and p != 1:
            return None
        shared = shared or p != n
    return math.prod(part)


def _split(part: int, full: int, sizes: Sequence[int]) -> Shape | None:
    """The sizes of one axis of a part seen as several."""
    if full == 0:
        return tuple(sizes) if part == full else None
    result, member = [], full // part
    for n in reversed(sizes):
        if member % n == 0:
            result.append(1)
            member //= n
        elif n % member == 0:
            result.append(n // member)
            member = 1
        else:
            return None
    return tuple(reversed(result)) if member == 1 else None
