"""`save` and `load`: any tree of arrays and `QTensor`s as safetensors files, whole or not at all.

The file of the name that was asked for holds the description of the tree, with a checksum of every array and of itself.
Arrays that are too many for one file lie in files beside it, which it names. It is written last: its renaming is what
makes a checkpoint be there.
"""

import contextlib
import fcntl
import json
import os
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import jax
import numpy as np
from jaxtyping import PyTree

from jaxquant.errors import FileError
from jaxquant.files.arrays import entry_of, in_parts, on_disk, stored_size
from jaxquant.files.container import write_container
from jaxquant.files.description import Stored, describe
from jaxquant.files.load import VERSION, seal, shard_name, shards


def save(
    path: str | os.PathLike, tree: PyTree, metadata: Mapping[str, Any] | None = None, *, shard_bytes: int = 4 * 10**9
) -> None:
    """Writes a tree of arrays, `QTensor`s, numbers, texts and PRNG keys, in the place of what `path` held before.

    Codes below 8 bits are packed, those of 3 bits too. Whatever happens meanwhile, `path` holds the old tree or the
    new one; savers of one folder wait for each other.

    Args:
      path: of a safetensors file, which other programs can read too.
      tree: of dicts, lists and tuples. The leaves of other nodes (an `nnx.State`, an Equinox module) are written under
        their paths, and come back into such a node by `load(path, like=)`.
      metadata: what JSON can hold, for `load_metadata`.
      shard_bytes: arrays beyond that go into more files, of about that size each.

    Raises:
      FileError: a leaf that cannot be written, by path.
      OSError: the disk is full, or the folder may not be written to; the old checkpoint is intact.
    """
    path = Path(path)
    node, arrays = describe(tree)
    for name, stored in arrays.items():
        if isinstance(stored.array, jax.Array) and not stored.array.is_fully_addressable:
            raise FileError(f"{name}: it lies on devices of other processes too. Save such trees with orbax.")
    about = json.dumps(dict(metadata or {}))  # an error of the caller's comes before any writing
    sizes = {name: stored_size(stored) for name, stored in arrays.items()}
    first, *others = ({name: arrays[name] for name in names} for names in in_parts(sizes, shard_bytes))
    with locked(path.parent):
        old, new = shards(path), set[str]()
        try:
            tensors = {}
            for part in others:
                tensors |= _write_shard(path, part, new)
            written = {name: on_disk(stored) for name, stored in first.items()}
            tensors |= {name: entry_of(first[name], array) for name, array in written.items()}
            write_entry(path, written, {"tree": node, "tensors": tensors, "metadata": json.loads(about)})
        except BaseException:
            remove(path.parent, new - old)
            raise
        remove(path.parent, old - new)


def write_entry(path: Path, arrays: Mapping[str, np.ndarray], described: Mapping[str, Any]) -> None:
    """Writes the file that makes a checkpoint be there.

    Args:
      path: of it.
      arrays: that lie in it.
      described: the tree, the entry of every tensor, and the metadata.
    """
    write_container(path, arrays, {"jaxquant": seal(json.dumps({"version": VERSION, **described}))})


def _write_shard(path: Path, part: Mapping[str, Stored], new: set[str]) -> dict[str, Any]:
    """Writes a file named after what is in it, so that the same tree is the same bytes under the same names."""
    arrays = {name: on_disk(stored) for name, stored in part.items()}
    entries = {name: entry_of(part[name], array) for name, array in arrays.items()}
    file = shard_name(path, json.dumps(entries))
    new.add(file)
    write_container(path.parent / file, arrays, {})
    return {name: entry | {"file": file} for name, entry in entries.items()}


def remove(folder: Path, files: set[str]) -> None:
    """Removes files of a folder that are still there."""
    for file in files:
        (folder / file).unlink(missing_ok=True)


@contextlib.contextmanager
def locked(folder: Path) -> Iterator[None]:
    """Until the block ends, no other process saves into this folder."""
    handle = os.open(folder, os.O_RDONLY)
    try:
        fcntl.flock(handle, fcntl.LOCK_EX)
        yield
    finally:
        os.close(handle)
