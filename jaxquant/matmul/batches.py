"""What `vmap` makes of a product: a batch of activations alone is more rows of the same matmul.

Left to itself it would batch the form that was chosen for the rows of one, and read the weight once for each.
"""

from collections.abc import Callable

import jax
import jax.numpy as jnp
from jax.custom_batching import custom_vmap
from jaxtyping import Array, Float

from jaxquant.qtensor import QTensor

Product = Callable[[Array, QTensor], Float[Array, "..."]]


def of_batches(product: Product, of_more: Callable[[], Product], place: int) -> Product:
    """A product that `vmap` gives all its rows at once, unless it batches the weight too.

    Args:
      product: `(x, q) -> out`.
      of_more: gives the same product of activations that have one more axis, which comes first.
      place: where that axis is in its result.
    """
    own = custom_vmap(product)

    @own.def_vmap
    def _batch(size, batched, *operands):
        del size
        if any(jax.tree.leaves(batched[1])):
            leaves, treedef = jax.tree.flatten(operands)
            axes = [0 if has else None for has in jax.tree.leaves(batched)]
            return jax.vmap(lambda *leaves: product(*treedef.unflatten(leaves)), axes)(*leaves), True
        return jnp.moveaxis(of_more()(*operands), place, 0), True

    return own
