"""`jaxquant inspect`: what is in a checkpoint, whoever wrote it."""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import jax
import numpy as np
from jaxtyping import Shaped

from jaxquant import table
from jaxquant.files import load, load_gguf, load_safetensors
from jaxquant.files.container import open_container
from jaxquant.params import is_bundle
from jaxquant.qtensor import QTensor, true_bytes
from jaxquant.trace import path_name
from jaxquant.turned import is_turned

_BARS = " ▁▂▃▄▅▆▇█"
_COLUMNS = ("tensor", "shape", "format", "bytes", "values")


def inspect(path: Path) -> str:
    """A table of the tensors of a checkpoint, and their sum.

    Raises:
      FileError: it is none, or damaged.
      OSError: it cannot be read.
    """
    rows, total = [], 0
    for name, leaf in _leaves(path):
        size = sum(true_bytes(part) for part in jax.tree.leaves(leaf) if hasattr(part, "dtype"))
        total += size
        rows.append((name, " x ".join(map(str, leaf.shape)), _format(leaf), f"{size:,}", _histogram(leaf)))
    return "\n".join([*table.lines(_COLUMNS, rows), f"{len(rows)} tensors, {total:,} bytes in memory"])


def _leaves(path: Path) -> Iterator[tuple[str, Any]]:
    """The arrays and bundles of a checkpoint by name; those of llama.cpp are read one by one."""
    if path.is_file() and _begins_with(path, b"GGUF"):
        yield from load_gguf(path).tensors.items()
        return
    ours = path.is_file() and path.suffix != ".json" and "jaxquant" in open_container(path).metadata
    tree = load(path) if ours else load_safetensors(path)
    leaves = jax.tree_util.tree_flatten_with_path(tree, is_leaf=is_bundle)[0]
    yield from ((path_name(keys), leaf) for keys, leaf in leaves if hasattr(leaf, "shape"))


def _begins_with(path: Path, word: bytes) -> bool:
    with path.open("rb") as file:
        return file.read(len(word)) == word


def _format(leaf: Any) -> str:
    if is_turned(leaf):
        return f"{leaf.stored.description} turned"
    return leaf.description if isinstance(leaf, QTensor) else getattr(leaf, "dtype", type(leaf)).name


def _histogram(leaf: Any) -> str:
    """How often each sixteenth of the range is taken, as bars; of codes where there are codes."""
    stored = leaf.stored if is_turned(leaf) else leaf
    values = getattr(stored, "codes", stored)
    if not isinstance(values, jax.Array | np.ndarray) or jax.numpy.issubdtype(values.dtype, jax.dtypes.prng_key):
        return ""
    return _bars(np.asarray(values).astype(np.float32).reshape(-1))


def _bars(values: Shaped[np.ndarray, " n"]) -> str:
    finite = values[np.isfinite(values)]
    if finite.size == 0 or finite.min() == finite.max():
        return "all alike" if finite.size else "none"
    counts, edges = np.histogram(finite, bins=16)
    bars = "".join(_BARS[-(-count * (len(_BARS) - 1) // counts.max())] for count in counts)
    return f"{edges[0]:.3g} {bars} {edges[-1]:.3g}" + ("" if finite.size == values.size else ", and not finite ones")
