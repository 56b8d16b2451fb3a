"""Meetings: every matmul, convolution and `ragged_dot` of a walk that records, brought to tokens and a weight."""

import dataclasses
import functools
from collections.abc import Callable, Hashable, Mapping, Sequence
from typing import Any, NamedTuple, Protocol, runtime_checkable

import jax
import jax.numpy as jnp
from jaxtyping import Array, PyTree

from jaxquant import matmul, trace
from jaxquant.adapter import Sides
from jaxquant.errors import NoMatchError, UnseenError
from jaxquant.qtensor import decode, is_qtensor
from jaxquant.trace import Equation, Param, Plain, Recorded
from jaxquant.transforms.observe import record, record_experts


class Tokens(NamedTuple):
    """Activations laid out as `(batch, rest, contracted)`, the axes of the weight they meet, and which they were."""

    x: Array
    batch: Sequence[int]
    contracted: Sequence[int]
    rest: Sequence[int]
    axes: Hashable


@runtime_checkable
class Meet(Protocol):
    """What to do when activations meet a weight."""

    def __call__(self, param: Param, tokens: Tokens, inputs: Sequence, at: Equation, view: Callable) -> Recorded:
        """Records a meeting of a parameter with `tokens`; `view` makes statistics of them (`observe.record`)."""
        ...


def watch(params: PyTree, where: Callable[[str, Array], bool]) -> PyTree:
    """The parameters with those that are to be followed marked; QTensors are followed as they are.

    A weight with an adapter is followed as `Sides`, of which those are met whose base is marked or in codes.

    Raises:
      NoMatchError: `where` chose nothing.
    """
    leaves, treedef = jax.tree_util.tree_flatten_with_path(params, is_leaf=matmul.is_param)
    named = [(trace.path_name(path), leaf) for path, leaf in leaves]
    floating = [hasattr(leaf, "ndim") and jnp.issubdtype(leaf.dtype, jnp.floating) for _, leaf in named]
    chosen = [bool(fits and where(*pair)) for fits, pair in zip(floating, named, strict=True)]
    if not any(chosen):
        raise NoMatchError(f"`where` chose none of {', '.join(path for path, _ in named[:40]) or 'an empty tree'}.")
    marked = [_marked(leaf) if pick else leaf for (_, leaf), pick in zip(named, chosen, strict=True)]
    return treedef.unflatten(marked)


def _marked(leaf: Any) -> Any:
    if isinstance(leaf, Sides):
        return dataclasses.replace(leaf, base=_marked(leaf.base))
    return leaf if is_qtensor(leaf) else Plain(leaf)


def rules(meet: Meet) -> trace.Rules:
    """The rules of a walk that hears of every meeting."""

    def dot(inputs: Sequence, at: Equation) -> Recorded | None:
        first = isinstance(inputs[0], Param)
        param, x = inputs if first else inputs[::-1]
        if isinstance(x, Param):
            return None
        return meet(param, _dot_tokens(param, x, at.params["dimension_numbers"], first), inputs, at, record)

    def conv(inputs: Sequence, at: Equation) -> Recorded | None:
        x, param = inputs
        return None if isinstance(x, Param) else meet(param, _conv_tokens(param, x, at.params), inputs, at, record)

    def ragged(inputs: Sequence, at: Equation) -> Recorded | None:
        x, param, sizes = inputs
        if isinstance(x, Param) or not matmul.is_plain(at.params):
            return None
        experts = functools.partial(record_experts, sizes=sizes)
        return meet(param, Tokens(x, (), (1,), (x.shape[0],), ()), inputs, at, experts)

    def gather(inputs: Sequence, at: Equation) -> Param | None:
        param, indices = inputs
        return matmul.pick_matrices(param, indices, at.params)

    meetings = {"dot_general": dot, "conv_general_dilated": conv, "ragged_dot_general": ragged}
    operations = {name: functools.partial(_of_bases, rule) for name, rule in meetings.items()} | {"gather": gather}
    return trace.Rules(_is_followed, _decoded, operations, recording=True)


def _of_bases(rule: Callable, inputs: Sequence, at: Equation) -> Recorded | None:
    """A rule of weights for those with adapters too, whose inputs are those of their bases."""
    bases = [
        dataclasses.replace(x, value=x.value.base) if isinstance(x, Param) and isinstance(x.value, Sides) else x
        for x in inputs
    ]
    met = all(_is_followed(x.value) for x in bases if isinstance(x, Param))
    return rule(bases, at) if met else None


def _is_followed(leaf: Any) -> bool:
    return matmul.is_param(leaf) or isinstance(leaf, Plain)


def _decoded(param: Param, why: str) -> Array:
    del why
    value = param.value
    if isinstance(value, Sides):
        base = value.base.array if isinstance(value.base, Plain) else value.base
        return dataclasses.replace(value, base=base).decode()
    return decode(value) if is_qtensor(value) else value.array


def _dot_tokens(param: Param, x: Array, numbers: Any, weight_first: bool) -> Tokens:
    """The activations of a `dot_general`, transformed as those of a QTensor are."""
    dot = matmul.make_dot(numbers, weight_first, (None, 0), None, x.dtype, ())
    (of_x, of_w), (batch_x, batch_w) = dot.contracted, dot.batch
    x = dot.transformed(x, param.value) if is_qtensor(param.value) else x
    rest = [axis for axis in range(x.ndim) if axis not in (*of_x, *batch_x)]
    moved = jnp.transpose(x, (*batch_x, *rest, *of_x))
    return Tokens(moved, batch_w, of_w, [x.shape[axis] for axis in rest], (of_x, batch_x))


def _conv_tokens(param: Param, x: Array, params: Mapping) -> Tokens:
    """The patches of a convolution, one token for each place of each example and each feature group."""
    numbers, groups = params["dimension_numbers"], params["feature_group_count"]
    if params["batch_group_count"] != 1 or (is_qtensor(param.value) and param.value.transform):
        raise UnseenError(f"{param.path}: a convolution that groups its batch, or of a transformed kernel.")
    output, features, *window = numbers.rhs_spec
    names = ("window_strides", "padding", "lhs_dilation", "rhs_dilation", "dimension_numbers", "precision")
    size = tuple(param.value.shape[axis] for axis in window)
    patches = jax.lax.conv_general_dilated_patches(x, size, **{name: params[name] for name in names})
    patches = jnp.moveaxis(patches, numbers.out_spec[1], -1)
    del output
    places = (*patches.shape[:-1], groups)
    moved = patches.reshape(*places, param.value.shape[features], *size)
    return Tokens(moved, (), (features, *window), places, tuple(params[name] for name in names[:-1]))
