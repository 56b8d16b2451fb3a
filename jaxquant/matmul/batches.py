"""What `vmap` makes of a product: a batch of activations alone is more rows of the same matmul.

Left to itself it would batch the form that was chosen for the rows of one, and read the weight once for each. A batch
of weights is the product of a stack of them, in the form that is chosen for a stack.
"""

from collections.abc import Callable

import jax
import jax.numpy as jnp
from jax.custom_batching import custom_vmap
from jaxtyping import Array, Float

from jaxquant.qtensor import QTensor

Product = Callable[[Array, QTensor], Float[Array, "..."]]


def of_batches(product: Product, of_rows: Product, of_stack: Product, place: int) -> Product:
    """A product that `vmap` gives its whole batch at once.

    Args:
      product: `(x, q) -> out`.
      of_rows: the same product of activations that have one more axis, which comes first.
      of_stack: that of activations and weights that both have one; what is not batched is copied for each.
      place: where that axis is in the result of `of_rows`.
    """
    own = custom_vmap(product)

    @own.def_vmap
    def _batch(size, batched, *operands):
        if not any(jax.tree.leaves(batched[1])):
            return jnp.moveaxis(of_rows(*operands), place, 0), True

        def every(part: Array, has: bool) -> Array:
            return part if has else jnp.broadcast_to(part, (size, *part.shape))

        return of_stack(*jax.tree.map(every, operands, tuple(batched))), True

    return own
