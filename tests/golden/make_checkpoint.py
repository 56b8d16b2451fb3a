"""Writes checkpoint_v1.safetensors, which every later version must load to the same bytes.

python tests/golden/make_checkpoint.py    (not to be run again with a jaxquant that writes another version)
"""

from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np

import jaxquant as jq
from jaxquant.inputs import Permutation, Rescale, Rotation
from jaxquant.qtensor import Kept, QTensor


def tree() -> dict:
    """One leaf of each kind, from whole numbers alone, so that no rounding of any platform is in it."""
    numbers = np.arange(64).reshape(16, 4)
    signs = jnp.asarray(np.where(numbers[:, :1] % 3 == 0, -1, 1), jnp.int8)
    labels, seams = jnp.arange(16, dtype=jnp.int32)[:, None], jnp.zeros((1, 1), bool)
    kept = Kept(jnp.asarray(numbers[:, :1] % 16 == 5), jnp.asarray(numbers[:1], jnp.float32))

    def codes(bits: int, dtype, **fields) -> QTensor:
        values = jnp.asarray(numbers % 2**bits - 2 ** (bits - 1), jnp.int8).astype(dtype)
        return QTensor(values, jnp.ones((2, 4)) / 8, None, np.dtype("float32"), bits, **fields)

    levels = tuple(float(level) / 8 for level in range(-7, 9))
    return {
        "int8": codes(8, jnp.int8),
        "int4": codes(4, jnp.int4, kept=kept),
        "int3": codes(3, jnp.int4, transform=(Rescale(jnp.ones((16, 1)) * 2), Rotation(signs, seams))),
        "int2": codes(2, jnp.int2, input_bound=jnp.ones((1, 1)), transform=(Permutation(labels, labels[::-1], seams),)),
        "codebook": codes(4, jnp.int4, levels=levels),
        "turned": jq.turned(QTensor(codes(8, jnp.int8).codes, jnp.ones((1, 4)), None, np.dtype("float32"), 8)),
        "others": [None, 1, 1.5, "text", (), jnp.ones(3, jnp.bfloat16), jax.random.key(7)],
    }


if __name__ == "__main__":
    jq.save(Path(__file__).parent / "checkpoint_v1.safetensors", tree(), {"made by": "make_checkpoint.py"})
