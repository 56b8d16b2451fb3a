"""What the benchmarks share: medians of calls that take turns, errors against float32, the machine, tables and JSON."""

import argparse
import datetime
import functools
import json
import os
import platform
import random
import statistics
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
from rich.console import Console
from rich.table import Table

RESULTS = Path(__file__).parent.parent / "docs" / "performance"
CPUINFO = Path("/proc/cpuinfo")
# The CPU's instructions that integer and bfloat16 matmuls live on, as Linux names them.
INSTRUCTIONS = ("avx2", "avx_vnni", "avx512f", "avx512_vnni", "avx512_bf16", "amx_int8", "amx_bf16")
# The relative mean error that no sound contender reaches and no broken one stays below, by the start of its name.
BOUNDS = {"float32": 1e-3, "bf16": 0.02, "W8": 0.05, "W4": 0.25, "NF4": 0.25}
FEWEST, PAUSE = 3, 0.02
# The precision at which JAX is allowed to round floats to bfloat16 before it multiplies them.
ROUNDING = "BF16_BF16_F32"

Call = Callable[[], Any]


def threads() -> int:
    """How many threads every contender gets: the cores this process may use, as JAX takes them."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def timed(call: Call) -> tuple[Any, float]:
    """What a call gives, once it is there, and the seconds it took."""
    start = time.perf_counter()
    out = jax.block_until_ready(call())
    return out, time.perf_counter() - start


def turns(passes: Mapping[str, Callable[[], Any]], runs: int, seconds: float = float("inf")) -> dict[str, Any]:
    """The medians of what each pass measures, all of them taking turns.

    Args:
      passes: each gives a tree of numbers when called.
      runs: how many turns.
      seconds: no turn begins after this many, but three do in any case (or `runs`, if that is fewer).

    Returns:
      For each pass, the same tree, of medians.
    """
    measured: dict[str, list[Any]] = {name: [] for name in passes}
    start = time.perf_counter()
    for turn in range(runs):
        if turn >= FEWEST and time.perf_counter() - start > seconds:
            break
        for name, one in passes.items():
            measured[name].append(one())
    return {name: jax.tree.map(lambda *all: statistics.median(all), *trees) for name, trees in measured.items()}


def medians(calls: Mapping[str, Call], runs: int, seconds: float = float("inf")) -> dict[str, float]:
    """The median seconds of each call, all of them taking turns in an order drawn anew, after one that does not count.

    For milliseconds after a call, threads of PyTorch go round waiting for the next and take a core from whoever has the
    turn then. Its calls therefore follow one another, with a pause and calls that do not count before them and after.
    """
    for call in calls.values():
        jax.block_until_ready(call())
    pools = [[name for name in calls if ("torch" in name) == torch] for torch in (False, True)]
    pools, draw = [pool for pool in pools if pool], random.Random(0)

    def one(pool: list[str]) -> dict[str, float]:
        draw.shuffle(pool)
        if len(pools) > 1:
            time.sleep(PAUSE)
            end = time.perf_counter() + PAUSE
            while time.perf_counter() < end:
                jax.block_until_ready(calls[pool[0]]())
        return {name: timed(calls[name])[1] for name in pool}

    found = turns({pool[0]: functools.partial(one, pool) for pool in pools}, runs, seconds)
    return {name: next(times[name] for times in found.values() if name in times) for name in calls}


def relative_error(reference: Any, out: Any) -> float:
    """The mean distance of two arrays, of any library, over the mean size of the first."""
    reference, out = (jnp.from_dlpack(array).astype(jnp.float32) for array in (reference, out))
    return float(jnp.abs(out - reference).mean() / jnp.abs(reference).mean())


def errors(calls: Mapping[str, Call], bounds: Mapping[str, float] = BOUNDS) -> dict[str, float]:
    """The relative error of every call against float32's.

    Args:
      calls: by name, one of them `float32`.
      bounds: what the error has to stay below, by the start of a name.

    Raises:
      AssertionError: one is so wrong that it does something else; its time would mean nothing.
    """
    reference = calls["float32"]()
    found = {name: relative_error(reference, call()) for name, call in calls.items()}
    for name, error in found.items():
        bound = next(bound for start, bound in bounds.items() if name.startswith(start))
        assert error < bound, f"{name} is off by {error:.3f} of float32, where less than {bound} was expected"
    return found


def machine() -> dict[str, Any]:
    """What the figures were measured on."""
    lines = CPUINFO.read_text().splitlines() if CPUINFO.exists() else []
    facts = {key.strip(): value.strip() for key, _, value in (line.partition(":") for line in lines)}
    flags = facts.get("flags", "").split()
    return {
        "cpu": facts.get("model name", platform.processor()),
        # The name of a virtual machine's CPU does not tell which it is: family 25 of AMD is Zen 3 or 4, 26 Zen 5.
        "family": facts.get("cpu family", ""),
        "cores": threads(),
        "instructions": [name for name in INSTRUCTIONS if name in flags],
        "backend": jax.default_backend(),
        "jax": jax.__version__,
        "python": platform.python_version(),
        "date": datetime.date.today().isoformat(),
    }


def title(what: str) -> str:
    """A table's title, with the machine under it."""
    m = machine()
    instructions = " ".join(m["instructions"]) or m["backend"]
    family = f" family {m['family']}" if m["family"] else ""
    return f"{what}\n{m['cpu']}{family}, {m['cores']} cores, {instructions}; jax {m['jax']}, {m['date']}"


