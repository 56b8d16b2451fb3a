"""Every post-training method on SmolLM2-135M, at 8, 4, 3 and 2 bits, scored on the kind of text it saw and on another.

python examples/ptq_smollm2.py                     all cells, an hour on 2 cores; writes docs/ptq_smollm2.*
python examples/ptq_smollm2.py --only "W4 g64"     one setting
python examples/ptq_smollm2.py --smoke             two cells on a few tokens

Cells that docs/ptq_smollm2.json has already are not computed again. All matrices of the blocks are quantized; the
tied embedding stays in float32. R is the share of nearest rounding's loss gap that a method closes:

    R = ln(PPL_rtn / PPL) / ln(PPL_rtn / PPL_float)       0: as bad as rounding to nearest, 1: as good as float
"""

import argparse
import dataclasses
import functools
import json
import platform
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import texts
from command_line import ended
from llama import Llama, is_kernel
from llama_gguf import fetch_smollm2, load_llama, load_tokenizer
from ptq_tables import markdown, plot, show
from rich.console import Console
from rich.progress import track

import jaxquant as jq

DOCS = Path(__file__).parent.parent / "docs"
SEARCH = jq.least_squares

W8, W4, W3 = jq.int8, jq.int4(group=64, symmetric=False), jq.int3(group=64, symmetric=False)
W2, W4_CHANNEL = jq.int2(group=32, symmetric=False), jq.int4(symmetric=False)


@dataclasses.dataclass(frozen=True)
class Method:
    """One cell: how the weights are quantized, on what statistics, and how the result is run.

    Args:
      name: what the table calls it.
      quantizer: of every matrix.
      source: what it is calibrated on: a key of `SOURCES`, or None for no statistics.
      serving: arguments of `jq.quantized`; None for weight-only.
      sequential: whether each matrix is calibrated behind the quantized ones before it.
      bound: how fixed ranges for activations are found; None for a range per token.
    """

    name: str
    quantizer: Any
    source: str | None = "mix"
    serving: Any = None
    sequential: bool = False
    bound: Any = None


def weight_only(format: jq.Format) -> list[Method]:
    """The methods for one format of weights; the first one is the baseline."""
    rtn, search, gptq = jq.rtn(format), jq.rtn(format, SEARCH), jq.gptq(format)
    return [
        Method("rtn", rtn, None),
        Method("rtn, least squares, no statistics", search, None),
        Method("hqq, no statistics", jq.hqq(format), None),
        Method("rtn, least squares, random tokens", search, "random tokens"),
        Method("hqq, random tokens", jq.hqq(format), "random tokens"),
        Method("rtn, least squares", search),
        Method("awq(rtn, least squares)", jq.awq(search)),
        Method("gptq, absmax", jq.gptq(format, jq.absmax)),
        Method("gptq", gptq),
        Method("awq(gptq)", jq.awq(gptq)),
        Method("outliers(gptq)", jq.outliers(gptq)),
        Method("rotated(rtn, least squares)", jq.rotated(search)),
        Method("rotated(gptq)", jq.rotated(gptq)),
        Method("gptq, sequential", gptq, sequential=True),
        Method("rotated(gptq), sequential", jq.rotated(gptq), sequential=True),
    ]


def shorter(format: jq.Format) -> list[Method]:
    """Those of them that are worth their minutes at other widths."""
    worth = ("rtn", "rtn, least squares", "gptq", "awq(gptq)", "rotated(gptq)", "gptq, sequential")
    return [method for method in weight_only(format) if method.name in worth]


