"""The rules of the walk: what a matmul, a convolution and a look-up do when they meet a `QTensor`."""

import dataclasses
import functools
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp

from jaxquant.adapter import Sides
from jaxquant.format import Format
from jaxquant.matmul.backward import Backward, apply_with
from jaxquant.matmul.choice import FLOAT, INTEGER
from jaxquant.matmul.conv import Conv
from jaxquant.matmul.derivative import apply
from jaxquant.matmul.dot import as_it_lies, make_dot
from jaxquant.matmul.lookup import pick_matrices, picked, slices
from jaxquant.matmul.low_rank import correction
from jaxquant.matmul.precision import float_dot
from jaxquant.matmul.ragged import Ragged, is_plain
from jaxquant.matmul.tokens import check_activations
from jaxquant.qtensor import decode, is_qtensor
from jaxquant.trace import Param, Rules


@dataclasses.dataclass(frozen=True)
class Meeting:
    """An operation met a parameter: what `explain` shows, one row each.

    Args:
      path: the parameter's path in the tree.
      operation: the name of the operation.
      activations, weight: the shapes that met.
      weight_format, activation_format: in words, such as `int4 g64` and `int8 per-token`.
      arithmetic: `int8 x int8 -> int32`, `weight-only`, `float`, or `look-up`.
      reason: why it is not integer arithmetic; empty where it is.
    """

    path: str
    operation: str
    activations: tuple[int, ...] | None
    weight: tuple[int, ...]
    weight_format: str
    activation_format: str
    arithmetic: str
    reason: str = ""


# What is heard is a thunk: nobody pays for the description of a meeting unless somebody records it.
Hear = Callable[[Callable[[], Meeting]], None]


def rules(
    activations: Format | None,
    outliers: int,
    record: Callable[[Meeting], None] | None = None,
    backward: Backward | None = None,
) -> Rules:
    """The rules of `quantized`; `record` hears of every meeting while the function is traced.

    With `backward`, the derivatives of matmuls with weights that have a master are taken in integers.

    Raises:
      FormatError: `activations` is not an integer format per token.
    """
    check_activations(activations, outliers)
    hear = (lambda meeting: record(meeting())) if record else (lambda meeting: None)
    operations = {
        "dot_general": lambda inputs, at: _dot(inputs, at.params, at.result, (activations, outliers), hear, backward),
        "conv_general_dilated": lambda inputs, at: _conv(inputs, at.params, at.result, activations, hear),
        "ragged_dot_general": lambda inputs, at: _ragged(inputs, at.params, at.result, activations, hear),
        "gather": lambda inputs, at: _gather(inputs, at.params, hear),
    }
    operations = {name: functools.partial(_named, rule) for name, rule in operations.items()}

    def decoded(param: Param, why: str) -> jax.Array:
        hear(lambda: _meeting(param, why, None, None, FLOAT, "it has no rule for codes, so it got the decoded array"))
        return param.value.decode() if isinstance(param.value, Sides) else decode(param.value)

    return Rules(is_param, decoded, operations)


def _named(rule: Callable, inputs: Sequence, at: Any) -> Any:
    """What comes of a parameter carries its path in the compiled program, for profilers and `explain`."""
    with jax.named_scope(f"[{next((each.path for each in inputs if isinstance(each, Param)), '')}]"):
        return rule(inputs, at)


def is_param(leaf: Any) -> bool:
    """Whether the rules follow a leaf: a weight in codes, or one with an adapter."""
    return is_qtensor(leaf) or isinstance(leaf, Sides)


def _dot(
    inputs: Sequence, params: Mapping[str, Any], result, activations, hear: Hear, backward: Backward | None = None
):
    lhs, rhs = inputs
    first = isinstance(lhs, Param)
    param, x = (lhs, rhs) if first else (rhs, lhs)
    if isinstance(param, Param) and isinstance(param.value, Sides):
        return _adapted_dot(param, x, first, params, result, activations, hear)
    if not _fits(param, x, "dot_general", hear) or params.get("out_sharding") is not None:
        return None
    lies = param.memory or tuple(range(param.value.ndim))
    q, numbers, memory = as_it_lies(param.value, lies, params["dimension_numbers"], first)
    dot = make_dot(numbers, first, activations, params["precision"], result.dtype, memory)
    hear(lambda: _meeting(param, "dot_general", x, activations[0], *dot.arithmetic(x.shape, q)))
    return apply(dot, x, q) if backward is None else apply_with(dot, backward, x, q)


