"""AWQ checkpoints of AutoAWQ, version `gemm`.

    qweight  int32 [in, out / 8]       along the outputs, in the order 0 2 4 6 1 3 5 7 from the lowest bits
    qzeros   int32 [groups, out / 8]   the same
    scales   float [groups, out]

    w[o, i] = (qweight[i, o] - qzeros[g, o]) * scales[g, o],    g = i // group_size

Source: https://github.com/casper-hansen/AutoAWQ, `modules/linear/gemm.py`.
"""

import numpy as np
from jaxtyping import Int8, Int32

from jaxquant.files.huggingface.matrix import Matrix, to_qtensor
from jaxquant.files.huggingface.parts import Layout, Parts, Settings
from jaxquant.files.huggingface.words import from_words
from jaxquant.qtensor import QTensor

_PLACES = (0, 4, 1, 5, 2, 6, 3, 7)  # in its word, of each of eight outputs


def layout(settings: Settings) -> Layout:
    """How a checkpoint with this `quantization_config` holds its weights.

    Raises:
      FileError: a value that is not one of this layout's.
    """
    settings.among("bits", (4,))
    settings.among("version", ("gemm", "GEMM"), "gemm")
    group = settings.whole("group_size", -1)

    def read(parts: Parts) -> QTensor:
        parts.refuse("weight")
        words = parts.read("qweight", ("int32",), (None, None))
        inputs, columns = words.shape
        members = inputs if group == -1 else group
        if words.size == 0 or inputs % members:
            raise parts.error("qweight", f"is {words.shape}, which has no whole number of groups of {members} inputs")
        zero = parts.read("qzeros", ("int32",), (inputs // members, columns))
        scale = parts.scales("scales", (inputs // members, 8 * columns))
        return to_qtensor(Matrix(_in_order(words).T, scale.T, _in_order(zero).T, 4), parts.dtype)

    return Layout(("qweight", "qzeros", "scales"), read)


def _in_order(words: Int32[np.ndarray, "rows words"]) -> Int8[np.ndarray, "rows columns"]:
    codes = from_words(words, 4, 1)
    return codes.reshape(len(codes), -1, 8)[:, :, _PLACES].reshape(codes.shape)
