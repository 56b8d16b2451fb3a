"""How long post-training quantization of SmolLM2-135M takes, and the most memory its process ever had.

python benchmarks/ptq.py
"""

import resource
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

from llama import Llama
from llama_gguf import fetch_smollm2, load_llama

import jaxquant as jq

WINDOWS, WINDOW = 32, 512
W4 = jq.int4(group=64, symmetric=False)


def is_kernel(path: str, array: Any) -> bool:
    """The matrices of the blocks."""
    del array
    return "kernel" in path


def main() -> None:
    """Times each step once, compilation included, and tells the peak of resident memory after it."""
    config, params = load_llama(fetch_smollm2())
    model = Llama(config)
    tokens = np.random.default_rng(0).integers(0, config.vocab, (WINDOWS, 1, WINDOW), np.int32)
    size = sum(leaf.nbytes for leaf in jax.tree.leaves(params))
    table = Table("step", "seconds", "peak memory, GB", "of the float model")

    def step(name: str, run: Callable[[], Any]) -> Any:
        start = time.perf_counter()
        result = jax.block_until_ready(run())
        peak = 1024 * resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
        table.add_row(name, f"{time.perf_counter() - start:.1f}", f"{peak / 1e9:.2f}", f"{peak / size:.1f}x")
        return result

    def quantize(quantizer: jq.Quantizer, stats: Any = None) -> Callable[[], Any]:
        return lambda: jq.quantize_params(params, quantizer, stats=stats, where=is_kernel)

    def apply(params: Any, tokens: Any) -> jax.Array:
        return model.apply(params, tokens)[0]

    step("loading the float model", lambda: params)
    step("rtn", quantize(jq.rtn(W4)))
    step("rtn, least squares", quantize(jq.rtn(W4, jq.least_squares)))
    stats = step(
        f"calibrate, {WINDOWS} x {WINDOW} tokens", lambda: jq.calibrate(apply, params, tokens, where=is_kernel)
    )
    step("gptq", quantize(jq.gptq(W4), stats))
    step("rotated(gptq)", quantize(jq.rotated(jq.gptq(W4)), stats))
    step("awq(gptq)", quantize(jq.awq(jq.gptq(W4)), stats))
    Console().print(table)


if __name__ == "__main__":
    main()
