"""A checkpoint of one safetensors file or of many: the names of all tensors, and which file holds each."""

import dataclasses
import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
from jaxtyping import Shaped

from jaxquant.errors import FileError
from jaxquant.files.container import Container, open_container

_ONE, _MANY = "model.safetensors", "model.safetensors.index.json"


@dataclasses.dataclass(frozen=True)
class Checkpoint:
    """The tensors of a checkpoint.

    Args:
      path: what was opened.
      places: the file that holds each tensor.
      config: what `config.json` beside it says, or nothing.
    """

    path: Path
    places: Mapping[str, Container]
    config: Mapping[str, Any]

    @property
    def names(self) -> tuple[str, ...]:
        """Of the tensors."""
        return tuple(self.places)

    def read(self, name: str) -> Shaped[np.ndarray, "..."]:
        """A tensor as a read-only array that shares the memory of its file's pages.

        Raises:
          FileError: there is no such tensor, or its type has no array.
        """
        if name not in self.places:
            raise FileError(f"{self.path}: it has no tensor {name!r}; it has {', '.join(self.names[:40])}.")
        return self.places[name].read(name)


def open_checkpoint(path: str | os.PathLike) -> Checkpoint:
    """Opens a checkpoint without reading its tensors.

    Args:
      path: a safetensors file, the index of several (`model.safetensors.index.json`), or the folder of either.

    Raises:
      FileError: a file is broken, or the index names a file outside of its folder, or one that is not there.
      OSError: a file cannot be read.
    """
    path = Path(path)
    if path.is_dir():
        path = path / (_MANY if (path / _MANY).exists() else _ONE)
    places = _sharded(path) if path.suffix == ".json" else _single(path)
    config = path.parent / "config.json"
    return Checkpoint(path, places, read_object(config) if config.exists() else {})


def _single(path: Path) -> dict[str, Container]:
    container = open_container(path)
    return {name: container for name in container.names}


def _sharded(path: Path) -> dict[str, Container]:
    places = read_object(path).get("weight_map")
    if not isinstance(places, dict) or not all(isinstance(shard, str) for shard in places.values()):
        raise FileError(f"{path}: its 'weight_map' is not an object that names a file for each tensor.")
    containers = {shard: open_container(inside(path.parent, shard)) for shard in sorted(set(places.values()))}
    for name, shard in places.items():
        if name not in containers[shard].tensors:
            raise FileError(f"{path}: it says that tensor {name!r} is in {shard!r}, which does not have it.")
    return {name: containers[shard] for name, shard in places.items()}


def nested(leaves: Mapping[str, Any], path: str | os.PathLike) -> dict[str, Any]:
    """A tree of dicts, by splitting names at their dots.

    Raises:
      FileError: a name leads through a tensor.
    """
    tree: dict[str, Any] = {}
    for name, leaf in leaves.items():
        *parents, last = name.split(".")
        node: Any = tree
        for parent in parents:
            node = node.setdefault(parent, {}) if isinstance(node, dict) else node
        if not isinstance(node, dict) or last in node:
            raise FileError(f"{path}: tensor {name!r} has the name of another, or begins with it.")
        node[last] = leaf
    return tree


def inside(folder: Path, name: str) -> Path:
    """The file of that name directly in a folder.

    Raises:
      FileError: the name leads elsewhere, by itself or by a symbolic link, or to nothing.
    """
    path = folder / name
    if name != os.path.basename(name) or name in ("", ".", "..") or "\0" in name:
        raise FileError(f"{folder}: it names a file {name!r}, which is not a plain name inside of that folder.")
    if path.is_symlink() and path.resolve().parent != folder.resolve() and not _in_cache(path):
        raise FileError(f"{folder}: its {name!r} is a symbolic link to {path.resolve()}, outside of that folder.")
    if not path.is_file():
        raise FileError(f"{folder}: it names {name!r}, which is missing. Fetch all files of the checkpoint again.")
    return path


def _in_cache(path: Path) -> bool:
    """Whether a link is one of Hugging Face's cache, from `snapshots/REVISION` into the `blobs` beside it."""
    return path.resolve().parent == path.parent.resolve().parent.parent / "blobs"


def read_object(path: Path) -> dict[str, Any]:
    """The object that a JSON file holds.

    Raises:
      FileError: it holds no such thing.
    """
    try:
        value = json.loads(path.read_bytes().decode())
    except (ValueError, RecursionError) as error:  # not UTF-8, not JSON, or a number of too many digits
        raise FileError(f"{path}: it is not JSON: {error}") from error
    if not isinstance(value, dict):
        raise FileError(f"{path}: it is a JSON {type(value).__name__}, not an object.")
    return value
