"""The choice among the ways to multiply by a weight in codes, for a shape and a platform.

Which one is fastest is known here and nowhere else; the ways themselves are `matmul.arithmetic`, those of a GPU
`matmul.gpu`, and in blocks `matmul.blocks`.
"""

import dataclasses
import functools
from collections.abc import Callable

import jax.numpy as jnp
from jaxtyping import Array

from jaxquant.format import Format
from jaxquant.matmul.arithmetic import digits, floats, folded, grouped_dot, integer, say
from jaxquant.matmul.blocks import by_inputs, by_outputs
from jaxquant.matmul.gpu import gpu_dot, gpu_dot_floats
from jaxquant.qtensor import QTensor

INTEGER = "int8 x int8 -> int32"
WEIGHT_ONLY = "weight-only"
FLOAT = "float"

# Beyond this many rows a decoded weight is cheaper than groups x rows x N partial sums.
_FEW_ROWS = 4
# Up to this many rows three int8 digits of the activations are cheaper than decoding the weight, without groups and
# with them.
_FEW_DIGITS, _FEW_GROUPED = 8, 2


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
    run: Callable[[Array, QTensor], Array] | None = None
    say: Callable[[Array, QTensor], Array] | None = None
    gpu: Callable[[Array, QTensor], Array] | None = None
    cpu: Callable[[Array, QTensor], Array] | None = None


def choose(rows: int, q: QTensor, inputs_last: bool, activations: Format | None, outliers: int) -> Formulation:
    """The formulation for `rows` tokens and a weight `[B, K, N]`, from shapes alone.

    Args:
      rows: M, the tokens of one matmul of the batch.
      q: the weight; its scale is `[1 or B, groups, 1 or N]`.
      inputs_last: whether a weight's inputs are what lies together in memory.
      activations: the format of the activations, or None to keep them in floating point.
      outliers: how many of each token's largest activations stay in floating point.
    """
    groups, inputs = q.scale.shape[1], q.shape[1]
    # The kernel wants the weight as it lies in memory; transposed, XLA's own matmul is the better one.
    as_stored = inputs_last or jnp.dtype(q.dtype).itemsize > 4
    gpu, blocked = (None, None) if as_stored else (gpu_dot_floats, by_outputs(rows, q))
    cpu = blocked and blocked(floats)
    if not q.is_integer:
        return Formulation(WEIGHT_ONLY, "its codes are not integers", gpu=gpu, cpu=cpu)
    if groups == inputs > 1 and (q.zero is not None or q.scale.shape[2] > 1 or q.input_bound is not None):
        return Formulation(FLOAT, "it has a scale for every input")
    product = functools.partial(grouped_dot, inputs_last=inputs_last)
    unpacked = None if inputs_last else by_inputs(rows, q)
    unpacking = unpacked and unpacked(product)
    if activations is None:
        few = _FEW_DIGITS if groups == 1 else _FEW_GROUPED if unpacking else 0
        run = floats if groups == 1 and rows <= _FEW_DIGITS else None
        cpu = functools.partial(digits, product=unpacking or product) if rows <= few else cpu
        return Formulation(WEIGHT_ONLY, "activations=None", run=run, gpu=gpu, cpu=cpu)
    exact = functools.partial(integer, activations=activations, outliers=min(outliers, inputs))
    run, cpu_run = functools.partial(exact, product=product), unpacking and functools.partial(exact, product=unpacking)
    gpu = None if inputs_last else functools.partial(exact, product=gpu_dot)
    if groups == inputs > 1:
        run, gpu = (form and functools.partial(folded, run=form) for form in (run, gpu))
        return Formulation(INTEGER, run=run, gpu=gpu)
    if groups > 1 and (rows > _FEW_ROWS or inputs_last):
        heard = functools.partial(say, activations=activations, outliers=outliers)
        if cpu_run is not None:
            return Formulation(INTEGER, say=heard, gpu=gpu, cpu=cpu_run)
        reason = f"with {groups} groups and {rows} rows it is faster decoded"
        of_said = None if cpu is None else lambda x, q: cpu(heard(x, q), q)
        return Formulation(FLOAT, reason if inputs_last else f"{reason} on CPU", say=heard, gpu=gpu, cpu=of_said)
    return Formulation(INTEGER, run=run, gpu=gpu, cpu=cpu_run)
