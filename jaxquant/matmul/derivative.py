"""What the derivative of an operation on a `QTensor` is: that of the same operation on the decoded array.

y  = forward(x, q)                  integer arithmetic, whose derivative is zero almost everywhere
dy = d reference(x, decode(q))      straight through the rounding of the activations
"""

import functools
from typing import Protocol, runtime_checkable

import jax
from jax.custom_derivatives import SymbolicZero
from jaxtyping import Array


@runtime_checkable
class Operation(Protocol):
    """An operation on activations and a weight in codes, as hashable data: equal ones share one trace."""

    def forward(self, x: Array, q, *others: Array) -> Array:
        """The result, in the best arithmetic for the format."""
        ...

    def reference(self, x: Array, q, *others: Array) -> Array:
        """The same on the decoded weight, in floating point."""
        ...


@functools.partial(jax.custom_jvp, nondiff_argnums=(0,))
def _apply(operation: Operation, *operands):
    return operation.forward(*operands)


@functools.partial(_apply.defjvp, symbolic_zeros=True)
def _derivative(operation: Operation, primals, tangents):
    values, treedef = jax.tree.flatten(primals)
    moves = treedef.flatten_up_to(tangents)
    moving = [i for i, move in enumerate(moves) if not isinstance(move, SymbolicZero)]

    # Rematerialised, or a scan over layers would keep the decoded weights of all of them for the backward pass.
    @functools.partial(jax.checkpoint, prevent_cse=False)
    def reference(*some):
        filled = list(values)
        for i, value in zip(moving, some, strict=True):
            filled[i] = value
        return operation.reference(*treedef.unflatten(filled))

    _, dy = jax.jvp(reference, [values[i] for i in moving], [moves[i] for i in moving])
    return _apply(operation, *primals), dy


apply = jax.jit(_apply, static_argnums=0)
