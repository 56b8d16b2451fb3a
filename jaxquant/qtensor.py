"""`QTensor`: an array written in codes, and the way back to floats.

    decode   w ~= (codes - zero) * scale, or levels[codes] * scale, and then what the `transform` of its input asks for

Every axis of `scale` and `zero` divides the same axis of `codes`, so shapes are the configuration: for codes of shape
(in, out) a scale (1, 1) is per tensor, (1, out) per channel and (in / 64, out) in groups of 64.
"""

import dataclasses
import functools
import math
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Shaped

from jaxquant import inputs
from jaxquant.errors import ClosureError, ShapeError
from jaxquant.format import code_name
from jaxquant.packed import Packed, is_float8
from jaxquant.trace.views import expand
from jaxquant.values import values_of


@functools.partial(jax.tree_util.register_dataclass, data_fields=["mask", "rows"], meta_fields=[])
@dataclasses.dataclass(frozen=True)
class Kept:
    """Weights of a few inputs, one in each block of them, that stay in float beside the codes: `w += mask * rows`.

    Args:
      mask: True for the inputs that are kept; full along the inputs, 1 along the outputs.
      rows: float32, their weights; it divides the inputs into blocks.
    """

    mask: Any
    rows: Any


@functools.partial(
    jax.tree_util.register_dataclass,
    data_fields=["codes", "scale", "zero", "transform", "kept", "input_bound", "master"],
    meta_fields=["dtype", "bits", "levels"],
)
@dataclasses.dataclass(frozen=True, repr=False)
class QTensor:
    """An array in codes: a pytree of arrays that jits, vmaps, scans, shards and donates like any other.

    Args:
      codes: int8, int4 or int2 numbers, float8 numbers, or indices into `levels` shifted by half their count;
        `turned` makes `Packed` bytes of those of 4 and 2 bits and of float8.
      scale: float32; each axis divides the same axis of `codes`. Or a `QTensor` of it (`double_quantize`).
      zero: zero point of the shape of `scale`, or None for a symmetric format. Formats have integers; float32 ones,
        no whole number of steps, come from files (`load_gguf`) and from a `KVCache`.
      dtype: static; the float dtype the array had, and has again when decoded.
      bits: static; the width of a code (3-bit codes live in a 4-bit container).
      levels: static; the codebook, or None.
      transform: what is done to the input first (`inputs.Rescale`, `Rotation`, `Permutation`), in this order.
      kept: a few inputs whose weights stay in float, after the transform; or None.
      input_bound: the size at which its inputs saturate when they are quantized, after the transform; full along the
        stack, 1 along inputs and outputs. None: each token has a range of its own, found when it comes.
      master: the float array that these are the codes of, which gradients go straight through to; in training only.
    """

    # Any, because a tree may also hold shapes, shardings or gradients in the place of arrays: nothing is checked here.
    codes: Any
    scale: Any
    zero: Any
    dtype: Any
    bits: int
    levels: tuple[float, ...] | None = None
    transform: Any = ()
    kept: Any = None
    input_bound: Any = None
    master: Any = None

    @property
    def shape(self) -> tuple[int, ...]:
        """The shape of the array this stands for."""
        return self.codes.shape

    @property
    def ndim(self) -> int:
        """Its rank."""
        return len(self.codes.shape)

    @property
    def size(self) -> int:
        """How many elements it has."""
        return math.prod(self.codes.shape)

    @property
    def nbytes(self) -> int:
        """The bytes it takes in memory, scales and zero points included; packed int4 is half a byte an element."""
        return sum(true_bytes(part) for part in jax.tree.leaves(self))

    @property
    def is_integer(self) -> bool:
        """Whether its codes are numbers on an integer grid, the kind that int8 matmuls multiply."""
        return self.levels is None and jnp.issubdtype(self.codes.dtype, jnp.integer)

    @property
    def description(self) -> str:
        """Its format in words, such as `int4 g64 affine`, read off the shapes."""
        dtype = None if jnp.issubdtype(self.codes.dtype, jnp.integer) else self.codes.dtype
        words = [code_name(self.bits, dtype, self.levels), _granularity(self)]
        words += ["affine"] if self.zero is not None else []
        words += [step.word for step in self.transform]
        return " ".join(words + (["outliers"] if self.kept is not None else []))

    @property
    def blocks(self) -> tuple[int, ...]:
        """The lengths along each axis that a slice must not cut through: those of the rotations of its input."""
        lengths = [transform.blocks(self.ndim) for transform in self.transform]
        return tuple(map(max, zip(*lengths, (1,) * self.ndim, strict=True)))

    @property
    def core(self) -> "QTensor":
        """The codes alone, without what is done to the input first and beside them."""
        return dataclasses.replace(self, transform=(), kept=None)

    @property
    def in_bytes(self) -> "QTensor":
        """The same with float8 codes held in their bytes, which XLA on CPU slices without a float16 of all of them.

        Codes of less than a byte stay: of a stack of them XLA on GPU reads in place what it would copy of its bytes.
        """
        return dataclasses.replace(self, codes=Packed.of(self.codes)) if is_float8(self.codes.dtype) else self

    @property
    def unpacked(self) -> "QTensor":
        """The same with codes that are an array."""
        return dataclasses.replace(self, codes=self.codes.codes) if isinstance(self.codes, Packed) else self

    @property
    def settled(self) -> "QTensor":
        """The same with codes that are an array, and its scale in float."""
        q = self.unpacked
        return dataclasses.replace(q, scale=decode(q.scale)) if is_qtensor(q.scale) else q

    def astype(self, dtype) -> "QTensor":
        """The same codes, decoded to another float dtype."""
        return dataclasses.replace(self, dtype=jnp.dtype(dtype))

    def __getitem__(self, index) -> "QTensor":
        """Slices the leading axes of a stack; the last two, which are a matrix, stay whole."""
        index = index if isinstance(index, tuple) else (index,)
        index = index[:-1] if index and index[-1] is Ellipsis else index
        if len(index) > max(self.ndim - 2, 0):
            raise ShapeError(
                f"{self!r} was indexed along {len(index)} axes: only the axes before the last two (a stack of "
                "matrices) can be sliced. Use jq.dequantize(q) to index elements."
            )

        def part(array):
            leading = (*self.shape[: len(index)], *array.shape[len(index) :])
            return jnp.broadcast_to(expand(array, leading), leading)[index]

        return jax.tree.map(part, self)

    def __iter__(self):
        return (self[i] for i in range(self.shape[0]))

    def __repr__(self) -> str:
        if not hasattr(self.codes, "dtype"):  # built from shardings or placeholders
            return f"QTensor(codes={self.codes!r}, scale={self.scale!r}, zero={self.zero!r})"
        shape = ", ".join(map(str, self.shape))
        return f"QTensor([{shape}] {jnp.dtype(self.dtype).name} as {self.description}, {self.nbytes:,} bytes)"

    def __jax_array__(self):
        raise ClosureError(
            f"{self!r} was used as an array. Pass it as an argument of jq.quantized(fn), which tells fn's matmuls "
            "what to do with it (a QTensor in a closure is out of its sight), or decode it with jq.dequantize."
        )

    def __array__(self, dtype=None, copy=None):
        del dtype, copy  # NumPy would make an array of one object of it
        return self.__jax_array__()