def options(doc: str, name: str, runs: int, seconds: float) -> argparse.ArgumentParser:
    """A parser with what every benchmark's command takes."""
    parser = argparse.ArgumentParser(description=doc.splitlines()[0])
    path = RESULTS / f"{name}.json"
    shown = path.relative_to(RESULTS.parent.parent)
    parser.add_argument("--json", type=Path, default=path, metavar="PATH", help=f"where to (default: {shown})")
    parser.add_argument("--runs", type=int, default=runs, help=f"turns that are timed, at most (default: {runs})")
    parser.add_argument(
        "--seconds", type=float, default=seconds, help=f"for the turns of one column (default: {seconds:g})"
    )
    return parser


def write(path: Path, results: Any, console: Console) -> None:
    """Writes results, and the machine they are from, as JSON; figures to six digits."""
    path.parent.mkdir(parents=True, exist_ok=True)
    rounded = json.loads(json.dumps(results), parse_float=lambda number: float(f"{float(number):.6g}"))
    path.write_text(json.dumps({"machine": machine(), "results": rounded}, indent=1) + "\n")
    console.print(f"Written to {path.name}.", style="dim")


def records(errors: Mapping[str, float], times: Mapping[str, float], **column: Any) -> list[dict[str, Any]]:
    """What is written of one column of a table: a record for each contender, and what column it is."""
    return [
        column
        | {"contender": name, "milliseconds": 1e3 * seconds}
        | {"speedup": times["float32"] / seconds, "error": errors[name]}
        for name, seconds in times.items()
    ]


def table(what: str, found: list[dict[str, Any]]) -> Table:
    """The speed-ups of contenders over float32 by rows; other libraries, known by their brackets, come last."""
    cells = {(one["contender"], one["rows"]): one for one in found}
    names, rows = (list(dict.fromkeys(key)) for key in zip(*cells, strict=True))
    shown = Table("of float32's speed", title=title(what))
    for count in rows:
        shown.add_column(_rows(count), justify="right")
    shown.add_column("error", justify="right")
    ours = [name for name in names if "(" not in name]
    for name in [*ours, *(name for name in names if name not in ours)]:
        of_name = [cells[name, count] for count in rows]
        speedups = [f"[{'green' if one['speedup'] >= 1 else 'red'}]{one['speedup']:.2f}" for one in of_name]
        error = f"{max(one['error'] for one in of_name):.4f}"
        shown.add_row(name, *speedups, error, end_section=name == ours[-1])
    shown.add_section()
    shown.add_row("float32, ms", *(f"{cells['float32', count]['milliseconds']:.3f}" for count in rows))
    return shown


def print_against_others(found: list[dict[str, Any]], console: Console) -> None:
    """How ours compare with other libraries at the same arithmetic: called as ours is, and then by the library."""

    def cell(one: dict[str, Any]) -> tuple[Any, ...]:
        return one.get("shape", ""), one["rows"], one["contender"].partition(" (")[0]

    floats = ("float32", "bf16")
    mine = [one for one in found if "(" not in one["contender"] and one["contender"] not in floats]
    ours = {cell(one): one["milliseconds"] for one in mine}
    shown = Table("other library", title="speed-up of ours over other libraries")
    for heading in ("ours is faster in", "median", "least", "where"):
        shown.add_column(heading, justify="right")
    rivals = [one for one in found if "(" in one["contender"] and cell(one) in ours]
    for name in dict.fromkeys(one["contender"] for one in rivals):
        of_name = [one for one in rivals if one["contender"] == name]
        ratios = {cell(one): one["milliseconds"] / ours[cell(one)] for one in of_name}
        (shape, rows, _), least = min(ratios.items(), key=lambda item: item[1])
        wins = f"{sum(ratio > 1 for ratio in ratios.values())} of {len(ratios)}"
        middle = statistics.median(ratios.values())
        shown.add_row(name, wins, f"{middle:.2f}", f"{least:.2f}", f"{shape} {_rows(rows)}".strip())
    if rivals:
        console.print(shown)


def _rows(count: int) -> str:
    return f"{count} rows" if count > 1 else "1 row"
