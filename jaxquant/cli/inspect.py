"""`jaxquant inspect`: what is in a checkpoint, whoever wrote it."""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import jax
import numpy as np
from jaxtyping import Float64, Int, Shaped

from jaxquant import table
from jaxquant.cli.leaves import each_leaf
from jaxquant.qtensor import QTensor, true_bytes
from jaxquant.turned import is_turned

_PART = 2**20  # values of a histogram at a time
_BARS = " ▁▂▃▄▅▆▇█"
_COLUMNS = ("tensor", "shape", "format", "bytes", "values")

Counts = Int[np.ndarray, " m"] | None  # how often each value is there; None: once


def inspect(path: Path) -> str:
    """A table of the tensors of a checkpoint, and their sum.

    Raises:
      FileError: it is none, or damaged.
      OSError: it cannot be read.
    """
    looked = each_leaf(path, _row)
    rows, sizes = [row for row, _ in looked], [size for _, size in looked]
    return "\n".join([*table.lines(_COLUMNS, rows), f"{len(rows)} tensors, {sum(sizes):,} bytes in memory"])


def _row(name: str, leaf: Any) -> tuple[tuple[str, ...], int]:
    size = sum(true_bytes(part) for part in jax.tree.leaves(leaf) if hasattr(part, "dtype"))
    return (name, " x ".join(map(str, leaf.shape)), _format(leaf), f"{size:,}", _histogram(leaf)), size


def _format(leaf: Any) -> str:
    if is_turned(leaf):
        return f"{leaf.stored.description} turned"
    return leaf.description if isinstance(leaf, QTensor) else getattr(leaf, "dtype", type(leaf)).name


def _histogram(leaf: Any) -> str:
    """How often each sixteenth of the range is taken, as bars; of codes where there are codes."""
    stored = leaf.stored if is_turned(leaf) else leaf
    values = stored.unpacked.codes if isinstance(stored, QTensor) else stored
    if not isinstance(values, jax.Array | np.ndarray) or jax.numpy.issubdtype(values.dtype, jax.dtypes.prng_key):
        return ""
    return _bars(np.asarray(values).reshape(-1))


def _bars(values: Shaped[np.ndarray, " n"]) -> str:
    ends = [(part.min(), part.max()) for part, _ in _finite_parts(values) if part.size]
    if not ends:
        return "none"
    least, most = zip(*ends, strict=True)
    low, high = min(least), max(most)
    if low == high:
        return "all alike"
    parts = [np.histogram(part, 16, (low, high), weights=counts)[0] for part, counts in _finite_parts(values)]
    counts = np.sum(parts, axis=0)
    bars = "".join(_BARS[-(-count * (len(_BARS) - 1) // counts.max())] for count in counts)
    return f"{low:.3g} {bars} {high:.3g}" + ("" if counts.sum() == values.size else ", and not finite ones")


def _finite_parts(values: Shaped[np.ndarray, " n"]) -> Iterator[tuple[Float64[np.ndarray, " m"], Counts]]:
    """The values that are finite, a part at a time: as floats they may take many times the memory of codes.

    In 64 bits, where there are bins between any two numbers of 32 bits.
    """
    for part, counts in _counted(values) if values.dtype.itemsize == 1 else _parts(values):
        finite = np.isfinite(floats := part.astype(np.float32))
        yield floats[finite].astype(np.float64), None if counts is None else counts[finite]


def _parts(values: Shaped[np.ndarray, " n"]) -> Iterator[tuple[Shaped[np.ndarray, " m"], Counts]]:
    for start in range(0, values.size, _PART):
        yield values[start : start + _PART], None


def _counted(codes: Shaped[np.ndarray, " n"]) -> Iterator[tuple[Shaped[np.ndarray, " m"], Counts]]:
    """The codes of a byte or less, each that is there once: counting 256 is faster than looking for bins."""
    parts = (np.bincount(part.view(np.uint8), minlength=256) for part, _ in _parts(codes))
    counts = sum(parts, np.zeros(256, int))
    (there,) = counts.nonzero()
    yield there.astype(np.uint8).view(codes.dtype), counts[there]
