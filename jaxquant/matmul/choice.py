"""The choice among the ways to multiply by a weight in codes, for a shape and a platform.

Which one is fastest is known here and nowhere else; the ways themselves are `matmul.arithmetic`, those of a GPU
`matmul.gpu`, a part of the weight at a time `matmul.blocks`, `matmul.lines` and `matmul.terms`, and one matrix of a
stack after the other `matmul.stacks`.
"""

import dataclasses
import functools
import math
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jax.lax import Precision
from jaxtyping import Array

from jaxquant.format import Format
from jaxquant.matmul.arithmetic import (
    digits,
    floats,
    folded,
    grouped_dot,
    in_own_width,
    integer,
    of_bfloats,
    of_tokens,
    split_long,
)
from jaxquant.matmul.blocks import by_inputs, is_alone
from jaxquant.matmul.gpu import gpu_dot, gpu_dot_floats
from jaxquant.matmul.integers import LONGEST
from jaxquant.matmul.lines import by_lines
from jaxquant.matmul.machine import multiplies_bfloats
from jaxquant.matmul.precision import level, may_round
from jaxquant.matmul.stacks import first_of, one_by_one
from jaxquant.matmul.terms import codes_in_terms, floats_in_terms, terms_of
from jaxquant.matmul.tokens import say
from jaxquant.packed import places_of
from jaxquant.qtensor import QTensor

Run = Callable[[Array, QTensor], Array]

INTEGER = "int8 x int8 -> int32"
WEIGHT_ONLY = "weight-only"
FLOAT = "float"

# Beyond this many rows a decoded weight is cheaper than groups x rows x N partial sums.
_FEW_ROWS = 4
# Up to this many rows three int8 digits of activations are cheaper than decoding a weight as it comes, where it is
# as large as this, or cannot be decoded in blocks: without groups, and with.
_FEW_DIGITS, _FEW_GROUPED, _LARGE = 8, 2, 2**23
# Up to this many rows of codes, packed weights without groups are cheaper decoded than written out as bytes.
_FEW_UNPACKED = 8
# Up to this many rows sums in terms are faster than XLA's library, of whole numbers and of floats in 8 bits,
_FEW_IN_TERMS, _FEW_OF_FLOATS = 2, 1
# but for weights of this many bytes or more, in lines of so many inputs with one scale: XLA reads those at the speed of
# memory, up to this many rows of floats as three digits.
_MANY, _LONG, _FEW_OF_LONG = 2**22, 2**11, 4
# Up to this many rows decoded weights are multiplied as float32, beyond it as bfloat16 where a CPU has instructions for
# that and bfloat16 holds them, or rounding is allowed.
_FEW_HALVES = 16
# So are codes, which are int8 up to this many rows, and up to this many multiplications.
_FEW_BFLOATS, _FEW_PRODUCTS = 48, 20_000_000
# Up to this many weights a matrix is not worth blocks, and in a stack not a turn of a loop.
_SMALL, _SMALL_OF_STACK = 2**14, 2**12


@dataclasses.dataclass(frozen=True)
class Formulation:
    """One way to multiply.

    Args:
      arithmetic: what to call it.
      reason: why it is not in integers; empty where it is.
      run: `(x, q) -> out`, or None for a float matmul with the decoded weight.
      say: `(x, q) -> x`, what becomes of the activations before that float matmul; None to leave them as they are.
      gpu, cpu: `(x, q) -> out` on a GPU and on a CPU, where those have another form.
    """

    arithmetic: str
    reason: str = ""
    run: Run | None = None
    say: Run | None = None
    gpu: Run | None = None
    cpu: Run | None = None


