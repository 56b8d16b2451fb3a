"""A stack of weights on a CPU, one matrix after the other, each in the form that is fastest for one.

    out[b]  =  run(x[b], q[b])

XLA multiplies a stack of int8 matrices faster than one after the other. What is decoded it writes to memory, the whole
stack of it, and the forms that decode a part at a time are those of a single matrix.
"""

import dataclasses
from collections.abc import Callable

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from jaxquant.packed import Packed, hides_bytes, places_of
from jaxquant.qtensor import QTensor

Run = Callable[[Array, QTensor], Array]


def first_of(q: QTensor) -> QTensor:
    """The shapes of the first matrix of a stack `[B, K, N]`, as a stack of one."""
    return jax.tree.map(lambda part: jax.ShapeDtypeStruct((1, *part.shape[1:]), part.dtype), q)


def one_by_one(run: Run, inputs_last: bool) -> Run:
    """The product of activations `[B, M, K]` and a stack of weights.

    Args:
      run: that of a stack of one.
      inputs_last: whether a weight's inputs are what lies together in memory.
    """

    def lying(codes: Array) -> Array:
        return jnp.swapaxes(codes, -1, -2) if inputs_last else codes

    def of_stack(x: Float[Array, "B M K"], q: QTensor) -> Float[Array, "B M N"]:
        codes = lying(q.codes)
        # Or XLA would take them apart before the loop.
        if hides_bytes(codes.dtype) and codes.shape[-1] % places_of(codes.dtype) == 0:
            codes = Packed.of(codes)
        parts = dataclasses.replace(q, codes=codes, master=None)
        parts = jax.tree.map(lambda part: jnp.broadcast_to(part, (len(x), *part.shape[1:])), parts)

        def one(operands: tuple[Array, QTensor]) -> Float[Array, "M N"]:
            x, q = operands
            # Before it is a stack of one, in which XLA would not see that the bytes are those it has.
            upright = dataclasses.replace(q, codes=lying(q.unpacked.codes))
            return run(*jax.tree.map(lambda part: part[None], (x, upright)))[0]

        return jax.lax.map(one, (x, parts))

    return of_stack
