"""A folder as Hugging Face's libraries read it: tensors under dotted names, and a config beside them."""

import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import jax
import numpy as np
from jaxtyping import PyTree, Shaped

from jaxquant.errors import FileError
from jaxquant.files.container import replacing, write_container
from jaxquant.qtensor import QTensor, is_qtensor
from jaxquant.trace import path_name


def flattened(tree: PyTree) -> tuple[dict[str, QTensor], dict[str, Shaped[np.ndarray, "..."]]]:
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
            arrays[name] = np.asarray(leaf)
        else:
            raise FileError(f"{name} is a {type(leaf).__name__}: decode it, or leave it out.")
    return weights, arrays


def write_folder(
    folder: str | os.PathLike, arrays: Mapping[str, Shaped[np.ndarray, "..."]], config: Mapping[str, Any]
) -> None:
    """Writes `config.json`, and then `model.safetensors`, which makes the checkpoint be there.

    Raises:
      FileError: the folder has a checkpoint already, or an array's type has no name in such a file.
      OSError: the folder cannot be written.
    """
    folder = Path(folder)
    text = json.dumps(dict(config), indent=2)
    folder.mkdir(parents=True, exist_ok=True)
    there = sorted(path.name for path in folder.glob("*.safetensors*"))
    if there:
        raise FileError(f"{folder}: it holds {', '.join(there[:4])} already: write to a new folder.")
    with replacing(folder / "config.json") as path:
        path.write_text(text)
    write_container(folder / "model.safetensors", arrays, {"format": "pt"})


def narrowest(values: Shaped[np.ndarray, "..."], dtype: Any) -> Shaped[np.ndarray, "..."]:
    """Float32 numbers in a smaller float where that holds each of them, as they are where it does not."""
    with np.errstate(over="ignore"):
        small = values.astype(dtype)
    return small if np.array_equal(small.astype(np.float32), values) else values
