"""The blocks of ggml types as `QTensor`s, and back: one row of a table for each type.

    w = (q - middle) * scale        Q4_0  Q5_0  Q8_0  Q3_K  Q6_K        symmetric
    w = q * scale + low             Q4_1  Q5_1  Q2_K  Q4_K  Q5_K        affine:  codes = q - middle
                                                                                 zero = -(middle + low / scale)
    w = levels[q] * scale           IQ4_NL  MXFP4                       a codebook of 16

A symmetric block is exactly the law of a `QTensor`, and so is one with a codebook. So is an affine one, but for its
zero point, which is a float32 and no integer: what it decodes to is within `2^-24 (|zero * scale| + 2 |w|)` of w. A
group whose scale is 0 has w = low: it becomes codes one step above their zero point, and a scale that is `low`.

A super-block of 256 has one scale for its 8 or 16 groups, each with a factor of few bits; their product is exact in
float32. Source: https://github.com/ggml-org/ggml/blob/master/src/ggml-common.h and ggml-quants.c
"""

import dataclasses
from collections.abc import Callable

import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float32, Shaped, UInt8

from jaxquant.errors import FileError
from jaxquant.format import Format
from jaxquant.qtensor import QTensor

Bytes = UInt8[np.ndarray, "blocks _"]
Scales = Float32[np.ndarray, "blocks groups"]
Numbers = Shaped[np.ndarray, "blocks _"]
Parts = tuple[Numbers, Scales, Scales | None]


def _planes(part: Bytes, bits: int, span: int) -> UInt8[np.ndarray, "blocks _"]:
    """Fields of `bits` bits: each span of bytes holds the lowest bits of its first numbers, then those above."""
    shifts = np.arange(0, 8, bits, dtype=np.uint8)[:, None]
    spans = part.reshape(len(part), -1, 1, span)
    return (spans >> shifts & np.uint8(2**bits - 1)).reshape(len(part), -1)


def _half(part: Bytes) -> Scales:
    return part.view("<f2").astype(np.float32)


def _cut(blocks: Bytes, *widths: int) -> list[Bytes]:
    return np.split(blocks, np.cumsum(widths), axis=1)


def _q8_0(blocks: Bytes) -> Parts:
    d, qs = _cut(blocks, 2)
    return qs.view(np.int8), _half(d), None


def _q4_0(blocks: Bytes) -> Parts:
    d, qs = _cut(blocks, 2)
    return _planes(qs, 4, 16), _half(d), None


def _q4_1(blocks: Bytes) -> Parts:
    d, m, qs = _cut(blocks, 2, 2)
    return _planes(qs, 4, 16), _half(d), _half(m)


def _q5_0(blocks: Bytes) -> Parts:
    d, qh, qs = _cut(blocks, 2, 4)
    return _fives(qs, qh), _half(d), None


def _q5_1(blocks: Bytes) -> Parts:
    d, m, qh, qs = _cut(blocks, 2, 2, 4)
    return _fives(qs, qh), _half(d), _half(m)


def _fives(low: Bytes, high: Bytes) -> Numbers:
    return _planes(low, 4, 16) | np.unpackbits(high, axis=1, bitorder="little") << 4


def _q2_k(blocks: Bytes) -> Parts:
    factors, qs, d, dmin = _cut(blocks, 16, 64, 2)
    return _planes(qs, 2, 32), _half(d) * np.float32(factors & 15), -_half(dmin) * np.float32(factors >> 4)


def _q3_k(blocks: Bytes) -> Parts:
    high, low, factors, d = _cut(blocks, 32, 64, 12)
    fine, coarse = factors[:, :8], factors[:, 8:]
    scale = _planes(fine, 4, 8) | _planes(coarse, 2, 4) << 4
    return _planes(low, 2, 32) | _planes(high, 1, 32) << 2, _half(d) * (np.float32(scale) - 32), None


def _q4_k(blocks: Bytes) -> Parts:
    d, dmin, factors, qs = _cut(blocks, 2, 2, 12)
    return _planes(qs, 4, 32), *_sixes(d, dmin, factors)


def _q5_k(blocks: Bytes) -> Parts:
    d, dmin, factors, qh, qs = _cut(blocks, 2, 2, 12, 32)
    return _planes(qs, 4, 32) | _planes(qh, 1, 32) << 4, *_sixes(d, dmin, factors)


def _sixes(d: Bytes, dmin: Bytes, factors: Bytes) -> tuple[Scales, Scales]:
    """Scales and lows of 8 groups, from 6-bit factors: four whole ones each, and four of them in pieces."""
    up, down, mixed = _cut(factors, 4, 4)
    scales = np.concatenate([up & 63, mixed & 15 | up >> 2 & 48], axis=1)
    lows = np.concatenate([down & 63, mixed >> 4 | down >> 2 & 48], axis=1)
    return _half(d) * np.float32(scales), -_half(dmin) * np.float32(lows)


