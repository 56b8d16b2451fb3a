"""compressed-tensors checkpoints, as llm-compressor writes and vLLM serves them.

    pack-quantized    weight_packed int32 [out, in * bits / 32], code + 2^(bits - 1), the first in the lowest bits
                      weight_zero_point int32 [out * bits / 32, groups], along the outputs; weight_shape [out, in]
    int-quantized     weight int8 [out, in], weight_zero_point int8 [out, groups]
    float-quantized   weight float8 [out, in]
    all               weight_scale [out, groups], or [out, 1], or [1]

    w = (weight - weight_zero_point) * weight_scale

Source: https://github.com/vllm-project/compressed-tensors, `compressors`.
"""

import itertools
import json
import os
from collections.abc import Mapping
from typing import Any

import numpy as np
from jaxtyping import PyTree, Shaped

from jaxquant.errors import FileError
from jaxquant.files.huggingface.folder import Array, flattened, narrowest, write_folder
from jaxquant.files.huggingface.matrix import Matrix, check, to_matrix, to_qtensor
from jaxquant.files.huggingface.parts import Layout, Parts, Settings
from jaxquant.files.huggingface.words import from_words, to_words, words_for
from jaxquant.format import Format, fp8, int8
from jaxquant.qtensor import QTensor

_PACKED, _INTEGERS, _FLOATS = "pack-quantized", "int-quantized", "float-quantized"
_UNPACKED = ("int8", "float8_e4m3fn", "float8_e5m2")
_KINDS = ("int8", "int4", "float8_e4m3fn")
_FORMATS = (_PACKED, _INTEGERS, _FLOATS, "naive-quantized")


def layout(settings: Settings) -> Layout:
    """How a checkpoint with this `quantization_config` holds its weights.

    Raises:
      FileError: a value that is not one of this layout's.
    """
    settings.among("format", (*_FORMATS, "mixed-precision"))
    settings.section("sparsity_config").among("format", ("dense",), "dense")
    if settings.section("transform_config").values:
        raise settings.error("transform_config", "transforms of activations are not supported")
    groups = settings.section("config_groups")
    widths = {_width(groups.section(name)) for name in groups.values}

    def read(parts: Parts) -> QTensor:
        packed = "weight_packed" in parts or "weight_shape" in parts
        return _packed(parts, widths) if packed else _unpacked(parts)

    return Layout(("weight_packed", "weight_scale", "weight_zero_point", "weight_shape", "weight_g_idx"), read)


def _width(group: Settings) -> int:
    group.among("format", _FORMATS, _PACKED)
    weights = group.section("weights")
    kind = weights.among("type", ("int", "float"), "int")
    return weights.among("num_bits", (8,) if kind == "float" else (4, 8), 8)


def _packed(parts: Parts, widths: set[int]) -> QTensor:
    parts.refuse("weight")
    shape = tuple(map(int, parts.read("weight_shape", ("int64", "int32"), (None,))))
    words = parts.read("weight_packed", ("int32",))
    fitting = [width for width in widths if (*shape[:-1], words_for(shape[-1] if shape else 0, width)) == words.shape]
    if len(shape) < 2 or min(shape) < 1 or len(fitting) != 1:
        raise parts.error("weight_packed", f"is {words.shape}, which is not {shape} in {sorted(widths)} bits")
    (width,) = fitting
    codes = from_words(words, width, -1)[..., : shape[-1]]
    scale, zero = _scale(parts, shape), None
    if "weight_zero_point" in parts:
        asked = (*shape[:-2], words_for(shape[-2], width), scale.shape[-1])
        zero = from_words(parts.read("weight_zero_point", ("int32",), asked), width, -2)[..., : scale.shape[-2], :]
    group_of = parts.groups_of("weight_g_idx", shape[-1], scale.shape[-1])
    return to_qtensor(Matrix(codes, scale, zero, width, group_of), parts.dtype)


def _unpacked(parts: Parts) -> QTensor:
    codes = parts.read("weight", _UNPACKED)
    scale, zero = _scale(parts, codes.shape), None
    if "weight_zero_point" in parts:
        asked = parts.scales("weight_scale").shape
        zero = parts.read("weight_zero_point", _UNPACKED, asked).reshape(scale.shape)
        if (codes.dtype, zero.dtype) != (np.int8, np.int8) and np.any(zero.astype(np.float32)):
            raise parts.error("weight_zero_point", f"is {zero.dtype} and not 0, where codes are {codes.dtype}")
    group_of = parts.groups_of("weight_g_idx", codes.shape[-1], scale.shape[-1])
    return to_qtensor(Matrix(codes, scale, zero, 8, group_of), parts.dtype)


def _scale(parts: Parts, shape: tuple[int, ...]) -> Shaped[np.ndarray, "..."]:
    """The scales of a weight, with as many axes as it has."""
    scale = parts.scales("weight_scale")
    scale = scale.reshape((1,) * len(shape)) if scale.size == 1 else scale[:, None] if scale.ndim == 1 else scale
    fits = len(shape) == scale.ndim and all(s > 0 and n % s == 0 for s, n in zip(scale.shape, shape, strict=True))
    if not fits:
        raise parts.error("weight_scale", f"is {scale.shape}, which does not divide the weight's {shape}")
    return scale