def choose(
    rows: int, q: QTensor, inputs_last: bool, activations: Format | None, outliers: int, precision: Any
) -> Formulation:
    """The formulation for `rows` tokens and a weight `[B, K, N]`, without looking at a number of either.

    Args:
      rows: M, the tokens of one matmul of the batch.
      q: the weight; its scale is `[1 or B, groups, 1 or N]`.
      inputs_last: whether a weight's inputs are what lies together in memory.
      activations: the format of the activations, or None to keep them in floating point.
      outliers: how many of each token's largest activations stay in floating point.
      precision: that of the product, as in its jaxpr.
    """
    formats = activations, outliers, precision
    if q.shape[0] > 1 and _size(q) > _SMALL_OF_STACK and jax.device_count() == 1:
        first = first_of(q)
        one = _of_matrix(rows, first, inputs_last, *formats)
        # A stack of bytes that meet bytes XLA multiplies faster than one after the other.
        in_digits = activations is None and _is_in_digits(rows, first, inputs_last, precision)
        in_bytes = one.arithmetic == INTEGER or in_digits
        if one.cpu is not None and not (in_bytes and _is_of_bytes(q)):
            return dataclasses.replace(one, cpu=one_by_one(one.cpu, inputs_last))
    return _of_matrix(rows, q, inputs_last, *formats)


def not_in_integers(q: QTensor, activations: Format | None, inputs: int) -> tuple[str, str] | None:
    """What a product whose scales come after it is computed in, and why, where that is not integers; else None.

    Args:
      q: the weight.
      activations: the format of the activations, or None.
      inputs: how many of them a sum is of.
    """
    if not q.is_integer:
        return WEIGHT_ONLY, "its codes are not integers"
    if activations is None:
        return WEIGHT_ONLY, "activations=None"
    if q.zero is not None and not jnp.issubdtype(q.zero.dtype, jnp.integer):
        return FLOAT, "its zero points are no integers"
    if q.transform or q.kept is not None:
        return FLOAT, "its inputs would have to be transformed"
    return (FLOAT, "its sums could overflow an int32") if inputs > LONGEST else None


def _of_matrix(
    rows: int, q: QTensor, inputs_last: bool, activations: Format | None, outliers: int, precision: Any
) -> Formulation:
    """The formulation for a matrix, or for a stack that is multiplied as one is."""
    groups, inputs = q.scale.shape[1], q.shape[1]
    in_double = jnp.dtype(q.dtype).itemsize > 4
    # The kernel wants the weight as it lies in memory; transposed, XLA's own matmul is the better one.
    gpu = None if inputs_last or in_double else functools.partial(gpu_dot_floats, precision=level(precision))
    lines = None if in_double else by_lines(rows, q, inputs_last)
    wide = lines and (floats if _size(q) <= _SMALL else lines)
    narrow = lines if rows > _FEW_HALVES and multiplies_bfloats() else None
    cpu = wide and functools.partial(in_own_width, wide=wide, narrow=narrow, rounds=may_round(precision))
    if not q.is_integer:
        terms = None if in_double else _in_terms(rows, q, inputs_last)
        few = terms and functools.partial(floats_in_terms, terms=terms)
        return Formulation(WEIGHT_ONLY, "its codes are not integers", gpu=gpu, cpu=few or cpu)
    if groups == inputs > 1 and (q.zero is not None or q.scale.shape[2] > 1 or q.input_bound is not None):
        return Formulation(FLOAT, "it has a scale for every input")
    if in_double and activations is None:
        return Formulation(WEIGHT_ONLY, "activations=None")
    if activations is None:
        return _of_floats(rows, q, inputs_last, precision, gpu, cpu)
    return _of_codes(rows, q, inputs_last, cpu, narrow, activations, outliers)


def _of_floats(
    rows: int, q: QTensor, inputs_last: bool, precision: Any, gpu: Run | None, cpu: Run | None
) -> Formulation:
    """Activations stay in floating point; what a GPU and a CPU do with decoded weights is known."""
    product, one_group = functools.partial(grouped_dot, inputs_last=inputs_last), q.scale.shape[1] == 1
    cpu = cpu or (floats if one_group and rows <= _FEW_DIGITS else None)
    if _is_in_digits(rows, q, inputs_last, precision):
        unpacked = None if inputs_last else by_inputs(rows, q)
        cpu = functools.partial(digits, product=unpacked(product) if unpacked else product)
    elif terms := _in_terms(rows, q, inputs_last):
        cpu = functools.partial(floats_in_terms, terms=terms)
    return Formulation(WEIGHT_ONLY, "activations=None", gpu=gpu, cpu=cpu)


