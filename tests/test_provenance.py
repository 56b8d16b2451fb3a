"""Law of provenance: the factors of a view say where in the parameter each of its elements lies, or the origin is None.

A chain of moves is made of an array of flat indices and of its `Origin` in parallel. Where element `[0, ..., 0]` lies
depends on starts and indices, some of them known only when running; from there on the factors must predict every one.
"""

import itertools
import math

import jax.numpy as jnp
import numpy as np
from hypothesis import given, settings
from hypothesis import strategies as st

from jaxquant.trace.provenance import NO_AXIS, Origin

examples = settings(max_examples=400, deadline=None, derandomize=True)
fewer = settings(examples, max_examples=60)
shapes = st.lists(st.sampled_from([1, 2, 3, 4, 8, 12]), min_size=1, max_size=3).filter(lambda s: math.prod(s) <= 200)


def strides(shape):
    """The distance in memory of neighbours along each axis."""
    return [math.prod(shape[axis + 1 :]) for axis in range(len(shape))]


def predicted(origin):
    """Where each element of a view lies, from its first one on."""
    of_axis = strides(origin.shape)
    offsets = np.zeros((), int)
    for factors in origin.axes:
        along = np.zeros((1,), int)
        for f in factors:
            step = 0 if f.axis == NO_AXIS else f.stride * of_axis[f.axis]
            along = (along[:, None] + step * np.arange(f.size)).reshape(-1)
        offsets = offsets[..., None] + along
    return offsets


def away(origin):
    """The axes of the parameter that the view has not."""
    gone = {axis for _, axis in origin.looped} | {axis for axis, _ in origin.taken}
    return gone | (set() if origin.indexed is None else {origin.indexed})


def left(origin):
    """The sizes of the others."""
    return [n for axis, n in enumerate(origin.shape) if axis not in away(origin)]


def factorizations(n, most=4):
    """The shapes of a size."""
    divisors = [d for d in range(1, n + 1) if n % d == 0]
    return [s for rank in range(1, most + 1) for s in itertools.product(divisors, repeat=rank) if math.prod(s) == n]


def transpose(data, view, origin):
    order = data.draw(st.permutations(range(view.ndim)))
    return view.transpose(order), origin.transpose(order)


def reshape(data, view, origin):
    new = data.draw(st.sampled_from(factorizations(view.size)))
    return view.reshape(new), origin.reshape(new)


def split(data, view, origin):
    """One axis in two."""
    axis = data.draw(st.integers(0, view.ndim - 1))
    inner = data.draw(st.sampled_from([d for d in range(1, view.shape[axis] + 1) if view.shape[axis] % d == 0]))
    new = (*view.shape[:axis], view.shape[axis] // inner, inner, *view.shape[axis + 1 :])
    return view.reshape(new), origin.reshape(new)


def broadcast(data, view, origin):
    rank = view.ndim + data.draw(st.integers(0, 2))
    dimensions = sorted(data.draw(st.permutations(range(rank)))[: view.ndim])
    new, placed = [data.draw(st.integers(1, 2)) for _ in range(rank)], [1] * rank
    for n, dimension in zip(view.shape, dimensions, strict=True):
        new[dimension], placed[dimension] = n if n > 1 else new[dimension], n
    moved = origin.broadcast(tuple(new), dimensions)
    assert moved.away == origin.away
    return np.broadcast_to(view.reshape(placed), new), moved


def cut(data, view, origin):
    """A cut of one axis, all of it, a part, or one element; its start may be known only when running."""
    axis = data.draw(st.integers(0, view.ndim - 1))
    size = data.draw(st.integers(1, view.shape[axis]))
    start, known = data.draw(st.integers(0, view.shape[axis] - size)), data.draw(st.booleans())
    sizes, starts = list(view.shape), [0] * view.ndim
    sizes[axis], starts[axis] = size, start if known else None
    moved = origin.cut(starts, sizes)
    assert moved is not None or size < view.shape[axis]
    return view.take(range(start, start + size), axis), moved


def loop(data, view, origin):
    turn = data.draw(st.integers(0, view.shape[0] - 1))
    return view[turn], origin.loop(7)


def index(data, view, origin):
    """The same index for all: an array of different ones would be an array of first elements."""
    axis, picks = data.draw(st.integers(0, view.ndim - 1)), tuple(data.draw(shapes.filter(lambda s: math.prod(s) < 7)))
    chosen = np.full(picks, data.draw(st.integers(0, view.shape[axis] - 1)))
    return view.take(chosen, axis), origin.index(axis, picks)


MOVES = st.sampled_from([transpose, reshape, split, broadcast, cut, loop, index])


@examples
@given(shapes, st.lists(MOVES, min_size=1, max_size=6), st.data())
def test_the_factors_say_where_a_view_lies(shape, moves, data):
    """Law: the shape, every distance in memory, what was taken away; the start, where fixed indices alone moved it."""
    view, origin = np.arange(math.prod(shape)).reshape(shape), Origin.of(tuple(shape))
    for move in moves:
        if 0 < view.ndim < 8 and view.size <= 2000:
            moved, lies = move(data, view, origin)
            view, origin = (view, origin) if lies is None else (moved, lies)
        assert origin.view == view.shape
        assert np.array_equal(view - view[(0,) * view.ndim], predicted(origin))
    assert set(origin.away) == away(origin)
    whole = math.prod(f.size for axis in origin.axes for f in axis if f.axis != NO_AXIS)
    if not origin.looped and origin.indexed is None and whole == math.prod(left(origin)):
        assert view.flat[0] == sum(strides(shape)[axis] * at for axis, at in origin.taken)


@fewer
@given(shapes, st.lists(st.sampled_from([transpose, reshape, split, cut, loop]), max_size=5), st.data())
def test_a_view_of_everything_can_be_undone(shape, moves, data):
    """Law: `restore(view)` is the parameter without the axes taken away, and `show` of that is the view again."""
    view, origin = np.arange(math.prod(shape)).reshape(shape), Origin.of(tuple(shape))
    for move in moves:
        if view.ndim > 0:
            moved, lies = move(data, view, origin)
            view, origin = (view, origin) if lies is None else (moved, lies)
    parameter = origin.restore(jnp.asarray(view))
    if parameter is not None:
        steps = [step for axis, step in enumerate(strides(shape)) if axis not in away(origin)]
        offsets = sum(along * step for along, step in zip(np.indices(left(origin)), steps, strict=True))
        assert np.array_equal(parameter, view.flat[0] + offsets)
        assert np.array_equal(origin.show(parameter), view)


def test_parts_of_a_split_axis():
    """Law, for every part of every split of an axis: rare among random chains, as most of them cut whole axes."""
    for outer, inner in ((4, 2), (3, 4), (2, 6)):
        view = np.arange(outer * inner).reshape(outer, inner)
        for rows, columns in itertools.product(range(1, outer + 1), range(1, inner + 1)):
            origin = Origin.of((outer * inner,)).reshape((outer, inner)).cut((0, None), (rows, columns))
            assert origin is None or np.array_equal(view[:rows, :columns], predicted(origin))