def int8_methods() -> list[Method]:
    """The methods for 8-bit weights and activations; the first one is the baseline."""
    rtn, token, affine = jq.rtn(W8), {"activations": jq.int8}, {"activations": jq.int8(symmetric=False)}
    smooth = jq.smoothquant(rtn)
    return [
        Method("rtn", rtn, None, token),
        Method("rtn, affine activations", rtn, None, affine),
        Method("rtn, affine activations, outliers=1", rtn, None, affine | {"outliers": 1}),
        Method("smoothquant(rtn)", smooth, serving=token),
        Method("smoothquant(rtn), affine activations", smooth, serving=affine),
        Method("smoothquant(rtn), affine activations, outliers=1", smooth, serving=affine | {"outliers": 1}),
        Method("outliers(rtn)", jq.outliers(rtn), serving=token),
        Method("rotated(rtn)", jq.rotated(rtn), serving=token),
        Method("rtn, static largest", rtn, serving=token, bound=jq.largest),
        Method("rotated(rtn), static least error", jq.rotated(rtn), serving=token, bound=jq.least_error()),
    ]


SOURCES = ("documentation", "licences", "source code", "sampled", "random tokens")
SETTINGS: dict[str, list[Method]] = {
    "W4 g64": weight_only(W4),
    "W4 per channel": shorter(W4_CHANNEL),
    "W3 g64": shorter(W3),
    "W8A8": int8_methods(),
    "W2 g32": shorter(W2),
    "W4 g64 gptq by source": [
        Method("rtn", jq.rtn(W4), None),
        *(Method(f"gptq on {source}", jq.gptq(W4), source) for source in SOURCES),
    ],
}
SMOKE = {
    "W4 g64": [
        Method("rtn", jq.rtn(W4), None),
        Method("rotated(gptq)", jq.rotated(jq.gptq(W4)), "documentation"),
    ]
}


@dataclasses.dataclass(frozen=True)
class Bench:
    """The model, the texts and how many windows of them are used."""

    params: Any
    apply: Callable[..., jax.Array]
    forward: Callable[..., jax.Array]
    scored: dict[str, np.ndarray]
    calibration: Callable[[str], list[jax.Array]]
    stats: Callable[[str], dict[str, jq.Stats]]
    reference: dict[str, list[jax.Array]]