def _adapted_dot(param: Param, x, first: bool, params: Mapping[str, Any], result, activations, hear: Hear):
    """The matmul with the base, and the low-rank correction beside it."""
    sides = param.value
    if isinstance(x, Param) or not jnp.issubdtype(x.dtype, jnp.floating) or params.get("out_sharding") is not None:
        return None
    beside = correction(x, sides, params["dimension_numbers"], first, params["precision"])
    if beside is None:
        return None
    if is_qtensor(sides.base):
        base = dataclasses.replace(param, value=sides.base)
        out = _dot((base, x) if first else (x, base), params, result, activations, hear)
    else:
        left, right = (sides.base, x) if first else (x, sides.base)
        out = float_dot(left, right, params["dimension_numbers"], params["precision"], result.dtype)
    return None if out is None else (out + beside).astype(result.dtype)


_GEOMETRY = (
    "window_strides",
    "padding",
    "lhs_dilation",
    "rhs_dilation",
    "dimension_numbers",
    "feature_group_count",
    "batch_group_count",
    "precision",
)


def _conv(inputs: Sequence, params: Mapping[str, Any], result, activations, hear: Hear):
    x, param = inputs
    if not _fits(param, x, "conv_general_dilated", hear):
        return None
    conv = Conv(tuple((name, params[name]) for name in _GEOMETRY), activations, result.dtype)
    hear(lambda: _meeting(param, "conv_general_dilated", x, activations, *conv.arithmetic(param.value)))
    return apply(conv, x, param.value)


def _ragged(inputs: Sequence, params: Mapping[str, Any], result, activations, hear: Hear):
    x, param, *sizes = inputs
    if not is_plain(params) or not _fits(param, x, "ragged_dot", hear):
        return None
    ragged = Ragged(activations, params["precision"], result.dtype)
    hear(lambda: _meeting(param, "ragged_dot", x, activations, *ragged.arithmetic(param.value)))
    return apply(ragged, x, param.value, *sizes)


def _gather(inputs: Sequence, params: Mapping[str, Any], hear: Hear):
    """Rows that are picked are activations from here on; matrices that are picked (experts) stay in codes."""
    param, indices = inputs
    if not isinstance(param, Param) or isinstance(indices, Param) or not is_qtensor(param.value):
        return None
    if (matrices := pick_matrices(param, indices, params)) is not None:
        return matrices
    rows = picked(param.value, indices, params)
    if rows is None:
        return None
    hear(lambda: _meeting(param, "gather", indices, None, "look-up", "the rows it picks are decoded"))
    return decode(slices(param.value, rows))


def _fits(param, x, operation: str, hear: Hear) -> bool:
    """Whether a quantized weight meets float activations; says why where it does not."""
    if not isinstance(param, Param) or isinstance(x, Param) or not jnp.issubdtype(x.dtype, jnp.floating):
        return False
    if not is_qtensor(param.value):
        hear(lambda: _meeting(param, operation, x, None, FLOAT, "the parameter is not quantized"))
        return False
    return True


def _meeting(param: Param, operation: str, x, activations, arithmetic: str, reason: str) -> Meeting:
    value = param.value
    words = getattr(value, "description", jnp.dtype(value.dtype).name)
    taken = "" if x is None else jnp.dtype(x.dtype).name
    if activations is not None and arithmetic == INTEGER:
        taken = f"int{activations.bits} per-{'example' if operation == 'conv_general_dilated' else 'token'}"
    return Meeting(
        param.path,
        operation,
        None if x is None else tuple(x.shape),
        tuple(value.shape),
        words,
        taken,
        arithmetic,
        reason,
    )
