"""`load`: the tree that `save` wrote, each array checked as it is read."""

import functools
import hashlib
import json
import os
import re
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, TypeVar

import jax
from jaxtyping import PyTree

from jaxquant.errors import ChecksumError, FileError
from jaxquant.files.arrays import array_of
from jaxquant.files.checkpoint import inside
from jaxquant.files.container import Container, open_container
from jaxquant.files.description import rebuild
from jaxquant.params import is_bundle
from jaxquant.trace import path_name

VERSION = 1
T = TypeVar("T")


def load(path: str | os.PathLike, like: PyTree = None) -> PyTree:
    """Reads what `save` wrote, one array after the other.

    Args:
      path: of the file.
      like: a tree of the structure to give back, such as the float parameters or their shapes; its leaves are replaced
        by those of the same paths. None: dicts, lists and tuples.

    Returns:
      The tree. What was one array on two paths is one again.

    Raises:
      ChecksumError: bytes are not those that were written; the message names the tensor.
      FileError: it is no file of `save`'s, or of a newer version; or it has other paths or shapes than `like`.
      OSError: it cannot be read.
    """
    tree = latest(open_container(path), _read)
    return tree if like is None else _placed(tree, like, Path(path))


def latest(container: Container, read: Callable[[Container], T]) -> T:
    """What is read of a file, or of the one that has taken its place meanwhile."""
    try:
        return read(container)
    except (FileError, FileNotFoundError):
        now = open_container(container.path)
        if now.metadata == container.metadata:
            raise
        return latest(now, read)  # another process has saved meanwhile, and removed what the old file named


def _read(container: Container) -> PyTree:
    described = description(container)
    place = places(container, described["tensors"])
    read = functools.cache(lambda name: array_of(name, *place(name)))
    try:
        return rebuild(described["tree"], read, container.path)
    except RecursionError as error:
        raise FileError(f"{container.path}: its tree is too deep.") from error


def places(container: Container, tensors: Mapping[str, Any]) -> Callable[[str], tuple[Mapping[str, Any], Container]]:
    """From the name of an array to its entry in the description and the file that it lies in, which is opened once."""
    path = container.path
    opened = functools.cache(lambda file: open_container(inside(path.parent, file)))

    def place(name: str) -> tuple[Mapping[str, Any], Container]:
        entry = tensors.get(name)
        if not isinstance(entry, dict) or not isinstance(file := entry.get("file", ""), str):
            raise FileError(f"{path}: its description has no tensor {name[:80]!r}.")
        return entry, opened(file) if file else container

    return place


def load_metadata(path: str | os.PathLike) -> dict[str, Any]:
    """The metadata that `save` was given.

    Raises:
      ChecksumError, FileError, OSError: as `load`.
    """
    return description(open_container(path))["metadata"]


def shards(path: Path) -> set[str]:
    """The files of `save`'s own naming that a checkpoint has beside it; none where there is no checkpoint."""
    try:
        tensors = description(open_container(path))["tensors"].values()
    except (FileError, OSError):
        return set()
    files = {entry.get("file") for entry in tensors if isinstance(entry, dict)}
    ours = re.compile(re.escape(path.stem) + "-[0-9a-f]{16}" + re.escape(path.suffix))
    return {file for file in files if isinstance(file, str) and ours.fullmatch(file)}


def shard_name(path: Path, text: str) -> str:
    """The name of a file beside a checkpoint, which follows from a text that tells it from all others."""
    return f"{path.stem}-{hashlib.sha256(text.encode()).hexdigest()[:16]}{path.suffix}"


def seal(text: str) -> str:
    """A text behind its own checksum."""
    return f"{hashlib.sha256(text.encode()).hexdigest()} {text}"


def unsealed(container: Container, name: str) -> str:
    """The text that a file holds behind its checksum.

    Raises:
      ChecksumError: it is not the text that was written.
      FileError: there is none of that name.
    """
    sealed = container.metadata.get(name)
    if sealed is None:
        raise FileError(
            f"{container.path}: it is not of jaxquant's save, or its description is damaged. jq.load_safetensors reads "
            "files of other programs."
        )
    text = sealed.partition(" ")[2]
    if seal(text) != sealed:
        raise ChecksumError(f"{container.path}: its description, in the header, is not the one that was written.")
    return text


def description(container: Container) -> dict[str, Any]:
    """What a file of `save`'s says of its tree.

    Raises:
      ChecksumError, FileError: it is damaged, or of a newer version.
    """
    try:
        described = json.loads(unsealed(container, "jaxquant"))
    except (ValueError, RecursionError) as error:
        raise FileError(f"{container.path}: its description is not JSON: {error}") from error
    match described:
        case {"version": int(version), **_rest} if version > VERSION:
            newer = f"it is of version {version}, and this jaxquant reads up to {VERSION}. Install a newer one."
            raise FileError(f"{container.path}: {newer}")
        case {"version": int(), "tree": Mapping(), "tensors": dict(), "metadata": dict()}:
            return described
    raise FileError(f"{container.path}: its description has not the parts it should have.")


def _placed(tree: PyTree, like: PyTree, path: Path) -> PyTree:
    """The leaves of a tree in the structure of another with the same paths."""

    def named(of: PyTree) -> tuple[dict[str, Any], Any]:
        leaves, treedef = jax.tree_util.tree_flatten_with_path(of, is_leaf=is_bundle)
        return {path_name(keys): leaf for keys, leaf in leaves}, treedef

    (have, _), (want, treedef) = named(tree), named(like)
    if have.keys() != want.keys():
        missing, more = sorted(want.keys() - have.keys()), sorted(have.keys() - want.keys())
        raise FileError(f"{path}: against `like` it lacks {missing[:8]} and has {more[:8]} more.")
    for name, leaf in have.items():
        shapes = [getattr(array, "shape", None) for array in (leaf, want[name])]
        if shapes[0] != shapes[1]:
            raise FileError(f"{path}: {name} has the shape {shapes[0]}, and {shapes[1]} in `like`.")
    return treedef.unflatten([have[name] for name in want])
