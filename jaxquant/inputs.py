"""What is done to the input of a weight before it meets the codes, so that a smart weight stays a per-weight affair.

    x @ w  ~=  T(x) @ c,     w ~= T^T c,     T = T_n ... T_2 T_1

A `QTensor` carries its transforms as a tuple of these, in the order they are applied; `c` is what its codes decode to.
Their arrays are parts of the bundle like its scales (`trace.views`), so they follow transposes, slices and reshapes.
"""

import dataclasses
import functools
import math
from collections.abc import Sequence
from typing import Any, ClassVar

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Shaped

from jaxquant.trace.views import expand

_WIDEST = 64  # a wider Hadamard matrix is applied as a Kronecker product of matrices up to this wide


@functools.partial(jax.tree_util.register_dataclass, data_fields=["factor"], meta_fields=[])
@dataclasses.dataclass(frozen=True)
class Rescale:
    """`T(x) = x * factor`, a number for each input (AWQ, SmoothQuant).

    Args:
      factor: float32, full along the stack and the inputs, 1 along the outputs.
    """

    word: ClassVar[str] = "rescaled"  # what was done, for a description
    factor: Any  # as in QTensor, a tree may hold shapes or shardings in the place of arrays

    def apply(self, x: Float[Array, "B M K"]) -> Float[Array, "B M K"]:
        """Scales tokens; `factor` is `[1 or B, K, 1]`."""
        return x * jnp.swapaxes(self.factor, 1, 2)

    def adjoint(self, c: Float[Array, "..."]) -> Float[Array, "..."]:
        """Scales the rows of a decoded weight."""
        return c * expand(self.factor, c.shape)

    def blocks(self, rank: int) -> tuple[int, ...]:
        """The lengths along each axis that only make sense as a whole: none."""
        return (1,) * rank

    def identity(self) -> "Rescale":
        """The transform of this structure that does nothing."""
        return Rescale(jnp.ones_like(self.factor))