def _q6_k(blocks: Bytes) -> Parts:
    low, high, factors, d = _cut(blocks, 128, 64, 16)
    return _planes(low, 4, 64) | _planes(high, 2, 32) << 4, _half(d) * np.float32(factors.view(np.int8)), None


# What the indices of IQ4_NL stand for. Those of MXFP4 are e2m1 numbers, a sign and 0, 1/2, 1, 3/2, 2, 3, 4 or 6, which
# lie here in increasing order, both zeros among them, and halved: so 2^(e - 126), the scale, is a float32 that is not
# subnormal, whatever the exponent e. XLA takes subnormal numbers as 0 on a CPU.
_IQ4_NL = (-127, -104, -83, -65, -49, -35, -22, -10, 1, 13, 25, 38, 53, 69, 89, 113)
_E2M1 = (-3, -2, -1.5, -1, -0.75, -0.5, -0.25, 0, 0, 0.25, 0.5, 0.75, 1, 1.5, 2, 3)
_E2M1_ORDER = np.array([7, 9, 10, 11, 12, 13, 14, 15, 8, 6, 5, 4, 3, 2, 1, 0], np.uint8)


def _mxfp4(blocks: Bytes) -> Parts:
    e, qs = _cut(blocks, 1)
    return _E2M1_ORDER[_planes(qs, 4, 16)], np.ldexp(np.float32(1), e.astype(np.int32) - 126), None


@dataclasses.dataclass(frozen=True)
class Blocks:
    """How a ggml type becomes codes.

    Args:
      bits: the width that a `QTensor` gives its codes; those of five and six bits live in 8.
      middle: what is subtracted from its numbers.
      parts: its numbers, and the scale and the low of each group, or None for a symmetric type.
      levels: the codebook that its numbers are indices into, or None.
    """

    bits: int
    middle: int
    parts: Callable[[Bytes], Parts]
    levels: tuple[float, ...] | None = None


BLOCKS = {
    "Q8_0": Blocks(8, 0, _q8_0),
    "Q4_0": Blocks(4, 8, _q4_0),
    "Q4_1": Blocks(4, 8, _q4_1),
    "Q5_0": Blocks(8, 16, _q5_0),
    "Q5_1": Blocks(8, 16, _q5_1),
    "Q2_K": Blocks(2, 2, _q2_k),
    "Q3_K": Blocks(3, 4, _q3_k),
    "Q4_K": Blocks(4, 8, _q4_k),
    "Q5_K": Blocks(8, 16, _q5_k),
    "Q6_K": Blocks(8, 32, _q6_k),
    "IQ4_NL": Blocks(4, 8, _q4_0, tuple(map(float, _IQ4_NL))),
    "MXFP4": Blocks(4, 8, _mxfp4, tuple(map(float, _E2M1))),
}


def unpacked(kind: str, blocks: Bytes, shape: tuple[int, ...], name: str) -> QTensor:
    """The codes and scales of an array from the blocks of its ggml type.

    Args:
      kind: one of `BLOCKS`.
      blocks: its blocks, one after the other.
      shape: of the array.
      name: what an error calls it.

    Raises:
      FileError: a scale is NaN or infinite, or a weight is too large for a float32.
    """
    row = BLOCKS[kind]
    with np.errstate(invalid="ignore", over="ignore"):  # inf * 0, or beyond float32, which is found below
        numbers, scale, low = row.parts(blocks)
        largest = scale if row.levels is None else scale * _reach(numbers, row.levels)
    for part in (scale, largest) if low is None else (scale, low):
        check_finite(part, kind, name)
    codes, zero = numbers.view(np.int8) - np.int8(row.middle), None
    if low is not None:
        flat = scale == 0
        codes = np.where(np.repeat(flat, codes.shape[1] // flat.shape[1], axis=1), np.int8(-row.middle), codes)
        scale = np.where(flat, low, scale)
        ratio = np.divide(low.astype(np.float64), scale, where=scale != 0, out=np.ones(scale.shape))
        zero = _laid((-row.middle - ratio).astype(np.float32), shape)
    codes = jnp.asarray(codes.reshape(shape)).astype(Format(bits=row.bits).container)
    return QTensor(codes, _laid(scale, shape), zero, jnp.dtype(jnp.float32), row.bits, row.levels)


def _reach(numbers: Numbers, levels: tuple[float, ...]) -> Scales:
    """The largest size of a level in each block; float16 holds those of both codebooks."""
    return np.abs(np.array(levels, np.float16))[numbers].max(axis=1, keepdims=True).astype(np.float32)


def _laid(groups: Scales, shape: tuple[int, ...]) -> Float32[Array, "..."]:
    return jnp.asarray(groups.reshape(*shape[:-1], -1))


def check_finite(values: Shaped[np.ndarray, "blocks _"], kind: str, name: str) -> None:
    """Raises if a block says a NaN or an infinity.

    Raises:
      FileError: naming the block.
    """
    bad = ~np.isfinite(values)
    if bad.any():
        block, number = (int(i) for i in np.argwhere(bad)[0])
        raise FileError(f"{name}, {kind}: block {block} has {values[block, number]}. Convert the model anew.")
