"""A tree as JSON beside arrays: which containers, which bundles of codes, and the names of the arrays they hold.

    {"dict": [[key, node], ...]}   {"list": [node, ...]}   {"tuple": [node, ...]}   {"value": 1.5}   {"dtype": "int8"}
    {"array": name}   {"key": implementation, "data": node}   {"class": "QTensor", "fields": {"codes": node, ...}}

A node of another kind (an `nnx.State`, an Equinox module) is written as the dict of its children; `load(like=)` puts
the leaves back into the structure they came from.
"""

import dataclasses
from collections.abc import Callable, Hashable, Iterator, Mapping
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import PyTree

from jaxquant.adapter import Adapted, Adapter
from jaxquant.errors import FileError
from jaxquant.files.arrays import Stored, dtype_of
from jaxquant.files.check import check
from jaxquant.inputs import Permutation, Rescale, Rotation
from jaxquant.learned import Clipped, Stepped
from jaxquant.packed import Packed
from jaxquant.qtensor import Kept, QTensor
from jaxquant.turned import Turned

CLASSES = {
    cls.__name__: cls
    for cls in (QTensor, Kept, Rescale, Rotation, Permutation, Packed, Turned, Adapted, Adapter, Stepped, Clipped)
}

Node = Mapping[str, Any]


def describe(tree: PyTree, root: tuple[str | int, ...] = ()) -> tuple[Node, dict[str, Stored]]:
    """The description of a tree, and its arrays by name; an array on two paths is there once.

    Args:
      tree: of what `save` writes.
      root: the path where it stands, for the names.

    Raises:
      FileError: a leaf that is no array, number, text or key, or a dict key that is neither text nor a number.
    """
    arrays: dict[str, Stored] = {}
    names: dict[int, str] = {}

    def array(path: tuple, value: Any, width: int | None) -> Node:
        if id(value) not in names:
            free = "/".join(map(str, path)) or "array"
            while free in arrays:
                free += "'"
            names[id(value)] = free
            arrays[free] = Stored(value, width)
        return {"array": names[id(value)]}

    def node(path: tuple, value: Any, bits: int | None = None) -> Node:
        if value is None or isinstance(value, bool | int | float | str):
            return {"value": value}
        if type(value) is dict:
            return {"dict": [[key, node((*path, key), value[key])] for key in _keys(path, value)]}
        if type(value) in (list, tuple):
            children = [node((*path, i), child) for i, child in enumerate(value)]
            return {type(value).__name__: children}
        if isinstance(value, np.dtype | type):
            return {"dtype": jnp.dtype(value).name}
        if isinstance(value, jax.Array) and jnp.issubdtype(value.dtype, jax.dtypes.prng_key):
            return {"key": str(jax.random.key_impl(value)), "data": node(path, jax.random.key_data(value))}
        if isinstance(value, jax.Array | np.ndarray | np.generic):
            return array(path, value, _width(value.dtype, bits))
        if type(value) in CLASSES.values():
            return bundle(path, value)
        return other(path, value)

    def bundle(path: tuple, value: Any) -> Node:
        fields = {}
        for field in dataclasses.fields(value):
            bits = value.bits if isinstance(value, QTensor) and field.name == "codes" else None
            fields[field.name] = node((*path, field.name), getattr(value, field.name), bits)
        return {"class": type(value).__name__, "fields": fields}

    def other(path: tuple, value: Any) -> Node:
        children, _ = jax.tree_util.tree_flatten_with_path(value, is_leaf=lambda inner: inner is not value)
        if len(children) == 1 and children[0][1] is value:
            raise FileError(
                f"{'/'.join(map(str, path))}: {type(value).__name__} is no array, number, text or key. Leave it out, "
                "as `eqx.filter(tree, eqx.is_array)` does."
            )
        steps = [(_step(keys[0]), child) for keys, child in children]
        if [step for step, _ in steps] == ["value"]:  # the box a framework keeps one array in
            return node(path, steps[0][1])
        return {"dict": [[step, node((*path, step), child)] for step, child in steps]}

    return node(root, tree), arrays


