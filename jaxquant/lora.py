"""LoRA and QLoRA: low-rank adapters on the matrices of a tree, in float or in codes, trained alone.

params --add_lora--> tree --split_lora--> adapters, base --join_lora--> tree --quantized(fn)--> outputs
tree --merge_lora--> params
"""

import dataclasses
import math
from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Key, PyTree

from jaxquant.adapter import Adapted, Adapter, is_adapted, is_leaf
from jaxquant.encode import quantize
from jaxquant.errors import AdapterError, NoMatchError, OptionError
from jaxquant.format import int8
from jaxquant.params import axes_of, is_matrix
from jaxquant.qtensor import QTensor, is_qtensor
from jaxquant.trace import path_name
from jaxquant.turned import upright

_BLOCK = 256


def no_embedding(path: str, leaf: Any) -> bool:
    """The matrices that `quantize_params` would choose, without embeddings."""
    return is_matrix(path, leaf) and "embedding" not in path


def add_lora(
    params: PyTree,
    rank: int,
    *,
    key: Key[Array, ""],
    alpha: float | None = None,
    where: Callable[[str, Any], bool] = no_embedding,
) -> PyTree:
    """Puts an adapter beside each chosen matrix.

        x @ w  becomes  x @ w + (x @ A) @ B * alpha / rank,     A ~ N(0, 1 / in), B = 0

    so that nothing changes until it is trained. Run the tree with `quantized` (with `activations=None` where the base
    stays in float, or is to be decoded: QLoRA), which understands adapters in any matmul of the model.

    Args:
      params: a tree of float arrays and `QTensor`s; a turned one that is chosen stands upright beside its adapter.
      rank: of the correction.
      key: of A's random numbers.
      alpha: the strength; 2 * rank by default.
      where: `(path, array) -> bool`.

    Returns:
      The tree with an `Adapted` in the place of each chosen leaf.

    Raises:
      OptionError: `rank` is no positive whole number.
      NoMatchError: `where` chose nothing.

    Source: Hu et al., arXiv:2106.09685; Dettmers et al., QLoRA, arXiv:2305.14314.
    """
    if type(rank) is not int or rank < 1:
        raise OptionError(f"add_lora(rank={rank!r}): a rank is a positive whole number.")
    leaves, treedef = jax.tree_util.tree_flatten_with_path(params, is_leaf=is_leaf)
    named = [(path_name(path), leaf) for path, leaf in leaves]
    paths = {path for path, _ in named}
    chosen = [_has_shape(leaf) and bool(where(path, leaf)) for path, leaf in named]
    if not any(chosen):
        raise NoMatchError(f"`where` chose none of {', '.join(list(paths)[:40]) or 'an empty tree'}.")
    scaling = (2 * rank if alpha is None else alpha) / rank

    def one(number: int, path: str, leaf: Any) -> Adapted:
        if is_adapted(leaf):
            raise AdapterError(f"{path} has an adapter already: merge_lora it first, or leave it out with `where`.")
        axes = axes_of(path, leaf, paths, None)
        down = [1 if axis in axes.outputs else size for axis, size in enumerate(leaf.shape)]
        up = [1 if axis in axes.inputs else size for axis, size in enumerate(leaf.shape)]
        spread = 1 / math.sqrt(math.prod(leaf.shape[axis] for axis in axes.inputs))
        a = spread * jax.random.normal(jax.random.fold_in(key, number), (rank, *down), jnp.float32)
        return Adapted(upright(leaf), Adapter(a, jnp.zeros((rank, *up), jnp.float32), scaling))

    adapted = [one(i, *pair) if pick else pair[1] for i, (pair, pick) in enumerate(zip(named, chosen, strict=True))]
    return treedef.unflatten(adapted)


def _has_shape(leaf: Any) -> bool:
    if is_leaf(leaf):
        return True
    return hasattr(leaf, "dtype") and hasattr(leaf, "ndim") and jnp.issubdtype(leaf.dtype, jnp.floating)


def split_lora(tree: PyTree) -> tuple[dict[str, Adapter], PyTree]:
    """Takes the adapters out: what `jax.grad` and an optimizer see, by path, and the tree without them."""
    leaves, treedef = jax.tree_util.tree_flatten_with_path(tree, is_leaf=is_leaf)
    adapters = {path_name(path): leaf.adapter for path, leaf in leaves if is_adapted(leaf)}
    return adapters, treedef.unflatten([leaf.base if is_adapted(leaf) else leaf for _, leaf in leaves])


def join_lora(adapters: Mapping[str, Adapter], base: PyTree) -> PyTree:
    """Puts adapters back beside their matrices; the inverse of `split_lora`.

    Raises:
      AdapterError: an adapter has no leaf of its path.
    """
    leaves, treedef = jax.tree_util.tree_flatten_with_path(base, is_leaf=is_leaf)
    named = [(path_name(path), leaf) for path, leaf in leaves]
    if lost := set(adapters) - {path for path, _ in named}:
        raise AdapterError(f"no leaf for the adapters of {', '.join(sorted(lost))}: join them with the tree they left.")
    return treedef.unflatten([Adapted(leaf, adapters[path]) if path in adapters else leaf for path, leaf in named])


def merge_lora(tree: PyTree) -> PyTree:
    """Adds every adapter to its matrix: `w + scaling * A B`, in the dtype of the matrix.

    Raises:
      AdapterError: a base is quantized; codes cannot take the correction. Merge `dequantize(tree)`, and quantize
        that anew, or serve the adapters beside the codes.
    """

    def one(path: Any, leaf: Any) -> Any:
        if not is_adapted(leaf):
            return leaf
        if is_qtensor(base := upright(leaf.base)):
            raise AdapterError(
                f"{path_name(path)} is a {base!r}, whose codes cannot take an adapter: merge_lora("
                "jq.dequantize(tree)) and quantize that anew, or serve the adapter beside the codes."
            )
        return (leaf.base.astype(jnp.float32) + leaf.adapter.product).astype(leaf.dtype)

    return jax.tree_util.tree_map_with_path(one, tree, is_leaf=is_leaf)


def double_quantize(tree: PyTree) -> PyTree:
    """Writes the scales of every `QTensor` of groups in 8 bits too: 0.13 bits a weight in groups of 64, not 0.5.

        scale ~= (codes - zero) * scale2,     a scale2 and a zero for up to 256 scales along the outputs

    Everything that takes a `QTensor` takes it; a scale per channel or per tensor stays as it is. QLoRA, section 3.

    Args:
      tree: with `QTensor`s in it, of NF4 or any other format.

    Returns:
      The same tree; the scales are `QTensor`s.
    """
    return jax.tree.map(lambda leaf: _double(leaf) if is_qtensor(leaf) else leaf, tree, is_leaf=is_qtensor)


def _double(q: QTensor) -> QTensor:
    if is_qtensor(q.scale) or q.scale.ndim < 1 or q.scale.size * 256 <= q.size or q.scale.shape[-1] < 16:
        return q
    outputs = q.scale.shape[-1]
    group = max((n for n in range(16, _BLOCK + 1) if outputs % n == 0), default=None)
    return dataclasses.replace(q, scale=quantize(q.scale, int8(group=group, symmetric=False), axis=-1))
