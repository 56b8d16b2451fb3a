"""`Format`: which codes exist, and how many weights share a scale.

    integers   w ~= (code - zero) * scale     code in [qmin, qmax], zero = 0 when symmetric
    floats     w ~= float8(code) * scale      `dtype` names the float
    codebook   w ~= levels[code] * scale      `levels` has 2^bits values in [-1, 1]

A format is a value: two that are equal are the same, and one derives from another by calling it,
`int4(group=64, symmetric=False)`.
"""

import dataclasses
import itertools
from typing import Any

import jax.numpy as jnp

from jaxquant.errors import FormatError

_CONTAINERS = {8: jnp.int8, 4: jnp.int4, 3: jnp.int4, 2: jnp.int2}
_FLOATS = (jnp.float8_e4m3fn, jnp.float8_e5m2)

# The quantiles of N(0, 1) that put equal mass in each code, from the QLoRA paper (arXiv:2305.14314, appendix E).
NF4_LEVELS = (
    -1.0,
    -0.6961928009986877,
    -0.5250730514526367,
    -0.39491748809814453,
    -0.28444138169288635,
    -0.18477343022823334,
    -0.09105003625154495,
    0.0,
    0.07958029955625534,
    0.16093020141124725,
    0.24611230194568634,
    0.33791524171829224,
    0.44070982933044434,
    0.5626170039176941,
    0.7229568362236023,
    1.0,
)


@dataclasses.dataclass(frozen=True)
class Format:
    """The codes of a quantized array and the granularity of its scales.

    Args:
      bits: width of a code: 8, 4, 3 or 2.
      group: how many consecutive inputs (elements of the last contracted axis) share a scale; None for all of them.
      symmetric: True for codes around zero, `scale = max|w| / qmax`; False for an integer zero point (affine).
      per_channel: True for a scale per output channel; False for one scale for the whole array.
      dtype: the 8-bit float the codes are, `jnp.float8_e4m3fn` or `jnp.float8_e5m2`; None for integers.
      levels: a codebook of `2**bits` increasing values in [-1, 1]; None for integers.

    Raises:
      FormatError: when no such format exists; the message lists what is valid.
    """

    bits: int = 8
    group: int | None = None
    symmetric: bool = True
    per_channel: bool = True
    dtype: Any = None
    levels: tuple[float, ...] | None = None

    def __post_init__(self):
        if type(self.bits) is not int or self.bits not in _CONTAINERS:
            raise FormatError(f"bits={self.bits!r}: a code has 8, 4, 3 or 2 bits.")
        if self.group is not None and (type(self.group) is not int or self.group < 1):
            raise FormatError(f"group={self.group!r}: a group is a positive whole number of inputs, or None.")
        if self.group is not None and not self.per_channel:
            raise FormatError(f"group={self.group} with per_channel=False: give one of the two.")
        if not (isinstance(self.symmetric, bool) and isinstance(self.per_channel, bool)):
            raise FormatError(f"symmetric={self.symmetric!r}, per_channel={self.per_channel!r}: each is True or False.")
        if self.dtype is not None:
            # One spelling, so that formats that are equal hash alike.
            object.__setattr__(self, "dtype", _float8(self.dtype, self.bits))
        if self.levels is not None:
            _check_levels(self.levels, self.bits)
        if self.dtype is not None and self.levels is not None:
            raise FormatError("dtype and levels together: codes are floats or indices into a codebook, not both.")
        if not (self.symmetric or self.is_integer):
            raise FormatError("symmetric=False: only integer codes have a zero point; fp8 and codebooks have none.")

    def __call__(self, **changes) -> "Format":
        """Derives a format: `int4(group=64)` is `int4` in groups of 64."""
        known = [field.name for field in dataclasses.fields(self)]
        unknown = sorted(set(changes) - set(known))
        if unknown:
            raise FormatError(f"a Format has no {', '.join(unknown)}; it has {', '.join(known)}.")
        return dataclasses.replace(self, **changes)

    @property
    def is_integer(self) -> bool:
        """Whether codes are numbers on an integer grid, the kind that int8 matmuls multiply."""
        return self.dtype is None and self.levels is None

    @property
    def container(self):
        """The dtype codes are kept in; XLA packs int4 and int2 in memory, and 3-bit codes live in an int4."""
        return self.dtype if self.dtype is not None else _CONTAINERS[self.bits]

    @property
    def qmax(self) -> float:
        """The largest code (for a codebook, the largest level)."""
        if self.levels is not None:
            return 1.0
        return float(jnp.finfo(self.dtype).max) if self.dtype is not None else float(2 ** (self.bits - 1) - 1)

    @property
    def qmin(self) -> float:
        """The smallest code; a symmetric format leaves the most negative integer unused."""
        return -self.qmax if self.symmetric else -self.qmax - 1.0

    def __str__(self) -> str:
        granularity = f"g{self.group}" if self.group else "per-channel" if self.per_channel else "per-tensor"
        words = [code_name(self.bits, self.dtype, self.levels), granularity]
        return " ".join(words + ([] if self.symmetric else ["affine"]))


def holds(dtype, bits: int) -> bool:
    """Whether an array of this dtype holds codes of this width."""
    return bits in _CONTAINERS and (dtype == _CONTAINERS[bits] or (bits == 8 and dtype in _FLOATS))


def code_name(bits: int, dtype, levels) -> str:
    """What codes of this kind are called: `int4`, `float8_e4m3fn`, `nf4`."""
    if levels is not None:
        return "nf4" if levels == NF4_LEVELS else f"codebook{bits}"
    return f"int{bits}" if dtype is None else jnp.dtype(dtype).name


def _float8(dtype, bits: int):
    known = [jnp.dtype(float8) for float8 in _FLOATS]
    if bits != 8 or dtype not in known:
        names = " or ".join(float8.name for float8 in known)
        raise FormatError(f"dtype={dtype!r} with bits={bits}: float codes are 8-bit {names}.")
    return jnp.dtype(dtype)


def _check_levels(levels, bits: int) -> None:
    if not isinstance(levels, tuple) or len(levels) != 2**bits:
        raise FormatError(f"levels: a codebook of {bits} bits is a tuple of {2**bits} numbers.")
    increasing = all(a < b for a, b in itertools.pairwise(levels))
    if not increasing or levels[0] < -1 or levels[-1] > 1 or max(-levels[0], levels[-1]) != 1:
        raise FormatError("levels: a codebook increases, lies within [-1, 1] and reaches 1 or -1.")


int8 = Format(bits=8)
int4 = Format(bits=4)
int3 = Format(bits=3)
int2 = Format(bits=2)
fp8 = Format(bits=8, dtype=jnp.float8_e4m3fn)
nf4 = Format(bits=4, group=64, levels=NF4_LEVELS)
