"""What the CPU of this machine multiplies fast, which XLA does not tell."""

import functools
from pathlib import Path


@functools.cache
def multiplies_bfloats() -> bool:
    """Whether XLA's library multiplies bfloat16 faster than int8, as it does with the instructions of AVX-512 BF16.

    Of CPUs with AMX, which has an int8 product as well, that is not known. Only Linux says what a CPU has.
    """
    try:
        told = Path("/proc/cpuinfo").read_text().split()
    except OSError:
        return False
    return "avx512_bf16" in told and "amx_int8" not in told
