"""A folder as Hugging Face's libraries read it: tensors under dotted names, and a config beside them.

model.safetensors    or    model-00001-of-0000N.safetensors ... and model.safetensors.index.json, which names them
"""

import json
import os
import secrets
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

import jax
import numpy as np
from jaxtyping import PyTree, Shaped

from jaxquant.errors import FileError
from jaxquant.files.container import replacing, settle, write_container
from jaxquant.qtensor import QTensor, is_qtensor
from jaxquant.trace import path_name

Array = jax.Array | np.ndarray
Tensors = Mapping[str, Shaped[np.ndarray, "..."]]


def flattened(tree: PyTree) -> tuple[dict[str, QTensor], dict[str, Array]]:
    """The weights in codes and the other arrays of a tree of dicts, by name; the inverse of `checkpoint.nested`.

    Raises:
      FileError: a node is no dict, or a leaf neither an array nor a `QTensor`; it names the path.
    """
    weights, arrays = {}, {}
    for path, leaf in jax.tree_util.tree_flatten_with_path(tree, is_leaf=is_qtensor)[0]:
        name = ".".join(str(getattr(key, "key", "")) for key in path)
        if not path or not all(isinstance(key, jax.tree_util.DictKey) for key in path):
            raise FileError(
                f"{path_name(path) or 'the tree'}: a checkpoint of names is written from dicts in dicts only."
            )
        if is_qtensor(leaf):
            weights[name] = leaf
        elif isinstance(leaf, jax.Array | np.ndarray):
            arrays[name] = leaf
        else:
            raise FileError(f"{name} is a {type(leaf).__name__}: decode it, or leave it out.")
    return weights, arrays


def write_folder(
    folder: str | os.PathLike, leaves: Iterable[Tensors], config: Mapping[str, Any], shard_bytes: int
) -> None:
    """Writes `config.json` and the tensors. What makes the checkpoint be there is the last that gets its name.

    Args:
      folder: a new one, or one without tensors.
      leaves: the tensors of each weight; those of one shard are in memory at a time.
      config: what `config.json` says.
      shard_bytes: tensors beyond that go into more files, of about that size each, and an index beside them. A weight
        is in one of them whole.

    Raises:
      FileError: the folder has a checkpoint already, or an array's type has no name in such a file; or two leaves have
        a tensor of one name.
      OSError: the folder cannot be written.
    """
    folder = Path(folder)
    text = json.dumps(dict(config), indent=2)
    folder.mkdir(parents=True, exist_ok=True)
    there = sorted(path.name for path in folder.glob("*.safetensors*"))
    if there:
        raise FileError(f"{folder}: it holds {', '.join(there[:4])} already: write to a new folder.")
    run, shards, written = secrets.token_hex(6), list[dict[str, int]](), list[Path]()
    try:
        for part in _parts(leaves, shard_bytes):  # under names of no checkpoint's, until it is known how many there are
            twice = sorted(name for shard in shards for name in shard.keys() & part.keys())
            if twice:
                raise FileError(f"{folder}: {twice[0]!r} would be there twice: rename one of the leaves it comes from.")
            written.append(folder / f".model-{len(shards) + 1:05}.{run}.tmp")
            write_container(written[-1], part, {"format": "pt"})
            shards.append({name: array.nbytes for name, array in part.items()})
            del part  # else it would be in memory beside the next
        with replacing(folder / "config.json") as path:
            path.write_text(text)
        names = [f"model-{i + 1:05}-of-{len(shards):05}.safetensors" for i in range(len(shards))]
        for i, name in enumerate(names if len(names) > 1 else ["model.safetensors"]):
            written[i] = written[i].replace(folder / name)
        settle(folder)
        if len(names) > 1:
            _write_index(folder, dict(zip(names, shards, strict=True)))
    except BaseException:
        for path in written:
            path.unlink(missing_ok=True)
        raise


def _parts(leaves: Iterable[Tensors], most: int) -> Iterator[dict[str, Any]]:
    """The tensors in order, cut between leaves where a part would be more than `most`; there is always one part."""
    part: dict[str, Any] = {}
    filled = 0
    for leaf in leaves:
        size = sum(array.nbytes for array in leaf.values())
        if part and filled + size > most:
            yield part
            part, filled = {}, 0
        part |= leaf
        filled += size
        del leaf  # else it would be in memory beside the next part
    yield part


def _write_index(folder: Path, shards: Mapping[str, Mapping[str, int]]) -> None:
    places = {name: shard for shard, sizes in shards.items() for name in sizes}
    total = sum(size for sizes in shards.values() for size in sizes.values())
    index = {"metadata": {"total_size": total}, "weight_map": dict(sorted(places.items()))}
    with replacing(folder / "model.safetensors.index.json") as path:
        path.write_text(json.dumps(index, indent=2))


def narrowest(values: Shaped[np.ndarray, "..."], dtype: Any) -> Shaped[np.ndarray, "..."]:
    """Float32 numbers in a smaller float where that holds each of them, as they are where it does not."""
    with np.errstate(over="ignore"):
        small = values.astype(dtype)
    return small if np.array_equal(small.astype(np.float32), values) else values
