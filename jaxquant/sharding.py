"""`shardings_like`: where the parts of quantized parameters go on a mesh of devices.

    codes    [in, out]          P("model", None)    as the weight
    scale    [1, out]           P(None, None)       one for all inputs: whole on every device
    scale    [in / 64, out]     P("model", None)    the groups of the inputs that are there

A part of a `QTensor` follows its codes along every axis where it has as much for every shard, and is whole along the
others. So nothing but the weight's own sharding has to be said, and XLA's partitioner does the rest.
"""

import dataclasses
import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
import numpy as np
from jax.core import Tracer
from jax.sharding import NamedSharding, PartitionSpec, Sharding
from jaxtyping import Array, PyTree

from jaxquant.adapter import is_adapted, is_leaf
from jaxquant.encode import group_sizes
from jaxquant.errors import NoMatchError, ShapeError
from jaxquant.qtensor import QTensor
from jaxquant.trace import path_name
from jaxquant.turned import is_turned


def shardings_like(qparams: PyTree, shardings: PyTree) -> PyTree:
    """The shardings of quantized parameters that go with those of the float ones.

    Give the result to `jax.device_put(qparams, ...)`, or to `jax.jit` as `in_shardings`. What `quantize_params` makes
    of sharded parameters lies like this already.

    Args:
      qparams: what `quantize_params` gave, or its shapes: `jax.eval_shape(jq.quantize_params, params)`.
      shardings: a tree with a `Sharding` in the place of each array of the float parameters, as in
        `jax.tree.map(lambda w: w.sharding, params)`. One that stands where `qparams` has a subtree is for all of it.

    Returns:
      A tree like `qparams` with a `Sharding` in the place of every array: codes have the weight's; a scale, a zero
      point, a part of a transform follow along the axes where the number of shards divides their length.

    Raises:
      NoMatchError: a parameter has no sharding, or a sharding no parameter.
      ShapeError: a sharding has more axes than its parameter, or does not divide one of them.
    """
    given = {tuple(path): sharding for path, sharding in jax.tree_util.tree_flatten_with_path(shardings)[0]}
    leaves, treedef = jax.tree_util.tree_flatten_with_path(qparams, is_leaf=is_leaf)
    sources = [_at_or_above(tuple(path), given) for path, _ in leaves]
    for path in given.keys() - set(sources):
        raise NoMatchError(f"there is no parameter at {path_name(path)}: shardings are a tree like the float params.")
    placed = [
        _named(path_name(path), leaf, given[source]) for (path, leaf), source in zip(leaves, sources, strict=True)
    ]
    return treedef.unflatten(placed)


def _at_or_above(path: tuple, given: Mapping[tuple, Any]) -> tuple:
    """The path of the sharding that is for a leaf."""
    for end in range(len(path), -1, -1):
        if path[:end] in given:
            return path[:end]
    raise NoMatchError(
        f"{path_name(path)} has no sharding: shardings are a tree like the float params, one for each weight."
    )


def _named(path: str, leaf: Any, sharding: Any) -> Any:
    if not isinstance(sharding, Sharding):
        raise NoMatchError(f"{path} has {sharding!r} for a sharding: give a jax.sharding.NamedSharding.")
    try:
        return follow(leaf, sharding)
    except ShapeError as error:
        raise ShapeError(f"{path}: {error}") from None


def follow(leaf: Any, sharding: Sharding) -> Any:
    """A leaf of quantized parameters (an array, too) with shardings in the place of its arrays.

    Raises:
      ShapeError: the sharding does not fit its axes.
    """
    if isinstance(sharding, NamedSharding):
        return _follow(leaf, _Split.of(sharding, np.shape(leaf)))
    if not sharding.is_fully_replicated:
        raise ShapeError(f"{sharding} does not name the axes it splits: give a jax.sharding.NamedSharding.")
    return jax.tree.map(lambda part: sharding, leaf)


