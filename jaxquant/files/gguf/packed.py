"""`QTensor`s as blocks of the ggml types that hold them: Q8_0, Q4_0 and Q4_1, 32 inputs with a scale in float16.

    Q8_0   8-bit codes                        w = d * code
    Q4_0   codes of up to 4 bits              w = d * (q - 8),   q = code + 8
    Q4_1   those with a zero point            w = d * q + m,     m = -(zero + 8) * scale

Nothing is rounded but what a float32 zero point is rounded to anyway: any other number that a block cannot hold is an
error. `half_scales` writes codes whose numbers it can.
"""

import jax.numpy as jnp
import numpy as np
from jaxtyping import Float16, Int8, UInt8

from jaxquant.errors import FormatError
from jaxquant.qtensor import QTensor
from jaxquant.quantizers.half_scales import MIDDLE
from jaxquant.trace.views import expand

BLOCK = 32
_FIX = (
    "Quantize it with jq.half_scales(jq.int8(group=32)), jq.half_scales(jq.int4(group=32)) or "
    "jq.half_scales(jq.int4(group=32, symmetric=False)), or write the floats of jq.dequantize(q)."
)


def kind_of(q: QTensor, name: str) -> str:
    """The ggml type whose blocks hold a weight, by its shapes and dtypes.

    Args:
      q: codes `[..., out, in]`.
      name: what an error calls it.

    Raises:
      FormatError: there is none.
    """
    problem = _problem(q)
    if problem:
        raise FormatError(f"{name} is {q!r}: {problem} {_FIX}")
    if q.codes.dtype == jnp.int8:
        return "Q8_0"
    return "Q4_0" if q.zero is None else "Q4_1"


def _problem(q: QTensor) -> str:
    inputs, groups = q.shape[-1], q.scale.shape[-1]
    if not q.is_integer:
        return "blocks are written from integer codes only."
    if q.transform or q.kept is not None:
        return "a block has no place for what is done to the input first, nor for weights kept in float."
    if q.codes.dtype == jnp.int8 and q.zero is not None:
        return "8-bit codes have no zero point there."
    if inputs % BLOCK or inputs // BLOCK % groups:
        return f"a scale serves 32 inputs there, or several times 32, along the last axis, which here is {inputs} long."
    return ""


def packed(q: QTensor, kind: str, name: str) -> UInt8[np.ndarray, "blocks bytes"]:
    """The blocks of a weight.

    Args:
      q: codes `[..., out, in]`.
      kind: what `kind_of` says.
      name: what an error calls it.

    Raises:
      FormatError: a scale or an offset is no float16.
    """
    q = q.settled
    scale = _of_blocks(q.scale, q)
    fields = [_exact(scale, np.zeros(1), "scale", name)]
    codes = np.asarray(q.codes.astype(jnp.int8)).reshape(-1, BLOCK)
    if kind == "Q4_1":
        zero = _of_blocks(q.zero, q)
        rounding = 2.0**-23 * (np.abs(zero) + MIDDLE) * np.abs(scale)  # of the zero point to float32
        fields.append(_exact(-(zero + MIDDLE) * scale, rounding, "offset", name))
    numbers = codes.view(np.uint8) if kind == "Q8_0" else _nibbles(codes)
    return np.concatenate([*(field.view(np.uint8) for field in fields), numbers], axis=1)


def _of_blocks(part, q: QTensor) -> np.ndarray:
    """The scale or zero point of each block, in float64, where products of them are exact enough."""
    shape = (*q.shape[:-1], q.shape[-1] // BLOCK)
    return np.broadcast_to(np.asarray(expand(part, shape), np.float64), shape).reshape(-1, 1)


def _exact(values: np.ndarray, slack: np.ndarray, what: str, name: str) -> Float16[np.ndarray, "blocks 1"]:
    """The values in float16, which may change them by the slack."""
    with np.errstate(over="ignore"):
        half = values.astype(np.float16)
    wrong = ~(np.abs(half.astype(np.float64) - values) <= slack)
    if wrong.any():
        block = int(np.argmax(wrong))
        raise FormatError(f"{name}: the {what} of block {block} is {values[block, 0]}, which is no float16. {_FIX}")
    return half


def _nibbles(codes: Int8[np.ndarray, "blocks 32"]) -> UInt8[np.ndarray, "blocks 16"]:
    numbers = (codes + np.int8(MIDDLE)).view(np.uint8)
    return numbers[:, : BLOCK // 2] | numbers[:, BLOCK // 2 :] << 4