def centre(q: QTensor) -> Shaped[Array, "..."]:
    """The zero point in a dtype wide enough to multiply sums of codes: int32, or float32 where it is no integer."""
    return q.zero.astype(jnp.int32 if jnp.issubdtype(q.zero.dtype, jnp.integer) else jnp.float32)


def true_bytes(array) -> int:
    """The bytes an array takes in memory: XLA packs 4- and 2-bit elements, which `.nbytes` does not know."""
    dtype = array.dtype
    if jnp.issubdtype(dtype, jnp.integer):
        return math.ceil(math.prod(array.shape) * jnp.iinfo(dtype).bits / 8)
    return math.prod(array.shape) * dtype.itemsize


def _granularity(q: QTensor) -> str:
    if math.prod(q.scale.shape) == 1:
        return "per-tensor"
    sizes = zip(q.scale.shape, q.codes.shape, strict=True)
    groups = [n // s for s, n in sizes if s not in (1, n)]
    return "per-channel" if not groups else f"g{'x'.join(map(str, groups))}"


def decode(q: QTensor) -> Float[Array, "..."]:
    """The float array a `QTensor` stands for: `(codes - zero) * scale` or `levels[codes] * scale`, transformed back."""
    values = _decode_codes(q.settled)
    return values if q.master is None else _straight_through(values, q.master)


@jax.custom_jvp
def _straight_through(values: Float[Array, "..."], master: Float[Array, "..."]) -> Float[Array, "..."]:
    del master
    return values


@_straight_through.defjvp
def _of_the_master(primals, tangents):
    (values, master), (_, moved) = primals, tangents
    return _straight_through(values, master), moved.astype(values.dtype)


def _decode_codes(q: QTensor) -> Float[Array, "..."]:
    values = inputs.adjoint(q.transform, _with_kept(_decode_core(q), q.kept))
    if q.zero is not None:
        # Rounding the zero point may put the ends of the range half a step beyond what the dtype holds.
        largest = float(jnp.finfo(q.dtype).max)
        values = jnp.clip(values, -largest, largest)
    return values.astype(q.dtype)


def _decode_core(q: QTensor) -> Float[Array, "..."]:
    values = values_of(q.codes, q.levels)
    if q.zero is not None:
        values = values - expand(q.zero, q.shape).astype(jnp.float32)
    return values * expand(q.scale, q.shape)


def _with_kept(values: Float[Array, "..."], kept: Kept | None) -> Float[Array, "..."]:
    if kept is None:
        return values
    return jnp.where(expand(kept.mask, values.shape), expand(kept.rows, values.shape), values)


def is_qtensor(leaf: Any) -> bool:
    """Whether a leaf is a `QTensor`, for the `is_leaf` of `jax.tree.map`."""
    return isinstance(leaf, QTensor)