def _is_in_digits(rows: int, q: QTensor, inputs_last: bool, precision: Any) -> bool:
    """Whether so few activations in floats meet a weight as three int8 digits on a CPU."""
    if not q.is_integer or level(precision) != Precision.DEFAULT:
        return False
    if inputs_last:
        return rows <= _FEW_OF_LONG and _reads_fast(q)
    if is_alone(q) and _size(q) < _LARGE:
        return rows <= 1 and (_is_of_bytes(q) or by_inputs(rows, q) is not None)
    few = _FEW_DIGITS if q.scale.shape[1] == 1 else _FEW_GROUPED if by_inputs(rows, q) else 0
    return rows <= few


def _in_terms(rows: int, q: QTensor, inputs_last: bool) -> int | None:
    """In how many terms so few rows meet a weight on a CPU; None where they do not."""
    few = _FEW_IN_TERMS if q.is_integer else _FEW_OF_FLOATS
    return terms_of(q) if inputs_last and 0 < rows <= few and not _reads_fast(q) else None


def _size(q: QTensor) -> int:
    """How many weights one matrix has."""
    return math.prod(q.shape[1:])


def _is_of_bytes(q: QTensor) -> bool:
    """Whether a weight is whole numbers in bytes with a scale for each output."""
    return q.is_integer and q.scale.shape[1] == places_of(q.codes.dtype) == 1


def _reads_fast(q: QTensor) -> bool:
    """Whether a weight is of bytes, and its lines so many and so long that XLA's library reads it as fast as memory."""
    return _is_of_bytes(q) and q.shape[1] >= _LONG and _size(q) >= _MANY


def _of_codes(
    rows: int, q: QTensor, inputs_last: bool, cpu: Run | None, narrow: Run | None, activations: Format, outliers: int
) -> Formulation:
    """Activations in codes; what a CPU does with decoded weights is known."""
    (_, inputs, outputs), groups = q.shape, q.scale.shape[1]
    outlying = {"outliers": min(outliers, inputs), "inputs_last": inputs_last}
    in_codes = functools.partial(integer, activations=activations, **outlying)
    heard = functools.partial(say, activations=activations, outliers=outliers)
    product = functools.partial(grouped_dot, inputs_last=inputs_last)
    unpacked = None if inputs_last else by_inputs(rows, q)
    on_gpu = None if inputs_last else lambda codes, q: gpu_dot(*split_long(codes, q))
    run, by_blocks, gpu = (
        form and functools.partial(in_codes, product=functools.partial(of_tokens, product=form))
        for form in (product, unpacked and unpacked(product), on_gpu)
    )
    if groups == inputs > 1:
        run, gpu = (form and functools.partial(folded, run=form) for form in (run, gpu))
        return Formulation(INTEGER, run=run, gpu=gpu)
    if terms := _in_terms(rows, q, inputs_last):
        in_row = functools.partial(in_codes, product=functools.partial(codes_in_terms, terms=terms))
        # A sum of floats takes outliers as they are, where a sum of whole numbers has them beside it.
        among = lambda x, q: floats_in_terms(heard(x, q), q, terms)  # noqa: E731
        return Formulation(INTEGER, run=run if groups == 1 else None, say=heard, cpu=among if outliers else in_row)
    of_said = cpu and (lambda x, q: cpu(heard(x, q), q))
    in_bfloats = narrow and functools.partial(in_codes, product=functools.partial(of_bfloats, product=narrow))
    if groups == 1:
        many = rows > _FEW_BFLOATS and rows * inputs * outputs > _FEW_PRODUCTS
        # Decoded lines are faster than an array of bytes: the sums of what the codes say, in float32.
        packed = inputs_last and places_of(q.codes.dtype) > 1 and rows <= _FEW_UNPACKED
        best = (in_bfloats if many else None) or (of_said if packed else None) or by_blocks
        return Formulation(INTEGER, run=run, gpu=gpu, cpu=best)
    if rows <= _FEW_ROWS and not inputs_last:
        return Formulation(INTEGER, run=run, gpu=gpu, cpu=by_blocks)
    if by_blocks is not None:
        return Formulation(INTEGER, say=heard, gpu=gpu, cpu=by_blocks)
    reason = f"with {groups} groups and {rows} rows it is faster decoded"
    of_decoded = in_bfloats if in_bfloats and q.dtype == jnp.bfloat16 else of_said
    return Formulation(FLOAT, reason if inputs_last else f"{reason} on CPU", say=heard, gpu=gpu, cpu=of_decoded)
