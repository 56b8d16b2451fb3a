"""`quantize_params`: a tree of parameters becomes a tree of `QTensor`s.

Which leaves are matrices that a matmul reads, and along which axes it contracts them, is known from the names that
Flax (Linen, NNX), Equinox, Haiku and plain JAX code give them; `where` overrides the choice of leaves.
"""

import dataclasses
import functools
import re
from collections.abc import Callable, Collection, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.core import Tracer
from jaxtyping import Array, PyTree

from jaxquant.adapter import is_leaf
from jaxquant.encode import quantize
from jaxquant.errors import NoMatchError, NotQuantizableError, OptionError, ShapeError, StatsError
from jaxquant.finite import check_finite
from jaxquant.format import Format, int8
from jaxquant.learned import is_learned, plain, rewritten
from jaxquant.matrices import Matrices, write
from jaxquant.qtensor import QTensor
from jaxquant.quantizers import Quantizer, as_quantizer
from jaxquant.sharding import on_shards
from jaxquant.stats import Stats
from jaxquant.trace import path_name
from jaxquant.turned import is_in_codes

# Names that hold no matmul's weight, whatever their rank: biases, norms (stacked ones have rank 2), statistics, tables
# of positions that are added.
_NO_MATRIX = re.compile(
    r"(^|/)(batch_stats|cache|[^/]*norm[^/]*|ln[_\d][^/]*|ln|pos[^/]*emb[^/]*)(/|$)"
    r"|(^|/)([^/]*bias[^/]*|b\d*|scale|gain|gamma|beta|offset|mean|var)$",
    re.IGNORECASE,
)

_GUESSED = " Its inputs were guessed from its name: `stats=jq.calibrate(fn, params, shapes)` knows them."


@dataclasses.dataclass(frozen=True)
class Layout:
    """The axes of one matrix at the end of an array's shape, and those a matmul contracts, counted from the back."""

    rank: int
    contracted: tuple[int, ...]


def quantize_params(
    params: PyTree,
    quantizer: Format | Quantizer = int8,
    *,
    stats: Mapping[str, Stats] | None = None,
    where: Callable[[str, Array], bool] | None = None,
    donate: bool = False,
) -> PyTree:
    """Quantizes every floating matrix of a tree that a matmul, a convolution or an embedding would read.

    Biases, norms, batch statistics, integers, PRNG keys and everything that is not an array pass untouched, and so
    does the tree around them (boxes with metadata included). Scales are per output channel: an array named

        kernel, w, anything else   [*stack, in, out]             query, key, value   [*stack, in, heads, head]
        conv kernel                [*spatial, in, out]           attention's out     [*stack, heads, head, out]
        weight (Equinox, torch)    [*stack, out, in, *spatial]   embedding           [*stack, rows, features]

    shares a scale along its inputs. One array on two paths becomes one `QTensor` on both. An array that is split over
    devices is written where it lies, and its codes and scales lie as `shardings_like` says.

    Args:
      params: Linen variables, an `nnx.State`, an Equinox module, Haiku parameters, or any tree.
      quantizer: how each matrix `[in, out]` is written in codes; a format is nearest rounding, `rtn(format)`. Stacked
        matrices are written one by one, and kernels of rank 3 and 4 as the matrices they are.
      stats: what `calibrate` gave; it also tells which axes of an array are its inputs, so that no name has to.
      where: `(path, array) -> bool`, asked for every floating array (of any rank) instead of the rule above; paths
        look like `params/Dense_0/kernel`.
      donate: release each array as soon as it is quantized, so that the peak is the larger of the two trees and a leaf.

    Returns:
      The same tree with `QTensor`s; `dequantize` is the inverse.

    Raises:
      NoMatchError: no array was chosen.
      NonFiniteError, ShapeError: as `quantize`, naming the path; or a group is cut by the shards of its array.
      NotQuantizableError: a chosen leaf is a `QTensor` already.
      StatsError: the quantizer needs statistics that a chosen leaf does not have, or they do not fit it.
    """
    leaves, treedef = jax.tree_util.tree_flatten_with_path(params, is_leaf=is_bundle)
    named = [(path_name(path), leaf) for path, leaf in leaves]
    chosen = _chosen(named, where)
    paths = {path for path, _ in named}
    kept = {id(leaf) for (_, leaf), pick in zip(named, chosen, strict=True) if not pick}
    picked = [named_leaf for named_leaf, pick in zip(named, chosen, strict=True) if pick]
    stats = stats or {}
    weights = {path: plain(leaf) for path, leaf in picked}
    encoders = {path: _encoder(path, w, quantizer, paths, stats.get(path)) for path, w in weights.items()}
    check_finite(weights)
    done: dict[int, QTensor] = {}
    for path, leaf in picked:
        if id(leaf) not in done:
            q = encoders[path](jnp.asarray(weights[path]))
            done[id(leaf)] = jax.block_until_ready(rewritten(leaf, q, as_quantizer(quantizer).format))
            if donate and id(leaf) not in kept:
                _release(weights[path])
    return treedef.unflatten([done[id(leaf)] if pick else leaf for (_, leaf), pick in zip(named, chosen, strict=True)])


