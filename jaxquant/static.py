"""`static`: ranges for activations that are found beforehand, per tensor, instead of for each token when it comes."""

import dataclasses
from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, PyTree

from jaxquant.adapter import is_adapted, is_leaf
from jaxquant.errors import OptionError, StatsError
from jaxquant.stats import THRESHOLDS, Stats, quantile
from jaxquant.trace import path_name
from jaxquant.turned import is_in_codes, is_turned

Bound = Callable[[Stats], Float[Array, ""]]


def static(qparams: PyTree, stats: Mapping[str, Stats], bound: Bound | None = None) -> PyTree:
    """Gives every quantized weight a fixed range for its inputs, which `quantized` then uses for their codes.

        codes = clamp(round(x * qmax / bound), -qmax, qmax)

    No maximum has to be found when a token comes, at the price of one scale for all tokens. The bound is an array of
    the `QTensor` like its scales, so it is stacked, sharded and saved with it.

    Args:
      qparams: a tree with QTensors, turned or not, with adapters beside them or not.
      stats: of their inputs. Where a quantizer transforms the inputs they have to be those after the transform, so
        calibrate the quantized tree: `calibrate(fn, qparams, batches, gram=False)`.
      bound: `largest` (the default), `percentile(99.9)` or `least_error(bits=8)`: from the statistics of one matrix to
        the size at which its inputs saturate.

    Raises:
      StatsError: a weight in codes has no statistics, or those before its transform.
    """
    find = bound or largest
    leaves, treedef = jax.tree_util.tree_flatten_with_path(qparams, is_leaf=is_leaf)
    named = [(path_name(path), leaf) for path, leaf in leaves]
    return treedef.unflatten([_bounded(path, leaf, stats.get(path), find) for path, leaf in named])


def _bounded(path: str, leaf: Any, stats: Stats | None, bound: Bound) -> Any:
    if is_adapted(leaf):
        return dataclasses.replace(leaf, base=_bounded(path, leaf.base, stats, bound))
    if not is_in_codes(leaf):
        return leaf
    q = leaf.stored if is_turned(leaf) else leaf
    if stats is None:
        raise StatsError(f"static: {path} has no statistics: calibrate with it, or it never meets a matmul.")
    if stats.transformed != (bool(q.transform) or q.kept is not None):
        raise StatsError(
            f"static: {path} transforms its inputs: calibrate(fn, qparams, batches), which sees them after."
        )
    for _ in stats.stack:
        bound = jax.vmap(bound)
    shape = [n if axis in stats.stack else 1 for axis, n in enumerate(leaf.shape)]
    order = sorted(range(len(stats.stack)), key=lambda i: stats.stack[i])
    found = jnp.transpose(bound(stats), order).reshape(shape)
    if is_turned(leaf):
        return dataclasses.replace(leaf, stored=dataclasses.replace(q, input_bound=jnp.swapaxes(found, -1, -2)))
    return dataclasses.replace(q, input_bound=found)


def largest(stats: Stats) -> Float[Array, ""]:
    """The largest size that was seen."""
    return jnp.max(stats.absmax)


def percentile(percent: float | int) -> Bound:
    """The size that a share of all inputs stays below, found to a quarter of an octave.

    Raises:
      OptionError: not in (0, 100].
    """
    if not 0 < percent <= 100:
        raise OptionError(f"percentile({percent}): a percentage lies in (0, 100].")
    return lambda stats: quantile(stats, percent / 100)


def least_error(bits: int = 8) -> Bound:
    """The bound with the least squared error of the codes, clipping included.

        argmin over b of  sum_{|x| > b} (|x| - b)^2  +  count(|x| <= b) (b / qmax)^2 / 12

    Args:
      bits: of the codes.

    Raises:
      OptionError: codes of such a width do not exist.
    """
    if bits not in (8, 4, 3, 2):
        raise OptionError(f"least_error(bits={bits}): codes have 8, 4, 3 or 2 bits.")
    edges = jnp.asarray((0.0, *THRESHOLDS), jnp.float32)
    middles = jnp.asarray((0.0, *(t * 2**0.125 for t in THRESHOLDS)), jnp.float32)

    def bound(stats: Stats) -> Float[Array, ""]:
        most, total = jnp.max(stats.absmax), stats.count * stats.absmax.shape[-1]
        inside = -jnp.diff(stats.above, prepend=total[None], append=jnp.zeros(1))
        sizes, tries = jnp.minimum(middles, most), jnp.minimum(edges[1:], most)
        beyond = jnp.square(jnp.maximum(sizes[None] - tries[:, None], 0)) @ inside
        below = jnp.sum(jnp.where(sizes[None] <= tries[:, None], inside[None], 0), axis=1)
        error = beyond + below * jnp.square(tries / (2 ** (bits - 1) - 1)) / 12
        return tries[jnp.argmin(error)]

    return bound
