"""The arrays and bundles of a checkpoint by name, whoever wrote it, one at a time."""

import itertools
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, TypeVar

import jax

from jaxquant.errors import FileError
from jaxquant.files import load_gguf, load_safetensors
from jaxquant.files.arrays import array_of
from jaxquant.files.container import Container, open_container
from jaxquant.files.description import leaves, rebuild
from jaxquant.files.load import description, latest, places
from jaxquant.params import is_bundle
from jaxquant.trace import path_name

Leaves = Iterator[tuple[str, Any]]
T = TypeVar("T")


def each_leaf(path: Path, look: Callable[[str, Any], T]) -> list[T]:
    """What a function says of every leaf of a checkpoint; of ours and of llama.cpp's, one is in memory at a time.

    A checkpoint that another process replaces meanwhile is looked at again.

    Raises:
      FileError: it is none, or damaged.
      OSError: it cannot be read.
    """

    def looked(found: Leaves) -> list[T]:
        return list(itertools.starmap(look, found))  # no name here for a leaf, which would keep it

    if path.is_file() and _begins_with(path, b"GGUF"):
        return looked(iter(load_gguf(path).tensors.items()))
    if path.is_file() and path.suffix != ".json":
        container = open_container(path)
        if "jaxquant" in container.metadata:
            return latest(container, lambda current: looked(_ours(current)))
    return looked(_named((), load_safetensors(path)))


def _begins_with(path: Path, word: bytes) -> bool:
    with path.open("rb") as file:
        return file.read(len(word)) == word


def _named(path: tuple[Any, ...], tree: Any) -> Leaves:
    found = jax.tree_util.tree_flatten_with_path(tree, is_leaf=is_bundle)[0]
    yield from ((path_name((*path, *keys)), leaf) for keys, leaf in found if hasattr(leaf, "shape"))


def _ours(container: Container) -> Leaves:
    """The leaves of a file of `save`'s, in its order; an array on two paths is read twice."""
    path = container.path
    described = description(container)
    place = places(container, described["tensors"])

    def read(name: str) -> Any:
        entry, source = place(name)
        array = array_of(name, entry, source)
        source.release()  # else all that was read stays mapped until the last leaf
        return array

    try:
        for keys, node in leaves(described["tree"]):
            yield from _named(keys, rebuild(node, read, path))
    except RecursionError as error:
        raise FileError(f"{path}: its tree is too deep.") from error
