"""What the precision that JAX is asked for means for a product with a weight in codes, and for all it consists of.

    DEFAULT          what the platform is fast at: TF32 on a GPU, and on a CPU float32, or three digits of int8 codes
    HIGH, HIGHEST    more than that where it is less than float32, and all bits
    BF16_BF16_F32    floats may be rounded to bfloat16 before they are multiplied; sums are float32

The other algorithms that JAX has names for are the least of the first three that gives what they promise, and those
that somebody made up have all bits.
"""

from contextlib import AbstractContextManager
from typing import Any

import jax
from jax.lax import DotAlgorithm, DotAlgorithmPreset, Precision
from jaxtyping import Array, Float

_ROUNDING = DotAlgorithmPreset.BF16_BF16_F32
_HIGH = (
    Precision.HIGH,
    DotAlgorithmPreset.TF32_TF32_F32,
    DotAlgorithmPreset.TF32_TF32_F32_X3,
    DotAlgorithmPreset.BF16_BF16_F32_X3,
)
_HIGHEST = (
    Precision.HIGHEST,
    DotAlgorithmPreset.F32_F32_F32,
    DotAlgorithmPreset.F64_F64_F64,
    DotAlgorithmPreset.BF16_BF16_F32_X6,
    DotAlgorithmPreset.BF16_BF16_F32_X9,
)


def may_round(precision: Any) -> bool:
    """Whether floats may be rounded before they are multiplied, to bfloat16 or what is no worse."""
    return precision == _ROUNDING


def level(precision: Any) -> Precision:
    """DEFAULT, HIGH or HIGHEST, from what `jax.lax.dot_general` has in its jaxpr."""
    asked = precision if type(precision) is tuple else (precision,)
    if any(each in _HIGHEST or isinstance(each, DotAlgorithm) for each in asked):
        return Precision.HIGHEST
    return Precision.HIGH if any(each in _HIGH for each in asked) else Precision.DEFAULT


def within(precision: Any) -> AbstractContextManager[None]:
    """A context for what a product consists of: in that of the function around it codes would get an algorithm too."""
    return jax.default_matmul_precision(level(precision).name.lower())


def float_dot(
    left: Float[Array, "..."], right: Float[Array, "..."], numbers: Any, precision: Any, dtype: Any = None
) -> Float[Array, "..."]:
    """`jax.lax.dot_general`; XLA on a CPU does not round where it may, and cannot compile all that says so."""

    def at(precision: Any) -> Any:
        return lambda left, right: jax.lax.dot_general(left, right, numbers, precision, dtype)

    if not may_round(precision):
        return at(precision)(left, right)
    return jax.lax.platform_dependent(left, right, cpu=at(Precision.DEFAULT), default=at(precision))