def _chosen(named: list[tuple[str, Any]], where: Callable[[str, Array], bool] | None) -> list[bool]:
    """Which leaves to quantize; one with a learned range is there to be quantized."""
    rule = where or is_matrix
    candidates = [is_bundle(leaf) or _is_floating(leaf) for _, leaf in named]
    chosen = [
        fits and (is_learned(leaf) or bool(rule(path, plain(leaf))))
        for fits, (path, leaf) in zip(candidates, named, strict=True)
    ]
    if not any(chosen):
        could = [path for fits, (path, _) in zip(candidates, named, strict=True) if fits]
        raise NoMatchError(
            f"{'`where`' if where else 'the default rule'} chose none of the floating arrays of this tree: "
            f"{', '.join(could[:40]) or 'it has none'}."
        )
    return chosen


def is_bundle(leaf: Any) -> bool:
    """Whether a leaf is several arrays that stand for one: codes, or a weight with a learned range or an adapter."""
    return is_leaf(leaf) or is_learned(leaf)


def _is_floating(leaf: Any) -> bool:
    return isinstance(leaf, jax.Array | np.ndarray) and jnp.issubdtype(leaf.dtype, jnp.floating)


def is_matrix(path: str, leaf: Any) -> bool:
    """Whether an array holds a matrix that a matmul reads, by its rank and its name."""
    return leaf.ndim >= 2 and not _NO_MATRIX.search(path)


def layout(path: str, rank: int, paths: Collection[str] = ()) -> Layout:
    """The matrix an array holds, by the conventions that `quantize_params` documents.

    Args:
      path: of the array.
      rank: of the array.
      paths: of all arrays of the tree, which tell an attention's `out` from another layer of that name.
    """
    *parents, name = path.split("/")
    parent = parents[-1] if parents else ""
    if rank < 2:
        return Layout(rank, (-2,))
    if rank >= 3 and parent in ("query", "key", "value"):
        return Layout(3, (-3,))
    if rank >= 3 and parent == "out" and "/".join([*parents[:-1], "query", name]) in paths:
        return Layout(3, (-3, -2))
    if "embedding" in name:
        return Layout(2, (-1,))
    convolution = rank >= 4 or (rank == 3 and "conv" in path.lower())
    if name.startswith("weight"):
        return Layout(rank, tuple(range(1 - rank, 0))) if convolution else Layout(2, (-1,))
    return Layout(rank, tuple(range(-rank, -1))) if convolution else Layout(2, (-2,))


def _encoder(
    path: str, leaf: Any, quantizer: Format | Quantizer, paths: Collection[str], stats: Stats | None
) -> Callable[[Array], QTensor]:
    """How one leaf is written in codes; what is wrong with it is said before any leaf is converted or released."""
    if is_in_codes(leaf):
        raise NotQuantizableError(f"{path} is a {leaf!r} already: leave it out with `where`, or decode it first.")
    chosen = as_quantizer(quantizer)
    if leaf.size == 0 or (isinstance(quantizer, Format) and stats is None):
        where = layout(path, leaf.ndim, paths)
        encode = lambda array, stats: _encode(array, chosen.format, where)  # noqa: E731
    else:
        encode = functools.partial(write, quantizer=chosen, axes=axes_of(path, leaf, paths, stats))
    try:
        return on_shards(encode, leaf, stats)
    except (ShapeError, StatsError, OptionError) as error:
        guessed = stats is None and leaf.ndim > 2 and isinstance(error, ShapeError)
        raise type(error)(f"{path}: {error}{_GUESSED if guessed else ''}") from None


def axes_of(path: str, leaf: Any, paths: Collection[str], stats: Stats | None) -> Matrices:
    """Which axes of an array are inputs: those that statistics tell, or those that names do.

    Raises:
      StatsError: the statistics are of another shape.
    """
    if stats is None:
        where = layout(path, leaf.ndim, paths)
        stack = range(leaf.ndim - where.rank)
        return Matrices.of(leaf.ndim, stack, sorted(a % leaf.ndim for a in where.contracted) if leaf.ndim else ())
    axes = Matrices.of(leaf.ndim, stats.stack, stats.inputs)
    fits = max((*stats.stack, *stats.inputs)) < leaf.ndim
    fits = fits and stats.absmax.shape == axes.sizes(leaf.shape)[:-1]
    if not fits or (stats.gram is not None and stats.gram.shape != (*stats.absmax.shape, stats.absmax.shape[-1])):
        raise StatsError(
            f"{path} is {leaf.shape}, and its statistics are of {stats.absmax.shape} inputs: calibrate anew."
        )
    return axes


@functools.partial(jax.jit, static_argnames=("format", "where"))
def _encode(array: Array, format: Format, where: Layout) -> QTensor:
    """Codes for a leaf, a stack matrix by matrix."""

    def one(matrix):
        return quantize(matrix, format, axis=where.contracted)

    for _ in range(array.ndim - where.rank):
        one = jax.vmap(one)
    return one(array)


def _release(leaf: Any) -> None:
    if isinstance(leaf, jax.Array) and not isinstance(leaf, Tracer):
        leaf.delete()