def prepare(windows: int, length: int, scored: int, console: Console) -> Bench:
    """Loads the model and the texts, and runs the float model over what is scored."""
    path = fetch_smollm2()
    (config, params), tokenizer = load_llama(path), load_tokenizer(path)
    model = Llama(config)

    def apply(params: Any, tokens: jax.Array) -> jax.Array:
        return model.apply(params, tokens)[0]

    @functools.cache
    def source(name: str) -> np.ndarray:
        match name:
            case "documentation":
                return texts.documentation(tokenizer)[1]
            case "licences":
                return texts.licences(tokenizer)
            case "source code":
                return texts.source_code(tokenizer)
            case "sampled":
                with console.status("Sampling text from the model"):
                    return texts.sampled_by_the_model(config, params, tokenizer, jax.random.key(0), max(windows, 2))
            case "random tokens":
                return np.random.default_rng(0).integers(0, config.vocab, (windows, texts.WINDOW), np.int32)
        return texts.mix([source(name)[: -(-windows // 4)] for name in SOURCES[:4]])

    def calibration(name: str) -> list[jax.Array]:
        return [jnp.asarray(window[None, :length]) for window in source(name)[:windows]]

    @functools.cache
    def stats(name: str) -> dict[str, jq.Stats]:
        follow = functools.partial(track, description=f"Calibrating on {name}", console=console, transient=True)
        return jq.calibrate(apply, params, calibration(name), where=is_kernel, progress=follow)

    kinds = {"in domain": texts.documentation(tokenizer)[0], "other kind": texts.encyclopedia(tokenizer)}
    chosen = {kind: found[:scored, None, :length] for kind, found in kinds.items()}
    forward = jax.jit(apply)
    with console.status("Running the float model"):
        reference = {kind: [forward(params, window) for window in found] for kind, found in chosen.items()}
    return Bench(params, apply, forward, chosen, calibration, stats, reference)


def quantize(bench: Bench, method: Method) -> Any:
    """The parameters under one method."""
    if method.sequential:
        assert method.source is not None
        batches = bench.calibration(method.source)
        return jq.quantize_sequentially(bench.apply, bench.params, batches, method.quantizer, where=is_kernel)
    stats = bench.stats(method.source) if method.source else None
    qparams = jq.quantize_params(bench.params, method.quantizer, stats=stats, where=is_kernel)
    if method.bound is None:
        return qparams
    after = jq.calibrate(bench.apply, qparams, bench.calibration("mix"), gram=False, where=is_kernel)
    return jq.static(qparams, after, method.bound)


def score(bench: Bench, method: Method, qparams: Any) -> dict[str, dict[str, float]]:
    """The divergence from the float model on each kind of text."""
    if method.serving is None:
        # Law 1: weight-only is the float model on decoded weights, which is compiled already.
        run, qparams = bench.forward, jq.dequantize(qparams)
    else:
        run = jax.jit(jq.quantized(bench.apply, **method.serving))
    found = {}
    for kind, windows in bench.scored.items():
        known = iter(bench.reference[kind])
        candidate = functools.partial(run, qparams)
        found[kind] = dataclasses.asdict(jq.divergence(lambda _, known=known: next(known), candidate, windows))
    return found


def bits_of(qparams: Any) -> float:
    """True bits a quantized weight takes, scales and all."""
    leaves = jax.tree.leaves(qparams, is_leaf=lambda leaf: isinstance(leaf, jq.QTensor))
    quantized = [leaf for leaf in leaves if isinstance(leaf, jq.QTensor)]
    return 8 * sum(q.nbytes for q in quantized) / sum(q.size for q in quantized)


def measure(bench: Bench, method: Method) -> dict[str, Any]:
    """One cell: bits, seconds to quantize after calibration, and scores."""
    if method.source and not method.sequential:
        bench.stats(method.source)
    start = time.perf_counter()
    qparams = jax.block_until_ready(quantize(bench, method))
    seconds = time.perf_counter() - start
    return {"bits": bits_of(qparams), "seconds": seconds, "scores": score(bench, method, qparams)}


def run(options: argparse.Namespace, console: Console) -> None:
    """Fills in the missing cells, saves after each, and writes the tables and the plot."""
    settings = SMOKE if options.smoke else SETTINGS
    if options.only:
        settings = {name: settings[name] for name in settings if name == options.only}
    out = options.out or (Path(tempfile.mkdtemp()) if options.smoke else DOCS)
    out.mkdir(parents=True, exist_ok=True)
    store = out / "ptq_smollm2.json"
    results = json.loads(store.read_text()) if store.exists() else {}
    sizes = (2, 64, 1) if options.smoke else (options.windows, texts.WINDOW, texts.HELD_OUT)
    missing = [
        (setting, method)
        for setting, methods in settings.items()
        for method in methods
        if method.name not in results.get(setting, {})
    ]
    if missing:
        bench = prepare(*sizes, console)
        for setting, method in missing:
            console.print(f"{setting}: {method.name}", style="dim")
            results.setdefault(setting, {})[method.name] = measure(bench, method)
            store.write_text(json.dumps(results, indent=1))
    show(results, console)
    about = f"{sizes[0]} windows of {sizes[1]} tokens, jax {jax.__version__}, {platform.machine()}"
    (out / "ptq_smollm2.md").write_text(markdown(results, about))
    plot(results, out / "ptq_smollm2.png")


def parse(arguments: list[str] | None = None) -> argparse.Namespace:
    """Reads the command line."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--only", choices=list(SETTINGS), help="one setting")
    parser.add_argument("--windows", type=int, default=32, help="windows to calibrate on (default: 32)")
    parser.add_argument("--out", type=Path, help="where results are kept (default: docs; of --smoke, nowhere)")
    parser.add_argument("--smoke", action="store_true", help="two cells on a few tokens, to see that it runs")
    return parser.parse_args(arguments)


if __name__ == "__main__":
    sys.exit(ended(lambda: run(parse(), Console())))
