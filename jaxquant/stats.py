"""`Stats`: what the inputs of a weight looked like, all that a quantizer is told of the data.

    count = sum 1    absmax = max |x|    abssum = sum |x|    gram = sum x x^T    above[j] = sum [|x| > 2^((j - 64) / 4)]

Statistics are a monoid, so calibration is a fold and data-parallel calibration a sum over devices:
`observe(concat(a, b)) == merge(observe(a), observe(b))`, and zeros are the unit.
"""

import dataclasses
import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import NamedSharding, PartitionSpec
from jax.typing import ArrayLike
from jaxtyping import Array, Float

from jaxquant.errors import StatsError

_LEVELS = 128
# |x| is compared with powers of 2^(1/4) from 2^-16 to 2^16.
THRESHOLDS = tuple(2.0 ** ((j - 64) / 4) for j in range(_LEVELS))


@functools.partial(
    jax.tree_util.register_dataclass,
    data_fields=["count", "absmax", "abssum", "above", "gram"],
    meta_fields=["stack", "inputs", "transformed"],
)
@dataclasses.dataclass(frozen=True)
class Stats:
    """The statistics of the inputs `x[token, in]` of one matrix, or of each matrix of a stack.

    Args:
      count: float32, how many tokens were seen.
      absmax: float32 `[in]`.
      abssum: float32 `[in]`.
      above: float32 `[128]`, how many inputs exceed each threshold, which is what their quantiles are read off.
      gram: float32 `[in, in]`, or None where nobody asked for it.
      stack: static; the axes of the parameter that are a stack of matrices, in the order of the leading axes here.
      inputs: static; the axes of the parameter that a matmul contracts, which are flattened into `in`.
      transformed: static; whether a QTensor's transform was done to the inputs before they were observed.
    """

    # Any, because a tree may also hold shapes or shardings in the place of arrays.
    count: Any
    absmax: Any
    abssum: Any
    above: Any
    gram: Any
    stack: tuple[int, ...] = ()
    inputs: tuple[int, ...] = (0,)
    transformed: bool = False

    def merge(self, other: "Stats") -> "Stats":
        """The statistics of what two of them saw."""
        if (self.gram is None) != (other.gram is None) or self.transformed != other.transformed:
            raise StatsError("statistics with and without Gram matrices or transforms do not add up: calibrate anew.")
        if (self.stack, self.inputs) != (other.stack, other.inputs):
            raise StatsError(
                f"one parameter is contracted along its axes {self.inputs} in one place and {other.inputs} in another: "
                "leave it out with `where`."
            )
        total = jax.tree.map(jnp.add, self, other)
        return dataclasses.replace(total, absmax=jnp.maximum(self.absmax, other.absmax))

    def over_stack(self, axes: int = 1) -> "Stats":
        """Merges the matrices along the leading axes."""
        total = jax.tree.map(lambda part: jnp.sum(part, axis=tuple(range(axes))), self)
        return dataclasses.replace(total, absmax=jnp.max(self.absmax, axis=tuple(range(axes))))


@functools.partial(jax.jit, static_argnames="gram")
def observe(x: Float[Array, "*stack tokens in"], gram: bool = True) -> Stats:
    """The statistics of a batch of tokens, in float32 whatever their dtype.

    Of tokens in shards on a mesh of explicit axes they are the sums over all devices, whole on each of them.
    """
    return whole(functools.partial(_observe, gram=gram), x)


def whole(look: Callable, x: Array, *others: Any) -> Any:
    """`look(x, *others)`, whole on every device where the array lies in shards on a mesh of explicit axes.

    Such a mesh asks of many a sum and reshape where its result lies; inside, the partitioner is left to itself.
    """
    mesh = jax.typeof(x).sharding.mesh
    if not mesh.explicit_axes:
        return look(x, *others)
    there = NamedSharding(mesh, PartitionSpec())
    return jax.sharding.auto_axes(look, axes=mesh.explicit_axes, out_sharding=there)(x, *others)


def _observe(x: Float[Array, "*stack tokens in"], gram: bool) -> Stats:
    x = x.astype(jnp.float32)
    size = jnp.abs(x)
    # One threshold after the other: XLA on CPU would write all 128 comparisons of every input into memory.
    above = jax.lax.map(
        lambda threshold: jnp.sum(size > threshold, axis=(-2, -1), dtype=jnp.float32),
        jnp.asarray(THRESHOLDS, jnp.float32),
    )
    return Stats(
        count=jnp.full(x.shape[:-2], x.shape[-2], jnp.float32),
        absmax=jnp.max(size, axis=-2, initial=0.0),
        # A product with ones: the order in which XLA adds up the rows of an array depends on the number of threads.
        abssum=jnp.einsum("...ti,t->...i", size, jnp.ones(x.shape[-2]), precision="highest"),
        above=jnp.moveaxis(above, 0, -1),
        gram=jnp.einsum("...ti,...tj->...ij", x, x, precision="highest") if gram else None,
    )


def rescale(stats: Stats, s: Float[Array, " in"]) -> Stats:
    """The statistics of `x / s`; the distribution over all inputs is not known any more, and left out as zeros."""
    gram = None if stats.gram is None else stats.gram / (s[:, None] * s[None, :])
    return dataclasses.replace(
        stats, absmax=stats.absmax / s, abssum=stats.abssum / s, above=jnp.zeros_like(stats.above), gram=gram
    )


def output_error(d: Float[Array, "in out"], stats: Stats | None) -> Float[Array, ""]:
    """`E |x D|^2 = tr(D^T H D)`, what an error D of the weight does to the output; `|D|^2` without a Gram matrix."""
    if stats is None or stats.gram is None:
        return jnp.sum(jnp.square(d))
    hessian = stats.gram / jnp.maximum(stats.count, 1)
    seen = jnp.sum(d * jnp.matmul(hessian, d, precision="highest"))
    return jnp.where(stats.count > 0, seen, jnp.sum(jnp.square(d)))


def mean_square(stats: Stats | None, inputs: int) -> Float[Array, " in"]:
    """`E[x^2]` of each input, the importance of its row of the weight; 1 where there is no Gram matrix to tell."""
    if stats is None or stats.gram is None:
        return jnp.ones((inputs,), jnp.float32)
    return jnp.where(stats.count > 0, jnp.diagonal(stats.gram) / jnp.maximum(stats.count, 1), 1.0)


def quantile(stats: Stats, share: ArrayLike) -> Float[Array, ""]:
    """The size that a share of all inputs stays below, to a quarter of an octave and never beyond the largest."""
    total = stats.count * stats.absmax.shape[-1]
    beyond = jnp.sum(stats.above > (1 - share) * total)
    bound = jnp.asarray((*THRESHOLDS, jnp.inf), jnp.float32)
    return jnp.minimum(bound[beyond], jnp.max(stats.absmax))


def need_gram(stats: Stats | None, who: str) -> Float[Array, "*stack in in"]:
    """The Gram matrix, or an error that says how to get one."""
    if stats is None or stats.gram is None:
        raise StatsError(f"{who} needs Gram matrices of the inputs: calibrate(fn, params, batches, gram=True).")
    return stats.gram
