"""GPTQ checkpoints, as AutoGPTQ and GPTQModel write and vLLM reads them.

    qweight  int32 [in * bits / 32, out]       along the inputs, the first in the lowest bits
    qzeros   int32 [groups, out * bits / 32]   along the outputs; version 1 holds zero - 1, version 2 zero
    scales   float [groups, out]
    g_idx    int32 [in]                        the group of each input

    w[o, i] = (qweight[i, o] - zero[g, o]) * scales[g, o],    g = g_idx[i]

Source: https://github.com/ModelCloud/GPTQModel, `nn_modules/qlinear` and `utils/model.py`.
"""

import itertools
import os
from collections.abc import Mapping
from typing import Any

import numpy as np
from jaxtyping import PyTree, Shaped

from jaxquant.errors import FileError
from jaxquant.files.huggingface.folder import flattened, narrowest, write_folder
from jaxquant.files.huggingface.matrix import Matrix, check, to_matrix, to_qtensor
from jaxquant.files.huggingface.parts import Layout, Parts, Settings
from jaxquant.files.huggingface.words import from_words, plus_one, to_words, words_for
from jaxquant.qtensor import QTensor

_V1, _V2 = "gptq", "gptq_v2"


def layout(settings: Settings) -> Layout:
    """How a checkpoint with this `quantization_config` holds its weights.

    Raises:
      FileError: a value that is not one of this layout's.
    """
    width = settings.among("bits", (2, 4, 8))
    group = settings.whole("group_size", -1)
    key = "checkpoint_format" if "checkpoint_format" in settings.values else "format"
    first = settings.among(key, (_V1, _V2), _V1) == _V1
    settings.among("is_marlin_format", (False,), False)
    settings.among("pack_dtype", ("int32", "torch.int32"), "int32")
    if any(not rule.startswith("-:") for rule in settings.section("dynamic").values):
        raise settings.error("dynamic", "weights of several formats in one GPTQ checkpoint are not supported")

    def read(parts: Parts) -> QTensor:
        parts.refuse("weight")
        codes = from_words(_whole(parts, "qweight"), width, 0)
        inputs, outputs = codes.shape
        members = inputs if group == -1 else group
        if inputs % members:
            raise parts.error("qweight", f"has {inputs} inputs, which groups of {members} do not divide")
        scale = parts.scales("scales", (inputs // members, outputs))
        words = parts.read("qzeros", ("int32",), (inputs // members, words_for(outputs, width)))
        zero = from_words(plus_one(words, width) if first else words, width, 1)[:, :outputs]
        group_of = parts.groups_of("g_idx", inputs, inputs // members)
        return to_qtensor(Matrix(codes.T, scale.T, zero.T, width, group_of), parts.dtype)

    return Layout(("qweight", "qzeros", "scales", "g_idx"), read)


def _whole(parts: Parts, suffix: str) -> Shaped[np.ndarray, "..."]:
    words = parts.read(suffix, ("int32",), (None, None))
    if words.size == 0:
        raise parts.error(suffix, f"is empty, {words.shape}")
    return words


def save_gptq(
    folder: str | os.PathLike,
    tree: PyTree,
    config: Mapping[str, Any] | None = None,
    *,
    shard_bytes: int = 4 * 10**9,
) -> None:
    """Writes a GPTQ checkpoint, whole or not at all: `model.safetensors` and `config.json` in a folder.

    Scales are written in the weights' dtype where that holds each of them, in float32 where it does not, so nothing
    is rounded here; vLLM rounds them to its dtype as it loads. Weights without zero points make a checkpoint of
    version 1, which every reader knows; any zero point makes one of version 2, because version 1 cannot hold 0.

    Args:
      folder: a new one, or one without tensors; its `config.json` is replaced.
      tree: dicts with the names and shapes of the Hugging Face model, `weight` being `[outputs, inputs]`. `QTensor`s
        are integers of 8, 4 or 2 bits, all in one format; GPTQ expects all linear layers of the blocks to be such.
      config: what `config.json` says of the model.
      shard_bytes: tensors beyond that go into `model-00001-of-0000N.safetensors` and so on, of about that size each,
        which `model.safetensors.index.json` names; one of them is in memory at a time.

    Raises:
      FileError: a leaf that the layout cannot hold exactly, by its path.
      OSError: the folder cannot be written.
    """
    weights, arrays = flattened(tree)
    for name, q in weights.items():
        check(name, q, ("int8", "int4", "int2"))
    width, group = _one_format(weights)
    version = _V1 if all(q.zero is None for q in weights.values()) else _V2
    scheme = {
        "quant_method": "gptq",
        "bits": width,
        "group_size": group,
        "desc_act": any(q.transform for q in weights.values()),
        "sym": version == _V1,
        "lm_head": any(name.startswith("lm_head.") for name in weights),
        "checkpoint_format": version,
    }
    dtype = next(q.dtype.name for q in weights.values())
    leaves = itertools.chain(
        ({name: np.asarray(array)} for name, array in arrays.items()),
        (_tensors(name.removesuffix("weight"), q, version) for name, q in weights.items()),
    )
    write_folder(folder, leaves, {"torch_dtype": dtype, **(config or {}), "quantization_config": scheme}, shard_bytes)


def _one_format(weights: Mapping[str, QTensor]) -> tuple[int, int]:
    """The bits and the size of groups that all weights share, -1 for one group."""
    formats: dict[tuple[int, int], str] = {}
    grouped = any(q.scale.shape[1] > 1 for q in weights.values())
    for name, q in weights.items():
        (outputs, inputs), (rows, groups) = q.shape, q.scale.shape
        if rows != outputs or outputs % (32 // q.bits) or inputs % (32 // q.bits):
            raise FileError(
                f"{name}: GPTQ holds a scale for each output, and {32 // q.bits} codes in a word along both axes; "
                f"this is {q.shape} with scales {q.scale.shape}."
            )
        formats.setdefault((q.bits, inputs // groups if grouped else -1), name)
    if len(formats) != 1:
        seen = ", ".join(f"{name} is {bits} bits in groups of {group}" for (bits, group), name in formats.items())
        raise FileError(f"a GPTQ checkpoint has weights of one format; here {seen or 'are no QTensors'}.")
    return next(iter(formats))


def _tensors(stem: str, q: QTensor, version: str) -> dict[str, Shaped[np.ndarray, "..."]]:
    matrix = to_matrix(q)
    outputs, inputs = matrix.codes.shape
    groups = matrix.scale.shape[1]
    zero = np.zeros((outputs, groups), np.int8) if matrix.zero is None else matrix.zero
    consecutive = (np.arange(inputs) // (inputs // groups)).astype(np.int32)
    return {
        stem + "qweight": to_words(matrix.codes.T, matrix.bits, 0),
        stem + "qzeros": to_words(zero.T - np.int8(version == _V1), matrix.bits, 1),
        stem + "scales": narrowest(matrix.scale.T, q.dtype),
        stem + "g_idx": consecutive if matrix.group_of is None else matrix.group_of,
    }
