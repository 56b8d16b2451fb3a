"""How long post-training quantization of SmolLM2-135M takes, and the most memory a process that does it ever has.

python benchmarks/ptq.py

Every step runs in a process of its own, compilation included, twice: as it is, and with glibc's allocator told to give
freed blocks back (`MALLOC_MMAP_THRESHOLD_=1000000`), which by default it keeps.
"""

import json
import os
import resource
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import numpy as np
from rich.console import Console
from rich.table import Table

sys.path.insert(0, str(Path(__file__).parent.parent / "examples"))

from llama import Llama, is_kernel
from llama_gguf import fetch_smollm2, load_llama

import jaxquant as jq

WINDOWS, WINDOW = 32, 512
W4 = jq.int4(group=64, symmetric=False)
QUANTIZERS = {
    "rtn": jq.rtn(W4),
    "rtn, least squares": jq.rtn(W4, jq.least_squares),
    "gptq": jq.gptq(W4),
    "rotated(gptq)": jq.rotated(jq.gptq(W4)),
    "awq(gptq)": jq.awq(jq.gptq(W4)),
}
LOAD, CALIBRATE = "load the float model", f"calibrate, {WINDOWS} x {WINDOW} tokens"
STEPS = (LOAD, "rtn", "rtn, least squares", CALIBRATE, "gptq", "rotated(gptq)", "awq(gptq)")
GIVE_BACK = {"MALLOC_MMAP_THRESHOLD_": "1000000"}


def take(step: str) -> dict[str, float]:
    """Does one step, after a calibration where it needs one, and tells its seconds and the peak of the process."""
    config, params = load_llama(fetch_smollm2())
    model = Llama(config)
    tokens = np.random.default_rng(0).integers(0, config.vocab, (WINDOWS, 1, WINDOW), np.int32)
    size = sum(leaf.nbytes for leaf in jax.tree.leaves(params))

    def apply(params: Any, tokens: Any) -> jax.Array:
        return model.apply(params, tokens)[0]

    def timed(run: Callable[[], Any]) -> tuple[Any, float]:
        start = time.perf_counter()
        return jax.block_until_ready(run()), time.perf_counter() - start

    stats, seconds = None, 0.0
    if step == CALIBRATE or "gptq" in step:
        stats, seconds = timed(lambda: jq.calibrate(apply, params, tokens, where=is_kernel))
    if step in QUANTIZERS:
        quantize = jq.quantize_params
        _, seconds = timed(lambda: quantize(params, QUANTIZERS[step], stats=stats, where=is_kernel, donate=True))
    peak = 1024 * resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return {"seconds": seconds, "peak": peak, "size": size}


def in_own_process(step: str, environment: dict[str, str]) -> dict[str, float]:
    """What `take` tells, of a fresh process."""
    command = [sys.executable, __file__, step]
    done = subprocess.run(command, env={**os.environ, **environment}, stdout=subprocess.PIPE, check=True, text=True)
    return json.loads(done.stdout.splitlines()[-1])


def main() -> None:
    """Takes one step where it is named, and otherwise tabulates all of them."""
    if len(sys.argv) > 1:
        print(json.dumps(take(sys.argv[1])))
        return
    table = Table("step", "seconds", "peak memory, GB", "of the float model", "freed blocks given back")
    for step in STEPS:
        kept, given = in_own_process(step, {}), in_own_process(step, GIVE_BACK)
        shares = [one["peak"] / one["size"] for one in (kept, given)]
        table.add_row(step, f"{kept['seconds']:.1f}", f"{kept['peak'] / 1e9:.2f}", *(f"{s:.2f}x" for s in shares))
    Console().print(table)


if __name__ == "__main__":
    main()