def _width(dtype: Any, bits: int | None) -> int | None:
    """How many bits an element takes on disk, where a byte is more than it needs."""
    if not jnp.issubdtype(dtype, jnp.integer):
        return None
    width = min(jnp.iinfo(dtype).bits, bits or 64)
    return width if width < 8 else None


def _keys(path: tuple, tree: dict[Hashable, Any]) -> list[Any]:
    for key in tree:
        if isinstance(key, bool) or not isinstance(key, str | int):
            raise FileError(f"{'/'.join(map(str, path))}: its key {key!r} is neither text nor a whole number.")
    if len({isinstance(key, str) for key in tree}) > 1:
        raise FileError(
            f"{'/'.join(map(str, path))}: its keys {list(tree)[:8]} are texts and numbers, which JAX cannot sort. Make "
            "all of them texts."
        )
    return list(tree)


def _step(key: Any) -> str | int:
    """What a step of a pytree path is called."""
    (name,) = [getattr(key, field) for field in ("key", "name", "idx") if hasattr(key, field)]
    return name if isinstance(name, str | int) else str(name)


def leaves(node: Any, path: tuple[Any, ...] = ()) -> Iterator[tuple[tuple[Any, ...], Any]]:
    """The parts of a description that are no containers, each with the path that leads to it, as JAX spells paths.

    Args:
      node: what `describe` gave, or anything.
      path: where it stands.
    """
    match node:
        case {"dict": [*items], **rest} if not rest and _are_items(items):
            steps = [(jax.tree_util.DictKey(key), child) for key, child in items]
        case {"list": [*items], **rest} | {"tuple": [*items], **rest} if not rest:
            steps = [(jax.tree_util.SequenceKey(index), child) for index, child in enumerate(items)]
        case _:
            yield path, node
            return
    for step, child in steps:
        yield from leaves(child, (*path, step))


def rebuild(node: Any, read: Callable[[str], Any], file: Path) -> PyTree:
    """The tree a description stands for.

    Args:
      node: what `describe` gave.
      read: gives the array of a name.
      file: where it stands, for errors.

    Raises:
      FileError: it is no such description.
    """
    match node:
        case {"value": None | bool() | int() | float() | str() as value, **rest} if not rest:
            return value
        case {"dict": [*items], **rest} if not rest and _are_items(items):
            return {key: rebuild(child, read, file) for key, child in items}
        case {"list": [*items], **rest} if not rest:
            return [rebuild(child, read, file) for child in items]
        case {"tuple": [*items], **rest} if not rest:
            return tuple(rebuild(child, read, file) for child in items)
        case {"dtype": str(name), **rest} if not rest:
            return dtype_of(name, file)
        case {"array": str(name), **rest} if not rest:
            return read(name)
        case {"key": str(implementation), "data": data, **rest} if not rest:
            return _prng_key(rebuild(data, read, file), implementation, file)
        case {"class": str(name), "fields": dict(fields), **rest} if not rest:
            return _instance(name, {field: rebuild(child, read, file) for field, child in fields.items()}, file)
    raise FileError(f"{file}: its description holds {str(node)[:80]}, which this version does not know.")


def _are_items(items: list[Any]) -> bool:
    """Whether they are the keys and children of a dict that JAX can sort."""
    pairs = all(isinstance(item, list) and len(item) == 2 and type(item[0]) in (str, int) for item in items)
    return pairs and len({type(item[0]) for item in items}) < 2


def _prng_key(data: Any, implementation: str, file: Path) -> jax.Array:
    try:
        return jax.random.wrap_key_data(data, impl=implementation)
    except (TypeError, ValueError) as error:
        raise FileError(
            f"{file}: its description holds a key of {implementation[:80]!r} that is none: {error}"
        ) from error


def _instance(name: str, fields: dict[str, Any], file: Path) -> Any:
    cls = CLASSES.get(name)
    if cls is None:
        raise FileError(f"{file}: its description holds a {name[:80]!r}; this version knows {', '.join(CLASSES)}.")
    try:
        instance = cls(**fields)
    except TypeError as error:
        raise FileError(f"{file}: its description holds a {name} that is none: {error}") from error
    check(instance, file)
    return instance
