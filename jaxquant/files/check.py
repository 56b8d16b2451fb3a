"""What must hold of a bundle that comes from a file, before anything computes with it."""

import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from jaxquant.errors import FileError
from jaxquant.format import holds
from jaxquant.inputs import Transform
from jaxquant.packed import Packed
from jaxquant.qtensor import Kept, QTensor, is_qtensor


def check(bundle: Any, file: Path) -> None:
    """Raises if a `QTensor` breaks the law of shapes: each axis of each part divides the same axis of its codes.

    Args:
      bundle: what was read.
      file: where, for errors.

    Raises:
      FileError: the message says which part, and both shapes.
    """
    if not is_qtensor(bundle):
        return
    _check_codes(bundle, file)
    _check_statics(bundle, file)
    for name in ("scale", "zero", "transform", "kept", "input_bound", "master"):
        part = getattr(bundle, name)
        for leaf in jax.tree.leaves(part, is_leaf=is_qtensor):
            shape = _shape(leaf, name, file)
            if not _divides(shape, bundle.shape):
                raise FileError(f"{file}: a QTensor of shape {bundle.shape} has a {name} of shape {shape}.")


def _check_codes(q: QTensor, file: Path) -> None:
    held = q.codes.held if isinstance(q.codes, Packed) else q.codes
    if not isinstance(held, jax.Array | np.ndarray) or type(q.bits) is not int:
        raise FileError(f"{file}: a QTensor of {q.bits!r} bits with {type(held).__name__} as codes is none.")
    if held is not q.codes and (held.dtype != np.int8 or not held.ndim):
        raise FileError(f"{file}: a QTensor has its codes packed in {held.dtype} of shape {held.shape}, not in bytes.")
    if not holds(q.codes.dtype, q.bits):
        raise FileError(f"{file}: a QTensor of {q.bits} bits has codes of type {q.codes.dtype}.")


def _check_statics(q: QTensor, file: Path) -> None:
    if not isinstance(q.dtype, np.dtype) or not jnp.issubdtype(q.dtype, jnp.floating):
        raise FileError(f"{file}: a QTensor decodes to {q.dtype!r}, which is no float.")
    if q.levels is not None:
        right = isinstance(q.levels, tuple) and len(q.levels) == 2**q.bits
        if not right or not all(isinstance(level, float) and math.isfinite(level) for level in q.levels):
            raise FileError(f"{file}: a QTensor of {q.bits} bits has levels that are not {2**q.bits} numbers.")
    if not isinstance(q.transform, tuple) or not all(isinstance(step, Transform) for step in q.transform):
        raise FileError(f"{file}: a QTensor has a transform that is none.")
    if not (q.kept is None or isinstance(q.kept, Kept)):
        raise FileError(f"{file}: a QTensor keeps a {type(q.kept).__name__}.")


def _shape(leaf: Any, name: str, file: Path) -> tuple[int, ...]:
    if not hasattr(leaf, "shape"):
        raise FileError(f"{file}: a QTensor has a {name} that is a {type(leaf).__name__}, not an array.")
    return leaf.shape


def _divides(part: Sequence[int], whole: Sequence[int]) -> bool:
    pairs = list(zip(part, whole, strict=False))
    return len(part) == len(whole) and all(n == s or (s > 0 and n % s == 0) for s, n in pairs)