def save_compressed_tensors(
    folder: str | os.PathLike,
    tree: PyTree,
    config: Mapping[str, Any] | None = None,
    *,
    activations: Format | None = None,
    shard_bytes: int = 4 * 10**9,
) -> None:
    """Writes a compressed-tensors checkpoint, whole or not at all: `model.safetensors` and `config.json` in a folder.

    Scales are written in the weights' dtype where that holds each of them, in float32 where it does not, so nothing
    is rounded here; vLLM rounds those of packed weights to its dtype as it loads.

    Args:
      folder: a new one, or one without tensors; its `config.json` is replaced.
      tree: dicts with the names and shapes of the Hugging Face model, `weight` being `[outputs, inputs]`. `QTensor`s
        have 4- or 8-bit integers or float8 numbers, each weight in a format of its own if need be.
      config: what `config.json` says of the model.
      activations: what activations are quantized to when it is served, token by token: `int8`, `fp8` (for weights in
        float8), or None for not at all. As in `quantized`.
      shard_bytes: tensors beyond that go into `model-00001-of-0000N.safetensors` and so on, of about that size each,
        which `model.safetensors.index.json` names; one of them is in memory at a time.

    Raises:
      FileError: a leaf that the layout cannot hold exactly, by its path; or activations it has no word for.
      OSError: the folder cannot be written.
    """
    weights, arrays = flattened(tree)
    if not weights:
        raise FileError(f"{folder}: there is no QTensor in the tree that was to be written.")
    for name, q in weights.items():
        check(name, q, _KINDS)
    schemes = {name: _scheme(name, q, activations) for name, q in weights.items()}
    formats = {scheme["format"] for scheme in schemes.values()}
    quantization = {
        "quant_method": "compressed-tensors",
        "quantization_status": "compressed",
        "format": formats.pop() if len(formats) == 1 else "mixed-precision",
        "config_groups": _config_groups(schemes),
        "ignore": _left_alone(arrays, weights),
    }
    told = {"torch_dtype": next(q.dtype.name for q in weights.values()), **(config or {})}
    leaves = itertools.chain(
        ({name: np.asarray(array)} for name, array in arrays.items()),
        (_tensors(name.removesuffix("weight"), q, schemes[name]["format"] == _PACKED) for name, q in weights.items()),
    )
    write_folder(folder, leaves, {**told, "quantization_config": quantization}, shard_bytes)


def _scheme(name: str, q: QTensor, activations: Format | None) -> dict[str, Any]:
    """What a group of the config says of a weight."""
    kind, served = ("int", int8) if q.is_integer else ("float", fp8)
    if activations not in (None, served):
        raise FileError(f"{name}: activations={activations} meet {kind} codes: they can be None or {served}.")
    if q.transform:
        raise FileError(f"{name}: groups that are not next to each other left this layout; write it with save_gptq.")
    packed = kind == "int" and (activations is None or q.bits == 4)
    (outputs, inputs), (rows, groups) = q.shape, q.scale.shape
    if packed and rows != outputs:
        raise FileError(f"{name}: packed weights have no scale for all outputs together: quantize it per channel.")
    strategy = "tensor" if rows != outputs else "channel" if groups == 1 else "group"
    group = inputs // groups if strategy == "group" else None
    tokens = _numbers(8, kind, True, "token", None, True)
    return {
        "format": _PACKED if packed else _INTEGERS if kind == "int" else _FLOATS,
        "weights": _numbers(q.bits, kind, q.zero is None, strategy, group, False),
        "input_activations": None if activations is None else tokens,
        "output_activations": None,
    }


def _numbers(bits: int, kind: str, symmetric: bool, strategy: str, group: int | None, dynamic: bool) -> dict[str, Any]:
    return {
        "num_bits": bits,
        "type": kind,
        "symmetric": symmetric,
        "strategy": strategy,
        "group_size": group,
        "dynamic": dynamic,
    }


def _tensors(stem: str, q: QTensor, packed: bool) -> dict[str, Shaped[np.ndarray, "..."]]:
    matrix = to_matrix(q)
    scale = narrowest(matrix.scale, q.dtype)
    parts = {"weight_scale": scale if len(scale) == len(matrix.codes) else scale.reshape(1)}
    if packed:
        parts["weight_packed"] = to_words(matrix.codes, matrix.bits, 1)
        parts["weight_shape"] = np.array(matrix.codes.shape, np.int64)
    else:
        parts["weight"] = matrix.codes
    if matrix.zero is not None:
        zero = matrix.zero.reshape(parts["weight_scale"].shape)
        parts["weight_zero_point"] = to_words(zero, matrix.bits, 0) if packed else zero
    return {stem + suffix: part for suffix, part in parts.items()}


def _config_groups(schemes: Mapping[str, dict[str, Any]]) -> dict[str, dict[str, Any]]:
    """One group for each scheme: all linear layers where there is but one, modules by name where there are more."""
    members: dict[str, list[str]] = {}
    for name, scheme in schemes.items():
        members.setdefault(json.dumps(scheme), []).append(name.removesuffix(".weight"))
    return {
        f"group_{i}": {"targets": ["Linear"] if len(members) == 1 else names, **json.loads(scheme)}
        for i, (scheme, names) in enumerate(members.items())
    }


def _left_alone(arrays: Mapping[str, Array], weights: Mapping[str, QTensor]) -> list[str]:
    """The modules that may be linear layers in float; a tied head has no tensor of its own."""
    names = {name for name, array in arrays.items() if array.ndim == 2} | ({"lm_head.weight"} - set(weights))
    return sorted(name.removesuffix(".weight") for name in names if name.endswith(".weight"))
