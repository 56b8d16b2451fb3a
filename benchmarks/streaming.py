"""Quantizes a large checkpoint tensor by tensor, and measures what that holds in memory at its peak.

    python benchmarks/streaming.py --gigabytes 8

Every format in a process of its own. What it holds beyond one that has imported jaxquant and quantized a small array is
told in tensors: the source is bfloat16, and every tensor is as large as the others.
"""

import argparse
import json
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
from measure import RESULTS, title, write
from rich.console import Console
from rich.table import Table

import jaxquant as jq
from jaxquant.files.container import write_container

FORMATS = {"int8": jq.int8, "int4 g64": jq.int4(group=64), "nf4 g64": jq.nf4}
SHAPE = (14336, 4096)  # as in Llama-3-8B
BYTES = 2 * SHAPE[0] * SHAPE[1]


def write_source(folder: Path, gigabytes: float) -> int:
    """Writes a checkpoint of bfloat16 matrices of N(0, 1), a file for each, and the index; gives their bytes."""
    count, places = max(1, round(gigabytes * 1e9 / BYTES)), {}
    values = np.asarray(jax.random.normal(jax.random.key(0), SHAPE, jnp.bfloat16))
    for number in range(count):
        name, file = f"model.layers.{number}.mlp.up_proj.weight", f"model-{number}.safetensors"
        write_container(folder / file, {name: np.roll(values, number, axis=0)}, {})
        places[name] = file
    (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": places}))
    return count * BYTES


def peak() -> int:
    """The most bytes that this process has held so far."""
    # Not getrusage's, which knows what the parent held before it became this process.
    status = dict(line.split(":", 1) for line in Path("/proc/self/status").read_text().splitlines())
    return 1024 * int(status["VmHWM"].split()[0])


def child(source: str, name: str) -> None:
    """Quantizes the source in one format, and prints what it took."""
    jax.block_until_ready(jq.quantize(jnp.ones((64, 64)), FORMATS[name]))
    idle, start = peak(), time.perf_counter()
    with tempfile.TemporaryDirectory(dir=Path(source).parent) as folder:
        path = Path(folder) / "q.safetensors"
        jq.quantize_checkpoint(source, path, FORMATS[name])
        seconds = time.perf_counter() - start
        written = sum(file.stat().st_size for file in path.parent.iterdir())
    print(json.dumps({"seconds": seconds, "idle": idle, "peak": peak(), "written": written}))


def main() -> None:
    """Writes the source, measures each format, and prints and saves the table."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--gigabytes", type=float, default=8, help="of the source (default: 8)")
    parser.add_argument("--json", type=Path, default=RESULTS / "streaming.json", metavar="PATH")
    arguments, console = parser.parse_args(), Console()
    shown = Table("format", title=title(f"{arguments.gigabytes:g} GB of bfloat16, {BYTES / 1e6:.0f} MB a tensor"))
    for heading in ("GB written", "seconds", "GB of source a second", "peak MB", "of a tensor"):
        shown.add_column(heading, justify="right")
    results = {}
    with tempfile.TemporaryDirectory() as name:
        source = Path(name) / "source"
        source.mkdir()
        size = write_source(source, arguments.gigabytes)
        for format in FORMATS:
            command = [sys.executable, __file__, "--child", str(source), format]
            found = json.loads(subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True).stdout)
            results[format] = found | {"source": size, "tensor": BYTES}
            held = found["peak"] - found["idle"]
            shown.add_row(
                format,
                f"{found['written'] / 1e9:.2f}",
                f"{found['seconds']:.0f}",
                f"{size / found['seconds'] / 1e9:.2f}",
                f"{held / 1e6:.0f}",
                f"{held / BYTES:.1f}",
            )
    console.print(shown)
    write(arguments.json, results, console)


if __name__ == "__main__":
    if sys.argv[1:2] == ["--child"]:
        child(*sys.argv[2:])
    else:
        main()
