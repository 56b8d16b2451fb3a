"""`turned`: weights stored with their inputs last, which is how XLA on CPU reads codes fastest.

    w[in, out]  in memory as  w^T[out, in]

A matmul of a few rows is bound by reading the weight, and the library that XLA calls packs it anew each time unless it
is the left operand with its inputs last. A turned weight enters a function transposed, as any other view does. Whoever
does not care how a weight in codes is stored, as `dequantize`, takes it `upright`.
"""

import dataclasses
import functools
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import PyTree

from jaxquant.packed import Packed, hides_bytes, places_of
from jaxquant.qtensor import QTensor, decode, is_qtensor
from jaxquant.trace.views import transpose


@functools.partial(jax.tree_util.register_dataclass, data_fields=["stored"], meta_fields=[])
@dataclasses.dataclass(frozen=True)
class Turned:
    """A weight in codes whose last two axes are swapped in memory; it stands for what it was before.

    Args:
      stored: the `QTensor` of the transposed array; its codes of 4 and 2 bits and of float8 are `Packed`.
    """

    # Any, because a tree may also hold shapes or shardings in the place of arrays.
    stored: Any

    @property
    def upright(self) -> QTensor:
        """The weight as it was."""
        return transpose(self.stored.unpacked, swapped(self.ndim))

    @property
    def shape(self) -> tuple[int, ...]:
        """The shape of the array this stands for."""
        return tuple(self.stored.shape[axis] for axis in swapped(self.ndim))

    @property
    def ndim(self) -> int:
        """Its rank."""
        return self.stored.ndim

    @property
    def dtype(self) -> Any:
        """Its dtype."""
        return self.stored.dtype

    @property
    def nbytes(self) -> int:
        """The bytes it takes in memory."""
        return self.stored.nbytes


def turned(tree: PyTree) -> PyTree:
    """Stores weights with their inputs last, for serving on a CPU; the rest of the tree stays as it is.

    `quantized` and `explain` take the result in the place of the tree, with the same meaning; a turned weight that the
    function returns comes back as a float array. A few rows are multiplied several times as fast on a CPU
    (`benchmarks/matmul.py`); on a GPU it brings nothing.

    Args:
      tree: with `QTensor`s in it. Turned are matrices of int8 and float8, stacks of them with one scale for all their
        inputs, and matrices of 4 and 2 bits in groups of whole bytes of inputs. A matrix whose inputs lie last as it
        comes, as its scales tell (`[out, in]`, an embedding), stays so.

    Returns:
      The tree with a `Turned` in the place of each, and codes of 4 and 2 bits and float8 as `Packed` bytes.
    """

    # A weight that is turned already stays as it is.
    return jax.tree.map(lambda leaf: _turn(leaf) if is_qtensor(leaf) else leaf, tree, is_leaf=is_in_codes)


def dequantize(tree: PyTree) -> PyTree:
    """Decodes every `QTensor` of a tree, turned or not, and leaves the rest; the inverse of `quantize_params`."""
    return jax.tree.map(lambda leaf: decode(upright(leaf)) if is_in_codes(leaf) else leaf, tree, is_leaf=is_in_codes)


def _turn(q: QTensor) -> Any:
    if isinstance(q.codes, Packed):
        return q
    if _has_inputs_last(q):
        return _in_bytes(q) if _is_of_bytes(q) or _is_packed(q, axis=1) else q
    if q.ndim < 2 or not (_is_of_bytes(q) or _is_packed(q, axis=0)):
        return q
    return Turned(_in_bytes(transpose(q, swapped(q.ndim))))


def _has_inputs_last(q: QTensor) -> bool:
    """Whether a matrix has scales of its own for each row, and fewer of them than columns."""
    return q.ndim == 2 and q.scale.shape[0] == q.shape[0] and q.scale.shape[1] < q.shape[1]


def _is_of_bytes(q: QTensor) -> bool:
    """A matrix of int8 or float8 codes, or a stack of them with one scale for all their inputs."""
    of_bytes = jnp.dtype(q.codes.dtype).itemsize == places_of(q.codes.dtype) == 1
    return of_bytes and (q.ndim == 2 or q.scale.shape[:-1] == (*q.shape[:-2], 1))


def _is_packed(q: QTensor, axis: int) -> bool:
    """A matrix with several codes to a byte of inputs, which are those of an axis, all of one group."""
    places, groups = places_of(q.codes.dtype), q.scale.shape[axis]
    return places > 1 and q.ndim == 2 and groups > 0 and q.shape[axis] // groups % places == 0


def _in_bytes(q: QTensor) -> QTensor:
    """Codes as the bytes they lie in."""
    return dataclasses.replace(q, codes=Packed.of(q.codes)) if hides_bytes(q.codes.dtype) else q


def is_turned(leaf: Any) -> bool:
    """Whether a leaf is a turned weight, for the `is_leaf` of `jax.tree.map`."""
    return isinstance(leaf, Turned)


def is_in_codes(leaf: Any) -> bool:
    """Whether a leaf is a `QTensor`, turned or not, for the `is_leaf` of `jax.tree.map`."""
    return is_qtensor(leaf) or is_turned(leaf)


def upright(leaf: Any) -> Any:
    """A weight in codes as it was before `turned`; anything else as it is."""
    return leaf.upright if is_turned(leaf) else leaf.unpacked if is_qtensor(leaf) else leaf


def swapped(rank: int) -> tuple[int, ...]:
    """The axes of an array with the last two in each other's place."""
    return (*range(rank - 2), rank - 1, rank - 2)


def straightened(fn: Callable, leaves: Sequence[Any]) -> Callable:
    """A function of arrays as they are stored, which transposes those of turned weights first.

    Args:
      fn: the function.
      leaves: of its arguments, in the order of `jax.tree.flatten((args, kwargs))`.
    """
    places = [place for place, leaf in enumerate(leaves) if is_turned(leaf)]
    if not places:
        return fn

    @functools.wraps(fn)
    def straight(*args: Any, **kwargs: Any) -> Any:
        values, treedef = jax.tree.flatten((args, kwargs))
        for place in places:
            values[place] = jnp.swapaxes(values[place], -1, -2)
        args, kwargs = treedef.unflatten(values)
        return fn(*args, **kwargs)

    return straight