@functools.partial(jax.tree_util.register_dataclass, data_fields=["signs", "seams"], meta_fields=[])
@dataclasses.dataclass(frozen=True)
class Rotation:
    """`T(x) = H (x * signs)`, the inputs mixed by an orthogonal matrix: blocks of a Hadamard matrix on the diagonal.

    A Hadamard matrix of `2^a * 2^b` is the Kronecker product of two, so rotating each axis of a reshaped weight by its
    own share is the same rotation, and the shapes of the two parts are all there is to know.

    Args:
      signs: int8 1 or -1, full along the stack and the inputs, 1 along the outputs; 0 for a matrix not rotated.
      seams: False; it divides `signs` into the blocks.
    """

    word: ClassVar[str] = "rotated"
    signs: Any
    seams: Any

    def apply(self, x: Float[Array, "B M K"]) -> Float[Array, "B M K"]:
        """Rotates tokens; `signs` is `[1 or B, K, 1]`."""
        signs, lengths = jnp.swapaxes(self.signs, 1, 2).astype(x.dtype), self.blocks(3)
        return jnp.where(signs == 0, x, hadamard(x * signs, 2, lengths[1]))

    def adjoint(self, c: Float[Array, "..."]) -> Float[Array, "..."]:
        """Rotates the rows of a decoded weight back."""
        turned, signs = c, expand(self.signs, c.shape).astype(c.dtype)
        for axis, length in enumerate(self.blocks(c.ndim)):
            turned = hadamard(turned, axis, length)
        return jnp.where(signs == 0, c, turned * signs)

    def blocks(self, rank: int) -> tuple[int, ...]:
        """The length of the blocks along each axis."""
        del rank
        return tuple(n // max(s, 1) for n, s in zip(self.signs.shape, self.seams.shape, strict=True))

    def identity(self) -> "Rotation":
        """The transform of this structure that does nothing."""
        return Rotation(jnp.zeros_like(self.signs), self.seams)


@functools.partial(jax.tree_util.register_dataclass, data_fields=["inputs", "codes", "seams"], meta_fields=[])
@dataclasses.dataclass(frozen=True)
class Permutation:
    """`T(x)_j = x_i where inputs_i = codes_j`: the inputs in the order of their groups (GPTQ's act-order).

    Both sides carry labels, because a label stays with its input when axes are split or swapped; an index would not.

    Args:
      inputs: int32, the label of each input, `0 .. length - 1` in every block; full along the stack and the inputs, 1
        along the outputs.
      codes: int32, the label of the input that each row of codes belongs to; of the same shape.
      seams: False; it divides both into the blocks that are permuted.
    """

    word: ClassVar[str] = "permuted"
    inputs: Any
    codes: Any
    seams: Any

    def apply(self, x: Float[Array, "B M K"]) -> Float[Array, "B M K"]:
        """Reorders tokens; the labels are `[1 or B, K, 1]`."""
        return jnp.swapaxes(self._moved(jnp.swapaxes(x, 1, 2), self.inputs, self.codes), 1, 2)

    def adjoint(self, c: Float[Array, "..."]) -> Float[Array, "..."]:
        """Brings the rows of a decoded weight back to the order of its inputs."""
        return self._moved(c, self.codes, self.inputs)

    def blocks(self, rank: int) -> tuple[int, ...]:
        """The length of the blocks along each axis."""
        del rank
        return tuple(n // max(s, 1) for n, s in zip(self.inputs.shape, self.seams.shape, strict=True))

    def identity(self) -> "Permutation":
        """The transform of this structure that does nothing."""
        return Permutation(self.inputs, self.inputs, self.seams)

    def _moved(self, values: Float[Array, "..."], here: Array, there: Array) -> Float[Array, "..."]:
        """Values that lie where `here` has their labels, brought to where `there` has them."""
        lengths = self.blocks(values.ndim)
        labels = _as_rows(here, lengths)
        places = jax.lax.broadcasted_iota(labels.dtype, labels.shape, labels.ndim - 1)
        # The inverse by a scatter, which takes XLA on CPU 36 us for 4096 labels; sorting them takes 600.
        of_label = jnp.put_along_axis(labels, labels, places, -1, inplace=False)
        index = jnp.take_along_axis(of_label, _as_rows(there, lengths), -1)
        moved = jnp.take_along_axis(_as_rows(values, lengths), index, -1)
        return _from_rows(moved, lengths, values.shape)


Transform = Rescale | Rotation | Permutation


def apply(transforms: tuple[Transform, ...], x: Float[Array, "B M K"]) -> Float[Array, "B M K"]:
    """`T(x)` for tokens and the transforms of a weight in the form `[B, K, N]`, in float32."""
    x = x.astype(jnp.float32)
    return functools.reduce(lambda y, transform: transform.apply(y), transforms, x)


def adjoint(transforms: tuple[Transform, ...], c: Float[Array, "..."]) -> Float[Array, "..."]:
    """`T^T c`: the weight in the coordinates of the untransformed input."""
    return functools.reduce(lambda w, transform: transform.adjoint(w), reversed(transforms), c)


def block_length(inputs: int) -> int:
    """The width of the Hadamard blocks for a number of inputs: the largest power of two that divides it."""
    return math.gcd(inputs, 2 ** max(inputs, 1).bit_length())


def hadamard(x: Float[Array, "..."], axis: int, length: int) -> Float[Array, "..."]:
    """Multiplies blocks of `length` (a power of two) along an axis by the orthogonal Hadamard matrix of that width."""
    if length == 1:
        return x
    # As few factors as are narrow enough, all of nearly the same width: a matmul of its own each.
    factors = -(-_log2(length) // _log2(_WIDEST))
    widths = [2 ** ((_log2(length) + place) // factors) for place in range(factors)]
    split = (*x.shape[:axis], x.shape[axis] // length, *widths, *x.shape[axis + 1 :])
    out = x.reshape(split)
    for place, width in enumerate(widths):
        matrix = jnp.asarray(_sylvester(width) / math.sqrt(width), x.dtype)
        out = jnp.moveaxis(jnp.tensordot(out, matrix, axes=((axis + 1 + place,), (0,))), -1, axis + 1 + place)
    return out.reshape(x.shape)


def _as_rows(x: Shaped[Array, "..."], lengths: Sequence[int]) -> Shaped[Array, "... L"]:
    """The blocks of an array, each as a row: its axes come last, flattened."""
    split = [size for n, length in zip(x.shape, lengths, strict=True) for size in (n // length, length)]
    order = (*range(0, len(split), 2), *range(1, len(split), 2))
    return x.reshape(split).transpose(order).reshape(*split[::2], math.prod(lengths))


def _from_rows(rows: Shaped[Array, "... L"], lengths: Sequence[int], shape: Sequence[int]) -> Shaped[Array, "..."]:
    """The inverse of `_as_rows`."""
    rank = len(lengths)
    split = rows.reshape(*rows.shape[:-1], *lengths)
    return split.transpose([axis for i in range(rank) for axis in (i, rank + i)]).reshape(shape)


def _log2(power: int) -> int:
    return power.bit_length() - 1


@functools.cache
def _sylvester(width: int) -> np.ndarray:
    """`H_1 = 1, H_2n = [[H_n, H_n], [H_n, -H_n]]`."""
    if width == 1:
        return np.ones((1, 1), np.float32)
    half = _sylvester(width // 2)
    return np.block([[half, half], [half, -half]])
