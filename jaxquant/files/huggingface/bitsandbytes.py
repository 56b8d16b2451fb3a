"""bitsandbytes checkpoints: NF4 and FP4 codes with or without double quantization, and the int8 of LLM.int8().

    4 bits   weight  bytes of the flattened [out, in] weight, the even element in the high half
             w = quant_map[code] * absmax[block],    a block being 64 consecutive elements, or another number
             absmax = nested_quant_map[absmax] * nested_absmax[block of 256] + nested_offset      double quantization
    8 bits   w[o, i] = weight[o, i] * SCB[o] / 127

Doubly quantized ranges are decoded to the float32 numbers that bitsandbytes uses: they are 256 levels plus an offset,
which no `QTensor` holds. Source: https://github.com/bitsandbytes-foundation/bitsandbytes, `functional.py`.
"""

import json

import jax.numpy as jnp
import numpy as np
from jaxtyping import Float32, Int8, Shaped

from jaxquant.files.huggingface.matrix import Matrix, to_qtensor
from jaxquant.files.huggingface.parts import FLOATS, Layout, Parts, Settings
from jaxquant.format import NF4_LEVELS
from jaxquant.qtensor import QTensor

_STATE = "weight.quant_state.bitsandbytes__"
_LARGEST = float(np.finfo(np.float32).max)
_STORAGE = ("uint8", "int8", "float16", "bfloat16", "float32")  # of bytes, as anything that trains in shards


def layout(settings: Settings) -> Layout:
    """How a checkpoint with this `quantization_config` holds its weights; each says itself how it is written."""
    del settings
    of_four = ("absmax", "quant_map", "nested_absmax", "nested_quant_map")
    states = (_STATE + "nf4", _STATE + "fp4")
    return Layout((*(f"weight.{name}" for name in of_four), *states, "SCB", "weight_format"), _read)


def _read(parts: Parts) -> QTensor:
    return _of_eight_bits(parts) if "SCB" in parts or "weight_format" in parts else _of_four_bits(parts)


def _of_eight_bits(parts: Parts) -> QTensor:
    codes = parts.read("weight", ("int8",), (None, None))
    if "weight_format" in parts and np.any(parts.read("weight_format", ("uint8",), ()) != 0):
        raise parts.error("weight_format", "is not 0: only weights in the order of rows are supported")
    scale = parts.scales("SCB", (len(codes),)).astype(np.float32)[:, None] * np.float32(1 / 127)
    return to_qtensor(Matrix(codes, scale, None, 8), parts.dtype or "float16")


def _of_four_bits(parts: Parts) -> QTensor:
    state = _state(parts)
    outputs, inputs = _shape(state)
    stored = parts.read("weight", _STORAGE)
    if 2 * stored.nbytes != outputs * inputs:
        raise parts.error("weight", f"has {stored.nbytes} bytes, where [{outputs}, {inputs}] has two codes in each")
    bytes_ = np.ascontiguousarray(stored).reshape(-1).view(np.uint8)
    levels, codes = _increasing(parts, np.stack([bytes_ >> 4, bytes_ & 15], -1).reshape(outputs, inputs))
    block = state.whole("blocksize")
    rows = block // inputs if block > inputs else 1
    if block < 1 or outputs * inputs % block or max(block, inputs) % min(block, inputs):
        raise state.error("blocksize", f"blocks would cut the rows of [{outputs}, {inputs}], which no QTensor holds")
    scale = _absmax(parts, state, outputs * inputs // block).reshape(outputs // rows, -1)
    dtype = parts.dtype or jnp.dtype(state.among("dtype", FLOATS))
    return to_qtensor(Matrix(codes, scale, None, 4, levels=levels), dtype)


def _state(parts: Parts) -> Settings:
    suffix = _STATE + ("fp4" if _STATE + "fp4" in parts else "nf4")
    text = parts.read(suffix, ("uint8",), (None,)).tobytes()
    try:
        values = json.loads(text)
    except (ValueError, RecursionError) as error:
        raise parts.error(suffix, f"is not JSON: {error}") from error
    if not isinstance(values, dict):
        raise parts.error(suffix, f"is a JSON {type(values).__name__}, not an object")
    return Settings(f"{parts.checkpoint.path}, tensor {parts.stem + suffix!r}", values)


def _shape(state: Settings) -> tuple[int, int]:
    shape = state.values.get("shape")
    if not isinstance(shape, list) or len(shape) != 2 or not all(type(n) is int and n > 0 for n in shape):
        raise state.error("shape", "it is two positive whole numbers")
    return shape[0], shape[1]


def _increasing(
    parts: Parts, index: Shaped[np.ndarray, "out in"]
) -> tuple[tuple[float, ...], Int8[np.ndarray, "out in"]]:
    """The codebook in increasing order, and the codes into it; that of FP4 has its sign in the highest bit."""
    levels = parts.scales("weight.quant_map", (16,)).astype(np.float32)
    order = np.argsort(levels, kind="stable")
    codes = (np.argsort(order) - 8).astype(np.int8)[index]
    known = np.array_equal(levels, np.array(NF4_LEVELS, np.float32))
    return NF4_LEVELS if known else tuple(levels[order].tolist()), codes


def _absmax(parts: Parts, state: Settings, blocks: int) -> Float32[np.ndarray, " blocks"]:
    if "weight.nested_absmax" not in parts:
        return parts.scales("weight.absmax", (blocks,)).astype(np.float32)
    index = parts.read("weight.absmax", ("uint8",), (blocks,))
    size = state.whole("nested_blocksize")
    if size < 1:
        raise state.error("nested_blocksize", "it is a positive whole number")
    offset = state.values.get("nested_offset")
    if not isinstance(offset, float) or not abs(offset) <= _LARGEST:
        raise state.error("nested_offset", "it is a number")
    ranges = parts.scales("weight.nested_absmax", (-(-blocks // size),)).astype(np.float32)
    levels = parts.scales("weight.nested_quant_map", (256,)).astype(np.float32)
    return levels[index] * ranges[np.arange(blocks) // size] + np.float32(offset)