def _follow(leaf: Any, split: "_Split") -> Any:
    if is_turned(leaf):
        return dataclasses.replace(leaf, stored=_follow(leaf.stored, split.turned))
    if is_adapted(leaf):
        beside = jax.tree.map(lambda part: split.share(part.shape[1:], whole=1), leaf.adapter)
        return dataclasses.replace(leaf, base=_follow(leaf.base, split), adapter=beside)
    return jax.tree.map(lambda part: split.share(np.shape(part)), leaf)


def on_shards(encode: Callable, leaf: Any, stats: Any) -> Callable[[Array], QTensor]:
    """How an array that may lie in shards on many devices is written in codes where it lies.

    On a mesh of explicit axes the partitioner is left to itself inside, as it is on one of automatic axes.

    Args:
      encode: `(array, statistics) -> QTensor`.
      leaf: the array, or a tracer of it.
      stats: the statistics of its inputs, or None.

    Raises:
      ShapeError: a shard would cut through a group, so that every device had to gather the array.
    """
    shapes = jax.eval_shape(encode, *jax.tree.map(lambda a: jax.ShapeDtypeStruct(a.shape, a.dtype), (leaf, stats)))
    typed = jax.typeof(leaf).sharding
    sharding = typed if isinstance(leaf, Tracer | np.ndarray) else leaf.sharding
    if isinstance(sharding, NamedSharding):
        _Split.of(sharding, shapes.shape).check_groups(shapes.scale.shape)
    if not typed.mesh.explicit_axes:
        return lambda array: encode(array, stats)
    automatic = jax.sharding.auto_axes(axes=typed.mesh.explicit_axes, out_sharding=follow(shapes, typed))
    return lambda array: automatic(encode)(array, stats)


@dataclasses.dataclass(frozen=True)
class _Split:
    """How an array is split over a mesh: along each of its axes the names of the mesh's axes, or None."""

    sharding: NamedSharding
    shape: tuple[int, ...]
    names: tuple[Any, ...]

    @classmethod
    def of(cls, sharding: NamedSharding, shape: Sequence[int]) -> "_Split":
        """What a sharding says of an array."""
        spec, rank = tuple(sharding.spec), len(shape)
        if len(spec) > rank:
            raise ShapeError(f"{sharding.spec} is for {len(spec)} axes, and the shape is {tuple(shape)}.")
        split = cls(sharding, tuple(shape), (*spec, *(None,) * (rank - len(spec))))
        for axis, size in enumerate(shape):
            if size % split.shards(axis):
                raise ShapeError(
                    f"axis {axis} of {tuple(shape)} does not divide into the {split.shards(axis)} shards of "
                    f"{sharding.spec}: pad it, or split another axis."
                )
        return split

    @property
    def turned(self) -> "_Split":
        """The same of an array that is stored with its last two axes swapped."""
        shape, names = ((*a[:-2], a[-1], a[-2]) for a in (self.shape, self.names))
        return _Split(self.sharding, shape, names)

    def shards(self, axis: int) -> int:
        """Into how many parts an axis is split."""
        names = self.names[axis]
        names = (names,) if isinstance(names, str) else names
        return math.prod(self.sharding.mesh.shape[name] for name in names) if isinstance(names, tuple) else 1

    def share(self, part: Sequence[int], whole: int = 0) -> NamedSharding:
        """The sharding of a part whose axes divide those of the array, after some that are not split."""
        fits = [
            self.shape[axis] == size or (size > 1 and size % self.shards(axis) == 0) for axis, size in enumerate(part)
        ]
        names = [name if fit else None for name, fit in zip(self.names, fits, strict=True)]
        spec = PartitionSpec(*(None,) * whole, *names)
        return NamedSharding(self.sharding.mesh, spec, memory_kind=self.sharding.memory_kind)

    def check_groups(self, scale: Sequence[int]) -> None:
        """That no shard cuts through a group."""
        for axis, (groups, size) in enumerate(zip(scale, self.shape, strict=True)):
            shards = self.shards(axis)
            if groups not in (1, size) and groups % shards:
                raise ShapeError(
                    f"groups of {size // groups} are cut by shards of {size // shards} (axis {axis} of {self.shape} "
                    f"over {self.names[axis]!r}): groups that fit are {group_sizes(size // shards)}, or split another "
                    "axis."
                )
